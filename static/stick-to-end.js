// A reader at the end of a page stays at its end while it grows, until they scroll back.

const page = document.documentElement
const toEnd = () => page.scrollHeight - page.clientHeight - page.scrollTop
let sticks = toEnd() < 40

export const scrollIfSticking = () => {
  if (sticks) page.scrollTop = page.scrollHeight
}

export const stickToEnd = () => {
  let lastTop = page.scrollTop
  let touchedAt = 0
  const canScrollBack = () => page.scrollTop > 0

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
    else if (page.scrollTop > lastTop) sticks = toEnd() < 40
    lastTop = page.scrollTop
  }, { passive: true })
}
