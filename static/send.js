// Sends the form of a prompt in the background, so that the page, its focus and what runs on it stay. What the server
// refuses stays in the form; where it asks for a login or a fresh form, the browser sends it itself and shows that page.

import { nameOfUnread, setAttachments, withAttachments } from "./attachments.js"
import { endComparison } from "./composer.js"
import { forgetAcceptedDraft } from "./draft.js"
import { endEdit, isEditing, sendEdit } from "./edit.js"
import { hideNotice, showResult } from "./notice.js"
import { postForm } from "./request.js"
import { goToEnd } from "./stick-to-end.js"
import { visible } from "./visible.js"
import { _ } from "./words.js"

// A large message on a slow connection takes its time.
const TIMEOUT_MS = 120_000
const LOGIN_OR_STALE = [401, 403]

// `lists`: polled once the prompt is accepted.
export const sendPrompt = async (form, lists) => {
  const { content } = form.elements
  const unread = nameOfUnread(form)
  if (unread) {
    showResult(_("Not sent yet: %(name)s is still being read.", { name: unread }))
    return
  }
  const typed = content.value
  const sent = withAttachments(form)
  hideNotice()
  // The branch that the page shows by now, which may have gone on by several answers side by side.
  form.elements.seen.value = lists[0]?.seen ?? form.elements.seen.value
  try {
    if (form.dataset.waiting) {
      await sendEdit(form, sent)
      return
    }
    const response = await postForm(form, { signal: AbortSignal.timeout(TIMEOUT_MS), changes: { content: sent } })
    if (LOGIN_OR_STALE.includes(response.status)) {
      content.value = sent
      setAttachments(form, [])
      // Not requestSubmit: that would come here again.
      form.submit()
      return
    }
    const answer = await response.json()
    if (!response.ok) showResult(_("Not sent. %(why)s", { why: visible(answer.detail) }))
    else await showAccepted(form, lists, answer, typed)
  } catch {
    showResult(_("Not sent: there is no connection to Llamalith just now. What you typed stays here."))
  }
}

const showAccepted = async (form, lists, { url, once }, typed) => {
  const fields = form.elements
  const target = new URL(url, location.href)
  const isHere = target.pathname === location.pathname && target.search === location.search
  if (isEditing(form)) {
    // The page shows another branch from now on.
    endEdit(form, "")
    location.assign(target)
    if (isHere) location.reload()
    return
  }
  if (!isHere || !lists.length) {
    location.assign(target)
    return
  }
  forgetAcceptedDraft()
  // What was typed meanwhile stays.
  fields.content.value = fields.content.value.startsWith(typed) ? fields.content.value.slice(typed.length) : fields.content.value
  fields.content.dispatchEvent(new Event("input", { bubbles: true }))
  setAttachments(form, [])
  endComparison(form)
  fields.once.value = once
  fields.system_prompt_was.value = fields.system_prompt.value
  fields.system_prompt.defaultValue = fields.system_prompt.value
  fields.content.focus()
  await Promise.all(lists.map((list) => list.poll()))
  goToEnd()
}
