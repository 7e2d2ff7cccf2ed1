// Starts everything that a page does beyond its HTML. Every page works without it. Its modules put in place what
// the server rendered; only KaTeX, for formulas, makes elements of its own.

import { sendByKeyboard } from "./composer.js"
import { forgetAcceptedDraft, forgetDraftsAtLogout, keepDraft } from "./draft.js"
import { sendForms } from "./forms.js"
import { LiveList } from "./live-list.js"
import { LiveReplies } from "./live-replies.js"
import { copyByButton, enrich } from "./prose.js"
import { stickToEnd } from "./stick-to-end.js"
import { showLocalTimes } from "./times.js"

stickToEnd()

const lists = []
for (const element of document.querySelectorAll("[data-live]")) {
  const list = new LiveList(element)
  lists.push(list)
  if ("events" in element.dataset) {
    const replies = new LiveReplies(list)
    list.onUpdate = (update) => replies.onListUpdate(update)
  }
}
showLocalTimes(document)
for (const text of document.querySelectorAll(".markdown")) enrich(text)
copyByButton()
sendForms(lists)
sendByKeyboard()

forgetAcceptedDraft()
const promptForm = document.querySelector("form.prompt")
if (promptForm) keepDraft(promptForm)
forgetDraftsAtLogout()

// A page out of the browser's memory may show what only a session may see, and its buttons are still off.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload()
})
