// Puts a fresh rendering of a list in place, item by item, so that focus, selection and open details survive in the
// items that did not change. An item is known by its id.

import { enrich } from "./prose.js"
import { showLocalTimes } from "./times.js"

export const announce = (said) => {
  if (said.length) document.getElementById("announcement").textContent = said.join(". ")
}

export class ListRenderer {
  constructor(list) {
    this.list = list
    this.rendered = new Map([...list.children].map((item) => [item.id, item.outerHTML]))
  }

  // `fresh`: the list as the server renders it now; a list with data-part holds only items that may have changed.
  // Returns whether any item was new or different.
  render(fresh) {
    if (this.lacksItemsOf(fresh)) {
      const all = new URL(fresh.dataset.live, location.href)
      all.searchParams.set("known", 0)
      this.list.dataset.live = `${all.pathname}${all.search}`
      return false
    }
    const { changed, said } = this.renderItems(fresh)
    announce(said)
    Object.assign(this.list.dataset, { live: this.addressAfter(fresh), open: fresh.dataset.open })
    this.list.toggleAttribute("data-elsewhere", "elsewhere" in fresh.dataset)
    return changed
  }

  // Where to ask next time. A prompt that was changed in another window comes again with all that stands behind it: for
  // once the page knows only the turns before.
  addressAfter(fresh) {
    const address = new URL(fresh.dataset.live, location.href)
    const edited = [...fresh.children].find((item) => item.dataset.prompt !== this.itemOf(item).dataset.prompt)
    if (edited) address.searchParams.set("known", edited.dataset.turn)
    return address.pathname + address.search
  }

  // Whether only a part came of an item that the list does not have, or has in another form: another window has asked
  // another model meanwhile.
  lacksItemsOf(fresh) {
    return [...fresh.children].some((item) => "brief" in item.dataset && this.itemOf(item)?.className !== item.className)
  }

  itemOf({ id }) {
    return this.list.querySelector(`:scope > [id="${CSS.escape(id)}"]`)
  }

  // The same without what concerns the list as a whole: `said` is what is to be announced.
  renderItems(fresh) {
    const isPart = "part" in this.list.dataset
    const items = [...fresh.children]
    const ids = new Set(items.map((item) => item.id))
    if (!isPart) this.removeAllBut(ids)
    else if ("from" in fresh.dataset) this.removeDeleted(ids, Number(fresh.dataset.from), Number(fresh.dataset.until))
    const said = []
    let changed = false
    let next = isPart ? null : this.list.firstElementChild
    for (const [index, item] of items.entries()) {
      const old = this.itemOf(item)
      const html = item.outerHTML
      let current = old
      if (!old || this.rendered.get(item.id) !== html) {
        if (item.dataset.said && old?.dataset.said !== item.dataset.said) said.push(item.dataset.said)
        changed = true
        this.rendered.set(item.id, html)
        showLocalTimes(item)
        for (const text of item.querySelectorAll(".markdown")) enrich(text)
        if (isPart && !old) next = items.slice(index + 1).map((later) => this.itemOf(later)).find(Boolean) ?? null
        current = this.renderItem(old, item, next)
      }
      if (!isPart) next = current.nextElementSibling
    }
    return { changed, said }
  }

  removeAllBut(ids, isMeant = () => true) {
    for (const item of [...this.list.children]) {
      if (ids.has(item.id) || !isMeant(item)) continue
      this.rendered.delete(item.id)
      item.remove()
    }
  }

  // Of the turns from number `from` to before `until`, those that did not come again.
  removeDeleted(ids, from, until) {
    this.removeAllBut(ids, ({ dataset: { turn } }) => Number(turn) >= from && Number(turn) < until)
  }

  renderItem(old, item, next) {
    if (!old) return this.list.insertBefore(item, next)
    if ("brief" in item.dataset) replaceParts(old, item)
    else replaceItem(old, item)
    return old
  }
}

// Of a job that still runs only these parts come again: a button that is replaced between press and release is not
// pressed.
const replaceParts = (old, item) => {
  for (const part of item.querySelectorAll("[data-part]")) {
    old.querySelector(`[data-part="${part.dataset.part}"]`)?.replaceChildren(...part.childNodes)
  }
  for (const name of ["said", "status"]) if (name in item.dataset) old.dataset[name] = item.dataset[name]
}

const replaceItem = (old, item) => {
  const focused = old.contains(document.activeElement) ? document.activeElement : null
  const wereOpen = [...old.querySelectorAll("details")].map((details) => details.open)
  replaceContent(old, item)
  old.dataset.grown = ""
  old.querySelectorAll("details").forEach((details, index) => { details.open = wereOpen[index] ?? details.open })
  if (focused && !old.contains(focused)) restoreFocus(old, focused)
}

// Children that are the same stay, and with them what is selected in them. So do the blocks of a reply that has ended: the
// page has shown them already.
const replaceContent = (old, fresh) => {
  const before = [...old.children]
  const after = [...fresh.children]
  after.forEach((child, index) => {
    if (!before[index]) old.append(child)
    else if (!before[index].isEqualNode(child)) replaceChild(before[index], child)
  })
  for (const child of before.slice(after.length)) child.remove()
  replaceAttributes(old, fresh)
}

const replaceChild = (before, after) => {
  const areBoth = (selector) => before.matches(selector) && after.matches(selector)
  if (areBoth(".said")) replaceContent(before, after)
  else if (areBoth(".markdown")) replaceBlocks(before, after)
  else if (areBoth("[data-keep]") && !before.hidden) replaceThinking(before, after)
  else before.replaceWith(after)
}

// A model's thinking stays as this page saw it: the record has it a little later, or never. Once it has, how long that
// took is as the record says.
const replaceThinking = (before, after) => {
  if (after.hidden) return
  const isSame = after.querySelector(".text").textContent === before.querySelector(".text").textContent
  if (isSame) before.querySelector("summary").replaceWith(after.querySelector("summary"))
  else before.replaceWith(after)
}

const replaceBlocks = (old, fresh) => {
  const before = [...old.childNodes]
  const after = [...fresh.childNodes]
  let n = 0
  while (n < before.length && n < after.length && before[n].isEqualNode(after[n])) n += 1
  for (const node of before.slice(n)) node.remove()
  old.append(...after.slice(n))
  replaceAttributes(old, fresh)
}

const replaceAttributes = (old, fresh) => {
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name)
  for (const { name, value } of fresh.attributes) old.setAttribute(name, value)
}

// Where the focused element is gone, to the same link, or else to something beside it.
const restoreFocus = (item, focused) => {
  const links = [...item.querySelectorAll("a")]
  const same = links.find((link) => link.getAttribute("href") === focused.getAttribute("href"))
  const target = same ?? links[0] ?? item.querySelector("summary, button") ?? item
  if (target === item) item.tabIndex = -1
  target.focus()
}
