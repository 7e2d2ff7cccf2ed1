// The one place where all windows of a browser have their stream from: see hub.js.

import { Hub } from "./hub.js"

const hub = new Hub()

addEventListener("connect", ({ ports: [port] }) => {
  port.onmessage = ({ data }) => hub.take(port, data)
})
