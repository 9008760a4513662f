// Where pictures come from: a file, a drop, the clipboard, the camera, the samples.

const element = (id) => document.getElementById(id);

/**
 * Wire all of them up. `onPicture({blob, name, url})`: one was given; `url` only where curl can fetch
 * it. `onTrouble(text)`: there was none in what was dropped or pasted.
 */
export function listen({ onPicture, onTrouble }) {
  const fromFile = (file) => onPicture({ blob: file, name: file.name });

  for (const input of [element("file"), element("capture")]) {
    input.addEventListener("change", () => {
      const [file] = input.files;
      // So that the same file can be chosen again.
      input.value = "";
      element("camera-dialog").close();
      if (file) fromFile(file);
    });
  }

  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return onTrouble("There is no picture in the clipboard");
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
  let inside = 0; // entering a child comes before leaving its parent
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
    else onTrouble("What was dropped is not a file: save the picture first");
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
    // Phones have a camera app that does it better, and without https there is nothing else.
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
    NotAllowedError: "This page may not use the camera. Allow it in the browser's settings for this page.",
    NotFoundError: "No camera was found.",
    NotReadableError: "The camera is in use by another program.",
  };
  return reasons[error.name] ?? "The camera cannot be used.";
}
