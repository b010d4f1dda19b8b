// Synchronized players: one <video> per model, one clock, and a canvas over each for difference and wipe.
// A frame is shown by seeking to its middle, (frame + 0.5) / fps, so that no rounding of a time stamp shows a neighbour.

class Players {
  /** root: the section. data: one part of the page. texts: how a metric's value is written. */
  constructor(root, data, texts) {
    Object.assign(this, { root, data, texts, panels: [], mode: "side", frame: 0, playing: false, rate: 1, target: null });
    this.find = (selector) => root.querySelector(selector);
    this.stage = this.find(".stage");
    this.scrub = this.find("[data-scrub]");
    this.walk = () => {};
    this.listen();
  }

  get lastFrame() {
    return this.data.num_frames - 1;
  }

  /** Show the videos of one item, paused at its first frame. */
  async show(item) {
    this.setPlaying(false);
    this.target = null;
    for (const panel of this.panels) panel.close();
    this.item = item;
    this.find(".prompt").textContent = item.prompt;
    const about = [item.id, `seed ${item.seed}`, item.category, item.overlap ? "also in calibration" : null];
    this.find(".about").textContent = about.filter(Boolean).join(" · ");
    const given = this.find(".given");
    given.hidden = !item.image;
    if (item.image) given.src = item.image;
    given.onload = () => given.classList.toggle("tiny", given.naturalWidth < TINY_WIDTH);
    this.panels = this.data.labels.map((label, index) => new Panel(this, label, index));
    this.stage.replaceChildren(...this.panels.map((panel) => panel.figure));
    const panels = this.panels;
    await Promise.all(panels.map((panel) => panel.ready));
    if (panels === this.panels) {
      this.setMode(this.mode);
      await this.seek(0);
    }
  }

  get shown() {
    return this.panels.filter((panel) => panel.video);
  }

  get reference() {
    return this.panels[0];
  }

  /** Bring all players to one frame. Calls that arrive while videos still seek are joined: the last one wins. */
  async seek(frame) {
    this.target = Math.min(Math.max(frame, 0), this.lastFrame);
    this.report(this.target);
    this.seeking ??= this.follow().finally(() => (this.seeking = null));
    await this.seeking;
  }

  async follow() {
    while (this.target !== null) {
      const frame = this.target;
      this.target = null;
      await Promise.all(this.shown.map((panel) => panel.seek(frame)));
      this.report(this.target ?? frame);
    }
    this.paint();
  }

  async play() {
    if (this.playing || !this.shown.length) return;
    this.setPlaying(true);
    await this.seek(this.frame >= this.lastFrame ? 0 : this.frame);
    if (!this.playing) return;
    for (const panel of this.shown) panel.video.playbackRate = this.rate;
    await Promise.all(this.shown.map((panel) => panel.video.play().catch(() => {})));
  }

  /** Stop all players on the frame that the leading one shows. */
  async pause() {
    if (!this.playing) return;
    this.setPlaying(false);
    for (const panel of this.shown) panel.video.pause();
    await this.seek(this.frame);
    this.say();
  }

  setPlaying(playing) {
    this.playing = playing;
    const button = this.find("[data-do=play]");
    button.classList.toggle("playing", playing);
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
  }

  /** The leading video showed a new frame: the others are held to it. */
  lead(panel) {
    if (!this.playing || panel !== this.shown[0]) return;
    this.report(panel.frame);
    for (const other of this.shown.slice(1)) {
      const framesAhead = (other.video.currentTime - panel.video.currentTime) * this.data.fps;
      if (Math.abs(framesAhead) > 2) other.video.currentTime = panel.video.currentTime;
      other.video.playbackRate = this.rate * (1 - Math.max(-0.2, Math.min(0.2, framesAhead * 0.2)));
    }
  }

  async again() {
    if (!this.playing) return;
    await this.seek(0);
    for (const panel of this.shown) if (this.playing) panel.video.play().catch(() => {});
  }

  step(count) {
    const from = this.target ?? this.frame;
    this.pause();
    this.seek(from + count).then(() => this.say());
  }

  report(frame) {
    this.frame = frame;
    this.scrub.value = frame;
    const words = `frame ${frame + 1} of ${this.data.num_frames}`;
    this.scrub.setAttribute("aria-valuetext", words);
    this.find("[data-readout]").textContent = words;
  }

  say() {
    if (!this.playing) this.find("[data-live]").textContent = `frame ${this.frame + 1} of ${this.data.num_frames}`;
  }

  setMode(mode) {
    this.mode = mode;
    this.find(`input[value=${mode}]`).checked = true;
    this.find(".for-difference").hidden = mode !== "difference";
    this.find(".for-wipe").hidden = mode !== "wipe";
    for (const panel of this.panels) panel.setMode(mode);
    this.paint();
  }

  paint() {
    for (const panel of this.panels) panel.paint();
  }

  listen() {
    const actions = {
      home: () => this.step(-Infinity),
      back: () => this.step(-1),
      play: () => (this.playing ? this.pause() : this.play()),
      forward: () => this.step(1),
      end: () => this.step(Infinity),
      previous: () => this.walk(-1),
      next: () => this.walk(1),
    };
    this.root.addEventListener("click", (event) => {
      const button = event.target.closest("[data-do]");
      if (button) actions[button.dataset.do]();
      else if (event.target.closest(".screen")) this.root.focus({ preventScroll: true });
    });
    this.scrub.addEventListener("input", () => {
      const frame = Number(this.scrub.value);
      this.pause();
      this.seek(frame);
    });
    this.find("[data-speed]").addEventListener("change", (event) => {
      this.rate = Number(event.target.value);
      for (const panel of this.shown) panel.video.playbackRate = this.rate;
    });
    this.find("[data-gain]").addEventListener("change", () => this.paint());
    this.find("[data-wipe]").addEventListener("input", () => this.paint());
    for (const radio of this.root.querySelectorAll(".modes input"))
      radio.addEventListener("change", () => this.setMode(radio.value));
    this.root.addEventListener("keydown", (event) => this.key(event, actions));
  }

  /** Keys work while the focus is in the section; what a button, slider or list does by itself stays its own. */
  key(event, actions) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const own = { SELECT: /./, BUTTON: /^( |Enter)$/, INPUT: /^(Arrow|Home|End|Page)/ }[event.target.tagName];
    if (own?.test(event.key)) return;
    const toggle = (mode) => this.setMode(this.mode === mode ? "side" : mode);
    const keys = {
      " ": actions.play, ArrowLeft: actions.back, ArrowRight: actions.forward, Home: actions.home, End: actions.end,
      d: () => toggle("difference"), w: () => toggle("wipe"), n: actions.next, p: actions.previous,
    };
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }
}
