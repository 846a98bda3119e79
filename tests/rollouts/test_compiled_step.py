"""Decode steps that are compiled for every position are the plain ones."""

import copy
import ctypes
import gc
import itertools
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import make_model
from helpers import mostly_long, random_prompts, sample

from utils.device import patch, runtime
from utils.device.cuda import attention, products, swiglu
from utils.rollouts import caches, compiled_step, merged_layers

KERNEL = attention.to_rows
# macOS has fibers no more, and its g++ is clang.
HAS_CPP = sys.platform == "linux" and shutil.which("g++") is not None


def rotated(x, rotation, offset):
    dims, traditional, frequencies = rotation
    angles = offset[:, None, None, None] * mx.array(frequencies)
    cos, sin = mx.cos(angles), mx.sin(angles)
    turned = x[..., :dims].astype(mx.float32)
    if traditional:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        turned = pairs.reshape(turned.shape)
    else:
        a, b = mx.split(turned, 2, axis=-1)
        turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return mx.concatenate([turned.astype(x.dtype), x[..., dims:]], axis=-1)


def to_rows(queries, keys, values, cache, scale, rotation=None):
    """What the kernel computes; it stores in place, which MLX's own operations can't."""
    rows, count = cache.rows, cache.keys.shape[2]
    if rotation:
        queries, keys = (rotated(x, rotation, rows.offset_at_position) for x in (queries, keys))
    at = rows.position[:, None, None, None]
    cache.keys = mx.put_along_axis(cache.keys, at, keys, axis=2)
    cache.values = mx.put_along_axis(cache.values, at, values, axis=2)
    n = mx.arange(count)
    seen = (n >= rows.padding[:, None, None, None]) & (n <= at)
    return mx.fast.scaled_dot_product_attention(
        queries, cache.keys, cache.values, scale=scale, mask=seen
    )


def to_rows_of_product(product, heads, cache, scale, rotation):
    """The same for parts of a product."""
    count, groups, size = len(product), cache.keys.shape[1], cache.keys.shape[3]
    parts = mx.split(product, [heads * size, (heads + groups) * size], axis=-1)
    queries, *new = (x.reshape(count, -1, 1, size) for x in parts)
    return to_rows(queries, *new, cache, scale, rotation).reshape(count, -1)


def swiglu_of_product(product):
    gate, x = mx.split(product, 2, axis=-1)
    return nn.silu(gate) * x


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Steps are compiled, on the CPU."""
    monkeypatch.setattr(compiled_step, "_usable", {})
    monkeypatch.setattr(caches, "STEP", 7)  # room for so many tokens at a time
    monkeypatch.setattr(attention, "fits", lambda *_: True)
    monkeypatch.setattr(attention, "to_rows", to_rows)
    monkeypatch.setattr(attention, "to_rows_of_product", to_rows_of_product)
    monkeypatch.setattr(swiglu, "of_product", swiglu_of_product)
    monkeypatch.setattr(products, "LARGEST", 0)

    # Until the test ends:
    monkeypatch.setattr(patch, "setattr", monkeypatch.setattr, raising=False)

    def switch(on):
        monkeypatch.setattr(runtime, "platform_name", lambda: "cuda" if on else "cpu")

    return switch


@pytest.mark.parametrize(
    ("family", "ragged"),
    mostly_long(
        itertools.product(["llama", "qwen2", "qwen3"], [True, False]),
        ("llama", True),
        ("qwen3", False),
    ),
)
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
    call, trace = compiled_step.CompiledStep.__call__, compiled_step._at_position

    def counted(self, tokens):
        steps.append(len(tokens))
        return call(self, tokens)

    def traced(*arguments):
        counts.append(len(arguments[2]))
        return trace(*arguments)

    monkeypatch.setattr(compiled_step.CompiledStep, "__call__", counted)
    monkeypatch.setattr(compiled_step, "_at_position", traced)
    as_on_cuda(True)
    ours = sample(grpo, loaded, prompts, rows, stops=stops)
    assert len(steps) > 2 * len(counts) > 0, "built less often than used"
    del steps[:2]  # of the comparison
    assert len(set(steps)) > 1, "rows leave"
    assert all(2 * b <= a or a == b for a, b in itertools.pairwise(steps)), "by halves"
    assert [c.ids for c in ours] == [c.ids for c in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert "not compiled" not in capsys.readouterr().out


def test_places_that_are_filled_again_compile_nothing_anew(
    grpo, model_dir, monkeypatch, as_on_cuda
):
    """Longer prompts come too, which the batch has to move for."""
    loaded, stops = mlx_lm.load(str(model_dir)), tuple("taei01")
    prompts = random_prompts(5, 9, 2, 5, 40, 3, 7, 5, 23, 6)
    rows = [n % len(prompts) for n in range(40)]
    plain = sample(grpo, loaded, prompts, rows, stops=stops)
    shapes, refills = [], []
    trace, refill = compiled_step._at_position, caches.refill

    def traced(*given):
        shapes.append((len(given[2]), given[5][0][0].shape[2]))
        return trace(*given)

    def noted(cache, keep, model, prompts, rows, *more):
        refills.append(len(rows))
        refill(cache, keep, model, prompts, rows, *more)

    monkeypatch.setattr(compiled_step, "_at_position", traced)
    monkeypatch.setattr(caches, "refill", noted)
    monkeypatch.setattr(caches, "STEP", 100)
    as_on_cuda(True)
    ours = sample(grpo, loaded, prompts, rows, stops=stops, places=8)
    assert [c.ids for c in ours] == [c.ids for c in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    full = [room for count, room in shapes if count == 8]
    assert sum(map(bool, refills)) > 3
    assert len(full) == len(set(full)) <= 3, "once for each room"


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 5), (2,), (2, 3)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_short_prompts_and_completions_take_compiled_steps(
    grpo, model_dir, as_on_cuda, lengths, tokens
):
    """The comparison takes two steps, also where a batch takes one."""
    loaded, prompts = mlx_lm.load(str(model_dir)), random_prompts(*lengths)
    plain = sample(grpo, loaded, prompts, max_tokens=tokens)
    as_on_cuda(True)
    ours = sample(grpo, loaded, prompts, max_tokens=tokens)
    assert [c.ids for c in ours] == [c.ids for c in plain]
    assert list(compiled_step._usable.values()) == ["its own"] * (max(lengths) > 1)


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
    forward = compiled_step.forward(model, cache)
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
def test_a_model_with_an_attention_of_its_own_is_found(
    grpo, model_dir, monkeypatch, as_on_cuda, capsys, level
):
    """It would attend to the new token alone. The level of all logits means nothing."""
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


def test_prompts_of_one_token_alone_hide_no_attention(grpo, tmp_path, as_on_cuda, capsys):
    """The first to ask may be the comparison with 4-bit rollouts, whose prompts are such."""
    folder = make_model(tmp_path / "m", model_type="gemma2", query_pre_attn_scalar=16)
    model, tokenizer = mlx_lm.load(str(folder))
    plain = sample(grpo, (model, tokenizer), random_prompts(9), rows=[0] * 5)
    as_on_cuda(True)
    assert merged_layers._step_seconds(model, 5, limit=float("inf"))
    assert "steps of gemma2 are not compiled" in capsys.readouterr().out
    ours = sample(grpo, (model, tokenizer), random_prompts(9), rows=[0] * 5)
    assert [c.ids for c in ours] == [c.ids for c in plain]


def test_each_size_of_a_model_is_compared_once(grpo, tmp_path, as_on_cuda):
    for name, layers in ("small", 1), ("large", 2):
        loaded = mlx_lm.load(str(make_model(tmp_path / name, layers=layers)))
        as_on_cuda(True)
        for _ in range(2):
            sample(grpo, loaded, random_prompts(9, 9))
        as_on_cuda(False)
    assert list(compiled_step._usable.values()) == ["its own", "its own"]


@pytest.mark.parametrize("window", [3, 15, 16, 100])
def test_a_window_is_for_plain_steps_unless_it_holds_everything(window):
    rows = caches.Rows([5, 2], 11)  # positions 0 to 15
    cache = caches.RolloutCache(rows)
    rows.be_at(mx.full((2,), 9), rows.padding)
    assert cache.make_mask(1) is rows.all_seen
    assert (cache.make_mask(1, window_size=window) is rows.all_seen) == (window >= 16)
    assert cache.offset.tolist() == [9, 6]


@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_kernel_stores_what_later_steps_see(grpo, tmp_path, monkeypatch, capsys, family):
    monkeypatch.setattr(compiled_step, "_usable", {})
    monkeypatch.setattr(caches, "STEP", 7)
    loaded = mlx_lm.load(str(make_model(tmp_path / "m", model_type=family)))
    prompts, stops = random_prompts(5, 23, 2, 40), tuple("taei01")
    with mx.stream(mx.gpu):
        completions = sample(grpo, loaded, prompts, stops=stops)
    assert list(compiled_step._usable.values()) == ["its own"]
    assert len({len(completion.ids) for completion in completions}) > 2
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = mx.array([prompt + completion.ids])
        logprobs, _ = grpo.token_logprobs(loaded[0], tokens, len(completion.ids), 1.0)
        assert mx.abs(logprobs[0] - mx.array(completion.logprobs)).max().item() < 1e-3


@pytest.mark.parametrize(
    ("size", "dims", "traditional"),
    [(80, 80, True), (80, 32, False), (48, 16, False), (64, 48, False), (8, 8, False)],
)
def test_pairs_that_the_lanes_cannot_exchange_are_rotated_by_mlx(size, dims, traditional):
    """Next to each other in two lanes; no whole number of lanes apart, or six; less than a lane."""
    assert attention.rotation_of(dims, size, traditional, 1e4, 1.0) is None


def test_the_rotary_embedding_is_left_to_the_kernel(grpo, tmp_path, monkeypatch, as_on_cuda):
    """That of queries and keys which go straight into attention."""
    seen = []
    monkeypatch.setattr(attention, "to_rows", lambda *a: seen.append(a[5]) or to_rows(*a))
    as_on_cuda(True)
    for family, fused in ("qwen2", True), ("qwen3", True), ("olmo2", True), ("cohere", False):
        extra = {"use_qk_norm": True, "logit_scale": 1.0} if family == "cohere" else {}
        loaded = mlx_lm.load(str(make_model(tmp_path / family, model_type=family, **extra)))
        sample(grpo, loaded, random_prompts(9, 9))
        assert {bool(rotation) for rotation in seen} == {fused}, family
        del seen[:]


def test_what_the_kernel_would_rotate_otherwise_mlx_rotates(monkeypatch, as_on_cuda):
    """Elsewhere than the step is, only queries or only keys, or not alike."""
    rows, seen = caches.Rows([4, 2], 9), []
    monkeypatch.setattr(attention, "to_rows", lambda *given: seen.append(given))
    rows.be_at(mx.full((2,), 4), rows.padding)
    cache, x = caches.RolloutCache(rows), mx.random.normal((2, 2, 1, 16), key=mx.random.key(0))

    def rope(offset=rows.offset_at_position, base=1e4):
        return mx.fast.rope(x, 16, traditional=False, base=base, scale=1.0, offset=offset)

    attend = partial(attention.dispatching(None), cache=cache, scale=1.0, mask=rows.all_seen)
    with attention.noting_rotations(rows):
        assert len({id(rope()) for _ in range(5)}) == 5, "no array takes the place of a noted one"
        here, elsewhere, other = rope(), rope(rows.position), rope(base=1e6)
        attend(here, here, x)
        assert seen[-1][0] is seen[-1][1] is x
        assert seen[-1][5] == attention.rotation_of(16, 16, False, 1e4, 1.0)
        for queries, keys in (here, elsewhere), (here, x), (x, here), (here, other):
            attend(queries, keys, x)
            assert seen[-1][0] is queries
            assert seen[-1][1] is keys
            assert seen[-1][5] is None


def test_nothing_is_left_of_a_step_that_fails():
    rows, plain = caches.Rows([4, 2], 9), mx.fast.rope
    rows.be_at(mx.full((2,), 4), rows.padding)

    def failing_step():
        with attention.noting_rotations(rows):
            nn.RoPE(16)(mx.ones((2, 2, 1, 16)), offset=rows.offset_at_position)
            assert rows.rotated
            raise KeyError

    with pytest.raises(KeyError):
        failing_step()
    assert mx.fast.rope is plain
    assert not rows.rotated


def test_other_caches_go_by_the_attention_of_mlx_lm(grpo, tmp_path, monkeypatch, as_on_cuda):
    loaded = mlx_lm.load(str(make_model(tmp_path / "m", model_type="qwen2")))
    calls = []
    monkeypatch.setattr(attention, "to_rows", lambda *a: calls.append(1) or to_rows(*a))
    as_on_cuda(True)
    sample(grpo, loaded, random_prompts(9, 9))
    assert calls
    del calls[:]
    assert len(list(mlx_lm.stream_generate(*loaded, random_prompts(9)[0], max_tokens=5))) == 5
    assert not calls


@pytest.mark.parametrize("what", ["sinks", "mask", "type"])
def test_what_the_kernel_does_not_take_is_refused(model_dir, monkeypatch, as_on_cuda, what):
    """So that the steps of such a model are not compiled."""
    as_on_cuda(True)
    monkeypatch.setattr(attention, "fits", lambda *x: len({y.dtype for y in x}) == 1)
    cache = caches.RolloutCache(caches.Rows([4, 4], 9))
    cache.keys = cache.values = mx.zeros((2, 2, 9, 16))
    cache.rows.be_at(mx.full((2,), 4), cache.rows.padding)
    queries, new = mx.zeros((2, 4, 1, 16)), mx.zeros((2, 2, 1, 16))
    given = {"cache": cache, "scale": 1.0, "mask": cache.rows.all_seen, "sinks": None}
    dispatching = attention.dispatching(None)
    assert dispatching(queries, new, new, **given).shape == queries.shape
    other = {"sinks": {"sinks": mx.zeros(4)}, "mask": {"mask": None}, "type": {}}[what]
    if what == "type":
        queries = queries.astype(mx.float16)
    with pytest.raises(ValueError, match="not a plain one to all tokens"):
        dispatching(queries, new, new, **(given | other))


ROTARY = {
    "whole": {"dims": 128, "traditional": False, "base": 1e6, "scale": 1.0},
    "part": {"dims": 32, "traditional": False, "base": 1e4, "scale": 0.5},
    "traditional": {"dims": 48, "traditional": True, "base": 1e4, "scale": 1.0},
    "periods": {
        **{"dims": 64, "traditional": False, "base": None, "scale": 1.0},
        "freqs": mx.arange(1, 33) * 3.0,
    },
}
CASES = [  # rows, query heads, heads of keys, head size, position, type, largest difference, RoPE
    (4, 12, 2, 128, 200, mx.float32, 1e-5, ""),
    (4, 12, 2, 128, 200, mx.float32, 2e-5, "whole"),
    (4, 12, 2, 128, 200, mx.bfloat16, 0.02, "whole"),
    (4, 7, 1, 128, 151, mx.float32, 1e-5, ""),
    (3, 14, 2, 64, 200, mx.bfloat16, 0.01, ""),
    (3, 14, 2, 64, 200, mx.float32, 2e-5, "part"),
    (3, 14, 2, 64, 200, mx.float32, 2e-5, "periods"),
    (3, 32, 1, 96, 200, mx.bfloat16, 0.01, ""),
    (3, 6, 3, 80, 200, mx.float32, 1e-5, ""),
    (3, 6, 3, 64, 200, mx.float32, 2e-5, "traditional"),
    (2, 4, 2, 48, 200, mx.bfloat16, 0.01, ""),
    (2, 8, 8, 32, 200, mx.float32, 1e-5, ""),
    (1, 16, 1, 256, 200, mx.float32, 1e-5, ""),
]
IN_SHORT = (2, 8)  # of these
MORE = [  # on CUDA: C++ takes long for the first, and has no type for the second
    (4, 12, 2, 128, 4000, mx.bfloat16, 0.01, ""),
    (4, 12, 2, 128, 200, mx.float16, 0.002, ""),
]


@pytest.mark.parametrize("kind", ROTARY)
def test_rotations_are_those_of_mlx(kind):
    how = ROTARY[kind]
    x, offset = mx.random.normal((2, 3, 1, 128), key=mx.random.key(0)), mx.array([7, 300])
    expected = mx.fast.rope(x, **how, offset=offset)
    got = rotated(x, attention.rotation_of(size=128, **how), offset)
    assert mx.abs(got - expected).max() < 1e-4


class Kernel:
    """The kernel's source as C++ on the CPU, in place of `attention.kernel`."""

    def __init__(self, folder):
        self.folder, self.libraries = folder, {}

    def __call__(self, scale, given="parts"):
        return partial(self.launch, scale, given)

    def launch(
        self, scale, given, inputs, template, grid, threadgroup, output_shapes, output_dtypes
    ):
        mx.eval(inputs)
        names, where = attention.GIVEN[given]
        inputs = [*inputs[:1] * (3 // len(names)), *inputs[1:]]  # of a product all three are parts
        out = mx.zeros(output_shapes[0], output_dtypes[0])
        mx.eval(out)
        arrays = [self.view(x) for x in (*inputs[:5], out, *inputs[5:])]
        pointers = [x.ctypes.data for x in arrays]
        queries, new_keys, new_values, keys = arrays[:4]
        sizes = [(ctypes.c_int * 4)(*keys.shape)]
        sizes += [
            (ctypes.c_int64 * 4)(*(n // x.itemsize for n in x.strides))
            for x in (queries, new_keys, new_values)
        ]
        pointers = (ctypes.c_void_p * 14)(*pointers, *map(ctypes.addressof, sizes))
        self.library(scale, where, dict(template)).launch(
            pointers, grid[0], grid[1], threadgroup[0]
        )
        return [out]

    @staticmethod
    def view(x):
        """Of the same memory; numpy has no bfloat16."""
        y = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
        mx.eval(y)
        return np.array(y, copy=False)

    def library(self, scale, where, template):
        key = repr((scale, where, template))
        if key not in self.libraries:
            name = self.folder / str(len(self.libraries))
            source = attention.SOURCE.replace("WHERE", where).replace("SCALE", f"{scale!r}f")
            name.with_suffix(".inc").write_text(source)
            kind = {mx.float32: "float", mx.bfloat16: "bfloat16"}[template.pop("T")]
            template["TRADITIONAL"] = int(template["TRADITIONAL"])
            defined = {"T": kind, "SOURCE": f'"{name}.inc"', **template}
            options = [f"-D{name}={value}" for name, value in defined.items()]
            code = Path(__file__).parents[1] / "cuda_on_cpu.cpp"
            output = name.with_suffix(".so")
            build = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *options, code]
            subprocess.run([*build, "-o", output], check=True)
            self.libraries[key] = ctypes.CDLL(str(output))
        return self.libraries[key]


@pytest.fixture(scope="module")
def cpp_kernel(tmp_path_factory):
    return Kernel(tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize(
    ("device", "count", "heads", "groups", "size", "end", "dtype", "limit", "rotary"),
    [
        *mostly_long([("C++", *case) for case in CASES], *(("C++", *CASES[n]) for n in IN_SHORT)),
        *(("CUDA", *case) for case in [*CASES, *MORE]),
    ],
)
def test_attention_to_rows_is_mlxs_with_a_mask(
    monkeypatch, cpp_kernel, device, count, heads, groups, size, end, dtype, limit, rotary
):
    """For queries that are a part of a larger array, as those of a joined product are."""
    if device == "CUDA" and not mx.cuda.is_available():
        pytest.skip("needs CUDA")
    monkeypatch.setattr(attention, "MANY", 6)  # blocks: the larger batches get a warp each
    if device == "C++":
        if not HAS_CPP:
            pytest.skip("needs g++ on Linux")
        monkeypatch.setattr(attention, "kernel", cpp_kernel)
    keys = mx.random.split(mx.random.key(1), 3)
    product = mx.random.normal((count, 1, (heads + 2 * groups) * size), key=keys[0]).astype(dtype)
    parts = [product[..., : heads * size], *mx.split(product[..., heads * size :], 2, axis=-1)]
    queries, *new = [
        part.reshape(count, 1, -1, size).transpose(0, 2, 1, 3) for part in parts
    ]  # (count, heads, 1, size), (count, groups, 1, size) twice
    shape = (count, groups, end + 100, size)
    cache = caches.RolloutCache(caches.Rows([150, 20, 100, 1][:count], end))
    cache.rows.be_at(mx.full((count,), end), cache.rows.padding)
    rotation = rotary and attention.rotation_of(size=size, **ROTARY[rotary])
    assert bool(rotation) == bool(rotary)
    cache.keys, cache.values = (mx.random.normal(shape, key=k).astype(dtype) for k in keys[1:])
    reference = copy.copy(cache)
    floats = [x.astype(mx.float32) for x in (queries, *new)]
    expected = to_rows(*floats, reference, size**-0.5, rotation)
    mx.eval(queries, new, expected, cache.keys, cache.values, reference.keys, reference.values)
    of_product, whole = copy.copy(cache), attention.to_rows_of_product
    of_product.keys, of_product.values = cache.keys + 0, cache.values + 0
    mx.eval(of_product.keys, of_product.values)
    with mx.stream(mx.gpu if device == "CUDA" else mx.cpu):
        got = attention.to_rows(queries, *new, cache, size**-0.5, rotation)
        same = whole(product[:, 0], heads, of_product, size**-0.5, rotation)
        mx.eval(got, same)
    assert mx.array_equal(same.reshape(got.shape), got)
    assert mx.array_equal(of_product.keys, cache.keys)
    assert mx.array_equal(of_product.values, cache.values)
    for name in ("keys", "values"):
        apart = getattr(cache, name).astype(mx.float32) - getattr(reference, name)
        assert mx.abs(apart).max().item() <= (limit if rotary and name == "keys" else 0)
    difference = mx.abs(got.astype(mx.float32) - expected).max().item()
    assert difference < limit


@pytest.mark.skipif(not HAS_CPP, reason="needs g++ on Linux")
@pytest.mark.parametrize("ragged", [True, False])
def test_what_is_stored_in_place_is_the_caches_own(
    grpo, model_dir, monkeypatch, as_on_cuda, cpp_kernel, ragged
):
    """Whole rollouts with the kernel as C++: no copy of a cache sees what is stored in another."""
    loaded = mlx_lm.load(str(model_dir))
    prompts = random_prompts(5, 23, 2, 40) if ragged else random_prompts(9, 9)
    rows, stops = [n % len(prompts) for n in range(6)], tuple("taei01")
    plain = sample(grpo, loaded, prompts, rows, stops=stops)
    assert len({len(completion.ids) for completion in plain}) > 2, "rows leave"
    monkeypatch.setattr(attention, "to_rows", KERNEL)
    monkeypatch.setattr(attention, "kernel", cpp_kernel)
    monkeypatch.setattr(attention, "WORKERS", 2)  # of 16 lanes each: one warp
    monkeypatch.setattr(mx, "compile", lambda function: function)  # it calculates, not traces
    as_on_cuda(True)
    ours = sample(grpo, loaded, prompts, rows, stops=stops)
    assert list(compiled_step._usable.values()) == ["its own"]
    assert [c.ids for c in ours] == [c.ids for c in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
