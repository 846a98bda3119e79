"""Questions and prompts: files, columns, the hub, lengths."""

import csv
import json
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from helpers import QUIET, completion, make_config, make_trainer, write_toml

from utils.base.errors import UserError
from utils.data import files, questions
from utils.rewards.answers import as_number, same_answer
from utils.settings.run_settings import SYSTEM_PROMPT

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### -3\n", "-3"),
        ("#### 1,234", "1,234"),
        ("a #### 1\nb #### 2", "2"),
        ("72", None),
        ("", None),
        ("####", ""),
    ],
)
def test_extract_hash_answer(grpo, text, answer):
    assert grpo.extract_hash_answer(text) == answer


ROWS = [
    {
        "question": f'What is "{n}", plus\n{n}?',
        "answer": f"{n} + {n}\n#### {2 * n}",
        "level": f"é{n}",
    }
    for n in range(20)
]


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8-sig")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def config_of(grpo, tmp_path, **settings):
    return grpo.read_config(write_toml(tmp_path, settings), [])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(grpo, tmp_path, suffix):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / f"train{suffix}", ROWS[:15])
    write_rows(tmp_path / "data" / f"test{suffix}", ROWS[15:])
    config = config_of(grpo, tmp_path, dataset=str(tmp_path / "data"), system_prompt="Think.")
    train, test = (grpo.load_questions(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 5)
    assert train[3] == {
        "question": 'What is "3", plus\n3?',
        "answer": "6",
        "solution": "3 + 3\n#### 6",
        "level": "é3",
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": 'What is "3", plus\n3?'},
        ],
    }
    assert [row["answer"] for row in train + test] == [str(2 * n) for n in range(20)]


def test_own_column_and_split_names_and_no_system_message(grpo, tmp_path):
    rows = [{"text": "Who?", "label": 7, "answer": "not this", "question": "nor this"}]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "validation.jsonl", rows)
    config = config_of(
        grpo,
        tmp_path,
        dataset=str(tmp_path / "data"),
        train_split="validation",
        question_column="text",
        answer_column="label",
        system_prompt="",
    )
    (row,) = grpo.load_questions(config, "train")
    assert (row["question"], row["answer"], row["solution"]) == ("Who?", "7", 7)
    assert row["prompt"] == [{"role": "user", "content": "Who?"}]
    own = questions.as_question(config, {**rows[0], "solution": "worked out"})
    assert own["solution"] == "worked out", "a column of that name is the data's own"


WRITTEN = [
    (0.1, "0.1"),
    (0.000005, "0.000005"),
    (1e5, "100000"),
    (72.0, "72"),
    (-0.5, "-0.5"),
    (1e22, "1e+22"),
    (0.30000000000000004, "0.30000000000000004"),
    (Decimal("5E-7"), "0.0000005"),
    (Decimal("1.50"), "1.5"),
    (Decimal("12345678901234567890.123456789"), "12345678901234567890.123456789"),
    (10**20, "100000000000000000000"),
    (True, "True"),
    (" 1e5 ", "1e5"),
    ("72.0", "72.0"),
]


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_an_answer_is_the_number_that_the_user_wrote(value, text):
    assert questions.written(value) == text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_columns_of_floats_are_answers_as_they_were_written(grpo, tmp_path, suffix):
    """Also after a way through 32 and 16 bits, which Python shows as 0.10000000149011612."""
    wrote = ["0.1", "5e-06", "1e5", "72", "-2.5"]
    path = tmp_path / f"floats{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        columns = {"question": ["?"] * 5, "answer": pyarrow.array(map(float, wrote), "float32")}
        half = np.array([0.1, 0.2, 0.3, 72, -2.5], np.float16)
        columns |= {"half": pyarrow.array(half), "double": [float(text) for text in wrote]}
        columns["none"] = pyarrow.array([None, 0.1, 0.2, 0.3, 0.4], "float32")
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        rows = files.read_rows(path)
        assert [row["half"] for row in rows[:1] + rows[3:]] == [0.1, 72.0, -2.5]
        assert [row["none"] for row in rows] == [None, 0.1, 0.2, 0.3, 0.4]
        assert [row["double"] for row in rows] == [0.1, 5e-06, 1e5, 72.0, -2.5]
    elif suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"?,{text}\n" for text in wrote))
    else:
        lines = [f'{{"question": "?", "answer": {text}}}' for text in wrote]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    config = config_of(grpo, tmp_path, dataset=str(path), eval_samples=0)
    answers = [row["answer"] for row in grpo.load_questions(config, "train")]
    if suffix != ".csv":
        assert answers == ["0.1", "0.000005", "100000", "72", "-2.5"]
    assert all(map(same_answer, ["0.1", "0.000005", "100000", "72", "-2.5"], answers))
    assert all(map(same_answer, wrote, answers))


def test_floats_from_the_hub_are_as_they_were_written(grpo, tmp_path, monkeypatch):
    import datasets

    rows = {"question": ["?", "?"], "answer": [0.1, 5e-06]}
    kinds = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("float32")}
    )
    data = datasets.Dataset.from_dict(rows, features=kinds)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    monkeypatch.chdir(tmp_path)
    answers = [row["answer"] for row in grpo.get_gsm8k_questions()]
    assert answers == ["0.1", "0.000005"]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (19, 1), (20, 2)])
def test_a_single_file_holds_out_its_last_tenth(grpo, tmp_path, count, held_out):
    path = write_rows(tmp_path / "all.jsonl", ROWS[:count])
    config = config_of(grpo, tmp_path, dataset=str(path))
    train, test = (grpo.load_questions(config, split) for split in ("train", "test"))
    asked = [row["question"] for row in train + test]
    assert asked == [row["question"] for row in ROWS[:count]], "all of them, none twice"
    assert len(test) == held_out
    config = config_of(grpo, tmp_path, dataset=str(path), eval_samples=0)
    assert len(grpo.load_questions(config, "train")) == count, "nothing to hold out for"


def test_the_hub_is_asked_for_name_configuration_and_split(grpo, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return ROWS if options["split"] == "train" else ROWS[:2]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert [row["answer"] for row in grpo.get_gsm8k_questions("test")] == ["0", "2"]
    assert grpo.get_gsm8k_questions()[5]["prompt"] == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": ROWS[5]["question"]},
    ]
    settings = {"dataset": "owner/maths", "dataset_config": "hard", "test_split": "validation"}
    assert len(grpo.load_questions(config_of(grpo, tmp_path, **settings), "test")) == 2
    assert asked == [
        ("openai/gsm8k", "main", {"split": "test"}),
        ("openai/gsm8k", "main", {"split": "train"}),
        ("owner/maths", "hard", {"split": "validation"}),
    ]


def test_an_empty_split_on_the_hub_is_refused(grpo, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"openai/gsm8k \(main, test\) holds no rows"):
        grpo.get_gsm8k_questions("test")


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K files in {GSM8K}")
def test_the_real_gsm8k(grpo, tmp_path):
    config = config_of(grpo, tmp_path, dataset=str(GSM8K))
    train, test = (grpo.load_questions(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 660)
    assert train[0]["answer"] == "72"
    assert train[0]["question"].startswith("Natalia sold clips to 48 of her friends in April")
    assert all(as_number(row["answer"]) is not None for row in train + test)
    assert all(row["solution"].endswith(f"#### {row['answer']}") for row in train + test)
    assert not {row["question"] for row in train} & {row["question"] for row in test}


def test_a_prompt_without_tokens_is_left_out(grpo, capsys):
    rows = [{"prompt_ids": ids} for ids in ([], [5], [5] * 512, [5] * 513)]
    kept = files.usable_prompts(grpo.MLXGRPOConfig(), rows, "training", 9)
    assert [len(row["prompt_ids"]) for row in kept] == [1, 512]
    assert "2 training prompts" in capsys.readouterr().out


def test_prompts_that_are_too_long_are_left_out_and_counted(
    grpo, model_dir, data_dir, tmp_path, capsys
):
    settings = {"eval_samples": 3, "max_completion_length": 60}
    whole = grpo.build_trainer(make_config(model_dir, data_dir, tmp_path / "o", **settings), "test")
    assert "left out" not in capsys.readouterr().out
    lengths = {len(row["prompt_ids"]) for row in whole.train_dataset}
    limit = next(length for length in sorted(lengths) if length + 1 in lengths)
    config = make_config(model_dir, data_dir, tmp_path / "o", max_prompt_length=limit, **settings)
    trainer = grpo.build_trainer(config, "test")
    kept = [row for row in whole.train_dataset if len(row["prompt_ids"]) <= limit]
    assert trainer.train_dataset == kept, "whole or not at all"
    assert max(len(row["prompt_ids"]) for row in kept) == limit
    out = capsys.readouterr().out
    assert f"{24 - len(kept)} training prompts over {limit} tokens left out" in out
    assert "evaluation prompts over" in out
    assert trainer.total_updates == -(-len(kept) // QUIET["gradient_accumulation_steps"])


def test_a_column_named_like_ours_does_not_replace_ours(grpo, model_dir, data_dir, tmp_path):
    """A data set may have columns called prompt or completions; rewards see the model's."""
    config = SimpleNamespace(question_column="question", answer_column="answer", system_prompt="")
    row = questions.as_question(config, {"question": "a", "answer": "1", "prompt": "theirs"})
    assert row["prompt"] == [{"role": "user", "content": "a"}]

    def lengths(completions, trainer_state, completion_ids, **_):
        assert trainer_state.max_steps == 12
        pairs = zip(completions, completion_ids, strict=True)
        return [len(said[0]["content"]) + ids[0] for said, ids in pairs]

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", lengths)
    theirs = dict.fromkeys(("completions", "completion_ids", "trainer_state"), "theirs")
    rows = [{**row, **theirs, "prompt_ids": [1]}] * 2
    responses = [completion([5], text=text) for text in ("a", "bcd")]
    assert trainer.compute_rewards(rows, responses)[0].tolist() == [6.0, 8.0]
