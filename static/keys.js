// Keys for the whole page, and the sheet that explains them.

import { enterSends, setEnterSends } from "./composer.js"
import { setNotification, wantsNotification } from "./ended.js"
import { copyFrom } from "./tools.js"

const sheet = document.getElementById("keys")

const isTyping = (element) => element.matches("input, textarea, select, [contenteditable]")

const messages = () => [...document.querySelectorAll(".turns .said")]

const follows = (one, turn) => turn && turn.compareDocumentPosition(one) & Node.DOCUMENT_POSITION_FOLLOWING

// To the message before or after the one that has the focus, or that is at the top of the window.
const move = (step) => {
  const all = messages()
  if (!all.length) return
  const top = document.querySelector(".bar").getBoundingClientRect().bottom
  const isInSight = (element) => element.getBoundingClientRect().bottom > top + 8
  let at = all.findIndex((one) => one.contains(document.activeElement))
  if (at === -1) {
    // First its turn: where messages far away are, the browser would have to find out.
    const turn = [...document.querySelectorAll(".turns > li")].find(isInSight)
    at = all.findIndex((one) => (turn?.contains(one) ? isInSight(one) : follows(one, turn)))
    if (at === -1) at = all.length
    else if (step > 0) at -= 1
  }
  const target = all[Math.min(Math.max(at + step, 0), all.length - 1)]
  target.tabIndex = -1
  target.focus({ preventScroll: true })
  target.scrollIntoView({ block: "start" })
}

const search = () => {
  const sidebar = document.getElementById("sidebar")
  const field = sidebar.querySelector("[type=search]")
  if (!field.checkVisibility()) sidebar.showPopover()
  field.focus()
  field.select()
}

const ACTIONS = {
  "?": () => sheet.togglePopover(),
  "/": search,
  n: () => location.assign("/chat/"),
  j: () => move(1),
  k: () => move(-1),
  r: () => document.getElementById("content")?.focus(),
  c: () => {
    const last = [...document.querySelectorAll(".said.model [data-copy]")].at(-1)
    if (last) copyFrom(last)
  },
}

const stopWhatRuns = () => document.querySelector('[data-status="processing"] form.cancel')?.requestSubmit()

const onEscape = (event) => {
  // The browser closes these itself.
  if (document.querySelector(":popover-open")) return
  const menu = document.querySelector("details.menu[open]")
  if (menu) {
    menu.open = false
    menu.querySelector("summary").focus()
  } else if (isTyping(event.target)) {
    // A second one stops: a slip of the hand ends no reply.
    event.target.blur()
  } else stopWhatRuns()
}

export const useKeys = () => {
  if (!sheet) return
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented || event.repeat) return
    if (event.key === "Escape") {
      onEscape(event)
      return
    }
    const action = ACTIONS[event.key]
    if (!action || isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    action()
  })
  const enter = sheet.querySelector("[name=enter]")
  enter.checked = enterSends()
  enter.addEventListener("change", () => setEnterSends(enter.checked))
  const notices = sheet.querySelector("[name=notices]")
  notices.checked = wantsNotification()
  notices.addEventListener("change", async () => { notices.checked = await setNotification(notices.checked) })
}
