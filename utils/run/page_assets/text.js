"use strict";
// Elements and texts. Whatever comes from a run gets onto the page as text and never as HTML, and
// characters that would hide or reorder it are written as escapes.

const HIDDEN = new RegExp(
  "[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f" +
    "\\ufeff\\ufff9-\\ufffb\\ud800-\\udfff\\u{e0000}-\\u{e007f}]",
  "gu",
);

const byId = (id) => document.getElementById(id);

// An element with properties (class, text, on..., style: an object, or attributes) and children.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") showText(element, String(value));
    else if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function escaped(character) {
  const code = character.codePointAt(0);
  if (code < 256) return `\\x${code.toString(16).padStart(2, "0")}`;
  if (code < 65536) return `\\u${code.toString(16).padStart(4, "0")}`;
  return `\\u{${code.toString(16)}}`;
}

// Append `text` so that everything in it can be seen.
function showText(parent, text) {
  let done = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > done) parent.append(text.slice(done, match.index));
    const escape = document.createElement("span");
    escape.className = "escape";
    escape.textContent = escaped(match[0]);
    parent.append(escape);
    done = match.index + match[0].length;
  }
  if (done < text.length) parent.append(text.slice(done));
  return parent;
}

// The same as a string, for labels and drop-down lists.
const plain = (text) => String(text).replace(HIDDEN, escaped);

// Append `text` cut at the edges of `ranges` ({from, to, class, tip}), which may overlap.
// What a row of a list shows of a text; none where the page does not have it.
function showSnippet(parent, words) {
  if (words === null) parent.append(make("i", { text: "text not in this page" }));
  else showText(parent, String(words).replace(/\s+/g, " ").slice(0, 160));
}

const listRow = (facts, text) =>
  make("div", { class: "row" }, make("span", { class: "facts" }, ...facts), text);

function showRanges(parent, text, ranges) {
  const edges = new Set([0, text.length]);
  for (const { from, to } of ranges) edges.add(from).add(to);
  const cuts = [...edges].filter((edge) => edge >= 0 && edge <= text.length).sort((a, b) => a - b);
  const begins = [...ranges].sort((a, b) => a.from - b.from);
  let open = [];
  let next = 0;
  for (let i = 0; i + 1 < cuts.length; i++) {
    const at = cuts[i];
    while (next < begins.length && begins[next].from <= at) open.push(begins[next++]);
    open = open.filter((range) => range.to > at);
    const piece = text.slice(at, cuts[i + 1]);
    if (!open.length) {
      showText(parent, piece);
      continue;
    }
    const mark = open.some((range) => range.mark);
    const part = make(mark ? "mark" : "span", {
      class: open.map((range) => range.class).join(" "),
    });
    const tip = open.find((range) => range.tip);
    if (tip) part.dataset.tip = tip.tip;
    parent.append(showText(part, piece));
  }
  return parent;
}

// Numbers as a person reads them.

function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(digits - 1);
  return Number(
    value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size + 1)))),
  ).toLocaleString("en", { maximumFractionDigits: 6 });
}

const signed = (value) => (value > 0 ? `+${figure(value)}` : figure(value).replace("-", "−"));
const percent = (share, digits = 1) =>
  share === null || Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)}%`;
const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

function duration(seconds) {
  if (!(seconds >= 0)) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

// For a screen reader.
function announce(text) {
  byId("said").textContent = plain(text);
}

// A list of any length, of which only the rows in view exist. `row(i)` makes one; `chosen(i, how)` is
// told of a choice: by "click", by "arrow", or by "enter", which asks for what was chosen already.
class VirtualList {
  constructor(label, height, row, chosen) {
    Object.assign(this, { height, row, chosen, count: 0, active: -1, rows: new Map() });
    this.space = make("div", { class: "space" });
    this.element = make(
      "div",
      { class: "list", role: "listbox", tabindex: "0", "aria-label": label },
      this.space,
    );
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    this.element.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  // Show `count` rows anew, with `active` chosen (and told to nobody).
  reset(count, active = -1) {
    this.count = count;
    this.active = active;
    this.space.style.height = `${count * this.height}px`;
    this.space.replaceChildren();
    this.rows.clear();
    this.draw();
  }

  draw() {
    const view = this.element.clientHeight;
    if (!view) return;
    const first = Math.max(0, Math.floor(this.element.scrollTop / this.height) - 6);
    const last = Math.min(this.count, first + Math.ceil(view / this.height) + 12);
    for (const [i, element] of this.rows) {
      if (i >= first && i < last) continue;
      element.remove();
      this.rows.delete(i);
    }
    for (let i = first; i < last; i++) {
      if (this.rows.has(i)) continue;
      const element = this.row(i);
      element.setAttribute("role", "option");
      element.setAttribute("aria-setsize", this.count);
      element.setAttribute("aria-posinset", i + 1);
      element.setAttribute("aria-selected", i === this.active);
      element.id = `row-${(VirtualList.made = (VirtualList.made || 0) + 1)}`;
      element.style.transform = `translateY(${i * this.height}px)`;
      element.style.height = `${this.height}px`;
      element.addEventListener("click", () => this.choose(i, "click"));
      this.rows.set(i, element);
      this.space.append(element);
    }
  }

  choose(i, how = "") {
    if (i < 0 || i >= this.count) return;
    this.active = i;
    const box = this.element;
    const top = i * this.height;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + this.height > box.scrollTop + box.clientHeight)
      box.scrollTop = top + this.height - box.clientHeight;
    this.draw();
    for (const [n, element] of this.rows) element.setAttribute("aria-selected", n === i);
    const row = this.rows.get(i);
    if (row) box.setAttribute("aria-activedescendant", row.id);
    this.chosen(i, how);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.element.clientHeight / this.height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    let target = null;
    if (event.key in steps) target = this.active + steps[event.key];
    else if (event.key === "Home") target = 0;
    else if (event.key === "End") target = this.count - 1;
    else if (event.key === "Enter" && this.active >= 0) this.chosen(this.active, "enter");
    if (target === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(target, 0), this.count - 1), "arrow");
  }
}

// Bring what was chosen in a list into view. Where there is room beside the list, it keeps the
// keyboard; where the detail is below it, a click goes there, and Escape or a button back. Enter goes
// there on every screen.
function reveal(list, box, how) {
  if (!how) return;
  const card = box.querySelector(".card.chosen") ?? box;
  const below = box.getBoundingClientRect().top >= list.element.getBoundingClientRect().bottom - 1;
  const back = () => {
    list.element.scrollIntoView({ block: "center" });
    list.element.focus({ preventScroll: true });
  };
  box.onkeydown = (event) => {
    if (event.key === "Escape") back();
  };
  box.querySelector(".back")?.remove();
  if (below) {
    box.prepend(
      make("button", { type: "button", class: "back", text: "‹ Back to the list", onclick: back }),
    );
  }
  const { top } = box.getBoundingClientRect();
  const scroll = () => {
    if (below || (top < 0 && card === box)) card.scrollIntoView({ block: "start" });
    else if (card !== box) card.scrollIntoView({ block: "nearest" });
  };
  scroll();
  requestAnimationFrame(scroll); // what is drawn only now may have moved it
  if (how === "arrow" || (how === "click" && !below)) return;
  card.tabIndex = -1;
  card.focus({ preventScroll: true });
}

// A field that filters what is below it while a person types, and when it is cleared.
function searchField(properties, value, changed) {
  const field = make("input", { type: "search", ...properties });
  field.value = value;
  let timer = 0;
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => changed(field.value), field.value ? 200 : 0);
  });
  return field;
}

// A labelled drop-down list; `options` are [value, text].
function select(label, options, value, changed) {
  const list = make("select", { "aria-label": plain(label), onchange: () => changed(list.value) });
  for (const [own, text] of options) {
    list.append(make("option", { value: String(own), text: plain(text) }));
  }
  list.value = String(value);
  return make("label", { class: "field" }, make("span", { text: label }), list);
}

// A row of buttons of which one is pressed.
function choice(label, options, value, changed) {
  const box = make("div", { class: "choice", role: "radiogroup", "aria-label": label });
  for (const [own, text] of options) {
    const button = make("button", {
      type: "button",
      role: "radio",
      text,
      "aria-checked": String(own === value),
      "data-value": String(own),
      onclick: () => {
        for (const other of box.children) other.setAttribute("aria-checked", other === button);
        changed(own);
      },
    });
    box.append(button);
  }
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = [...box.children].indexOf(document.activeElement);
    const other = box.children[(at + step + box.children.length) % box.children.length];
    other.focus();
    other.click();
    event.preventDefault();
  });
  return box;
}
