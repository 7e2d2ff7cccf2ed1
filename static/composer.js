// The prompt's form at the keyboard: Ctrl + Enter sends it.

export const sendByKeyboard = () => {
  for (const hint of document.querySelectorAll("[data-hint=keys]")) hint.textContent = "Ctrl + Enter sends"
  document.addEventListener("keydown", (event) => {
    const isSend = event.key === "Enter" && !event.repeat && (event.ctrlKey || event.metaKey)
    if (isSend && event.target.form?.matches(".prompt")) event.target.form.requestSubmit()
  })
}
