"""What a model folder says of its size: by arithmetic, from headers, from the hub."""

import json
import struct

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from conftest import make_model
from helpers import QWEN_1_5B, TINY, WITHOUT_ATTENTION, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mixtral, qwen2, qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import get_total_parameters

from utils.model import shape as model_shape

QWEN = model_shape.shape_from_config(QWEN_1_5B, 2)
QWEN_4_BIT = model_shape.shape_from_config(QWEN_1_5B, 4.5 / 8)


def write_folder(folder, config, shards):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, weights in shards.items():
        mx.save_safetensors(str(folder / name), weights)
    return folder


@pytest.fixture
def folder(tmp_path):
    weights = dict(tree_flatten(tiny_model().parameters()))
    return write_folder(tmp_path / "model", TINY, {"model.safetensors": weights})


def test_parameters_of_qwen_1_5b_by_arithmetic():
    assert QWEN.parameters == 1_543_714_304
    assert QWEN.bytes_on_disk == 2 * 1_543_714_304
    assert QWEN_4_BIT.quantized_bits == 4
    assert QWEN_4_BIT.bytes_on_disk == pytest.approx(0.868e9, rel=0.001)


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (qwen2, {}),
        (qwen2, {"tie_word_embeddings": False}),
        (llama, {"model_type": "llama", "tie_word_embeddings": False}),
        (qwen3, {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e4}),
        (mixtral, {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_arithmetic_counts_what_mlx_lm_builds(module, changes):
    config = {**TINY, "max_position_embeddings": 128, **changes}
    if module is mixtral:
        config["tie_word_embeddings"] = False
    model = module.Model(module.ModelArgs.from_dict(config))
    shape = model_shape.shape_from_config(config, 4)
    assert shape.parameters == sum(v.size for _, v in tree_flatten(model.parameters()))


def test_folder_is_read_from_headers(folder):
    shape = model_shape.read_shape(folder)
    arithmetic = model_shape.shape_from_config(TINY, 4)
    assert shape == arithmetic
    assert (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads) == (64, 2, 4, 2)
    assert (shape.head_dim, shape.intermediate_size, shape.vocab_size) == (16, 128, 96)
    assert (shape.tied, shape.quantized_bits, shape.activation) == (True, None, "silu")
    gemma = {**TINY, "hidden_activation": "gelu_pytorch_tanh"}
    assert model_shape.shape_from_config(gemma, 4).activation == "gelu_pytorch_tanh"


def test_shards_add_up_and_a_stored_tied_head_does_not(folder, tmp_path):
    weights = dict(tree_flatten(tiny_model().parameters()))
    names = sorted(weights)
    shards = {
        "model-00001-of-00002.safetensors": {n: weights[n] for n in names[::2]},
        "model-00002-of-00002.safetensors": {n: weights[n] for n in names[1::2]}
        | {"lm_head.weight": mx.zeros((96, 64))},
    }
    sharded = write_folder(tmp_path / "sharded", TINY, shards)
    assert model_shape.read_shape(sharded) == model_shape.read_shape(folder)


def test_quantized_folder_counts_unpacked_weights(tmp_path):
    model = tiny_model(dtype=mx.bfloat16)
    expected = get_total_parameters(model)
    nn.quantize(
        model,
        32,
        4,
        class_predicate=lambda path, m: "embed" not in path and hasattr(m, "to_quantized"),
    )
    nn.quantize(model, 32, 8, class_predicate=lambda path, m: "embed" in path)
    weights = dict(tree_flatten(model.parameters()))
    quantization = {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"bits": 8, "group_size": 32},
    }
    config = {**TINY, "quantization": quantization}
    shape = model_shape.read_shape(
        write_folder(tmp_path / "q", config, {"model.safetensors": weights})
    )
    assert shape.parameters == expected
    assert shape.quantized_bits == 4
    assert shape.bytes_on_disk == sum(v.nbytes for v in weights.values())
    assert set(shape.bytes_by_dtype) == {"U32", "BF16"}


def damage(folder, what):
    config, weights = folder / "config.json", folder / "model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = {"dtype": "F32", "shape": [2]}
    entries = {n: {**entry, "data_offsets": [s, s + 8]} for n, s in (("a", 0), ("b", 4))}
    overlap = json.dumps(entries).encode()
    contents = {
        "config missing": (config, None),
        "config garbage": (config, b"{not json"),
        "config list": (config, b"[]"),
        "no layers": (config, json.dumps({**TINY, "num_hidden_layers": 0}).encode()),
        "no weights": (weights, None),
        "empty": (weights, b""),
        "huge header": (weights, struct.pack("<Q", 1 << 60) + data[8:]),
        "header cut": (weights, data[: length // 2]),
        "data cut": (weights, data[:-100]),
        "header garbage": (weights, data[:8] + b"\xff" * length + data[8 + length :]),
        "bad entry": (weights, struct.pack("<Q", 12) + b'{"a": "bad"}'),
        "overlap": (weights, struct.pack("<Q", len(overlap)) + overlap + bytes(12)),
        "shard missing": (
            folder / "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        ),
    }
    path, content = contents[what]
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config missing", "config.json: missing"),
        ("config garbage", "config.json: not JSON"),
        ("config list", "config.json: a JSON object was expected"),
        ("no layers", "config.json: num_hidden_layers must be a positive integer, got 0"),
        ("no weights", "no model\\*.safetensors"),
        ("empty", "model.safetensors: truncated"),
        ("huge header", "model.safetensors: truncated, or not a safetensors file"),
        ("header cut", "model.safetensors: truncated, or not a safetensors file"),
        ("data cut", "model.safetensors: truncated, 100 bytes of weights are missing"),
        ("header garbage", "model.safetensors: not JSON"),
        ("bad entry", "model.safetensors: bad header entry for tensor 'a'"),
        ("overlap", "model.safetensors: tensors overlap, so the file is damaged"),
        ("shard missing", "model-00001-of-00002.safetensors: missing, but model.safetensors.index"),
    ],
)
def test_damage_names_the_file_and_the_problem(folder, what, message):
    damage(folder, what)
    with pytest.raises(ValueError, match=message):
        model_shape.read_shape(folder)


def test_hub_model_uses_the_cached_copy_or_its_headers(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: str(folder / "config.json"))
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *a, **k: None)
    monkeypatch.setattr(hub, "get_safetensors_metadata", lambda *a, **k: pytest.fail("asked"))
    whole = model_shape.read_shape(folder)
    assert model_shape.read_hub_shape("owner/name") == whole
    parsed = hub.utils.SafetensorsFileMetadata(
        metadata={},
        tensors={
            name: hub.utils.TensorInfo(dtype="F32", shape=list(v.shape), data_offsets=(0, v.nbytes))
            for name, v in tree_flatten(tiny_model().parameters())
        },
    )
    remote = type("Repo", (), {"files_metadata": {"model.safetensors": parsed}})
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "get_safetensors_metadata", lambda *a, **k: remote)
    assert model_shape.read_hub_shape("owner/name") == whole

    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("check your connection")

    # The download would try six times within 25 s; what answers at once is asked before it.
    monkeypatch.setattr(hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(ValueError, match="owner/name: cannot be read from the hub"):
        model_shape.read_hub_shape("owner/name")


@pytest.mark.parametrize("kind", WITHOUT_ATTENTION)
def test_the_state_of_a_block_without_attention_is_what_its_cache_holds(tmp_path, kind):
    folder = make_model(tmp_path / kind, model_type=kind, **WITHOUT_ATTENTION[kind])
    written = json.loads((folder / "config.json").read_text())
    without = {k: v for k, v in written.items() if "attention_heads" not in k}  # as on the hub
    (folder / "config.json").write_text(json.dumps(without))
    shape = model_shape.read_shape(folder)
    model, _ = mlx_lm.load(str(folder))
    for tokens in (3, 20):
        cache = make_prompt_cache(model)
        model(mx.ones((2, tokens), mx.int32), cache=cache)
        held = sum(part.size for part in cache[0].cache)
        assert held == 2 * shape.state
    assert shape.layers == 2
    assert shape.experts == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 96, "ffn_config": {
            "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2}}, (64, 3, 4, 2, 16, 32, 8, 2)),
        ({"model_dim": 64, "num_transformer_layers": 2, "num_query_heads": [2, 4], "head_dim": 16,
          "num_kv_heads": [1, 2], "vocab_size": 96}, (64, 2, 4, 2, 16, 256, 1, 1)),
        ({"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
          "intermediate_size": [128, 64]}, (64, 2, 4, 4, 16, 128, 1, 1)),
        ({"model_dim": 64, "num_layers": 2, "num_heads": 4, "num_vocab": 96, "num_local_experts": 4,
          "num_experts_per_tok": 2}, (64, 2, 4, 4, 16, 256, 4, 2)),
        ({"hidden_size": 64, "hybrid_override_pattern": "M*-E", "num_attention_heads": 4,
          "vocab_size": 96, "n_routed_experts": 8}, (64, 4, 4, 4, 16, 256, 8, 1)),
        ({**TINY, "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0},
         (64, 2, 4, 2, 16, 128, 1, 1)),
    ],
    ids=["dbrx", "openelm", "exaone, gemma3n", "phixtral", "nemotron_h", "qwen3_5, dense"],
)  # fmt: skip
def test_sizes_have_other_names_in_other_families(config, expected):
    shape = model_shape.shape_from_config(config, 4)
    attention = (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads, shape.head_dim)
    assert (*attention, shape.intermediate_size, shape.experts, shape.experts_per_token) == expected
    assert shape.state is None
