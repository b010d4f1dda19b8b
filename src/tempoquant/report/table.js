// The table of items: sorted by what was lost, filtered, and the way into the players.

const ROWS_AT_ONCE = 50;

/** How values are written, shared by table and players. */
class Texts {
  constructor(data) {
    this.data = data;
    this.metrics = new Map(data.metrics.map((metric) => [metric.key, metric]));
  }

  value(key, value) {
    if (value === null || value === undefined) return "–";
    const { unit, digits } = this.metrics.get(key);
    if (unit === "%") return value >= 0.5 ? "yes" : "no"; // of one video: it was followed, or not
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−")) + (unit ? ` ${unit}` : "");
  }

  /** Scores of one video, those of single timestep bins left out. */
  scores(item, label) {
    const list = element("dl", { class: "scores" });
    const measured = item.metrics[label] ?? {};
    for (const { key, title, is_part } of this.data.metrics)
      if (key in measured && !is_part)
        list.append(element("div", {}, element("dt", { text: title }), element("dd", { text: this.value(key, measured[key]) })));
    return list;
  }
}

class ItemTable {
  /** root: the section. choose: called with an item. */
  constructor(root, data, texts, choose) {
    Object.assign(this, { root, data, texts, choose, limit: ROWS_AT_ONCE, sort: { by: "loss", down: true }, current: null });
    this.find = (selector) => root.querySelector(selector);
    this.others = data.labels.slice(1);
    this.fill();
    this.find(".filters").addEventListener("submit", (event) => event.preventDefault());
    this.find(".filters").addEventListener("input", (event) => {
      this.limit = ROWS_AT_ONCE;
      if (event.target.matches("[data-metric], [data-model]")) this.sort = { by: "loss", down: true };
      this.draw();
    });
    this.find("[data-more]").addEventListener("click", () => {
      this.limit += ROWS_AT_ONCE;
      this.draw();
    });
    this.draw();
  }

  fill() {
    const options = (select, pairs) => this.find(select).replaceChildren(...pairs.map(([value, text]) => element("option", { value, text })));
    const unique = (key) => [...new Set(this.data.items.map((item) => item[key]).filter((value) => value !== null))];
    options("[data-metric]", this.data.metrics.map(({ key, title }) => [key, title]));
    if (this.data.first_metric) this.find("[data-metric]").value = this.data.first_metric;
    options("[data-model]", [["", "any model"], ...this.others.map((label) => [label, label])]);
    options("[data-category]", [["", "all"], ...unique("category").map((name) => [name, name])]);
    options("[data-seed]", [["", "all"], ...unique("seed").map((seed) => [String(seed), String(seed)])]);
    for (const name of ["category", "seed"]) this.find(`[data-${name}]`).closest("label").hidden = unique(name).length < 2;
  }

  /** What was lost by the chosen model, or by the model that lost most; a failure is more than any number. */
  loss(item) {
    const label = this.find("[data-model]").value;
    const labels = label ? [label] : this.others;
    const losses = item.losses[this.metric] ?? {};
    const each = labels.map((name) => (item.failed[name] ? Infinity : losses[name] ?? -Infinity));
    return Math.max(-Infinity, ...each);
  }

  get metric() {
    return this.find("[data-metric]").value;
  }

  /** Items that pass the filters, in the order of the table. */
  get items() {
    const [words, category, seed, show] = ["search", "category", "seed", "show"].map((name) => this.find(`[data-${name}]`).value);
    let items = this.data.items.filter(
      (item) =>
        `${item.id} ${item.prompt}`.toLowerCase().includes(words.trim().toLowerCase()) &&
        (!category || item.category === category) &&
        (!seed || String(item.seed) === seed) &&
        (show !== "failed" || Object.keys(item.failed).length) &&
        (show !== "overlap" || item.overlap),
    );
    items.sort((a, b) => compare(this.loss(b), this.loss(a)));
    if (show === "ten") items = items.slice(0, 10);
    if (show === "quarter") items = items.slice(0, Math.ceil(items.length / 4));
    if (this.sort.by !== "loss") {
      items.sort((a, b) => compare(this.sortValue(a), this.sortValue(b)));
      if (this.sort.down) items.reverse();
    } else if (!this.sort.down) items.reverse();
    return items;
  }

  sortValue(item) {
    const { by } = this.sort;
    if (by === "id") return item.id;
    return item.metrics[by.slice(1)]?.[this.metric] ?? -Infinity;
  }

  draw() {
    const items = this.items;
    const { title } = this.texts.metrics.get(this.metric) ?? { title: "nothing" };
    this.find("thead").replaceChildren(this.header(title));
    this.find("tbody").replaceChildren(...items.slice(0, this.limit).map((item) => this.row(item)));
    this.find("[data-more]").hidden = items.length <= this.limit;
    const order = this.sort.by === "loss" ? `, ${this.sort.down ? "those that lost most" : "those that lost least"} first` : "";
    this.find("[data-count]").textContent = `${items.length} of ${this.data.items.length} items by ${title}${order}`;
  }

  header(title) {
    const columns = [["id", "Item"], ["loss", `Lost, ${title}`], ...this.data.labels.map((label) => [`=${label}`, label])];
    const row = element("tr");
    for (const [by, text] of columns) {
      const sorted = this.sort.by === by;
      const button = element("button", { type: "button", text });
      button.addEventListener("click", () => {
        this.sort = { by, down: sorted ? !this.sort.down : by === "loss" };
        this.draw();
        [...this.root.querySelectorAll("thead button")].find((one) => one.textContent === text)?.focus();
      });
      const state = !sorted ? "none" : this.sort.down ? "descending" : "ascending";
      row.append(element("th", { scope: "col", "aria-sort": state }, button));
    }
    return row;
  }

  row(item) {
    const name = element("span", { class: "name", text: item.prompt });
    const where = [item.id, `seed ${item.seed}`, item.category].filter((part) => part !== null).join(" · ");
    const words = element("span", {}, name, element("span", { class: "where", text: where }));
    if (item.overlap) words.append(element("span", { class: "chip bad", text: "also in calibration" }));
    const button = element("button", { type: "button", class: "pick", "aria-label": `Show ${item.id}, seed ${item.seed}: ${item.prompt}` }, words);
    if (item.image) {
      const picture = element("img", { alt: "", src: item.image });
      picture.onload = () => picture.classList.toggle("tiny", picture.naturalWidth < TINY_WIDTH);
      button.prepend(picture);
    }
    button.addEventListener("click", () => this.choose(item, true));
    const loss = this.loss(item);
    const lost = loss === Infinity ? "failed" : loss === -Infinity ? "–" : this.lossText(loss);
    const row = element("tr", { "aria-current": item === this.current ? "true" : null }, element("td", {}, button), element("td", { text: lost }));
    for (const label of this.data.labels) row.append(this.cell(item, label, loss));
    return row;
  }

  /** Against 16-bit the loss is the value with its sign turned, which says nothing new: the worst value is shown. */
  lossText(loss) {
    const { family, unit } = this.texts.metrics.get(this.metric);
    if (family === "against 16-bit") return `to ${this.texts.value(this.metric, -loss)}`;
    if (unit === "%") return loss > 0 ? "lost" : loss < 0 ? "won" : "same";
    return this.texts.value(this.metric, loss);
  }

  cell(item, label, worst) {
    if (item.failed[label]) return element("td", {}, element("span", { class: "chip bad", text: "failed", title: item.failed[label] }));
    const loss = item.losses[this.metric]?.[label];
    const isWorst = this.others.length > 1 && loss === worst && loss !== undefined && loss !== null;
    return element("td", { class: isWorst ? "worst" : null, text: this.texts.value(this.metric, item.metrics[label]?.[this.metric]) });
  }

  setCurrent(item) {
    this.current = item;
    this.draw();
  }

  /** The item `count` places after the current one, in the order of the table. */
  neighbour(count) {
    const items = this.items;
    const place = items.indexOf(this.current);
    return items[(place + count + items.length) % items.length] ?? null;
  }
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a === b ? 0 : a < b ? -1 : 1;
}
