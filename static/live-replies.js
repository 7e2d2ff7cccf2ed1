// The replies of a conversation while they are written, from its stream of blocks. What is shown here is provisional:
// once a job has ended, the list is polled and brings what was stored. Without a stream the list alone does it, a
// little later.

import { Blocks } from "./blocks.js"
import { showNewText } from "./stick-to-end.js"
import { _ } from "./words.js"

// After so long without an event from a stream whose job moves on, its connection is dead.
const SILENCE_MS = 8000

export class LiveReplies {
  constructor(list) {
    this.list = list
    this.source = null
    this.lastEventAt = 0
    // Where the next stream goes on.
    this.lastEventId = ""
    this.replies = new Map()
    // What has come and is not shown.
    this.changes = []
    document.addEventListener("visibilitychange", () => this.subscribeOrClose())
    this.subscribeOrClose()
  }

  // Only while the page is visible and a job is open: a browser has few connections for all its tabs together.
  subscribeOrClose() {
    if (document.hidden || !this.list.isOpen) this.close()
    else if (!this.source || this.source.readyState === EventSource.CLOSED) this.subscribe()
  }

  // A dead connection gives no event of its own; only the list shows it, as it goes on.
  onListUpdate({ changed, failedBefore }) {
    for (const reply of this.replies.values()) reply.show()
    if (failedBefore || (changed && performance.now() - this.lastEventAt > SILENCE_MS)) this.close()
    this.subscribeOrClose()
  }

  close() {
    this.source?.close()
    this.source = null
  }

  subscribe() {
    this.lastEventAt = performance.now()
    const url = new URL(this.list.element.dataset.events, location.href)
    if (this.lastEventId) url.searchParams.set("after", this.lastEventId)
    this.source = new EventSource(url)
    this.on("progress", () => {})
    for (const kind of ["restart", "thinking", "block", "more"]) {
      this.on(kind, (data) => {
        if (!this.changes.length) requestAnimationFrame(() => this.show())
        this.changes.push([kind, data])
      })
    }
    for (const kind of ["done", "error", "cancelled"]) {
      this.on(kind, ({ job }) => {
        this.show()
        this.replies.delete(job)
        this.list.poll()
      })
    }
  }

  on(kind, apply) {
    this.source.addEventListener(kind, (event) => {
      // An EventSource also fires "error" for its own trouble, without data.
      if (!event.data) return
      this.lastEventAt = performance.now()
      this.lastEventId = event.lastEventId || this.lastEventId
      apply(JSON.parse(event.data))
    })
  }

  // Once a frame: many changes may come at once, and between a reader's scrolling and its event the page must not grow.
  show() {
    const changes = this.changes.splice(0)
    for (const [kind, data] of changes) {
      if (!this.replies.has(data.job)) this.replies.set(data.job, new Reply(data.job))
      this.replies.get(data.job)[kind](data)
    }
    for (const reply of this.replies.values()) reply.show()
    if (changes.length) showNewText()
  }
}

class Reply {
  constructor(job) {
    this.job = Number(job)
    // Until the list has its job, a reply grows beside the page.
    this.blocks = new Blocks(document.createElement("div"))
    this.thought = ""
    this.nThought = 0
    this.thinksSince = 0
  }

  restart() {
    this.blocks.clear()
    this.thought = ""
    this.nThought = 0
    for (const kind of ["delta", "thinking"]) {
      const place = this.placeOf(kind)
      if (!place) continue
      place.textContent = ""
      toggle(place, false)
    }
  }

  // Offsets count code points.
  thinking({ offset, text }) {
    const fresh = [...text].slice(Math.max(this.nThought - offset, 0))
    this.thought += fresh.join("")
    this.nThought += fresh.length
    this.thinksSince ||= performance.now()
  }

  block(data) {
    this.blocks.put(data)
    this.endThinking()
  }

  more(data) {
    this.blocks.more(data)
    this.endThinking()
  }

  // How long the model thought, where this page saw it: what is read again from its beginning comes all at once.
  endThinking() {
    if (!this.thinksSince) return
    const seconds = Math.round((performance.now() - this.thinksSince) / 1000)
    this.thinksSince = 0
    const summary = this.placeOf("thinking")?.parentElement.querySelector("summary")
    if (summary) summary.textContent = seconds ? _("Thought for %(n)s s", { n: seconds }) : _("Thought")
  }

  show() {
    const place = this.placeOf("delta")
    if (place) {
      this.blocks.moveTo(place)
      toggle(place, !this.blocks.isEmpty)
    }
    const thinking = this.placeOf("thinking")
    if (!thinking) return
    if (!thinking.firstChild) thinking.append("")
    // The text only grows: appending keeps a selection in it.
    const shown = thinking.firstChild
    if (shown.length < this.thought.length) shown.appendData(this.thought.slice(shown.length))
    toggle(thinking, this.thought !== "")
  }

  placeOf(kind) {
    return document.querySelector(`#job-${this.job} [data-told="${kind}"]`)
  }
}

const toggle = (place, isShown) => {
  place.hidden = !isShown
  if (place.parentElement.matches("details")) place.parentElement.hidden = !isShown
}
