// The replies of a conversation while they are written, from its stream of blocks. What is shown here is provisional:
// once a job has ended, the list is polled and brings what was stored. Without a stream the list alone does it, a
// little later.

import { Blocks } from "./blocks.js"
import { showNewText } from "./stick-to-end.js"
import { follow, followAnew, unfollow } from "./stream.js"
import { _ } from "./words.js"

export class LiveReplies {
  constructor(list) {
    this.list = list
    this.isFollowing = false
    this.replies = new Map()
    // What has come and is not shown.
    this.changes = []
    this.followWhatIsOpen()
  }

  followWhatIsOpen() {
    if (this.list.isOpen === this.isFollowing) return
    this.isFollowing = this.list.isOpen
    if (this.isFollowing) follow(Number(this.list.element.dataset.follow), (event) => this.onEvent(event))
    else unfollow()
  }

  // A dead connection gives no event of its own for a while; where the list had none, the stream has none either.
  onListUpdate({ failedBefore }) {
    for (const reply of this.replies.values()) reply.show()
    this.followWhatIsOpen()
    if (failedBefore && this.isFollowing) followAnew()
  }

  onEvent({ kind, data }) {
    if (["restart", "thinking", "block", "more"].includes(kind)) {
      if (!this.changes.length) requestAnimationFrame(() => this.show())
      this.changes.push([kind, data])
    } else if (["done", "error", "cancelled"].includes(kind)) {
      this.show()
      this.replies.delete(data.job)
      this.list.poll()
    }
  }

  // Once a frame: many changes may come at once, and between a reader's scrolling and its event the page must not grow.
  show() {
    const changes = this.changes.splice(0)
    for (const [kind, data] of changes) {
      if (!this.replies.has(data.job)) this.replies.set(data.job, new Reply(data.job))
      const reply = this.replies.get(data.job)
      if (!reply.isStored) reply[kind](data)
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

  // The list has brought the whole reply, in the same element: what still comes of the stream is in it already.
  get isStored() {
    const { element } = this.blocks
    return element.isConnected && !element.matches("[data-told]")
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
