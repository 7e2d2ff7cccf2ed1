// Formulas: typeset by KaTeX from our own host, which is loaded when a page has the first one. One that KaTeX does not
// understand, or that is very long, stays as its source.

const MAX_CHARS = 4000
const AT_ONCE = 20
const OPTIONS = { trust: false, throwOnError: true, strict: "ignore", maxExpand: 300, maxSize: 20 }

let katex = null
let loading = null
const waiting = []

export const typeset = (root) => {
  const found = [...root.querySelectorAll(".math"), ...(root.matches(".math") ? [root] : [])]
    .filter((formula) => !formula.firstElementChild && formula.dataset.tex.length <= MAX_CHARS)
  if (!found.length) return
  waiting.push(...found)
  loading ??= load().then(typesetSome, () => { loading = null })
  if (katex && waiting.length === found.length) typesetSome()
}

const load = async () => {
  const style = Object.assign(document.createElement("link"), { rel: "stylesheet" })
  style.href = new URL("katex/katex.min.css", import.meta.url)
  document.head.append(style)
  await import(new URL("katex/katex.min.js", import.meta.url))
  katex = globalThis.katex
}

// A few at a time: the page stays quick with a thousand of them.
const typesetSome = () => {
  for (const formula of waiting.splice(0, AT_ONCE)) typesetOne(formula)
  if (waiting.length) setTimeout(typesetSome)
}

const typesetOne = (formula) => {
  try {
    const displayMode = formula.matches(".display")
    const tree = katex.__renderToDomTree(formula.dataset.tex, { ...OPTIONS, displayMode })
    const styles = takeStyles(tree)
    const node = tree.toNode()
    // The content policy forbids style attributes; a script may set the same properties.
    for (const styled of node.querySelectorAll("[data-style]")) {
      styled.style.cssText = styles[Number(styled.dataset.style)]
      delete styled.dataset.style
    }
    formula.replaceChildren(node)
  } catch {
    formula.classList.add("failed")
  }
}

const takeStyles = (tree) => {
  const styles = []
  const unread = [tree]
  while (unread.length) {
    const node = unread.pop()
    unread.push(...(node.children ?? []))
    if (!node.attributes?.style) continue
    node.attributes["data-style"] = String(styles.push(node.attributes.style) - 1)
    delete node.attributes.style
  }
  return styles
}
