// Requests to the server, each with a limit on how long it may stand still.

const IDLE_TIMEOUT_MS = 10000

// The whole text of a page. It may take long, as long as something keeps coming.
export const getPage = async (path) => {
  const controller = new AbortController()
  let timer = 0
  const restartTimer = () => {
    clearTimeout(timer)
    timer = setTimeout(() => controller.abort(), IDLE_TIMEOUT_MS)
  }
  restartTimer()
  try {
    const response = await fetch(path, { headers: { Accept: "text/html" }, signal: controller.signal })
    let text = ""
    for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      restartTimer()
      const { done, value } = await reader.read()
      if (done) return { response, text }
      text += value
    }
  } finally {
    clearTimeout(timer)
  }
}

// `submitter`: the button that sends the form. `changes`: fields that are sent with another value than the form shows.
export const postForm = (form, { submitter = null, action = form.getAttribute("action"), changes = {}, ...options } = {}) => {
  const fields = new URLSearchParams(new FormData(form, submitter))
  for (const [name, value] of Object.entries(changes)) fields.set(name, value)
  return fetch(action, {
    signal: AbortSignal.timeout(IDLE_TIMEOUT_MS),
    ...options,
    method: "POST",
    headers: { Accept: "application/json" },
    body: fields,
  })
}
