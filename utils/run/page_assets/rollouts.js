"use strict";
// Every completion: a slider over updates, histograms that filter, a list, and the group of a prompt
// side by side, with what each completion earned and why.

const RIGHT = { 0: ["✗", "wrong"], 1: ["✓", "right"], 2: ["·", "not judged"] };
const BINS = 16;

const rollouts = {
  run: 0,
  set: "train",
  update: undefined, // null: all; the newest at first
  filters: {}, // reward and length: [from, to], right, finish, text
  order: "sampled",
  colour: "none",
  found: null, // completions that hold the text that is searched for
  shown: [],
  group: -1,
};

const theRun = () => page.runs[rollouts.run];

// Updates of the chosen set of which completions are kept.
function updatesOf(run) {
  return evaluated(run, rollouts.set);
}

// Whether a completion passes all filters but `except`.
function passes(run, i, except = "") {
  const { numbers } = run;
  for (const [name, wanted] of Object.entries(rollouts.filters)) {
    if (name === except) continue;
    if (name === "reward" || name === "length") {
      const value = numbers[name][i];
      if (
        wanted === "none"
          ? value !== null
          : value === null || value < wanted[0] || value > wanted[1]
      )
        return false;
    } else if (name === "right" && numbers.correct[i] !== wanted) return false;
    else if (name === "finish" && run.finishes[numbers.finish[i]] !== wanted) return false;
    else if (name === "text" && !(rollouts.found && rollouts.found.has(i))) return false;
  }
  return true;
}

// Completions of the chosen set and update.
function candidates(run) {
  const found = [];
  const set = run.sets.indexOf(rollouts.set);
  for (const group of set < 0 ? [] : run.groupsOf(set)) {
    if (rollouts.update !== null && run.groups.update[group] !== rollouts.update) continue;
    for (let i = run.first[group]; i < run.first[group] + run.groups.size[group]; i++)
      found.push(i);
  }
  return found;
}

// [{from, to, count, label}] of values: a bar for each where they are few, else ranges of one width.
function bars(values) {
  const known = values.filter((value) => value !== null);
  const distinct = [...new Set(known)].sort((a, b) => a - b);
  const made = [];
  if (distinct.length <= 12) {
    for (const value of distinct)
      made.push({ from: value, to: value, label: figure(value), count: 0 });
  } else {
    const [low, high] = [distinct[0], distinct.at(-1)];
    let width = (high - low) / BINS;
    if (distinct.every(Number.isInteger)) width = Math.max(1, Math.ceil(width));
    for (let n = 0; n < BINS && (n === 0 || low + n * width <= high); n++) {
      const from = low + n * width;
      const to = Math.min(high, from + width);
      made.push({ from, to, label: `${figure(from)} to ${figure(to)}`, count: 0 });
    }
  }
  return made;
}

const within = (bar, next, value) =>
  value >= bar.from && (next ? value < next.from : value <= bar.to);

function histogram(title, name, run, all) {
  const counted_ = all.filter((i) => passes(run, i, name));
  const made = bars(all.map((i) => run.numbers[name][i]));
  const without = counted_.filter((i) => run.numbers[name][i] === null).length;
  for (const i of counted_) {
    const value = run.numbers[name][i];
    if (value === null) continue;
    const at = made.findIndex((bar, n) => within(bar, made[n + 1], value));
    if (at >= 0) made[at].count += 1;
  }
  const most = Math.max(1, ...made.map((bar) => bar.count));
  const chosen = rollouts.filters[name];
  const box = make("div", {
    class: "bars",
    role: "group",
    "aria-label": `${title}: a bar filters`,
  });
  made.forEach((bar, n) => {
    const next = made[n + 1];
    // Up to, and without, where the next bar begins.
    const to =
      next && bar.to >= next.from ? next.from - 1e-9 * Math.max(1, Math.abs(next.from)) : bar.to;
    const pressed = Array.isArray(chosen) && bar.from >= chosen[0] && to <= chosen[1];
    const label = `${title} ${bar.label}: ${counted(bar.count, "completion")}`;
    box.append(
      make(
        "button",
        {
          type: "button",
          class: "bar",
          "aria-pressed": String(pressed),
          "aria-label": label,
          "data-tip": label,
          onclick: (event) => {
            if (event.shiftKey && Array.isArray(chosen)) {
              rollouts.filters[name] = [Math.min(chosen[0], bar.from), Math.max(chosen[1], to)];
            } else if (pressed && chosen[0] === bar.from && chosen[1] === to)
              delete rollouts.filters[name];
            else rollouts.filters[name] = [bar.from, to];
            drawFound(`[data-histogram="${name}"] .bar:nth-child(${n + 1})`);
          },
        },
        make("i", {
          style: { height: `${bar.count ? Math.max(4, (100 * bar.count) / most) : 0}%` },
        }),
      ),
    );
  });
  const ends = made.length ? [made[0].from, made.at(-1).to] : [];
  return make(
    "div",
    { class: "histogram", "data-histogram": name },
    make("b", { text: title }),
    box,
    make("div", { class: "ends muted" }, ...ends.map((end) => make("span", { text: figure(end) }))),
    without
      ? make("button", {
          type: "button",
          class: "link",
          text: `${counted(without, "completion")} without`,
          onclick: () => {
            rollouts.filters[name] = "none";
            drawFound();
          },
        })
      : null,
  );
}

function drawRollouts() {
  const run = theRun();
  const section = byId("rollouts");
  if (!page.runs.some((own) => own.count)) {
    section.replaceChildren(noCompletions());
    return;
  }
  if (!run.sets.includes(rollouts.set)) rollouts.set = run.sets[0] ?? "train";
  const updates = updatesOf(run);
  if (rollouts.update !== null && !updates.includes(rollouts.update))
    rollouts.update = updates.at(-1) ?? null;
  rollouts.list = new VirtualList("Completions", 58, completionRow, (i, how) =>
    showChosen(rollouts.shown[i]).then(() => reveal(rollouts.list, byId("group"), how)),
  );
  section.replaceChildren(
    make(
      "div",
      { class: "columns" },
      make(
        "div",
        { class: "filters" },
        ...sourceChoice(run),
        updateSlider(run, updates),
        filterFold(run),
      ),
      make(
        "div",
        { class: "found" },
        make("div", { id: "count", role: "status" }),
        rollouts.list.element,
      ),
      make("div", { id: "group", class: "group", "aria-live": "off" }),
    ),
  );
  if (rollouts.filters.text && !rollouts.found) searchText(rollouts.filters.text);
  drawFound();
}

function noCompletions() {
  if (page.reading) return make("p", { class: "empty", text: "Reading the completions …" });
  return make("p", {
    class: "empty",
    text: "No completions were kept of this run: keep_completions is none, or it is of an earlier version.",
  });
}

function sourceChoice(run) {
  const changed = (change) => (value) => {
    change(value);
    rollouts.group = -1;
    drawRollouts();
  };
  const runs = page.runs.map((own, n) => [n, own.label]);
  const sets = run.sets.map((name) => [name, setName(name)]);
  return [
    ...(runs.length > 1
      ? [
          select(
            "Run",
            runs,
            rollouts.run,
            changed(
              (value) => (
                (rollouts.run = Number(value)),
                (rollouts.found = null),
                delete rollouts.filters.text
              ),
            ),
          ),
        ]
      : []),
    ...(sets.length > 1
      ? [
          select(
            "Of",
            sets,
            rollouts.set,
            changed((value) => (rollouts.set = value)),
          ),
        ]
      : []),
  ];
}

function updateSlider(run, updates) {
  const input = make("input", {
    type: "range",
    id: "update",
    min: "0",
    max: String(Math.max(0, updates.length - 1)),
    step: "1",
    "aria-label": "Update",
  });
  const number = make("input", {
    type: "number",
    id: "update-number",
    min: String(updates[0] ?? 0),
    max: String(updates.at(-1) ?? 0),
    "aria-label": "Number of the update",
  });
  const text = make("output", {});
  const last = Math.max(updates.at(-1) ?? 0, run.kept.whole ? 0 : run.last);
  const all = make("input", { type: "checkbox", id: "all-updates" });
  const show = () => {
    const at = rollouts.update === null ? updates.length - 1 : updates.indexOf(rollouts.update);
    input.value = String(at);
    all.checked = rollouts.update === null;
    number.value = rollouts.update === null ? "" : String(rollouts.update);
    text.textContent =
      rollouts.update === null
        ? `all ${counted(updates.length, "update")}`
        : `of ${last.toLocaleString("en")}`;
    input.setAttribute(
      "aria-valuetext",
      rollouts.update === null ? text.textContent : `update ${rollouts.update}`,
    );
  };
  const go = (update) => {
    rollouts.update = update;
    show();
    drawFound();
  };
  const step = (by) => {
    const at =
      rollouts.update === null ? updates.length - 1 : updates.indexOf(rollouts.update) + by;
    go(updates[Math.min(Math.max(at, 0), updates.length - 1)] ?? null);
  };
  input.addEventListener("input", () => go(updates[Number(input.value)] ?? null));
  // The nearest one that is here.
  number.addEventListener("change", () => {
    const wanted = Number(number.value);
    const apart = (update) => Math.abs(update - wanted);
    if (number.value !== "" && updates.length)
      go(updates.reduce((best, update) => (apart(update) < apart(best) ? update : best)));
    else show();
  });
  all.addEventListener("change", () => go(all.checked ? null : updates.at(-1)));
  show();
  return make(
    "div",
    { class: "slider" },
    make("div", { class: "line" }, make("b", { text: "Update" }), number, text),
    make(
      "div",
      { class: "line" },
      make("button", {
        type: "button",
        text: "‹",
        "aria-label": "Previous update",
        onclick: () => step(-1),
      }),
      input,
      make("button", {
        type: "button",
        text: "›",
        "aria-label": "Next update",
        onclick: () => step(1),
      }),
    ),
    make("label", { class: "field" }, all, make("span", { text: "All updates" })),
    partNote(run, rollouts.set === "train" ? "updates" : "evaluations"),
  );
}

// On a narrow screen the filters are folded, so that the list is seen.
function filterFold(run) {
  rollouts.unfolded ??= matchMedia("(min-width: 42rem)").matches;
  const fold = make(
    "details",
    { class: "fold", open: rollouts.unfolded },
    make("summary", { text: "Search, filters, order" }),
    ...filterFields(run).filter(Boolean),
    make("div", { id: "histograms" }),
  );
  fold.addEventListener("toggle", () => (rollouts.unfolded = fold.open));
  return fold;
}

function filterFields(run) {
  const search = searchField(
    { id: "search", placeholder: "in all texts", "aria-label": "Search text" },
    rollouts.filters.text ?? "",
    searchText,
  );
  const filter = (name, value) => {
    if (value === "") delete rollouts.filters[name];
    else rollouts.filters[name] = name === "right" ? Number(value) : value;
    drawFound();
  };
  const judged = run.numbers.correct.some((value) => value !== 2);
  const orders = [
    ["sampled", "as sampled"],
    ["reward", "reward, highest first"],
    ["worst", "reward, lowest first"],
    ["advantage", "advantage, highest first"],
    ["length", "length, longest first"],
  ];
  return [
    make("label", { class: "field wide" }, make("span", { text: "Search" }), search),
    judged
      ? select(
          "Answer",
          [
            ["", "any"],
            [1, "right"],
            [0, "wrong"],
            [2, "not judged"],
          ],
          rollouts.filters.right ?? "",
          (value) => filter("right", value),
        )
      : null,
    select(
      "Ending",
      [["", "any"], ...run.finishes.map((name) => [name, finishName(run, name)])],
      rollouts.filters.finish ?? "",
      (value) => filter("finish", value),
    ),
    limitNote(run),
    select("Sorted by", orders, rollouts.order, (value) => {
      rollouts.order = value;
      drawFound();
    }),
  ];
}

function finishName(run, name, set = rollouts.set) {
  const [, limit] = run.limit(set);
  if (name === "length") return limit ? `cut off at ${counted(limit, "token")}` : "cut off";
  return name === "stop" ? "by itself" : name;
}

function limitNote(run) {
  const [name, limit] = run.limit(rollouts.set);
  return limit && run.finishes.includes("length")
    ? make("p", { class: "muted note" }, "The limit is ", make("code", { text: `${name} = ${limit}` }))
    : null;
}

// Look through the texts of the run, chunk by chunk, and show what is found meanwhile.
async function searchText(text) {
  const run = theRun();
  const mine = (rollouts.searching = {});
  const wanted = text.toLowerCase();
  if (!wanted) {
    rollouts.found = null;
    delete rollouts.filters.text;
    drawFound();
    return;
  }
  rollouts.filters.text = text;
  rollouts.found = new Set();
  rollouts.looked = 0;
  let drawnAt = performance.now();
  const total = run.groups.update.length;
  for (let group = 0; group < total; group++) {
    const texts = await run.texts(group);
    if (rollouts.searching !== mine) return;
    if (texts) {
      const asked = `${texts.question}`.toLowerCase().includes(wanted);
      texts.completions.forEach((own, i) => {
        if (asked || own.text.toLowerCase().includes(wanted))
          rollouts.found.add(run.first[group] + i);
      });
    }
    rollouts.looked = (group + 1) / total;
    if (performance.now() - drawnAt > 300) {
      drawFound();
      drawnAt = performance.now();
    }
  }
  rollouts.looked = 1;
  drawFound();
}

// Everything that depends on slider and filters. `focus`: what had the keyboard and is made anew.
function drawFound(focus = "") {
  const run = theRun();
  const all = candidates(run);
  const { numbers } = run;
  rollouts.shown = all.filter((i) => passes(run, i));
  const none = -Infinity;
  const keys = {
    reward: (i) => numbers.reward[i] ?? none,
    worst: (i) => -(numbers.reward[i] ?? Infinity),
    advantage: (i) => numbers.advantage[i] ?? none,
    length: (i) => numbers.length[i],
  };
  const key = keys[rollouts.order];
  if (key) rollouts.shown.sort((a, b) => key(b) - key(a) || a - b);
  byId("histograms").replaceChildren(
    histogram("Reward", "reward", run, all),
    histogram("Length", "length", run, all),
  );
  byId("count").replaceChildren(...countLine(run, all));
  const at = rollouts.shown.findIndex((i) => i === rollouts.completion);
  rollouts.list.element.scrollTop = 0;
  rollouts.list.reset(rollouts.shown.length, Math.max(at, 0));
  const chosen = rollouts.shown[Math.max(at, 0)];
  if (chosen !== undefined && (at < 0 || !byId("group").firstChild)) showChosen(chosen, false);
  if (!rollouts.shown.length)
    byId("group").replaceChildren(
      make("p", { class: "empty", text: "Nothing passes these filters." }),
    );
  if (focus) document.querySelector(focus)?.focus();
}

function countLine(run, all) {
  const groups = new Set(rollouts.shown.map((i) => run.groupOf[i]));
  const parts = [
    make("span", {
      text: `${rollouts.shown.length.toLocaleString("en")} of ${counted(all.length, "completion")}, ${counted(groups.size, "group")}`,
    }),
  ];
  const { filters } = rollouts;
  const names = {
    reward: () =>
      filters.reward === "none"
        ? "no reward"
        : `reward ${figure(filters.reward[0])} to ${figure(filters.reward[1])}`,
    length: () => `length ${figure(filters.length[0])} to ${figure(filters.length[1])}`,
    right: () => RIGHT[filters.right][1],
    finish: () =>
      filters.finish === "length"
        ? finishName(run, filters.finish)
        : `ended ${finishName(run, filters.finish)}`,
    text: () =>
      `“${filters.text}”${rollouts.looked < 1 ? ` (${percent(rollouts.looked, 0)} searched)` : ""}`,
  };
  for (const name of Object.keys(filters)) {
    const text = names[name]();
    parts.push(
      make(
        "button",
        {
          type: "button",
          class: "chip",
          "aria-label": plain(`Remove filter ${text}`),
          onclick: () => {
            delete filters[name];
            if (name === "text") searchText("");
            drawRollouts();
          },
        },
        make("span", { text }),
        " ×",
      ),
    );
  }
  if (parts.length > 1)
    parts.push(
      make("button", {
        type: "button",
        class: "link",
        text: "Clear all filters",
        onclick: () => {
          rollouts.filters = {};
          searchText("");
          drawRollouts();
          rollouts.list.element.focus({ preventScroll: true });
        },
      }),
    );
  return parts;
}

// A row of the list; its text comes when its chunk is decoded.
function completionRow(at) {
  const run = theRun();
  const i = rollouts.shown[at];
  const group = run.groupOf[i];
  const { numbers } = run;
  const [sign, name] = RIGHT[numbers.correct[i]];
  const text = make("span", { class: "snippet" });
  run.texts(group).then((texts) => {
    const own = texts && texts.completions[i - run.first[group]];
    const prefix = run.settings.reasoning_prefix || "";
    if (rollouts.update === null) text.append(`update ${run.groups.update[group]}: `);
    showSnippet(text, own ? own.text.replace(prefix, "") : null);
  });
  const facts = [
    make("b", { text: figure(numbers.reward[i]) }),
    make("span", {
      class: `judged ${name.split(" ")[0]}`,
      title: name,
      text: sign,
      "aria-label": name,
    }),
    numbers.advantage[i] === null
      ? null
      : make("span", { class: "muted", text: `adv. ${signed(hundredths(numbers.advantage[i]))}` }),
    make("span", { class: "muted", text: counted(numbers.length[i], "token") }),
    run.finishes[numbers.finish[i]] === "length"
      ? make("span", { class: "cut", text: "cut off" })
      : null,
  ];
  return listRow(facts, text);
}

const hundredths = (value) => Math.round(100 * value) / 100;

function showChosen(completion, told = true) {
  const run = theRun();
  rollouts.completion = completion;
  rollouts.group = run.groupOf[completion];
  if (told)
    announce(
      `reward ${figure(run.numbers.reward[completion])}, ${RIGHT[run.numbers.correct[completion]][1]}`,
    );
  return showGroup(byId("group"), run, rollouts.group, completion);
}

// The group of one prompt, side by side, sorted by advantage; `chosen` is marked.
async function showGroup(box, run, group, chosen = -1) {
  const mine = (box.showing = {});
  const [texts, tokens] = await Promise.all([
    run.texts(group),
    rollouts.colour === "none" ? null : run.tokens(group),
  ]);
  if (box.showing !== mine) return;
  const { numbers, groups, first } = run;
  const members = Array.from({ length: groups.size[group] }, (_, n) => first[group] + n);
  const rank = (i) => numbers.advantage[i] ?? numbers.reward[i] ?? -Infinity;
  members.sort((a, b) => rank(b) - rank(a) || a - b);
  const rewards = members.map((i) => numbers.reward[i]).filter((value) => value !== null);
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
  const spread =
    rewards.length > 1
      ? Math.sqrt(rewards.reduce((sum, r) => sum + (r - mean) ** 2, 0) / (rewards.length - 1))
      : null;
  const place = `${setName(run.sets[groups.set[group]])}, update ${groups.update[group]}, question ${groups.prompt[group]}`;
  const about = [place, counted(members.length, "completion")];
  if (members.length > 1)
    about.push(`reward ${figure(mean)} on average, standard deviation ${figure(spread)}`);
  const cards = members.map((i) =>
    completionCard(run, group, i, { texts, tokens, chosen, mean, many: members.length > 1 }),
  );
  const legend = rewardLegend(run, group);
  box.replaceChildren(
    make("p", { class: "muted", text: about.join(" · ") }),
    ...questionHead(texts),
    ...(legend ? [legend] : []),
    colourChoice(run, group, () => showGroup(box, run, group, chosen)),
    make("div", { class: members.length > 24 ? "cards many" : "cards" }, ...cards),
  );
}

// Question, expected answer and prompt.
function questionHead(texts) {
  if (!texts) return [make("p", { class: "question", text: "(its text is not in this page)" })];
  const answer = make(
    "p",
    {},
    "expected ",
    make("code", { class: "answer", text: String(texts.answer) }),
  );
  return [
    make("p", { class: "question", dir: "auto", text: String(texts.question) }),
    ...(texts.answer === null ? [] : [answer]),
    make(
      "details",
      {},
      make("summary", { text: "The prompt as the model sees it" }),
      make("pre", { dir: "auto", text: texts.prompt }),
    ),
  ];
}

function colourChoice(run, group, again) {
  if (!run.groups.tokens[group])
    return make("p", {
      class: "muted",
      text:
        run.kept.tokens < 1
          ? "What is known of this group's tokens is not in this page."
          : "What is known of each token was not kept for this group.",
    });
  const ways = [
    ["none", "plain"],
    ["probability", "probability"],
    ["ratio", "ratio trained : sampled"],
    ["mask", "given or sampled"],
  ];
  const legends = {
    none: "",
    probability: "how probable the sampler found each token",
    ratio:
      "how much more (orange) or less (blue) probable training found each token than the sampler did",
    mask: "grey was given, not sampled: it is not trained on",
  };
  const scale = {
    probability: ["p9", "p6", "p3", "p0"],
    ratio: ["less3", "less1", "more1", "more3"],
    mask: ["given"],
    none: [],
  }[rollouts.colour];
  const ends = {
    probability: ["1%", "100%"],
    ratio: ["0.86", "1.16"],
    mask: ["", ""],
    none: ["", ""],
  }[rollouts.colour];
  return make(
    "div",
    { class: "colours" },
    make("span", { text: "Tokens by" }),
    choice("Colour tokens by", ways, rollouts.colour, (value) => {
      rollouts.colour = value;
      again();
    }),
    make(
      "span",
      { class: "legend muted" },
      ends[0],
      ...scale.map((name) => make("i", { class: `token ${name}`, text: "ab" })),
      ends[1],
      " ",
      legends[rollouts.colour],
    ),
  );
}

function completionCard(run, group, i, { texts, tokens, chosen, mean, many }) {
  const { numbers } = run;
  const at = i - run.first[group];
  const own = texts && texts.completions[at];
  const known = tokens && tokens[at];
  const [sign, judged] = RIGHT[numbers.correct[i]];
  const advantage = numbers.advantage[i];
  const head = make(
    "header",
    {},
    make("b", { class: "total", text: figure(numbers.reward[i]) }),
    make("span", { class: `judged ${judged.split(" ")[0]}`, text: `${sign} ${judged}` }),
    make("span", {
      class: "muted",
      text: `${counted(numbers.length[i], "token")}, ${endText(run, run.finishes[numbers.finish[i]])}`,
    }),
  );
  const body = make("pre", { dir: "auto", tabindex: "0", "aria-label": "Completion" });
  if (own) showCompletion(body, own, known, run);
  else
    body.append(
      make("i", { text: "This text was left out to keep the page small; --serve shows it." }),
    );
  const card = make(
    "article",
    { class: i === chosen ? "card chosen" : "card", "aria-current": i === chosen ? "true" : null },
    head,
    rewardTable(run, i),
  );
  if (advantage !== null)
    card.append(
      make("p", { class: "why", text: whyAdvantage(advantage, numbers.reward[i], mean, many) }),
    );
  if (own)
    card.append(
      make(
        "p",
        { class: "why" },
        ...(own.parsed === null
          ? [nothingRead(run, own.text)]
          : [
              "answer read: ",
              make("code", { class: "answer", text: own.parsed }),
              ...expectedNote(texts.answer),
            ]),
      ),
    );
  card.append(body);
  for (const image of own?.images ?? [])
    card.append(make("p", { class: "muted" }, "picture: ", make("code", { text: image })));
  return card;
}

const endText = (run, name) =>
  ({ stop: "ended by itself", length: "cut off at the limit" })[name] ?? name;

// What was looked for in a text that gives no answer.
function nothingRead(run, text) {
  if (run.metric === "last_number") return "no answer: there is no number in the text";
  if (!text.includes("<answer>")) return "no answer: the text has no <answer> … </answer>";
  return text.lastIndexOf("</answer>") > text.lastIndexOf("<answer>")
    ? "no answer: nothing stands between <answer> and </answer>"
    : "no answer: <answer> is not followed by </answer>";
}

// What a reward function is, and what it can give.
function rewardAbout(run, name) {
  const most = run.highest(name);
  const weight = run.weight(name);
  return [
    (run.rewards_say ?? {})[name],
    most > -Infinity ? `at most ${figure(most)} in this run` : "",
    weight === 1 ? "" : `counts ${figure(weight)} times`,
  ].filter(Boolean);
}

function rewardLegend(run, group) {
  const names = Object.keys(run.rewards).filter(
    (name) => run.mean(run.rewards[name], group) !== null,
  );
  if (!names.length) return null;
  return make(
    "details",
    { class: "about" },
    make("summary", { text: "What the rewards are" }),
    make(
      "dl",
      {},
      ...names.flatMap((name) => [
        make("dt", { text: name }),
        make("dd", { text: rewardAbout(run, name).join(" · ") }),
      ]),
    ),
  );
}

function expectedNote(answer) {
  return answer === null ? [] : [", expected ", make("code", { text: String(answer) })];
}

function whyAdvantage(advantage, reward, mean, many) {
  if (!many || reward === null || mean === null) return `advantage ${signed(advantage)}`;
  const apart = reward - mean;
  if (Math.abs(apart) < 1e-9)
    return `advantage ${signed(advantage)}: as much as the group on average`;
  return `advantage ${signed(advantage)}: ${figure(Math.abs(apart))} ${apart > 0 ? "above" : "below"} the group's average`;
}

// What each reward function gave, with its weight, and what of the total they do not explain.
function rewardTable(run, i) {
  const group = run.groupOf[i];
  const names = Object.keys(run.rewards).filter(
    (name) => run.mean(run.rewards[name], group) !== null,
  );
  if (!names.length) return null;
  const total = run.numbers.reward[i];
  let sum = 0;
  const rows = names.map((name) => {
    const weight = run.weight(name);
    const value = run.rewards[name][i];
    sum += weight * value;
    const most = run.highest(name);
    const size = Math.abs(weight * value) / run.mostEarned();
    const shown =
      value === null
        ? "no value"
        : weight === 1
          ? figure(value)
          : `${figure(value)} × ${figure(weight)}`;
    return make(
      "tr",
      {},
      make("th", {
        scope: "row",
        text: name,
        "data-tip": `${name}: ${rewardAbout(run, name).join(" · ")}`,
      }),
      make(
        "td",
        {},
        make("span", { text: shown }),
        most > 0 ? make("span", { class: "muted", text: ` of ${figure(most)}` }) : null,
      ),
      make(
        "td",
        { class: "earned", "aria-hidden": "true" },
        make("i", { class: weight * value < 0 ? "lost" : "", style: { width: `${100 * size}%` } }),
      ),
    );
  });
  if (
    total !== null &&
    names.length &&
    Math.abs(total - sum) > 1e-3 * Math.max(1, Math.abs(total))
  ) {
    rows.push(
      make(
        "tr",
        {},
        make("th", { scope: "row", text: "shaping" }),
        make("td", { text: signed(total - sum) }),
        make("td"),
      ),
    );
  }
  return make("table", { class: "rewards", "aria-label": "Rewards" }, make("tbody", {}, ...rows));
}

// A conversation, or a text with its parsed answer marked and its tokens coloured.
function showCompletion(parent, own, known, run) {
  if (own.messages && !known) {
    for (const message of own.messages) {
      parent.append(make("b", { class: "role", text: String(message.role ?? "") }));
      showText(
        parent,
        `\n${typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? message)}\n`,
      );
    }
    return;
  }
  if (known?.pieces) {
    const text = known.pieces.join("");
    let at = 0;
    const sizes = known.pieces.map((piece) => piece.length);
    showRanges(
      parent,
      text,
      sizes.map((size, n) => tokenRange(known, n, (at += size) - size, size, text)),
    );
    return;
  }
  const text = known ? own.text + known.rest : own.text;
  const ranges = answerRange(own);
  if (known) {
    let at = known.start;
    if (at && rollouts.colour === "mask")
      ranges.push({ from: 0, to: at, class: "token given", tip: "given, not sampled" });
    known.sizes.forEach((size, n) => {
      ranges.push(tokenRange(known, n, at, size, text));
      at += size;
    });
    if (known.rest)
      ranges.push({
        from: own.text.length,
        to: text.length,
        class: "beyond",
        tip: "sampled, but behind the end of the text that is judged",
      });
  }
  showRanges(
    parent,
    text,
    ranges.filter((range) => range.to > range.from),
  );
}

function tokenRange(known, n, from, size, text) {
  const probability = Math.exp(-known.p[n] / 100);
  const ratio = known.d ? Math.exp(known.d[n] / 1000) : 1;
  const given = known.mask ? !known.mask[n] : false;
  const shown = plain(JSON.stringify(text.slice(from, from + size)));
  const tip = given
    ? `${shown}: given, not sampled`
    : `${shown}: probability ${percent(probability, probability < 0.1 ? 2 : 1)}, ratio ${ratio.toFixed(3)}`;
  return { from, to: from + size, class: `token ${tokenClass(probability, ratio, given)}`, tip };
}

function tokenClass(probability, ratio, given) {
  if (given) return "given";
  if (rollouts.colour === "probability")
    return `p${Math.min(9, Math.floor(-2 * Math.log(Math.max(probability, 1e-9))))}`;
  if (rollouts.colour !== "ratio") return "";
  const size = Math.min(3, Math.floor(Math.abs(Math.log(ratio)) / 0.05));
  return size ? `${ratio > 1 ? "more" : "less"}${size}` : "";
}

// Where the answer that was read stands: between the last pair of tags, else where it is found last.
function answerRange({ text, parsed }) {
  if (!parsed) return [];
  const tag = text.lastIndexOf("<answer>");
  let from = tag < 0 ? -1 : text.indexOf(parsed, tag + 8);
  if (from < 0) from = text.lastIndexOf(parsed);
  return from < 0 ? [] : [{ from, to: from + parsed.length, class: "answer", mark: true }];
}
