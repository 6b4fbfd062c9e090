"use strict";
// The loaded model: facts, certificate, model card.

const SEAL = "M12 2l2.4 2 3.1-.3 1 3 2.6 1.7-.9 3 .9 3-2.6 1.7-1 3-3.1-.3L12 21l-2.4-2.2-3.1.3-1-3L2.9 14.4l.9-3-.9-3 2.6-1.7 1-3 3.1.3z M8.5 11.6l2.4 2.4 4.6-4.8";

const FEW_CLASSES = 24; // each has a button under "This is wrong"; of more, the field offers what begins with the letters

/** Show `info`, a model of `/info`, `card`, the response of `/v1/card`, and `server`, the version of the server. */
function showAbout(info, card, server) {
  document.title = `${info.name} · sopdeploy`;
  byId("model").textContent = info.name;
  const facts = [`${info.num_labels} classes`, info.precision, `${info.runtime} on ${info.device}`];
  byId("facts").replaceChildren(...facts.map((fact) => make("li", {}, fact)));
  const more = info.num_labels - card.labels.length;
  const chips = [...card.labels, ...(more > 0 ? [`and ${more} more`] : [])];
  byId("this-model").textContent = info.name;
  byId("known-classes").replaceChildren(...card.labels.map((label) => make("option", { value: label })));
  byId("right-classes").replaceChildren(...(info.num_labels <= FEW_CLASSES ? card.labels : []).map(classButton));
  byId("labels").replaceChildren(...chips.map((label) => make("li", {}, make("bdi", {}, label))));
  byId("bundle").textContent = `${info.bundle} · sopdeploy ${server}`;
  byId("proof").replaceChildren(...(card.certificate ? proof(card.certificate) : [nothing("certificate")]));
  byId("card").replaceChildren(...(card.text ? markdown(card.text) : [nothing("README.md")]));
}

/** Button that reports the photo that is shown as one of the class `label`. */
function classButton(label) {
  const button = make("button", { type: "button" }, make("bdi", {}, label));
  button.addEventListener("click", () => void report(label));
  return button;
}

const counted = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
const nothing = (what) => make("p", { className: "empty" }, `This bundle has no readable ${what}.`);

/** What the certificate says, in a sentence. */
const verdict = ({ num_removed: removed, divided_by: temperature }) => {
  const classifier = temperature ? ", except the classifier, which was divided by the temperature" : "";
  return removed
    ? "Verified: only auxiliary branches were removed."
    : `Verified: all tensors are unchanged after training${classifier}.`;
};

/** Nodes of a certificate summary. */
function proof(certificate) {
  const { compared, detached, num_removed: removed, bytes_removed: bytes, num_kept: kept, num_operations: operations, num_images: images, divided_by: temperature } = certificate;
  const divided = temperature ? ` (classifier divided by ${Number(temperature.toPrecision(4))})` : "";
  const networks = compared.join(" = ").replace("trained", `trained${divided}`);
  const rows = [
    ["Removed", removed ? `${detached.join(", ")} (${counted(removed, "tensor")}, ${bytes.toLocaleString("en")} bytes)` : "nothing; the network has no training-only parts"],
    ["Kept", counted(kept, "tensor")],
    ["Graph", `${networks}, ${operations} operations, the same in model.onnx`],
    ["Outputs", `model.onnx was compared with the network on ${counted(images, "reference image")}`],
  ];
  const hashes = [["Graph hash", make("code", {}, certificate.root)], ["ONNX graph hash", make("code", {}, certificate.onnx_root)]];
  return [make("p", { className: "seal" }, seal(), verdict(certificate)), list(rows),
    make("details", {}, make("summary", {}, "Hashes"), list(hashes))];
}

/** Description list of [name, value] rows. */
const list = (rows) => make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

/** The seal icon. */
function seal() {
  const names = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(names, "svg");
  const path = document.createElementNS(names, "path");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SEAL);
  drawing.append(path);
  return drawing;
}
