"""The fast ways to score give the gradient of the plain one, or are left out and that is said."""

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import (
    as_batch,
    completion,
    gradient,
    make_trainer,
    micro_batches,
    mostly_long,
    one_operation_at_a_time,
    relative_difference,
    rollout,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from utils.device import runtime
from utils.gradient import agreement, packing
from utils.gradient import head as head_module
from utils.gradient import scorer as scoring
from utils.gradient.micro_batch import tree_of
from utils.gradient.shared_prompts import CompletionCache, checkpoint_layers
from utils.memory.plan import MAX_LOGITS

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8, "sliding_window_pattern": 2}
CONVOLUTIONS = {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64}
CONVOLUTIONS |= {"block_ff_dim": 96, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0}
CONVOLUTIONS |= {"block_auto_adjust_ff_dim": False, "full_attn_idxs": [1, 3]}
SHARING = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "mixtral": EXPERTS,
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16},  # windows in some blocks
    "cohere": {"logit_scale": 0.25},  # a factor behind the projection
    "nanochat": {},  # a soft cap behind it, and its own name for the layers
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_ctx": 128, "n_positions": 128}
    | {"layer_norm_epsilon": 1e-5},  # positions that are looked up
}
NOT_SHARING = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "lfm2": CONVOLUTIONS,
}


def build(kind, changes):
    from mlx_lm.utils import _get_classes

    config = {"model_type": kind, **SHAPE, **changes}
    model_class, arguments = _get_classes(config)
    mx.random.seed(0)
    model = model_class(arguments.from_dict(config))
    model.update(tree_map(lambda p: p * 3 if p.ndim > 1 else p, model.parameters()))
    return model


GROUPS = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12, 13, 14, 15]]


def make_pairs():
    """Four prompts with the completions of GROUPS, all of uneven lengths from one token up."""
    generator = np.random.default_rng(0)

    def ids(count):
        return generator.integers(3, 300, count).tolist()

    prompts = [ids(n) for n in (12, 12, 23, 1)]
    groups = zip(prompts, GROUPS, strict=True)
    return [(prompt, ids(generator.integers(1, 15))) for prompt, group in groups for _ in group]


PAIRS = make_pairs()
ADVANTAGES = np.random.default_rng(1).normal(size=len(PAIRS))


def packs_of(scorer, tokens=10**6, piece=7 * SHAPE["vocab_size"], keep=False, pairs=None):
    """The update of all pairs, cut as the memory plan decides."""
    pairs = PAIRS if pairs is None else pairs
    scorer.piece, scorer.keep = piece, keep
    return scorer.pack(pairs, range(len(pairs)), tokens)


def checked(grpo, model):
    """A scorer that has compared its ways with the plain one."""
    scorer = scoring.Scorer(grpo.token_logprobs, compiled=False)
    scorer.check(model, [prompt for prompt, _ in PAIRS])
    return scorer


def total_gradient(model, scorer, packs):
    """Of a loss with log-probs and entropies, summed over micro-batches, and its largest value."""
    total = None
    for pack in packs:
        pairs = [PAIRS[i] for i in pack.rows]
        batch = agreement.plain_batch(pairs)
        masks = [[1] * len(ids) for _, ids in pairs]
        mask, total_tokens = np.array(batch.mask), batch.tokens.shape[1]
        batch.layout = scorer.layout(pack, pairs, masks, mask, total_tokens)
        advantages = mx.array(ADVANTAGES[pack.rows])[:, None]

        def loss(batch=batch, advantages=advantages):
            logprobs, entropies = scorer(model, batch, 0.7, with_entropy=True)
            return ((advantages * logprobs + 0.2 * entropies) * batch.mask).sum()

        new = nn.value_and_grad(model, loss)()[1]
        total = new if total is None else tree_map(mx.add, total, new)
    return dict(tree_flatten(total))


def expected_gradient(grpo, model):
    plain = scoring.Scorer(grpo.token_logprobs, compiled=False)
    everything = [packing.Pack([list(range(len(PAIRS)))])]
    return total_gradient(model, plain, everything)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(scoring, "say", lines.append)
    return lines


@pytest.mark.parametrize(
    "kind",
    mostly_long([*SHARING, *NOT_SHARING], "gemma3_text", "cohere", "gpt2", "gemma2"),
)
def test_every_way_has_the_gradient_of_the_plain_one(grpo, kind, said):
    model = build(kind, {**SHARING, **NOT_SHARING}[kind])
    expected = expected_gradient(grpo, model)
    scorer = checked(grpo, model)
    assert packs_of(scorer, pairs=[]) == [], "an update may have nothing to learn from"
    packs = packs_of(scorer)
    assert scorer.splits
    assert scorer.shares == (kind in SHARING)
    assert len(said) == (kind in NOT_SHARING)
    assert len(scorer.names) == 1, "the projection, tied or not, and nothing else"
    whole = total_gradient(model, scorer, packs)
    assert relative_difference(expected, whole) <= 1e-5
    if scorer.shares:
        together = total_gradient(model, scorer, [packing.Pack(GROUPS, shared=True)])
        assert relative_difference(expected, together) <= 1e-5
    small = packs_of(scorer, 40, 16 * SHAPE["vocab_size"])
    assert len(small) > 3
    assert relative_difference(expected, total_gradient(model, scorer, small)) <= 1e-5
    packs_of(scorer, keep=True)
    assert relative_difference(expected, total_gradient(model, scorer, packs)) <= 1e-5
    checkpoint_layers(model)
    assert relative_difference(expected, total_gradient(model, scorer, packs)) <= 1e-5
    scorer.shapes = packing.Shapes(bucketed=True)
    padded = packs_of(scorer, 200)
    assert relative_difference(expected, total_gradient(model, scorer, padded)) <= 1e-5
    assert len(said) == (kind in NOT_SHARING), "once"
    assert kind != "lfm2" or "keeps more than keys and values (ArraysCache)" in said[0]


@pytest.mark.parametrize(
    "wrong", ["no gradient", "none at first", "position", "mask", "window", "order"]
)
def test_what_is_wrong_is_found_and_left_out(grpo, wrong, said, monkeypatch):
    """The check at the start, and with it the test above, can fail."""
    fetch, mask = CompletionCache.update_and_fetch, CompletionCache.make_mask
    layers = itertools.cycle(range(SHAPE["num_hidden_layers"]))

    def update_and_fetch(self, keys, values):
        if (next(layers) == 0 and wrong == "none at first") or wrong == "no gradient":
            self.state = tuple(mx.stop_gradient(s) for s in self.state)
        if wrong == "order":
            self.state = tuple(s[::-1] for s in self.state)
        return fetch(self, keys, values)

    def make_mask(self, length, return_array=False, window_size=None):
        right = mask(self, length, return_array, None if wrong == "window" else window_size)
        if wrong == "position":
            self.offset = self.offset + 1
        return mx.ones_like(right) if wrong == "mask" else right

    monkeypatch.setattr(CompletionCache, "update_and_fetch", update_and_fetch)
    monkeypatch.setattr(CompletionCache, "make_mask", make_mask)
    windows = {**SHARING["gemma3_text"], "sliding_window": 32}
    model = build("gemma3_text", windows) if wrong == "window" else build("qwen2", {})
    scorer = checked(grpo, model)
    packs = packs_of(scorer)
    assert not scorer.shares
    assert "own prompt" in said[0]
    assert len(said) == 1
    assert (
        relative_difference(expected_gradient(grpo, model), total_gradient(model, scorer, packs))
        <= 1e-5
    )


def test_an_error_that_nobody_foresaw_is_no_answer(grpo, monkeypatch):
    def failing(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(scoring, "gradient_of_first", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        checked(grpo, build("qwen2", {}))


VALUES, GRADIENT = mx.array([-2.0, -1.0]), [mx.array([3.0, -4.0])]
ALTERNATING, NAN = mx.array([0.05, -0.05]), mx.array([0.0, float("nan")])
APART = [  # type of the model, values, gradient, what is said
    ("float32", VALUES + 0.005, [1.01 * GRADIENT[0]], ""),
    ("float32", VALUES + 0.05, GRADIENT, "differs by 0.05 "),
    ("float32", VALUES + ALTERNATING, GRADIENT, "differs by 0.05 "),
    ("float32", VALUES + NAN, GRADIENT, "differs by nan "),
    ("float32", VALUES[:1], GRADIENT, r"has shape \(1,\) instead of \(2,\)"),
    ("float32", VALUES, [1.05 * GRADIENT[0]], "gradients differ by 0.05 "),
    ("float32", VALUES, [GRADIENT[0] + NAN], "gradients differ by nan "),
    ("bfloat16", VALUES + 0.05, [1.2 * GRADIENT[0]], ""),
    ("bfloat16", VALUES + 0.2, GRADIENT, "differs by 0.2 "),
    ("bfloat16", VALUES, [1.4 * GRADIENT[0]], "gradients differ by 0.4 "),
    ("mixed", VALUES + 0.05, [1.2 * GRADIENT[0]], ""),  # as LoRA's float32 on a base in bfloat16
]


@pytest.mark.parametrize(("dtype", "values", "gradient", "said"), APART, ids=range(len(APART)))
def test_what_is_too_far_apart(dtype, values, gradient, said):
    model = nn.Linear(2, 2)
    model.set_dtype(mx.float32 if dtype == "float32" else mx.bfloat16)
    if dtype == "mixed":
        model.bias = model.bias.astype(mx.float32)
    text = agreement.disagreement(model, (VALUES, GRADIENT), (values, gradient))
    assert re.search(said, text) if said else text == ""
    nothing = [mx.zeros(2)]
    assert agreement.disagreement(model, (VALUES, nothing), (VALUES, nothing)) == ""


def test_a_model_that_cannot_be_taken_apart_is_scored_the_plain_way(grpo, said):
    class Scaled(type(build("qwen2", {}))):
        """Uses its input beside the hidden states, as no model of mlx-lm does."""

        def __call__(self, inputs, cache=None, input_embeddings=None):
            logits = super().__call__(inputs, cache, input_embeddings)
            return logits * (1 + 0.1 * inputs[..., None])

    model = build("qwen2", {})
    object.__setattr__(model, "__class__", Scaled)
    scorer = checked(grpo, model)
    packs = packs_of(scorer)
    assert not scorer.splits
    assert "all positions" in said[0]
    masks = [[1] * 4] * len(PAIRS)
    assert scorer.layout(packs[0], PAIRS, masks, np.ones((len(PAIRS), 4)), 5) is None
    assert scorer.vocabulary == SHAPE["vocab_size"]
    for limit in range(60, 120, 3):
        scorer.vocabulary = MAX_LOGITS // limit
        packs = packs_of(scorer)
        assert len(packs) > 1
        for pack in packs:
            longest = max(len(prompt) + len(ids) for prompt, ids in (PAIRS[i] for i in pack.rows))
            assert len(pack.rows) * longest <= limit, "MLX could not index the logits of more"


@dataclass
class Output:
    hidden: mx.array


PACKED = {
    "tuple": (lambda x: (x, None), lambda out: out[0]),
    "dictionary": (lambda x: {"hidden": x}, lambda out: out["hidden"]),
    "object": (Output, lambda out: out.hidden),
    "name": (lambda x: x, lambda out: out),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_model_of_a_form_of_its_own_is_scored_the_plain_way(grpo, said, kind):
    """Its layers return more than hidden states, or have another name than in mlx-lm's models."""
    pack, unpack = PACKED[kind]

    class Layers(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, tokens, cache=None):
            return pack(self.inner.model(tokens, cache))

    class Model(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self["blocks" if kind == "name" else "model"] = Layers(inner)
            self.layers = inner.layers

        def __call__(self, tokens, cache=None):
            layers = self.blocks if kind == "name" else self.model
            return unpack(layers(tokens, cache)) @ mx.ones((64, 300))

    scorer = checked(grpo, Model(build("qwen2", {})))
    assert not scorer.splits
    assert len(said) == 1
    assert "all positions" in said[0]


def test_pieces_of_any_size_are_the_whole():
    """Down to one position each, where memory is for less than its logits."""
    model = build("qwen2", {"num_hidden_layers": 1})
    hidden = mx.random.normal((7, 64), key=mx.random.key(1))
    names, targets = ["model.embed_tokens.weight"], mx.arange(7)
    results = []
    for piece in (10**9, 3 * 300, 1):

        def loss(hidden, piece=piece):
            scores = head_module.head_logprobs(model, names, hidden, targets, 0.7, True, piece)
            return scores[0].sum() + 0.3 * scores[1].sum()

        results.append(mx.value_and_grad(loss)(hidden))
    (value, d_hidden), *in_pieces = results
    for other_value, other in in_pieces:
        assert other_value.item() == pytest.approx(value.item(), rel=1e-5)
        assert mx.allclose(other, d_hidden, atol=1e-5)


def test_a_token_that_is_nearly_certain_has_its_gradient():
    """1 - p is 0.003 beside logits of 37, of which float32 knows 2e-6: taken off each other, that
    was 6e-4 of the gradient, and 3e-4 in MLX's own. The whole of gemma2, whose tied logits make
    random weights certain, differed from mlx-lm's by 1e-3 for no other reason."""
    logits = np.random.default_rng(0).normal(size=(8, 300)) + 25
    logits[:, 0] = 37
    given = mx.array(logits, mx.float32)
    exact = np.array(given, float)
    p = np.exp(exact - exact.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    expected = -p
    expected[:, 0] = p[:, 1:].sum(axis=1)
    assert expected[0, 0] == pytest.approx(0.003, rel=0.1)
    targets = mx.zeros(8, mx.int32)

    def error(score):
        got = np.array(mx.grad(lambda z: score(z).sum())(given))
        return np.linalg.norm(got - expected) / np.linalg.norm(expected)

    ours = error(lambda z: head_module.from_logits(z, targets, 1.0, False)[0])
    assert ours < 3e-4
    assert ours < error(lambda z: z[:, 0] - mx.logsumexp(z, axis=-1))


def peak_of_head(vocabulary, trainable, piece, keep=False):
    """Bytes that scoring 512 hidden states takes, forward and backward, above what there was."""
    model = build("qwen2", {"vocab_size": vocabulary, "num_hidden_layers": 1})
    if not trainable:
        model.freeze()
    hidden = mx.random.normal((512, 64))
    targets = mx.zeros(512, mx.int32)
    names = ["model.embed_tokens.weight"]

    def loss(parameters, hidden):
        model.update(parameters)
        how = {"piece": piece * vocabulary, "keep": keep}
        return head_module.head_logprobs(model, names, hidden, targets, 1.0, **how)[0].sum()

    mx.eval(model.parameters(), hidden, targets)
    mx.synchronize()
    with one_operation_at_a_time():
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        value, gradients = mx.value_and_grad(loss, (0, 1))(model.trainable_parameters(), hidden)
        mx.eval(value, gradients)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("trainable", [True, False])
def test_logits_exist_for_one_piece_at_a_time(trainable):
    vocabulary = 8000
    logits = 512 * vocabulary * 4
    weights = 2 * vocabulary * 64 * 4 * trainable  # the gradient, and that of one piece
    assert peak_of_head(vocabulary, trainable, 512) > 1.9 * logits
    assert peak_of_head(vocabulary, trainable, 32) < 0.35 * logits + weights
    assert peak_of_head(vocabulary, trainable, 32, keep=True) > 0.9 * logits, "not made again"


def test_the_plan_says_how_many_logits_exist_and_whether_they_stay(grpo, monkeypatch):
    model, made, head = build("qwen2", {}), [], head_module.head
    scorer = checked(grpo, model)
    packs = packs_of(scorer)
    monkeypatch.setattr(head_module, "head", lambda *a: (made.append(len(a[1])), head(*a))[1])
    scored = sum(len(ids) for _, ids in PAIRS)
    for size, keep, times in ((7, False, 2), (7, True, 1), (20, False, 2)):
        packs_of(scorer, piece=size * SHAPE["vocab_size"], keep=keep)
        made.clear()
        total_gradient(model, scorer, packs)
        assert size // 2 < max(made) <= size
        assert sum(made) - len(packs) == times * scored, "one for the size of the vocabulary"


def test_padded_sizes_are_few_and_little_more():
    """A compiled function is traced once per size, and computes what it is padded by."""
    plain, padded = packing.Shapes(), packing.Shapes(bucketed=True)
    assert [padded.length(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 96]
    assert [padded.rows(n) for n in (1, 2, 3, 4, 5, 8, 9, 16)] == [1, 2, 4, 4, 8, 8, 16, 16]
    assert (plain.length(33), plain.rows(9), plain.scored(33, 64)) == (33, 9, 33)
    for room in (1, 2, 3, 7, 64, 101):
        sizes = [padded.scored(n, room) for n in range(1, room + 1)]
        assert len(set(sizes)) <= 4
        assert all(n <= size <= room for n, size in enumerate(sizes, 1))
        assert all(size < n + room / 4 + 1 for n, size in enumerate(sizes, 1))

    def layout(count):
        mask = np.arange(64)[None] < count
        masks = [[1] * count]
        found = packing.layout_groups([[([1] * 9, [2] * count)]], masks, mask, padded)
        return {name: x.shape for name, x in tree_flatten(tree_of(found))}

    assert layout(50) == layout(60)


row = st.tuples(st.integers(0, 3), st.integers(1, 90))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bucketed", [True, False])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=40), budget=st.integers(1, 1500))
def test_packs_hold_every_row_once_within_the_budget(rows, budget, bucketed, shared):
    shapes = packing.Shapes(bucketed=bucketed)
    prompts = [5, 40, 41, 200]
    rows = [packing.Row(i, g, prompts[g], n) for i, (g, n) in enumerate(rows)]
    pack = packing.pack_groups if shared else packing.pack_rows
    packs = pack(rows, budget, shapes)
    assert sorted(i for p in packs for i in p.rows) == list(range(len(rows)))
    for p in packs:
        members = [[rows[i] for i in group] for group in p.groups]
        if shared:
            assert all(len({r.group for r in group}) == 1 for group in members)
            pairs = [[([1] * r.prompt, [2] * r.completion) for r in group] for group in members]
            counts = np.array([rows[i].completion for i in p.rows])
            mask = np.arange(max(counts)) < counts[:, None]
            masks = [[1] * count for count in counts]
            read = packing.layout_groups(pairs, masks, mask, shapes).shared
            tokens = read.prompts.size + read.rows[:, :-1].size
        else:
            longest = max(r.prompt + r.completion for r in members[0])
            tokens = shapes.rows(len(members[0])) * (1 + shapes.length(longest - 1))
        assert tokens <= budget or len(p.rows) == 1


def test_a_group_stays_together_until_that_costs_more():
    shapes = packing.Shapes(overhead=32)

    def cut(lengths, budget=10**6):
        rows = [packing.Row(i, 0, 50, n) for i, n in enumerate(lengths)]
        packs = packing.pack_groups(rows, budget, shapes)
        return [len(piece) for pack in packs for piece in pack.groups]

    assert cut([100] * 8) == [8]
    assert cut([100] * 8, budget=449) == [4, 4], "as many as there is room for, its prompt repeated"
    assert cut([100] * 6, budget=449) == [3, 3], "split evenly"
    assert cut([10] * 7 + [400]) == [1, 7], "padding all to 400 costs more than the prompt again"
    assert cut([10, 400] * 4) == [4, 4]
    assert cut([90] * 7 + [100]) == [8]


@pytest.mark.parametrize(("device", "each"), [(mx.cpu, [1, 7]), (mx.gpu, [8])])
def test_another_micro_batch_costs_a_gpu_more_than_padding(monkeypatch, device, each):
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(runtime, "platform_name", lambda: "metal")  # CUDA pads to its shapes, too
    scorer = scoring.Scorer(None, compiled=False)
    scorer.splits = True  # and no prompt is shared
    pairs = [([1] * 50, [2] * length) for length in (10, 10, 10, 150, 10, 10, 10, 10)]
    packs = packs_of(scorer, pairs=pairs)
    assert sorted(len(pack.rows) for pack in packs) == each


@pytest.mark.parametrize(("compiled", "cuda"), [(False, False), (True, False), (False, True)])
def test_what_is_traced_or_has_kernels_for_shapes_is_padded(monkeypatch, compiled, cuda):
    monkeypatch.setattr(runtime, "platform_name", lambda: "cuda" if cuda else "cpu")
    prompts, completions = [[3] * 5] * 3, [completion([4] * 9)] * 3
    pack = packing.Pack([[0, 1, 2]])
    batch = scoring.Scorer(None, compiled).pad(prompts, completions, np.ones(3), np.ones(3), pack)
    padded = compiled or cuda
    assert batch.tokens.shape == ((4, 33) if padded else (3, 14))
    assert batch.mask.shape == ((4, 32) if padded else (3, 9))
    assert batch.weights.tolist() == [1, 1, 1, 0][: len(batch.mask)]


def test_groups_of_a_trainer_are_scored_together(grpo, model_dir, data_dir, tmp_path):
    """One pass over each prompt, and less to compute, for the plain gradient."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", kl_coeff=0.2)
    sample = rollout(trainer)
    batches = micro_batches(trainer, sample, 10**6)
    (batch,) = batches
    groups, rows = batch.layout.shared.prompts.shape[0], batch.layout.shared.rows.shape
    assert groups == 3
    assert rows[0] == 12
    assert rows[1] - 1 == max(len(r.ids) for r in sample[1])
    batch.ref_logprobs = trainer.rescored(trainer.ref_model, batch)[0]
    fast_loss, fast = gradient(trainer, batches)
    plain = dataclasses.replace(batch, layout=None)
    width = plain.mask.shape[1]
    reference, _ = grpo.token_logprobs(trainer.ref_model, plain.tokens, width, 1.0)
    assert mx.allclose(batch.ref_logprobs, reference * batch.mask, atol=1e-5)
    loss, expected = gradient(trainer, [plain])
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert relative_difference(expected, fast) <= 1e-5


@pytest.mark.parametrize("train_type", mostly_long(["lora", "dora"], "dora"))
@pytest.mark.parametrize(
    "options",
    mostly_long(
        [
            {},
            {"gradient_checkpointing": True},
            {"use_compile": True},
            {"gradient_checkpointing": True, "use_compile": True},
        ],
        {},
        {"gradient_checkpointing": True},
        {"use_compile": True},
    ),
)
def test_adapters_on_a_quantized_base(grpo, quantized_dir, data_dir, tmp_path, train_type, options):
    settings = {"train_type": train_type, "lora_layers": 1, "lora_rank": 4, **options}
    trainer = make_trainer(quantized_dir, data_dir, tmp_path / "o", **settings)
    trainer.model.update(tree_map(lambda p: p + 0.02, trainer.model.trainable_parameters()))
    batches = micro_batches(trainer, rollout(trainer), 10**6)
    assert trainer.scorer.names == []
    assert trainer.scorer.shares
    fast = gradient(trainer, batches)[1]
    trainer.args.use_compile = False
    expected = gradient(trainer, [dataclasses.replace(b, layout=None) for b in batches])
    assert relative_difference(expected[1], fast) <= 1e-5


def test_the_benchmark_measures_the_same_gradient_in_every_way(monkeypatch, tmp_path, capsys):
    from benchmarks import scoring_ways

    for name, value in {"PROMPT": 9, "COMPLETION": 12, "EACH": 2}.items():
        monkeypatch.setattr(scoring_ways, name, value)
    monkeypatch.setattr(scoring_ways, "RECORDS", tmp_path / "ways.jsonl")
    monkeypatch.setitem(scoring_ways.WAYS["completions"], "length", 32)
    options = {"shape": "tiny", "dtype": "float32", "compile": False, "repeats": 1}
    ways = list(scoring_ways.WAYS)
    scoring_ways.run(SimpleNamespace(**options, groups=[2], ways=ways))
    records = [json.loads(line) for line in (tmp_path / "ways.jsonl").read_text().splitlines()]
    assert [record["way"] for record in records] == ways
    assert all(record["distance"] <= 1e-5 and record["ms"] > 0 for record in records)
    assert len(scoring_ways.table(records)) == 2 + len(ways)


def test_a_way_that_is_refused_leaves_the_weights_alone(model_dir, data_dir, tmp_path):
    """Whether a model can share prompts is found out by the errors of its code, while its weights
    are replaced by what has a gradient."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", gradient_checkpointing=True)
    before = dict(tree_flatten(trainer.model.parameters()))

    def refused(model, *_):
        model(mx.zeros((1, 3), mx.int32))
        raise ValueError("cannot broadcast")

    batch = as_batch(mask=mx.ones((1, 2)))
    with pytest.raises(ValueError, match="broadcast"):
        agreement.gradient_of_first(trainer.model, refused, batch)
    after = dict(tree_flatten(trainer.model.parameters()))
    assert all(after[name] is value for name, value in before.items())
