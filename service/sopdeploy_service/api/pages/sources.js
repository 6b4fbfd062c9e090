"use strict";
// Where images come from besides single files: folders, and the camera of a laptop.

const MAX_IMAGES = 1000; // of a folder; `sopdeploy classify` takes more
const IMAGE_NAME = /({suffixes})$/i; // browsers know no type of some of them

/** Images among `files`, sorted by path. */
const imagesOf = (files) => [...files].filter((file) => IMAGE_NAME.test(file.name) && !pathOf(file).split("/").some((part) => part.startsWith(".")))
  .sort((one, other) => pathOf(one).localeCompare(pathOf(other), "en", { numeric: true }));

const paths = new WeakMap(); // of files that were dropped with their folder
/** Path of `file` in its folder, else its name. */
const pathOf = (file) => paths.get(file) ?? (file.webkitRelativePath || file.name);

/** Files of `transfer`: those dropped, or the images of dropped folders; null if there are none. */
async function filesOf(transfer) {
  const entries = [...(transfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = [...(transfer?.files ?? [])]; // read before the event ends, as the entries
  if (!entries.some((entry) => entry.isDirectory)) return files.length ? files : null;
  const found = [];
  for (const entry of entries) await addFiles(entry, found);
  return imagesOf(found);
}

/** Add the files of `entry`, a file or a folder, to `found`. */
async function addFiles(entry, found) {
  if (found.length > 20 * MAX_IMAGES) return; // also of other files
  if (entry.isFile) {
    const file = await new Promise((resolve) => { entry.file(resolve, () => resolve(null)); });
    if (!file) return; // it cannot be read
    paths.set(file, entry.fullPath.slice(1));
    found.push(file);
    return;
  }
  const reader = entry.createReader();
  for (let some = [null]; some.length > 0;) { // at most 100 at a time
    some = await new Promise((resolve) => { reader.readEntries(resolve, () => resolve([])); });
    for (const each of some) await addFiles(each, found);
  }
}

/** Show the picture of the camera, from which `onPhoto` gets the photographs that are taken. */
async function openCamera(onPhoto) {
  closeCamera();
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
  } catch {
    showError("the camera cannot be used; allow it for this page, and close other programs that use it");
    return;
  }
  byId("video").srcObject = stream;
  byId("snap").onclick = () => takePhoto().then(onPhoto);
  byId("live").hidden = false;
  byId("use-camera").hidden = true;
  byId("snap").focus();
}

/** Photograph what the camera shows. */
async function takePhoto() {
  const video = byId("video");
  const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", 0.92); });
  return new File([blob], "camera.jpg", { type: "image/jpeg" });
}

/** Turn the camera off. */
function closeCamera() {
  for (const track of byId("video").srcObject?.getTracks() ?? []) track.stop();
  byId("video").srcObject = null;
  byId("live").hidden = true;
  byId("use-camera").hidden = !navigator.mediaDevices; // which needs https or localhost
}

/** CSV of `rows`, lists of texts, for spreadsheets: with the mark of UTF-8, and no cell is a formula. */
const csv = (rows) => "\ufeff" + rows.map((row) => row.map((cell) => {
  const text = /^[=+\-@\t\r]/.test(cell) ? `'${cell}` : cell;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}).join(",")).join("\r\n") + "\r\n";

/** Let the browser save `text` as the file `name`. */
function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
