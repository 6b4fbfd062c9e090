"use strict";
// The page at `/docs`: the requests of Swagger UI carry the key.

const settings = ui.getConfigs();
settings.requestInterceptor = (request) => ({ ...request, headers: keyHeaders(request.headers) });
settings.responseInterceptor = (response) => {
  byId("error").textContent = response.status === 401 ? noKey() : "";
  if (response.status === 401) askForKey();
  return response;
};
ui.specActions.download(); // again: the first request may have had no key
onKey(() => ui.specActions.download());
