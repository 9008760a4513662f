// The sources of a picture: a file, a drop, the clipboard, the camera, the samples.

import { element } from "./dom.js";

/**
 * Listen to every source. `onPicture({blob, name, url})`: called with a picture, with `url` if curl
 * can download it. `onTrouble(text)`: called with a message if there is no picture.
 */
export function listen({ onPicture, onTrouble }) {
  const fromFile = (file) => onPicture({ blob: file, name: file.name });

  for (const input of [element("file"), element("capture")]) {
    input.addEventListener("change", () => {
      const [file] = input.files;
      // Otherwise the same file cannot be chosen twice.
      input.value = "";
      element("camera-dialog").close();
      if (file) fromFile(file);
    });
  }

  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return onTrouble("The clipboard contains no picture");
    const ending = file.type.split("/").pop() || "png";
    onPicture({ blob: file, name: `pasted.${ending}` });
  });

  listenToDrops(fromFile, onTrouble);
  listenToCamera(onPicture);

  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", async () => {
      const url = new URL(button.dataset.sample, document.baseURI).href;
      const name = url.split("/").pop();
      try {
        const response = await fetch(url);
        onPicture({ blob: await response.blob(), name, url });
      } catch {
        onTrouble("The server cannot be reached");
      }
    });
  }
}

function listenToDrops(onFile, onTrouble) {
  const sign = element("drop");
  let inside = 0; // a child's dragenter comes before its parent's dragleave
  document.addEventListener("dragenter", (event) => {
    event.preventDefault();
    inside++;
    sign.hidden = false;
  });
  document.addEventListener("dragleave", () => {
    inside--;
    if (inside === 0) sign.hidden = true;
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    sign.hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) onFile(file);
    else onTrouble("The dropped item is not a file. Save the picture first.");
  });
}

function listenToCamera(onPicture) {
  const dialog = element("camera-dialog");
  const video = element("camera-video");
  const take = element("camera-take");
  let stream = null;

  const stop = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    video.srcObject = null;
  };

  const start = async () => {
    take.disabled = true;
    take.hidden = false;
    element("camera-instead").hidden = true;
    element("camera-message").textContent = "Waiting for the camera…";
    dialog.showModal();
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment", width: { ideal: 1920 } },
      });
      if (!dialog.open) return stop();
      video.srcObject = stream;
      await video.play();
      element("camera-message").textContent = "";
      take.disabled = false;
      take.focus();
    } catch (error) {
      stop();
      take.hidden = true;
      element("camera-instead").hidden = false;
      element("camera-message").textContent = explain(error);
    }
  };

  element("camera").addEventListener("click", () => {
    // Phones have a better camera app. Without HTTPS a page has no access to the camera.
    const phone = matchMedia("(pointer: coarse)").matches;
    if (phone || !navigator.mediaDevices) element("capture").click();
    else start();
  });
  element("camera-instead").addEventListener("click", () => element("file").click());
  element("camera-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
  take.addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    dialog.close();
    canvas.toBlob((blob) => onPicture({ blob, name: "camera.jpg" }), "image/jpeg", 0.92);
  });
}

function explain(error) {
  const reasons = {
    NotAllowedError: "The browser blocks the camera for this page. Allow it in the browser's settings.",
    NotFoundError: "No camera was found.",
    NotReadableError: "Another program uses the camera.",
  };
  return reasons[error.name] ?? "The camera cannot be used.";
}
