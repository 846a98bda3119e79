"""Decode steps that are compiled for every position are the plain ones."""

import gc
import sys
import weakref

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import make_model
from test_sampling import random_prompts, sample

from utils import attention, caches, decoding


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Steps are compiled, on the CPU; attention stays MLX's own, with masks."""
    monkeypatch.setattr(decoding, "_ways", {})
    monkeypatch.setattr(caches, "STEP", 7)  # room for so many tokens at a time
    monkeypatch.setattr(attention, "install", lambda model: None)

    def switch(on):
        monkeypatch.setattr(mx.cuda, "is_available", lambda: on)

    switch(False)  # on a machine with CUDA, too
    return switch


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("ragged", [True, False])
def test_compiled_steps_sample_the_same(
    grpo, tmp_path, monkeypatch, as_on_cuda, capsys, family, ragged
):
    """With prompts of several lengths, rows that leave, and caches that grow."""
    loaded = mlx_lm.load(str(make_model(tmp_path / "m", model_type=family)))
    prompts = random_prompts(5, 23, 2, 40) if ragged else random_prompts(9, 9)
    rows, stops = [n % len(prompts) for n in range(12)], tuple("taei01")
    plain = sample(grpo, loaded, prompts, rows, stops=stops)
    assert len({len(completion.ids) for completion in plain}) > 3
    steps, counts = [], []
    call, trace = decoding.CompiledStep.__call__, decoding._at_position

    def counted(self, tokens):
        steps.append(len(tokens))
        return call(self, tokens)

    def traced(*arguments):
        counts.append(len(arguments[2]))
        return trace(*arguments)

    monkeypatch.setattr(decoding.CompiledStep, "__call__", counted)
    monkeypatch.setattr(decoding, "_at_position", traced)
    as_on_cuda(True)
    ours = sample(grpo, loaded, prompts, rows, stops=stops)
    assert len(steps) > 2 * len(counts) > 0, "built less often than used"
    assert len(set(steps)) > 2, "rows leave"
    assert [c.ids for c in ours] == [c.ids for c in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert "not compiled" not in capsys.readouterr().out


def test_a_model_that_needs_positions_as_numbers_is_not_compiled(
    grpo, tmp_path, as_on_cuda, capsys
):
    sizes = {"n_embd": 64, "n_layer": 2, "n_inner": 64, "n_head": 4, "n_positions": 128}
    extra = {**sizes, "layer_norm_epsilon": 1e-5}
    loaded = mlx_lm.load(str(make_model(tmp_path / "m", model_type="gpt_bigcode", **extra)))
    plain = sample(grpo, loaded, random_prompts(9, 9))
    as_on_cuda(True)
    for _ in range(2):
        ours = sample(grpo, loaded, random_prompts(9, 9))
        assert [c.ids for c in ours] == [c.ids for c in plain]
    assert capsys.readouterr().out.count("steps of gpt_bigcode are not compiled") == 1


def test_a_model_that_cannot_mask_rows_is_not_compiled(grpo, tmp_path, as_on_cuda, capsys):
    """With one row, or as many as heads of keys, its mask of rows passes for one of heads."""
    extra = {"query_pre_attn_scalar": 16}
    for heads in (1, 2):
        size = {"num_key_value_heads": heads}
        folder = make_model(tmp_path / str(heads), model_type="gemma2", **extra, **size)
        loaded = mlx_lm.load(str(folder))
        as_on_cuda(False)
        plain = sample(grpo, loaded, random_prompts(9), rows=[0] * 5)
        as_on_cuda(True)
        ours = sample(grpo, loaded, random_prompts(9), rows=[0] * 5)
        assert [c.ids for c in ours] == [c.ids for c in plain]
    assert capsys.readouterr().out.count("steps of gemma2 are not compiled") == 2


def test_a_head_that_is_not_trained_yet_is_compiled(grpo, tmp_path, as_on_cuda, capsys):
    """All logits are 0, so that there is no spread to compare a difference with."""
    folder = make_model(tmp_path / "m", tie_word_embeddings=False)
    model, tokenizer = mlx_lm.load(str(folder))
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    plain = sample(grpo, (model, tokenizer), random_prompts(9, 7))
    as_on_cuda(True)
    assert [c.ids for c in sample(grpo, (model, tokenizer), random_prompts(9, 7))] == [
        c.ids for c in plain
    ]
    assert "not compiled" not in capsys.readouterr().out


def test_the_cache_goes_with_the_step(model_dir, as_on_cuda):
    """At once: the gradient, or a second try after memory ran out, needs its room."""
    model, _ = mlx_lm.load(str(model_dir))
    as_on_cuda(True)
    cache = caches.prefill(model, random_prompts(9, 7), [0, 0, 1], 20)
    forward = decoding.forward(model, cache)
    for _ in range(9):
        mx.eval(forward(mx.ones((3, 1), mx.int32)))
    layer = weakref.ref(cache[0])
    gc.collect()
    gc.disable()
    try:
        del cache, forward
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("level", [0.0, 1000.0])
def test_a_model_that_leaves_out_the_mask_is_found(
    grpo, model_dir, monkeypatch, as_on_cuda, capsys, level
):
    """It would attend to the room that is left. The level of all logits means nothing."""
    loaded = mlx_lm.load(str(model_dir))
    forward = type(loaded[0]).__call__
    monkeypatch.setattr(type(loaded[0]), "__call__", lambda *a, **k: forward(*a, **k) + level)
    plain = sample(grpo, loaded, random_prompts(9, 9))
    module = sys.modules[type(loaded[0]).__module__]
    function = module.scaled_dot_product_attention
    monkeypatch.setattr(
        module,
        "scaled_dot_product_attention",
        lambda *a, mask, **k: function(*a, mask=mask if mask == "causal" else None, **k),
    )
    as_on_cuda(True)
    ours = sample(grpo, loaded, random_prompts(9, 9))
    assert [c.ids for c in ours] == [c.ids for c in plain]
    assert "steps of llama are not compiled, and slower for it: the logits differ" in (
        capsys.readouterr().out
    )


def test_each_size_of_a_model_is_compared_once(grpo, tmp_path, as_on_cuda):
    for name, layers in ("small", 1), ("large", 2):
        loaded = mlx_lm.load(str(make_model(tmp_path / name, layers=layers)))
        as_on_cuda(True)
        for _ in range(2):
            sample(grpo, loaded, random_prompts(9, 9))
        as_on_cuda(False)
    assert list(decoding._ways.values()) == [decoding.CompiledStep] * 2


@pytest.mark.parametrize("window", [None, 3, 6, 100])
def test_masks_and_offsets_at_a_position_are_those_of_the_number(window):
    room = 24
    for lengths in ([5, 2, 9], [4, 4]):
        rows = caches.Rows(lengths, 14)
        for end in range(max(lengths), max(lengths) + 12):
            offset, mask = rows.offset(end), rows.mask(end, window)
            expected = np.zeros((len(lengths), room), bool)
            expected[:, : end + 1] = True if mask is None else np.array(mask)[:, 0, 0]
            rows.position = mx.full((len(lengths),), end)
            assert np.array_equal(rows.mask_at_position(room, window)[:, 0, 0], expected)
            assert np.array_equal(rows.offset(end), np.broadcast_to(offset, len(lengths)))
            rows.position = None


@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_kernel_stores_what_later_steps_see(grpo, tmp_path, monkeypatch, capsys, family):
    monkeypatch.setattr(decoding, "_ways", {})
    monkeypatch.setattr(caches, "STEP", 7)
    loaded = mlx_lm.load(str(make_model(tmp_path / "m", model_type=family)))
    prompts, stops = random_prompts(5, 23, 2, 40), tuple("taei01")
    with mx.stream(mx.gpu):
        completions = sample(grpo, loaded, prompts, stops=stops)
    assert list(decoding._ways.values()) == [decoding.StoringStep]
    assert len({len(completion.ids) for completion in completions}) > 2
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = mx.array([prompt + completion.ids])
        logprobs, _ = grpo.token_logprobs(loaded[0], tokens, len(completion.ids), 1.0)
        assert mx.abs(logprobs[0] - mx.array(completion.logprobs)).max().item() < 0.02


@pytest.fixture
def eager():
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_attention_goes_by_rows(grpo, tmp_path, monkeypatch, eager):
    """As on CUDA, with masks made from what the kernel is told; other caches go by mlx-lm's way."""
    loaded = mlx_lm.load(str(make_model(tmp_path / "m", model_type="qwen2")))
    prompts, stops = random_prompts(5, 23, 2, 40), tuple("taei01")
    plain = sample(grpo, loaded, prompts, stops=stops)
    module = sys.modules[type(loaded[0]).__module__]
    monkeypatch.setattr(module, "scaled_dot_product_attention", module.scaled_dot_product_attention)
    monkeypatch.setattr(decoding, "_ways", {})
    monkeypatch.setattr(caches, "STEP", 7)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "fits", lambda *_: True)
    calls = []

    def to_rows(queries, new_keys, new_values, keys, values, ends, padding, position, scale):
        calls.append(queries.shape[0])
        mx.eval(new_keys, new_values, keys, values)
        for new, stored in ((new_keys, keys), (new_values, values)):  # in place, as the kernel
            np.array(stored, copy=False)[:, :, position[0].item()] = np.array(new)[:, :, 0]
        at, ends, gaps = mx.arange(keys.shape[2]), ends[:, None], padding[:, None]
        seen = (at < ends) | (at >= ends + gaps) & (at <= position[:, None])
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=seen[:, None, None]
        )

    monkeypatch.setattr(attention, "to_rows", to_rows)
    ours = sample(grpo, loaded, prompts, stops=stops)
    assert list(decoding._ways.values()) == [decoding.StoringStep]
    assert len(set(calls)) > 3  # rows have left
    assert [c.ids for c in ours] == [c.ids for c in plain]
    del calls[:]
    assert len(list(mlx_lm.stream_generate(*loaded, prompts[0], max_tokens=5))) == 5
    assert not calls


CASES = [  # rows, query heads, heads of keys, head size, position, type, largest difference
    (4, 12, 2, 128, 200, mx.float32, 1e-5),
    (4, 12, 2, 128, 200, mx.bfloat16, 0.01),
    (4, 12, 2, 128, 4000, mx.bfloat16, 0.01),
    (4, 12, 2, 128, 200, mx.float16, 0.002),
    (4, 7, 1, 128, 151, mx.float32, 1e-5),
    (3, 14, 2, 64, 200, mx.bfloat16, 0.01),
    (3, 32, 1, 96, 200, mx.bfloat16, 0.01),
    (3, 6, 3, 80, 200, mx.float32, 1e-5),
    (2, 8, 8, 32, 200, mx.float32, 1e-5),
    (2, 4, 2, 48, 200, mx.bfloat16, 0.01),
    (1, 16, 1, 256, 200, mx.float32, 1e-5),
]


@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("count", "heads", "groups", "size", "end", "dtype", "limit"), CASES)
def test_attention_to_rows_is_mlxs_with_a_mask(count, heads, groups, size, end, dtype, limit):
    """For queries that are a part of a larger array, as those of a joined product are.

    The reference is the CPU's: products of float32 are rounded to TF32 on the GPU.
    """
    keys = mx.random.split(mx.random.key(1), 3)
    product = mx.random.normal((count, 1, (heads + 2 * groups) * size), key=keys[0]).astype(dtype)
    parts = [product[..., : heads * size], *mx.split(product[..., heads * size :], 2, axis=-1)]
    queries, *new = [
        part.reshape(count, 1, -1, size).transpose(0, 2, 1, 3) for part in parts
    ]  # (count, heads, 1, size), (count, groups, 1, size) twice
    shape = (count, groups, end + 100, size)
    stored = [mx.random.normal(shape, key=key).astype(dtype) for key in keys[1:]]
    expected = [
        mx.put_along_axis(x, mx.array([[[[end]]]]), y, 2) for x, y in zip(stored, new, strict=True)
    ]
    rows = caches.Rows([150, 20, 100, 1][:count], end)
    rows.position = mx.full((count,), end)
    mx.eval(stored, new, queries, expected)
    with mx.stream(mx.gpu):
        place = rows.ends, rows.padding, rows.position
        got = attention.to_rows(queries, *new, *stored, *place, size**-0.5)
        mx.eval(got)
    assert all(mx.array_equal(x, y) for x, y in zip(stored, expected, strict=True))
    floats = [x.astype(mx.float32) for x in (queries, *expected)]
    mask = rows.mask_at_position(shape[2], None)
    expected = mx.fast.scaled_dot_product_attention(*floats, scale=size**-0.5, mask=mask)
    difference = mx.abs(got.astype(mx.float32) - expected).max().item()
    assert difference < limit
