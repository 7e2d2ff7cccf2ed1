// What rendered Markdown gets beyond its HTML: a button on each code block, and typeset formulas.

import { typeset } from "./formulas.js"

const COPY = "Copy"
const COPIED = "Copied"
const NOT_COPIED = "Not copied"
const SHOWN_MS = 2000

export const enrich = (root) => {
  if (root.nodeType !== Node.ELEMENT_NODE) return
  const captions = root.matches("figure.code") ? root.querySelectorAll(":scope > figcaption") : root.querySelectorAll("figure.code > figcaption")
  for (const caption of captions) {
    if (caption.querySelector("button")) continue
    const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet copy", textContent: COPY })
    caption.append(button)
  }
  typeset(root)
}

export const copyByButton = () => {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("figure.code > figcaption > .copy")
    if (!button) return
    const isCopied = await copy(button.closest("figure").querySelector("code").textContent)
    button.textContent = isCopied ? COPIED : NOT_COPIED
    document.getElementById("announcement").textContent = button.textContent
    setTimeout(() => { button.textContent = COPY }, SHOWN_MS)
  })
}

const copy = async (text) => {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    return copyBySelection(text)
  }
}

// Over plain http a page has no clipboard of its own.
const copyBySelection = (text) => {
  const focused = document.activeElement
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "visually-hidden" })
  document.body.append(field)
  field.select()
  const isCopied = document.execCommand("copy")
  field.remove()
  focused?.focus({ preventScroll: true })
  return isCopied
}
