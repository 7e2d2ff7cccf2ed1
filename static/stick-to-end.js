// A reader at the end of a page stays at its end while it grows, until they scroll back; then a button says that there is
// more below.

const page = document.documentElement

// Where a page is at its end. Answers side by side begin one after another, each at the top of its column: there it is no
// further down than their prompt.
const comparedAtEnd = () => (
  document.querySelector(".turns > .side:last-child") && [...document.querySelectorAll(".compared")].at(-1)
)
const endTop = () => {
  const bottom = page.scrollHeight - page.clientHeight
  const prompt = comparedAtEnd()
  if (!prompt) return bottom
  const margin = parseFloat(getComputedStyle(prompt).scrollMarginTop)
  return Math.min(bottom, page.scrollTop + prompt.getBoundingClientRect().top - margin)
}
const toEnd = () => endTop() - page.scrollTop
let sticks = toEnd() < 40
// Text has come since the reader left the end.
let hasNew = false
// How far a reader has to be from the end for the button to show.
const AWAY_PX = 160

const button = document.querySelector(".to-end")

const showButton = () => {
  if (!button) return
  const isAway = !sticks && toEnd() > AWAY_PX
  hasNew &&= isAway
  button.hidden = !isAway
  button.toggleAttribute("data-is-new", hasNew)
}

export const scrollIfSticking = () => {
  // Beyond the bottom: where that is to a part of a pixel, only the browser knows.
  if (sticks) page.scrollTop = comparedAtEnd() ? Math.max(page.scrollTop, endTop()) : page.scrollHeight
  showButton()
}

export const showNewText = () => {
  hasNew = true
  scrollIfSticking()
}

export const goToEnd = () => {
  sticks = true
  scrollIfSticking()
}

// A conversation is opened where it goes on, unless its address names a place or the browser knows where it was left.
const openAtEnd = () => {
  const isFirstView = performance.getEntriesByType("navigation")[0]?.type === "navigate"
  const namesPlace = location.hash !== "" && location.hash !== "#reply"
  if (isFirstView && !namesPlace) goToEnd()
}

export const stickToEnd = () => {
  let lastTop = page.scrollTop
  let touchedAt = 0
  const canScrollBack = () => page.scrollTop > 0

  const dock = document.querySelector(".dock")
  if (dock) {
    openAtEnd()
    lastTop = page.scrollTop
    const sizes = new ResizeObserver(scrollIfSticking)
    sizes.observe(dock)
    sizes.observe(document.querySelector(".turns"))
    button.addEventListener("click", () => {
      goToEnd()
      document.getElementById("main").focus({ preventScroll: true })
    })
  }

  addEventListener("wheel", (event) => { if (event.deltaY < 0 && canScrollBack()) sticks = false }, { passive: true })
  addEventListener("touchstart", (event) => { touchedAt = event.touches[0].clientY }, { passive: true })
  addEventListener("touchmove", (event) => {
    if (event.touches[0].clientY > touchedAt + 4 && canScrollBack()) sticks = false
  }, { passive: true })
  addEventListener("touchend", () => { sticks ||= toEnd() < 1 }, { passive: true })
  addEventListener("keydown", (event) => {
    if (event.target.matches("textarea, input, select")) return
    if (["ArrowUp", "PageUp", "Home"].includes(event.key) || (event.key === " " && event.shiftKey)) sticks = false
    // The end that the browser scrolls to has moved by the time that it arrives.
    if (event.key === "End") sticks = true
  })
  addEventListener("scroll", () => {
    if (page.scrollTop < lastTop) sticks &&= toEnd() < 1
    // The browser itself scrolls down, too, where text grows above: that takes nobody from the end.
    else if (page.scrollTop > lastTop) sticks ||= toEnd() < 40
    lastTop = page.scrollTop
    showButton()
  }, { passive: true })
}
