// Heat maps, layer × timestep bin: a canvas each, read by pointer or with the arrow keys.

// Stops of two perceptually even scales (magma for error, cividis for clip ratios), dark to light.
const SCALES = {
  error_db: ["#000004", "#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#fcfdbf"],
  clip_ratio: ["#00224e", "#2a3f6d", "#575d6d", "#7d7c78", "#b0a46b", "#fee838"],
};
const KINDS = { error_db: ["Error", " dB", 1], clip_ratio: ["Clip ratio", "", 2] };
const CELL_HEIGHT = 22;

function colourAt(stops, share) {
  const place = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const first = Math.min(Math.floor(place), stops.length - 2);
  const channel = (stop, from) => parseInt(stops[stop].slice(from, from + 2), 16);
  const mixed = [1, 3, 5].map((from) => Math.round(channel(first, from) + (place - first) * (channel(first + 1, from) - channel(first, from))));
  return `rgb(${mixed.join(" ")})`;
}

class HeatMaps {
  constructor(root, data) {
    Object.assign(this, { root, data });
    this.grid = root.querySelector(".map-grid");
    const select = root.querySelector("[data-map-model]");
    if (!select) return;
    select.replaceChildren(...data.labels.filter((label) => data.maps[label]).map((label) => element("option", { value: label, text: label })));
    this.order = root.querySelector("[data-map-order]");
    for (const choice of [select, this.order]) choice.addEventListener("change", () => this.draw(select.value));
    new ResizeObserver(() => this.grid.clientWidth !== this.width && this.draw(select.value)).observe(this.grid);
  }

  /** One scale per kind for all models and denoisers, so that maps can be compared. */
  range(kind) {
    let [low, high] = [Infinity, -Infinity];
    for (const maps of Object.values(this.data.maps))
      for (const heat of Object.values(maps))
        for (const row of heat[kind] ?? [])
          for (const value of row) if (value !== null) [low, high] = [Math.min(low, value), Math.max(high, value)];
    return [low, high];
  }

  draw(label) {
    this.width = this.grid.clientWidth;
    const figures = [];
    for (const kind of Object.keys(KINDS))
      for (const [denoiser, heat] of Object.entries(this.data.maps[label] ?? {}))
        if (heat[kind]) figures.push(this.figure(label, denoiser, this.ordered(heat), kind));
    this.grid.replaceChildren(...figures);
  }

  figure(label, denoiser, heat, kind) {
    const [title] = KINDS[kind];
    const [numLayers, numBins] = [heat.layers.length, heat.bins.length];
    const cell = Math.max(3, Math.floor((this.width - 110) / Math.max(1, numLayers)));
    const canvas = element("canvas", {
      width: numLayers * cell, height: numBins * CELL_HEIGHT, tabindex: "0", role: "application", "aria-roledescription": "heat map",
      "aria-label": `${title} of ${label}, ${denoiser}: ${numLayers} layers, ${numBins} timestep bins. Arrow keys read the cells.`,
    });
    const state = { heat, kind, canvas, cell, range: this.range(kind), layer: 0, bin: numBins - 1 };
    this.paint(state, false);
    const bins = element("div", { class: "bins", "aria-hidden": "true" });
    bins.style.gridAutoRows = `${CELL_HEIGHT}px`;
    for (const [low, high] of heat.bins.toReversed()) bins.append(element("span", { text: `${round(low)}–${round(high)}` }));
    const read = element("p", { class: "read faint", text: "Point at a cell, or move with the arrow keys." });
    this.listen(state, read);
    const body = element("div", { class: "axis" }, bins, element("div", { class: "scroll" }, canvas, this.blocks(heat, cell)));
    return element("figure", { class: "map" }, element("figcaption", { text: `${title}, ${denoiser.replace("_", " ")}` }), body, read, this.legend(state));
  }

  /** As it is, block after block; or all blocks' layers of one kind beside each other. */
  ordered(heat) {
    if (this.order.value === "block") return heat;
    const kinds = [...new Set(heat.layers.map(kindOf))];
    const places = heat.layers.map((_, place) => place).sort((a, b) => kinds.indexOf(kindOf(heat.layers[a])) - kinds.indexOf(kindOf(heat.layers[b])));
    const pick = (values) => values && places.map((place) => values[place]);
    return { ...heat, layers: pick(heat.layers), error_db: pick(heat.error_db), clip_ratio: pick(heat.clip_ratio) };
  }

  /** Numbers of the blocks, or names of the kinds, under their first layer: as many as have room. */
  blocks(heat, cell) {
    const axis = element("div", { class: "blocks", "aria-hidden": "true" });
    const byBlock = this.order.value === "block";
    let free = 0;
    let last = null;
    heat.layers.forEach((name, layer) => {
      const group = byBlock ? blockOf(name) : kindOf(name);
      if (group === null || group === last) return;
      last = group;
      if (layer * cell < free) return;
      const text = byBlock && !axis.childElementCount ? `block ${group}` : group;
      const label = element("span", { text });
      label.style.left = `${layer * cell}px`;
      free = layer * cell + 8 * text.length + 14;
      axis.append(label);
    });
    axis.style.width = `${heat.layers.length * cell}px`;
    return axis;
  }

  paint({ heat, kind, canvas, cell, range, layer, bin }, marked) {
    const context = canvas.getContext("2d");
    const [low, high] = range;
    const numBins = heat.bins.length;
    context.clearRect(0, 0, canvas.width, canvas.height);
    heat[kind].forEach((row, x) =>
      row.forEach((value, y) => {
        if (value === null) return;
        context.fillStyle = colourAt(SCALES[kind], high > low ? (value - low) / (high - low) : 0.5);
        context.fillRect(x * cell, (numBins - 1 - y) * CELL_HEIGHT, cell, CELL_HEIGHT);
      }),
    );
    if (!marked) return;
    for (const [colour, inset] of [["#000", 0.5], ["#fff", 1.5]]) {
      context.strokeStyle = colour;
      context.strokeRect(layer * cell + inset, (numBins - 1 - bin) * CELL_HEIGHT + inset, Math.max(1, cell - 2 * inset), CELL_HEIGHT - 2 * inset);
    }
  }

  listen(state, read) {
    const { canvas, heat, cell } = state;
    const numBins = heat.bins.length;
    const tell = (aloud) => {
      this.paint(state, true);
      read.textContent = this.sentence(state);
      if (aloud) this.root.querySelector("[data-map-live]").textContent = read.textContent;
    };
    const move = (layer, bin) => {
      state.layer = Math.max(0, Math.min(heat.layers.length - 1, layer));
      state.bin = Math.max(0, Math.min(numBins - 1, bin));
    };
    canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
      move(Math.floor(offsetX / cell), numBins - 1 - Math.floor(offsetY / CELL_HEIGHT));
      tell(false);
    });
    canvas.addEventListener("focus", () => tell(true));
    canvas.addEventListener("blur", () => this.paint(state, false));
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], Home: [-Infinity, 0], End: [Infinity, 0] };
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      move(state.layer + step[0], state.bin + step[1]);
      canvas.parentElement.scrollLeft = state.layer * cell - canvas.parentElement.clientWidth / 2;
      tell(true);
    });
  }

  sentence({ heat, kind, layer, bin }) {
    const [title, unit, digits] = KINDS[kind];
    const value = heat[kind][layer][bin];
    const number = value === null ? "not measured" : value.toFixed(digits).replace("-", "−") + unit;
    return `${heat.layers[layer]}, timesteps ${heat.bins[bin].map(round).join("–")}: ${title.toLowerCase()} ${number}`;
  }

  legend({ kind, range }) {
    const [, unit, digits] = KINDS[kind];
    if (range[0] === range[1]) return element("div", { class: "scale", text: `${range[0].toFixed(digits).replace("-", "−")}${unit} everywhere` });
    const bar = element("canvas", { width: 144, height: 1, "aria-hidden": "true" });
    const context = bar.getContext("2d");
    for (let x = 0; x < 144; x++) {
      context.fillStyle = colourAt(SCALES[kind], x / 143);
      context.fillRect(x, 0, 1, 1);
    }
    const [low, high] = range.map((value) => value.toFixed(digits).replace("-", "−") + unit);
    return element("div", { class: "scale" }, element("span", { text: low }), bar, element("span", { text: high }));
  }
}

function blockOf(name) {
  return /\d+/.exec(name)?.[0] ?? null;
}

/** A layer's name without its block's number: "blocks.3.attn1.to_q" is an "attn1.to_q". */
function kindOf(name) {
  return name.replace(/^\D*\d+\./, "");
}

function round(value) {
  return String(Math.round(value));
}
