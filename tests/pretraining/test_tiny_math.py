"""models/tiny-math: its data rules, its tokenizer, its size, and that it is what the tool makes."""

import json
import random
import re
from pathlib import Path

import pytest

from utils import pretrain as command  # first loads the BLAS, then MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.utils import save
from transformers import AutoTokenizer

from utils.pretraining import tiny_math, tiny_math_model
from utils.settings import reading

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "tiny-math"
PRESET = ROOT / "configs" / "pretrain" / "tiny_math.toml"
GOOD_ENDING = "\n</reasoning>\n<answer>\n{}\n</answer>"


def read(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def equations(row):
    """[(left, op, right, result)], read from the file and not from the generator."""
    found = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", row["answer"])
    return [(int(a), op, int(b), int(c)) for a, op, b, c in found]


def sum_of(row):
    """The question's operations and numbers, the first two in order where it is immaterial."""
    steps = equations(row)
    first, second = steps[0][0], steps[0][2]
    if steps[0][1] != "-":
        first, second = sorted((first, second))
    return "".join(op for _, op, _, _ in steps), first, second, *(s[2] for s in steps[1:])


def pairs_of(row):
    return {tuple(sorted((a, b))) for a, op, b, _ in equations(row) if op != "*"}


def good_completion(row):
    working, answer = row["answer"].split("\n#### ")
    return working + GOOD_ENDING.format(answer)


@pytest.fixture(scope="module")
def config():
    return reading.resolve(tiny_math_model.TinyMathConfig, PRESET)


@pytest.fixture(scope="module")
def data(config):
    return tiny_math.TinyMath.make(config.seed, config.test_size)


@pytest.fixture(scope="module")
def train():
    return read("train")


@pytest.fixture(scope="module")
def test():
    return read("test")


@pytest.fixture(scope="module")
def loaded():
    return mlx_lm.load(str(FOLDER))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_regenerating_gives_the_committed_data(data, config, tmp_path):
    data.write(tmp_path, config.train_size)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_regenerating_gives_the_committed_tokenizer(data, config, tmp_path):
    corpus = tiny_math.tokenizer_corpus(data, config.tokenizer_samples)
    tiny_math.build_tokenizer(corpus, config.vocab_size).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made, shipped = (json.loads((f / name).read_text()) for f in (tmp_path, FOLDER))
        assert made == shipped
    template = "chat_template.jinja"
    assert (tmp_path / template).read_bytes() == (FOLDER / template).read_bytes()


def test_rows_are_gsm8k_and_true(train, test):
    assert (len(train), len(test)) == (4000, 600)
    assert len({row["question"] for row in train + test}) == 4600
    for row in train + test:
        steps = equations(row)
        lines = "\n".join(f"{a}{op}{b}={c}" for a, op, b, c in steps)
        assert row["answer"] == f"{lines}\n#### {steps[-1][3]}"
        asked = [int(n) for n in re.findall(r"\d+", row["question"])]
        assert asked == [steps[0][0], *(step[2] for step in steps)]
        for left, op, right, result in steps:
            assert result == {"+": left + right, "-": left - right, "*": left * right}[op]
            assert 0 <= result <= 99
            assert op != "*" or max(left, right) <= 9


def test_no_test_question_is_in_train_by_its_numbers(train, test):
    assert {sum_of(row) for row in train}.isdisjoint(sum_of(row) for row in test)


def test_held_out_marks_are_true(train, test):
    shown = set().union(*(pairs_of(row) for row in train))
    held_out = [row for row in test if row["held_out"]]
    assert len(held_out) == 300
    assert all(pairs_of(row) and pairs_of(row).isdisjoint(shown) for row in held_out)
    held_out_pairs = set().union(*(pairs_of(row) for row in held_out))
    seen = [row for row in test if not row["held_out"]]
    assert all(pairs_of(row).isdisjoint(held_out_pairs) for row in seen)


@pytest.mark.parametrize("stream", ["pretrain", "finish", "corpus"])
def test_training_streams_stay_on_the_train_side(data, test, stream):
    forbidden = {sum_of(row) for row in test}
    held_out = set().union(*(pairs_of(row) for row in test if row["held_out"]))
    for problem, _ in zip(data.stream(stream), range(3000), strict=False):
        assert sum_of(problem.row()) not in forbidden
        assert pairs_of(problem.row()).isdisjoint(held_out)


def test_only_good_demonstrations_score(data):
    rng = random.Random(0)
    problems = data.test[:200]
    for kind, write in tiny_math.DEMONSTRATIONS.items():
        grades = [tiny_math.grade(write(p, rng), p.answer) for p in problems]
        assert all(grade.exact == (kind == "good") for grade in grades), kind
        well_formed = kind in ("good", "wordy", "slip")
        assert all(grade.well_formed == well_formed for grade in grades), kind
        if kind == "slip":
            assert all(grade.equations_right < grade.equations for grade in grades)


def test_grade_reads_the_number_between_the_tags():
    text = "1+1=2\n2+1=4" + GOOD_ENDING.format(4)
    assert tiny_math.grade(text, 4) == tiny_math.Grade(True, True, 2, 1)
    assert not tiny_math.grade("1+1=2\nSo the answer is 2.", 2).exact
    assert not tiny_math.grade(text + " well", 4).well_formed


def test_a_mixture_draws_its_kinds_by_weight(data):
    rng = random.Random(0)
    mixture = {"good": 1.0, "guess": 3.0}
    texts = [tiny_math.demonstrate(data.test[0], mixture, rng) for _ in range(2000)]
    assert sum(text.startswith("I think") for text in texts) == pytest.approx(1500, abs=80)


def test_tokenizer_round_trips_wherever_it_is_loaded(loaded, tokenizer, test, tmp_path):
    model, wrapper = loaded
    config = json.loads((FOLDER / "config.json").read_text())
    save(tmp_path / "again", FOLDER, model, wrapper, config, donate_model=False)
    _, again = mlx_lm.load(str(tmp_path / "again"))
    auto_again = AutoTokenizer.from_pretrained(tmp_path / "again")
    texts = [good_completion(row) + "<|im_end|>" for row in test[:20]]
    texts += [row["question"] for row in test[:20]] + ["Grüße, 数学 \t 1,234.5!"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids
        assert tokenizer.decode(ids) == text
        assert all(other.encode(text) == ids for other in (wrapper, again, auto_again))
    assert again.eos_token_ids == wrapper.eos_token_ids == {tokenizer.eos_token_id}
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert again.chat_template == wrapper.chat_template == tokenizer.chat_template


def test_digits_are_isolated_and_tags_are_single(tokenizer):
    digits = [key for key in tokenizer.get_vocab() if re.search(r"\d", key) and key.isascii()]
    assert sorted(digits) == list("0123456789")
    assert all(len(tokenizer.encode(tag)) == 1 for tag in (*tiny_math.TAGS, "\n"))
    assert tokenizer.decode(tokenizer.encode("<answer>"), skip_special_tokens=True) == "<answer>"


def test_chat_template_takes_a_system_message(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_lengths_fit_the_presets(tokenizer, data, train, test):
    rows = train + test
    completions = tiny_math.completion_ids(tokenizer, [good_completion(row) for row in rows])
    assert max(map(len, completions)) <= 32
    prompts = tiny_math.prompt_ids(tokenizer, [row["question"] for row in rows])
    assert max(map(len, prompts)) <= 48
    rng = random.Random(0)
    for write in tiny_math.DEMONSTRATIONS.values():
        texts = [write(problem, rng) for problem in data.test]
        assert max(map(len, tiny_math.completion_ids(tokenizer, texts))) <= 32


def test_prefix_is_tokenized_apart(tokenizer):
    (ids,) = tiny_math.prompt_ids(tokenizer, ["How many?"])
    messages = [{"role": "user", "content": "How many?"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat + tokenizer.encode("<reasoning>\n")


def test_model_is_small_float32_and_quantizes(loaded, tokenizer):
    model, _ = loaded
    weights = dict(tree_flatten(model.parameters()))
    assert all(weight.dtype == mx.float32 for weight in weights.values())
    assert sum(weight.size for weight in weights.values()) <= 1_200_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    assert model.args.vocab_size % 64 == 0
    assert len(tokenizer) <= model.args.vocab_size
    quantized, _ = mlx_lm.load(str(FOLDER))
    nn.quantize(quantized, group_size=64, bits=4)
    kinds = [type(m) for m in quantized.modules() if hasattr(m, "weight")]
    assert nn.Linear not in kinds
    assert nn.Embedding not in kinds


def test_it_can_do_the_sums_but_its_usual_answer_is_a_bad_one(loaded, tokenizer, data):
    model, _ = loaded
    problems = data.test[:40]
    texts = tiny_math_model.generate(model, tokenizer, [p.question for p in problems], 0.0, 32)
    grades = [tiny_math.grade(t, p.answer) for t, p in zip(texts, problems, strict=True)]
    figures = tiny_math_model.summarize(grades)
    assert figures["exact_match"] <= 0.45
    assert figures["arithmetic"] >= 0.97


def test_readme_quotes_the_recorded_figures():
    record = json.loads((FOLDER / "pretrain.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert f"{record['parameters']:,} parameters" in readme
    for figures in record["figures"].values():
        for temperature, parts in figures.items():
            for part, values in parts.items():
                numbers = " | ".join(f"{value:.3f}" for value in values.values())
                assert f"| {temperature} | {part} | {numbers} |" in readme
    assert readme.count("<!-- rl-results -->") == readme.count("<!-- /rl-results -->") == 1


def test_folder_names_no_path_of_the_machine_that_made_it():
    names = [p for p in FOLDER.iterdir() if p.suffix in (".json", ".md", ".jinja")]
    assert names
    assert not [p.name for p in names if re.search(r"/(home|root|tmp|work)/", p.read_text())]


# The tool


def test_completion_loss_counts_only_the_mask():
    class Uniform(nn.Module):
        def __call__(self, tokens):
            # Token 1 is twice as likely as each of the others.
            return mx.zeros((*tokens.shape, 4)) + mx.log(mx.array([1.0, 2.0, 1.0, 1.0]))

    tokens = mx.array([[3, 3, 1, 2], [3, 1, 0, 0]])
    mask = mx.array([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    expected = -(2 * mx.log(mx.array(2 / 5)) + mx.log(mx.array(1 / 5))) / 3
    loss = tiny_math_model.completion_loss(Uniform(), tokens, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_pool_masks_the_completion_and_pads_the_rest(tokenizer, data):
    problems = data.test[:8]
    pool = tiny_math_model.make_pool(tokenizer, [(p, "1+1=2") for p in problems])
    for row, problem in enumerate(problems):
        ids = [t for t, m in zip(*_row(pool, row), strict=True) if m]
        assert tokenizer.decode(ids) == "1+1=2<|im_end|>"
        length = len(tiny_math.prompt_ids(tokenizer, [problem.question])[0])
        tokens, mask = _row(pool, row)
        assert not any(mask[:length])
        assert set(tokens[length + len(ids) :]) <= {tokenizer.pad_token_id}


def _row(pool, row):
    return pool.tokens[row].tolist(), pool.mask[row].tolist()


def test_learning_rate_rises_then_falls_to_zero():
    schedule = tiny_math_model.learning_rate_schedule(1e-3, 10, 100)
    rates = [float(schedule(mx.array(step))) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4, 0], abs=2e-6)


def test_the_command_makes_a_model_that_loads(tmp_path):
    small = (
        "global_batch_size=4 pool_size=8 max_steps=2 lr_warmup_steps=1 finish_pool_size=8 "
        "finish_steps=2 finish_warmup_steps=1 test_size=4 train_size=8 eval_samples=1 "
        "eval_interval=0 max_new_tokens=2 compile=false tokenizer_samples=600"
    )
    overrides = [part for item in small.split() for part in ("--set", item)]
    arguments = ["--config", str(PRESET), "--output-dir", str(tmp_path), *overrides]
    assert command.main(arguments) == 0
    model, tokenizer = mlx_lm.load(str(tmp_path))
    assert model(mx.array([tokenizer.encode("1+1=")])).shape[-1] == 448
    assert set(json.loads((tmp_path / "pretrain.json").read_text())["figures"]) == {
        "stage 1",
        "stage 2",
    }


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("max_step=3", "did you mean 'max_steps'"),
        ("vocab_size=450", "multiple of 64"),
        ("learning_rate=0.0", "more than 0"),
        ("lr_warmup_steps=9999", "less than max_steps"),
        ("global_batch_size=999999", "at least global_batch_size"),
        ("test_size=3", "even"),
        ('model={model_type="llamaa"}', "no such model type"),
        ('model={model_type="llama"}', "incomplete"),
        ('model={model_type="llama", hidden=3}', "hidden: unknown"),
        ("one_step={god=1.0}", "unknown kind"),
        ("one_step={good=-1.0}", "from 0 up"),
        ("two_step={good=0}", "above 0"),
    ],
)
def test_bad_settings_end_with_exit_code_2_and_write_nothing(override, complaint, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["--config", str(PRESET), "--output-dir", str(folder), "--set", override]
    assert command.main(arguments) == 2
    assert complaint in capsys.readouterr().err
    assert not folder.exists()


def test_data_only_trains_nothing(tmp_path):
    arguments = ["--config", str(PRESET), "--output-dir", str(tmp_path), "--data-only"]
    assert command.main(arguments) == 0
    assert (tmp_path / "train.jsonl").exists()
    assert not (tmp_path / "model.safetensors").exists()
