// A prompt that was sent is edited in the page's form: one that waits is changed, any other gets a version beside it.

import { showResult } from "./notice.js"
import { postForm } from "./request.js"
import { visible } from "./visible.js"
import { _ } from "./words.js"

// What was typed before the edit began comes back when it is left.
let typedBefore = ""

const banner = (form) => form.querySelector(".editing")

const begin = (form, item) => {
  const fields = form.elements
  if (banner(form).hidden) typedBefore = fields.content.value
  fields.content.value = item.querySelector(".you .text").textContent
  fields.beside.value = item.dataset.turnId
  if (item.dataset.status === "queued") form.dataset.waiting = item.id.slice("job-".length)
  else delete form.dataset.waiting
  banner(form).hidden = false
  fields.content.dispatchEvent(new Event("input", { bubbles: true }))
  fields.content.focus()
}

export const endEdit = (form, text = typedBefore) => {
  form.elements.content.value = text
  form.elements.beside.value = ""
  delete form.dataset.waiting
  banner(form).hidden = true
  form.elements.content.dispatchEvent(new Event("input", { bubbles: true }))
  form.elements.content.focus()
}

export const isEditing = (form) => form.elements.beside.value !== ""

export const editPrompts = (form) => {
  // A draft may be an edit that the page was left in.
  banner(form).hidden = !isEditing(form)
  banner(form).querySelector("button").addEventListener("click", () => endEdit(form))
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-edit]")
    if (button) begin(form, button.closest("li"))
  })
}

// Changes the prompt that waits. Where it has been started meanwhile, the server shows what can be done instead.
export const sendEdit = async (form, content) => {
  const action = `/chat/jobs/${Number(form.dataset.waiting)}/edit`
  const response = await postForm(form, { action, changes: { content } })
  if ([401, 403, 409].includes(response.status)) {
    form.elements.content.value = content
    form.setAttribute("action", action)
    form.submit()
  } else if (response.ok) {
    endEdit(form, "")
    location.reload()
  } else showResult(_("Not sent. %(why)s", { why: visible((await response.json()).detail) }))
}
