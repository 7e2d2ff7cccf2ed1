// This window's part of the browser's one stream. While nobody sees the window it takes no part. Where windows cannot
// share a worker (on a phone, where hardly more than one of them is seen), it has a connection of its own.

import { Hub } from "./hub.js"
import { hideProblem, showSessionEnded } from "./notice.js"

// Well within the time after which a silent window is given up.
const SAY_MS = 3000
// Who answers none of three is dead, most likely.
const SILENCE_MS = 10_000

let hasJoined = false
let port = null
let heardAt = 0
// When the list of chats that the page shows was read.
let chatsAt = 0
const wanted = { key: 0, conversation: null, after: "", version: "" }
let onChats = () => {}
let onReply = () => {}

const connect = () => {
  try {
    const worker = new SharedWorker(new URL("shared-worker.js", import.meta.url), { type: "module", name: "stream" })
    worker.addEventListener("error", () => {
      leave()
      port = connectAlone()
      begin()
    })
    return worker.port
  } catch {
    // There are none, or the browser forbids them.
    return connectAlone()
  }
}

const connectAlone = () => {
  const { port1, port2 } = new MessageChannel()
  const hub = new Hub()
  port2.onmessage = ({ data }) => hub.take(port2, data)
  return port1
}

const listen = ({ data: message }) => {
  heardAt = performance.now()
  if (message.kind === "session") {
    if (message.isLocked) showSessionEnded()
    else hideProblem()
  } else if (message.kind === "chats") {
    // A page may have been made after what the stream has read last.
    if (message.at <= chatsAt) return
    chatsAt = message.at
    wanted.version = message.version
    onChats(message.html)
  } else if (message.key === wanted.key) {
    // What was on its way when this window began anew comes again.
    wanted.after = message.after
    onReply(message)
  }
}

const say = () => {
  if (document.hidden || !hasJoined) return
  if (port && performance.now() - heardAt > SILENCE_MS) disconnect()
  if (!port) {
    port = connect()
    heardAt = performance.now()
  }
  port.onmessage = listen
  port.postMessage(wanted)
}

const leave = () => port?.postMessage(null)

const disconnect = () => {
  leave()
  port?.close()
  port = null
}

const begin = () => {
  wanted.key += 1
  heardAt = performance.now()
  say()
}

// `listener` gets the list of chats as HTML whenever one of them changes. `version` and `at`: of the list that the page
// shows.
export const joinStream = ({ version, at }, listener) => {
  wanted.version = version
  chatsAt = Number(at)
  onChats = listener
  hasJoined = true
  setInterval(say, SAY_MS)
  document.addEventListener("visibilitychange", () => (document.hidden ? leave() : begin()))
  addEventListener("pagehide", leave)
  begin()
}

// `listener` gets { kind, data } of each event of the replies of a conversation (the id of its row), from where this
// window was.
export const follow = (conversation, listener) => {
  onReply = listener
  wanted.conversation = conversation
  begin()
}

export const unfollow = () => {
  wanted.conversation = null
  begin()
}

// The connection may be dead.
export const followAnew = begin
