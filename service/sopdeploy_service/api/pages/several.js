"use strict";
// Several images: how many show which class, which of them are listed, and in which order.

let only = ""; // the kind that is listed; "" for all

/** What `photo` counts as: its class, or what it is instead in brackets; "" without an answer. */
function kindOf({ body, problem }) {
  if (problem) return "(error)";
  if (!body) return "";
  if (!body.classes.length) return "(no class)";
  return body.known === false ? "(none of these)" : body.classes[0].label;
}

/** Probability of the class of `photo`; 0 without one, or for one that is none of the classes. */
const certainty = ({ body }) => (body && body.known !== false ? body.classes[0]?.probability ?? 0 : 0);

const ORDERS = {
  given: () => 0,
  kind: (one, other) => kindOf(one).localeCompare(kindOf(other), "en") || certainty(other) - certainty(one),
  doubtful: (one, other) => certainty(one) - certainty(other),
};

/** Show a button with the count of each kind, and the images of the kind that is chosen, in the chosen order. */
function showCounts() {
  const counts = new Map();
  for (const photo of state.photos) counts.set(kindOf(photo), (counts.get(kindOf(photo)) ?? 0) + 1);
  counts.delete("");
  if (!counts.has(only)) only = "";
  const kinds = [...counts].sort(([, one], [, other]) => other - one);
  const buttons = [["", state.photos.length], ...kinds].map(([kind, count]) => {
    const button = make("button", { type: "button", "aria-pressed": String(kind === only) },
      make("bdi", {}, kind || "All"), ` ${count}`);
    button.addEventListener("click", () => {
      only = kind;
      showCounts();
      byId("counts").querySelector("[aria-pressed=true]").focus(); // the buttons are new ones
    });
    return button;
  });
  byId("counts").replaceChildren(...buttons);
  const order = ORDERS[byId("order").value];
  const listed = state.photos.filter((photo) => !only || kindOf(photo) === only).sort(order);
  byId("list").replaceChildren(...listed.map(({ entry }) => entry));
}
