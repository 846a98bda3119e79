"""The converter: what it writes computes what the source computes, and it spoils nothing."""

import importlib.machinery
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import types

import hf_layout
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, make_model
from helpers import SLOW, imports_of, mostly_long, tree
from hf_layout import CLASSES, convert, reported, write_checkpoint

from utils import convert_model
from utils.model import conversion_check
from utils.model import shape as model_shape

IDS = mx.array([[1, 5, 9, 200, 33, 7, 8, 100, 50, 60, 371, 12]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A llama checkpoint as transformers writes it."""
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "source", "llama", tied=False)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """The same in 4 bits."""
    folder = tmp_path_factory.mktemp("convert") / "4bit"
    assert convert("--hf-path", source, "-q", "--output-dir", folder)[0] == 0
    return folder


def log_softmax(folder, ids=IDS, **options):
    """Log-probs of every token at every position, in float32."""
    model = mlx_lm.load(str(folder), **options)[0]
    model.set_dtype(mx.float32)
    logits = model(ids)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **values):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


@pytest.mark.parametrize(
    ("model_type", "tied", "shards"),
    mostly_long(
        [(kind, *how) for kind in CLASSES for how in ((True, 1), (False, 3))],
        ("gemma3_text", True, 1),
        ("mixtral", False, 3),
    ),
)
def test_converted_model_computes_what_the_source_computes(model_type, tied, shards, tmp_path):
    source = write_checkpoint(tmp_path / "hf", model_type, tied=tied, shards=shards)
    assert len(list(source.glob("*.safetensors"))) == shards
    code, out, err = convert("--hf-path", source, "--output-dir", tmp_path / "mlx")
    assert code == 0, err
    assert reported(out) == (0, 0, 16)
    np.testing.assert_array_equal(log_softmax(tmp_path / "mlx"), log_softmax(source))
    assert set(model_shape.read_shape(tmp_path / "mlx").bytes_by_dtype) == {"BF16"}
    weights = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    assert ("lm_head.weight" in weights) == (not tied)


@pytest.mark.parametrize("model_type", mostly_long(CLASSES, "gemma3_text", "mixtral"))
def test_reported_difference_is_that_of_the_quantized_model(model_type, tmp_path):
    source = write_checkpoint(tmp_path / "hf", model_type, tied=False, shards=2)
    target = tmp_path / "mlx"
    code, out, err = convert("--hf-path", source, "-q", "--bits", 6, "--output-dir", target)
    assert code == 0, err
    tokens = mlx_lm.load(str(source))[1].encode(conversion_check.FIXED_TEXT)
    ids = mx.array([tokens])
    rows, chosen = np.arange(len(tokens) - 1), tokens[1:]
    before, after = (log_softmax(f, ids)[0][rows, chosen] for f in (source, target))
    difference = np.abs(before - after)
    assert 1e-3 < difference.mean() < 1
    mean, largest, bits = reported(out)
    assert mean == pytest.approx(difference.mean(), rel=0.05)
    assert largest == pytest.approx(difference.max(), rel=0.05)
    assert 6 < bits < 7
    assert f"{after.mean():.3f}, source {before.mean():.3f}" in out


@pytest.mark.parametrize("model_type", mostly_long(CLASSES, "llama", "gemma3_text"))
def test_config_of_transformers_5_means_the_same(model_type, tmp_path):
    """It nests rope_theta where most of mlx-lm's architectures do not look."""
    old = write_checkpoint(tmp_path / "4", model_type)
    new = write_checkpoint(tmp_path / "5", model_type, transformers=5)
    assert "rope_theta" not in config_of(new)
    assert convert("--hf-path", new, "--output-dir", tmp_path / "mlx")[0] == 0
    np.testing.assert_array_equal(log_softmax(tmp_path / "mlx"), log_softmax(old))


MODES = [
    (("--bits", 2), 2, 64, "affine"),
    (("--bits", 3, "--group-size", 32), 3, 32, "affine"),
    ((), 4, 64, "affine"),
    (("--bits", 5), 5, 64, "affine"),
    (("--bits", 6), 6, 64, "affine"),
    (("--bits", 8), 8, 64, "affine"),
    (("--q-mode", "mxfp4"), 4, 32, "mxfp4"),
    (("--q-mode", "nvfp4"), 4, 16, "nvfp4"),
    (("--q-mode", "mxfp8", "--bits", 8), 8, 32, "mxfp8"),
]


@pytest.mark.parametrize(
    ("words", "bits", "group_size", "mode"), mostly_long(MODES, MODES[1], MODES[6])
)
def test_modes_of_quantization(source, tmp_path, words, bits, group_size, mode):
    target = tmp_path / "deep" / "mlx"
    code, out, err = convert("--hf-path", source, "-q", *words, "--output-dir", target)
    assert code == 0, err
    found = config_of(target)["quantization"]
    assert found == {"bits": bits, "group_size": group_size, "mode": mode}
    layer = mlx_lm.load(str(target))[0].model.layers[0].mlp.up_proj
    assert (layer.bits, layer.group_size, layer.mode) == (bits, group_size, mode)
    assert bits < reported(out)[2] < bits + 1.1
    assert model_shape.read_shape(target).parameters == model_shape.read_shape(source).parameters
    assert [path.name for path in target.parent.iterdir()] == ["mlx"]


def test_more_bits_are_closer_to_the_source(source, tmp_path):
    means = []
    for bits in (2, 4, 8):
        target = tmp_path / str(bits)
        out = convert("--hf-path", source, "-q", "--bits", bits, "--output-dir", target)[1]
        assert "note: to the source this text is less probable than chance" in out
        means.append(reported(out)[0])
    assert means[0] > 2 * means[1] > 8 * means[2]


@pytest.mark.parametrize(("recipe", "low", "high"), [("mixed_2_6", 2, 6), ("mixed_3_4", 3, 4)])
def test_recipes_mix_bits(source, tmp_path, recipe, low, high):
    words = ("--hf-path", source, "-q", "--quant-predicate", recipe)
    code, out, err = convert(*words, "--output-dir", tmp_path / "mlx")
    assert code == 0, err
    layers = mlx_lm.load(str(tmp_path / "mlx"))[0].model.layers
    assert [layer.mlp.down_proj.bits for layer in layers] == [low, low, high, high]
    assert [layer.mlp.up_proj.bits for layer in layers] == [low] * 4
    assert low < reported(out)[2] < high
    assert (
        model_shape.read_shape(tmp_path / "mlx").parameters
        == model_shape.read_shape(source).parameters
    )


def test_layers_that_cannot_be_grouped_are_counted(tmp_path):
    folder = make_model(tmp_path / "hf", hidden=64, intermediate_size=96)
    code, _, err = convert("--hf-path", folder, "-q", "--output-dir", tmp_path / "mlx")
    assert code == 0
    assert "2 layers stay as they are: width no multiple of 64" in err


def test_nothing_to_quantize_is_an_error(tmp_path):
    folder = make_model(tmp_path / "hf", hidden=48)
    code, _, err = convert("--hf-path", folder, "-q", "--output-dir", tmp_path / "mlx")
    assert code == 2
    assert "no layer's width (48, 96) is a multiple of the group size 64" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("words", [(), ("--q-mode", "mxfp4"), ("--quant-predicate", "mixed_4_6")])
def test_dequantized_model_computes_the_same(source, tmp_path, words):
    assert convert("--hf-path", source, "-q", *words, "--output-dir", tmp_path / "q")[0] == 0
    words = ("--dequantize", "--dtype", "float32", "--output-dir", tmp_path / "plain")
    code, out, err = convert("--hf-path", tmp_path / "q", *words)
    assert code == 0, err
    assert "quantization" not in config_of(tmp_path / "plain")
    assert set(model_shape.read_shape(tmp_path / "plain").bytes_by_dtype) == {"F32"}
    assert reported(out)[1] < 1e-3
    assert reported(out)[2] == 32


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype(source, tmp_path, dtype):
    code, out, _ = convert("--hf-path", source, "--dtype", dtype, "--output-dir", tmp_path / "mlx")
    assert code == 0
    found = {"float16": "F16", "float32": "F32"}[dtype]
    assert set(model_shape.read_shape(tmp_path / "mlx").bytes_by_dtype) == {found}
    # Otherwise mlx_lm.convert would cast the result back.
    assert config_of(tmp_path / "mlx")["torch_dtype"] == dtype
    assert reported(out)[1] < 1e-3


def test_eos_token_is_replaced_everywhere(source, tmp_path):
    words = ("--eos-token", "<|endoftext|>", "--output-dir", tmp_path / "mlx")
    assert mlx_lm.load(str(source))[1].eos_token_ids == {2, 0}
    code, _, err = convert("--hf-path", source, *words)
    assert code == 0, err
    tokenizer = mlx_lm.load(str(tmp_path / "mlx"))[1]
    assert tokenizer.eos_token_ids == {0}
    assert tokenizer.eos_token == "<|endoftext|>"
    generation = json.loads((tmp_path / "mlx" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config_of(tmp_path / "mlx")["eos_token_id"] == 0
    assert len(tokenizer.get_vocab()) == len(mlx_lm.load(str(source))[1].get_vocab())


def test_code_of_a_model_runs_only_if_trusted(tmp_path):
    folder = write_checkpoint(tmp_path / "hf", "llama")
    edit_config(folder, model_type="mine", model_file="mine.py")
    code_file = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom mlx_lm.models.llama import *\n"
    (folder / "mine.py").write_text(code_file)
    words = ("--hf-path", folder, "--output-dir", tmp_path / "mlx")
    code, _, err = convert(*words)
    assert code == 2
    assert "add --trust-remote-code if you trust it" in err
    assert not (tmp_path / "ran").exists()
    assert convert(*words, "--trust-remote-code")[0] == 0
    assert (tmp_path / "ran").exists()
    after = log_softmax(tmp_path / "mlx", trust_remote_code=True)
    np.testing.assert_array_equal(after, log_softmax(folder, trust_remote_code=True))


def test_model_of_the_hub(source, tmp_path, monkeypatch):
    import huggingface_hub
    import mlx_lm.utils

    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(source)

    def no_card(folder, name):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    create = mlx_lm.utils.create_model_card
    monkeypatch.setattr(
        mlx_lm.utils, "create_model_card", lambda f, name: (no_card if name else create)(f, name)
    )
    words = ("--hf-path", "owner/name", "--revision", "v2", "--output-dir", tmp_path / "mlx")
    code, _, err = convert(*words)
    assert code == 0, err
    assert [(name, revision) for name, revision, _ in asked] == [("owner/name", "v2")] * 2
    # What the configuration rules out is refused before the weights come.
    assert asked[0][2] == ["config.json"]
    assert "model*.safetensors" in asked[1][2]
    assert "base_model: owner/name" in (tmp_path / "mlx" / "README.md").read_text()


class FakeHub:
    """HfApi for an upload: what was asked of it."""

    calls: list = []  # noqa: RUF012
    fails = None

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, **options):
        self.calls.append(options)

    def upload_folder(self, folder_path, repo_id):
        if self.fails:
            raise self.fails
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


def test_upload_comes_after_the_checks(source, hub, tmp_path):
    words = ("--hf-path", source, "--output-dir", tmp_path / "mlx", "--upload-repo", "me/it")
    code, out, _ = convert(*words)
    assert code == 0
    repo, files = hub.calls[1]
    assert repo == "me/it"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert 'load("me/it")' in (tmp_path / "mlx" / "README.md").read_text()
    assert "https://huggingface.co/me/it" in out


def test_failed_upload_keeps_the_result(source, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fails", OSError("no network"))
    words = ("--hf-path", source, "--output-dir", tmp_path / "mlx", "--upload-repo", "me/it")
    code, _, err = convert(*words)
    assert code == 1
    assert "is complete, but its upload failed: no network" in err
    assert f"hf upload me/it {tmp_path / 'mlx'}" in err
    assert mlx_lm.load(str(tmp_path / "mlx"))


def test_upload_without_login_is_refused_first(source, hub, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalTokenNotFoundError

    def whoami(self):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(hub, "whoami", whoami)
    words = ("--hf-path", source, "--output-dir", tmp_path / "mlx", "--upload-repo", "me/it")
    code, _, err = convert(*words)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "hf auth login" in err


@pytest.fixture
def vision(tmp_path):
    folder = write_checkpoint(tmp_path / "vision", "llama")
    edit_config(folder, model_type="llava", vision_config={"hidden_size": 8})
    return folder


def test_vision_model_names_the_extra(vision, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = convert("--hf-path", vision, "-q", "--output-dir", tmp_path / "mlx")
    assert code == 2
    assert "has a vision tower" in err
    assert "uv run --extra vision python utils/convert_model.py" in err
    assert not (tmp_path / "mlx").exists()


def test_vision_model_goes_through_mlx_vlm(vision, tmp_path, monkeypatch):
    """With a stand-in for mlx_vlm: what it is asked, and how its model is checked."""
    inner = write_checkpoint(tmp_path / "inner", "llama")
    asked = {}

    def fake_convert(hf_path, mlx_path, **options):
        asked.update(options)
        write_checkpoint(tmp_path / "mlx_files", "llama").rename(mlx_path)

    def fake_load(path, trust_remote_code):
        model, tokenizer = mlx_lm.load(str(inner))

        class Vision(type(model)):
            def __call__(self, ids, pixels, mask):
                return types.SimpleNamespace(logits=super().__call__(ids))

        model.__class__ = Vision
        return model, types.SimpleNamespace(tokenizer=tokenizer)

    module = types.ModuleType("mlx_vlm")
    module.__spec__ = importlib.machinery.ModuleSpec("mlx_vlm", None)
    module.convert, module.load = fake_convert, fake_load
    module.generate = lambda *_, **__: types.SimpleNamespace(text=" five")
    monkeypatch.setitem(sys.modules, "mlx_vlm", module)
    code, out, err = convert("--hf-path", vision, "-q", "--output-dir", tmp_path / "mlx")
    assert code == 0, err
    assert asked["trust_remote_code"] is False
    assert (asked["quantize"], asked["q_bits"], asked["q_group_size"]) == (True, 4, 64)
    assert "continues 'Two and two make' with ' five'" in out
    assert reported(out)[:2] == (0, 0)


def test_existing_folder_is_kept_unless_forced(source, tmp_path):
    output = tmp_path / "my model"
    output.mkdir()
    (output / "config.json").write_text('{"model_type": "mine"}')
    (output / "model-00001-of-00009.safetensors").touch()
    code, _, err = convert("--hf-path", source, "--output-dir", output)
    assert code == 2
    assert f"--hf-path {source} --output-dir '{output}' --force" in err
    assert (output / "config.json").read_text() == '{"model_type": "mine"}'
    assert convert("--hf-path", source, "--output-dir", output, "--force")[0] == 0
    assert not (output / "model-00001-of-00009.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["my model"]


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"port": 80}', "index.js": "x"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "x", "thesis.tex": "x"},
        {"config.json": '{"model_type": "llama"}', "src/model.py": "x"},
        {"config.json": "mine"},
    ],
)
def test_force_deletes_nothing_beside_a_model(source, tmp_path, files):
    """Many a program has a config.json."""
    for name, text in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = tree(tmp_path)
    code, _, err = convert("--hf-path", source, "--output-dir", tmp_path / "out", "--force")
    assert code == 2
    assert "is none" in err or "which is no part of a model" in err
    assert tree(tmp_path) == before


def test_the_handler_of_a_signal_is_put_back(source, tmp_path):
    """Who calls `main` goes on with their own."""

    def mine(*_):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        for output, code in ((tmp_path / "out", 0), (source, 2)):
            assert convert("--hf-path", source, "--output-dir", output)[0] == code
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_force_does_not_delete_other_folders(source, tmp_path):
    (tmp_path / "thesis.tex").touch()
    code, _, err = convert("--hf-path", source, "--output-dir", tmp_path, "--force")
    assert code == 2
    assert "model folders only" in err
    assert (tmp_path / "thesis.tex").exists()


def test_source_is_never_replaced(source):
    for output in (source, source / ".." / source.name, source.parent):
        code, _, err = convert("--hf-path", source, "--output-dir", output, "--force")
        assert code == 2
        assert "would replace the source" in err


def truncate(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


# What is done to the folder, exit code, message
DAMAGES = {
    "architecture": (
        lambda f: edit_config(f, model_type="unheard_of"),
        2,
        "has no model_type 'unheard_of'",
    ),
    "settings": (lambda f: edit_config(f, num_attention_heads=0), 1, "cannot be converted: "),
    "shape": (lambda f: edit_config(f, hidden_size=128), 1, "cannot be converted: Expected shape"),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [], "model": {}}'),
        2,
        "tokenizer.json is damaged",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        2,
        "has no tokenizer (tokenizer.json)",
    ),
    "config": (
        lambda f: (f / "config.json").write_text("[]"),
        2,
        "config.json cannot be read",
    ),
    "truncated": (truncate, 2, "truncated, 10 bytes of weights are missing"),
    "shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        2,
        "model-00002-of-00002.safetensors: missing",
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_source_leaves_the_old_folder_and_no_rubbish(how, packed, tmp_path):
    folder = write_checkpoint(tmp_path / "broken", "llama", shards=2)
    damage, expected, message = DAMAGES[how]
    damage(folder)
    output = tmp_path / "mlx"
    packed_bytes = (packed / "model.safetensors").read_bytes()
    output.mkdir()
    (output / "config.json").write_bytes((packed / "config.json").read_bytes())
    (output / "model.safetensors").write_bytes(packed_bytes)
    code, _, err = convert("--hf-path", folder, "--output-dir", output, "--force")
    assert (code, err.splitlines()[-1][:7]) == (expected, "error: ")
    assert message in err
    assert (output / "model.safetensors").read_bytes() == packed_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "mlx"]


def test_the_last_line_can_be_typed_where_the_path_has_a_space(source, tmp_path):
    code, out, _ = convert("--hf-path", source, "--output-dir", tmp_path / "my model")
    words = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert (code, words) == (0, ["--set", f"model_name={tmp_path / 'my model'}"])


def test_interruption_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(args, folder):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_model, "run_conversion", interrupted)
    output = tmp_path / "new" / "deep" / "mlx"
    code, _, err = convert("--hf-path", source, "--output-dir", output)
    assert code == 130
    assert err.endswith("interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_result_that_nobody_reads_is_still_there(tmp_path):
    output = tmp_path / "mlx"
    words = ["--hf-path", str(ROOT / "models/tiny-math"), "-q", "--output-dir", str(output)]
    command = [sys.executable, str(ROOT / "utils/convert_model.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()  # before it prints, as a `| head` that has ended
        assert "error" not in process.stderr.read()
    assert process.returncode == 0
    assert (output / "model.safetensors").is_file()


def test_model_that_computes_nan_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "hf", "llama")
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    weights["model.norm.weight"] = mx.full((64,), 1e5)  # infinite in float16
    mx.save_safetensors(str(tmp_path / "new.safetensors"), weights)
    (tmp_path / "new.safetensors").rename(file)
    words = ("--hf-path", folder, "--dtype", "float16", "--output-dir", tmp_path / "out")
    code, _, err = convert(*words)
    assert code == 1
    assert "NaN or inf" in err
    assert "try --dtype bfloat16" in err
    assert not (tmp_path / "out").exists()


def test_source_that_does_not_fit_is_converted_without_comparison(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_check.runtime, "device_memory_bytes", lambda: 1000)
    code, out, err = convert("--hf-path", source, "--output-dir", tmp_path / "mlx")
    assert code == 0
    assert "does not fit into memory to compare with" in err
    assert "not compared with the source" in out


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.chdir(source.parent.parent)
    name = f"{source.parent.name}/mistyped"
    code, _, err = convert("--hf-path", name, "--output-dir", "out")
    assert code == 2
    assert f"--hf-path = '{name}': there is no such folder; {source.parent.name} has " in err
    assert source.name in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hf-path ./nowhere", "./nowhere: no such folder"),
        ("--hf-path a/b/c", "no hub name"),
        ("--hf-path .", "no config.json"),
        ("--hf-path owner/name --bits 4", "--bits need --quantize"),
        ("--hf-path owner/name --q-mode mxfp4 --group-size 32", "need --quantize"),
        ("--hf-path owner/name --quant-predicate mixed_2_6", "need --quantize"),
        ("--hf-path owner/name -q --dequantize", "exclude each other"),
        ("--hf-path owner/name --bits 4 --dequantize", "need --quantize"),
        ("--hf-path owner/name -q --q-mode mxfp4 --bits 8", "--q-mode mxfp4, which has 4"),
        ("--hf-path owner/name -q --q-mode nvfp4 --group-size 64", "nvfp4, which has 16"),
        ("--hf-path owner/name -q --group-size 16", "affine, which has 32, 64, 128"),
        ("--hf-path owner/name -q --quant-predicate mixed_2_6 --bits 4", "leave out --bits"),
        ("--hf-path owner/name -q --quant-predicate mixed_2_6 --q-mode mxfp8", "--q-mode mxfp8"),
        ("--hf-path owner/name --upload-repo mine", "has the form OWNER/NAME"),
        ("--hf-path owner/name --upload-repo me/i..t", "--upload-repo me/i..t"),
        ("--hf-path owner/name --output-dir /proc/self/status/x", "is no writable folder"),
    ],
)
def test_wrong_arguments_are_refused_at_once(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = convert(*words.split())
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bits 7", "choose from 2, 3, 4, 5, 6, 8"),
        ("--group-size 48", "choose from 16, 32, 64, 128"),
        ("--q-mode int4", "mxfp4"),
        ("--quant-predicate mixed_9_9", "mixed_3_6"),
        ("--quant", "unrecognized arguments: --quant"),
    ],
)
def test_unknown_choices_are_answered_with_the_known(capsys, monkeypatch, words, message):
    argv = ["convert_model.py", "--hf-path", "owner/name", *words.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        convert_model.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_sources_that_make_no_sense(source, packed, tmp_path):
    bnb = write_checkpoint(tmp_path / "bnb", "llama")
    edit_config(bnb, quantization_config={"quant_method": "bitsandbytes"})
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    old = write_checkpoint(tmp_path / "old", "llama")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    write_checkpoint(tmp_path / "run/final", "llama")
    cases = [
        ((packed, "-q"), "is quantized already; convert its source, or --dequantize it"),
        ((source, "--dequantize"), "there is nothing to dequantize"),
        ((source, "--revision", "main"), "is for models on the hub"),
        ((source, "--eos-token", "<stop>"), "special tokens: <|endoftext|>, <|im_end|>"),
        ((bnb,), "is quantized by bitsandbytes, which mlx-lm does not read; it reads awq"),
        ((adapters,), f"--hf-path MODEL --adapter-path {adapters}"),
        ((old,), "only pytorch_model.bin. Save it with"),
        ((empty,), "names no model_type"),
        ((tmp_path / "run",), f"it has no config.json, but {tmp_path}/run/final has one"),
    ]
    for words, message in cases:
        code, _, err = convert("--hf-path", *words, "--output-dir", tmp_path / "mlx")
        assert (code, message in err) == (2, True), err
        assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RepositoryNotFoundError", 2),
        ("RevisionNotFoundError", 2),
        ("GatedRepoError", 2),
        ("LocalEntryNotFoundError", 1),
    ],
)
def test_hub_errors_are_one_line(tmp_path, monkeypatch, name, expected):
    import huggingface_hub

    def fail(*args, **kwargs):
        # Built without a response, which differs between versions of the hub's client.
        kind = getattr(huggingface_hub.errors, name)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, _, err = convert("--hf-path", "owner/name", "--output-dir", tmp_path / "out")
    assert code == expected
    assert "owner/name" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_the_fault_of_the_source(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    place = tmp_path / "deep/out"
    code, _, err = convert("--hf-path", source, "--output-dir", place)
    assert (code, f"error: {place} cannot be written: " in err) == (1, True), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_table_of_the_readme_is_what_the_conversions_give():
    text = (hf_layout.ROOT / "utils" / "README.md").read_text(encoding="utf-8")
    section = text[text.index("<!-- convert -->") : text.index("<!-- /convert -->")]
    written = section[section.index("| model |") :].splitlines()
    made = hf_layout.table().splitlines()
    assert written[:2] == made[:2]
    for row, wanted in zip(written[2:], made[2:], strict=False):
        label, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
        name, *values = [cell.strip() for cell in wanted.split("|")[1:-1]]
        assert label == name
        # Another BLAS or version of MLX rounds otherwise.
        found = [float(c) for c in cells]
        assert found == pytest.approx([float(v) for v in values], rel=0.3, abs=1e-4)


def test_help_teaches_and_is_quick(tmp_path):
    done, packages = imports_of(convert_model.__file__, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert not packages & {*SLOW, "mlx", "numpy"}
    assert "--hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize" in done.stdout


def test_command_runs_as_a_script_from_anywhere(source, tmp_path):
    command = [sys.executable, convert_model.__file__, "--hf-path", str(source), "-q"]
    done = subprocess.run(
        [*command, "--output-dir", "here"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert model_shape.read_shape(tmp_path / "here").quantized_bits == 4
