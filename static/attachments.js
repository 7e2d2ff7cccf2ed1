// Files that are put into a message as text, each as a fenced block under its name. They are read in the browser; what
// the browser cannot read as text, the server may (PDF, other encodings). Until it has, nothing is sent.

import { showResult, showSessionEnded } from "./notice.js"
import { visible } from "./visible.js"
import { _ } from "./words.js"

const MAX_BYTES = 400_000
// As the server has it, too.
const MAX_PDF_BYTES = 16_000_000
const READ_ON_SERVER = "/chat/attachments"
// For a slow connection, and for a PDF that is hard to read.
const TIMEOUT_MS = 300_000
const MAX_NAME = 200
const UTF_16_MARKS = ["255 254", "254 255"]
const FENCE = /`{3,}/g

// By form: the files as [{ name, text }].
const attachedTo = new WeakMap()
// By form: what the server is reading, as [{ name, controller }].
const readFor = new WeakMap()

export const attached = (form) => attachedTo.get(form) ?? []

const beingRead = (form) => readFor.get(form) ?? []

// The name of a file that is not in the message yet; none: all are.
export const nameOfUnread = (form) => beingRead(form)[0]?.name

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
  showFiles(form)
}

const setBeingRead = (form, readings) => {
  readFor.set(form, readings)
  showFiles(form)
}

const showFiles = (form) => {
  const chips = [...attached(form).map((file) => chip(form, file)), ...beingRead(form).map((reading) => chipOfReading(form, reading))]
  const list = form.querySelector(".attached")
  list.replaceChildren(...chips)
  list.hidden = chips.length === 0
  // A message may be files alone.
  form.elements.content.required = chips.length === 0
}

export const attachFiles = (form) => {
  const picker = form.querySelector("[data-files]")
  setAttachments(form, attached(form))
  form.querySelector("[data-attach]").addEventListener("click", () => picker.click())
  picker.addEventListener("change", () => {
    const files = [...picker.files]
    // So that the same file can be chosen again.
    picker.value = ""
    add(form, files)
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
  form.elements.content.focus()
  const problems = []
  let isLoggedOut = false
  for (const file of files) {
    try {
      const { note, ...added } = await read(file, form)
      setAttachments(form, [...attached(form), added])
      if (note) problems.push(`${added.name}: ${note}`)
    } catch (problem) {
      // Nobody has to be told what they have done.
      if (problem.name === "AbortError") continue
      isLoggedOut ||= problem.isLoggedOut
      problems.push(problem.message)
    }
  }
  if (isLoggedOut) showSessionEnded()
  else if (problems.length) showResult(problems.join(" "))
}

// As the server shows it: nothing invisible, and nothing that would begin a block of code in the message.
const shown = (name) => visible(name.replaceAll("`", "'").replace(/[\t\n\r]/g, " ").slice(0, MAX_NAME))

const problemOf = (file, why) => {
  return new Error(_("%(name)s was not attached: %(why)s", { name: shown(file.name), why: visible(why) }))
}

// { name, text, note }: the note says what of the file is missing, if anything is.
const read = async (file, form) => {
  const isPdf = file.type === "application/pdf" || /\.pdf$/i.test(file.name)
  const most = isPdf ? MAX_PDF_BYTES : MAX_BYTES
  if (file.size > most) {
    throw problemOf(file, _("it has %(size)s, at most %(most)s can be.", { size: inWords(file.size), most: inWords(most) }))
  }
  if (!isPdf) {
    const text = await textOf(file)
    if (text !== null) return { name: shown(file.name), text: text.replace(/\r\n?/g, "\n") }
  }
  const reading = { name: shown(file.name), controller: new AbortController() }
  setBeingRead(form, [...beingRead(form), reading])
  try {
    return await readOnServer(file, form, reading.controller.signal)
  } finally {
    setBeingRead(form, beingRead(form).filter((other) => other !== reading))
  }
}

// null: it is in another encoding.
const textOf = async (file) => {
  const bytes = await file.arrayBuffer().catch(() => {
    // It was moved or changed since it was chosen.
    throw problemOf(file, _("it cannot be read."))
  })
  const start = new Uint8Array(bytes.slice(0, 2)).join(" ")
  if (UTF_16_MARKS.includes(start)) return null
  if (new Uint8Array(bytes).includes(0)) throw problemOf(file, _("it is neither text nor a PDF."))
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes)
  } catch {
    return null
  }
}

const readOnServer = async (file, form, cancelled) => {
  const body = new FormData()
  body.append("csrf_token", form.elements.csrf_token.value)
  body.append("file", file)
  let response, answer
  try {
    response = await fetch(READ_ON_SERVER, {
      method: "POST",
      headers: { Accept: "application/json" },
      body,
      signal: AbortSignal.any([cancelled, AbortSignal.timeout(TIMEOUT_MS)]),
    })
    answer = await response.json().catch(() => ({}))
  } catch (error) {
    if (cancelled.aborted) throw error
    throw problemOf(file, _("there is no connection to Llamalith just now."))
  }
  if (response.status === 401) throw Object.assign(problemOf(file, _("your session has ended.")), { isLoggedOut: true })
  if (response.ok && typeof answer.text === "string") return { name: answer.name, text: answer.text, note: answer.note }
  throw problemOf(file, answer.detail ?? _("it cannot be read here."))
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

const chipOfReading = (form, { name: text, controller }) => {
  const item = document.createElement("li")
  const name = document.createElement("bdi")
  name.textContent = text
  const progress = document.createElement("progress")
  progress.setAttribute("aria-label", _("%(name)s is being read", { name: text }))
  const button = document.createElement("button")
  Object.assign(button, { type: "button", className: "icon", textContent: "×" })
  button.setAttribute("aria-label", _("Do not attach %(name)s", { name: text }))
  button.addEventListener("click", () => {
    controller.abort()
    form.elements.content.focus()
  })
  item.append(name, " ", progress, button)
  return item
}

// That of a PDF says nothing of its text.
const languageOf = (name) => name.match(/\.(?!pdf$)([a-z0-9]{1,8})$/i)?.[1].toLowerCase() ?? ""

export const inWords = (bytes) => (bytes < 1000 ? `${bytes} B` : bytes < 1e6 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`)
