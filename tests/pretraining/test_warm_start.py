"""Examples of a warm start have the ids that GRPO would have trained."""

import json

import pytest
from conftest import ROOT
from helpers import make_config, make_trainer, write_toml

from utils.base.errors import RunError, UserError
from utils.data import questions
from utils.pretraining import warm_start
from utils.rollouts.stop_rule import StopRule

TINY = ROOT / "models/tiny-math"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# What the public templates of these families do, on the tokens of the test's tokenizer.
FAMILIES = {
    "chatml": TURN + OPEN,
    "qwen2.5, with a system prompt of its own": "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nI help.<|im_end|>\n{% endif %}" + TURN + OPEN,
    "qwen3, which drops earlier thoughts": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' and not loop.last"
    " else m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
    "\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
    "llama 2, whose turns end with the text": "{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'system' %}{{ m.content }}\n{% else %} "
    "{{ m.content }}<|endoftext|>{% endif %}{% endfor %}",
    "gemma, which trims": "{% for m in messages %}<|im_start|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
}
QUESTION = "How many apples are 1 + 2?"
SAID = "1 + 2 = 3\n</reasoning>\n<answer>\n3\n</answer>"


@pytest.fixture
def place(tmp_path):
    rows = [{"question": QUESTION, "answer": "3"}] * 2
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def examples_of(config, folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return warm_start.read_examples(config, str(path))


def trainer_of(model_dir, place, **settings):
    return make_trainer(model_dir, place, place / "out", **{"max_new_tokens": 64} | settings)


def encoder(trainer):
    tokenizer, config = trainer.loaded.tokenizer, trainer.args
    stop = StopRule(tokenizer, config.stop_strings, config.reasoning_prefix)
    return warm_start.Encoder(tokenizer, trainer.loaded.vocabulary, config, stop)


def encoded(trainer, folder, *rows):
    """(prompt, completion) of each example, as texts and as ids."""
    found = encoder(trainer).rows(examples_of(trainer.args, folder, *rows))
    return [(row["prompt_ids"], row["completion_ids"]) for row in found]


def text_of(trainer, ids):
    return trainer.tokenizer.decode(ids)


@pytest.mark.parametrize("system_prompt", ["", "Think, and say {{ why }}."])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_that_the_trainer_asks(model_dir, place, family, system_prompt):
    (place / "own.jinja").write_text(FAMILIES[family])
    how = {"chat_template": str(place / "own.jinja"), "system_prompt": system_prompt}
    how |= {"chat_template_kwargs": {"enable_thinking": False}}
    trainer = trainer_of(model_dir, place, **how)
    ((prompt, completion),) = encoded(trainer, place, {"question": QUESTION, "answer": SAID})
    assert prompt == trainer.train_dataset[0]["prompt_ids"]
    assert text_of(trainer, prompt).endswith("<reasoning>\n")
    assert text_of(trainer, completion) == SAID


@pytest.mark.parametrize(
    ("family", "end"), [(name, 0 if name.startswith("llama") else 2) for name in FAMILIES]
)
def test_without_stop_strings_the_end_of_a_turn_is_trained(model_dir, place, family, end):
    """By the template, which knows which of several tokens ends an answer."""
    (place / "own.jinja").write_text(FAMILIES[family])
    how = {"chat_template": str(place / "own.jinja"), "stop_strings": []}
    trainer = trainer_of(model_dir, place, **how)
    trainer.tokenizer.eos_token_ids = {0, 2}
    for text in (SAID, f"{SAID}<|im_end|>"):
        ((_, completion),) = encoded(trainer, place, {"question": QUESTION, "answer": text})
        assert completion[-1] == end
        assert text_of(trainer, completion[:-1]) == SAID


def test_completions_are_those_that_were_sampled(place):
    """What the embedded model samples, written down as text, comes back as the same ids."""
    settings = {"max_new_tokens": 32, "num_generations": 8, "system_prompt": ""}
    trainer = make_trainer(TINY, TINY, place / "out", reward=None, **settings)
    sampled = trainer.generate_responses(list(range(8)))
    rows = [trainer.train_dataset[n] for n in range(8) for _ in range(8)]
    ended = [(r, c) for r, c in zip(rows, sampled, strict=True) if "</answer>" in c.text]
    assert len(ended) > 10
    expected = {(tuple(r["prompt_ids"]), tuple(c.ids)) for r, c in ended}
    records = [{"question": r["question"], "answer": c.text} for r, c in ended]
    found = {(tuple(p), tuple(c)) for p, c in encoded(trainer, place, *records)}
    assert found == expected


def test_only_completions_are_targets(model_dir, place):
    trainer = trainer_of(model_dir, place)
    rows = encoder(trainer).rows(
        examples_of(trainer.args, place, {"question": QUESTION, "answer": SAID})
    )
    made = warm_start.as_rows(rows, 512, 2, "x")
    targets = made.tokens[0, 1:][made.mask[0]].tolist()
    assert targets == rows[0]["completion_ids"]
    assert made.tokens[0, : len(rows[0]["prompt_ids"])].tolist() == rows[0]["prompt_ids"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": QUESTION, "answer": SAID},
        {"prompt": QUESTION, "completion": SAID},
        {"prompt": [{"role": "user", "content": QUESTION}], "completion": SAID},
        {
            "prompt": [{"role": "user", "content": QUESTION}],
            "completion": [{"role": "assistant", "content": SAID}],
        },
        {
            "messages": [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": SAID},
            ]
        },
        {"problem": QUESTION, "worked": SAID},
        {"question": QUESTION, "answer": f"<reasoning>\n{SAID}"},
        {"question": QUESTION, "answer": f"<reasoning>{SAID}"},
        {"question": QUESTION, "answer": f"{SAID}\nAnything else?</answer>"},
    ],
)
def test_every_kind_of_row_says_the_same(model_dir, place, row):
    columns = {"question_column": "problem", "answer_column": "worked"} if "worked" in row else {}
    trainer = trainer_of(model_dir, place)
    vars(trainer.args).update(columns)
    ((prompt, completion),) = encoded(trainer, place, row)
    assert prompt == trainer.train_dataset[0]["prompt_ids"]
    assert text_of(trainer, completion) == SAID


def test_every_turn_of_the_assistant_is_learnt(model_dir, place):
    """Each after a prompt as the trainer would ask it there."""
    said = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": f"<reasoning>\n{SAID}"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": SAID.replace("3", "4")},
    ]
    trainer = trainer_of(model_dir, place, system_prompt="Think.")
    first, second = encoded(trainer, place, {"messages": said})
    assert [text_of(trainer, c) for _, c in (first, second)] == [SAID, SAID.replace("3", "4")]
    assert first[0] == trainer.train_dataset[0]["prompt_ids"]
    asked = {"prompt": [{"role": "system", "content": "Think."}, *said[:3]]}
    wanted = questions.encode_prompt(trainer.tokenizer, trainer.args, asked)
    assert second[0] == wanted


def test_a_tokenizer_that_puts_a_space_before_what_stands_alone(model_dir, place):
    """The ids of a completion are those that follow a prefix: SentencePiece's first token."""
    trainer = trainer_of(model_dir, place, stop_strings=[])

    class Metaspace:
        pieces = ("\n", "▁a", "a", "▁1", "1")

        def encode(self, text, add_special_tokens=False):
            first = [] if text.startswith("\n") else [f"▁{text[0]}"]
            rest = text if text.startswith("\n") else text[1:]
            return [self.pieces.index(token) for token in (*first, *rest)]

    ids = warm_start.Encoder(Metaspace(), 5, trainer.args, None).after_prefix("1a")
    assert ids == [4, 2]


# evaluate_model.py's answers


def answer(completion=SAID, question=QUESTION, **more):
    made = {"index": 0, "sample": 0, "question": question, "answer": "3", "completion": completion}
    return made | {"correct": True, "finish_reason": "stop", "split": "train", **more}


def test_of_answers_the_right_ones_are_learnt(model_dir, place, capsys):
    config = make_config(model_dir, place, place / "out")
    rows = [answer(), answer(correct=False), answer(), answer("</answer>", finish_reason="length")]
    rows += [answer("<reasoning>\n2\n</answer>"), answer("by its end, without the string")]
    found = examples_of(config, place, *rows)
    assert [example.text for example in found] == [SAID, "<reasoning>\n2\n</answer>"]
    out = capsys.readouterr().out
    assert "5 of 6 answers right, 2 of them without their end: left out" in out
    assert "1 of 3 rows repeat others: left out" in out


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (answer(split="test"), "row 1: split = 'test', and what is evaluated on must not be"),
        (answer(correct=False), "none of its 1 answer is right"),
        (answer("no end"), 'no right answer ends as stop_strings = ["</answer>"] says'),
        ({"text": "a"}, "row 1: has text, but needs question and answer (question_column and"),
        ({"question": QUESTION, "answer": ""}, "row 1: nothing as completion"),
        ({"question": "", "answer": SAID}, "row 1: nothing as question"),
        ({"question": QUESTION, "answer": {"a": 1}}, "row 1: dict instead of a text as compl"),
        ({"prompt": QUESTION, "completion": [1]}, "must be a text, or one message of the assist"),
        ({"messages": "hello"}, "must be a list of objects with role and content, both texts"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant, so nothing"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "message 1 is the assistant's"),
        ({"question": QUESTION, "answer": "3"}, 'has none of stop_strings = ["</answer>"]'),
        ({"question": QUESTION, "answer": "<reasoning>\n "}, "the completion is empty"),
        (
            {"question": QUESTION, "answer": f"1<|im_end|>{SAID}"},
            "would end this completion after 2 of its",
        ),
        ({"question": QUESTION, "answer": f"{'1' * 300}{SAID}"}, "over max_new_tokens = 64"),
        ({"question": "1" * 600, "answer": SAID}, "longer than max_prompt_length = 512"),
        ({"question": QUESTION, "answer": SAID, "image": "x"}, "the column 'image'"),
    ],
    ids=str,
)
def test_bad_rows_are_named(model_dir, place, row, complaint):
    trainer = trainer_of(model_dir, place)
    with pytest.raises(UserError, match=r".") as caught:
        encoded(trainer, place, row)
    assert complaint in str(caught.value)


def test_questions_of_the_test_split_are_refused(grpo, model_dir, place):
    (place / "test.jsonl").write_text(json.dumps({"question": "Why?", "answer": "3"}) + "\n")
    settings = {"model_name": str(model_dir), "dataset": str(place), "eval_samples": 2}
    config = grpo.read_config(write_toml(place, settings), [])
    rows = [{"question": QUESTION, "answer": SAID}, {"question": "Why?", "answer": SAID}]
    with pytest.raises(UserError, match="row 2: the question is one of the test split of"):
        examples_of(config, place, *rows)
    path = str(place / "rows.jsonl")
    assert len(warm_start.read_examples(config, path, "val_data_path")) == 2


def test_data_that_are_not_there(model_dir, place, monkeypatch):
    config = make_config(model_dir, place, place / "out")
    with pytest.raises(UserError, match=r"^train_data_path = './no.jsonl': .* does not exist"):
        warm_start.read_examples(config, "./no.jsonl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((UserError, RunError), match="cannot be loaded from the hub"):
        warm_start.read_examples(config, "owner/rows")


def test_answers_in_a_conversation_are_asked_in_it(model_dir, place):
    config = make_config(model_dir, place, place / "out")
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = [*before, {"role": "user", "content": QUESTION}]
    (example,) = examples_of(config, place, answer(prompt=asked))
    assert example.question["prompt"] == asked
