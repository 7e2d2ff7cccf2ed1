// What a page does beyond its HTML: lists that keep themselves fresh, times in the reader's zone, forms that are sent
// once. Everything works without it, and nothing here makes HTML: it only puts in place what the server rendered.

const OPEN_MS = 700
const IDLE_MS = 4000
const TROUBLE_MS = 3000
const PATIENCE_MS = 10000
const SENDING_MS = 8000
const ENDED = "Your session has ended. What you typed here is not lost."

const localTimes = (root) => {
  for (const time of root.querySelectorAll("time")) {
    const moment = new Date(time.dateTime)
    const today = moment.toDateString() === new Date().toDateString()
    time.textContent = moment.toLocaleString([], today ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" })
    time.title = moment.toString()
  }
}

const trouble = document.getElementById("trouble")

// What a person did and what came of it stays until the next time; what a list tells goes with its reason.
let stays = false

const tell = (text, link) => {
  stays = false
  const label = "Log in (new tab)"
  if (trouble.textContent === text + (link ? ` ${label}` : "")) return
  trouble.textContent = text
  if (link) {
    const anchor = document.createElement("a")
    // Beside this page, which holds what was typed.
    Object.assign(anchor, { href: link, target: "_blank", rel: "noopener", textContent: label })
    trouble.append(" ", anchor)
  }
  trouble.hidden = !text
}

// A list is replaced item by item, so that focus, selection and open details of what did not change survive.
class LiveList {
  constructor(list) {
    this.list = list
    this.shown = new Map([...list.children].map((item) => [item.id, item.outerHTML]))
    this.timer = 0
    this.asking = false
    this.again = false
    this.onTaken = () => {}
    localTimes(list)
    document.addEventListener("visibilitychange", () => this.schedule(0))
    this.schedule()
  }

  get pause() {
    return Number(this.list.dataset.open) > 0 ? OPEN_MS : IDLE_MS
  }

  schedule(ms = this.pause) {
    clearTimeout(this.timer)
    if (!document.hidden) this.timer = setTimeout(() => this.refresh(), ms)
  }

  async refresh() {
    // One question at a time: of two, the older answer could come last.
    this.again = this.asking
    if (this.asking) return
    this.asking = true
    let next = this.pause
    try {
      const answer = await fetch(this.list.dataset.live, {
        headers: { Accept: "text/html" },
        signal: AbortSignal.timeout(PATIENCE_MS),
      })
      if (answer.redirected) {
        tell(ENDED, "/chat/login")
        // It may begin anew in a window beside this one.
        next = IDLE_MS
        return
      }
      if (!answer.ok) throw new Error(String(answer.status))
      this.take(new DOMParser().parseFromString(await answer.text(), "text/html").getElementById(this.list.id))
      if (!stays) tell("")
      this.onTaken()
      next = this.again ? 0 : this.pause
    } catch {
      tell("No connection to Llamalith just now. Trying again.")
      next = TROUBLE_MS
    } finally {
      this.asking = false
      this.schedule(next)
    }
  }

  take(fresh) {
    const part = "part" in this.list.dataset
    const order = [...fresh.children]
    if (!part) {
      const ids = new Set(order.map((item) => item.id))
      for (const item of [...this.list.children]) if (!ids.has(item.id)) this.remove(item)
    }
    const said = []
    let place = part ? null : this.list.firstElementChild
    for (const item of order) {
      const there = this.list.querySelector(`:scope > [id="${CSS.escape(item.id)}"]`)
      const html = item.outerHTML
      let now = there
      if (!there || this.shown.get(item.id) !== html) {
        if (item.dataset.said && there?.dataset.said !== item.dataset.said) said.push(item.dataset.said)
        this.shown.set(item.id, html)
        localTimes(item)
        now = there && "brief" in item.dataset ? this.change(there, item) : this.put(there, item, place)
      }
      if (!part) place = now.nextElementSibling
    }
    if (said.length) document.getElementById("announcement").textContent = said.join(". ")
    Object.assign(this.list.dataset, { live: fresh.dataset.live, open: fresh.dataset.open })
  }

  // Of what still runs only these parts come again: a button that is replaced between press and release is not pressed.
  change(there, item) {
    for (const part of item.querySelectorAll("[data-part]")) {
      there.querySelector(`[data-part="${part.dataset.part}"]`)?.replaceChildren(...part.childNodes)
    }
    there.dataset.said = item.dataset.said
    return there
  }

  put(there, item, place) {
    if (!there) return this.list.insertBefore(item, place)
    const focused = there.contains(document.activeElement) ? document.activeElement : null
    const opened = [...there.querySelectorAll("details")].map((details) => details.open)
    there.replaceWith(item)
    item.querySelectorAll("details").forEach((details, index) => { details.open = opened[index] ?? details.open })
    if (focused) {
      const links = [...item.querySelectorAll("a")]
      const same = links.find((a) => a.getAttribute("href") === focused.getAttribute("href"))
      // The focus of a button that is gone stays beside it.
      const beside = same ?? links[0] ?? item.querySelector("summary, button") ?? item
      if (beside === item) item.tabIndex = -1
      beside.focus()
    }
    return item
  }

  remove(item) {
    this.shown.delete(item.id)
    item.remove()
  }
}

// The replies of a conversation as they are written. What is shown so is only a foretaste: once a job has ended, the list
// is asked again and brings what was stored. Without a stream the list alone does it, a little later.
class LiveReplies {
  constructor(live) {
    this.live = live
    this.source = null
    document.addEventListener("visibilitychange", () => this.follow())
    this.follow()
  }

  // Only while somebody looks and something is open: a browser has few connections for all its tabs together.
  follow() {
    const wanted = !document.hidden && Number(this.live.list.dataset.open) > 0
    if (!wanted) {
      this.source?.close()
      this.source = null
    } else if (!this.source || this.source.readyState === EventSource.CLOSED) {
      this.open()
    }
  }

  open() {
    this.told = new Map()
    this.source = new EventSource(this.live.list.dataset.events)
    for (const kind of ["delta", "thinking", "restart"]) {
      this.source.addEventListener(kind, (event) => {
        const { job_id: jobId, text } = JSON.parse(event.data)
        // A new stream tells all from the beginning.
        if (kind === "restart" || !this.told.has(jobId)) {
          this.told.set(jobId, { delta: "", thinking: "" })
          this.empty(jobId)
        }
        if (kind !== "restart") {
          this.told.get(jobId)[kind] += text
          this.add(jobId, kind, text)
        }
      })
    }
    for (const kind of ["done", "error", "cancelled"]) {
      // A stream's own troubles are events named error too; those have no data.
      this.source.addEventListener(kind, (event) => {
        if (!event.data) return
        this.told.delete(JSON.parse(event.data).id)
        this.live.refresh()
      })
    }
  }

  places(jobId) {
    return document.querySelectorAll(`#job-${Number(jobId)} [data-told]`)
  }

  show(place, shown) {
    place.hidden = !shown
    if (place.parentElement.matches("details")) place.parentElement.hidden = !shown
  }

  empty(jobId) {
    for (const place of this.places(jobId)) {
      place.textContent = ""
      this.show(place, false)
    }
  }

  add(jobId, kind, text) {
    const place = [...this.places(jobId)].find((one) => one.dataset.told === kind)
    if (!place || !text) return
    const page = document.documentElement
    const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 40
    const whole = this.told.get(jobId)[kind]
    if (place.textContent.length + text.length === whole.length) {
      place.append(text)
      place.normalize()
    } else {
      // It began before the list had brought its place.
      place.textContent = whole
    }
    this.show(place, true)
    // Who reads or types at the end stays there.
    if (atEnd) page.scrollTop = page.scrollHeight
  }
}

const lives = []
for (const list of document.querySelectorAll("[data-live]")) {
  const live = new LiveList(list)
  lives.push(live)
  if ("events" in list.dataset) {
    const replies = new LiveReplies(live)
    live.onTaken = () => replies.follow()
  }
}
localTimes(document)

for (const form of document.querySelectorAll("form")) {
  let sent = false
  const lock = (locked) => {
    sent = locked
    form.querySelectorAll("button").forEach((button) => { button.disabled = locked })
  }
  form.addEventListener("submit", (event) => {
    if (sent) {
      event.preventDefault()
      return
    }
    sent = true
    // After the browser has gathered the fields; and open again, should the person have stopped the sending.
    setTimeout(() => lock(true))
    setTimeout(() => lock(false), SENDING_MS)
  })
}

// Beside the page, which may hold a message that is being typed: also of buttons that a list brought later.
document.addEventListener("submit", async (event) => {
  const form = event.target
  if (event.defaultPrevented || !lives.length || !form.matches("form.cancel, form.retry")) return
  event.preventDefault()
  tell("")
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      headers: { Accept: "application/json" },
      body: new URLSearchParams(new FormData(form)),
      signal: AbortSignal.timeout(PATIENCE_MS),
    })
    if (answer.redirected && new URL(answer.url).pathname === "/chat/login") tell(ENDED, "/chat/login")
    else if (!answer.ok) tell(`That was not done. ${(await answer.json()).detail}`)
    else if (form.matches(".retry")) triedAgain(form)
  } catch {
    tell("That was not done: there is no connection to Llamalith just now.")
  }
  stays = !trouble.hidden
  await Promise.all(lives.map((live) => live.refresh()))
})

// A turn that has ended does not come again: what became of it stands at the end of the conversation.
const triedAgain = (form) => {
  if (!form.closest("[data-part]")) return
  const hint = document.createElement("p")
  Object.assign(hint, { className: "hint", textContent: "Tried again, as the last message." })
  form.replaceWith(hint)
}

for (const hint of document.querySelectorAll("[data-hint=keys]")) hint.textContent = "Ctrl + Enter sends"

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.repeat && (event.ctrlKey || event.metaKey) && event.target.form?.matches(".prompt")) {
    event.target.form.requestSubmit()
  }
})

// A page out of the browser's memory may show what only a session may see, and its buttons are still off. What was typed
// into it stays, with what makes the form one of a kind: nobody knows whether it was sent.
const promptForm = document.querySelector("form.prompt")
const TYPED = ["content", "system_prompt", "model", "once"]

window.addEventListener("pageshow", (event) => {
  if (!event.persisted) return
  if (promptForm) history.replaceState({ typed: TYPED.map((name) => promptForm.elements[name].value) }, "")
  location.reload()
})

if (promptForm && history.state?.typed) {
  TYPED.forEach((name, index) => { promptForm.elements[name].value = history.state.typed[index] })
  for (const details of promptForm.querySelectorAll("details")) details.open ||= promptForm.elements.system_prompt.value !== ""
  history.replaceState(null, "")
}
