"""The converter on a tiny random model: what it writes works, and it spoils nothing."""

import json
import subprocess
import sys
import time

import pytest
from conftest import make_model

from utils import convert_model, memory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random qwen2 folder of 64 hidden units, which can be quantized."""
    return make_model(tmp_path_factory.mktemp("convert") / "source", model_type="qwen2")


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_model.py", *map(str, arguments)])
        code = convert_model.main()
        return (code, *capsys.readouterr())

    return run


def test_quantized_folder_loads_and_is_described(source, convert, tmp_path):
    from mlx_lm import load

    output = tmp_path / "deep" / "mlx_model"
    arguments = ("--hf-path", source, "--quantize", "--group-size", 32, "--bits", 8)
    code, out, _ = convert(*arguments, "--output-dir", output)
    assert code == 0
    assert "bits per weight; it continues" in out
    assert f"--set model_name={output}" in out
    config = json.loads((output / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    assert config["quantization"]["group_size"] == 32
    shape = memory.read_shape(output)
    assert shape.quantized_bits == 8
    assert shape.parameters == memory.read_shape(source).parameters
    model, tokenizer = load(str(output))[:2]
    assert tokenizer.encode("1 + 2") == load(str(source))[1].encode("1 + 2")
    assert model.model.layers[0].mlp.up_proj.bits == 8
    assert [path.name for path in output.parent.iterdir()] == ["mlx_model"]


def test_dtype_without_quantization(source, convert, tmp_path):
    output = tmp_path / "half"
    assert convert("--hf-path", source, "--dtype", "bfloat16", "--output-dir", output)[0] == 0
    assert set(memory.read_shape(output).bytes_by_dtype) == {"BF16"}


def test_existing_folder_is_kept_unless_forced(source, convert, tmp_path):
    output = tmp_path / "mlx_model"
    output.mkdir()
    (output / "config.json").write_text("mine")
    (output / "old").touch()
    code, _, err = convert("--hf-path", source, "--output-dir", output)
    assert code == 2
    assert f"--hf-path {source} --output-dir {output} --force" in err
    assert (output / "config.json").read_text() == "mine"
    assert convert("--hf-path", source, "--output-dir", output, "--force")[0] == 0
    assert not (output / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mlx_model"]


def test_force_does_not_delete_other_folders(source, convert, tmp_path):
    (tmp_path / "thesis.tex").touch()
    code, _, err = convert("--hf-path", source, "--output-dir", tmp_path, "--force")
    assert code == 2
    assert "model folders only" in err
    assert (tmp_path / "thesis.tex").exists()


def test_failed_conversion_leaves_the_old_folder_and_no_rubbish(source, convert, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "unheard_of"}')
    output = tmp_path / "mlx_model"
    assert convert("--hf-path", source, "--output-dir", output)[0] == 0
    before = (output / "model.safetensors").read_bytes()
    code, _, err = convert("--hf-path", broken, "--output-dir", output, "--force")
    assert code == 1
    assert err.startswith(f"error: {broken} cannot be converted")
    assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "mlx_model"]


def test_model_that_computes_nan_is_refused(convert, tmp_path):
    import mlx.core as mx

    folder = make_model(tmp_path / "nan", model_type="qwen2")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = mx.full((64,), float("nan"))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    code, _, err = convert("--hf-path", folder, "--output-dir", tmp_path / "out")
    assert code == 1
    assert "NaN or inf" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hf-path", "./nowhere"), "./nowhere: no such folder"),
        (("--hf-path", "a/b/c"), "no hub name"),
        (("--hf-path", "."), "no config.json"),
        (("--hf-path", "owner/name", "--bits", 4), "need --quantize"),
    ],
)
def test_wrong_arguments_are_refused_at_once(convert, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = convert(*arguments)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["RepositoryNotFoundError", "LocalEntryNotFoundError"])
def test_hub_errors_are_one_line(convert, tmp_path, monkeypatch, name):
    import mlx_lm
    from huggingface_hub import errors

    def fail(*args, **kwargs):
        # Built without a response, which differs between versions of the hub's client.
        kind = getattr(errors, name)
        raise kind.__new__(kind)

    monkeypatch.setattr(mlx_lm, "convert", fail)
    code, _, err = convert("--hf-path", "owner/name", "--output-dir", tmp_path / "out")
    assert code == (2 if name == "RepositoryNotFoundError" else 1)
    assert "owner/name" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_and_is_quick(tmp_path):
    script = convert_model.__file__
    start = time.perf_counter()
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 0.5
    assert done.returncode == 0
    assert "--hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize" in done.stdout


def test_command_runs_as_a_script_from_anywhere(source, tmp_path):
    command = [sys.executable, convert_model.__file__, "--hf-path", str(source), "-q"]
    done = subprocess.run(
        [*command, "--output-dir", "here"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert memory.read_shape(tmp_path / "here").quantized_bits == 4
