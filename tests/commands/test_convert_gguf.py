"""convert_model.py with a GGUF file: checked like every conversion, nothing left half-written."""

import json
import random

import gguf_layout
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from helpers import imports_of, mostly_long
from hf_layout import convert, reported

from utils import convert_model
from utils.model import gguf_file, gguf_weights
from utils.model import shape as model_shape

MIXED = {"token_embd.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.F16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return gguf_layout.random_model(tmp_path_factory.mktemp("gguf") / "hf", "llama")


@pytest.fixture(scope="module")
def file(source):
    return gguf_layout.write_gguf(
        source.parent / "m.gguf", source, "llama", kinds=lambda name: MIXED.get(name, Kind.Q4_1)
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def log_softmax(folder):
    model = mlx_lm.load(str(folder))[0]
    model.set_dtype(mx.float32)
    logits = model(mx.array([[1, 5, 9, 200, 33, 7]]))
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_a_quantized_file_becomes_a_plain_model(file, tmp_path):
    code, out, err = convert("--hf-path", file, "--output-dir", tmp_path / "deep" / "out")
    assert code == 0, err
    assert f"unpacking {file}: 13 Q4_1, 5 F32, 1 F16, 1 Q8_0" in err
    assert 0 < reported(out)[0] < 0.1  # bfloat16 rounds
    assert reported(out)[2] == 16
    assert set(model_shape.read_shape(tmp_path / "deep" / "out").bytes_by_dtype) == {"BF16"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    tokenizer = mlx_lm.load(str(tmp_path / "deep" / "out"))[1]
    assert tokenizer.eos_token_ids == {2, 0}
    assert tokenizer.has_chat_template


@pytest.mark.parametrize("words", [(), ("--dequantize",)])
def test_float32_is_exact(file, tmp_path, words):
    words = ("--hf-path", file, "--dtype", "float32", *words, "--output-dir", tmp_path / "out")
    code, out, err = convert(*words)
    assert code == 0, err
    assert reported(out) == (0, 0, 32)


def test_the_type_of_a_plain_file_is_kept(source, tmp_path):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "llama", kinds=lambda _: Kind.F16)
    code, out, err = convert("--hf-path", path, "--output-dir", tmp_path / "out")
    assert code == 0, err
    assert set(model_shape.read_shape(tmp_path / "out").bytes_by_dtype) == {"F16"}
    assert reported(out)[0] < 0.01  # the norms are F32 in every file


@pytest.mark.parametrize(("dtype", "bound"), [((), 0.02), (("--dtype", "float32"), 1e-5)])
def test_packed_weights_stay_packed(file, tmp_path, dtype, bound):
    words = ("--hf-path", file, "--keep-quantized", *dtype, "--output-dir", tmp_path / "out")
    code, out, err = convert(*words)
    assert code == 0, err
    assert "14 matrices stay packed; 1 F16 do not" in err
    assert reported(out)[1] < bound
    shape = model_shape.read_shape(tmp_path / "out")
    assert shape.quantized_bits in (4, 8)
    layers = mlx_lm.load(str(tmp_path / "out"))[0].model
    assert (layers.embed_tokens.bits, layers.layers[0].mlp.down_proj.bits) == (8, 4)
    assert not hasattr(layers.layers[0].mlp.up_proj, "bits")
    again = convert("--hf-path", tmp_path / "out", "--dequantize", "--output-dir", tmp_path / "p")
    assert again[0] == 0, again[2]


def test_a_file_can_be_quantized_anew(source, tmp_path):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "llama")
    words = ("-q", "--bits", 8, "--eos-token", "<|endoftext|>", "--output-dir", tmp_path / "out")
    code, out, err = convert("--hf-path", path, *words)
    assert code == 0, err
    assert 8 < reported(out)[2] < 9.5
    assert mlx_lm.load(str(tmp_path / "out"))[1].eos_token_ids == {0}


def test_a_file_is_known_by_its_first_bytes_too(file, tmp_path):
    blob = tmp_path / "sha256-0a1b"
    blob.write_bytes(file.read_bytes())
    assert convert("--hf-path", blob, "--output-dir", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_an_interrupted_unpacking_leaves_nothing(
    file, tmp_path, monkeypatch, error, expected, message
):
    def fail(*args):
        raise error

    monkeypatch.setattr(mx, "save_safetensors", fail)
    code, _, err = convert("--hf-path", file, "--output-dir", tmp_path / "out")
    assert (code, message in err) == (expected, True), err
    assert nothing_left(tmp_path, [])


def nothing_left(folder, kept):
    return sorted(path.name for path in folder.iterdir()) == sorted(kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--revision", "main"), "is for models on the hub"),
        (("-q", "--keep-quantized"), "--quantize and --keep-quantized exclude each other"),
        (("--dequantize", "--keep-quantized"), "exclude each other"),
        (("--keep-quantized", "--dtype", "bfloat16"), "which bfloat16 would round"),
        (("--eos-token", "<none>"), "--eos-token <none> is not in the vocabulary"),
    ],
)
def test_options_that_do_not_go_together_are_refused(file, tmp_path, words, message):
    code, _, err = convert("--hf-path", file, *words, "--output-dir", tmp_path / "out")
    assert (code, message in err) == (2, True), err
    assert nothing_left(tmp_path, [])


def test_keep_quantized_is_for_gguf_files(source, tmp_path):
    code, _, err = convert("--hf-path", source, "--keep-quantized", "--output-dir", tmp_path / "o")
    assert (code, "--keep-quantized is for GGUF files" in err) == (2, True)


def test_bad_files_are_one_line_and_leave_nothing(file, tmp_path):
    content = file.read_bytes()
    cases = {
        "cut.gguf": (content[: len(content) // 2], "was not downloaded to its end"),
        "magic.gguf": (b"GGML" + content[4:], "is no GGUF file: it starts with b'GGML'"),
        "big.gguf": (content[:4] + content[7:3:-1] + content[8:], "is big-endian"),
        "empty.gguf": (b"", "it is empty"),
        "arch.gguf": (content.replace(b"llama", b"lxama"), "the architecture 'lxama'"),
    }
    for name, (damaged, message) in cases.items():
        (tmp_path / name).write_bytes(damaged)
        code, out, err = convert("--hf-path", tmp_path / name, "--output-dir", tmp_path / "d/out")
        lines = [line for line in err.splitlines() if not line.startswith("unpacking")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    assert nothing_left(tmp_path, cases)


def test_a_missing_file_and_a_folder_with_one_are_explained(file, tmp_path):
    code, _, err = convert("--hf-path", tmp_path / "no.gguf", "--output-dir", tmp_path / "out")
    assert (code, "no such file" in err) == (2, True)
    code, _, err = convert("--hf-path", file.parent, "--output-dir", tmp_path / "out")
    assert (code, f"but a GGUF file: give --hf-path {file}" in err) == (2, True), err


def test_an_existing_folder_is_kept(file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    code, _, err = convert("--hf-path", file, "--output-dir", tmp_path / "out")
    assert (code, "exists already" in err) == (2, True)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_the_folder_of_the_file_is_never_replaced(file):
    code, _, err = convert("--hf-path", file, "--output-dir", file.parent, "--force")
    assert (code, "would replace the source" in err) == (2, True)
    assert file.is_file()


def test_a_model_of_nan_is_refused_by_the_name_of_the_file(source, tmp_path):
    norm = {"output_norm.weight": np.full(64, np.nan)}
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", source, "llama", replace=norm)
    code, _, err = convert("--hf-path", path, "--output-dir", tmp_path / "out")
    assert (code, f"error: {path} computes NaN or inf" in err) == (1, True), err
    assert nothing_left(tmp_path, ["m.gguf"])


def test_a_missing_package_says_what_to_install(file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    code, _, err = convert("--hf-path", file, "--output-dir", tmp_path / "out")
    assert code == 2
    assert "uv run --extra gguf python utils/convert_model.py" in err


@pytest.mark.long
def test_the_table_of_the_readme_is_what_the_conversions_give():
    text = (convert_model.ROOT / "utils" / "README.md").read_text(encoding="utf-8")
    assert gguf_layout.table() in text


def test_every_type_in_the_table_is_checked_exactly():
    text = (convert_model.ROOT / "utils" / "README.md").read_text(encoding="utf-8")
    rows = text.partition(gguf_layout.HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [kind for kind, *_ in cells] == [*gguf_layout.TYPES]
    assert {plain for _, _, plain, *_ in cells} == {"0"}
    kept = {kind for kind, *_, packed in cells if packed.startswith("0 (")}
    assert kept == set(gguf_weights.PACKINGS)


def test_help_does_not_load_the_package(tmp_path):
    done, packages = imports_of(convert_model.__file__, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "gguf" not in packages
    assert "--hf-path model.gguf" in done.stdout


@pytest.mark.parametrize("seed", mostly_long(range(12), 0))
def test_flipped_bytes_never_end_in_a_traceback(file, tmp_path, seed):
    """The header, metadata and list of tensors; numbers in the weights may be anything."""
    rng = random.Random(seed)
    content = file.read_bytes()
    end = content.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(12):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(4, end)] = rng.randrange(256)
        (tmp_path / "m.gguf").write_bytes(damaged)
        code, _, err = convert("--hf-path", tmp_path / "m.gguf", "--output-dir", tmp_path / "out")
        assert code in (0, 1, 2)
        assert "Traceback" not in err
        if code:
            assert nothing_left(tmp_path, ["m.gguf"])
        else:
            convert_model.shutil.rmtree(tmp_path / "out")
