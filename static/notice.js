// The notice at the foot of a page, or above the form of a chat. It has two sources: an action's result stays until a person closes it or acts again;
// a list's problem never replaces such a result, and goes when the list works again.

import { _ } from "./words.js"

const element = document.getElementById("trouble")
let isPinned = false

const show = (text, { link, closes } = {}) => {
  isPinned = Boolean(closes)
  const label = link ? _("Log in (new tab)") : closes ? _("Close") : ""
  // The same again would be read aloud again.
  if (element.textContent === (label ? `${text} ${label}` : text)) return
  element.textContent = text
  if (link) {
    const anchor = document.createElement("a")
    // A new tab, because this page holds what was typed.
    Object.assign(anchor, { href: link, target: "_blank", rel: "noopener", textContent: label })
    element.append(" ", anchor)
  } else if (closes) {
    const button = document.createElement("button")
    Object.assign(button, { type: "button", className: "quiet", textContent: label, onclick: hideNotice })
    element.append(" ", button)
  }
  element.hidden = !text
}

export const hideNotice = () => show("")

export const showResult = (text) => show(text, { closes: true })

export const showSessionEnded = () => {
  show(_("Your session has ended. What you typed here is not lost."), { link: "/chat/login" })
}

export const showProblem = (text) => {
  if (!isPinned) show(text)
}

export const hideProblem = () => {
  if (!isPinned) hideNotice()
}
