// A reply that ended in a tab that nobody sees: its title and icon say so, and where the person has agreed, the system.

import { readSetting, writeSetting } from "./composer.js"
import { _ } from "./words.js"

const NOTIFY_KEY = "notify"
const OPEN = ["queued", "processing"]
const icon = document.querySelector("link[rel=icon]")

export const wantsNotification = () => readSetting(NOTIFY_KEY) === "on" && globalThis.Notification?.permission === "granted"

// Returns whether notifications will come: the browser asks the person, who may say no.
export const setNotification = async (isOn) => {
  const isAllowed = isOn && globalThis.Notification !== undefined && (await Notification.requestPermission()) === "granted"
  writeSetting(NOTIFY_KEY, isAllowed ? "on" : null)
  return isAllowed
}

// Returns what to call after each update of the list.
export const watchEnds = (list) => {
  const statuses = () => new Map([...list.element.children].map((item) => [item.id, item.dataset.status]))
  let before = statuses()
  const plain = { title: document.title, icon: icon.href }
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return
    document.title = plain.title
    icon.href = plain.icon
  })
  return () => {
    const now = statuses()
    const ended = [...now].filter(([id, status]) => OPEN.includes(before.get(id)) && !OPEN.includes(status))
    before = now
    if (!ended.length || !document.hidden) return
    document.title = `● ${plain.title}`
    icon.href = icon.dataset.ended
    if (wantsNotification()) notify(ended.at(-1), plain.title)
  }
}

const notify = ([id, status], title) => {
  const words = { done: _("The reply is there"), error: _("The reply failed"), cancelled: _("The reply was stopped") }
  const notification = new Notification(words[status] ?? words.done, { body: title, icon: icon.href, tag: id })
  notification.addEventListener("click", () => {
    window.focus()
    notification.close()
  })
}
