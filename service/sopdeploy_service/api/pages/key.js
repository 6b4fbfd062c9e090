"use strict";
// The API key: entered here, stored until the tab is closed, sent to this server only.

const KEY = "sopdeploy-key";

/** The stored key, "" if there is none; browsers without session storage lose it on reload. */
function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

let key = storedKey();

/** Request headers with the key and `others`. */
const keyHeaders = (others = {}) => (key ? { ...others, Authorization: `Bearer ${key}` } : others);

/** Message for a response with status 401. */
const noKey = () => (key ? "the key is not valid; enter another one above"
  : "this server requires a key; enter it above");

/** Show and focus the key field. */
function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

/** Fetch JSON from `path`; throws an Error with the message of the server. */
async function fetchJson(path) {
  const reply = await fetch(path, { headers: keyHeaders() });
  const body = await reply.json();
  if (reply.status === 401) {
    askForKey();
    throw new Error(noKey());
  }
  if (!reply.ok) throw new Error(body.detail);
  return body;
}

/** Call `again` whenever a key is entered. */
function onKey(again) {
  byId("key-form").hidden = !key;
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = byId("key").value.replaceAll(/[^\x21-\x7e]/g, ""); // keys and headers have no other characters
    byId("key").value = "";
    byId("key").placeholder = key ? "in use" : "";
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // the key is lost on reload
    }
    again();
  });
}
