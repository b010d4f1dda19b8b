// Starts everything: the theme, the copy buttons, and players, table and maps of every part.

const theme = document.getElementById("theme");
const remembered = { // a page opened from disk may be refused storage: then the choice lasts as long as the page
  get: () => { try { return localStorage.getItem("tempoquant-theme") ?? ""; } catch { return ""; } },
  set: (value) => { try { localStorage.setItem("tempoquant-theme", value); } catch { /* nothing is lost but a memory */ } },
};

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.value = name;
}
setTheme(["light", "dark"].find((name) => name === remembered.get()) ?? "");
theme.addEventListener("change", () => {
  setTheme(theme.value);
  remembered.set(theme.value);
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch { // without permission the text is selected, which the keyboard's own copy takes
    getSelection().selectAllChildren(text);
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
});

for (const part of document.querySelectorAll("[data-part]")) {
  const n = part.dataset.part;
  const data = JSON.parse(document.getElementById(`data-${n}`).textContent);
  const section = (name) => document.getElementById(`${name}-${n}`);
  const texts = new Texts(data);
  const players = new Players(section("players"), data, texts);
  const choose = (item, byHand) => {
    if (!item) return;
    table.setCurrent(item);
    players.show(item);
    if (byHand) {
      section("players").scrollIntoView({ block: "start" });
      section("players").focus({ preventScroll: true });
    }
  };
  const table = new ItemTable(section("items"), data, texts, choose);
  players.walk = (count) => choose(table.neighbour(count), false);
  choose(table.items.find((item) => !Object.keys(item.failed).length) ?? table.items[0], false);
  new HeatMaps(section("maps"), data);
}
document.documentElement.dataset.ready = "true";
