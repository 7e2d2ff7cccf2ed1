// How forms are sent: each once; a prompt and the buttons of a job in the background, because the page may hold a message
// that is being typed.

import { hideNotice, showResult, showSessionEnded } from "./notice.js"
import { postForm } from "./request.js"
import { sendPrompt } from "./send.js"
import { visible } from "./visible.js"
import { _ } from "./words.js"

const SENDING_MS = 8000

// `lists`: polled after a job's button; without any, such a form is sent like the others.
export const sendForms = (lists) => {
  const sent = new WeakSet()
  const isBackground = (form) => lists.length > 0 && form.matches("form.cancel, form.retry, form.priority")

  // On the document, and so also for buttons that a list brings later.
  document.addEventListener("submit", async (event) => {
    const form = event.target
    if (event.defaultPrevented) return
    if (sent.has(form)) {
      event.preventDefault()
      return
    }
    sent.add(form)
    if (form.matches(".prompt")) {
      event.preventDefault()
      await sendPrompt(form, lists)
      sent.delete(form)
      return
    }
    if (!isBackground(form)) {
      lockWhileSending(form, sent)
      return
    }
    event.preventDefault()
    await sendInBackground(form, event.submitter, sent)
    await Promise.all(lists.map((list) => list.poll()))
  })
}

const lockWhileSending = (form, sent) => {
  // Those that were locked before stay so.
  const buttons = [...form.elements].filter((one) => one.matches("button:enabled"))
  const lock = (isLocked) => buttons.forEach((button) => { button.disabled = isLocked })
  // After the browser has collected the fields; unlocked again in case the person stopped the sending.
  setTimeout(() => lock(true))
  setTimeout(() => {
    sent.delete(form)
    lock(false)
  }, SENDING_MS)
}

const sendInBackground = async (form, submitter, sent) => {
  hideNotice()
  let problem = ""
  try {
    const response = await postForm(form, { submitter })
    if (response.redirected && new URL(response.url).pathname === "/chat/login") showSessionEnded()
    else if (!response.ok) problem = _("That was not done. %(why)s", { why: visible((await response.json()).detail) })
    else if (form.matches(".retry")) showRetried(form)
  } catch {
    problem = _("That was not done: there is no connection to Llamalith just now.")
  } finally {
    sent.delete(form)
  }
  if (problem) showResult(problem)
}

// In a conversation a turn that has ended does not come again; its retry is a new turn at the end.
const showRetried = (form) => {
  if (!form.closest("[data-part]")) return
  const hint = document.createElement("p")
  Object.assign(hint, { className: "hint", textContent: _("Tried again, as the last message."), tabIndex: -1 })
  const hadFocus = form.contains(document.activeElement)
  form.replaceWith(hint)
  if (hadFocus) hint.focus()
}
