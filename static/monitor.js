// SAQ's tables scroll within its main element where they are wider than the screen; with the keyboard too, as without
// this they would only where something in them can have the focus.
new MutationObserver(() => {
  const main = document.querySelector("main:not([tabindex])");
  if (main) main.tabIndex = 0;
}).observe(document.body, { childList: true, subtree: true });
