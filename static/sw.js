// The service worker: where the server cannot be reached, a page says so. It keeps that page and its stylesheet, and
// never a page with what somebody wrote.

const version = new URL(location.href).searchParams.get("v")
const OFFLINE = "/chat/offline"
const KEPT = [OFFLINE, `/chat/static/${version}/app.css`, `/chat/static/${version}/icon.svg`]

addEventListener("install", (event) => {
  skipWaiting()
  event.waitUntil(caches.open(version).then((cache) => cache.addAll(KEPT)))
})

addEventListener("activate", (event) => {
  const clean = async () => {
    for (const name of await caches.keys()) if (name !== version) await caches.delete(name)
  }
  event.waitUntil(clean())
})

addEventListener("fetch", (event) => {
  const { request } = event
  if (request.method !== "GET") return
  if (request.mode === "navigate") event.respondWith(fetch(request).catch(() => caches.match(OFFLINE)))
  else if (KEPT.includes(new URL(request.url).pathname)) {
    event.respondWith(caches.match(request).then((kept) => kept ?? fetch(request)))
  }
})
