// Marks in place of characters that nobody sees, as visible.py makes them for what the server shows.

export const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) => (
  "\t\n\r\u200c\u200d".includes(char) ? char : `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`
))
