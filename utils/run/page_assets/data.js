"use strict";
// The runs: columns of numbers in memory, and texts in compressed chunks, decoded when shown.

const page = { runs: [], server: false, tab: "", drawn: new Set() };
const KEPT_CHUNKS = 24;
const COLOURS = [
  "#0b6fb8",
  "#d1570a",
  "#00876c",
  "#a8479b",
  "#8a6d00",
  "#c03030",
  "#5a5ad0",
  "#4d7a1f",
];

async function unpacked(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Chunks of a long page may not have been read yet.
const wholePage = new Promise((ready) => {
  if (document.readyState !== "loading") ready();
  else document.addEventListener("DOMContentLoaded", ready);
});

class Run {
  constructor(number) {
    this.number = number;
    this.colour = COLOURS[number % COLOURS.length];
    this.shown = true;
    this.chunks = new Map();
    this.clear();
  }

  // Forget all completions: a resumed run has cut what was read.
  clear() {
    this.cleared = (this.cleared ?? -1) + 1;
    this.groups = { update: [], set: [], prompt: [], size: [], chunk: [], place: [], tokens: [] };
    this.numbers = { reward: [], advantage: [], length: [], finish: [], correct: [] };
    this.rewards = {};
    this.first = [];
    this.groupOf = [];
    this.chunks.clear();
  }

  // What is known of a run; of its completions those from `since` on.
  take(facts) {
    const { completions, ...rest } = facts;
    const before = this.records ?? [];
    Object.assign(this, rest);
    const added = facts.records.map((row) => {
      const record = {};
      facts.figures.forEach((name, i) => (record[name] = row[i]));
      return record;
    });
    this.records = [...before.slice(0, facts.since), ...added];
    if (completions.since < this.groups.update.length) this.clear();
    const had = this.groupOf.length;
    for (const name of Object.keys(this.groups)) {
      for (const value of completions.groups[name]) this.groups[name].push(value);
    }
    for (const name of Object.keys(this.numbers)) {
      for (const value of completions.numbers[name]) this.numbers[name].push(value);
    }
    for (const [name, column] of Object.entries(completions.rewards)) {
      this.rewards[name] ??= new Array(had).fill(null);
      for (const value of column) this.rewards[name].push(value);
    }
    for (let group = completions.since; group < this.groups.update.length; group++) {
      this.first.push(this.groupOf.length);
      for (let i = 0; i < this.groups.size[group]; i++) this.groupOf.push(group);
    }
    this.sets = completions.sets;
    this.finishes = completions.finishes;
  }

  get count() {
    return this.groupOf.length;
  }

  get last() {
    const ends = [this.records.at(-1), this.evaluations.at(-1)].filter(Boolean);
    return Math.max(0, ...ends.map((record) => record.update));
  }

  get metric() {
    return this.settings.eval_metric || "em";
  }

  // The contents of a chunk ("text" or "tokens"); null where the page does not hold it.
  chunk(kind, number) {
    const key = `${kind}-${this.number}-${number}`;
    const found =
      this.chunks.get(key) ??
      this.decoded(key).catch((error) => {
        console.warn(`${key}: ${error.message}`); // a server that has ended, a damaged page
        this.chunks.delete(key);
        return null;
      });
    this.chunks.delete(key);
    this.chunks.set(key, found); // now the newest
    if (this.chunks.size > KEPT_CHUNKS) this.chunks.delete(this.chunks.keys().next().value);
    return found;
  }

  async decoded(key) {
    if (page.server) {
      const answer = await fetch(`chunk/${key}`);
      if (!answer.ok) return null;
      return unpacked(await answer.arrayBuffer());
    }
    if (!byId(key)) await wholePage;
    const element = byId(key);
    return element ? unpacked(bytesOf(element.textContent)) : null;
  }

  // {prompt, question, answer, completions: [{text, parsed, messages, images}]}, or null.
  async texts(group) {
    if (this.groups.chunk[group] < 0) return null;
    const chunk = await this.chunk("text", this.groups.chunk[group]);
    return chunk && chunk[this.groups.place[group]];
  }

  // For each completion {p, d, start, sizes, rest, pieces, mask}, or null; null where none is kept.
  async tokens(group) {
    if (!this.groups.tokens[group]) return null;
    const chunk = await this.chunk("tokens", this.groups.chunk[group]);
    const found = chunk && chunk[this.groups.place[group]];
    if (!found) this.groups.tokens[group] = 0; // a server tells only when it is asked
    return found;
  }

  // Every group in `set` (all: null), by number.
  *groupsOf(set = null) {
    for (let group = 0; group < this.groups.update.length; group++) {
      if (set === null || this.groups.set[group] === set) yield group;
    }
  }

  // Mean of a column over the completions of a group, without those that have none.
  mean(column, group) {
    let sum = 0;
    let count = 0;
    for (let i = this.first[group]; i < this.first[group] + this.groups.size[group]; i++) {
      if (column[i] === null || column[i] === undefined) continue;
      sum += column[i];
      count += 1;
    }
    return count ? sum / count : null;
  }

  right(group) {
    let right = 0;
    let known = 0;
    for (let i = this.first[group]; i < this.first[group] + this.groups.size[group]; i++) {
      if (this.numbers.correct[i] === 2) continue;
      right += this.numbers.correct[i];
      known += 1;
    }
    return known ? { right, known } : null;
  }

  // What a share of the run that was read when the page was written holds: "52 of 150 updates are in
  // this page"; nothing where that is all.
  missing(what) {
    const [held, all] = this.kept[what] ?? [];
    if (this.kept.whole || held === all) return "";
    return `${held.toLocaleString("en")} of ${counted(all, what.slice(0, -1))}`;
  }

  // The command that writes a page with all.
  get command() {
    const plainPath = /^[\w./@%+:,-]+$/.test(this.folder);
    const path = plainPath ? this.folder : `'${this.folder.replaceAll("'", "'\\''")}'`;
    return `uv run python utils/report.py ${path}`;
  }

  get all() {
    return this.kept.whole ? this.count : Math.max(this.kept.completions, this.count);
  }

  get countText() {
    const count = this.count.toLocaleString("en");
    return this.all > this.count ? `${count} of ${this.all.toLocaleString("en")}` : count;
  }

  // [setting, tokens] at which completions of a set are cut off.
  limit(set) {
    const name = set === "train" ? "max_new_tokens" : "eval_max_new_tokens";
    return [name, this.settings[name]];
  }

  // The highest value that a reward function gave, without its weight.
  highest(name) {
    this.highestOf ??= {};
    if (this.highestOf[name]?.count !== this.count) {
      let most = -Infinity;
      for (const value of this.rewards[name] ?? []) if (value !== null && value > most) most = value;
      this.highestOf[name] = { count: this.count, most };
    }
    return this.highestOf[name].most;
  }

  // Of a reward function in the total; the log names them in the order of the settings.
  weight(name) {
    const names = this.figures
      .filter((own) => own.startsWith("reward/"))
      .map((own) => own.slice(7));
    return (this.settings.reward_weights || [])[names.indexOf(name)] ?? 1;
  }

  // What a single function gave at most, with its weight: the longest bar.
  mostEarned() {
    if (this.mostOf === this.count) return this.most;
    this.most = 1e-9;
    for (const [name, column] of Object.entries(this.rewards)) {
      const weight = Math.abs(this.weight(name));
      for (const value of column) this.most = Math.max(this.most, weight * Math.abs(value ?? 0));
    }
    this.mostOf = this.count;
    return this.most;
  }
}

// What a view says above its lists where a page does not hold all.
function partNote(run, what) {
  const text = run.missing(what);
  return text
    ? make(
        "p",
        { class: "part warning" },
        `${text} are in this page. All of them: `,
        make("code", { text: run.command }),
      )
    : null;
}

const SET_NAMES = {
  train: "training",
  "eval test": "test questions",
  "eval train": "evaluation on training questions",
};
const setName = (name) => SET_NAMES[name] || name;

// Statistics.

// Wilson's interval of a share at 95 %.
function wilson(share, trials) {
  const z = 1.959964;
  const centre = share + (z * z) / (2 * trials);
  const half = z * Math.sqrt((share * (1 - share)) / trials + (z / (2 * trials)) ** 2);
  const scale = 1 + (z * z) / trials;
  return [Math.max(0, (centre - half) / scale), Math.min(1, (centre + half) / scale)];
}

// Two-sided exact p-value that better and worse are equally likely (McNemar's exact test).
function signTest(better, worse) {
  const total = better + worse;
  const few = Math.min(better, worse);
  let term = -total * Math.LN2; // log of C(total, i) / 2 ** total
  let sum = 0;
  for (let i = 0; i <= few; i++) {
    sum += Math.exp(term);
    term += Math.log(total - i) - Math.log(i + 1);
  }
  return Math.min(1, 2 * sum);
}

const pValue = (p) => (p < 0.0001 ? "p < 0.0001" : `p = ${p.toFixed(4)}`);

// {fixed, broken, right, wrong}: the groups [before, after] of two evaluations, by what became of
// the question, each {run, set, update}.
function paired(before, after) {
  const found = { fixed: [], broken: [], right: [], wrong: [] };
  const earlier = new Map();
  for (const group of evaluationGroups(before)) earlier.set(before.run.groups.prompt[group], group);
  for (const group of evaluationGroups(after)) {
    const other = earlier.get(after.run.groups.prompt[group]);
    if (other === undefined) continue;
    const was = before.run.numbers.correct[before.run.first[other]];
    const is = after.run.numbers.correct[after.run.first[group]];
    if (was === 2 || is === 2) continue;
    const name = was ? (is ? "right" : "broken") : is ? "fixed" : "wrong";
    found[name].push([other, group]);
  }
  return found;
}

function* evaluationGroups({ run, set, update }) {
  const at = run.sets.indexOf(set);
  for (const group of at < 0 ? [] : run.groupsOf(at)) {
    if (run.groups.update[group] === update) yield group;
  }
}

// Updates at which a set was evaluated, of which completions are kept.
function evaluated(run, set) {
  const updates = new Set();
  const at = run.sets.indexOf(set);
  if (at >= 0) for (const group of run.groupsOf(at)) updates.add(run.groups.update[group]);
  return [...updates].sort((a, b) => a - b);
}

// Names of settings that are not the same in all runs; where a run lies and what it is called is
// no difference.
function differences() {
  const names = new Set(page.runs.flatMap((run) => Object.keys(run.settings)));
  const same = (name) =>
    new Set(page.runs.map((run) => JSON.stringify(run.settings[name]))).size < 2;
  return [...names]
    .filter((name) => !["output_dir", "run_name"].includes(name) && !same(name))
    .sort();
}

const settingText = (value) =>
  value === undefined ? "–" : typeof value === "string" ? value || '""' : JSON.stringify(value);
