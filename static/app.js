// What a page does beyond its HTML: lists that keep themselves fresh, times in the reader's zone, forms that are sent
// once. Everything works without it, and nothing here makes HTML: it only puts in place what the server rendered.

const OPEN_MS = 700
const IDLE_MS = 4000
const TROUBLE_MS = 3000
const PATIENCE_MS = 10000
// On a slow line a list is asked for less often, but never this long apart.
const LONGEST_PAUSE_MS = 15000
const SENDING_MS = 8000
// After so long without an event from a stream whose job moves on, its connection has died without a word.
const SILENCE_MS = 8000
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

// As controllers/visible.py does it for what the server shows.
const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) => (
  "\t\n\r\u200c\u200d".includes(char) ? char : `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`
))

// What a person did and what came of it stays until it is closed, or the next time; what a list tells goes with its reason.
let stays = false

const tell = (text, { link, closes } = {}) => {
  stays = Boolean(closes)
  const label = link ? "Log in (new tab)" : closes ? "Close" : ""
  if (trouble.textContent === (label ? `${text} ${label}` : text)) return
  trouble.textContent = text
  if (link) {
    const anchor = document.createElement("a")
    // Beside this page, which holds what was typed.
    Object.assign(anchor, { href: link, target: "_blank", rel: "noopener", textContent: label })
    trouble.append(" ", anchor)
  } else if (closes) {
    const button = document.createElement("button")
    Object.assign(button, { type: "button", className: "quiet", textContent: label, onclick: () => tell("") })
    trouble.append(" ", button)
  }
  trouble.hidden = !text
  // Nothing is ever behind it.
  document.body.style.paddingBottom = text ? `${trouble.offsetHeight}px` : ""
}

// The text of an answer, however long that takes as long as something comes.
const fetched = async (path) => {
  const patience = new AbortController()
  let timer = 0
  const wait = () => {
    clearTimeout(timer)
    timer = setTimeout(() => patience.abort(), PATIENCE_MS)
  }
  wait()
  try {
    const answer = await fetch(path, { headers: { Accept: "text/html" }, signal: patience.signal })
    let text = ""
    for (const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      wait()
      const { done, value } = await reader.read()
      if (done) return { answer, text }
      text += value
    }
  } finally {
    clearTimeout(timer)
  }
}

// A list is replaced item by item, so that focus, selection and open details of what did not change survive.
class LiveList {
  constructor(list) {
    this.list = list
    this.shown = new Map([...list.children].map((item) => [item.id, item.outerHTML]))
    this.timer = 0
    this.asking = false
    this.again = false
    this.failed = false
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
    let why = "No connection to Llamalith just now."
    const asked = performance.now()
    try {
      const { answer, text } = await fetched(this.list.dataset.live)
      if (answer.redirected) {
        tell(ENDED, { link: "/chat/login" })
        // It may begin anew in a window beside this one.
        next = IDLE_MS
        return
      }
      if (!answer.ok) {
        why = `Llamalith cannot show this just now (${answer.status} ${answer.statusText}).`
        throw new Error(why)
      }
      const moved = this.take(new DOMParser().parseFromString(text, "text/html").getElementById(this.list.id))
      if (!stays) tell("")
      this.onTaken({ moved, failed: this.failed })
      this.failed = false
      next = this.again ? 0 : Math.min(Math.max(this.pause, 4 * (performance.now() - asked)), LONGEST_PAUSE_MS)
    } catch {
      this.failed = true
      if (!stays) tell(`${why} Trying again.`)
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
    let moved = false
    let place = part ? null : this.list.firstElementChild
    for (const item of order) {
      const there = this.list.querySelector(`:scope > [id="${CSS.escape(item.id)}"]`)
      const html = item.outerHTML
      let now = there
      if (!there || this.shown.get(item.id) !== html) {
        if (item.dataset.said && there?.dataset.said !== item.dataset.said) said.push(item.dataset.said)
        moved = true
        this.shown.set(item.id, html)
        localTimes(item)
        now = there && "brief" in item.dataset ? this.change(there, item) : this.put(there, item, place)
      }
      if (!part) place = now.nextElementSibling
    }
    if (said.length) document.getElementById("announcement").textContent = said.join(". ")
    Object.assign(this.list.dataset, { live: fresh.dataset.live, open: fresh.dataset.open })
    return moved
  }

  // Of what still runs only these parts come again: a button that is replaced between press and release is not pressed.
  change(there, item) {
    for (const part of item.querySelectorAll("[data-part]")) {
      there.querySelector(`[data-part="${part.dataset.part}"]`)?.replaceChildren(...part.childNodes)
    }
    there.dataset.said = item.dataset.said
    return there
  }

  // What is the same stays in its place, with what is selected in it.
  put(there, item, place) {
    if (!there) return this.list.insertBefore(item, place)
    const focused = there.contains(document.activeElement) ? document.activeElement : null
    const opened = [...there.querySelectorAll("details")].map((details) => details.open)
    const before = [...there.children]
    const after = [...item.children]
    after.forEach((fresh, index) => {
      if (!before[index]) there.append(fresh)
      else if (!before[index].isEqualNode(fresh)) before[index].replaceWith(fresh)
    })
    for (const gone of before.slice(after.length)) gone.remove()
    for (const { name } of [...there.attributes]) if (!item.hasAttribute(name)) there.removeAttribute(name)
    for (const { name, value } of item.attributes) there.setAttribute(name, value)
    there.querySelectorAll("details").forEach((details, index) => { details.open = opened[index] ?? details.open })
    if (focused && !there.contains(focused)) {
      const links = [...there.querySelectorAll("a")]
      const same = links.find((a) => a.getAttribute("href") === focused.getAttribute("href"))
      // The focus of a button that is gone stays beside it.
      const beside = same ?? links[0] ?? there.querySelector("summary, button") ?? there
      if (beside === there) there.tabIndex = -1
      beside.focus()
    }
    return there
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
    this.heardAt = 0
    this.changed = new Set()
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

  // A connection may die without a word, and then nothing says so but the list, which goes on.
  taken({ moved, failed }) {
    if (failed || (moved && performance.now() - this.heardAt > SILENCE_MS)) {
      this.source?.close()
      this.source = null
    }
    this.follow()
  }

  open() {
    this.told = new Map()
    this.heardAt = performance.now()
    this.source = new EventSource(this.live.list.dataset.events)
    this.source.addEventListener("progress", () => { this.heardAt = performance.now() })
    for (const kind of ["delta", "thinking", "restart"]) {
      this.source.addEventListener(kind, (event) => {
        this.heardAt = performance.now()
        const { job_id: jobId, text } = JSON.parse(event.data)
        // A new stream tells all from the beginning.
        if (kind === "restart" || !this.told.has(jobId)) {
          this.told.set(jobId, { delta: "", thinking: "" })
          this.empty(jobId)
        }
        if (kind !== "restart") {
          this.told.get(jobId)[kind] += text
          this.change(jobId)
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

  // All that came within a frame is shown at once: each time the browser sets the whole text anew.
  change(jobId) {
    if (!this.changed.size) requestAnimationFrame(() => this.write())
    this.changed.add(jobId)
  }

  write() {
    for (const jobId of this.changed) {
      for (const place of this.places(jobId)) {
        const whole = this.told.get(jobId)?.[place.dataset.told]
        if (!whole) continue
        if (!place.firstChild) place.append("")
        const shown = place.firstChild
        // Only ever more of the same: what is new goes behind it, and a selection in it stays.
        if (shown.length < whole.length) shown.appendData(whole.slice(shown.length))
        this.show(place, true)
      }
    }
    this.changed.clear()
    if (followsEnd) page.scrollTop = page.scrollHeight
  }
}

// Who reads or types at the end of a page stays there while it grows, until they turn back.
const page = document.documentElement
const toEnd = () => page.scrollHeight - page.clientHeight - page.scrollTop
let followsEnd = toEnd() < 40
let lastTop = page.scrollTop
const turnsBack = () => { followsEnd = false }

const canTurnBack = () => page.scrollTop > 0
let touchedAt = 0

addEventListener("wheel", (event) => { if (event.deltaY < 0 && canTurnBack()) turnsBack() }, { passive: true })
addEventListener("touchstart", (event) => { touchedAt = event.touches[0].clientY }, { passive: true })
addEventListener("touchmove", (event) => {
  if (event.touches[0].clientY > touchedAt + 4 && canTurnBack()) turnsBack()
}, { passive: true })
addEventListener("touchend", () => { followsEnd ||= toEnd() < 1 }, { passive: true })
addEventListener("keydown", (event) => {
  if (event.target.matches("textarea, input, select")) return
  if (["ArrowUp", "PageUp", "Home"].includes(event.key) || (event.key === " " && event.shiftKey)) turnsBack()
  // The end that the browser goes to is another one by the time that it arrives.
  if (event.key === "End") followsEnd = true
})
addEventListener("scroll", () => {
  if (page.scrollTop < lastTop) followsEnd &&= toEnd() < 1
  else if (page.scrollTop > lastTop) followsEnd = toEnd() < 40
  lastTop = page.scrollTop
}, { passive: true })

const lives = []
for (const list of document.querySelectorAll("[data-live]")) {
  const live = new LiveList(list)
  lives.push(live)
  if ("events" in list.dataset) {
    const replies = new LiveReplies(live)
    live.onTaken = (taken) => replies.taken(taken)
  }
}
localTimes(document)

const isBeside = (form) => lives.length > 0 && form.matches("form.cancel, form.retry")
const sent = new WeakSet()

document.addEventListener("submit", (event) => {
  const form = event.target
  if (sent.has(form)) {
    event.preventDefault()
    return
  }
  sent.add(form)
  if (isBeside(form)) return
  const lock = (locked) => form.querySelectorAll("button").forEach((button) => { button.disabled = locked })
  // After the browser has gathered the fields; and open again, should the person have stopped the sending.
  setTimeout(() => lock(true))
  setTimeout(() => {
    sent.delete(form)
    lock(false)
  }, SENDING_MS)
})

// Beside the page, which may hold a message that is being typed: also of buttons that a list brought later.
document.addEventListener("submit", async (event) => {
  const form = event.target
  if (event.defaultPrevented || !isBeside(form)) return
  event.preventDefault()
  tell("")
  let wrong = ""
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      headers: { Accept: "application/json" },
      body: new URLSearchParams(new FormData(form)),
      signal: AbortSignal.timeout(PATIENCE_MS),
    })
    if (answer.redirected && new URL(answer.url).pathname === "/chat/login") tell(ENDED, { link: "/chat/login" })
    else if (!answer.ok) wrong = `That was not done. ${visible((await answer.json()).detail)}`
    else if (form.matches(".retry")) triedAgain(form)
  } catch {
    wrong = "That was not done: there is no connection to Llamalith just now."
  } finally {
    sent.delete(form)
  }
  if (wrong) tell(wrong, { closes: true })
  await Promise.all(lives.map((live) => live.refresh()))
})

// A turn that has ended does not come again: what became of it stands at the end of the conversation.
const triedAgain = (form) => {
  if (!form.closest("[data-part]")) return
  const hint = document.createElement("p")
  Object.assign(hint, { className: "hint", textContent: "Tried again, as the last message.", tabIndex: -1 })
  const hadFocus = form.contains(document.activeElement)
  form.replaceWith(hint)
  if (hadFocus) hint.focus()
}

for (const hint of document.querySelectorAll("[data-hint=keys]")) hint.textContent = "Ctrl + Enter sends"

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.repeat && (event.ctrlKey || event.metaKey) && event.target.form?.matches(".prompt")) {
    event.target.form.requestSubmit()
  }
})

// What was typed is kept in this tab until the server has taken it, with what makes its form one of a kind: over a server
// that was away, a session that had ended, a way back. Nobody knows whether what was sent has arrived, until a page shows
// its job; sent again, it makes no second one.
const promptForm = document.querySelector("form.prompt")
const TYPED = ["content", "system_prompt", "system_prompt_was", "model", "once"]
const HERE = `typed ${location.pathname}${location.search}`
// What makes one of a kind the forms that the server has taken, the newest last.
const TAKEN = "taken"
const N_TAKEN = 50

const remember = (key, value) => {
  try {
    if (value === null) sessionStorage.removeItem(key)
    else sessionStorage.setItem(key, JSON.stringify(value))
  } catch {
    // Full, or switched off: then only the browser itself may still know it.
  }
}

const remembered = (key) => {
  try {
    return JSON.parse(sessionStorage.getItem(key))
  } catch {
    return null
  }
}

const forget = (is) => {
  for (const key of Object.keys(sessionStorage)) if (key.startsWith("typed ") && is(remembered(key))) remember(key, null)
}

const isTaken = (once) => (remembered(TAKEN) ?? []).includes(once)

const keepTyped = () => {
  const fields = promptForm.elements
  const isTyped = fields.content.value.trim() !== "" || fields.system_prompt.value !== fields.system_prompt.defaultValue
  const kept = isTyped && !isTaken(fields.once.value)
  remember(HERE, kept ? Object.fromEntries(TYPED.map((name) => [name, fields[name].value])) : null)
}

// The server's word that it has taken a form; it goes with the page that shows the job.
const [, prefix, taken] = document.cookie.match(/(?:^|; )(__Host-)?llamalith_taken=([\w-]+)/) ?? []
if (taken) {
  document.cookie = prefix
    ? "__Host-llamalith_taken=; Max-Age=0; Path=/; SameSite=Strict; Secure"
    : "llamalith_taken=; Max-Age=0; Path=/chat; SameSite=Strict"
  remember(TAKEN, [...(remembered(TAKEN) ?? []), taken].slice(-N_TAKEN))
  forget((typed) => typed?.once === taken)
}

if (promptForm) {
  // The browser would bring back on a way back what was taken too.
  promptForm.autocomplete = "off"
  const typed = remembered(HERE)
  if (typed && promptForm.elements.content.defaultValue === "") {
    for (const name of TYPED) promptForm.elements[name].value = typed[name]
    for (const details of promptForm.querySelectorAll("details")) details.open ||= promptForm.elements.system_prompt.value !== ""
  }
  addEventListener("pagehide", keepTyped)
}

// On a shared machine nobody is to find what another one wrote.
document.querySelector("form.leave")?.addEventListener("submit", () => {
  forget(() => true)
  remember(TAKEN, null)
  removeEventListener("pagehide", keepTyped)
})

// A page out of the browser's memory may show what only a session may see, and its buttons are still off.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload()
})
