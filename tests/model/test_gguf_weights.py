"""A GGUF file computes what the model did from which it was made; packed weights stay the same."""

import json

import gguf
import gguf_layout
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from helpers import mostly_long

from utils.base.errors import UserError
from utils.model import gguf_file, gguf_weights

IDS = mx.array([[1, 5, 9, 200, 33, 7, 8, 100, 50, 60, 371, 12]])
PACKED = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}


def log_softmax(folder):
    model = mlx_lm.load(str(folder))[0]
    model.set_dtype(mx.float32)
    logits = model(IDS)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def unpacked(path, **options):
    folder = path.parent / f"{path.stem}-{len([*path.parent.iterdir()])}"
    said = gguf_weights.write_model(gguf_file.open_gguf(path), folder, **options)
    return folder, said


def refusal(path, **options):
    with pytest.raises(UserError) as refused:
        unpacked(path, **options)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """256 wide, which the K-quants need; untied."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    settings = {"hidden": 256, "layers": 1, "intermediate_size": 256, "tie_word_embeddings": False}
    return gguf_layout.random_model(folder, "llama", **settings)


@pytest.mark.parametrize("tied", mostly_long([True, False], False))
@pytest.mark.parametrize("name", gguf_layout.ARCHITECTURES)
def test_a_file_computes_what_its_model_did(tmp_path, name, tied):
    model_type = {"gemma3": "gemma3_text"}.get(name, name)
    settings = {} if "gemma" in name else {"tie_word_embeddings": tied}
    source = gguf_layout.random_model(tmp_path / "hf", model_type, **settings)
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, name)
    np.testing.assert_array_equal(log_softmax(unpacked(path)[0]), log_softmax(source))


def test_a_mistral_file_is_a_llama(tmp_path):
    source = gguf_layout.random_model(tmp_path / "hf", "llama")
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "llama")
    content = path.read_bytes().replace(b"llama.", b"mistr.")  # keys keep their lengths
    content = content.replace(b"llama", b"mistr")
    path.write_bytes(content)
    assert "has the architecture 'mistr'; those that can be converted are llama" in refusal(path)
    opened = gguf_file.open_gguf(path)
    renamed = {key.replace("mistr", "mistral"): value for key, value in opened.metadata.items()}
    renamed["general.architecture"] = "mistral"
    gguf_weights.write_model(opened._replace(metadata=renamed), tmp_path / "out")
    np.testing.assert_array_equal(log_softmax(tmp_path / "out"), log_softmax(source))


def test_biases_of_a_llama_are_kept_and_turned_too(tmp_path):
    settings = {"attention_bias": True, "mlp_bias": True}
    source = gguf_layout.random_model(tmp_path / "hf", "llama", **settings)
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "llama")
    np.testing.assert_array_equal(log_softmax(unpacked(path)[0]), log_softmax(source))


@pytest.mark.parametrize("kind", gguf_layout.TYPES)
def test_every_type_holds_the_numbers_of_the_package(llama, tmp_path, kind):
    """In float32, row by row: rows of q and k are back in Hugging Face's order."""
    number = Kind[kind]
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", kinds=lambda name: number)
    folder, _ = unpacked(path)
    found = mx.load(str(folder / "model.safetensors"))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        source = mx.load(str(llama / "model.safetensors"))[f"{name}.weight"]
        rows = gguf_layout.as_ggml(name, np.array(source), config_of(llama), "llama")
        stored = gguf_layout.stored(rows, number)
        expected = gguf.dequantize(np.ascontiguousarray(stored).view(np.uint8), number)
        expected = expected.reshape(source.shape)
        if "k_proj" in name:
            expected = expected.reshape(2, 32, 2, 256).swapaxes(1, 2).reshape(128, 256)
        assert np.isfinite(expected).all()
        weight = found[f"{name}.weight"]
        assert str(weight.dtype) == f"mlx.core.{gguf_weights.DTYPES.get(kind, 'float32')}"
        np.testing.assert_array_equal(np.array(weight.astype(mx.float32)), expected)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_the_same_numbers(llama, tmp_path, kind):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", kinds=lambda _: Kind[kind])
    plain = mx.load(str(unpacked(path)[0] / "model.safetensors"))
    folder, said = unpacked(path, keep_quantized=True)
    assert said == "9 matrices stay packed"
    packed = mx.load(str(folder / "model.safetensors"))
    how = config_of(folder)["quantization"]
    assert how == {"group_size": 32, "bits": PACKED[kind], "mode": "affine"}
    assert config_of(folder)["torch_dtype"] == "float16"
    for name in [name for name in plain if plain[name].ndim == 2]:
        parts = (packed[name.replace("weight", part)] for part in ("scales", "biases"))
        scales, biases = (part.astype(mx.float32) for part in parts)
        found = mx.dequantize(packed[name], scales, biases, group_size=32, bits=PACKED[kind])
        assert mx.array_equal(found, plain[name]), name
    model = mlx_lm.load(str(folder))[0]
    assert model.layers[0].self_attn.q_proj.bits == PACKED[kind]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_mlx_packs_a_file_in_the_same_way(llama, tmp_path, kind):
    """MLX reads these types itself, under llama.cpp's names."""
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", kinds=lambda _: Kind[kind])
    theirs = mx.load(str(path))
    found = mx.load(str(unpacked(path, keep_quantized=True)[0] / "model.safetensors"))
    for part in ("weight", "scales", "biases"):
        ours = found[f"model.layers.0.mlp.down_proj.{part}"]
        assert mx.array_equal(ours, theirs[f"blk.0.ffn_down.{part}"]), part


@pytest.mark.parametrize("kind", ["Q2_K", "Q6_K"])
def test_mlx_reads_the_same_numbers(llama, tmp_path, kind):
    """Rounded to float16. Not of Q4_K, which MLX 0.32 reads wrongly."""
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", kinds=lambda _: Kind[kind])
    name = "blk.0.ffn_down.weight"
    ours = gguf_file.unpack(gguf_file.open_gguf(path).tensors[name])
    np.testing.assert_array_equal(ours.astype(np.float16), np.array(mx.load(str(path))[name]))


def test_q4_k_is_read_by_its_definition():
    """Eight groups of 32: (d x scale) x level - dmin x least, scales and leasts in 6 bits."""
    block = gguf_layout.random_blocks(np.zeros((1, 256)), Kind.Q4_K)
    found = gguf_file.unpack(gguf_file.Tensor(block, "Q4_K", (1, 256)))[0]
    d, dmin = block[0, :4].copy().view(np.float16).astype(float)
    bits, levels = block[0, 4:16].astype(int), block[0, 16:].astype(int)
    low, middle, high = bits[:4], bits[4:8], bits[8:]
    scales = [*(low & 63), *((high & 15) | (low >> 6 << 4))]
    leasts = [*(middle & 63), *((high >> 4) | (middle >> 6 << 4))]
    for group in range(8):
        part = levels[32 * (group // 2) : 32 * (group // 2 + 1)] >> 4 * (group % 2) & 15
        wanted = d * scales[group] * part - dmin * leasts[group]
        np.testing.assert_array_equal(found[32 * group : 32 * group + 32], wanted)


def test_a_mixture_packs_what_it_can_and_says_the_rest(llama, tmp_path):
    kinds = {"token_embd.weight": Kind.Q8_0, "output.weight": Kind.Q6_K}
    kinds["blk.0.ffn_up.weight"] = Kind.F16
    path = tmp_path / "m.gguf"
    gguf_layout.write_gguf(path, llama, "llama", kinds=lambda name: kinds.get(name, Kind.Q4_0))
    folder, said = unpacked(path, keep_quantized=True)
    assert said == (
        "7 matrices stay packed; 1 F16, 1 Q6_K do not (MLX's quantization holds Q4_0, Q4_1, Q5_0, "
        "Q5_1, Q8_0 exactly)"
    )
    assert config_of(folder)["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    difference = np.abs(log_softmax(folder) - log_softmax(unpacked(path)[0]))
    assert difference.max() < 2e-3  # of log-probs around -20, summed in another order


def test_a_scale_whose_bias_half_precision_cannot_hold_is_not_packed(tmp_path):
    tensor = gguf_file.Tensor(np.zeros((1, 34), np.uint8), "Q8_0", (1, 32))
    assert gguf_weights.fits_half(tensor)
    tensor.data[0, :2] = np.array([600], np.float16).view(np.uint8)  # 128 x 600 > 65504
    assert not gguf_weights.fits_half(tensor)


def test_nothing_to_pack_is_refused(llama, tmp_path):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", kinds=lambda _: Kind.Q6_K)
    text = refusal(path, keep_quantized=True)
    assert "has nothing that stays packed exactly (its types: F32, Q6_K; possible: Q4_0" in text


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_0", "bfloat16")],
)
def test_the_type_of_most_numbers_is_that_of_the_model(llama, tmp_path, kind, dtype):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", kinds=lambda _: Kind[kind])
    assert gguf_weights.plain_dtype(gguf_file.open_gguf(path)) == dtype


def test_shards_hold_a_model_that_is_larger_than_one(llama, tmp_path, monkeypatch):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama")
    monkeypatch.setattr(gguf_weights, "SHARD_BYTES", 2**19)
    folder, _ = unpacked(path)
    assert len([*folder.glob("model-*.safetensors")]) > 3
    np.testing.assert_array_equal(log_softmax(folder), log_softmax(llama))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("scaling", "metadata"),
    [
        (LINEAR, {"scaling__type": "linear", "scaling__factor": 4.0}),
        (LINEAR, {"scale_linear": 4.0}),
        (
            YARN,
            {
                "scaling__type": "yarn",
                "scaling__factor": 4.0,
                "scaling__original_context_length": 64,
            },
        ),
    ],
)
def test_stretched_positions_are_kept(tmp_path, scaling, metadata):
    source = gguf_layout.random_model(tmp_path / "hf", "qwen3", rope_scaling=scaling)
    values = {f"qwen3__rope__{key}": value for key, value in metadata.items()}
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "qwen3", **values)
    np.testing.assert_array_equal(log_softmax(unpacked(path)[0]), log_softmax(source))


def test_llama_3s_stretching_is_found_again(tmp_path):
    settings = {"rope_scaling": LLAMA3, "rope_theta": 500000.0}
    source = gguf_layout.random_model(tmp_path / "hf", "llama", **settings)
    freqs = mlx_lm.load(str(source))[0].layers[0].self_attn.rope._freqs
    divisors = np.array(freqs) / 500000.0 ** (np.arange(0, 16, 2) / 16)
    path = tmp_path / "m.gguf"
    gguf_layout.write_gguf(path, source, "llama", tensors={"rope_freqs.weight": divisors})
    folder, _ = unpacked(path)
    assert config_of(folder)["rope_scaling"] == LLAMA3
    np.testing.assert_array_equal(log_softmax(folder), log_softmax(source))
    gguf_layout.write_gguf(path, source, "llama", tensors={"rope_freqs.weight": divisors + 1})
    assert "by a rule of its own (rope_freqs.weight)" in refusal(path)


@pytest.mark.parametrize(
    ("said", "period"), [([True, False] * 2, 2), (3, 3), (None, 6), ([True] * 4, 5)]
)
def test_gemma_3_slides_as_the_file_says(tmp_path, said, period):
    source = gguf_layout.random_model(tmp_path / "hf", "gemma3_text", layers=4)
    values = {"gemma3__attention__sliding_window_pattern": said}
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "gemma3", **values)
    assert config_of(unpacked(path)[0])["sliding_window_pattern"] == period


def test_layers_that_slide_without_a_period_are_refused(tmp_path):
    source = gguf_layout.random_model(tmp_path / "hf", "gemma3_text", layers=4)
    values = {"gemma3__attention__sliding_window_pattern": [True, False, True, True]}
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "gemma3", **values)
    assert "sliding_window_pattern follows no period" in refusal(path)


def test_an_output_layer_of_its_own_is_refused_where_mlx_lm_has_none(tmp_path):
    source = gguf_layout.random_model(tmp_path / "hf", "gemma2")
    extra = {"output.weight": np.zeros((384, 64))}
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "gemma2", tensors=extra)
    assert "has the tensor output.weight, which is not known" in refusal(path)


def test_models_of_27_b_divide_attention_otherwise():
    config = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32}
    config["head_dim"] = 128
    assert gguf_weights.attention_scalar(config, layers_of_27b=46) == 144
    assert gguf_weights.attention_scalar(config, layers_of_27b=62) == 128


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__architecture": "rwkv7"}, "the architecture 'rwkv7'; those that can be"),
        ({"llama__expert_count": 8}, "is a mixture of experts"),
        ({"llama__block_count": None}, "lacks llama.block_count"),
        ({"llama__block_count": 2}, "lacks the tensor blk.1.attn_norm.weight"),
        ({"llama__block_count": 2**31}, "has 2147483648 layers, but 12 tensors"),
        ({"llama__block_count": 0}, ", which is not known here"),
        (
            {"llama__embedding_length": 128},
            "has the shape (128, 256), but the metadata say (128, 128)",
        ),
        ({"llama__logit_scale": 0.5}, "llama.logit_scale = 0.5 has no counterpart in mlx-lm"),
        ({"llama__attention__head_count": 0}, "llama.attention.head_count = 0"),
        ({"llama__attention__head_count": [4, 8]}, "has layers of different kinds"),
        ({"llama__attention__value_length": 32}, "value_length = 32, but a head has 64"),
        ({"llama__rope__dimension_count": 16}, "dimension_count = 16, but a head has 64"),
        ({"llama__rope__scaling__type": "longrope"}, "stretches positions by 'longrope'"),
        ({"llama__rope__scaling__type": "yarn"}, "lacks llama.rope.scaling.factor"),
        ({"tensors": {"blk.0.attn_qkv.weight": np.zeros((8, 8))}}, "blk.0.attn_qkv.weight, which"),
    ],
)
def test_what_does_not_go_together_is_refused(llama, tmp_path, metadata, message):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", **metadata)
    assert message in refusal(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_more_tokens_than_rows_are_refused(llama, tmp_path):
    tokenizer = gguf_layout.byte_level_tokenizer(llama)
    tokenizer["tokenizer.ggml.tokens"] += ["one more"]
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama", tokenizer=tokenizer)
    assert "385 tokens, but embeddings for 384" in refusal(path)


def test_ends_of_an_answer_are_in_both_files(llama, tmp_path):
    folder, _ = unpacked(gguf_layout.write_gguf(tmp_path / "m.gguf", llama, "llama"))
    assert config_of(folder)["eos_token_id"] == [2, 0]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 0]}
    assert mlx_lm.load(str(folder))[1].eos_token_ids == {2, 0}
