// A list that keeps itself fresh: polls the server, often while a job of the list is open, and renders the answer.

import { ListRenderer } from "./list-renderer.js"
import { BoardRenderer } from "./live-board.js"
import { hideProblem, showProblem, showSessionEnded } from "./notice.js"
import { getPage } from "./request.js"
import { _ } from "./words.js"

const OPEN_MS = 700
const IDLE_MS = 4000
const RETRY_MS = 3000
// In a tab that nobody sees, while a reply is awaited there.
const HIDDEN_MS = 5000
// On a slow connection a list is polled less often, but at least this often.
const MAX_INTERVAL_MS = 15000

export class LiveList {
  // `element` has its address in data-live and the number of open jobs in data-open; the server sets both anew.
  constructor(element) {
    this.element = element
    this.renderer = element.querySelector("[data-list]") ? new BoardRenderer(element) : new ListRenderer(element)
    this.timer = 0
    this.isPolling = false
    this.pollsAgain = false
    this.failed = false
    // Whether a person wants to know in another tab that a job of this list has ended.
    this.pollsHidden = "follow" in element.dataset
    // Called after each successful poll: whether an item changed, and whether the poll before had failed.
    this.onUpdate = () => {}
    document.addEventListener("visibilitychange", () => this.schedule(0))
    this.schedule()
  }

  get isOpen() {
    return Number(this.element.dataset.open) > 0
  }

  // The last turn that it shows of a conversation. null: it is no conversation.
  get seen() {
    return new URL(this.element.dataset.live, location.href).searchParams.get("seen")
  }

  get interval() {
    return this.isOpen ? OPEN_MS : IDLE_MS
  }

  schedule(ms = this.interval) {
    clearTimeout(this.timer)
    if (!document.hidden) this.timer = setTimeout(() => this.poll(), ms)
    else if (this.isOpen && this.pollsHidden) this.timer = setTimeout(() => this.poll(), HIDDEN_MS)
  }

  async poll() {
    // One request at a time: of two, the older answer could come last.
    this.pollsAgain = this.isPolling
    if (this.isPolling) return
    this.isPolling = true
    let next = this.interval
    let problem = _("No connection to Llamalith just now.")
    const startedAt = performance.now()
    try {
      const { response, text } = await getPage(this.element.dataset.live)
      if (response.redirected) {
        showSessionEnded()
        // A new session may begin in another tab.
        next = IDLE_MS
        return
      }
      if (!response.ok) {
        problem = _("Llamalith cannot show this just now (%(status)s).", { status: response.status })
        throw new Error(problem)
      }
      const fresh = new DOMParser().parseFromString(text, "text/html").getElementById(this.element.id)
      // What the page shows was deleted: this list may be another branch.
      if ("reload" in fresh.dataset) location.reload()
      const changed = this.renderer.render(fresh)
      hideProblem()
      this.onUpdate({ changed, failedBefore: this.failed })
      this.failed = false
      const took = performance.now() - startedAt
      next = this.pollsAgain ? 0 : Math.min(Math.max(this.interval, 4 * took), MAX_INTERVAL_MS)
    } catch {
      this.failed = true
      showProblem(_("%(problem)s Trying again.", { problem }))
      next = RETRY_MS
    } finally {
      this.isPolling = false
      this.schedule(next)
    }
  }
}
