// Files that are put into a message as text, each as a fenced block under its name. They are read in the browser; what
// the browser cannot read as text, the server may (PDF).

import { showResult } from "./notice.js"
import { _ } from "./words.js"

const MAX_BYTES = 400_000
const MAX_PDF_BYTES = 15_000_000
const READ_ON_SERVER = "/chat/attachment"
const FENCE = /`{3,}/g

// By form: the files as [{ name, text }].
const attachedTo = new WeakMap()

export const attached = (form) => attachedTo.get(form) ?? []

// What is typed, with the files behind it.
export const withAttachments = (form) => {
  const typed = form.elements.content.value
  if (!attached(form).length) return typed
  const blocks = attached(form).map(({ name, text }) => {
    const fence = "`".repeat(Math.max(3, ...[...text.matchAll(FENCE)].map(([run]) => run.length + 1)))
    return `${name}\n${fence}${languageOf(name)}\n${text.replace(/\n$/, "")}\n${fence}`
  })
  return [typed.trimEnd(), ...blocks].filter(Boolean).join("\n\n")
}

export const setAttachments = (form, files) => {
  attachedTo.set(form, files)
  const list = form.querySelector(".attached")
  list.replaceChildren(...files.map((file) => chip(form, file)))
  list.hidden = files.length === 0
  // A message may be files alone.
  form.elements.content.required = files.length === 0
}

export const attachFiles = (form) => {
  const picker = form.querySelector("[data-files]")
  setAttachments(form, attached(form))
  form.querySelector("[data-attach]").addEventListener("click", () => picker.click())
  picker.addEventListener("change", async () => {
    await add(form, [...picker.files])
    // So that the same file can be chosen again.
    picker.value = ""
  })
  form.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return
    event.preventDefault()
    form.dataset.drop = ""
  })
  form.addEventListener("dragleave", () => { delete form.dataset.drop })
  form.addEventListener("drop", (event) => {
    delete form.dataset.drop
    if (!event.dataTransfer.files.length) return
    event.preventDefault()
    add(form, [...event.dataTransfer.files])
  })
  form.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length || event.clipboardData.getData("text/plain")) return
    event.preventDefault()
    add(form, [...event.clipboardData.files])
  })
}

const add = async (form, files) => {
  const problems = []
  for (const file of files) {
    try {
      const text = await read(file, form)
      setAttachments(form, [...attached(form), { name: file.name.replace(/[\p{Cc}`]/gu, " "), text }])
    } catch (problem) {
      problems.push(problem.message)
    }
  }
  if (problems.length) showResult(problems.join(" "))
  form.elements.content.focus()
}

const read = async (file, form) => {
  const isPdf = file.type === "application/pdf" || /\.pdf$/i.test(file.name)
  const most = isPdf ? MAX_PDF_BYTES : MAX_BYTES
  if (file.size > most) {
    throw new Error(_("%(name)s was not attached: it has %(size)s, at most %(most)s can be.", {
      name: file.name, size: inWords(file.size), most: inWords(most),
    }))
  }
  if (isPdf) return readOnServer(file, form)
  const text = new TextDecoder("utf-8").decode(await file.arrayBuffer())
  // Text has no NUL, and hardly a byte that is no UTF-8.
  const nUnreadable = text.split("\ufffd").length - 1
  if (text.includes("\0") || nUnreadable > text.length / 100) {
    throw new Error(_("%(name)s was not attached: it is no text in UTF-8.", { name: file.name }))
  }
  return text.replace(/\r\n?/g, "\n")
}

// Answers {"text": …}, or a problem.
const readOnServer = async (file, form) => {
  const response = await fetch(`${READ_ON_SERVER}?name=${encodeURIComponent(file.name)}`, {
    method: "POST",
    headers: {
      Accept: "application/json", "Content-Type": "application/pdf", "X-CSRF-Token": form.elements.csrf_token.value,
    },
    body: file,
  }).catch(() => null)
  const answer = await response?.json().catch(() => null)
  if (!response?.ok || typeof answer?.text !== "string") {
    const why = response?.status === 404 || !answer?.detail ? _("it cannot be read here") : answer.detail
    throw new Error(_("%(name)s was not attached: %(why)s.", { name: file.name, why: why.replace(/\.$/, "") }))
  }
  return answer.text
}

const chip = (form, file) => {
  const item = document.createElement("li")
  const name = document.createElement("bdi")
  name.textContent = file.name
  const size = document.createElement("span")
  Object.assign(size, { className: "hint", textContent: inWords(new Blob([file.text]).size) })
  const button = document.createElement("button")
  Object.assign(button, { type: "button", className: "icon", textContent: "×" })
  button.setAttribute("aria-label", _("Remove %(name)s", { name: file.name }))
  button.addEventListener("click", () => {
    setAttachments(form, attached(form).filter((other) => other !== file))
    form.elements.content.focus()
  })
  item.append(name, " ", size, button)
  return item
}

const languageOf = (name) => name.match(/\.([a-z0-9]{1,8})$/i)?.[1].toLowerCase() ?? ""

const inWords = (bytes) => (bytes < 1000 ? `${bytes} B` : bytes < 1e6 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`)
