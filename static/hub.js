// One connection to the server for all that the windows of a browser follow. Owns the connection and which window gets
// what; knows no page. It runs in a worker that the windows share, or in a window for that one alone.
//
// A window says all that it wants in one message, again and again: who is silent for LEASE_MS is gone, however it went.

const LEASE_MS = 10_000
// Windows come together, as a browser opens them. Where one leaves, another may follow, as one page follows another.
const JOIN_MS = 30
const LEAVE_MS = 1000
const RETRY_MS = 1000
// A new session may begin in any window.
const SESSION_MS = 4000
// The server sends something every 15 seconds.
const SILENCE_MS = 20_000
// As many as the server takes: those that came last. Other windows see a reply when it is done.
const MAX_FOLLOWED = 16

export class Hub {
  constructor() {
    // By port: { key, conversation, after, version, seenAt }. `key` is another one whenever a window begins anew;
    // without a conversation it follows the list of chats alone.
    this.windows = new Map()
    this.connection = null
    this.heardAt = 0
    this.isLocked = false
    // Of the list of chats that all windows show; empty: they differ.
    this.version = null
    this.chats = null
    this.opening = 0
    this.opensAt = 0
    this.watching = 0
  }

  // `wanted`: null: nothing any more.
  take(port, wanted) {
    const had = this.windows.get(port)
    if (wanted) port.postMessage({ kind: "heard" })
    if (wanted && had?.key === wanted.key) {
      had.seenAt = performance.now()
      return
    }
    this.windows.delete(port)
    let isOther = Boolean(had?.conversation || wanted?.conversation)
    if (wanted) {
      this.windows.set(port, { ...wanted, seenAt: performance.now() })
      this.version ??= wanted.version
      if (wanted.version !== this.version) {
        if (this.chats) port.postMessage(this.chats)
        else {
          this.version = ""
          isOther = true
        }
      }
    }
    if (!this.windows.size) this.close()
    else {
      this.watching ||= setInterval(() => this.watch(), LEASE_MS / 4)
      if (isOther || !this.connection) this.openSoon(wanted ? JOIN_MS : LEAVE_MS)
    }
  }

  close() {
    clearInterval(this.watching)
    clearTimeout(this.opening)
    this.watching = 0
    this.opening = 0
    this.connection?.abort()
    this.connection = null
    this.version = null
    this.chats = null
  }

  watch() {
    const now = performance.now()
    for (const [port, { seenAt }] of this.windows) if (now - seenAt > LEASE_MS) this.take(port, null)
    if (this.connection && now - this.heardAt > SILENCE_MS) this.openSoon(0)
  }

  tellAll(message) {
    for (const port of this.windows.keys()) port.postMessage(message)
  }

  openSoon(ms) {
    const at = performance.now() + ms
    if (this.opening && this.opensAt <= at) return
    clearTimeout(this.opening)
    this.opensAt = at
    this.opening = setTimeout(() => this.open(), ms)
  }

  async open() {
    this.opening = 0
    this.connection?.abort()
    const connection = new AbortController()
    this.connection = connection
    this.heardAt = performance.now()
    const followed = [...this.windows].filter(([, { conversation }]) => conversation).slice(-MAX_FOLLOWED)
    const query = new URLSearchParams({ chats: this.version })
    for (const [, { conversation, after }] of followed) query.append("follow", `${conversation}:${after}`)
    try {
      const response = await fetch(`/chat/stream?${query}`, { cache: "no-store", signal: connection.signal })
      this.setLocked(response.status === 401)
      if (response.ok) await this.read(response, followed, connection)
    } catch {
      // The server is away, or this connection is not wanted any more.
    }
    if (this.connection !== connection) return
    this.connection = null
    this.openSoon(this.isLocked ? SESSION_MS : RETRY_MS)
  }

  // Locked: the browser has no session.
  setLocked(isLocked) {
    if (isLocked === this.isLocked) return
    this.isLocked = isLocked
    this.tellAll({ kind: "session", isLocked })
  }

  // Frames of Server-Sent Events, each field on one line.
  async read(response, followed, connection) {
    let text = ""
    let to = null
    for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      const { done, value } = await reader.read()
      if (done || this.connection !== connection) return
      this.heardAt = performance.now()
      const frames = (text + value).split("\n\n")
      text = frames.pop()
      for (const frame of frames) {
        const { id, event, data } = Object.fromEntries(frame.split("\n").map((line) => line.split(/: (.*)/s, 2)))
        if (event === "to") to = followed[Number(data)]
        else if (event === "chats") this.tellChats(JSON.parse(data))
        else if (to && (id || data)) tell(to, id, event, data)
      }
    }
  }

  tellChats(chats) {
    this.version = chats.version
    this.chats = { kind: "chats", ...chats }
    this.tellAll(this.chats)
  }
}

const tell = ([port, window], id, kind, data) => {
  window.after = id ?? window.after
  port.postMessage({ key: window.key, after: window.after, kind, data: data && JSON.parse(data) })
}
