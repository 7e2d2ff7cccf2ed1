// SAQ's script makes the main element of the page. It is what the skip link leads to, and its tables scroll in it where
// they are wider than the screen: with the keyboard too, for which it needs a tabindex.
new MutationObserver(() => {
  const main = document.querySelector("main:not([tabindex])")
  if (main) Object.assign(main, { id: "main", tabIndex: 0 })
}).observe(document.body, { childList: true, subtree: true })
