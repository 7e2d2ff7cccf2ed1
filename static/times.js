// Times in the reader's zone, and numbers as the reader writes them.

export const showLocalTimes = (root) => {
  for (const time of root.querySelectorAll("time")) {
    const moment = new Date(time.dateTime)
    const today = moment.toDateString() === new Date().toDateString()
    time.textContent = moment.toLocaleString([], today ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" })
    time.title = moment.toString()
  }
  for (const number of root.querySelectorAll("data")) number.textContent = Number(number.value).toLocaleString()
}
