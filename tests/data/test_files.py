"""Questions and prompts: answers, files, columns, the hub, chat templates, lengths."""

import csv
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT, make_model
from helpers import QUIET, make_config, make_trainer, write_toml

from utils.base.errors import UserError
from utils.data import files

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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<reasoning>\nx\n</reasoning>\n<answer>\n72\n</answer>", "72"),
        ("<answer>72</answer>", "72"),
        ("<answer>1</answer> no: <answer>2</answer> done", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>72", ""),
        ("72</answer>", ""),
        ("</answer>72<answer>", ""),
        ("72", ""),
        ("", ""),
    ],
)
def test_extract_xml_answer(grpo, text, answer):
    assert grpo.extract_xml_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1234", 1234),
        ("1,234.00", 1234),
        ("$1234", 1234),
        (" 1,234,567 ", 1234567),
        ("-3", -3),
        ("+3", 3),
        ("-$3", -3),
        ("3.", 3),
        (".5", 0.5),
        ("0.1", None),
        ("12,34", None),
        ("1,2345", None),
        ("3 apples", None),
        ("3 4", None),
        ("1e3", None),
        ("nan", None),
        ("Infinity", None),
        ("٣", None),
        ("-", None),
        ("", None),
    ],
)
def test_as_number(grpo, text, number):
    if text == "0.1":  # exact, which 0.1 as a float is not
        assert str(grpo.as_number(text)) == "0.1"
    else:
        assert grpo.as_number(text) == number


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234.00", "1234", True),
        ("$1234", "1,234", True),
        ("-3", "-3.0", True),
        ("-3", "3", False),
        ("0.1", ".10", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("Paris ", "Paris", True),
        ("paris", "Paris", False),
        ("3 apples", "3", False),
        ("", "3", False),
    ],
)
def test_same_answer(grpo, one, other, same):
    assert grpo.same_answer(one, other) is same
    assert grpo.same_answer(other, one) is same


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
    own = grpo.as_question(config, {**rows[0], "solution": "worked out"})
    assert own["solution"] == "worked out", "a column of that name is the data's own"


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (19, 1), (20, 2)])
def test_a_single_file_holds_out_its_last_tenth(grpo, tmp_path, count, held_out):
    path = write_rows(tmp_path / "all.jsonl", ROWS[:count])
    config = config_of(grpo, tmp_path, dataset=str(path))
    train, test = (grpo.load_questions(config, split) for split in ("train", "test"))
    questions = [row["question"] for row in train + test]
    assert questions == [row["question"] for row in ROWS[:count]], "all of them, none twice"
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
        {"role": "system", "content": grpo.SYSTEM_PROMPT},
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
    assert all(grpo.as_number(row["answer"]) is not None for row in train + test)
    assert all(row["solution"].endswith(f"#### {row['answer']}") for row in train + test)
    assert not {row["question"] for row in train} & {row["question"] for row in test}


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(model_dir)


ROW = {
    "prompt": [{"role": "system", "content": " Think. "}, {"role": "user", "content": "How many?"}]
}


def test_a_prompt_is_template_then_prefix_tokenized_apart(grpo, tokenizer):
    config = grpo.MLXGRPOConfig()
    ids = grpo.encode_prompt(tokenizer, config, ROW)
    template = tokenizer.apply_chat_template(ROW["prompt"], add_generation_prompt=True)
    assert ids == [*template, *tokenizer.encode("<reasoning>\n", add_special_tokens=False)]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\n Think. <|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n<reasoning>\n"
    )


def test_a_prompt_without_tokens_is_left_out(grpo, capsys):
    rows = [{"prompt_ids": ids} for ids in ([], [5], [5] * 512, [5] * 513)]
    kept = files.usable_prompts(grpo.MLXGRPOConfig(), rows, "training", 9)
    assert [len(row["prompt_ids"]) for row in kept] == [1, 512]
    assert "2 training prompts" in capsys.readouterr().out


def test_no_text_begins_anew_at_the_prefix(grpo, tokenizer, tmp_path):
    """Many tokenizers put a token before whatever they encode."""
    from mlx_lm.utils import load_tokenizer
    from tokenizers import Tokenizer, processors

    folder = make_model(tmp_path / "model")
    with_bos = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with_bos.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with_bos.save(str(folder / "tokenizer.json"))
    other = load_tokenizer(folder)
    assert other.encode("so") == [0, *tokenizer.encode("so")]
    config = grpo.MLXGRPOConfig()
    assert grpo.encode_prompt(other, config, ROW) == grpo.encode_prompt(tokenizer, config, ROW)


def test_no_merge_crosses_the_border_to_the_prefix(grpo, tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}<reas")
    config = grpo.MLXGRPOConfig(
        chat_template=str(tmp_path / "own.jinja"), reasoning_prefix="oning>"
    )
    ids = grpo.encode_prompt(tokenizer, config, ROW)
    apart = [
        tokenizer.encode(text, add_special_tokens=False) for text in ("How many?<reas", "oning>")
    ]
    assert ids == apart[0] + apart[1]
    together = tokenizer.encode("How many?<reasoning>", add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer.decode(together)
    assert ids != together, "the same text in other tokens, or the test shows nothing"


def test_plain_needs_no_template(grpo, tokenizer):
    config = grpo.MLXGRPOConfig(chat_template="plain", reasoning_prefix="Answer: ")
    ids = grpo.encode_prompt(tokenizer, config, ROW)
    assert tokenizer.decode(ids) == "Think.\n\nHow many?\n\nAnswer: "


def test_chat_template_kwargs_reach_the_template(grpo, tokenizer, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[-1].content }}{% if not enable_thinking %} Quick!{% endif %}")
    texts = [
        tokenizer.decode(
            grpo.encode_prompt(
                tokenizer,
                grpo.MLXGRPOConfig(
                    chat_template=str(template),
                    chat_template_kwargs={"enable_thinking": thinking},
                    reasoning_prefix="",
                ),
                ROW,
            )
        )
        for thinking in (True, False)
    ]
    assert texts == ["How many?", "How many? Quick!"]


def test_the_settings_arrive_in_the_prompts_of_training_and_evaluation(
    grpo, model_dir, data_dir, tmp_path
):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ end }}{% endfor %}"
    )
    config = make_config(
        model_dir,
        data_dir,
        tmp_path / "out",
        system_prompt="Think.",
        chat_template=str(tmp_path / "own.jinja"),
        chat_template_kwargs={"end": "!"},
        reasoning_prefix="Well, ",
        eval_samples=3,
        max_train_samples=4,
    )
    trainer = grpo.build_trainer(config, "test")
    assert len(trainer.train_dataset) == 4
    for row in (*trainer.train_dataset, *trainer.eval_dataset):
        text = trainer.tokenizer.decode(row["prompt_ids"])
        assert text == f"system: Think.!user: {row['question']}!Well, "


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
    row = grpo.as_question(config, {"question": "a", "answer": "1", "prompt": "theirs"})
    assert row["prompt"] == [{"role": "user", "content": "a"}]

    def lengths(completions, trainer_state, completion_ids, **_):
        assert trainer_state.max_steps == 12
        pairs = zip(completions, completion_ids, strict=True)
        return [len(completion[0]["content"]) + ids[0] for completion, ids in pairs]

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", lengths)
    theirs = dict.fromkeys(("completions", "completion_ids", "trainer_state"), "theirs")
    rows = [{**row, **theirs, "prompt_ids": [1]}] * 2
    responses = [grpo.Completion([5], text=text) for text in ("a", "bcd")]
    assert trainer.compute_rewards(rows, responses)[0].tolist() == [6.0, 8.0]
