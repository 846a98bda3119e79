"""The file of a page: its room, its security policy, and that nothing else is overwritten."""

import base64
import gzip
import hashlib
import html
import itertools
import json
import re

import page_runs
import pytest

from utils.base.errors import DiskError, UserError
from utils.run import ours, page
from utils.run.page_source import Source


@pytest.fixture
def run(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", updates=30)
    page_runs.keep(folder, page_runs.groups(30), span=60)
    return folder


def data_of(text, name="data"):
    found = re.search(rf'<script type="text/plain" id={name}>([^<]*)</script>', text)
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_a_page_holds_everything(run):
    path = run / "report.html"
    page.write(path, [Source.at(run)])
    text = path.read_text()
    (told,) = data_of(text)["runs"]
    count = 30 * 64 + 4 * 20
    assert len(told["completions"]["numbers"]["reward"]) == count
    assert told["kept"] == {"text": 1.0, "tokens": 1.0, "whole": True}
    for kind in ("text", "tokens"):
        chunks = [data_of(text, f"{kind}-0-{n}") for n in {*told["completions"]["groups"]["chunk"]}]
        assert sum(map(len, chunks)) == 30 * 8 + 4 * 20
    assert not [*run.glob(".*.partial")]


@pytest.mark.parametrize("part", [0.85, 0.4])
def test_what_does_not_fit_is_sampled(run, part):
    path, without = run / "report.html", page.size_without([Source.at(run)])
    page.write(path, [Source.at(run)])
    size = int(without + part * (path.stat().st_size - without))
    (kept,) = page.write(path, [Source.at(run)], page.Room(size))
    assert path.stat().st_size < size
    (told,) = data_of(path.read_text())["runs"]
    assert len(told["completions"]["numbers"]["reward"]) == 30 * 64 + 4 * 20, "numbers stay"
    assert told["kept"]["tokens"] < 1
    if part < 0.5:
        assert told["kept"]["text"] < 1
        updates = {
            update
            for update, chunk in zip(*map(kept.shelf.groups.get, ("update", "chunk")), strict=True)
            if chunk >= 0
        }
        assert len(updates) > 15, "all over the run"


def over_after(groups):
    """Time for so many groups."""
    asked = []

    def is_over(share):
        asked.append(share)
        return share == page.FOR_READING and asked.count(share) > groups

    return page.Room(limited=True, is_over=is_over)


@pytest.mark.parametrize("span", [60, 1000])
def test_where_time_is_short_updates_from_all_over_the_run_are_read(tmp_path, span):
    run = page_runs.make_run(tmp_path / "run", updates=30)
    page_runs.keep(run, page_runs.groups(30), span=span)
    (kept,) = page.write(run / "report.html", [Source.at(run)], over_after(180))
    assert not kept.sample.whole
    groups = kept.shelf.groups
    updates = groups["update"]
    assert updates == sorted(updates)
    evaluated = [u for u, own in zip(updates, groups["set"], strict=True) if own == 0]
    assert {0, 30} <= {*evaluated}, "the first and the last evaluation"
    assert (evaluated.count(0), evaluated.count(30)) == (20, 20), "all of them"
    trained = sorted({*updates} - {0})
    assert {1, 30} <= {*trained}
    assert max(b - a for a, b in itertools.pairwise(trained)) <= 6, "spread over the run"
    (told,) = data_of((run / "report.html").read_text())["runs"]
    assert told["kept"]["whole"] is False
    assert told["kept"]["completions"] == 30 * 64 + 4 * 20
    assert told["kept"]["updates"][1] == 30
    assert told["kept"]["evaluations"][1] == 4
    assert told["kept"]["tokens"] == 1.0
    assert all(groups["tokens"])


def test_where_time_is_short_for_tokens_those_of_the_whole_run_are_there(run):
    asked = itertools.count()

    def is_over(share):
        return share > page.FOR_PACKING and next(asked) % 3 > 0 and share < page.FOR_TOKENS

    room = page.Room(limited=True, is_over=is_over)
    (kept,) = page.write(run / "report.html", [Source.at(run)], room)
    groups = kept.shelf.groups
    known = [u for u, has in zip(groups["update"], groups["tokens"], strict=True) if has]
    assert {1, 30} <= {*known}
    assert max(b - a for a, b in itertools.pairwise(sorted({*known}))) < 16
    assert 0.3 < kept.tokens < 0.8
    chunks = {
        chunk
        for chunk, has in zip(groups["chunk"], groups["tokens"], strict=True)
        if has and chunk >= 0
    }
    text = (run / "report.html").read_text()
    for chunk in chunks:
        for own, texts in zip(
            data_of(text, f"tokens-0-{chunk}"), data_of(text, f"text-0-{chunk}"), strict=True
        ):
            assert len(own) == len(texts["completions"])
            assert sum(own[0]["sizes"]) + own[0]["start"] == len(texts["completions"][0]["text"])


def test_a_page_for_which_there_is_time_is_the_same_as_one_without_a_limit(run):
    told, kinds = [], ("text-0-0", "tokens-0-0", "text-0-3", "tokens-0-3")
    for room in (page.Room(), page.Room(limited=True)):
        page.write(run / "report.html", [Source.at(run)], room)
        text = (run / "report.html").read_text()
        told.append([data_of(text), *(data_of(text, kind) for kind in kinds)])
    assert told[0] == told[1]


def test_where_there_is_hardly_time_a_part_of_the_newest_is_there(run):
    asked = []

    def is_over(share):
        asked.append(share)
        return len(asked) > 10

    (kept,) = page.write(
        run / "report.html", [Source.at(run)], page.Room(limited=True, is_over=is_over)
    )
    assert (kept.sample.whole, kept.tokens) == (False, 0)
    assert 0 < len(kept.shelf) < 10
    assert {*kept.shelf.groups["update"]} == {30}


def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(run):
    page.write(run / "report.html", [Source.at(run)])
    text = (run / "report.html").read_text()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == len(page.SCRIPTS)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!github\.com/leeoniya|www\.w3\.org)", text), "no network"


def test_no_asset_ends_its_own_element():
    for name in (*page.SCRIPTS, *page.STYLES):
        assert not re.search(r"</(script|style)|<!--", page.asset(name), re.IGNORECASE)


def test_uplot_is_as_it_was_published():
    """The files of npm's uplot 1.6.32, with its licence (MIT) beside them."""
    digest = hashlib.sha256((page.ASSETS / "uPlot.iife.min.js").read_bytes()).hexdigest()
    assert digest == UPLOT
    assert "MIT License" in (page.ASSETS / "uPlot.LICENSE").read_text()


UPLOT = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"


def test_a_page_carries_the_licence_of_what_it_carries(run):
    page.write(run / "report.html", [Source.at(run)])
    text = (run / "report.html").read_text()
    assert page.asset("uPlot.LICENSE") in text
    assert "--" not in page.asset("uPlot.LICENSE"), "it would end the comment"


def test_a_page_is_replaced_and_nothing_else(run, tmp_path):
    path = tmp_path / "mine.html"
    path.write_text("my own")
    with pytest.raises(UserError, match="no page of this command"):
        page.write(path, [Source.at(run)])
    assert path.read_text() == "my own"
    for _ in range(2):
        page.write(run / "report.html", [Source.at(run)])
    assert ours.known(run / "report.html")
    with pytest.raises(UserError, match="is a folder"):
        page.write(tmp_path, [Source.at(run)])
    with pytest.raises(UserError, match="there is no folder"):
        page.write(tmp_path / "none" / "a.html", [Source.at(run)])


def test_a_disk_that_refuses_leaves_the_old_page(run, monkeypatch):
    path = run / "report.html"
    page.write(path, [Source.at(run)])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(DiskError, match="No space left"):
        page.write(path, [Source.at(run)])
    assert path.read_bytes() == before
    assert not [*run.glob(".*.partial")]
