"use strict";
// The key of a server that wants one: typed here, kept until the tab is closed, sent to this server only.

const KEY = "sopdeploy-key";

/** Return the key that was typed, "" where none was; a browser that keeps nothing has none after a reload. */
function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

let key = storedKey();

/** Return the headers that say whose request it is, beside `others`. */
const keyHeaders = (others = {}) => (key ? { ...others, Authorization: `Bearer ${key}` } : others);

/** Return the sentence for `reply`, an answer of 401: what to do, not what the wire says. */
const noKey = () => (key ? "this server does not know the key; type another one above"
  : "this server wants a key; type yours above");

/** Show the field for a key, where the person can type at once. */
function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

/** Return JSON from `path`, or throw an Error with a sentence: the server's own, but for a missing key. */
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

/** Call `again` whenever another key was typed. */
function onKey(again) {
  byId("key-form").hidden = !key;
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = byId("key").value.replaceAll(/[^\x21-\x7e]/g, ""); // no key has more, and no header would carry it
    byId("key").value = "";
    byId("key").placeholder = key ? "in use" : "";
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // kept in this page then, until it is left
    }
    again();
  });
}
