"use strict";
// The feature browser. Each layer lies in the page as base64 of gzip of JSON (harness/report.py);
// the address says what is shown: #/run/layer or #/run/layer/feature.

const $ = (id) => document.getElementById(id);
const browser = $("browser");
const layers = [...document.querySelectorAll("script.layer")].map((element) => (
  { element, run: element.dataset.run, layer: element.dataset.layer }));
const DENSE = Number(browser.dataset.dense);
let current = null; // the layer shown, unpacked
let shown = []; // its features that are listed, in order
let at = -1; // place in `shown` of the row that the keys are on
let opened = null; // the feature in view
let seed = 1; // of the random order

function make(tag, attributes = {}, ...children) {
  const svg = /^(svg|rect|line|text)$/.test(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- numbers and tokens as text ----------------------------------------------------------------

const count = (n) => n.toLocaleString("en");
const short = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
const percent = (part) => `${short(100 * part)}%`;
const signed = (value) => (value > 0 ? "+" : "") + value.toPrecision(3).replace("-", "−");
const GLYPHS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };

// A token whose spaces and line ends can be seen; over four alike are one with their number.
function token(text, tag = "span") {
  const parts = text === "" ? [] : text.match(/ +|\n+|\t+|\r+|[^ \n\t\r]+/g);
  return make(tag, { class: "token" }, ...parts.map((part) => {
    const glyph = GLYPHS[part[0]];
    if (!glyph) return part;
    const shownAs = part.length > 4 ? `${glyph}×${part.length}` : glyph.repeat(part.length);
    return make("span", { class: "space" }, shownAs);
  }), text === "" ? make("span", { class: "space" }, "∅") : "");
}

// What a feature's strongest contexts have at their peak; of a dead one there is none.
function gist(feature) {
  const peaks = feature.contexts.map((context) => context.tokens[context.at]);
  const few = [...new Set(peaks)].slice(0, 3).map((index) => token(current.tokens[index]));
  return few.flatMap((each, i) => (i ? [" ", each] : [each]));
}

function flags(feature) {
  const name = feature.density === 0 ? "dead" : feature.density > DENSE ? "dense" : "";
  return name ? [make("span", { class: "flag" }, name)] : [];
}

// ---- what is listed -----------------------------------------------------------------------------

function random(start) { // mulberry32: the same order for the same seed in every browser
  let state = start;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// The weight by which a feature tells a class, or of them all the largest; 0 where it tells none.
function weight(feature, name) {
  const own = feature.probe.filter(([c]) => name === "largest" || String(c) === name);
  return own.reduce((most, [, value]) => (Math.abs(value) > Math.abs(most) ? value : most), 0);
}

function matcher(query) {
  if (query === "") return () => true;
  if (/^\d+$/.test(query)) return (feature) => String(feature.id).startsWith(query);
  const whole = /^"(.+)"$/.exec(query);
  const wanted = (text) => (whole ? text === whole[1].replaceAll("\\n", "\n")
    : text.toLowerCase().includes(query.toLowerCase()));
  const hits = new Set(current.tokens.flatMap((text, index) => (wanted(text) ? [index] : [])));
  const where = $("where").value;
  const active = (context, index, i) => hits.has(index) && (where === "any" || context.acts[i] > 0);
  return (feature) => (where !== "raises" && feature.contexts.some(
    (context) => context.tokens.some((index, i) => active(context, index, i))))
    || (where !== "active" && feature.raises.some(([index]) => hits.has(index)));
}

const KINDS = {
  all: () => true, dead: (feature) => feature.density === 0,
  alive: (feature) => feature.density > 0, dense: (feature) => feature.density > DENSE,
};

function order(features) {
  const [by, name] = $("sort").value.split(":");
  const draw = random(seed);
  const keys = {
    number: (feature) => feature.id, random: () => draw(), max: (feature) => -feature.max,
    dense: (feature) => -feature.density, probe: (feature) => -Math.abs(weight(feature, name)),
    rare: (feature) => (feature.density > 0 ? feature.density : 2), // the dead last
  };
  const keyed = features.map((feature) => [keys[by](feature), feature]);
  return keyed.sort((a, b) => a[0] - b[0] || a[1].id - b[1].id).map(([, feature]) => feature);
}

function row(feature, place) {
  const [by, name] = $("sort").value.split(":");
  const figure = by === "max" ? `max ${short(feature.max)}`
    : by === "probe" ? signed(weight(feature, name)) : percent(feature.density);
  return make("div", { role: "option", id: `row-${feature.id}`, "data-place": place,
    "aria-selected": "false" }, make("span", {}, String(feature.id)),
  make("b", {}, ...gist(feature)), make("span", {}, ...flags(feature), " ", figure));
}

function list() {
  const drawn = order(current.features); // before the filters: a search keeps the random order
  shown = drawn.filter(KINDS[$("kind").value]).filter(matcher($("query").value));
  $("list").replaceChildren(...shown.map(row));
  const held = current.features.length;
  const where = `features/layer_${current.layer}.json.gz`;
  $("count").textContent = `${count(shown.length)} of ${count(held)} features`
    + ($("sort").value === "random" ? `, random order ${seed}` : "")
    + (held < current.n ? `. This page holds ${count(held)} of the layer’s ${count(current.n)}: `
      + "dense ones, those that tell a class most, and others drawn at random. "
      + `All are in ${where} of ${$("run").value}.` : "");
  at = -1;
  mark();
}

// Shows in the list which feature is open, and which row the keys are on.
function mark(place = opened === null ? at : shown.findIndex(({ id }) => id === opened)) {
  for (const old of $("list").querySelectorAll(".active, .open")) {
    old.classList.remove("active", "open");
    old.setAttribute("aria-selected", "false");
  }
  const open = document.getElementById(`row-${opened}`);
  if (open) open.classList.add("open");
  if (open) open.setAttribute("aria-selected", "true");
  at = place;
  const box = $("list"); // this scrolls the list, never the page
  const active = box.children[at];
  if (!active) return box.removeAttribute("aria-activedescendant");
  active.classList.add("active");
  box.setAttribute("aria-activedescendant", active.id);
  const from = box.getBoundingClientRect().top + box.clientTop - box.scrollTop;
  const top = active.getBoundingClientRect().top - from;
  if (top < box.scrollTop) box.scrollTop = top;
  const bottom = top + active.offsetHeight - box.clientHeight;
  if (bottom > box.scrollTop) box.scrollTop = bottom;
}

// ---- what is in view ----------------------------------------------------------------------------

// Bars side by side; ticks are [place in bars, text], here is the place of a line.
function bars(counts, ticks, name, { here = null, kind = () => "" } = {}) {
  const [width, height, most] = [460, 110, Math.max(...counts, 1)];
  const x = (place) => (place * width) / counts.length;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height + 22}`, role: "img",
    "aria-label": name });
  counts.forEach((n, i) => n && svg.append(make("rect", {
    x: x(i) + 0.5, width: x(1) - 1, y: height - (n / most) * height, height: (n / most) * height,
    class: kind(i) })));
  svg.append(make("line", { x1: 0, x2: width, y1: height, y2: height }));
  const line = { x1: x(here), x2: x(here), y1: 0, y2: height, class: "here" };
  if (here !== null) svg.append(make("line", line));
  for (const [place, text] of ticks) {
    const anchor = place <= 0 ? "start" : place >= counts.length ? "end" : "middle";
    svg.append(make("text", { x: x(place), y: height + 16, "text-anchor": anchor }, text));
  }
  return svg;
}

function densities(feature = null) {
  const { low, counts } = current.densities;
  const decades = Array.from({ length: 1 - low }, (_, i) => low + i);
  const ticks = decades.map((power) => [4 * (power - low), percent(10 ** power)]);
  const here = feature && feature.density > 0 ? 4 * (Math.log10(feature.density) - low) : null;
  return [make("h4", {}, "Densities of the layer’s features"),
    bars(counts, ticks, `Histogram of the densities of ${count(current.n)} features`,
      { here, kind: (i) => (10 ** (i / 4 + low) >= 0.999 * DENSE ? "dense" : "") }),
    make("p", { class: "keys" }, `number of features; tallest bar: ${count(Math.max(...counts))}; `
      + `${count(current.n_dead)} dead, ${count(current.n_dense)} dense`
      + (here === null ? "" : "; line: this feature"))];
}

function activations(feature) {
  const { edges } = current;
  const places = [0, 1, 2, 3].map((i) => Math.round((i * feature.histogram.length) / 3));
  return [make("h4", {}, "Activations, where active"),
    bars(feature.histogram, places.map((i) => [i, short(edges[i])]),
      `Histogram of activations from ${short(edges[0])} to ${short(edges.at(-1))}`),
    make("p", { class: "keys" }, "number of tokens by activation, on a log axis; tallest bar: "
      + count(Math.max(...feature.histogram)))];
}

// Lines of [what, value] with a bar for the value.
function ranking(title, lines) {
  const most = Math.max(...lines.map(([, value]) => Math.abs(value)));
  return make("div", {}, make("h4", {}, title), make("table", { class: "rank" }, ...lines.map(
    ([what, value]) => {
      const bar = make("i", value < 0 ? { class: "minus" } : {});
      bar.style.width = `${(60 * Math.abs(value)) / most}%`;
      return make("tr", {}, make("td", {}, ...what),
        make("td", {}, make("span", { class: "amount" }, bar, signed(value))));
    })));
}

function context(feature, { tokens, acts, at: peak }) {
  const line = make("div", { class: "context", tabindex: 0, role: "group",
    "aria-label": `context, largest activation ${short(acts[peak])}` });
  tokens.forEach((index, i) => {
    const piece = token(current.tokens[index], acts[i] > 0 ? "mark" : "span");
    if (acts[i] > 0) {
      piece.tabIndex = -1;
      piece.dataset.value = short(acts[i]);
      piece.style.backgroundColor = `rgba(var(--heat), ${0.12 + (0.68 * acts[i]) / feature.max})`;
    }
    if (i === peak) piece.classList.add("peak");
    line.append(piece, make("wbr"));
  });
  return make("li", {}, make("span", {}, short(acts[peak])), line);
}

function neighbour([id, cosine]) {
  const other = current.features.find((feature) => feature.id === id);
  const what = other ? [make("a", { href: address(id) }, String(id)), " ", ...gist(other),
    ...flags(other)] : [`${id} (not in this page)`];
  return [what, cosine];
}

function feature(id) {
  const one = current.features.find((each) => each.id === id);
  const title = make("h3", { tabindex: -1 }, `Feature ${id}`);
  const back = make("button", { type: "button", class: "back" }, "Back to the list");
  back.addEventListener("click", toList);
  if (!one) {
    const why = id < current.n ? "This page doesn’t hold it: the file that is named above does."
      : `The layer has ${count(current.n)} features, from 0 on.`;
    return [back, title, make("p", {}, why)];
  }
  title.append(...flags(one));
  const facts = [[`density, of ${count(current.n_tokens)} tokens`, percent(one.density)],
    ["mean where active", short(one.mean)], ["largest activation", short(one.max)]];
  const classes = one.probe.map(([c, value]) => [[current.probed[c]], value]);
  const words = (side) => side.map(([index, value]) => [[token(current.tokens[index])], value]);
  return [back, title,
    make("p", { class: "keys" }, `${$("run").value}, ${current.hook_name} of ${current.model}, `
      + `seed ${current.seed}`),
    make("dl", { class: "facts" }, ...facts.map(([name, value]) => make("div", {},
      make("dt", {}, name), make("dd", {}, value)))),
    ...(one.density > 0 ? [make("h4", {}, "Strongest contexts"),
      make("p", { class: "keys" }, "· a space, ·×8 eight, ⏎ a line end; underlined: the strongest"),
      make("ol", { class: "contexts" }, ...one.contexts.map((each) => context(one, each)))] : [
      make("p", {}, `Never active on ${count(current.n_tokens)} tokens.`)]),
    make("div", { class: "pair" },
      ranking("Tokens whose logits it raises most", words(one.raises)),
      ranking("Tokens whose logits it lowers most", words(one.lowers))),
    ...(current.lens ? [make("p", { class: "keys" }, `Through ${current.lens}.`)] : []),
    make("div", { class: "pair" },
      make("div", {}, ...(one.density > 0 ? activations(one) : [])),
      make("div", {}, ...densities(one))),
    make("div", { class: "pair" },
      ...(classes.length ? [ranking("Classes it tells, by the difference of mean activations",
        classes)] : []),
      ranking("Nearest features, by the cosine of decoder rows", one.nearest.map(neighbour)))];
}

function overview() {
  return [make("h3", { tabindex: -1 }, `${$("run").value}, layer ${current.layer}`),
    make("p", {}, `${count(current.n)} features on ${current.hook_name} of ${current.model}, seed `
      + `${current.seed}, read on ${count(current.n_tokens)} tokens.`), ...densities(),
    make("p", {}, "Choose a feature in the list.")];
}

// ---- address, and what the user does ------------------------------------------------------------

function address(id = null) {
  const parts = [$("run").value, $("layer").value, ...(id === null ? [] : [id])];
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

function choices(select, values, chosen, text = (value) => value) {
  select.replaceChildren(...values.map((value) => make("option", { value }, text(value))));
  select.value = chosen;
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch { // an address that was cut off
    return text;
  }
}

async function unpack({ element }) {
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// Shows what the address says; other addresses, as of the sections, change nothing.
async function route() {
  const hash = location.hash;
  if (hash && !hash.startsWith("#/") && current) return;
  const [run, layer, id] = hash.startsWith("#/") ? hash.slice(2).split("/").map(decode) : [];
  const mine = layers.filter((each) => each.run === run);
  const own = mine.length ? mine : layers.filter((each) => each.run === layers[0].run);
  const entry = own.find((each) => each.layer === layer) || own[0];
  choices($("run"), [...new Set(layers.map((each) => each.run))], entry.run);
  choices($("layer"), own.map((each) => each.layer), entry.layer);
  try {
    entry.data ??= await unpack(entry);
  } catch (error) {
    $("count").textContent = `The features can’t be unpacked (${error.message}): `
      + "a browser of 2023 or newer can.";
    return;
  }
  if (location.hash !== hash) return; // the user went on meanwhile
  opened = /^\d+$/.test(id) ? Number(id) : null;
  if (current !== entry.data) {
    current = entry.data;
    sorts();
    list();
  } else mark(); // also where no feature is open: the keys stay where they were
  $("view").replaceChildren(...(opened === null ? overview() : feature(opened)));
  const [panes, title] = [browser.querySelector(".panes"), $("view").querySelector("h3")];
  document.title = `${title.firstChild.data} · ${entry.run}, layer ${entry.layer}`;
  panes.classList.toggle("opened", opened !== null);
  if (opened !== null) title.focus({ preventScroll: true });
  if (hash.startsWith("#/")) panes.scrollIntoView();
}

function sorts() {
  const chosen = $("sort").value;
  const classes = current.probed.map((name, i) => make("option", { value: `probe:${i}` }, name));
  const groups = classes.length ? [make("optgroup", { label: "by how much it tells" },
    make("option", { value: "probe:largest" }, "any class"), ...classes)] : [];
  const orders = { number: "number", dense: "density, highest first",
    rare: "density, lowest first", max: "largest activation", random: "random order" };
  $("sort").replaceChildren(...Object.entries(orders).map(
    ([value, text]) => make("option", { value }, text)), ...groups);
  $("sort").value = chosen;
  if (!$("sort").value) $("sort").value = "number";
}

function openAt(place) {
  if (shown[place]) location.hash = address(shown[place].id);
}

const within = (place) => Math.max(0, Math.min(shown.length - 1, place));

function toList() {
  location.hash = address();
  $("list").focus({ preventScroll: true });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { target, key } = event;
  const typing = target.matches("input, select");
  const listed = target === $("list");
  const step = { j: 1, k: -1, ...(listed && { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10,
    Home: -Infinity, End: Infinity }) }[key];
  const marks = [...(target.closest(".context")?.querySelectorAll("mark") ?? [])];
  if (key === "/" && !typing) $("query").focus();
  else if (target === $("query") && ["Enter", "ArrowDown", "Escape"].includes(key)) {
    if (key === "Escape" && $("query").value) $("query").value = "", list();
    else $("list").focus(), mark(Math.max(0, at));
  } else if (typing) return;
  else if (key === "Escape" && opened !== null) toList();
  else if (step && opened !== null && !listed) openAt(within(at + step));
  else if (step) $("list").focus(), mark(within(at + step));
  else if (listed && key === "Enter") openAt(at);
  else if (marks.length && (key === "ArrowRight" || key === "ArrowLeft")) {
    const next = key === "ArrowRight" ? 1 : target.matches("mark") ? -1 : 0;
    marks.at((marks.indexOf(target) + next) % marks.length).focus();
  } else return;
  event.preventDefault();
}

if (layers.length) {
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("run").addEventListener("change", () => {
    $("layer").value = "";
    location.hash = `#/${encodeURIComponent($("run").value)}`;
  });
  $("layer").addEventListener("change", () => { location.hash = address(); });
  for (const id of ["kind", "sort", "where"]) $(id).addEventListener("change", list);
  $("query").addEventListener("input", list);
  $("shuffle").addEventListener("click", () => {
    seed += $("sort").value === "random" ? 1 : 0;
    $("sort").value = "random";
    list();
  });
  $("list").addEventListener("click", (event) => {
    const chosen = event.target.closest("[role=option]");
    if (chosen) openAt(Number(chosen.dataset.place));
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", route);
  route();
}
