// Serves the files of this folder without a connection. `sopdeploy web` adds VERSION, a hash of the files, and FILES.
const CACHES = `${registration.scope} `; // other pages of this host have their own
const CACHE = CACHES + VERSION;

addEventListener("install", (event) => event.waitUntil(
  caches.open(CACHE).then((cache) => cache.addAll(FILES.map((name) => new Request(name, { cache: "reload" })))),
));
addEventListener("activate", (event) => event.waitUntil(caches.keys().then((names) => Promise.all(
  names.filter((name) => name.startsWith(CACHES) && name !== CACHE).map((name) => caches.delete(name)),
))));
addEventListener("fetch", (event) => event.respondWith(
  caches.open(CACHE).then((cache) => cache.match(event.request)).then((found) => found ?? fetch(event.request)),
));
