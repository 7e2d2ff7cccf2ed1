// The replies of a conversation while they are written, from its stream of events. The text shown here is provisional:
// once a job has ended, the list is polled and brings what was stored. Without a stream the list alone does it, a
// little later.

import { scrollIfSticking } from "./stick-to-end.js"
import { _ } from "./words.js"

// After so long without an event from a stream whose job moves on, its connection is dead.
const SILENCE_MS = 8000

export class LiveReplies {
  constructor(list) {
    this.list = list
    this.source = null
    this.lastEventAt = 0
    // By job: the text so far of each kind.
    this.texts = new Map()
    this.changedJobs = new Set()
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
    if (failedBefore || (changed && performance.now() - this.lastEventAt > SILENCE_MS)) this.close()
    this.subscribeOrClose()
  }

  close() {
    this.source?.close()
    this.source = null
  }

  subscribe() {
    this.texts = new Map()
    this.lastEventAt = performance.now()
    this.source = new EventSource(this.list.element.dataset.events)
    this.source.addEventListener("progress", () => { this.lastEventAt = performance.now() })
    for (const kind of ["delta", "thinking", "restart"]) {
      this.source.addEventListener(kind, (event) => {
        this.lastEventAt = performance.now()
        const { job_id: jobId, text } = JSON.parse(event.data)
        // A new stream sends everything from the beginning.
        if (kind === "restart" || !this.texts.has(jobId)) {
          this.texts.set(jobId, { delta: "", thinking: "" })
          clear(jobId)
        }
        if (kind !== "restart") {
          this.texts.get(jobId)[kind] += text
          timeThinking(jobId, kind)
          this.renderSoon(jobId)
        }
      })
    }
    for (const kind of ["done", "error", "cancelled"]) {
      // An EventSource also fires "error" for its own trouble, without data.
      this.source.addEventListener(kind, (event) => {
        if (!event.data) return
        this.texts.delete(JSON.parse(event.data).id)
        this.list.poll()
      })
    }
  }

  // Once a frame: the browser lays out the whole text each time.
  renderSoon(jobId) {
    if (!this.changedJobs.size) requestAnimationFrame(() => this.render())
    this.changedJobs.add(jobId)
  }

  render() {
    for (const jobId of this.changedJobs) {
      for (const place of placesOf(jobId)) {
        const text = this.texts.get(jobId)?.[place.dataset.told]
        if (!text) continue
        if (!place.firstChild) place.append("")
        const shown = place.firstChild
        // The text only grows: appending keeps a selection in it.
        if (shown.length < text.length) shown.appendData(text.slice(shown.length))
        toggle(place, true)
      }
    }
    this.changedJobs.clear()
    scrollIfSticking()
  }
}

// How long the model thought, where this page saw it begin: a stream that is read again from its beginning tells no times.
const timeThinking = (jobId, kind) => {
  const summary = document.querySelector(`#job-${Number(jobId)} .thinking > summary`)
  if (!summary) return
  const now = performance.now()
  if (kind === "thinking") summary.dataset.since ??= now
  else if (summary.dataset.since) {
    const seconds = Math.round((now - summary.dataset.since) / 1000)
    summary.textContent = seconds ? _("Thought for %(n)s s", { n: seconds }) : _("Thought")
    delete summary.dataset.since
  }
}

const placesOf = (jobId) => document.querySelectorAll(`#job-${Number(jobId)} [data-told]`)

const clear = (jobId) => {
  for (const place of placesOf(jobId)) {
    place.textContent = ""
    toggle(place, false)
  }
}

const toggle = (place, isShown) => {
  place.hidden = !isShown
  if (place.parentElement.matches("details")) place.parentElement.hidden = !isShown
}
