// Drafts: what was typed into a prompt's form is kept in this tab until the server has accepted it. It survives a server
// that was away, a session that ended and a way back. A draft is kept with the `once` of its form: whether a form that
// was sent has arrived is unknown until a page shows its job, and sent again under the same `once` it makes no second
// one.

import { attached, setAttachments } from "./attachments.js"

// What the server puts into each form anew.
const NOT_KEPT = ["csrf_token", "conversation_id", "seen"]
const PREFIX = "typed "
const KEY = `${PREFIX}${location.pathname}${location.search}`
// The `once` of the forms that the server has accepted, the newest last.
const ACCEPTED_KEY = "taken"
const MAX_ACCEPTED = 50

const store = (key, value) => {
  try {
    if (value === null) sessionStorage.removeItem(key)
    else sessionStorage.setItem(key, JSON.stringify(value))
  } catch {
    // The storage is full or switched off: then only the browser itself may still have the draft.
  }
}

const load = (key) => {
  try {
    return JSON.parse(sessionStorage.getItem(key))
  } catch {
    return null
  }
}

const acceptedForms = () => load(ACCEPTED_KEY) ?? []

const removeDrafts = (matches) => {
  for (const key of Object.keys(sessionStorage)) if (key.startsWith(PREFIX) && matches(load(key))) store(key, null)
}

// The server sets a cookie with the page that shows the job of an accepted form. Returns whether this is such a page.
export const forgetAcceptedDraft = () => {
  const [, prefix, once] = document.cookie.match(/(?:^|; )(__Host-)?llamalith_taken=([\w-]+)/) ?? []
  if (!once) return false
  document.cookie = prefix
    ? "__Host-llamalith_taken=; Max-Age=0; Path=/; SameSite=Strict; Secure"
    : "llamalith_taken=; Max-Age=0; Path=/chat; SameSite=Strict"
  store(ACCEPTED_KEY, [...acceptedForms(), once].slice(-MAX_ACCEPTED))
  removeDrafts((draft) => draft?.once === once)
  return true
}

let form = null

const keptFields = () => [...form.elements].filter(({ name }) => name && !NOT_KEPT.includes(name))

const valueOf = ({ type }) => (type === "checkbox" ? "checked" : "value")

const save = () => {
  const fields = form.elements
  const files = attached(form)
  const isTyped = fields.content.value.trim() !== "" || files.length > 0
    || fields.system_prompt.value !== fields.system_prompt.defaultValue
  const isDraft = isTyped && !acceptedForms().includes(fields.once.value)
  const values = Object.fromEntries(keptFields().map((field) => [field.name, field[valueOf(field)]]))
  store(KEY, isDraft ? { ...values, files } : null)
}

// Restores the draft of this page into its form, and saves it when the page is left.
export const keepDraft = (promptForm) => {
  form = promptForm
  const fields = form.elements
  // On a way back the browser would also restore what was accepted.
  form.autocomplete = "off"
  const draft = load(KEY)
  if (draft && fields.content.defaultValue === "") {
    for (const field of keptFields()) field[valueOf(field)] = draft[field.name] ?? field[valueOf(field)]
    setAttachments(form, draft.files ?? [])
  }
  addEventListener("pagehide", save)
}

// On a shared machine nobody is to find what another person wrote.
export const forgetDraftsAtLogout = () => {
  document.querySelector("form.leave")?.addEventListener("submit", () => {
    removeDrafts(() => true)
    store(ACCEPTED_KEY, null)
    removeEventListener("pagehide", save)
  })
}
