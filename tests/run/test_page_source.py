"""What a page is told of a run: its log, and its completions as columns and chunks."""

import gzip
import itertools
import json
import math
import random

import page_runs
import pytest

from utils.base.errors import UserError
from utils.run import completions, spans
from utils.run.page_source import Shelf, Source, chosen, packed, tokens_of


def unpacked(part):
    return json.loads(gzip.decompress(part))


def kept(text, pieces, logprobs=None, trained=None, mask=None):
    return {
        "text": text,
        "pieces": pieces,
        "sampled_logprobs": logprobs or [-0.5] * len(pieces),
        "trained_logprobs": trained,
        "mask": mask or [1] * len(pieces),
    }


@pytest.mark.parametrize(
    ("text", "pieces", "start", "sizes", "rest"),
    [
        ("<r>\none two", ["one", " two"], 4, [3, 4], ""),  # behind the prefix
        ("one two", ["one", " two"], 0, [3, 4], ""),  # a run without one
        ("<r>\none</a>", ["one", "</a>\n"], 4, [3, 5], "\n"),  # cut within the last token
        ("<r>\n\U0001f600 é", ["\U0001f600", " é"], 4, [2, 2], ""),  # as JavaScript counts
    ],
)
def test_tokens_are_found_in_the_text(text, pieces, start, sizes, rest):
    found = tokens_of(kept(text, pieces), "<r>\n")
    assert (found["start"], found["sizes"], found["rest"]) == (start, sizes, rest)
    utf16 = (text + rest).encode("utf-16-le")
    cut = [
        utf16[2 * (start + sum(sizes[:i])) : 2 * (start + sum(sizes[: i + 1]))].decode("utf-16-le")
        for i in range(len(sizes))
    ]
    assert cut == pieces


def test_tokens_that_do_not_make_the_text_are_told_by_themselves():
    assert tokens_of(kept("é!", ["\ufffd", "\ufffd", "!"]), "")["pieces"] == [
        "\ufffd",
        "\ufffd",
        "!",
    ]
    assert tokens_of(kept("text", []), "") is None, "dropped, to make room"


def test_probabilities_keep_a_hundredth_and_ratios_a_thousandth():
    own = kept("ab", ["a", "b"], [-0.123, -math.inf], [-0.1, -math.inf], [1, 0])
    found = tokens_of(own, "")
    assert found["p"] == [12, 9900]
    assert found["d"] == [23, 0]
    assert found["mask"] == [1, 0]
    assert "mask" not in tokens_of(kept("a", ["a"]), "")
    assert tokens_of(kept("a", ["a"], [math.nan]), "")["p"] == [9900]


def test_a_share_is_spread_over_the_whole_run():
    for share in (0.1, 0.5, 0.9):
        taken = [i for i in range(1000) if chosen(i, share)]
        assert abs(len(taken) - 1000 * share) <= 2
        gaps = [b - a for a, b in itertools.pairwise(taken)]
        assert max(gaps) <= math.ceil(2.7 / share)


def test_columns_and_chunks_hold_what_was_kept(tmp_path):
    folder = page_runs.make_run(tmp_path / "run")
    groups = [*page_runs.groups(20)]
    page_runs.keep(folder, groups, span=70)
    source, shelf = Source.at(folder), Shelf()
    for path in source.spans():
        shelf.add_span(path, source.read(path, tokens=False))
    assert len(shelf) == len(groups)
    facts, first = shelf.facts(), 0
    for n, group in enumerate(groups):
        columns = {name: column[n] for name, column in facts["groups"].items()}
        assert (columns["update"], columns["prompt"]) == (group["update"], group["prompt_index"])
        texts = unpacked(shelf.texts[columns["chunk"]])[columns["place"]]
        assert texts["question"] == group["question"]
        assert [c["text"] for c in texts["completions"]] == [
            c["text"] for c in group["completions"]
        ]
        for i, completion in enumerate(group["completions"], first):
            assert facts["numbers"]["reward"][i] == completion["reward"]
            assert facts["numbers"]["correct"][i] == completion["correct"]
            assert facts["rewards"]["int"][i] == completion["rewards"]["int"]
        first += len(group["completions"])
    assert [*facts["rewards"]] == [*page_runs.REWARDS], "in the order of the settings"
    later = shelf.facts(since=100)
    assert later["groups"]["update"] == facts["groups"]["update"][100:]
    assert (
        later["numbers"]["reward"] == facts["numbers"]["reward"][-len(later["numbers"]["reward"]) :]
    )


def test_token_chunks_belong_to_the_chunks_of_texts(tmp_path):
    folder = page_runs.make_run(tmp_path / "run")
    groups = [*page_runs.groups(6)]
    page_runs.keep(folder, groups, span=33)
    source, shelf = Source.at(folder), Shelf(share=0.6)
    for path in source.spans():
        shelf.add_span(path, source.read(path, tokens=False))
    for path, chunks in shelf.chunks.items():
        read = source.read(path, tokens=True)
        for chunk in chunks:
            shelf.tokens[chunk] = shelf.token_chunk(chunk, read, source.prefix, 1.0)
    told = 0
    for n, group in enumerate(groups):
        columns = {name: column[n] for name, column in shelf.groups.items()}
        assert columns["tokens"] == (columns["chunk"] >= 0)
        if columns["tokens"]:
            told += 1
            found = unpacked(shelf.tokens[columns["chunk"]])[columns["place"]]
            lengths = [c["length"] for c in group["completions"]]
            assert [len(own["p"]) for own in found] == lengths
            assert all(own["start"] == len("<reasoning>\n") for own in found)
    assert 0.5 < told / len(groups) < 0.7


def test_a_reward_that_comes_late_has_no_value_before(tmp_path):
    rng = random.Random(0)
    first, second = (page_runs.group(rng, update, 0, size=2) for update in (1, 2))
    second["completions"][0]["rewards"]["late"] = 1.0
    shelf = Shelf()
    shelf.add(first)
    shelf.add(second)
    assert shelf.rewards["late"] == [None, None, 1.0, None]


def test_text_that_is_no_unicode_is_packed():
    assert unpacked(packed(["\ud83d \0 </script>"])) == ["\ud83d \0 </script>"]


def test_a_damaged_log_is_read_round_the_damage(tmp_path):
    folder = page_runs.make_run(tmp_path / "run")
    path = folder / "training_log.jsonl"
    lines = path.read_bytes().split(b"\n")
    bad = [b"\xff\xfe{", b"[1]", b'{"update": "x"}', b"[" * 100_000]
    path.write_bytes(b"\n".join([*lines[:3], *bad, *lines[3:-1]]) + b'\n{"update": 21, "lo')
    source = Source.at(folder)
    assert len(source.log) == len(lines) - 1
    assert [text.split()[1] for text in source.bad_lines] == ["4", "5", "6", "7"]
    assert len(source.facts()["records"]) == 20, "the line that is being written is no damage"


def test_a_log_is_read_on_from_where_it_was_and_anew_where_it_was_cut(tmp_path):
    folder = page_runs.make_run(tmp_path / "run")
    path = folder / "training_log.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    source = Source.at(folder)
    assert len(source.log) == 5
    for part in (b"".join(lines[:9]) + lines[9][:1], b"".join(lines[:9]), whole):
        path.write_bytes(part)
        source.refresh()
    assert source.log == [json.loads(line) for line in lines]
    other = b"".join(lines[:7]) + b"".join(lines[10:]) + lines[-1] * 4  # longer than it was
    path.write_bytes(other)
    source.refresh()
    assert source.log == [json.loads(line) for line in other.splitlines()]
    assert not source.all_damage()
    path.unlink()
    source.refresh()
    assert source.log == []


def test_damaged_settings_and_spans_are_said_once(tmp_path):
    folder = page_runs.make_run(tmp_path / "run")
    (folder / "config.resolved.json").write_text("{")
    page_runs.keep(folder, page_runs.groups(2))
    (path,) = completions.span_files(folder / "completions", completions.GROUPS)
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    source = Source.at(folder)
    for _ in range(2):
        assert len([*source.read(path, tokens=False)]) == 16, "the piece with the first evaluation"
    assert source.facts()["damaged"][0] == "config.resolved.json cannot be read"
    assert len(source.facts()["damaged"]) == 2


WHOLE = {"n": 9, **page_runs.group(random.Random(0), 1, 0, size=1)}
ODD = [[], {}, 3, {"n": 9}, WHOLE | {"completions": [{}]}, WHOLE | {"completions": [3]}]


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_groups_of_another_kind_are_left_out_and_said(tmp_path, line):
    folder = page_runs.make_run(tmp_path / "run")
    page_runs.keep(folder, [*page_runs.groups(2)][:5])
    (path,) = completions.span_files(folder / "completions", completions.GROUPS)
    spans.append(path, [json.dumps(line)])
    source = Source.at(folder)
    assert len([*source.read(path, tokens=False)]) == 5
    (said,) = source.all_damage()
    assert said.startswith("completions/groups-000000000.jsonl.gz is damaged: ")


def test_what_is_odd_in_a_folder_is_told_all_the_same(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", log=False, settings={"kl_coeff": math.inf})
    (folder / "provenance.json").write_text('{"resumed": 3, "seed": NaN}')
    records = [{"update": 1, "notes": 3}, {"update": 2, "split": 1}, {"update": 3, "split": "test"}]
    records += [{"update": 4, "split": "test", "em": 0.5, "em_subset": 0}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "training_log.jsonl").write_text(text)
    facts = Source.at(folder).facts()
    assert facts["marks"] == []
    assert {record["em"] for record in facts["evaluations"]} == {None}
    told = unpacked(packed(facts))
    assert (told["settings"]["kl_coeff"], told["versions"]["seed"]) == ("inf", "nan")


def test_notes_and_resumptions_are_marks(tmp_path):
    marks = Source.at(page_runs.make_run(tmp_path / "run")).facts()["marks"]
    assert [(mark["update"], mark["kind"]) for mark in marks] == [(10, "note"), (8, "resume")]


def test_figures_that_are_no_numbers_are_unknown(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", log=False)
    text = '{"update": 1, "loss": NaN, "kl": "x", "lr": 1e-5, "flag": true, "own": [1]}\n'
    (folder / "training_log.jsonl").write_text(text)
    facts = Source.at(folder).facts()
    record = dict(zip(facts["figures"], facts["records"][0], strict=True))
    assert record == {"update": 1, "loss": None, "kl": None, "lr": 1e-5, "flag": None, "own": None}


def test_secrets_of_an_older_run_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx")
    settings = {"remote_rm_url": ["https://ann:hunter2@host/"]}
    folder = page_runs.make_run(tmp_path / "run", settings=settings)
    (folder / "training_log.jsonl").write_text(
        '{"update": 1, "notes": ["hf_abcdefghijklmnopqrstuvwx"]}\n'
    )
    told = json.dumps(Source.at(folder).facts())
    assert "hunter2" not in told
    assert "hf_abc" not in told


@pytest.mark.parametrize("name", ["none", "file", "empty"])
def test_what_is_no_run_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="output_dir"):
        Source.at(tmp_path / name)
