"""Data as others keep it: read, or refused with what to do."""

import json

import datasets
import pytest

from utils.base.errors import UserError
from utils.data import files, questions

ROWS = [{"question": f"How many is {n}?", "answer": str(n)} for n in range(40)]


def load(grpo, folder, split="train", **settings):
    return questions.load_questions(grpo.MLXGRPOConfig(dataset=str(folder), **settings), split)


def asked(rows):
    return [row["question"] for row in rows]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_an_object_a_line_in_a_file_named_json(grpo, tmp_path):
    """`datasets` reads it, too; the name of a place is kept."""
    (tmp_path / "train.json").write_text(lines(ROWS))
    (tmp_path / "test.json").write_text(json.dumps(ROWS[:3]))
    assert asked(load(grpo, tmp_path)) == asked(ROWS)
    assert asked(load(grpo, tmp_path, "test")) == asked(ROWS[:3])
    (tmp_path / "train.json").write_text(lines(ROWS[:2]) + "{no\n")
    with pytest.raises(UserError, match=r"train.json, line 3, column 2: not JSON"):
        load(grpo, tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_what_save_to_disk_wrote(grpo, tmp_path, several):
    rows = datasets.Dataset.from_list(ROWS)
    if several:
        rows = datasets.DatasetDict({"train": rows, "test": rows.select(range(3))})
    rows.save_to_disk(str(tmp_path / "saved"))
    train, test = load(grpo, tmp_path / "saved"), load(grpo, tmp_path / "saved", "test")
    assert asked(train) == asked(ROWS[: 40 if several else 36])
    assert asked(test) == asked(ROWS[:3] if several else ROWS[36:])
    assert train[7]["answer"] == "7"


@pytest.mark.parametrize("place", ["main", "data", "."])
def test_a_clone_of_a_repository_of_the_hub(grpo, tmp_path, place):
    """Shards in order; the configuration is a folder, or there is one for all."""
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    for number, part in enumerate((ROWS[:25], ROWS[25:])):
        name = f"train-0000{number}-of-00002.parquet"
        datasets.Dataset.from_list(part).to_parquet(str(folder / name))
    test = datasets.Dataset.from_list(ROWS[:3])
    test.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    assert asked(load(grpo, tmp_path)) == asked(ROWS)
    assert asked(load(grpo, tmp_path, "test")) == asked(ROWS[:3])


def test_a_folder_without_a_test_split_keeps_its_last_tenth(grpo, tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS))
    assert asked(load(grpo, tmp_path)) == asked(ROWS[:36])
    assert asked(load(grpo, tmp_path, "test")) == asked(ROWS[36:])
    assert asked(load(grpo, tmp_path, eval_samples=0)) == asked(ROWS)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no file train.jsonl"):
        load(grpo, tmp_path)


@pytest.mark.parametrize("system", ["", "Think."])
def test_prompts_that_are_conversations(grpo, tmp_path, system):
    """TRL's `prompt`: the messages are asked as they are; one's own system message stays."""
    user = {"role": "user", "content": "How many is 7?"}
    own = {"role": "system", "content": "Mine."}
    shot = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    prompts = [[user], [own, user], [*shot, user]]
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": p, "answer": "7"} for p in prompts]))
    settings = {"question_column": "prompt", "system_prompt": system, "eval_samples": 0}
    rows = load(grpo, tmp_path / "a.jsonl", **settings)
    assert asked(rows) == ["How many is 7?"] * 3
    first = [{"role": "system", "content": system}] if system else []
    assert [r["prompt"] for r in rows] == [[*first, user], [own, user], [*first, *shot, user]]


def test_rows_of_verl(grpo, tmp_path):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "How many is 7?"}],
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 0},
    }
    datasets.Dataset.from_list([row] * 4).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError) as raised:
        load(grpo, tmp_path / "a.parquet", eval_samples=0)
    advice = "set question_column=prompt and answer_column=reward_model.ground_truth"
    assert str(raised.value).endswith(advice)
    settings = {"question_column": "prompt", "answer_column": "reward_model.ground_truth"}
    rows = load(grpo, tmp_path / "a.parquet", eval_samples=0, **settings)
    assert [(r["question"], r["answer"]) for r in rows] == [("How many is 7?", "7")] * 4


@pytest.mark.parametrize("column", ["image", "images", "audio", "video"])
def test_pictures_are_not_left_out_in_silence(grpo, tmp_path, column):
    (tmp_path / "a.jsonl").write_text(lines([{**ROWS[0], column: ["cat.png"]}] * 3))
    with pytest.raises(UserError, match=rf"has the column '{column}', and only text is trained"):
        load(grpo, tmp_path / "a.jsonl", eval_samples=0)
    (tmp_path / "a.jsonl").write_text(lines([{**ROWS[0], column: None}] * 3))
    assert len(load(grpo, tmp_path / "a.jsonl", eval_samples=0)) == 3


@pytest.mark.parametrize(
    "value",
    [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text", "text": "1?"}]}],
        [{"role": "assistant", "content": "1"}],
        ["How many?"],
        {"role": "user", "content": "1?"},
    ],
    ids=["empty", "no text", "parts", "answered", "texts", "one"],
)
def test_other_lists_are_no_questions(grpo, tmp_path, value):
    assert not files.is_conversation(value)
    (tmp_path / "a.jsonl").write_text(lines([{"question": value, "answer": "7"}] * 2))
    with pytest.raises(UserError, match=r"row 1: (list|dict) instead of a text"):
        load(grpo, tmp_path / "a.jsonl", eval_samples=0)
