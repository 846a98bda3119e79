"""The sampler: what it draws and records, where it stops, and that batching changes nothing."""

import copy
import dataclasses
import gc
import itertools
import sys
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import make_model
from helpers import flat, keys_for, make_trainer, mostly_long, random_prompts, sample
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import (
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from utils.base.errors import UserError
from utils.base.script import load_script
from utils.device import cores as streams
from utils.device import patch, runtime
from utils.rollouts import caches, merged_layers, stop_rule
from utils.rollouts import draw as drawing
from utils.run import introduction

EOS = 2


@pytest.fixture(scope="module")
def loaded(model_dir):
    """(model, tokenizer) of the random model."""
    return mlx_lm.load(str(model_dir))


# Filters and their order.


def hugging_face_set(logits, temperature, top_k, top_p, min_p):
    """The tokens that transformers' logits processors leave, in their order, in numpy."""
    scores = np.array(logits, np.float64) / temperature

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    if top_k:
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    if top_p < 1:
        order = np.argsort(scores)
        unlikely = softmax(scores)[order].cumsum() <= 1 - top_p
        unlikely[-1] = False
        scores[order[unlikely]] = -np.inf
    if min_p:
        probabilities = softmax(scores)
        scores[probabilities < min_p * probabilities.max()] = -np.inf
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


def draw(grpo, logits, count=2000, **how):
    """(tokens, log-probs) of many independent draws from one row of logits."""
    how = grpo.Sampling(max_tokens=1, **how)
    rows = mx.broadcast_to(mx.array(logits), (count, len(logits)))
    tokens, logprobs = grpo.sample_tokens(rows, mx.array(keys_for(grpo, count)), how)
    return np.array(tokens), np.array(logprobs)


FOUR = np.log([0.6, 0.3, 0.06, 0.04])
SEVEN = np.log([0.02, 0.3, 0.08, 0.25, 0.05, 0.2, 0.1])
FILTERS = [
    (FOUR, {"temperature": 2.0, "top_p": 0.85}, {0, 1, 2}),  # {0, 1} without the temperature
    (FOUR, {"temperature": 0.5, "top_p": 0.85}, {0, 1}),
    (FOUR, {"temperature": 0.5, "top_p": 0.75}, {0}),
    (FOUR, {"temperature": 2.0, "min_p": 0.3}, {0, 1, 2}),
    (FOUR, {"temperature": 1.0, "min_p": 0.3}, {0, 1}),
    (FOUR, {"temperature": 0.5, "min_p": 0.3}, {0}),
    (SEVEN, {"temperature": 1.0, "top_k": 3}, {1, 3, 5}),
    (SEVEN, {"temperature": 1.0, "top_k": 3, "top_p": 0.7}, {1, 3}),  # of what top_k left
    (SEVEN, {"temperature": 1.0, "top_k": 2, "top_p": 0.3}, {1}),
    (SEVEN, {"temperature": 1.0, "top_p": 0.7, "min_p": 0.7}, {1, 3}),
    (SEVEN, {"temperature": 1.0, "top_p": 0.6, "min_p": 0.6}, {1, 3, 5}),  # {1, 3} the other way
    (SEVEN, {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.45}, {1, 3, 5, 6}),
    (SEVEN, {"temperature": 1.0, "top_k": 7}, set(range(7))),
    (SEVEN, {"temperature": 1.0, "top_k": 99}, set(range(7))),
    (SEVEN, {"temperature": 1.0}, set(range(7))),
]


@pytest.mark.parametrize(("logits", "filters", "expected"), FILTERS, ids=range(len(FILTERS)))
def test_filters_come_after_the_temperature_in_hugging_faces_order(grpo, logits, filters, expected):
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    reference = {**settings, "top_k": min(settings["top_k"], len(logits))}
    assert hugging_face_set(logits, **reference) == expected
    tokens, logprobs = draw(grpo, logits, **settings)
    assert set(tokens.tolist()) == expected
    tempered = logits / settings["temperature"]
    full = tempered - np.log(np.exp(tempered).sum())
    assert logprobs == pytest.approx(full[tokens], abs=1e-5), "of the full distribution"


def chi_square(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    expected = len(tokens) * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_the_distribution_is_right(grpo, temperature):
    """Chi-square over 20,000 keys; 22.5 is its 99.9 % quantile for 6 degrees of freedom."""
    probabilities = np.exp(SEVEN / temperature)
    probabilities /= probabilities.sum()
    tokens, _ = draw(grpo, SEVEN, 20_000, temperature=temperature)
    assert chi_square(tokens, probabilities) < 22.5
    untempered = chi_square(tokens, np.exp(SEVEN))
    assert temperature == 1.0 or untempered > 100, "the check can fail"


def test_no_token_without_weight_is_drawn(grpo):
    """Weights at few places of a large vocabulary; also with the largest and smallest numbers."""
    weights = np.zeros((4, 1000), np.float32)
    weights[0, [0, 127, 128, 999]] = 1
    weights[1, 998] = 1e-30
    weights[2, [1, 500]] = [1e30, 1e-30]
    weights[3, 3:] = np.random.default_rng(0).random(997)
    many = np.repeat(weights, 2000, axis=0)
    tokens = np.array(drawing.draw(mx.array(many), mx.array(keys_for(grpo, len(many)))))
    assert (many[np.arange(len(many)), tokens] > 0).all()
    assert set(tokens[:2000].tolist()) == {0, 127, 128, 999}
    assert chi_square(tokens[:2000] // 128, np.array([0.5, 0.25, 0, 0, 0, 0, 0, 0.25]) + 1e-12) < 14
    zero_and_one = mx.array([0.0, float(weights[3].sum())])
    index, _ = drawing.passed(mx.array(weights[[3, 3]]), zero_and_one)
    assert index.tolist() == [3, 999], "both ends of the uniform number"


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_nucleus_needs_no_sorted_vocabulary(monkeypatch, top_p):
    """The candidates' cut is that of the whole vocabulary, also where they do not suffice."""
    logits = mx.random.normal((12, 9000), key=mx.random.key(1)) * mx.array([[9.0], [0.1]] * 6)
    weights = mx.exp(logits - logits.max(axis=-1, keepdims=True))
    rows = [weights[::2], weights[1::2], weights]  # peaked, flat, both
    fast = [drawing.threshold(part, top_p) for part in rows]
    monkeypatch.setattr(drawing, "CANDIDATES", 10**6)
    for part, cut in zip(rows, fast, strict=True):
        assert mx.array_equal(cut, drawing.threshold(part, top_p))
        kept = mx.where(part >= cut, part, 0)
        share = kept.sum(axis=-1) / part.sum(axis=-1)
        assert (share >= top_p - 1e-5).all().item()
        without_last = kept.sum(axis=-1) - cut[:, 0]
        assert (without_last / part.sum(axis=-1) < top_p + 1e-5).all().item()


def test_filtered_tokens_keep_their_proportions(grpo):
    tokens, _ = draw(grpo, SEVEN, 20_000, temperature=1.0, top_k=3)
    kept = np.where(np.isin(range(7), [1, 3, 5]), np.exp(SEVEN), 0)
    assert chi_square(tokens, kept / kept.sum() + 1e-12) < 13.8  # 2 degrees of freedom


def test_keys_differ_by_seed_update_prompt_and_row_and_ignore_the_global_state(grpo, loaded):
    purposes = grpo.ROLLOUT, grpo.EVALUATION, grpo.DROPOUT
    places = list(itertools.product(range(9), range(9), range(9)))
    streams = list(itertools.product(range(3), purposes, places))
    assert len({tuple(grpo.random_key(*stream)) for stream in streams}) == len(streams)
    prompts = random_prompts(6, 9)
    mx.random.seed(1)
    first = sample(grpo, loaded, prompts)
    mx.random.seed(2)
    assert [c.ids for c in sample(grpo, loaded, prompts)] == [c.ids for c in first]
    assert first[0].ids != sample(grpo, loaded, prompts, keys=keys_for(grpo, 4)[2:])[0].ids


# Batches: the same tokens as one row alone.

SLIDING = {
    "query_pre_attn_scalar": 16,
    "rope_local_base_freq": 10000.0,
    "rope_global_base_freq": 10000.0,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
}
HYBRID = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
STATE_SPACE = {
    "state_size": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
}
BOTH_IN_A_LAYER = {"mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_heads": 4}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"layers": 4, **SLIDING},  # rotating caches, 16 tokens wide
    "lfm2": {"layers": 3, **HYBRID},
    "mamba": STATE_SPACE,  # its state has no mask: padding in a prompt would enter it
    "falcon_h1": BOTH_IN_A_LAYER,  # lists of caches
}
ONE_OF_A_KIND = ("llama", "gemma3_text", "lfm2", "mamba")


@pytest.mark.parametrize("family", mostly_long(FAMILIES, *ONE_OF_A_KIND))
def test_a_batch_of_ragged_prompts_is_each_prompt_alone(grpo, tmp_path, family):
    folder = make_model(tmp_path / family, model_type=family, **FAMILIES[family])
    model, tokenizer = mlx_lm.load(str(folder))
    if family == "gemma3_text":
        assert any(isinstance(c, RotatingKVCache) for c in make_prompt_cache(model))
    prompts, rows = random_prompts(5, 23, 1, 40), [0, 0, 1, 2, 3, 3]
    keys = keys_for(grpo, len(rows))
    together = sample(grpo, (model, tokenizer), prompts, rows, keys, stops=tuple("taei01"))
    lengths = {len(c.ids) for c in together}
    assert len(lengths) > 2, "rows must leave the batch at different times"
    for n, row in enumerate(rows):
        (alone,) = sample(
            grpo, (model, tokenizer), [prompts[row]], keys=keys[n : n + 1], stops=tuple("taei01")
        )
        assert alone.ids == together[n].ids
        assert (alone.text, alone.finish_reason) == (together[n].text, together[n].finish_reason)
        assert alone.logprobs == pytest.approx(together[n].logprobs, abs=1e-4)
        ids = together[n].ids
        forward = grpo.token_logprobs(model, mx.array([prompts[row] + ids]), len(ids), 1.0)[0][0]
        assert np.array(forward) == pytest.approx(together[n].logprobs, abs=1e-3)


@pytest.mark.parametrize("family", mostly_long(FAMILIES, *ONE_OF_A_KIND))
@pytest.mark.parametrize("places", [1, 3])
def test_a_place_that_is_left_goes_to_the_next(grpo, tmp_path, monkeypatch, family, places):
    """Whatever has been there before, and whoever is beside it."""
    folder = make_model(tmp_path / family, model_type=family, **FAMILIES[family])
    loaded = mlx_lm.load(str(folder))
    prompts, rows = random_prompts(5, 23, 1, 40), [0, 0, 1, 2, 3, 3, 1, 2]
    whole = sample(grpo, loaded, prompts, rows, stops=tuple("taei01"))
    widths, forward = [], type(loaded[0]).__call__

    def noted(self, tokens, *args, **kwargs):
        if tokens.shape[1] == 1:
            widths.append(len(tokens))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(loaded[0]), "__call__", noted)
    refilled = sample(grpo, loaded, prompts, rows, stops=tuple("taei01"), places=places)
    assert max(widths) == places
    assert [c.ids for c in refilled] == [c.ids for c in whole]
    assert [(c.text, c.finish_reason) for c in refilled] == [
        (c.text, c.finish_reason) for c in whole
    ]
    for a, b in zip(refilled, whole, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 30])
def test_rows_that_come_later_have_the_same_limit(grpo, loaded, limit):
    prompts, stops = random_prompts(5, 9, 1, 7), tuple("tae")
    rows = [n % 4 for n in range(12)]
    whole = sample(grpo, loaded, prompts, rows, stops=stops, max_tokens=limit)
    for places in (1, 2, 5):
        refilled = sample(grpo, loaded, prompts, rows, stops=stops, max_tokens=limit, places=places)
        assert [c.ids for c in refilled] == [c.ids for c in whole]
        assert [c.finish_reason for c in refilled] == [c.finish_reason for c in whole]
    assert max(len(c.ids) for c in whole) == limit


def test_what_is_done_is_known_in_order_while_the_rest_is_sampled(model_dir, data_dir, tmp_path):
    settings = {"stop_strings": ["t", "0"], "rollout_batch_size": 2, "max_new_tokens": 40}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    seen, keys = [], keys_for(load_script(), 12)
    questions = trainer.train_dataset[:3]
    ask = partial(trainer.sampler, trainer.model, questions, keys, trainer.sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "EVERY", 0)
        completions = ask(lambda done: seen.append(list(done)))
    assert seen[0] == []
    counts = [len(done) for done in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) > 4
    for done in seen:
        assert [c.ids for c in done] == [c.ids for c in completions[: len(done)]]
    assert counts[-1] == 12


@pytest.mark.parametrize("family", mostly_long(FAMILIES, *ONE_OF_A_KIND))
def test_long_prompts_are_read_in_pieces(grpo, tmp_path, monkeypatch, family):
    folder = make_model(tmp_path / family, model_type=family, **FAMILIES[family])
    loaded, prompts = mlx_lm.load(str(folder)), random_prompts(5, 23, 1, 40)
    whole = sample(grpo, loaded, prompts)
    read, forward = set(), type(loaded[0]).__call__

    def noted(self, tokens, *args, **kwargs):
        read.add(tokens.size)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(loaded[0]), "__call__", noted)
    for limit in (24, 76, 12):  # 39 tokens in pieces of 6, of 19 with one left over, and of 3
        read.clear()
        monkeypatch.setattr(caches, "PREFILL_TOKENS", limit)
        pieces = sample(grpo, loaded, prompts)
        assert max(read) <= limit < 4 * 39
        assert [c.ids for c in pieces] == [c.ids for c in whole]
        for a, b in zip(pieces, whole, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@pytest.mark.parametrize("length", [40, 300])
def test_a_cache_takes_no_more_room_than_its_rows_can_use(model_dir, length):
    """As planned for: in steps of 256, or what is left to sample if that is less."""
    model, _ = mlx_lm.load(str(model_dir))
    cache = caches.prefill(model, random_prompts(11, 21), [0, 0, 1], length)
    sizes = []
    for step in range(length):
        if step == 9:
            caches.keep_rows(cache, [0, 1])  # the 10 positions of the longer prompt alone go
        model(mx.ones((3 if step < 9 else 2, 1), mx.int32), cache=cache)
        sizes.append({layer.keys.shape[2] for layer in cache})
    expected = [20 + 40] * 9 + [10 + 40] * 31
    if length == 300:
        expected = [20 + 256] * 9 + [10 + 256] * 247 + [10 + 300] * 44
    assert sizes == [{size} for size in expected]


def test_rows_of_two_prompts_stay_apart_in_batches_smaller_than_a_group(model_dir, monkeypatch):
    model, _ = mlx_lm.load(str(model_dir))
    monkeypatch.setattr(caches, "_can_batch", lambda _: False)
    assert list(caches.batches(model, 8, 4, 3)) == [
        range(3),
        range(3, 4),
        range(4, 7),
        range(7, 8),
    ]


@pytest.mark.parametrize("make", [ChunkedKVCache, lambda n: CacheList(ChunkedKVCache(n))])
def test_one_layer_that_cannot_be_batched_keeps_prompts_apart(model_dir, monkeypatch, make):
    model, _ = mlx_lm.load(str(model_dir))
    monkeypatch.setattr(type(model), "make_cache", lambda _: [KVCache(), make(9)], raising=False)
    monkeypatch.setattr(caches, "_say_once", lambda _: None)  # said in another test
    assert list(caches.batches(model, 4, 2, 4)) == [range(2), range(2, 4)]


def test_a_window_is_masked_from_the_first_token_that_it_leaves_out():
    rows = caches.Rows([4, 4], 9)
    for end in range(4, 13):
        mask = rows.mask(end, 6)
        seen = end + 1 if mask is None else mask[0, 0, 0].sum().item()
        assert seen == min(end + 1, 6)


def test_a_mask_hides_padding_and_what_is_out_of_the_window():
    """Against the tokens' true positions, before and after the longest prompt has left, and when
    others have come."""
    rows = caches.Rows([5, 2, 9], 20)

    def check(begins, end):
        assert rows.offset(end).tolist() == [end - begin for begin in begins]
        for window in (None, 3, 6, 100):
            mask = np.array(rows.mask(end, window))[:, 0, 0]
            for row, begin in enumerate(begins):
                near = [end - position < (window or 99) for position in range(end + 1)]
                seen = [position >= begin for position in range(end + 1)]
                assert mask[row].tolist() == [s and n for s, n in zip(seen, near, strict=True)]

    check([4, 7, 0], 9)
    check([4, 7, 0], 13)
    assert rows.keep([0, 1]) == 4
    check([0, 3], 9)
    assert rows.extend(caches.Rows([4, 3], 20), 9, 20) == 0
    check([0, 3, 5, 6], 9)
    assert rows.extend(caches.Rows([12], 20), 10, 20) == 2
    check([2, 5, 7, 8, 0], 12)
    assert (rows.limit, rows.longest) == (32, 32)
    assert caches.Rows([4, 4], 9).mask(6, None) is None
    assert np.array(caches.Rows([4, 4], 9).mask(6, 3))[1, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_splitting_the_rollout_changes_no_token(model_dir, data_dir, tmp_path):
    """3 splits a group of 4, so that one prompt is read in two batches."""
    samples = []
    for size in (64, 1, 3):
        settings = {"rollout_batch_size": size, "max_new_tokens": 20, "stop_strings": ["t", "0"]}
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
        samples.append(trainer.generate_responses([2, 0, 5]))
    whole = samples[0]
    assert len({len(r.ids) for r in whole}) > 3
    for split in samples[1:]:
        assert [r.ids for r in split] == [r.ids for r in whole]
        assert [r.text for r in split] == [r.text for r in whole]
    by_prompt = trainer.generate_responses([5])
    assert [r.ids for r in by_prompt] == [r.ids for r in whole[8:]], "other prompts do not matter"


@pytest.mark.parametrize("method", ["generate_responses", "train_step"])
def test_no_rows_are_refused(model_dir, data_dir, tmp_path, method):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    with pytest.raises(UserError, match="nothing to sample: the list of rows is empty"):
        getattr(trainer, method)([])


def test_groups_differ_within_and_between_updates(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    first = [tuple(r.ids) for r in trainer.generate_responses([0, 1])]
    assert len(set(first)) == 8
    assert [tuple(r.ids) for r in trainer.generate_responses([0, 1])] == first
    trainer.run.state.update_step = 1
    assert not {*first} & {tuple(r.ids) for r in trainer.generate_responses([0, 1])}


def test_greedy_is_mlx_lms_generate_token_for_token(grpo, loaded):
    model, tokenizer = loaded
    prompts = random_prompts(4, 17, 1, 30)
    ours = sample(grpo, loaded, prompts, temperature=0.0, max_tokens=40)
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=40))
        assert completion.ids == [response.token for response in theirs]
        assert completion.finish_reason == theirs[-1].finish_reason
        ids = [token for token in completion.ids if token != EOS]
        assert completion.text == tokenizer.decode(ids)


def test_a_cache_that_cannot_be_batched_reads_one_prompt_at_a_time(
    model_dir, data_dir, tmp_path, monkeypatch, capsys
):
    """The same tokens as from the model's plain caches, in as many batches as prompts."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", stop_strings=["t", "0"])
    expected = trainer.generate_responses([2, 0])
    layers = trainer.model.layers
    monkeypatch.setattr(
        type(trainer.model),
        "make_cache",
        lambda _: [ChunkedKVCache(999) for _ in layers],
        raising=False,
    )
    capsys.readouterr()
    for _ in range(2):
        responses = trainer.generate_responses([2, 0])
        assert [r.ids for r in responses] == [r.ids for r in expected]
    assert capsys.readouterr().out.count("can't batch ChunkedKVCache") == 1


# Views: the same policy in fewer operations.


@pytest.fixture(params=["plain", "4-bit", "lora", "dora"])
def policy(request, model_dir, quantized_dir, data_dir, tmp_path):
    """A trainer whose adapters, where it has some, do something."""
    train_type = request.param if request.param.endswith("ra") else "auto"
    folder = quantized_dir if request.param == "4-bit" else model_dir
    trainer = make_trainer(folder, data_dir, tmp_path / "o", train_type=train_type)
    for name, module in trainer.model.named_modules():
        if "lora_b" in module:
            noise = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))
            module.lora_b = 0.05 * noise
    return request.param, trainer


def test_views_are_the_policy(policy):
    kind, trainer = policy
    tokens = mx.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    expected = trainer.model(tokens)
    before = {name: id(x) for name, x in flat(trainer.model.parameters()).items()}
    merged = merged_layers.merged(trainer.model, 1e9)
    assert (merged is trainer.model) == (kind == "plain")
    assert not any("lora_a" in module for module in merged.modules())
    low_rank = [m for m in merged.modules() if isinstance(m, merged_layers.LowRank)]
    assert bool(low_rank) == (kind == "4-bit"), "4-bit bases stay packed"
    joined = merged_layers.joined(merged, 1e9)
    products = [layer.self_attn.q_proj.func.__self__ for layer in joined.model.layers]
    assert all(isinstance(p.layer, merged_layers.LowRank) == (kind == "4-bit") for p in products)
    for view in (merged, joined):
        assert mx.abs(view(tokens) - expected).max() < 1e-4
        assert mx.abs(view(tokens[:1]) - expected[:1]).max() < 1e-4, "nothing is left of a call"
    assert {n: id(x) for n, x in flat(trainer.model.parameters()).items()} == before
    if kind in ("lora", "dora"):
        assert not mx.allclose(trainer.model(tokens), unadapted(trainer)(tokens), atol=1e-3)


def unadapted(trainer):
    return sys.modules[type(trainer).__module__].without_adapters(trainer.model)


def asked(trainer, monkeypatch):
    """The models that the trainer samples from hereafter."""
    models, ask = [], trainer.sampler
    monkeypatch.setattr(trainer, "sampler", lambda m, *a: models.append(m) or ask(m, *a))
    return models


@pytest.mark.parametrize("policy", ["4-bit"], indirect=True)
def test_a_quantized_base_is_unpacked_where_there_is_room_but_not_on_metal(policy, monkeypatch):
    """The same function. A 4-bit copy that was asked for stays one."""
    _, trainer = policy
    tokens, seen = mx.array([[1, 2, 3, 4, 5]]), asked(trainer, monkeypatch)
    monkeypatch.setattr(patch, "setattr", monkeypatch.setattr, raising=False)
    for platform, copied, room, kind in (
        ("cuda", False, 10**9, "Linear"),
        ("cuda", False, 300_000, "LowRank"),  # of the 0.6 MB that it takes
        ("cuda", True, 10**9, "LowRank"),
        ("cpu", False, 10**9, "Linear"),
        ("metal", False, 10**9, "LowRank"),
    ):
        monkeypatch.setattr(runtime, "platform_name", lambda name=platform: name)
        monkeypatch.setattr(type(trainer.memory.plan), "spare_for_rollouts", room)
        trainer.quantizes = copied
        trainer.generate_responses([0])
        view = seen.pop()
        kinds = {type(module).__name__ for module in view.modules()}
        assert kind in kinds
        assert (kind == "Linear") == (not kinds & {"QuantizedLinear", "QuantizedEmbedding"})
        assert mx.abs(view(tokens) - trainer.model(tokens)).max() < 1e-4


@pytest.mark.parametrize("policy", ["4-bit"], indirect=True)
def test_a_quantized_base_is_unpacked_for_evaluations_and_adapters_stay(policy, monkeypatch):
    _, trainer = policy
    tokens, seen = mx.array([[1, 2, 3, 4, 5]]), asked(trainer, monkeypatch)
    trainer.answers(trainer.train_dataset[:2])
    kinds = {type(module) for module in seen[0].modules()}
    assert not kinds & {nn.QuantizedLinear, nn.QuantizedEmbedding}
    assert any("lora_a" in module for module in seen[0].modules())
    assert mx.abs(seen[0](tokens) - trainer.model(tokens)).max() < 1e-4
    monkeypatch.setattr(runtime, "platform_name", lambda: "metal")
    assert merged_layers.unpacked(trainer.model, 1e9) is trainer.model


def test_weights_whose_scales_are_bytes_stay_packed(model_dir):
    """They would come out in bfloat16, in a model that computes in float32."""
    model = mlx_lm.load(str(model_dir))[0]
    nn.quantize(model, 32, 4, mode="mxfp4")
    assert merged_layers.unpacked(model, 1e9) is model
    assert merged_layers.merged(model, 1e9, unpack=True) is model


@pytest.mark.parametrize("policy", ["4-bit"], indirect=True)
def test_all_that_is_unpacked_counts_and_is_computed_at_once(policy, monkeypatch):
    """The embedding, too, which has no adapter."""
    model = policy[1].model
    monkeypatch.setattr(runtime, "platform_name", lambda: "cuda")
    whole = merged_layers.merged(model, 1e9, unpack=True)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.eval(whole.parameters())
    assert mx.get_active_memory() == before
    size = sum(x.nbytes for name, x in flat(whole.parameters()).items() if "norm" not in name)
    for room, kind in ((2 * size, nn.Linear), (2 * size - 1, merged_layers.LowRank)):
        view = merged_layers.merged(model, room, unpack=True)
        assert type(view.layers[0].mlp.up_proj) is kind


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 512
ROTATIONS = {
    "traditional": {"rope_traditional": True},
    "stretched": {"rope_scaling": LLAMA3},
    "two bases": {"model_type": "gemma3_text", "layers": 4, **SLIDING, "rope_theta": 50.0},
    "a quarter": {
        "model_type": "stablelm",
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.25,
    },
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_views_rotate_as_the_model_does(grpo, tmp_path, kind):
    model, tokenizer = mlx_lm.load(str(make_model(tmp_path / "m", **ROTATIONS[kind])))
    view = merged_layers.joined(model, float("inf"))
    assert view is not model
    plain, ours = (sample(grpo, (m, tokenizer), random_prompts(5, 23, 9)) for m in (model, view))
    assert [c.ids for c in ours] == [c.ids for c in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_small_adapter_is_not_rounded_away(model_dir, data_dir, tmp_path):
    """bfloat16, and an adapter far below half a step of the weights: it still acts on average."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", train_type="lora", dtype="bfloat16")
    for block in trainer.model.model.layers:
        layer = block.mlp.up_proj
        layer.linear.weight = mx.ones_like(layer.linear.weight)
        rank = layer.lora_a.shape[1]
        layer.lora_a = mx.ones_like(layer.lora_a) * (2**-10 / rank / layer.scale)
        layer.lora_b = mx.ones_like(layer.lora_b)  # adds 2^-10 where a step is 2^-7
    nearest = layer.fuse().weight.astype(mx.float32) - 1
    assert mx.abs(nearest).max() == 0, "the plain way loses it"
    view = merged_layers.merged(trainer.model, 1e9)
    merged, other = (block.mlp.up_proj.weight for block in view.model.layers)
    assert not mx.array_equal(merged, other), "each layer by numbers of its own"
    assert merged.dtype == mx.bfloat16
    mean = float((merged.astype(mx.float32) - 1).mean())
    assert mean == pytest.approx(2**-10, rel=0.1)  # of 8,192 weights, an eighth is one step up
    again = merged_layers.merged(trainer.model, 1e9).model.layers[0].mlp.up_proj.weight
    assert mx.array_equal(merged, again), "a resumed run samples from the same weights"


def test_merging_takes_float32_copies_of_one_layer_at_a_time(data_dir, tmp_path):
    folder = make_model(tmp_path / "m", hidden=256, layers=8)
    settings = {"train_type": "lora", "dtype": "bfloat16"}
    model = make_trainer(folder, data_dir, tmp_path / "o", **settings).model
    mx.eval(model.parameters())
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    view = merged_layers.merged(model, 1e12)
    mx.eval(view.parameters())
    old = {id(x) for x in flat(model.parameters()).values()}
    new = sum(x.nbytes for x in flat(view.parameters()).values() if id(x) not in old)
    assert mx.get_peak_memory() - before < 1.5 * new


def test_adapters_in_float16_are_rounded_to_the_nearest(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", train_type="lora", dtype="float16")
    layer = trainer.model.model.layers[0].mlp.up_proj
    layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    exact = layer.linear.weight.astype(mx.float32) + (layer.scale * layer.lora_a @ layer.lora_b).T
    merged = merged_layers.merged(trainer.model, 1e9).model.layers[0].mlp.up_proj.weight
    assert merged.dtype == mx.float16
    assert mx.abs(merged - exact).max() <= mx.abs(exact).max() * 2**-11


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_quantized_model_is_joined_as_it_is(loaded, mode):
    model = copy.deepcopy(loaded[0])
    nn.quantize(model, group_size=32, bits=4, mode=mode)
    joined = merged_layers.joined(model, 1e9)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert joined is not model
    assert mx.abs(joined(tokens) - model(tokens)).max() < 1e-5
    packed = sum(m.mlp.gate_proj.weight.nbytes for m in model.layers)
    assert merged_layers.joined(model, packed) is model, "no room"


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_adapters_that_cannot_be_multiplied_out_stay_as_they_are(
    model_dir, data_dir, tmp_path, train_type
):
    """LoRA on scales that are bytes, and DoRA on any quantized layer."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", train_type=train_type)
    mode = "mxfp4" if train_type == "lora" else "affine"
    for _, module in trainer.model.named_modules():
        if "lora_a" in module:
            module.linear = nn.QuantizedLinear.from_linear(module.linear, 32, 4, mode)
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert merged_layers.merged(trainer.model, 1e9) is trainer.model
    view = merged_layers.joined(trainer.model, 1e9)
    assert mx.abs(view(tokens) - trainer.model(tokens)).max() < 1e-5


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_layers_of_several_widths_are_not_joined(model_dir, data_dir, tmp_path, train_type):
    """As mlx-lm's mixed recipes quantize: values and the way down finer than the rest."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", train_type=train_type)
    for name, module in trainer.model.named_modules():
        layer = module.get("linear", module)
        if type(layer) is nn.Linear:
            bits = 8 if "v_proj" in name else 4
            packed = nn.QuantizedLinear.from_linear(layer, 32, bits)
            if layer is module:
                trainer.model.update_modules(tree_unflatten([(name, packed)]))
            else:
                module.linear = packed
                module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    view = merged_layers.joined(merged_layers.merged(trainer.model, 1e9), 1e9)
    assert isinstance(view.layers[0].mlp.gate_proj, partial)
    assert not isinstance(view.layers[0].self_attn.q_proj, partial)
    assert mx.abs(view(tokens) - trainer.model(tokens)).max() < 1e-5


def test_nothing_is_joined_where_nothing_can_be_or_it_brings_nothing(loaded, monkeypatch):
    embedding = nn.Sequential(nn.Embedding(4, 4))
    assert merged_layers.joined(embedding, 1e9) is embedding
    assert merged_layers.joined(loaded[0], 1e9) is not loaded[0]
    monkeypatch.setattr(runtime, "platform_name", lambda: "metal")
    assert merged_layers.joined(loaded[0], 1e9) is loaded[0]


def test_what_a_product_computed_is_let_go(loaded):
    joined = merged_layers.joined(loaded[0], 1e9)
    joined(mx.array([[1, 2, 3]]))
    products = [layer.mlp.gate_proj.func.__self__ for layer in joined.layers]
    assert all(p.x is None and p.parts == [None, None] for p in products)
    x = mx.ones((1, 64))
    for _ in range(2):  # a layer that is asked twice answers twice
        assert mx.array_equal(products[0].part(0, x), products[0].part(0, x))
    y = 2 * x  # and one that another input interrupts gives the other's
    assert mx.allclose(products[0].part(1, y), loaded[0].layers[0].mlp.up_proj(y), atol=1e-5)


def test_adapters_are_merged_only_where_there_is_room(policy, monkeypatch):
    kind, trainer = policy
    seen = asked(trainer, monkeypatch)
    with_room = trainer.generate_responses([0])
    trainer.memory.plan = dataclasses.replace(trainer.memory.plan, budget_bytes=0)
    without = trainer.generate_responses([0])
    assert seen[1] is trainer.model
    assert (seen[0] is not trainer.model) == (kind != "plain")
    assert [r.ids for r in with_room] == [r.ids for r in without]
    trainer.evaluate_em(trainer.train_dataset, 2)
    assert seen[2] is trainer.model, "evaluated as it is, never rounded by merging"


def test_merging_and_joining_take_half_of_the_room_each(model_dir, data_dir, tmp_path):
    model = make_trainer(model_dir, data_dir, tmp_path / "o", train_type="lora").model
    weights = sum(m.linear.weight.nbytes for _, m in model.named_modules() if "lora_a" in m)
    merged = merged_layers.merged(model, 2 * weights)
    assert merged is not model
    assert merged_layers.merged(model, 2 * weights - 1) is model
    names = {name for names in merged_layers.TOGETHER for name in names}
    weights = sum(m.weight.nbytes for n, m in merged.named_modules() if n.split(".")[-1] in names)
    assert merged_layers.joined(merged, 2 * weights) is not merged
    assert merged_layers.joined(merged, 2 * weights - 1) is merged


def test_what_quantizing_costs_is_measured(model_dir, data_dir, tmp_path, monkeypatch):
    """Whichever is faster here: the note comes when the 4-bit copy is slower, and names the way."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", quantize_for_rollouts=True)
    rows, seconds = [], {True: 0.5, False: 0.1}
    measure = merged_layers._step_seconds

    def timed(model, count, limit=merged_layers.AFFORDABLE):
        assert measure(model, count, limit=60.0) is not None
        rows.append(count)
        took = seconds[any(isinstance(m, nn.QuantizedEmbedding) for m in model.modules())]
        return took if took <= limit else None

    monkeypatch.setattr(merged_layers, "_step_seconds", timed)
    note = next(introduction.quantizing(trainer, None))
    assert "500 ms a step of 8 rows against 100" in note
    assert "quantize_for_rollouts = false" in note
    for seconds[True] in (0.05, 0.105):
        assert not list(introduction.quantizing(trainer, None))
    for planned in (3, 64):
        trainer.memory.plan = dataclasses.replace(trainer.memory.plan, rollout_batch_size=planned)
        list(introduction.quantizing(trainer, None))
    assert rows == [8] * 6 + [3] * 2 + [8] * 2
    seconds[False] = 0.2
    assert not list(introduction.quantizing(trainer, None)), "too slow here to try the other"
    assert len(rows) == 11
    assert measure(trainer.model, 8, limit=0.0) is None
    assert trainer.model_old is None


def test_a_model_that_cannot_mask_padding_reads_one_prompt_at_a_time(data_dir, tmp_path, capsys):
    extra = {"query_pre_attn_scalar": 16, "sliding_window": 16}
    folder = make_model(tmp_path / "gemma2", model_type="gemma2", **extra)
    trainer = make_trainer(folder, data_dir, tmp_path / "o")
    lengths = {len(row["prompt_ids"]) for row in trainer.train_dataset[:6]}
    assert len(lengths) > 1
    together = trainer.generate_responses(list(range(6)))
    alone = [r for row in range(6) for r in trainer.generate_responses([row])]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert capsys.readouterr().out.count("gemma2 of mlx-lm can't mask") == 1


# Where completions end.


class Scripted(nn.Module):
    """Says the nth script, token by token, after the prompt [n]; what it has read is its cache."""

    def __init__(self, scripts):
        super().__init__()
        self.scripts = scripts
        self.layers = [None]
        self.rows = []

    def __call__(self, tokens, cache):
        self.rows.append(len(tokens))
        keys = tokens[:, None, :, None].astype(mx.float32)
        read = cache[0].update_and_fetch(keys, keys)[0][:, 0, :, 0].astype(mx.int32).tolist()
        said = [self.scripts[row[0]][: len(row)] for row in read]
        logits = np.zeros((len(read), 1, 384), np.float32)
        for i, script in enumerate(said):
            logits[i, 0, script[len(read[i]) - 1] if len(script) == len(read[i]) else 0] = 50.0
        return mx.array(logits)


@pytest.fixture(scope="module")
def letters(loaded):
    """Text -> one token per byte, as no merge would leave it."""
    vocabulary = loaded[1].get_vocab()
    from tokenizers.pre_tokenizers import ByteLevel

    def encode(text):
        pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        return [vocabulary[character] for piece, _ in pieces for character in piece]

    return encode


def say(grpo, loaded, scripts, stops=("</answer>",), max_tokens=40):
    """Greedy completions of scripted models, all in one batch."""
    model = Scripted(scripts)
    prompts = [[n] for n in range(len(scripts))]
    how = {"temperature": 0.0, "max_tokens": max_tokens, "stops": stops}
    return sample(grpo, (model, loaded[1]), prompts, **how), model


def test_a_stop_string_over_many_tokens_ends_where_it_ends(grpo, loaded, letters):
    """At every offset to the blocks in which the host looks, and in one batch."""
    offsets = range(3 * stop_rule.block_steps())
    texts = ["x" * n + "</answer>" for n in offsets]
    scripts = [letters(t + " and more of it") for t in texts]
    completions, _ = say(grpo, loaded, scripts, stops=("?", "</answer>"))
    for text, completion in zip(texts, completions, strict=True):
        assert completion.ids == letters(text)
        assert len(completion.logprobs) == len(completion.ids)
        assert (completion.text, completion.finish_reason) == (text, "stop")


def test_a_stop_string_inside_a_token_keeps_the_token(grpo, loaded, letters):
    """The ids hold what was sampled, the text ends right after the stop string."""
    (apples,) = loaded[1].encode(" apples", add_special_tokens=False)
    before = letters("ten")
    for count, stops in itertools.product(
        range(stop_rule.block_steps() + 1), (("apples", "app"), ("app",))
    ):
        script = [*before * count, apples, *letters(" or so")]
        (completion,), _ = say(grpo, loaded, [script], stops=stops)
        assert completion.ids == [*before * count, apples]
        assert completion.text == "ten" * count + " app"
        assert completion.finish_reason == "stop"


def test_the_first_of_several_stop_strings_counts(grpo, loaded, letters):
    script = letters("one two three")
    for stops in (("two", "three"), ("three", "two"), ("two", "wo")):
        (completion,), _ = say(grpo, loaded, [script], stops=stops)
        assert completion.ids == letters("one two")
        assert completion.text == "one two"


def test_a_stop_string_of_many_bytes_may_be_cut_anywhere(grpo, loaded, letters):
    script = letters("so ∴ é")
    assert len(script) == 9
    (completion,), _ = say(grpo, loaded, [script], stops=("∴ é",))
    assert (completion.ids, completion.text) == (script, "so ∴ é")


def test_almost_a_stop_string_is_none(grpo, loaded, letters):
    text = "</answe </answer </ answer>"
    (completion,), _ = say(grpo, loaded, [[*letters(text), EOS]])
    assert (completion.text, completion.finish_reason) == (text, "stop")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 23])
def test_eos_stays_in_the_ids_and_not_in_the_text(grpo, loaded, letters, length):
    for stops in ((), ("</answer>",)):
        script = [*letters("x" * length), EOS, EOS, *letters("y" * 40)]
        (completion,), _ = say(grpo, loaded, [script], stops)
        assert completion.ids == [*letters("x" * length), EOS]
        assert (completion.text, completion.finish_reason) == ("x" * length, "stop")


def test_only_tokens_that_can_end_a_stop_string_are_decoded(grpo, loaded, letters):
    """The rule is the same with and without that short cut."""
    generator = np.random.default_rng(3)
    alphabet = [*letters("</answer> ab"), *loaded[1].encode(" apples"), *letters("∴é"), EOS]
    for stops in (("</answer>",), ("a", "> "), ("∴",), ("b ", "r>")):
        for _ in range(200):
            ids = [alphabet[i] for i in generator.integers(0, len(alphabet), 40)]
            short, full = grpo.StopRule(loaded[1], stops), grpo.StopRule(loaded[1], stops)
            full._may_end = lambda _: True
            checked = 0
            while checked < 40 and (end := short.length(ids[: checked + 8], checked)) is None:
                assert full.length(ids[: checked + 8], checked) is None
                checked += 8
            assert checked >= 40 or end == full.length(ids[: checked + 8], checked)


def test_a_token_that_loses_its_space_when_decoded_alone_may_end_a_stop_string(grpo):
    """As SentencePiece's do."""
    tokenizer = Tokenizer(WordLevel({"</s>": 0, "a": 1, "\u2581": 2, "b": 3}, unk_token="</s>"))
    tokenizer.decoder = Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    rule = grpo.StopRule(TokenizerWrapper(wrapped), ["a ", "x"])
    assert rule.tokenizer.decode([2]) == ""
    assert rule.length([1, 2, 3], 1) == 2
    assert rule.length([1, 3, 2], 1) is None
    assert rule.text([1, 2, 3]) == "a "


def test_whichever_comes_first_of_eos_and_stop_string_ends_it(grpo, loaded, letters):
    stop_first = [*letters("a</answer>"), EOS]
    eos_first = [*letters("a"), EOS, *letters("</answer>")]
    eos_within = [*letters("</ans"), EOS, *letters("wer>")]
    completions, _ = say(grpo, loaded, [stop_first, eos_first, eos_within])
    assert [c.ids for c in completions] == [stop_first[:-1], eos_first[:2], eos_within[:6]]
    assert [c.text for c in completions] == ["a</answer>", "a", "</ans"]


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 20])
def test_length_is_the_limit_and_the_last_token_may_still_stop(grpo, loaded, letters, limit):
    endless = letters("x" * 40)
    eos_last = [*letters("x" * (limit - 1)), EOS, *letters("x" * 40)]
    half_a_stop = [*letters("x" * (limit - 1)), *letters("ab")]
    stop_last = [*letters("x" * (limit - 1)), *letters("a")]
    scripts = [endless, eos_last, half_a_stop, stop_last]
    completions, _ = say(grpo, loaded, scripts, stops=("ab",), max_tokens=limit)
    assert [len(c.ids) for c in completions] == [limit] * 4
    reasons = [c.finish_reason for c in completions]
    assert reasons == ["length", "stop", "length", "length"]


def test_the_batch_ends_with_its_last_row(grpo, loaded, letters):
    """One block behind the device: at most two blocks are sampled for nothing."""
    _, model = say(grpo, loaded, [[*letters("x" * n), EOS] for n in (0, 3, 10)], max_tokens=400)
    assert len(model.rows) <= 11 + 2 * stop_rule.block_steps()


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_rows_leave_once_an_eighth_of_the_batch_has_ended(
    grpo, loaded, letters, monkeypatch, platform
):
    """Not for each: caches are copied. What other rows say does not change."""
    monkeypatch.setattr(runtime, "platform_name", lambda: platform)  # steps are not compiled here
    lengths = [4, 12, *[40] * 3, 20, 28, *[40] * 9]
    texts = ["abcdefghijklmnop"[n] * length for n, length in enumerate(lengths)]
    completions, model = say(grpo, loaded, [[*letters(t), EOS] for t in texts])
    assert [completion.text for completion in completions] == texts
    assert [rows for rows, _ in itertools.groupby(model.rows)] == [16, 14, 12]


def test_rewards_read_the_prefix_too(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", stop_strings=["t"])
    prefix = trainer.tokenizer.encode("<reasoning>\n", add_special_tokens=False)
    for response in trainer.generate_responses([0]):
        ids = response.ids[:-1] if response.ids[-1] == EOS else response.ids
        text = trainer.tokenizer.decode(ids)
        text = text[: text.find("t") + 1] if "t" in text else text
        assert response.text == "<reasoning>\n" + text
        assert len(response.ids) <= trainer.args.max_new_tokens
    assert trainer.train_dataset[0]["prompt_ids"][-len(prefix) :] == prefix


def test_the_entropy_of_a_token_is_that_of_its_whole_distribution(grpo, model_dir):
    model = grpo.load_model(grpo.MLXGRPOConfig(model_name=str(model_dir))).model
    tokens = mx.array([[1, 2, 3, 4, 5]])
    _, entropy = grpo.token_logprobs(model, tokens, 3, 0.7, with_entropy=True)
    logits = np.array(model(tokens[:, :-1])[:, -3:].astype(mx.float32)) / 0.7
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-4)
