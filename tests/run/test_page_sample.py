"""Which completions a page holds where time is short."""

import itertools

import page_runs
import pytest

from utils.run import completions, page_sample
from utils.run.page_source import Source


@pytest.fixture
def run(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", updates=30)
    page_runs.keep(folder, page_runs.groups(30), span=100)
    return folder


def taken(run, groups=10_000):
    asked = itertools.count()
    return page_sample.taken(Source.at(run), lambda share: next(asked) > groups, 2, 2)


def test_all_is_taken_where_there_is_time(run):
    sample = taken(run)
    assert sample.whole
    found = [group for own in sample.groups.values() for _, group in own]
    expected = [*completions.read(run, tokens=False)]
    for group in expected:
        for kept in group["completions"]:
            for name in page_runs.TOKENS:
                kept.pop(name)
    assert found == expected
    assert (sample.completions, sample.updates, sample.evaluations) == (2000, (30, 30), (4, 4))


def test_the_ends_of_each_set_come_first(run):
    source = Source.at(run)
    parts = [
        part
        for path in source.spans()
        for part in page_sample.parts_of(source, path, path.read_bytes())
    ]
    order = [(parts[i].set, parts[i].update) for i in page_sample.in_order(parts)]
    assert order[:4] == [("eval test", 30), ("eval test", 0), ("train", 30), ("train", 1)]
    assert len(order) == len(parts)


def test_what_is_missing_is_counted(run):
    sample = taken(run, groups=130)
    assert not sample.whole
    assert sample.completions == 2000, "of the run"
    (held, every), (evaluations, of) = sample.updates, sample.evaluations
    assert (every, of) == (30, 4)
    assert 2 < held < 30
    assert 2 <= evaluations <= 4


def test_a_torn_end_is_nothing_and_other_damage_is_said(run):
    (*_, newest) = completions.span_files(run / "completions", completions.GROUPS)
    newest.write_bytes(newest.read_bytes()[:-9])
    source = Source.at(run)
    sample = page_sample.taken(source, lambda share: False, 2, 2)
    assert sample.updates[0] == 30, "the evaluation after the last update is gone"
    assert sample.evaluations[0] == 3
    assert source.all_damage() == []
    data = bytearray(newest.read_bytes())
    data[60] ^= 0xFF
    newest.write_bytes(data)
    source = Source.at(run)
    page_sample.taken(source, lambda share: False, 2, 2)
    assert len(source.all_damage()) == 1
    assert f"completions/{newest.name} is damaged" in source.all_damage()[0]
