// Starts everything that a page does beyond its HTML. Every page works without it. Its modules put in place what
// the server rendered; only KaTeX, for formulas, makes elements of its own.

import { attachFiles } from "./attachments.js"
import { keepChats } from "./chats.js"
import { compose, focusWithoutKeyboard, sendByKeyboard } from "./composer.js"
import { offerCopies } from "./copy.js"
import { forgetAcceptedDraft, forgetDraftsAtLogout, keepDraft } from "./draft.js"
import { bringEarlier } from "./earlier.js"
import { editPrompts } from "./edit.js"
import { watchEnds } from "./ended.js"
import { sendForms } from "./forms.js"
import { checkImports } from "./imports.js"
import { useKeys } from "./keys.js"
import { LiveList } from "./live-list.js"
import { LiveReplies } from "./live-replies.js"
import { changeLookAtOnce } from "./look.js"
import { copyByButton, enrich } from "./prose.js"
import { stickToEnd } from "./stick-to-end.js"
import { nameZone, showLocalTimes } from "./times.js"
import { useTools } from "./tools.js"

stickToEnd()

const lists = []
for (const element of document.querySelectorAll("[data-live]")) {
  const list = new LiveList(element)
  lists.push(list)
  if ("follow" in element.dataset) {
    const replies = new LiveReplies(list)
    const noticeEnds = watchEnds(list)
    list.onUpdate = (update) => {
      replies.onListUpdate(update)
      noticeEnds()
    }
  }
}
keepChats()
nameZone()
// The first time that a browser writes takes longer than all else here. Until then the server's stand there.
requestAnimationFrame(() => setTimeout(() => showLocalTimes(document)))
bringEarlier()
changeLookAtOnce()
for (const text of document.querySelectorAll(".markdown")) enrich(text)
copyByButton()
sendForms(lists)
sendByKeyboard()
useTools()
useKeys()
offerCopies()
checkImports()

const hasJustSent = forgetAcceptedDraft()
const promptForm = document.querySelector("form.prompt")
if (promptForm) {
  keepDraft(promptForm)
  attachFiles(promptForm)
  editPrompts(promptForm)
  compose(promptForm)
  if (hasJustSent || promptForm.matches(".new *")) focusWithoutKeyboard(promptForm.elements.content)
}
forgetDraftsAtLogout()

// It shows a page of its own where the server cannot be reached. The version is that of all static files.
const version = new URL(import.meta.url).pathname.split("/").at(-2)
navigator.serviceWorker?.register(`/chat/sw.js?v=${version}`, { scope: "/chat/" }).catch(() => {})

// A page out of the browser's memory may show what only a session may see, and its buttons are still off.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload()
})
