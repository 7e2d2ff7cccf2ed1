// A Copy button on what people take elsewhere: commands and JSON, marked data-command. Without a script there is none.

const SHOWN_MS = 2000

export const offerCopies = () => {
  if (!navigator.clipboard) return
  for (const block of document.querySelectorAll("pre[data-command]")) {
    const button = document.createElement("button")
    Object.assign(button, { type: "button", className: "quiet copies", textContent: "Copy" })
    button.addEventListener("click", () => copy(block.querySelector("code").textContent, button))
    // Beside the block: in it, it would scroll away with the text.
    const holder = document.createElement("div")
    holder.className = "copied"
    block.replaceWith(holder)
    holder.append(block, button)
  }
}

const copy = async (text, button) => {
  try {
    await navigator.clipboard.writeText(text)
    button.textContent = "Copied"
  } catch {
    button.textContent = "Not allowed"
  }
  document.getElementById("announcement").textContent = button.textContent
  setTimeout(() => { button.textContent = "Copy" }, SHOWN_MS)
}
