// The form of a prompt while it is filled in: the keys that send it, its growth with the text, its parameters. Sending
// itself is in send.js.

import { _ } from "./words.js"

const ENTER_KEY = "enter"

// Without it Enter makes a new line and Shift + Enter sends. On a touch screen Enter always makes a new line: there is
// no Shift to hold.
export const enterSends = () => readSetting(ENTER_KEY) !== "breaks"
export const setEnterSends = (isOn) => {
  writeSetting(ENTER_KEY, isOn ? null : "breaks")
  showKeys()
}

export const readSetting = (key) => {
  try {
    return localStorage.getItem(key)
  } catch {
    return null
  }
}

export const writeSetting = (key, value) => {
  try {
    if (value === null) localStorage.removeItem(key)
    else localStorage.setItem(key, value)
  } catch {
    // Switched off: then it holds for this page alone.
  }
}

const isTouch = matchMedia("(hover: none) and (pointer: coarse)")

const showKeys = () => {
  const words = enterSends() ? _("Enter sends") : _("Shift + Enter sends")
  for (const hint of document.querySelectorAll("[data-hint=keys]")) hint.textContent = isTouch.matches ? "" : words
}

const sends = (event) => {
  if (event.key !== "Enter" || event.repeat || event.isComposing || !event.target.form?.matches(".prompt")) return false
  if (event.ctrlKey || event.metaKey) return true
  return event.target.name === "content" && !event.altKey && !isTouch.matches && event.shiftKey !== enterSends()
}

export const sendByKeyboard = () => {
  showKeys()
  document.addEventListener("keydown", (event) => {
    if (!sends(event)) return
    event.preventDefault()
    event.target.form.requestSubmit()
  })
}

// On a touch screen the keyboard would cover what was just opened. The browser takes the focus away when it goes to the
// place that the address names, which it does until the page has loaded.
export const focusWithoutKeyboard = (field) => {
  if (isTouch.matches) return
  const focus = () => field.focus({ preventScroll: true })
  if (location.hash && document.readyState !== "complete") addEventListener("load", () => setTimeout(focus))
  else focus()
}

export const compose = (form) => {
  const { content, model, system_prompt: systemPrompt } = form.elements
  if (!CSS.supports("field-sizing", "content")) growByScript(content)
  const parameters = [...form.querySelectorAll(".parameters :is(input, textarea)")]
  const settingsButton = form.querySelector("button[popovertarget=settings]:not(.drawer *)")

  const showDefaults = () => {
    const defaults = JSON.parse(model.selectedOptions[0].dataset.defaults)
    for (const field of parameters) field.placeholder = defaults[field.name] ?? ""
  }
  // So that nobody wonders why replies differ.
  const showChanges = () => {
    const isChanged = systemPrompt.value.trim() !== "" || parameters.some((field) => field.value.trim() !== "")
    settingsButton.toggleAttribute("data-changed", isChanged)
  }
  model.addEventListener("change", showDefaults)
  form.addEventListener("input", showChanges)
  form.querySelector("[data-reset]").addEventListener("click", () => {
    for (const field of parameters) field.value = ""
    showChanges()
  })
  showDefaults()
  showChanges()
  offerComparison(form)
}

const COMPARED_MOST = 2

const boxesOf = (form) => [...form.querySelectorAll(".compare input")]

// Beside the model that is chosen; as many as fit beside each other.
const offerComparison = (form) => {
  const menu = form.querySelector(".compare")
  if (!menu) return
  const { model } = form.elements
  const show = () => {
    for (const box of boxesOf(form)) {
      const isChosen = box.name === `compare:${model.value}`
      if (isChosen) box.checked = false
      box.parentElement.hidden = isChosen
    }
    const n = boxesOf(form).filter((box) => box.checked).length
    for (const box of boxesOf(form)) box.disabled = !box.checked && n >= COMPARED_MOST
    menu.querySelector("summary").dataset.n = n ? `+${n}` : ""
  }
  model.addEventListener("change", show)
  menu.addEventListener("change", show)
  show()
}

// Each message is sent to one model, unless others are chosen for it.
export const endComparison = (form) => {
  for (const box of boxesOf(form)) box.checked = false
  form.querySelector(".compare")?.dispatchEvent(new Event("change"))
}

const growByScript = (field) => {
  const grow = () => {
    field.style.height = "auto"
    field.style.height = `${field.scrollHeight + 2}px`
  }
  field.addEventListener("input", grow)
  grow()
}
