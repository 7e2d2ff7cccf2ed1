// The theme and the sidebar change at once; the server remembers them for the next page.

import { postForm } from "./request.js"

const page = document.documentElement

const apply = ({ name, value }) => {
  const isDefault = value === "system" || value === "open"
  if (isDefault) delete page.dataset[name]
  else page.dataset[name] = value
  for (const button of document.querySelectorAll(`form.look [name="${name}"][aria-pressed]`)) {
    button.setAttribute("aria-pressed", String(button.value === value))
  }
}

// The button that was pressed is gone with the sidebar; the one that undoes it has taken its place.
const focusOpposite = ({ name, value }) => {
  if (name !== "sidebar") return
  document.querySelector(`form.look [name=sidebar][value=${value === "open" ? "closed" : "open"}]`)?.focus()
}

export const changeLookAtOnce = () => {
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("form.look") || !event.submitter) return
    event.preventDefault()
    apply(event.submitter)
    focusOpposite(event.submitter)
    // The page looks as it was asked to; where this is lost, only the next one looks as before.
    postForm(event.target, { submitter: event.submitter, redirect: "manual" }).catch(() => {})
  })
}
