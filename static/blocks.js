// A reply while it is written: the blocks that the server has rendered, put in place. Finished ones are never touched
// again. This HTML comes from the server's own renderer, which cleans it, and from nowhere else.

import { enrich } from "./prose.js"

const INNERMOST = "ul, ol, li, p, blockquote, figure, pre, pre > code"

// So much of a paragraph a browser shapes anew for each piece that comes; of a whole long one it would take too long.
const MAX_TAIL = 2000

const isOneLine = (node) => node.nodeName === "P" && !node.querySelector("br")

export class Blocks {
  // Of `element` only the children are used. The next one may be another: see `moveTo`.
  constructor(element) {
    this.element = element
    this.nodes = []
    this.nFinished = 0
  }

  get isEmpty() {
    return !this.nodes.length
  }

  clear() {
    this.element.replaceChildren()
    this.nodes = []
    this.nFinished = 0
  }

  moveTo(element) {
    if (element === this.element) return
    element.replaceChildren(...this.element.childNodes)
    this.element = element
  }

  put({ block, within, html, finished }) {
    if (block < this.nFinished) return
    for (const node of this.nodes.splice(block).flat()) node.remove()
    const template = document.createElement("template")
    template.innerHTML = html
    const nodes = [...template.content.childNodes]
    this.placeOf(within).append(...nodes)
    this.nodes.push(nodes)
    if (!finished) return nodes.filter(isOneLine).forEach((node) => node.classList.add("growing"))
    this.nFinished = block + 1
    for (const node of nodes) enrich(node)
  }

  placeOf(within) {
    const last = this.element.lastElementChild
    if (within === "list") return last
    return within === "rows" ? last.querySelector("tbody") : this.element
  }

  more({ text }) {
    let end = this.nodes.at(-1).at(-1)
    while (end.lastElementChild?.matches(INNERMOST)) end = end.lastElementChild
    const last = end.lastElementChild?.matches(".tail") ? end.lastElementChild : null
    const isFull = last?.textContent.length > MAX_TAIL && /\s$/.test(last.textContent)
    if (!end.matches("code") && (!last || isFull)) {
      end.append(Object.assign(document.createElement("span"), { className: "tail" }))
    }
    const place = end.matches("code") ? end : end.lastElementChild
    // One text node: appending keeps a selection in it.
    if (place.lastChild?.nodeType === Node.TEXT_NODE) place.lastChild.appendData(text)
    else place.append(text)
  }
}
