"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("list"), one = document.getElementById("one"), more = document.getElementById("more");
const form = document.querySelector("form"), places = new Map(data.ids.map((id, i) => [id, i]));
const PAGE = 20;
let shown = PAGE;

// Text is set as text, never as HTML: ids and names come from data.
function el(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const link = (query, ...inside) => el("a", {href: "#" + new URLSearchParams(query)}, ...inside);
const number = (value) => value === null || value === undefined ? "–" : String(value);
const digits = (value) => typeof value === "number" ? value.toFixed(4) : number(value);
const named = (label) => label < 0 ? "abstained"
  : data.classes && data.classes[label] !== String(label) ? `${label} ${data.classes[label]}` : String(label);
const picture = (source, words) => source ? el("img", {src: source, alt: words, loading: "lazy"}) : null;
const state = (i) => i in data.errors ? "error"
  : data.answer[i] < 0 ? "abstained" : data.answer[i] === data.label[i] ? "right" : "wrong";

function table(header, rows) {
  const head = el("tr", {}, ...header.map((text) => el("th", {scope: "col"}, text)));
  const body = rows.map((row) => el("tr", {}, ...row.map((cell, j) => el(j ? "td" : "th", {}, cell ?? ""))));
  return el("div", {className: "scroll", tabIndex: 0},
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}

// Votes: [class, count, class, count, ...], the largest first; a bar for each of the first three.
function bars(votes, draws, label) {
  if (!votes.length) return "–";
  const lines = [];
  for (let k = 0; k < Math.min(votes.length, 6); k += 2) {
    const bar = el("span", {className: votes[k] === label ? "bar right" : "bar"});
    bar.style.width = `${3 * votes[k + 1] / draws}rem`;
    lines.push(el("span", {className: "vote"}, bar, `${named(votes[k])}: ${votes[k + 1].toLocaleString("en")}`));
  }
  return el("div", {}, ...lines);
}

// More columns to the right: they fade, until one has scrolled to the end.
function fade() {
  for (const box of document.querySelectorAll(".scroll")) {
    const look = () => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 1);
    box.onscroll = look;
    look();
  }
}

function keep(i, asked) {
  const q = (asked.get("q") ?? "").trim().toLowerCase(), kind = asked.get("show") ?? "";
  if (asked.has("class") && String(data.label[i]) !== asked.get("class")) return false;
  if (q && !data.ids[i].toLowerCase().includes(q) && !named(data.label[i]).toLowerCase().includes(q)) return false;
  if (!kind) return true;
  if (kind === "routed wrong") return data.lost[i] > 0;
  if (kind.startsWith("bounded by ")) return data.bound[i] === kind.slice(11);
  return state(i) === kind;
}

function drawList(asked) {
  const found = data.ids.map((_, i) => i).filter((i) => keep(i, asked));
  const by = {radius: data.radius, lost: data.lost}[asked.get("sort")];
  if (by) found.sort((a, b) => by[b] - by[a]);
  const header = ["Example", "Label", "Answer", "Radius", "sigma", "Bounded by", "Lost to the choice of sigma"];
  const rows = found.slice(0, shown).map((i) => [
    Object.assign(link({id: data.ids[i]}, picture(data.pictures[i], ""), data.ids[i]), {className: "named"}),
    named(data.label[i]), state(i) === "wrong" ? `${named(data.answer[i])} (wrong)` : named(data.answer[i]),
    digits(data.radius[i]), number(data.sigma[i]), number(data.bound[i]), digits(data.lost[i]),
  ]);
  const count = `${found.length.toLocaleString("en")} of ${data.ids.length.toLocaleString("en")} examples`;
  list.replaceChildren(el("p", {}, asked.has("class") ? `${count}, class ${named(Number(asked.get("class")))}. ` : count,
    asked.has("class") ? link({}, "All classes") : null), table(header, rows));
  more.hidden = found.length <= shown;
  fade();
}

function routerTable(rows, label) {
  const full = rows.some((row) => row.length > 3);
  const cell = (row) => [digits(row[3]), digits(row[4]), row[8], bars(row[7], row[6], label), digits(row[5])];
  const header = ["sigma", "Router's selection votes", "Router's estimation votes"];
  return table(full ? [...header, "E: not picked within", "R: same class within", "Shown by", "Votes", "p_lower"] : header,
    rows.map((row) => [number(row[0]), number(row[1]), number(row[2]), ...(full ? cell(row) : [])]));
}

function drawOne(i) {
  const label = data.label[i], parts = [el("p", {}, link({}, "All examples"))];
  parts.push(el("h2", {}, data.ids[i]), el("p", {}, `Label ${named(label)}. ${data.said[state(i)]}`
    + (i in data.errors ? ` (${data.errors[i]})` : "")
    + (data.lost[i] > 0 ? ` Another sigma certifies it ${digits(data.lost[i])} further: routed wrong.` : "")));
  const shot = data.gallery.find((each) => each.place === i);
  parts.push(shot ? el("div", {className: "cards"}, ...copies(shot))
    : el("div", {className: "cards"}, picture(data.pictures[i], data.ids[i])));
  const rows = data.methods.flatMap((method) => method.rows[i].map((row) => [
    method.name, number(row[0]), row[1] >= 0 && row[1] !== label ? `${named(row[1])} (wrong)` : named(row[1]),
    digits(row[2]), bars(row[7], row[9], label), bars(row[6], row[8], label), digits(row[3]), row[4].toLocaleString("en"),
    row[5]]));
  parts.push(el("h3", {}, "Certificates"), table(["Method", "sigma", "Answer", "Radius", "Estimation votes",
    "Selection votes", "p_lower", "Draws", "Ended by"], rows));
  for (const method of data.methods) {
    if (!method.routers && !Object.keys(method.facts).length) continue;
    const facts = Object.entries(method.facts).map(([name, value]) =>
      `${name} ${number(Array.isArray(value) ? value[i] : value)}`);
    parts.push(el("h3", {}, method.name), el("p", {className: "facts"}, facts.join(" · ")));
    if (method.routers && method.routers[i].length) parts.push(routerTable(method.routers[i], label));
  }
  one.replaceChildren(...parts);
  fade();
}

const copies = (shot) => ["clean", "noisy", "denoised"].filter((kind) => shot[kind]).map((kind) =>
  el("figure", {}, picture(shot[kind], `${data.ids[shot.place]}, ${kind}`), el("figcaption", {}, kind)));

function draw() {
  const asked = new URLSearchParams(location.hash.slice(1)), place = places.get(asked.get("id"));
  one.hidden = place === undefined;
  document.getElementById("all").hidden = !one.hidden;
  if (place !== undefined) { drawOne(place); scrollTo(0, 0); return; }
  for (const field of form.elements) if (field.name) field.value = asked.get(field.name) ?? "";
  drawList(asked);
}

const box = document.getElementById("gallery");
for (const shot of data.gallery) {
  const words = el("p", {}, `${shot.why}: `, link({id: data.ids[shot.place]}, data.ids[shot.place]));
  const images = Object.assign(link({id: data.ids[shot.place]}, ...copies(shot)), {className: "cards"});
  box.append(el("div", {}, words, images));
}
document.querySelectorAll("#classes tbody th").forEach((cell, k) =>
  cell.replaceChildren(link({class: data.shownClasses[k]}, cell.textContent)));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => {
  shown = PAGE;
  const old = new URLSearchParams(location.hash.slice(1)), now = new URLSearchParams();
  if (old.has("class")) now.set("class", old.get("class"));
  for (const field of form.elements) if (field.name && field.value) now.set(field.name, field.value);
  history.replaceState(null, "", "#" + now);
  drawList(now);
});
more.addEventListener("click", () => { shown += PAGE; draw(); });
addEventListener("resize", fade);
addEventListener("hashchange", () => { shown = PAGE; draw(); });
draw();
