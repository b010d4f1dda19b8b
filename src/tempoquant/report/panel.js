// One model's place in the players: its video, the canvas over it, its name and scores.

/** A new element with text and attributes; text never becomes markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key === "text") made.textContent = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Class of a model's colour: m0 is the reference, then m1 … m8 and over again. */
function colourClass(index) {
  return index === 0 ? "m0" : `m${((index - 1) % 8) + 1}`;
}

/** An object URL for an embedded video, or the path of one beside the page. */
function sourceOf(place) {
  if (place.file) return place.file;
  const text = document.getElementById(place.element).textContent;
  // fromBase64 is many times faster, and not in every browser of the last years.
  const bytes = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
}

const TINY_WIDTH = 200; // narrower videos are enlarged pixel by pixel

/** One model's video, the canvas over it, and its scores. `frame`: the frame it presented last. */
class Panel {
  constructor(players, label, index) {
    Object.assign(this, { players, label, index, frame: -1, video: null });
    const { item, data } = players;
    const place = item.videos[label];
    this.screen = element("div", { class: "screen" });
    const name = element("span", { class: `model ${colourClass(index)}` }, element("span", { class: "dot", "aria-hidden": "true" }), label);
    const caption = element("figcaption", {}, name);
    this.figure = element("figure", { class: colourClass(index), "data-label": label }, caption, this.screen, players.texts.scores(item, label));
    this.setShape(data.width && data.height ? data.width / data.height : 16 / 9);
    if (!place) {
      const why = item.failed[label];
      this.screen.append(element("p", { class: "missing", text: why ? `failed: ${why}` : "no video" }));
      this.ready = Promise.resolve();
      return;
    }
    this.open(place);
  }

  open(place) {
    const source = sourceOf(place);
    this.url = source.startsWith("blob:") ? source : null;
    this.video = element("video", { muted: true, playsinline: true, preload: "auto", "aria-label": `${this.label}, ${this.players.item.id}` });
    this.video.muted = true;
    this.canvas = element("canvas", { hidden: true, "aria-hidden": "true" });
    this.context = this.canvas.getContext("2d");
    this.left = element("span", { class: "side left-side", text: this.players.data.labels[0], hidden: true });
    this.right = element("span", { class: "side right-side", text: this.label, hidden: true });
    this.screen.append(this.video, this.canvas, this.left, this.right);
    this.ready = new Promise((resolve) => {
      this.video.addEventListener("loadeddata", () => { this.sized(); resolve(); }, { once: true });
      this.video.addEventListener("error", () => { this.broken(); resolve(); }, { once: true });
    });
    this.video.addEventListener("ended", () => this === this.players.shown[0] && this.players.again());
    this.watch();
    this.wipeByPointer();
    this.video.src = source;
  }

  broken() {
    this.screen.append(element("p", { class: "missing", text: "This browser cannot play the video, or the file beside the page is gone." }));
    this.video = null;
  }

  sized() {
    this.canvas.width = this.video.videoWidth;
    this.canvas.height = this.video.videoHeight;
    this.setShape(this.video.videoWidth / this.video.videoHeight);
    this.screen.classList.toggle("tiny", this.video.videoWidth < TINY_WIDTH);
  }

  setShape(ratio) {
    this.screen.style.aspectRatio = String(ratio);
    this.screen.style.maxWidth = `${62 * ratio}vh`; // a tall video leaves room for its controls
  }

  /** Learn of every frame that reaches the screen. */
  watch() {
    const { video, players } = this;
    if (!video.requestVideoFrameCallback) {
      video.addEventListener("timeupdate", () => this.presented(video.currentTime - 0.5 / players.data.fps));
      return;
    }
    const next = (now, { mediaTime }) => {
      if (!this.video) return;
      this.presented(mediaTime);
      video.requestVideoFrameCallback(next);
    };
    video.requestVideoFrameCallback(next);
  }

  presented(seconds) {
    this.frame = Math.round(seconds * this.players.data.fps);
    this.figure.dataset.frame = this.frame;
    this.players.lead(this);
    if (this.index === 0) this.players.paint();
    else this.paint();
  }

  seek(frame) {
    const { video } = this;
    return new Promise((resolve) => {
      const done = () => {
        video.removeEventListener("seeked", done);
        video.removeEventListener("error", done);
        this.stopSeeking = null;
        this.frame = frame;
        this.figure.dataset.frame = frame;
        resolve();
      };
      video.addEventListener("seeked", done);
      video.addEventListener("error", done);
      this.stopSeeking = done; // a video that is closed while it seeks never says so
      video.currentTime = (frame + 0.5) / this.players.data.fps;
    });
  }

  setMode(mode) {
    if (!this.video) return;
    const compared = mode !== "side" && this.index > 0 && Boolean(this.players.reference.video);
    this.canvas.hidden = !compared;
    this.left.hidden = this.right.hidden = !compared || mode !== "wipe";
    this.screen.classList.toggle("wiping", compared && mode === "wipe");
  }

  /** Draw over the video: |video − reference| made brighter, or the reference up to the wipe's edge. */
  paint() {
    const { players, canvas, context, video } = this;
    const other = players.reference?.video;
    if (!video || !other || canvas.hidden || players.reference.frame !== this.frame) return;
    const { width, height } = canvas;
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    if (players.mode === "difference") {
      context.drawImage(other, 0, 0, width, height);
      context.globalCompositeOperation = "difference";
      context.drawImage(video, 0, 0, width, height);
      canvas.style.filter = `brightness(${players.find("[data-gain]").value})`;
      return;
    }
    canvas.style.filter = "";
    const edge = Math.round((width * Number(players.find("[data-wipe]").value)) / 100);
    if (edge > 0) context.drawImage(other, 0, 0, (other.videoWidth * edge) / width, other.videoHeight, 0, 0, edge, height);
    context.fillStyle = "#fff";
    context.fillRect(edge - Math.max(1, width / 400), 0, Math.max(1, width / 200), height);
  }

  wipeByPointer() {
    const slider = this.players.find("[data-wipe]");
    const move = (event) => {
      const box = this.screen.getBoundingClientRect();
      slider.value = ((event.clientX - box.left) / box.width) * 100;
      this.players.paint();
    };
    this.screen.addEventListener("pointerdown", (event) => {
      if (!this.screen.classList.contains("wiping")) return;
      this.screen.setPointerCapture(event.pointerId);
      move(event);
    });
    this.screen.addEventListener("pointermove", (event) => this.screen.hasPointerCapture(event.pointerId) && move(event));
  }

  close() {
    const { video } = this;
    this.video = null;
    this.stopSeeking?.();
    if (video) {
      video.pause();
      video.removeAttribute("src");
      video.load();
    }
    if (this.url) URL.revokeObjectURL(this.url);
  }
}
