"use strict";
// The page at `/docs`: the requests of Swagger UI carry the key.

// The style sheet of Swagger UI has dark colors, but does not choose them itself.
const dark = matchMedia("(prefers-color-scheme: dark)");
const choose = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", choose);
choose();

const settings = ui.getConfigs();
settings.requestInterceptor = (request) => ({ ...request, headers: keyHeaders(request.headers) });
settings.responseInterceptor = (response) => {
  byId("error").textContent = response.status === 401 ? noKey() : "";
  if (response.status === 401) askForKey();
  return response;
};
ui.specActions.download(); // again: the first request may have had no key
onKey(() => ui.specActions.download());
