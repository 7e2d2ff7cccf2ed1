// The turns before those that a page shows: they come by themselves as a reader scrolls up to them, and what is read stays
// where it is. The link to them works without this, and by the keyboard it brings them here.

import { getPage } from "./request.js"
import { enrich } from "./prose.js"
import { showLocalTimes } from "./times.js"

// How far above the window the beginning of the page is when the next ones are asked for.
const AHEAD = "1500px 0px 0px"
const RETRY_MS = 3000

const page = document.documentElement

// An open turn is kept fresh by its list, which does not know those that come here.
const mayBring = (list) => !list.firstElementChild?.matches("[data-status=queued], [data-status=processing]")

// What a reader sees stays in its place. Browsers do that themselves, but not all of them, and not at the very top.
const insertAbove = (list, items) => {
  const first = list.firstElementChild ?? list
  const before = first.getBoundingClientRect().top
  page.style.overflowAnchor = "none"
  list.prepend(...items)
  page.scrollTop += first.getBoundingClientRect().top - before
  requestAnimationFrame(() => { page.style.overflowAnchor = "" })
}

// The new turns, oldest first; null where they cannot be had just now.
const bring = async (pager, list) => {
  const link = pager.querySelector("a")
  const { response, text } = await getPage(link.dataset.earlier).catch(() => ({ response: { ok: false } }))
  // A list that was brought in anew meanwhile has them already, or is that of another branch.
  if (!response.ok || response.redirected || !link.isConnected) return null
  const fresh = new DOMParser().parseFromString(text, "text/html")
  const items = [...fresh.querySelectorAll(".turns > li")].filter((item) => !document.getElementById(item.id))
  for (const item of items) {
    showLocalTimes(item)
    for (const one of item.querySelectorAll(".markdown")) enrich(one)
  }
  const hadFocus = document.activeElement === link
  if (items.length) insertAbove(list, items)
  pager.replaceChildren(...fresh.querySelector(".earlier").childNodes)
  if (hadFocus) pager.querySelector("a")?.focus({ preventScroll: true })
  return items
}

// Where a reader is, if a page that is loaded anew does not have it: the turn at the top, and how far above the window it
// begins. `oldest`: the first turn that a page has by itself.
const rememberPlace = (list, oldest) => {
  const turn = [...list.children].find((item) => item.getBoundingClientRect().bottom > 0)
  const isBrought = turn && turn.compareDocumentPosition(oldest) & Node.DOCUMENT_POSITION_FOLLOWING
  const place = isBrought ? { turn: Number(turn.dataset.turn), top: turn.getBoundingClientRect().top } : null
  if (!place && !history.state?.place) return
  history.replaceState({ ...history.state, place }, "")
  // Else the browser would scroll as well, to where that was without these turns.
  history.scrollRestoration = place ? "manual" : "auto"
}

const goBackTo = async (place, list, start) => {
  const first = () => Number(list.firstElementChild.dataset.turn)
  while (first() > place.turn) if (!(await start())?.length) return
  const turn = [...list.children].find((item) => Number(item.dataset.turn) >= place.turn)
  turn.scrollIntoView({ block: "start" })
  // Until it is seen, its height is only estimated.
  for (let n = 0; n < 2; n += 1) await new Promise(requestAnimationFrame)
  page.scrollTop += turn.getBoundingClientRect().top - place.top
}

export const bringEarlier = () => {
  const pager = document.querySelector(".earlier")
  const list = document.querySelector(".turns")
  if (!pager?.firstElementChild || !list || !mayBring(list)) return
  const oldest = list.firstElementChild
  let bringing = null
  const start = () => {
    if (pager.firstElementChild) bringing ??= bring(pager, list).finally(() => { bringing = null })
    return bringing
  }
  if (history.state?.place) goBackTo(history.state.place, list, start)
  if (oldest) addEventListener("scrollend", () => rememberPlace(list, oldest))

  const observer = new IntersectionObserver(async (entries) => {
    if (!entries.at(-1).isIntersecting || bringing) return
    // Under the focus nothing is taken away: who is on the link uses it.
    if (pager.contains(document.activeElement)) return
    const items = await start()
    observer.unobserve(pager)
    // Observed anew, so that it says so where the page still begins near by.
    if (pager.firstElementChild) setTimeout(() => observer.observe(pager), items ? 0 : RETRY_MS)
  }, { rootMargin: AHEAD })
  observer.observe(pager)

  pager.addEventListener("click", async (event) => {
    const link = event.target.closest("a")
    if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return
    event.preventDefault()
    const items = await start()
    const target = items?.flatMap((item) => [...item.querySelectorAll(".said")]).at(-1)
    if (!items) location.assign(link.href)
    else if (target) {
      target.tabIndex = -1
      target.focus({ preventScroll: true })
      target.scrollIntoView({ block: "nearest" })
    }
  })
}
