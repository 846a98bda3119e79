"use strict";
// The frame: tabs, the line under the title, keys, tips, printing, and following a served run.

const DRAW = {
  curves: drawCurves,
  rollouts: drawRollouts,
  questions: drawQuestions,
  evaluations: drawEvaluations,
  compare: drawCompare,
};

function show(tab) {
  page.tab = tab in DRAW ? tab : "curves";
  for (const button of byId("tabs").children) {
    const own = button.dataset.tab === page.tab;
    button.setAttribute("aria-selected", own);
    button.setAttribute("aria-controls", button.dataset.tab);
    button.tabIndex = own ? 0 : -1;
  }
  for (const name of Object.keys(DRAW)) byId(name).hidden = name !== page.tab;
  window.scrollTo(0, 0);
  if (page.drawn.has(page.tab)) return;
  page.drawn.add(page.tab);
  DRAW[page.tab]();
}

// Names that tell the runs apart.
function label() {
  const times = {};
  for (const run of page.runs) times[run.name] = (times[run.name] || 0) + 1;
  for (const run of page.runs) run.label = times[run.name] > 1 ? run.folder : run.name;
}

function drawHeader() {
  label();
  byId("title").textContent = plain(
    page.runs.length === 1 ? page.runs[0].label : `${page.runs.length} runs`,
  );
  const focus = [...byId("runs").children].indexOf(document.activeElement);
  byId("runs").replaceChildren(
    ...page.runs.map((run) => (page.runs.length > 1 ? runSwitch(run) : facts(run))),
  );
  byId("runs").children[focus]?.focus();
  const told = page.runs.flatMap(notices);
  byId("told").hidden = !told.length;
  byId("told").replaceChildren(
    ...told.map(([text, rest, command]) =>
      rest
        ? make(
            "details",
            {},
            make("summary", { text }),
            make("span", { text: rest }),
            command ? make("code", { text: command }) : null,
          )
        : make("span", { text }),
    ),
  );
}

// [what is said, and in full, and what to type] of a run that is not all here.
function notices(run) {
  const found = [];
  const name = page.runs.length > 1 ? `${run.label}: ` : "";
  if (page.reading) found.push([`${name}reading, ${counted(run.count, "completion")} so far`]);
  const { kept } = run;
  if (run.count && !kept.whole) {
    const parts = [run.missing("updates"), run.missing("evaluations")].filter(Boolean);
    const which = "spread over the run, the first and the last among them.";
    found.push([
      `${name}This page holds ${run.countText} completions`,
      `${parts.length ? `of ${parts.join(" and ")}, ${which} ` : ""}The page that a run writes when ` +
        "it ends is made in two seconds. Curves are complete. This writes a page with everything:",
      run.command,
    ]);
  }
  for (const text of run.damaged) found.push([`${name}${text}; the rest is shown.`]);
  if (run.count && kept.text < 1) {
    found.push([
      `${name}This page holds the texts of ${percent(kept.text, 0)} of the groups`,
      "spread over the run, and the numbers of all: more texts do not fit into 30 MB. This shows " +
        "every text:",
      `${run.command} --serve`,
    ]);
  } else if (run.count && kept.tokens < 1) {
    found.push([
      `${name}The probability of each token is here for ${percent(kept.tokens, 0)} of the groups`,
      "spread over the run; texts and rewards are here for all. There was no time or no room for " +
        "more. This writes a page with as much as fits, and with --serve shows all:",
      run.command,
    ]);
  }
  return found;
}

function facts(run) {
  const scores = testScores(run);
  const values = [
    ["Reward", ends(run, "reward_mean")],
    scores.length
      ? [
          run.metric === "em" ? "Exact match" : run.metric,
          scores.length > 1
            ? `${score(run, scores[0])} → ${withInterval(run, scores.at(-1))}`
            : withInterval(run, scores[0]),
        ]
      : null,
    ["Updates", updatesText(run)],
    ["Time", duration(run.records.at(-1)?.seconds)],
    ["Completions", run.countText],
  ].filter(Boolean);
  const list = make(
    "dl",
    { class: "facts" },
    ...values.map(([name, text]) =>
      make("div", {}, make("dt", { text: name }), make("dd", { text })),
    ),
  );
  const more = make("button", {
    type: "button",
    class: "link more",
    text: "more",
    "aria-expanded": "false",
    onclick: () => {
      const open = list.classList.toggle("open");
      more.setAttribute("aria-expanded", open);
      more.textContent = open ? "less" : "more";
    },
  });
  list.append(more);
  return list;
}

function withInterval(run, record) {
  if (run.metric !== "em" || record.em === null) return score(run, record);
  const [low, high] = wilson(record.em, record.em_subset);
  return `${percent(record.em)} [${percent(low)}, ${percent(high)}]`;
}

const score = (run, record) => (run.metric === "em" ? percent(record.em) : figure(record.em));

function runSwitch(run) {
  return make(
    "button",
    {
      type: "button",
      class: "chip",
      "aria-pressed": String(run.shown),
      title: plain(run.folder),
      onclick: (event) => {
        run.shown = !run.shown;
        event.currentTarget.setAttribute("aria-pressed", run.shown);
        redrawCurves();
      },
    },
    swatch(run),
    make("span", { text: run.label }),
    make("span", {
      class: "muted",
      text: testScores(run).length ? ` ${score(run, testScores(run).at(-1))}` : "",
    }),
  );
}

function take(told) {
  page.version = told.version;
  page.reading = Boolean(told.reading);
  told.runs.forEach((facts_, n) => {
    page.runs[n] ??= new Run(n);
    page.runs[n].take(facts_);
  });
  drawHeader();
}

// A run that goes on: new groups, log and marks.
async function follow() {
  const have = page.runs.map((run) => run.groups.update.length).join(",");
  const records = page.runs.map((run) => run.records.length).join(",");
  try {
    const answer = await fetch(`data?since=${have}&records=${records}&version=${page.version}`);
    if (answer.status === 200) {
      const told = await answer.json();
      const before = page.runs.reduce((sum, run) => sum + run.count, 0);
      const cleared = page.runs.map((run) => run.cleared).join();
      take(told);
      refresh(before, cleared !== page.runs.map((run) => run.cleared).join());
    }
    document.body.classList.remove("cut-off");
  } catch {
    document.body.classList.add("cut-off"); // the server has ended: what is here stays
  }
  setTimeout(follow, page.reading ? follow.pause / 5 : follow.pause);
}

follow.pause = 2000; // milliseconds

// Curves and tables are drawn anew; what a person is reading or filtering stays.
function refresh(before, cleared) {
  if (cleared) rollouts.found = null;
  for (const tab of [...page.drawn]) if (tab !== page.tab) page.drawn.delete(tab);
  if (page.tab === "curves") updateCurves();
  else if (page.tab === "compare" || !before || cleared) DRAW[page.tab]();
  else offerNew();
}

function offerNew() {
  byId("fresh")?.remove();
  const show_ = () => {
    byId("fresh").remove();
    DRAW[page.tab]();
  };
  const text = "New completions: show them";
  byId("view").before(
    make("button", { id: "fresh", type: "button", class: "chip", text, onclick: show_ }),
  );
}

function onKey(event) {
  const tabs = [...byId("tabs").children];
  const typing = event.target.matches(
    "input:not([type=range]):not([type=checkbox]), select, textarea",
  );
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.getAttribute("role") === "tab") {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    next.focus();
    location.hash = next.dataset.tab;
  } else if (/^[1-5]$/.test(event.key)) location.hash = tabs[Number(event.key) - 1].dataset.tab;
  else if (event.key === "/") {
    document.querySelector("section:not([hidden]) input[type=search]")?.focus();
    event.preventDefault();
  }
}

function tips() {
  const tip = byId("tip");
  document.addEventListener("mouseover", (event) => {
    const text = event.target.closest?.("[data-tip]")?.dataset.tip;
    tip.hidden = !text;
    if (text) tip.textContent = plain(text);
  });
  document.addEventListener("mousemove", (event) => {
    if (tip.hidden) return;
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  });
}

async function start() {
  if (!("DecompressionStream" in window)) {
    throw new Error("this browser is too old. Chrome 80, Firefox 113 and Safari 16.4 can show it");
  }
  const source = byId("data").textContent;
  if (source) take(await unpacked(bytesOf(source)));
  else {
    page.server = true;
    const answer = await fetch("data?since=&version=");
    if (!answer.ok) throw new Error(await answer.text());
    const told = await answer.json();
    take(told);
  }
  for (const button of byId("tabs").children) {
    button.addEventListener("click", () => (location.hash = button.dataset.tab));
  }
  addEventListener("hashchange", () => show(location.hash.slice(1)));
  document.addEventListener("keydown", onKey);
  tips();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCurves);
  // Plots that were not in view yet; and all in the colours of paper.
  addEventListener("beforeprint", () => {
    for (const item of curves.plots) item.seen = page.tab === "curves";
    redrawCurves();
  });
  addEventListener("afterprint", redrawCurves);
  show(location.hash.slice(1));
  document.body.dataset.ready = "true";
  if (page.server) setTimeout(follow, page.reading ? follow.pause / 5 : follow.pause);
}

start().catch((error) => {
  byId("told").hidden = false;
  byId("told").textContent = plain(`This page cannot be shown: ${error.message}`);
  throw error;
});
