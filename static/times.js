// Times in the reader's zone, and numbers as the reader writes them. The server learns the zone from the next page on.

export const showLocalTimes = (root) => {
  for (const time of root.querySelectorAll("time")) {
    const moment = new Date(time.dateTime)
    const today = moment.toDateString() === new Date().toDateString()
    time.textContent = moment.toLocaleString([], today ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" })
    time.title = moment.toString()
  }
  for (const number of root.querySelectorAll("data")) number.textContent = Number(number.value).toLocaleString()
}

// Its days are the reader's then: the groups of chats, and the days of filters.
export const nameZone = () => {
  const { timeZone } = Intl.DateTimeFormat().resolvedOptions()
  const overHttps = location.protocol === "https:"
  const cookie = `${overHttps ? "__Host-" : ""}llamalith_zone=${timeZone}`
  if (!timeZone || document.cookie.split("; ").includes(cookie)) return
  document.cookie = `${cookie}; Path=${overHttps ? "/; Secure" : "/chat"}; SameSite=Lax; Max-Age=${400 * 24 * 3600}`
}
