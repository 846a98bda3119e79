"""Models as rewards: classifiers and language models, against the same numbers by hand."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_model
from helpers import make_config, make_trainer, read_log, run_training

from utils.base.errors import RunError, UserError
from utils.memory import this_machine
from utils.rewards import by_name, calls, scoring_models


def classifier(folder, labels=1, bias=False, name="score", **extra):
    """A random model with a head instead of a vocabulary projection, as Hugging Face saves it."""
    make_model(folder, tie_word_embeddings=False, **extra)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    del weights["lm_head.weight"]
    mx.random.seed(9)
    weights[f"{name}.weight"] = mx.random.normal((labels, 64))
    if bias:
        weights[f"{name}.bias"] = mx.random.normal((labels,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def scorer_dir(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("models") / "scorer")


TEXTS = ["Yes.", "It is 7, since 3 + 4 = 7.", "{answer}", "A much longer answer " * 9, "7"]
COLUMNS = {
    "prompts": [[{"role": "user", "content": f"How many is {n}?"}] for n in range(5)],
    "completions": [[{"role": "assistant", "content": text}] for text in TEXTS],
    "question": [f"How many is {n}?" for n in range(5)],
    "answer": [str(n) for n in range(5)],
}


def call(reward):
    return calls.RewardCalls()({"r": reward}, COLUMNS)["r"]


def last_hidden(folder, text):
    """The (H,) hidden state after `text`, with model and tokenizer as mlx-lm loads them."""
    from mlx_lm.utils import load_model, load_tokenizer

    model, _ = load_model(folder, strict=False)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return model.model(mx.array([ids]))[0, -1], model, tokenizer


@pytest.mark.parametrize("bias", [False, True])
def test_a_classifier_scores_the_last_token_of_the_chat(tmp_path, bias):
    folder = classifier(tmp_path / "c", bias=bias)
    weights = mx.load(str(folder / "model.safetensors"))
    expected = []
    for prompt, completion in zip(COLUMNS["prompts"], COLUMNS["completions"], strict=True):
        parts = [*prompt, *completion]
        chat = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in parts)
        score = last_hidden(folder, chat)[0] @ weights["score.weight"][0]
        expected.append((score + (weights["score.bias"][0] if bias else 0)).item())
    assert np.std(expected) > 0.1
    for tokens in (1, 8192):  # alone, and padded
        reward = scoring_models.RewardModel(str(folder), batch_tokens=tokens)
        assert call(reward) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_classifiers_score_as_transformers_does(tmp_path, kind):
    """Saved by transformers 5, with rope_theta where mlx-lm's llama and qwen2 do not look."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    folder = make_model(tmp_path / "m")  # for its tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=384,
        num_labels=1,
        rope_theta=50_000.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    expected = []
    for prompt, completion in zip(COLUMNS["prompts"], COLUMNS["completions"], strict=True):
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        expected.append(model(ids).logits[0, 0].item())
    assert np.std(expected) > 0.1
    assert call(scoring_models.RewardModel(str(folder))) == pytest.approx(expected, abs=1e-4)


def test_a_head_with_several_outputs_needs_a_label(tmp_path):
    folder = classifier(tmp_path / "c", labels=3, name="value_head")

    def make(**how):
        return scoring_models.RewardModel(str(folder), **how)

    values = [call(make(head="value_head", label=n)) for n in range(3)]
    assert len({value[0] for value in values}) == 3
    for label in (-1, 3):
        with pytest.raises(UserError, match="has 3 outputs: set label below 3"):
            make(head="value_head", label=label)
    with pytest.raises(UserError, match=r"a classifier without score\.weight: set head"):
        make()


def test_a_language_model_is_asked_for_yes_or_no(model_dir):
    expected = []
    for n, text in enumerate(TEXTS):
        asked = f"Q How many is {n}? A {text} R {n}"
        chat = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        hidden, model, tokenizer = last_hidden(model_dir, chat)
        logits = model.model.embed_tokens.as_linear(hidden)
        yes, no = (mx.exp(logits[tokenizer.encode(word)[0]]).item() for word in ("1", "0"))
        expected.append(yes / (yes + no))
    assert np.std(expected) > 0.01
    how = {"prompt": "Q {question} A {completion} R {answer}", "yes": "1", "no": "0"}
    for tokens in (1, 8192):
        reward = scoring_models.RewardModel(str(model_dir), batch_tokens=tokens, **how)
        assert call(reward) == pytest.approx(expected, abs=1e-4)


def test_unloading_frees_the_memory_and_changes_nothing(scorer_dir):
    mx.clear_cache()
    before = mx.get_active_memory()
    reward = scoring_models.RewardModel(str(scorer_dir), unload=True)
    assert mx.get_active_memory() < before + 10_000
    first = call(reward)
    assert mx.get_active_memory() < before + 10_000
    assert (call(reward) == first).all()
    kept = scoring_models.RewardModel(str(scorer_dir))
    assert (call(kept) == first).all()
    assert mx.get_active_memory() > before + 100_000


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([3, 1, 2], 100, [[1, 2, 0]]),
        ([3, 1, 2], 4, [[1, 2], [0]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([9], 1, [[0]]),
        ([], 5, []),
    ],
)
def test_batches_keep_to_the_budget_with_padding(lengths, budget, expected):
    assert list(scoring_models.batches(lengths, budget)) == expected


def test_training_on_a_reward_model(scorer_dir, model_dir, data_dir, tmp_path):
    settings = {"reward_funcs": ["reward_model"], "reward_model": str(scorer_dir)}
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", max_updates=2, **settings)
    assert code == 0
    records = [r for r in read_log(tmp_path / "o") if "split" not in r]
    assert all(r["reward_std"] > 0 and r["grad_norm"] > 0 for r in records)
    rows = [trainer.train_dataset[0]] * 2
    responses = trainer.generate_responses([0])[:2]
    totals, _ = trainer.compute_rewards(rows, responses)
    chat = [*rows[1]["prompt"], {"role": "assistant", "content": responses[1].text}]
    reward = trainer.reward_funcs["reward_model"]
    assert reward.scores([reward.encode(chat, False)]) == pytest.approx([totals[1]], abs=1e-4)


def test_the_plan_leaves_room_for_it(scorer_dir, model_dir, data_dir, tmp_path):
    settings = {"reward_funcs": ["reward_model"], "memory_limit_gb": 0.01}
    how = {"reward_model": str(scorer_dir)}
    plain = make_config(model_dir, data_dir, tmp_path / "o", memory_limit_gb=0.01)
    kept = make_config(model_dir, data_dir, tmp_path / "o", **settings, **how)
    freed = {"reward_kwargs": {"reward_model": {"unload": True}}}
    unloaded = make_config(model_dir, data_dir, tmp_path / "o", **settings, **how, **freed)
    size = (scorer_dir / "model.safetensors").stat().st_size
    assert this_machine.budget_bytes(plain) - this_machine.budget_bytes(kept) == size
    assert this_machine.budget_bytes(plain) == this_machine.budget_bytes(unloaded)


def no_template(folder):
    make_model(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"reward_model": str(folder)}


def damaged(folder):
    make_model(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    return {"reward_model": str(folder)}


BAD = {
    "none": (lambda _: {"reward_model": ""}, "set reward_model"),
    "no folder": (lambda _: {"reward_model": "./nowhere"}, "reward_model = './nowhere' is neither"),
    "no model": (lambda f: {"reward_model": str(f.parent)}, "folder without config.json"),
    "no template": (no_template, "has no chat template"),
    "damaged": (damaged, "truncated, or not a safetensors file"),
    "no word": (lambda _: {"yes": ""}, "'' is no token of"),
    "label": (lambda _: {"label": -2}, "label = -2"),
    "batch": (lambda _: {"batch_tokens": 0}, "batch_tokens at least 1"),
    "prompt": (lambda _: {"prompt": "Right?"}, "must contain {completion}"),
    "same": (lambda _: {"yes": "1", "no": "1"}, "begin with the same token"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_model_that_can_not_score_is_refused(model_dir, tmp_path, case):
    settings, complaint = BAD[case]
    settings = {"reward_model": str(model_dir), **settings(tmp_path / "bad")}
    with pytest.raises(UserError, match=complaint):
        scoring_models.RewardModel(**settings)


def test_the_setting_needs_the_reward_and_the_other_way_round(grpo, model_dir, data_dir, tmp_path):
    with pytest.raises(UserError, match="reward_model has no effect unless"):
        make_config(model_dir, data_dir, tmp_path / "o", reward_model="x")
    config = make_config(model_dir, data_dir, tmp_path / "o", reward_funcs=["reward_model"])
    with pytest.raises(UserError, match="reward reward_model: set reward_model to a folder"):
        by_name.load_rewards(config, grpo.REWARDS)


def test_a_model_may_judge_itself(model_dir, data_dir, tmp_path):
    """The same folder as policy and reward: two models, of which one learns."""
    settings = {"reward_funcs": ["reward_model"], "reward_model": str(model_dir)}
    settings["reward_kwargs"] = {"reward_model": {"yes": "1", "no": "0"}}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)
    reward = trainer.reward_funcs["reward_model"]
    before = call(reward)
    trainer.train_step([0, 1])
    assert (call(reward) == before).all()


def test_a_token_id_beyond_its_vocabulary_does_not_reach_the_model(tmp_path):
    folder, complaint = str(make_model(tmp_path / "small", vocab=100)), "its model knows only 100"
    with pytest.raises(UserError, match=complaint):
        scoring_models.RewardModel(folder)
    reward = scoring_models.RewardModel(folder, yes="1", no="2")
    with pytest.raises(RunError, match=complaint):
        call(reward)
