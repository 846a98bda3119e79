"""The page in a browser: headless Chromium, driven by Playwright."""

import itertools
import json
import os
import random
import re
import shutil

import page_runs
import pytest
from test_page_server import served, soon  # noqa: F401 - a fixture

from utils.base.intervals import wilson
from utils.evaluate_model import sign_test
from utils.run import completions, page
from utils.run.page_source import Source

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
TABS = ("curves", "rollouts", "questions", "evaluations", "compare")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def groups():
    return [*page_runs.groups(30)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, groups):
    """A run and another one, as folders."""
    folder = tmp_path_factory.mktemp("runs")
    first = page_runs.make_run(folder / "first", updates=30)
    page_runs.keep(first, groups, span=100)
    second = page_runs.make_run(folder / "second", 20, 1, {"learning_rate": 3e-5})
    page_runs.keep(second, page_runs.groups(20, seed=1))
    return first, second


@pytest.fixture(scope="module")
def one(runs):
    page.write(runs[0] / "report.html", [Source.at(runs[0])])
    return (runs[0] / "report.html").as_uri()


@pytest.fixture(scope="module")
def two(runs):
    path = runs[0].parent / "report.html"
    page.write(path, [*map(Source.at, runs)])
    return path.as_uri()


@pytest.fixture
def opened(browser):
    """Open an address; what the page complains of, and asks of others, fails the test."""
    context, heard = [], []

    def open_(address, tab="curves", width=1300, height=800, complaints=True, **how):
        made = browser.new_context(viewport={"width": width, "height": height}, **how)
        context.append(made)
        shown = made.new_page()
        if complaints:
            shown.on("console", lambda m: heard.append(m.text) if m.type == "error" else None)
            shown.on("pageerror", lambda error: heard.append(str(error)))
            shown.on("dialog", lambda dialog: heard.append(dialog.message))
            base = address.split("#")[0]
            shown.on("request", lambda r: r.url.startswith(base) or heard.append(r.url))
        shown.set_default_timeout(20_000)
        shown.goto(f"{address}#{tab}")
        shown.wait_for_selector("body[data-ready]")
        return shown

    yield open_
    for made in context:
        made.close()
    assert not heard


def text_of(shown, selector):
    return shown.locator(selector).inner_text()


def until(shown, condition, seconds=20):
    """Wait for it; the policy of the page forbids what Playwright would do."""
    for _ in range(40 * seconds):
        if shown.evaluate(condition):
            return
        shown.wait_for_timeout(25)
    raise AssertionError(f"never: {condition}")


def slide(shown, selector, value):
    shown.locator(selector).evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )


def show_tab(shown, tab):
    shown.click(f"[data-tab={tab}]")
    shown.wait_for_selector(f"#{tab}:not([hidden]) > *")


def test_every_view_is_drawn(one, opened):
    shown = opened(one)
    assert shown.title() == "MLX-GRPO: first"
    facts = text_of(shown, "#runs").replace("\n", " ")
    low, high = wilson(0.95, 20)
    assert f"Exact match 20.0% → 95.0% [{100 * low:.1f}%, {100 * high:.1f}%]" in facts
    assert "Completions 2,000" in facts
    for tab in TABS:
        show_tab(shown, tab)
        assert shown.locator("section:visible").count() == 1
        assert shown.locator(f"#{tab}").inner_text().strip()


def test_every_figure_of_the_log_has_a_curve(one, opened):
    shown = opened(one)
    titles = shown.locator("figcaption b").all_inner_texts()
    expected = ["Reward", "Exact match", "Reward: correctness", "Loss", "Entropy", "Length"]
    expected += ["Clipped tokens", "Sampler mismatch", "Cut off", "Groups without signal"]
    expected += ["Learning rate", "Gradient norm", "Tokens per second", "Memory, GB"]
    assert {*expected, "Seconds by stage"} <= {*titles}
    assert "KL to the reference" not in titles, "this run has none"
    assert shown.locator(".marks li").all_inner_texts() == [
        "update 8: resumed from checkpoint-8",
        "update 15: the entropy has fallen to a tenth",
    ]
    drawn = shown.locator("canvas").count()
    assert 0 < drawn < len(titles), "a plot is drawn when it comes into view"
    shown.locator("figure").last.scroll_into_view_if_needed()
    until(shown, f"document.querySelectorAll('canvas').length > {drawn}")


def test_curves_are_smoothed_zoomed_and_read_by_key(one, opened):
    shown = opened(one)
    plot = "curves.plots[0].plot"
    slide(shown, "[aria-label=Smoothing]", "0.5")
    raw, smooth = shown.evaluate(f"{plot}.data.slice(1)")
    value, weight = 0.0, 0.0
    for x, y in zip(raw, smooth, strict=True):
        value, weight = 0.5 * value + 0.5 * x, 0.5 * weight + 0.5
        assert y == pytest.approx(value / weight)
    box = shown.locator(".u-over").first.bounding_box()
    y = box["y"] + 40
    shown.mouse.move(box["x"] + 0.25 * box["width"], y)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 0.75 * box["width"], y, steps=5)
    shown.mouse.up()
    for n in range(3):
        low, high = shown.evaluate(
            f"(({{min, max}}) => [min, max])(curves.plots[{n}].plot.scales.x)"
        )
        assert 5 < low < 12 < 20 < high < 25, "all of them are"
    shown.locator(".plot").last.scroll_into_view_if_needed()
    until(shown, "curves.plots.at(-1).plot")
    assert shown.evaluate("curves.plots.at(-1).plot.scales.x.max") == pytest.approx(high)
    shown.locator(".plot").first.focus()
    shown.keyboard.press("Escape")
    assert shown.evaluate(f"{plot}.scales.x.max") == 30
    shown.keyboard.press("ArrowRight")
    assert re.fullmatch(
        r"update \d+: reward_mean [\d.]+, reward_mean \(.*|update \d+: reward_mean [\d.]+",
        text_of(shown, "#said"),
    )
    shown.get_by_label("Log scale").check()
    assert shown.evaluate(f"{plot}.scales.y.distr") == 3
    shown.get_by_label("Over", exact=True).select_option("tokens")
    assert shown.evaluate(f"{plot}.data[0].at(-1)") == 30 * 1280


def shown_completions(shown):
    return shown.evaluate("rollouts.shown.length")


def test_the_slider_chooses_an_update(one, groups, opened):
    shown = opened(one, "rollouts")
    number = shown.get_by_label("Number of the update")
    assert (number.input_value(), text_of(shown, ".slider output")) == ("30", "of 30")
    assert text_of(shown, "#count") == "64 of 64 completions, 8 groups"
    slide(shown, "#update", "4")
    assert number.input_value() == "5"
    assert shown.locator("#update").get_attribute("aria-valuetext") == "update 5"
    wanted = [g for g in groups if g["kind"] == "train" and g["update"] == 5]
    shown.wait_for_selector(f"text={wanted[0]['question']}")
    shown.get_by_label("Next update").click()
    assert number.input_value() == "6"
    for typed, nearest in (("17", "17"), ("99", "30"), ("", "30")):
        number.fill(typed)
        number.press("Enter")
        assert number.input_value() == nearest
        assert shown.evaluate("rollouts.update") == int(nearest)
    shown.get_by_label("All updates").check()
    assert text_of(shown, "#count") == "1,920 of 1,920 completions, 240 groups"
    shown.get_by_label("Of", exact=True).select_option("eval test")
    assert text_of(shown, "#count") == "80 of 80 completions, 80 groups"


def test_filters(one, groups, opened):
    shown = opened(one, "rollouts")
    shown.get_by_label("All updates").check()
    kept = [c for g in groups if g["kind"] == "train" for c in g["completions"]]
    shown.get_by_label("Answer").select_option("0")
    assert shown_completions(shown) == sum(not c["correct"] for c in kept)
    assert shown.get_by_label("Ending").locator("option").all_inner_texts() == [
        "any",
        "by itself",
        "cut off at 32 tokens",
    ]
    assert text_of(shown, "#rollouts .note") == "The limit is max_new_tokens = 32"
    shown.get_by_label("Ending").select_option("length")
    assert shown_completions(shown) == sum(c["finish_reason"] == "length" for c in kept)
    for chip in ("wrong", "cut off at 32 tokens"):
        shown.get_by_label(f"Remove filter {chip}").click()
    assert shown_completions(shown) == len(kept)
    assert not shown.get_by_text("Clear all filters").count()
    shown.get_by_label("Answer").select_option("1")
    shown.locator("[data-histogram=length] .bar").first.click()
    assert shown_completions(shown) < len(kept)
    shown.get_by_text("Clear all filters").click()
    assert shown_completions(shown) == len(kept)
    assert shown.get_by_label("Answer").input_value() == ""
    shown.get_by_label("Search text").fill("QUESTION 17:")
    until(shown, "rollouts.looked === 1")
    expected = [g for g in groups if g["question"].startswith("Question 17:")]
    assert shown_completions(shown) == 8 * sum(g["kind"] == "train" for g in expected)


def test_bars_of_the_histograms_filter(one, groups, opened):
    shown = opened(one, "rollouts")
    shown.get_by_label("All updates").check()
    rewards = [c["reward"] for g in groups if g["kind"] == "train" for c in g["completions"]]
    bars = shown.locator("[data-histogram=reward] .bar")
    assert bars.count() == len({*rewards})
    for n, value in enumerate(sorted({*rewards})):
        bars.nth(n).click()
        assert shown_completions(shown) == rewards.count(value)
        assert bars.nth(n).get_attribute("aria-pressed") == "true"
    bars.first.click(modifiers=["Shift"])
    assert shown_completions(shown) == len(rewards)
    bars = shown.locator("[data-histogram=length] .bar")
    counts = []
    for n in range(bars.count()):
        bars.nth(n).click()
        counts.append(shown_completions(shown))
    assert sum(counts) == len(rewards), "each is in one bar"


def test_the_group_of_a_prompt_says_why_each_earned_what_it_did(one, groups, opened):
    shown = opened(one, "rollouts")
    wanted = next(
        g for g in groups if g["update"] == 6 and len({c["reward"] for c in g["completions"]}) == 3
    )
    slide(shown, "#update", "5")
    row = next(
        n
        for n, g in enumerate(g for g in groups if g["kind"] == "train" and g["update"] == 6)
        if g is wanted
    )
    shown.evaluate(f"rollouts.list.choose({8 * row})")
    shown.wait_for_selector(f".question >> text={wanted['question']}")
    cards = shown.locator("#group .card")
    assert cards.count() == 8
    by_advantage = sorted(wanted["completions"], key=lambda c: -c["advantage"])
    totals = [float(text) for text in shown.locator("#group .total").all_text_contents()]
    assert totals == [c["reward"] for c in by_advantage]
    assert shown.locator("#group .card.chosen").count() == 1
    best = text_of(shown, "#group .card >> nth=0")
    mean = sum(totals) / 8
    assert "✓ right" in best
    assert re.search(r"correctness\s+2\s", best)
    assert f"{totals[0] - mean:.3g} above the group's average" in best
    assert f"answer read: {wanted['answer']}, expected {wanted['answer']}" in best
    assert text_of(shown, "#group .card mark >> nth=0") == wanted["answer"]
    assert by_advantage[0]["text"] in cards.first.locator("pre").text_content()


def test_rewards_are_explained(one, groups, opened):
    shown = opened(one, "rollouts")
    shown.locator("#group details.about summary").click()
    terms = shown.locator("#group details.about dt").all_inner_texts()
    assert terms == [*page_runs.REWARDS]
    told = shown.locator("#group details.about dd").all_inner_texts()
    assert told[0] == "2.0 for the right answer. · at most 2 in this run"
    assert told[2] == "at most 0.5 in this run", "it says nothing of itself"
    first = shown.locator("#group .card >> nth=0 >> .rewards")
    assert re.search(r"correctness\s+[02] of 2\s", first.inner_text())
    first.locator("th").first.hover()
    assert text_of(shown, "#tip") == f"correctness: {told[0]}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is 42.", "no answer: the text has no <answer> … </answer>"),
        ("<answer></answer>", "no answer: nothing stands between <answer> and </answer>"),
        ("42 <answer>", "no answer: <answer> is not followed by </answer>"),
    ],
)
def test_what_was_looked_for_is_said_where_no_answer_is_read(one, opened, text, said):
    shown = opened(one)
    told = json.dumps(text)
    assert shown.evaluate(f"nothingRead(page.runs[0], {told})") == said
    assert shown.evaluate(f"nothingRead({{metric: 'last_number'}}, {told})") == (
        "no answer: there is no number in the text"
    )


def in_view(shown, selector):
    """Whether the beginning of it is."""
    box = shown.locator(selector).bounding_box()
    return -1 <= box["y"] <= shown.viewport_size["height"] - 100


def test_what_is_chosen_comes_into_view(one, opened):
    shown = opened(one, "rollouts", height=600)
    for n in (7, 3, 0):
        shown.locator("#rollouts .row").nth(n).click()
        until(shown, f"document.querySelector('.card.chosen') && rollouts.list.active === {n}")
        until(shown, "rollouts.list.element === document.activeElement")
        shown.wait_for_timeout(100)
        assert in_view(shown, "#group .card.chosen")
        assert in_view(shown, "#rollouts .list"), "and the list stays"
    for _ in range(6):
        shown.keyboard.press("ArrowDown")
        shown.wait_for_timeout(100)
        assert in_view(shown, "#group .card.chosen")
    assert shown.evaluate("rollouts.list.active") == 6
    shown.keyboard.press("Enter")
    until(shown, "document.activeElement.matches('.card.chosen')")
    shown.keyboard.press("Escape")
    assert shown.evaluate("document.activeElement === rollouts.list.element")


LISTS = {
    "rollouts": ("#group", ".card.chosen"),
    "questions": ("#question", "h2"),
    "evaluations": ("#pair", ".question"),
}


@pytest.mark.parametrize("tab", LISTS)
def test_on_a_narrow_screen_a_click_jumps_to_the_detail_and_back(one, opened, tab):
    shown = opened(one, tab, width=360, height=740)
    box, what = LISTS[tab]
    shown.wait_for_selector(f"{box} {what}")
    shown.locator(f"#{tab} .row").nth(2).click()
    until(shown, f"document.activeElement.closest('{box}') && window.scrollY > 200")
    assert in_view(shown, f"{box} {what} >> nth=0")
    shown.get_by_text("Back to the list").click()
    assert in_view(shown, f"#{tab} .list")
    assert shown.evaluate("document.activeElement.className") == "list"
    shown.keyboard.press("ArrowDown")
    until(shown, "window.scrollY > 200")
    shown.wait_for_timeout(100)
    assert in_view(shown, f"{box} {what} >> nth=0")
    assert shown.evaluate("document.activeElement.className") == "list", "the next arrow goes on"


def test_a_narrow_header_is_small_and_lists_do_not_trap_the_wheel(one, opened):
    shown = opened(one, "rollouts", width=360, height=740)
    assert shown.locator("body > header").bounding_box()["height"] < 140
    tops = {round(tab.bounding_box()["y"]) for tab in shown.locator("nav button").all()}
    assert len(tops) == 1, "tabs are in one line"
    assert not shown.get_by_text("Completions", exact=True).is_visible()
    shown.get_by_text("more", exact=True).click()
    assert shown.get_by_text("Completions", exact=True).is_visible()
    assert not shown.locator("#search").is_visible(), "filters are folded"
    shown.get_by_text("Search, filters, order").click()
    assert shown.locator("#search").is_visible()
    box = shown.locator("#rollouts .list")
    assert box.bounding_box()["height"] <= 0.5 * 740
    box.scroll_into_view_if_needed()
    shown.evaluate("rollouts.list.element.scrollTop = 1e6")
    before = shown.evaluate("scrollY")
    where = box.bounding_box()
    shown.mouse.move(where["x"] + 100, where["y"] + 50)
    shown.wait_for_timeout(200)
    shown.mouse.wheel(0, 300)
    until(shown, f"scrollY > {before}")
    assert shown.evaluate("getComputedStyle(document.querySelector('.card pre')).maxHeight") == (
        "none"
    )


def test_no_word_is_clipped(one, opened):
    shown = opened(one, "rollouts", width=1280)
    shown.get_by_label("All updates").check()
    shown.get_by_label("Ending").select_option("length")
    shown.wait_for_selector("#rollouts .row .cut")
    clipped = """(selector) => [...document.querySelectorAll(selector)]
        .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"""
    assert shown.evaluate(clipped, "#rollouts .row .facts, #rollouts .chip, nav button") == []
    assert (
        shown.evaluate(
            """() => [...document.querySelectorAll("#rollouts select")].filter((list) => {
            const measure = document.createElement("canvas").getContext("2d");
            measure.font = getComputedStyle(list).font;
            const widths = [...list.options].map((o) => measure.measureText(o.text).width);
            return Math.max(...widths) > list.clientWidth - 25;
        }).map((list) => list.getAttribute("aria-label"))"""
        )
        == []
    )


def test_exact_match_is_read_in_per_cent_with_its_interval(one, opened):
    shown = opened(one)
    until(shown, "curves.plots[1].plot")
    shown.locator(".plot").nth(1).focus()
    shown.keyboard.press("ArrowRight")
    low, high = wilson(0.2, 20)
    expected = f"exact match 20.0% [{100 * low:.1f}%, {100 * high:.1f}%]"
    assert text_of(shown, "#said") == f"update 0: {expected}"
    legend = text_of(shown, "figure >> nth=1 >> .u-legend")
    assert expected.removeprefix("exact match ") in legend


@pytest.fixture(scope="module")
def cut(runs, tmp_path_factory):
    """A page for which there was little time."""
    asked = itertools.count()
    room = page.Room(
        limited=True, is_over=lambda share: share == page.FOR_READING and next(asked) > 120
    )
    path = tmp_path_factory.mktemp("cut") / "report.html"
    (kept,) = page.write(path, [Source.at(runs[0])], room)
    assert not kept.sample.whole
    return path.as_uri(), kept, runs[0]


def test_a_page_that_lacks_something_says_what_and_how_to_get_it(cut, opened):
    address, kept, folder = cut
    shown = opened(address, "rollouts")
    held = f"{len(kept.shelf.numbers['reward'])} of 2,000"
    updates = f"{kept.sample.updates[0]} of 30 updates"
    evaluations = f"{kept.sample.evaluations[0]} of 4 evaluations"
    command = f"uv run python utils/report.py {folder}"
    assert f"Completions {held}" in text_of(shown, "#runs").replace("\n", " ")
    assert text_of(shown, "#told summary") == f"This page holds {held} completions"
    shown.locator("#told summary").click()
    told = text_of(shown, "#told").replace("\n", " ")
    assert f"of {updates} and {evaluations}, spread over the run" in told
    assert text_of(shown, "#told code") == command
    assert text_of(shown, ".slider .part") == f"{updates} are in this page. All of them: {command}"
    assert shown.get_by_label("Number of the update").input_value() == "30"
    if kept.sample.evaluations[0] < 4:
        for tab in ("questions", "evaluations"):
            show_tab(shown, tab)
            said = text_of(shown, f"#{tab} .part")
            assert said == f"{evaluations} are in this page. All of them: {command}"
        assert shown.get_by_label("After").input_value() == "0:30"
        assert shown.get_by_label("Before").input_value() == "0:0"
    show_tab(shown, "compare")
    assert f"{held} in this page" in text_of(shown, "table.compared")


def test_tokens_are_coloured(one, groups, opened):
    shown = opened(one, "rollouts")
    last = next(g for g in groups if g["kind"] == "train" and g["update"] == 30)
    best = max(last["completions"], key=lambda c: c["advantage"])
    shown.click("[data-value=probability]")
    tokens = shown.locator("#group .card >> nth=0 >> .token")
    tokens.first.wait_for()
    assert "".join(tokens.all_text_contents()) == best["text"].removeprefix("<reasoning>\n")
    probability = 2.718281828 ** best["sampled_logprobs"][0]
    tip = tokens.first.get_attribute("data-tip")
    assert abs(float(re.search(r"probability ([\d.]+)%", tip)[1]) - 100 * probability) < 1
    assert re.search(r"token p[0-4]", tokens.first.get_attribute("class"))
    shown.click("[data-value=ratio]")
    moved = shown.locator("#group .more1, #group .less1, #group .more2, #group .less2")
    moved.first.wait_for()
    shown.click("[data-value=mask]")
    shown.locator("#group .given").first.wait_for()
    assert text_of(shown, "#group .card >> nth=0 >> .given").strip() == "<reasoning>"


def test_one_question_over_time(one, groups, opened):
    shown = opened(one, "questions")
    asked = [g for g in groups if g["split"] == "test" and g["prompt_index"] == 0]
    shown.wait_for_selector(f"#visit >> text={asked[-1]['question']}")
    rows = shown.locator("#visits tbody tr")
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == ["0", "10", "20", "30"]
    assert [f"{int(g['completions'][0]['correct'])} of 1" for g in asked] == [
        row.split("\t")[2] for row in rows.all_inner_texts()
    ]
    first = next(g["update"] for g in asked if g["completions"][0]["correct"])
    assert text_of(shown, "#visits p") == f"first right at update {first}"
    rows.first.locator("button").click()
    told = json.dumps(asked[0]["completions"][0]["text"])
    until(shown, f"byId('visit').textContent.includes({told})")
    shown.get_by_label("Of", exact=True).select_option("training questions")
    assert text_of(shown, "#question-count") == "240 questions"
    field = shown.get_by_label("Search questions")
    field.press_sequentially("question 17:")
    until(shown, "byId('question-count').textContent === '1 question'")
    field.fill("nothing of this kind")
    until(shown, "byId('question-count').textContent === '0 questions'")
    assert text_of(shown, "#question") == "No question has this text."
    field.fill("")
    until(shown, "byId('question-count').textContent === '240 questions'")
    assert "asked once" in text_of(shown, "#visits h2")


def outcomes(before, after):
    """Counts of (right before, right after) by question."""
    pairs = [(before[i], after[i]) for i in before]
    return {pair: pairs.count(pair) for pair in itertools.product((True, False), repeat=2)}


def right(groups, update):
    found = [g for g in groups if g["split"] == "test" and g["update"] == update]
    return {g["prompt_index"]: g["completions"][0]["correct"] for g in found}


def test_evaluations_are_paired(one, groups, opened):
    shown = opened(one, "evaluations")
    counts = outcomes(right(groups, 0), right(groups, 30))
    said = [
        text.split()[-1] for text in shown.locator("#evaluations .choice button").all_inner_texts()
    ][:4]
    keys = [(False, True), (True, False), (True, True), (False, False)]
    assert [*map(int, said)] == [counts[key] for key in keys]
    p = sign_test(counts[keys[0]], counts[keys[1]])
    result = text_of(shown, ".result")
    shares = [(counts[keys[1]] + counts[keys[2]]) / 20, (counts[keys[0]] + counts[keys[2]]) / 20]
    both = [f"{100 * s:.1f}% [{{:.1f}}%, {{:.1f}}%]" for s in shares]
    both = [t.format(*(100 * e for e in wilson(s, 20))) for t, s in zip(both, shares, strict=True)]
    assert result.startswith(" → ".join(both))
    assert ("p < 0.0001" if p < 1e-4 else f"p = {p:.4f}") in result
    assert shown.locator("#pair .card").count() == 2
    assert text_of(shown, "#pair .judged >> nth=0") == "✗ wrong"
    assert text_of(shown, "#pair .judged >> nth=1") == "✓ right"
    shown.get_by_label("After").select_option("0:0")
    assert "p = 1.0000" in text_of(shown, ".result")


@pytest.mark.parametrize("better", [0, 1, 7, 40, 500])
def test_the_paired_test_and_intervals_are_those_of_evaluate_model(one, opened, better):
    shown = opened(one)
    for worse in (0, 3, 20, 480):
        own = shown.evaluate(f"signTest({better}, {worse})")
        assert own == pytest.approx(sign_test(better, worse), rel=1e-6, abs=1e-12)
    assert shown.evaluate(f"wilson({better} / 600, 600)") == pytest.approx(
        wilson(better / 600, 600)
    )


def test_two_runs(two, groups, opened):
    shown = opened(two)
    settings = text_of(shown, "table.settings")
    assert settings.split("\n")[0].split("\t")[1:] == ["first", "second"]
    assert re.search(r"learning_rate\s+0.00001\s+0.00003", settings)
    assert "eval_metric" not in settings, "it is the same"
    assert text_of(shown, "figure >> nth=0").count("first") == 1
    shown.locator("#runs .chip").first.click()
    until(shown, "curves.plots[0].plot.series.length === 2")
    shown.click("[data-tab=compare]")
    table = text_of(shown, "table.compared")
    other = [*page_runs.groups(20, seed=1)]
    counts = outcomes(right(groups, 30), right(other, 20))
    better, worse = counts[(False, True)], counts[(True, False)]
    assert f"better on {better}, worse on {worse} of 20" in table
    show_tab(shown, "rollouts")
    shown.get_by_label("Run", exact=True).select_option("1")
    assert shown.get_by_label("Number of the update").input_value() == "20"


HOSTILE = page_runs.HOSTILE


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run in which every text is meant to do harm."""
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>"
    settings = {"run_name": HOSTILE, HOSTILE: HOSTILE, "reward_funcs": [HOSTILE]}
    page_runs.make_run(folder, 10, settings=settings)
    with (folder / "training_log.jsonl").open("a") as file:
        record = {"update": 11, "notes": [HOSTILE], HOSTILE: 1.0, f"reward/{HOSTILE}": 2.0}
        file.write(json.dumps(record) + "\n")
    rng = random.Random(0)
    groups = [page_runs.group(rng, 1, n, size=2, text=HOSTILE) for n in range(3)]
    for update in (0, 1):
        asked = {"kind": "eval", "split": "test", "size": 1, "text": HOSTILE}
        groups.append(page_runs.group(rng, update, 0, skill=update, **asked))
    for group in groups:
        group |= {"question": HOSTILE, "answer": HOSTILE, "prompt": HOSTILE}
        for c in group["completions"]:
            c |= {"parsed": HOSTILE[:30], "finish_reason": HOSTILE, "images": [HOSTILE]}
            c["rewards"] = {HOSTILE: 1.0}
    page_runs.keep(folder, groups)
    page.write(folder / "report.html", [Source.at(folder)])
    return (folder / "report.html").as_uri()


def test_hostile_texts_are_shown_and_never_run(hostile, opened):
    shown = opened(hostile)
    title = shown.title()
    assert title == "MLX-GRPO: <img src=x onerror=alert(1)>"
    for tab in TABS:
        show_tab(shown, tab)
        shown.wait_for_timeout(100)
    assert shown.title() == title
    assert not shown.locator("img, iframe, object, embed, section script").count()
    show_tab(shown, "rollouts")
    shown.wait_for_selector("#group .card pre")
    said = shown.locator("#group .card pre").first.text_content()
    expected = HOSTILE.replace("\ud83d", "\\ud83d").replace("\r\n", "\\x0d\n")
    for character in "\x1b\0\x9b":
        expected = expected.replace(character, f"\\x{ord(character):02x}")
    for character in "\u202e\u202c\u200b":
        expected = expected.replace(character, f"\\u{ord(character):04x}")
    assert expected in said
    whole = shown.evaluate("document.body.innerText")
    assert not re.search("[\0\x1b\x9b\u202e\u202c\u200b]", whole)


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1024, 700), (3840, 2160)])
def test_nothing_is_wider_than_the_window(two, hostile, opened, width, height):
    for address in (two, hostile):
        shown = opened(address, width=width, height=height)
        for tab in TABS:
            show_tab(shown, tab)
            shown.wait_for_timeout(60)
            assert shown.evaluate("document.documentElement.scrollWidth") <= width, tab


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_both_schemes(one, opened, scheme):
    shown = opened(one, color_scheme=scheme)
    colours = {
        name: (shown.evaluate(f"css('--{name}')") + "000")[:7]
        for name in ("back", "card", "text", "muted", "accent", "good", "bad", "note")
    }
    assert (luminance(colours["back"]) < 0.1) == (scheme == "dark")
    for back, front in itertools.product(
        ("back", "card"), ("text", "muted", "accent", "good", "bad", "note")
    ):
        low, high = sorted(luminance(colours[name]) for name in (back, front))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (back, front)


def test_the_keyboard_is_enough(one, opened):
    shown = opened(one)
    shown.keyboard.press("2")
    shown.wait_for_selector("#rollouts:not([hidden]) .row")
    shown.keyboard.press("/")
    assert shown.evaluate("document.activeElement.id") == "search"
    shown.keyboard.press("Tab")
    shown.locator("#rollouts .list").focus()
    for _ in range(3):
        shown.keyboard.press("ArrowDown")
    assert shown.locator("#rollouts [aria-selected=true]").get_attribute("aria-posinset") == "4"
    assert text_of(shown, "#said").startswith("reward ")
    shown.keyboard.press("End")
    assert shown.locator("#rollouts [aria-selected=true]").get_attribute("aria-posinset") == "64"
    shown.locator("[role=tab][aria-selected=true]").focus()
    shown.keyboard.press("ArrowRight")
    shown.wait_for_selector("#questions:not([hidden])")


def test_everything_that_can_be_used_has_a_name(two, opened):
    shown = opened(two)
    for tab in TABS:
        show_tab(shown, tab)
        shown.wait_for_timeout(100)
        nameless = shown.evaluate(
            """() => [...document.querySelectorAll("button, input, select, [tabindex='0'], canvas")]
            .filter((e) => e.tagName !== "CANVAS" || !e.closest("[aria-label]"))
            .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
            .map((e) => e.outerHTML.slice(0, 200))"""
        )
        assert not nameless


def test_on_paper_it_is_light_and_whole(one, opened):
    shown = opened(one, color_scheme="dark")
    shown.emulate_media(media="print")
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not shown.locator("nav").is_visible()
    assert shown.evaluate("css('--back')") == "#fff"
    assert shown.locator("canvas").count() == shown.locator("figure").count()


def test_a_run_without_completions_and_a_damaged_log(tmp_path, opened):
    folder = page_runs.make_run(tmp_path / "run")
    with (folder / "training_log.jsonl").open("a") as file:
        file.write("{\n")
    page.write(folder / "report.html", [Source.at(folder)])
    shown = opened((folder / "report.html").as_uri())
    assert "cannot be read; the rest is shown" in text_of(shown, "#told")
    for tab in ("rollouts", "questions"):
        show_tab(shown, tab)
        assert "No completions were kept of this run" in text_of(shown, f"#{tab}")
    show_tab(shown, "evaluations")
    assert "No evaluation's answers were kept" in text_of(shown, "#evaluations")


def test_a_folder_with_nothing_yet(tmp_path, opened):
    folder = page_runs.make_run(tmp_path / "run", log=False)
    page.write(folder / "report.html", [Source.at(folder)])
    shown = opened((folder / "report.html").as_uri())
    assert "The log holds no figures yet" in text_of(shown, "#curves")
    for tab in TABS:
        show_tab(shown, tab)


def test_texts_that_were_left_out_are_said(runs, groups, tmp_path, opened):
    source = Source.at(runs[0])
    room = page.Room(page.size_without([source]) + 60_000)
    page.write(tmp_path / "page.html", [source], room)
    shown = opened((tmp_path / "page.html").as_uri(), "rollouts")
    assert re.search(r"holds the texts of \d+% of the groups", text_of(shown, "#told"))
    shown.get_by_label("All updates").check()
    assert text_of(shown, "#count").startswith("1,920 of 1,920")
    shown.wait_for_selector("text=text not in this page")


def test_a_served_run_is_followed(tmp_path, groups, opened):
    folder = page_runs.make_run(tmp_path / "run", log=False, final=False)
    lines = [json.dumps(record) + "\n" for record in page_runs.records(9)]
    (folder / "training_log.jsonl").write_text("".join(lines[:5]))
    page_runs.keep(folder, groups[:50])
    with served(folder) as port:
        shown = opened(f"http://127.0.0.1:{port}/", "rollouts")
        shown.evaluate("follow.pause = 50")
        shown.wait_for_selector("#count")
        shown.wait_for_selector(f"text={groups[44]['question']}")
        shown.click("[data-value=probability]")
        shown.locator("#group .token").first.wait_for()
        (folder / "training_log.jsonl").write_text("".join(lines))
        page_runs.keep(folder, groups[50:90], first=50)
        shown.click("text=New completions: show them")
        shown.locator("#group .token").first.wait_for()
        until(shown, "page.runs[0].groups.update.length === 90")
        assert "9, not finished" in text_of(shown, "#runs")
        slide(shown, "#update", str(shown.evaluate("document.querySelector('#update').max")))
        shown.wait_for_selector(f"text={groups[84]['question']}")


def test_a_served_run_that_is_cut_is_shown_anew_and_stays_when_the_server_ends(
    tmp_path, groups, opened
):
    folder = page_runs.make_run(tmp_path / "run", updates=4, final=False)
    page_runs.keep(folder, groups[:80], span=40)
    with served(folder) as port:
        shown = opened(f"http://127.0.0.1:{port}/", "rollouts", complaints=False)
        shown.evaluate("follow.pause = 50")
        until(shown, "page.runs[0].groups.update.length === 80 && !page.reading")
        shown.get_by_label("Search text").fill("question")
        until(shown, "rollouts.looked === 1")
        completions.rewind(folder, 40)
        page_runs.keep(folder, groups[80:84], first=40)
        until(shown, "page.runs[0].groups.update.length === 44")
        until(shown, "rollouts.shown.every((i) => i < page.runs[0].count)")
        shown.locator("#group .card").first.wait_for()
        shown.route("**/*", lambda route: route.abort())  # as if it had ended
        until(shown, "document.body.classList.contains('cut-off')")
        said = shown.evaluate("getComputedStyle(byId('title'), '::after').content")
        assert "the server has ended" in said
        assert shown.locator("#group .card").count(), "what was shown stays"


def test_curves_of_a_served_run_grow_in_their_plots(tmp_path, opened):
    folder = page_runs.make_run(tmp_path / "run", updates=4, final=False)
    with served(folder) as port:
        shown = opened(f"http://127.0.0.1:{port}/")
        shown.evaluate("follow.pause = 50")
        shown.wait_for_selector("canvas")
        shown.evaluate("window.first = curves.plots[0].plot")
        records = [*page_runs.records(9)]
        with (folder / "training_log.jsonl").open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records if 4 < r["update"] < 8)
        until(shown, "curves.plots[0].plot.data[0].length === 7")
        assert shown.evaluate("window.first === curves.plots[0].plot")
        assert shown.evaluate("curves.plots[0].plot.scales.x.max") == 7
        assert shown.evaluate("page.runs[0].records.map((r) => r.update)") == [*range(1, 8)]


def test_a_conversation_is_shown_turn_by_turn(tmp_path, opened):
    folder = page_runs.make_run(tmp_path / "run")
    made = page_runs.group(random.Random(0), 1, 0, size=2)
    for own in made["completions"]:
        own["messages"] = [
            {"role": "assistant", "content": "I ask <b>the tool</b>."},
            {"role": "tool", "content": "42"},
        ]
    page_runs.keep(folder, [made])
    page.write(folder / "report.html", [Source.at(folder)])
    shown = opened((folder / "report.html").as_uri(), "rollouts")
    text = text_of(shown, "#group .card pre >> nth=0")
    assert text.split("\n")[:4] == ["assistant", "I ask <b>the tool</b>.", "tool", "42"]


def many(folder, count):
    page_runs.make_run(folder, updates=count // 128)
    return page_runs.keep(folder, page_runs.groups(count // 128, prompts=16), span=800)


@pytest.mark.parametrize(
    "count", [2_000, *(pytest.param(n, marks=pytest.mark.long) for n in (20_000, 100_000))]
)
def test_of_many_completions_only_those_in_view_are_decoded(tmp_path, opened, count):
    folder = tmp_path / "run"
    many(folder, count)
    with served(folder) as port:
        if count > 20_000:
            address = f"http://127.0.0.1:{port}/"
        else:
            page.write(folder / "report.html", [Source.at(folder)])
            assert (folder / "report.html").stat().st_size < page.LIMIT
            address = (folder / "report.html").as_uri()
        shown = opened(address, "rollouts")
        until(shown, "!page.reading && page.runs[0].count", seconds=120)
        if shown.locator("#fresh").count():
            shown.click("#fresh")
        shown.get_by_label("All updates").check()
        until(shown, f"rollouts.shown.length >= {count - 200}")
        shown.wait_for_selector("#group .card")
        for part in (0.3, 0.6, 0.999):
            shown.evaluate(
                f"(list => list.scrollTop = {part} * list.scrollHeight)(rollouts.list.element)"
            )
            shown.wait_for_timeout(100)
            assert 0 < shown.locator("#rollouts .row").count() < 60
            assert shown.locator("#rollouts .snippet").last.inner_text()
        assert shown.evaluate("page.runs[0].chunks.size") <= 24
        assert shown.evaluate("document.querySelectorAll('*').length") < 2500
