// What stands below a message: Copy, and menus that close when something else is used.

import { showResult } from "./notice.js"
import { _ } from "./words.js"

const COPIED_MS = 1600

// A reply is shown as it looks; its source is asked from the server, once for each copy. An imported one brings it along.
const sourceOf = async (article) => {
  const shown = article.querySelector(":scope > .text, .bubble .text, .folds .text")
  const jobId = article.matches(".model") && article.closest("[id^=job-]")?.id.slice("job-".length)
  if (!jobId) return shown.dataset.source ?? shown.textContent
  const response = await fetch(`/chat/api/jobs/${Number(jobId)}`, { headers: { Accept: "application/json" } })
  if (!response.ok) throw new Error(String(response.status))
  return (await response.json()).result
}

const write = async (text) => {
  if (navigator.clipboard?.write) {
    // The promise goes in, because a browser wants to see at once that a person asked for it.
    await navigator.clipboard.write([new ClipboardItem({ "text/plain": text.then((one) => new Blob([one], { type: "text/plain" })) })])
    return
  }
  // Over plain http from another machine there is no clipboard but this one.
  const field = document.createElement("textarea")
  field.value = await text
  document.body.append(field)
  field.select()
  document.execCommand("copy")
  field.remove()
}

export const copyFrom = async (button) => {
  try {
    await write(sourceOf(button.closest(".said")))
  } catch {
    showResult(_("It could not be copied."))
    return
  }
  button.dataset.copied = ""
  document.getElementById("announcement").textContent = _("Copied")
  setTimeout(() => { delete button.dataset.copied }, COPIED_MS)
}

export const useTools = () => {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]")
    if (button) copyFrom(button)
    for (const menu of document.querySelectorAll("details.menu[open]")) {
      if (!menu.contains(event.target)) menu.open = false
    }
  })
}
