// The chats in the sidebar, as they are now; and which of them have a reply that has come since they were last seen in
// this browser.

import { readSetting, writeSetting } from "./composer.js"
import { joinStream } from "./stream.js"

const KEY = "seen"
const MAX_SEEN = 200
const place = document.getElementById("chats")

export const keepChats = () => {
  if (!place) return
  mark()
  joinStream(place.dataset, (html) => {
    put(html)
    mark()
  })
  document.addEventListener("visibilitychange", mark)
  addEventListener("storage", ({ key }) => { if (key === KEY) mark() })
  document.querySelector("form.leave").addEventListener("submit", () => writeSetting(KEY, null))
}

const linksOf = (parent) => [...parent.querySelectorAll(".chat-link")]
const hrefOf = (link) => link.getAttribute("href")
const idOf = ({ search }) => new URLSearchParams(search).get("id")
const isCurrent = (link) => link.pathname === location.pathname && idOf(link) === idOf(location)

// What is known of a chat is the newest of its turns that was seen. Such numbers only grow, so no window whose list is
// old takes back what another one knows.
const mark = () => {
  if (document.hidden) return
  const chats = linksOf(place).map((link) => {
    const { status, newest } = link.parentElement.dataset
    return { link, href: hrefOf(link), status, newest: Number(newest), isOpen: ["queued", "processing"].includes(status) }
  })
  const before = readSetting(KEY)
  const { since, seen } = JSON.parse(before) ?? firstSeen(chats)
  for (const { link, href, status, newest, isOpen } of chats) {
    if (isCurrent(link) && !isOpen) seen[href] = Math.max(newest, seen[href] ?? since)
    link.querySelector(".new").hidden = status !== "done" || newest <= (seen[href] ?? since)
  }
  const newestSeen = Object.entries(seen).sort(([, a], [, b]) => b - a).slice(0, MAX_SEEN)
  const after = JSON.stringify({ since, seen: Object.fromEntries(newestSeen) })
  if (after !== before) writeSetting(KEY, after)
}

// Whoever comes for the first time has seen all but what is still being written.
const firstSeen = (chats) => ({
  since: Math.max(0, ...chats.map(({ newest }) => newest)),
  seen: Object.fromEntries(chats.filter(({ isOpen }) => isOpen).map(({ href, newest }) => [href, newest - 1])),
})

// Where only states have changed the links stay, and with them a press that has begun on one.
const put = (html) => {
  const fresh = document.createElement("template")
  fresh.innerHTML = html
  if (outlineOf(fresh.content) === outlineOf(place)) {
    const links = linksOf(fresh.content)
    linksOf(place).forEach((link, n) => putState(link, links[n]))
    return
  }
  for (const link of linksOf(fresh.content)) if (isCurrent(link)) link.ariaCurrent = "page"
  const focused = place.contains(document.activeElement) ? hrefOf(document.activeElement) : null
  place.replaceChildren(fresh.content)
  if (focused) linksOf(place).find((link) => hrefOf(link) === focused)?.focus({ preventScroll: true })
}

const outlineOf = (parent) => (
  JSON.stringify([...parent.querySelectorAll("h2, .chat-link")].map((one) => (one.matches("h2") ? one.textContent : hrefOf(one))))
)

const putState = (link, fresh) => {
  Object.assign(link.parentElement.dataset, fresh.parentElement.dataset)
  for (const dot of link.querySelectorAll(".dot")) dot.remove()
  link.prepend(...fresh.querySelectorAll(".dot"))
  const [line, freshLine] = [link, fresh].map((one) => one.querySelector(".line"))
  if (!line.isEqualNode(freshLine)) line.replaceWith(freshLine)
}
