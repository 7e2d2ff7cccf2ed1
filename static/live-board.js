// A part of a page with several lists, marked data-list, that come fresh together.

import { ListRenderer, announce } from "./list-renderer.js"

export class BoardRenderer {
  constructor(board) {
    this.board = board
    this.renderers = [...board.querySelectorAll("[data-list]")].map((list) => new ListRenderer(list))
  }

  // `fresh`: the part as the server renders it now. Returns whether any item was new or different.
  render(fresh) {
    const results = this.renderers.map((renderer) => (
      renderer.renderItems(fresh.querySelector(`[id="${CSS.escape(renderer.list.id)}"]`))
    ))
    announce(results.flatMap((result) => result.said))
    Object.assign(this.board.dataset, { live: fresh.dataset.live, open: fresh.dataset.open })
    return results.some((result) => result.changed)
  }
}
