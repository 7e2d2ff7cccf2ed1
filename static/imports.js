// A conversation's file that is too large is not sent: a server that refuses it while it comes is seen by nobody.

import { inWords } from "./attachments.js"
import { hideNotice, showResult } from "./notice.js"
import { _ } from "./words.js"

// As the server has it, too.
const MAX_BYTES = 16_000_000

export const checkImports = () => {
  document.querySelector("form.import [type=file]")?.addEventListener("change", ({ target }) => {
    hideNotice()
    const [file] = target.files
    if (!file || file.size <= MAX_BYTES) return
    target.value = ""
    showResult(_("The file has %(size)s, at most %(most)s can be imported.", { size: inWords(file.size), most: inWords(MAX_BYTES) }))
  })
}
