"""convert_model.py --to gguf: what is written says what the folder says, or is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf_layout
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from hf_layout import convert, reported

from utils.model import gguf_file

TINY = ROOT / "models/tiny-math"
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
}


def edit_json(path, **values):
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def in_float16(folder):
    """Weights that f16 holds exactly; the norms of Gemma so that adding 1 loses nothing."""
    path = str(folder / "model.safetensors")
    weights = {}
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    for name, value in mx.load(path).items():
        if tied and name == "lm_head.weight":  # of Gemma 3, whatever its config says
            continue
        step = 64 if name.endswith("norm.weight") else 4096
        weights[name] = (mx.round(value * step) / step).astype(mx.float16)
    mx.save_safetensors(path, weights, {"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("to_gguf") / "hf"
    return in_float16(gguf_layout.random_model(folder, "llama"))


def to_gguf(source, place, *words):
    return convert("--hf-path", source, "--to", "gguf", "--output-dir", place, *words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_f16_of_f16_is_exact_in_every_family(tmp_path, family, tied):
    if family in ("gemma", "gemma2") and not tied:
        pytest.skip("always tied")
    settings = {"tie_word_embeddings": tied}
    kind = "llama" if family == "mistral" else family
    folder = in_float16(gguf_layout.random_model(tmp_path / "hf", kind, **settings))
    if family == "mistral":
        edit_json(folder / "config.json", model_type="mistral")
    code, out, err = to_gguf(folder, tmp_path / "m.gguf")
    assert code == 0, err
    assert reported(out)[:2] == (0, 0), out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.Modelfile", "m.gguf"]
    file = gguf_file.open_gguf(tmp_path / "m.gguf")
    assert {tensor.kind for tensor in file.tensors.values()} == {"F16", "F32"}
    assert ("output.weight" in file.tensors) != tied


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_the_file_is_the_one_that_llama_cpp_s_converter_writes(tmp_path, family):
    """Its order of rows, norms, names and numbers, as gguf_layout gives them independently."""
    folder = in_float16(gguf_layout.random_model(tmp_path / "hf", family))
    assert to_gguf(folder, tmp_path / "ours.gguf", "--gguf-type", "f32")[0] == 0
    name = "gemma3" if family == "gemma3_text" else family
    # transformers takes Qwen2's tokenizer for every model of that type, and so does training.
    words = gguf_layout.byte_level_tokenizer(folder, "qwen2" if family == "qwen2" else "smollm")
    path = gguf_layout.write_gguf(tmp_path / "theirs.gguf", folder, name, tokenizer=words)
    theirs = gguf_file.open_gguf(path)
    ours = gguf_file.open_gguf(tmp_path / "ours.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for key, tensor in theirs.tensors.items():
        assert ours.tensors[key].shape == tensor.shape
        np.testing.assert_array_equal(ours.tensors[key].data, tensor.data)
    fillers = [n for n, t in enumerate(theirs.texts("tokenizer.ggml.tokens")) if "[PAD" in t]
    for number in fillers:  # llama.cpp's says unused, the helper normal
        assert ours.metadata["tokenizer.ggml.token_type"][number] == 5
        theirs.metadata["tokenizer.ggml.token_type"][number] = 5
    differing = {k for k, v in theirs.metadata.items() if ours.metadata.get(k) != v}
    assert differing <= {"GGUF.kv_count"}


@pytest.mark.parametrize(("kind", "bits", "most"), [("q8_0", 8.5, 0.2), ("bf16", 16, 0.05)])
def test_what_other_types_cost_is_said(source, tmp_path, kind, bits, most):
    code, out, err = to_gguf(source, tmp_path, "--gguf-type", kind)
    assert code == 0, err
    assert 0 < reported(out)[0] < most
    path = tmp_path / f"hf-{kind}.gguf"
    tensors = gguf_file.open_gguf(path).tensors.values()
    assert {t.kind for t in tensors if len(t.shape) > 1} == {kind.upper()}
    assert bits < reported(out)[2] < bits + 5  # with the names of tokens


def test_bf16_and_f32_are_exact_where_the_model_is_so(tmp_path):
    folder = gguf_layout.random_model(tmp_path / "hf", "llama")
    code, out, _ = to_gguf(folder, tmp_path / "m.gguf", "--gguf-type", "f32")
    assert (code, reported(out)[:2]) == (0, (0, 0))
    assert (
        convert("--hf-path", folder, "--dtype", "bfloat16", "--output-dir", tmp_path / "b")[0] == 0
    )
    code, out, _ = to_gguf(tmp_path / "b", tmp_path / "b.gguf", "--gguf-type", "bf16")
    assert (code, reported(out)[:2]) == (0, (0, 0))


def test_a_width_that_q8_0_cannot_hold_stays_f16(tmp_path):
    folder = gguf_layout.random_model(tmp_path / "hf", "llama", hidden=64, intermediate_size=80)
    code, out, err = to_gguf(folder, tmp_path / "m.gguf", "--gguf-type", "q8_0")
    assert code == 0, err
    assert "2 matrices are stored as f16: their width is no multiple of 32" in out
    tensors = gguf_file.open_gguf(tmp_path / "m.gguf").tensors
    assert (tensors["blk.0.ffn_down.weight"].kind, tensors["blk.0.ffn_up.weight"].kind) == (
        "F16",
        "Q8_0",
    )


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_stretched_positions(tmp_path, kind):
    folder = gguf_layout.random_model(tmp_path / "hf", "llama", rope_scaling=SCALINGS[kind])
    code, out, err = to_gguf(in_float16(folder), tmp_path / "m.gguf")
    assert code == 0, err
    assert reported(out)[1] < 1e-5


def test_biases_and_a_tied_head_in_llama(tmp_path):
    folder = gguf_layout.random_model(
        tmp_path / "hf", "llama", attention_bias=True, mlp_bias=True, head_dim=32
    )
    code, out, err = to_gguf(in_float16(folder), tmp_path / "m.gguf")
    assert code == 0, err
    assert reported(out)[1] == 0


def test_tiny_math_and_the_prompt_as_trained(tmp_path):
    from mlx_lm.utils import load_tokenizer

    code, out, err = to_gguf(TINY, tmp_path / "tiny.gguf", "--gguf-type", "f32")
    assert code == 0, err
    assert reported(out)[1] == 0
    file = gguf_file.open_gguf(tmp_path / "tiny.gguf")
    assert file.get("tokenizer.ggml.pre", str) == "smollm"
    assert file.get("tokenizer.ggml.eos_token_id", int) == 2
    assert file.metadata["tokenizer.chat_template"] == load_tokenizer(TINY).chat_template
    kinds = dict(
        zip(
            file.metadata["tokenizer.ggml.tokens"],
            file.metadata["tokenizer.ggml.token_type"],
            strict=True,
        )
    )
    assert (kinds["<|im_end|>"], kinds["<answer>"], kinds["a"]) == (3, 4, 1)
    text = (tmp_path / "tiny.Modelfile").read_text(encoding="utf-8")
    assert text == (
        'FROM ./tiny.gguf\nTEMPLATE """<|im_start|>user\n{{ .Prompt }}<|im_end|>\n'
        '<|im_start|>assistant\n"""\n'
    )


LAMED = {
    "quantization": ({"quantization": {"bits": 4, "group_size": 32}}, "is quantized"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
    "family": ({"model_type": "phi3"}, "model_type 'phi3'; those that can become a GGUF file are"),
    "rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'; a GGUF file"),
    "yarn": (
        {"rope_scaling": SCALINGS["yarn"] | {"beta_fast": 5}},
        "rope_scaling's beta_fast = 5 is not written",
    ),
    "traditional": ({"rope_traditional": True}, "rope_traditional has no counterpart"),
    "window": (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        "layer_types with sliding windows",
    ),
    "vision": ({"vision_config": {"a": 1}}, "vision"),
    "context": ({"max_position_embeddings": ...}, "lacks max_position_embeddings"),
}


def copied(source, folder, **settings):
    shutil.copytree(source, folder)
    edit_json(folder / "config.json", **settings)
    return folder


@pytest.mark.parametrize("what", LAMED)
def test_what_a_file_cannot_hold_is_refused(source, tmp_path, what):
    settings, message = LAMED[what]
    folder = copied(source, tmp_path / "hf", **settings)
    code, out, err = to_gguf(folder, tmp_path / "m.gguf")
    assert (code, out) == (2, ""), err
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_quantized_model_goes_through_dequantize(source, tmp_path):
    assert (
        convert("--hf-path", source, "-q", "--group-size", 32, "--output-dir", tmp_path / "q")[0]
        == 0
    )
    code, _, err = to_gguf(tmp_path / "q", tmp_path / "m.gguf")
    assert (code, "add --dequantize" in err) == (2, True), err
    code, out, err = to_gguf(tmp_path / "q", tmp_path / "m.gguf", "--dequantize")
    assert code == 0, err
    assert reported(out)[0] < 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.Modelfile", "m.gguf", "q"]


def test_numbers_beyond_f16_are_refused_by_name(source, tmp_path):
    folder = copied(source, tmp_path / "hf")
    weights = mx.load(str(folder / "model.safetensors"))
    wide = {k: v.astype(mx.bfloat16) for k, v in weights.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    wide[name] = wide[name] * 0 + 1e5
    mx.save_safetensors(str(folder / "model.safetensors"), wide, {"format": "mlx"})
    code, _, err = to_gguf(folder, tmp_path / "m.gguf")
    assert (code, name in err, "--gguf-type bf16" in err) == (2, True, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert to_gguf(folder, tmp_path / "m.gguf", "--gguf-type", "bf16")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-q",), "--quantize goes with --to mlx, not with --to gguf"),
        (("--dtype", "float16"), "--dtype goes with --to mlx"),
        (("--base", "x"), "--base goes with --to peft"),
        (("--upload-repo", "a/b"), "--upload-repo goes with --to mlx"),
        (("--lm-studio", "a/b"), "--lm-studio and --output-dir exclude each other"),
    ],
)
def test_options_that_the_result_does_not_have(source, tmp_path, words, message):
    code, _, err = to_gguf(source, tmp_path / "m.gguf", *words)
    assert (code, message in err) == (2, True), err


def test_gguf_type_is_of_gguf(source, tmp_path):
    code, _, err = convert(
        "--hf-path", source, "--gguf-type", "f16", "--output-dir", tmp_path / "o"
    )
    assert (code, "--gguf-type goes with --to gguf, not with --to mlx" in err) == (2, True), err


def test_what_exists_is_kept_and_replaced_only_by_force(source, tmp_path):
    place = tmp_path / "m.gguf"
    assert to_gguf(source, place)[0] == 0
    before = place.read_bytes()
    code, _, err = to_gguf(source, place, "--gguf-type", "q8_0")
    assert (code, f"{place} exists already" in err, place.read_bytes() == before) == (2, True, True)
    assert to_gguf(source, place, "--gguf-type", "q8_0", "--force")[0] == 0
    assert len(place.read_bytes()) < len(before)
    place.write_text("a diary")
    code, _, err = to_gguf(source, place, "--force")
    assert (code, "--force replaces GGUF files only" in err) == (2, True), err
    assert place.read_text() == "a diary"
    (tmp_path / "n.Modelfile").write_text("mine")
    code, _, err = to_gguf(source, tmp_path / "n.gguf")
    assert (code, "n.Modelfile exists already" in err) == (2, True), err


def test_a_gguf_file_is_no_source_for_one(source, tmp_path):
    assert to_gguf(source, tmp_path / "m.gguf")[0] == 0
    code, _, err = to_gguf(tmp_path / "m.gguf", tmp_path / "n.gguf")
    assert (code, "is a GGUF file already" in err) == (2, True), err


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
        (OSError(28, "No space left on device"), 1, "m.gguf cannot be written: No space left on"),
        # What NumPy says of a full disk.
        (OSError("73728 requested and 32400 written"), 1, "m.gguf cannot be written: the disk is"),
    ],
)
def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch, error, expected, message):
    from gguf import GGUFWriter

    def fail(*_):
        raise error

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    code, _, err = to_gguf(source, tmp_path / "deep" / "m.gguf")
    assert (code, message in err) == (expected, True), err
    assert "partial" not in err
    assert list(tmp_path.iterdir()) == []


def full_for(monkeypatch, suffix):
    """A disk that has no room for texts in files of this kind."""
    write = Path.write_text

    def refuse(path, *args, **kwargs):
        if path.suffix == suffix:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse)


def test_no_room_for_the_modelfile(source, tmp_path, monkeypatch):
    full_for(monkeypatch, ".Modelfile")
    code, _, err = to_gguf(source, tmp_path / "m.gguf")
    assert (code, f"{tmp_path / 'm.gguf'} cannot be written: No space" in err) == (1, True), err
    assert list(tmp_path.iterdir()) == []


def test_stop_strings_that_cannot_be_read_are_not_lost_silently(source, tmp_path):
    folder = copied(source, tmp_path / "hf")
    (folder / "generation_config.json").write_text("{")
    code, _, err = to_gguf(folder, tmp_path / "m.gguf")
    assert (code, "generation_config.json cannot be read" in err) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_missing_package_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    code, _, err = to_gguf(source, tmp_path / "m.gguf")
    assert (code, "uv run --extra gguf python utils/convert_model.py" in err) == (2, True), err
