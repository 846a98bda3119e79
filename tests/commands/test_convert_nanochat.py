"""The nanochat converter against nanochat's own files and logits (tests/fixtures/nanochat).

Only what reads or writes a .pt file needs torch; elsewhere the same weights come from safetensors.
"""

import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from helpers import SLOW, flat, imports_of, read_log, run_training

from utils import convert_nanochat
from utils.model import loading
from utils.model import shape as model_shape
from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
PRESETS = ("nanochat_test", "nanochat_grpo", "nanochat_d32_test", "nanochat_d32")


def fixture_weights():
    weights = mx.load(str(FIXTURES / "weights.safetensors"))
    return {name: np.array(value.astype(mx.float32)) for name, value in weights.items()}


def write_checkpoint(base):
    """nanochat's own layout below its base folder; returns the checkpoint directory."""
    folder = base / "chatsft_checkpoints" / "d2"
    for path in (folder, base / "tokenizer"):
        path.mkdir(parents=True)
    (folder / "meta_000010.json").write_bytes((FIXTURES / "meta_000010.json").read_bytes())
    pickled = (FIXTURES / "tokenizer.pkl").read_bytes()
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickled)
    (folder / "model_000010.pt").write_bytes(b"read by read_weights only")
    return folder


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs the dependency group torch")


@pytest.fixture
def checkpoint(tmp_path):
    pytest.importorskip("tiktoken")
    return write_checkpoint(tmp_path / "nanochat")


@pytest.fixture
def weights(monkeypatch):
    """The weights that the checkpoint seems to hold; a test may change them."""
    weights = fixture_weights()
    monkeypatch.setattr(convert_nanochat, "read_weights", lambda path: dict(weights))
    return weights


@pytest.fixture
def real_checkpoint(checkpoint, torch):
    """With a model_000010.pt as torch.save writes a state dict."""
    state = OrderedDict((k, torch.from_numpy(v)) for k, v in fixture_weights().items())
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    torch.save(state, checkpoint / "model_000010.pt")
    return checkpoint


@pytest.fixture
def convert(capsys):
    """Run the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = convert_nanochat.main(list(map(str, arguments)))
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted folder in float32."""
    pytest.importorskip("tiktoken")
    base = tmp_path_factory.mktemp("converted")
    folder = write_checkpoint(base / "nanochat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_nanochat, "read_weights", lambda path: fixture_weights())
        arguments = ["--checkpoint-dir", folder, "--output-dir", base / "out"]
        assert convert_nanochat.main([*map(str, arguments), "--dtype", "float32"]) == 0
    return base / "out"


def logits_of(folder):
    from mlx_lm.utils import load_model

    expected = mx.load(str(FIXTURES / "expected.safetensors"))
    return load_model(folder)[0](expected["tokens"]), expected


def difference(a, b):
    return mx.abs(a - b).max().item()


def test_logits_are_nanochats(converted):
    logits, expected = logits_of(converted)
    assert EXPECTED["commit"].startswith(convert_nanochat.LAST_COMMIT.split()[0])
    assert mx.abs(expected["logits"]).max().item() > 5
    # 4.6e-5, because mlx-lm's norms add 1e-5 where nanochat's add 1.2e-7; 3.6e-6 with the latter
    assert difference(logits, expected["logits_exact_rotation"]) < 1e-4
    # nanochat rounds its rotary tables to bfloat16, mlx-lm does not: 7e-3 on this model, which is
    # as far as nanochat's own two results lie apart.
    rounding = difference(expected["logits"], expected["logits_exact_rotation"])
    assert difference(logits, expected["logits"]) < 1.01 * rounding < 0.02


def test_a_real_checkpoint_converts_to_the_same_folder(real_checkpoint, converted, convert):
    output = real_checkpoint.parent / "out"
    arguments = ("--checkpoint-dir", real_checkpoint, "--output-dir", output)
    code, out, _ = convert(*arguments, "--dtype", "float32")
    assert code == 0
    assert "no parameter missing or left over; 47 padding rows of the vocabulary cut" in out
    assert "273 tokens from" in out
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in converted.iterdir()}
    for name in names:
        assert (output / name).read_bytes() == (converted / name).read_bytes(), name
    assert not [path for path in output.iterdir() if path.suffix in (".pt", ".pkl")]
    assert {path.name for path in output.parent.iterdir()} == {"d2", "out"}


def test_names_of_torch_compile_are_understood(checkpoint, torch):
    path = checkpoint / "model_000010.pt"
    torch.save({"_orig_mod.lm_head.weight": torch.ones(2, 2).bfloat16()}, path)
    read = convert_nanochat.read_weights(path)
    assert list(read) == ["lm_head.weight"]
    assert read["lm_head.weight"].dtype == np.float32


def test_default_is_bfloat16_and_the_plan_reads_it(checkpoint, weights, convert, tmp_path):
    code, out, _ = convert("--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "out")
    assert code == 0
    assert f"--set model_name={tmp_path / 'out'}" in out
    shape = model_shape.read_shape(tmp_path / "out")
    assert set(shape.bytes_by_dtype) == {"BF16"}
    assert shape.parameters == sum(v.size for v in weights.values()) - 2 * 47 * 32


def test_tokenizer_renders_as_nanochat_does(converted):
    tokenizer = TiktokenTokenizerWrapper.from_pretrained(converted)
    assert tokenizer.vocab_size == 273
    for case in EXPECTED["conversations"]:
        assert tokenizer.apply_chat_template(case["messages"]) == case["ids"]


def test_step_is_the_newest_unless_named(checkpoint, weights, convert, tmp_path):
    meta = (checkpoint / "meta_000010.json").read_text()
    for step in (2, 1234567):
        (checkpoint / f"model_{step:06d}.pt").touch()
        (checkpoint / f"meta_{step:06d}.json").write_text(meta)
    command = ("--checkpoint-dir", checkpoint, "--force", "--output-dir", tmp_path / "out")
    assert "model_1234567.pt" in convert(*command)[1]
    assert "model_000002.pt" in convert(*command, "--step", 2)[1]
    code, _, err = convert(*command, "--step", 3)
    assert code == 2
    assert "has no step 3, only 2, 10, 1234567" in err


def grpo_settings(preset):
    """A preset, short enough for a test."""
    import tomllib

    settings = tomllib.loads((ROOT / "configs" / f"{preset}.toml").read_text())
    short = {"max_train_samples": 4, "max_new_tokens": 8, "eval_max_new_tokens": 8}
    short |= {"eval_samples": 2, "eval_subset_size": 2, "gradient_accumulation_steps": 2}
    return {k: v for k, v in settings.items() if k not in ("model_name", "output_dir")} | short


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_the_converted_model(converted, data_dir, tmp_path, preset):
    settings = grpo_settings(preset) | {"num_epochs": 1, "learning_rate": 1e-3}
    code, trainer = run_training(converted, data_dir, tmp_path / "run", **settings)
    assert code == 0
    assert trainer.update_step == 2
    assert all(np.isfinite(r["loss"]) for r in read_log(tmp_path / "run") if "loss" in r)
    before = mx.load(str(converted / "model.safetensors"))
    after = flat(trainer.model.parameters())
    # the table holds tokens that the few prompts do not; every matrix has to move
    assert all(difference(before[name], after[name]) > 0 for name in before)
    final = tmp_path / "run" / "final"
    again = TiktokenTokenizerWrapper.from_pretrained(final)
    assert again.encode("hello") == trainer.tokenizer.encode("hello")
    assert difference(logits_of(final)[0], logits_of(converted)[0]) > 1e-4


def test_every_message_that_names_the_command_can_be_typed():
    import shlex

    known = {n: c for n, c in loading.HOW_TO_MAKE.items() if "nanochat-" in n}
    assert len(known) == 2
    for name, command in known.items():
        words = shlex.split(command.strip().splitlines()[-1])
        assert words[:6] == convert_nanochat.COMMAND.split()
        arguments = convert_nanochat.build_parser().parse_args(words[6:])
        assert str(arguments.output_dir) == name
    for preset in PRESETS:
        text = (ROOT / "configs" / f"{preset}.toml").read_text()
        assert any(f'model_name = "{name}"' in text for name in known)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def own_state(obj, module="tiktoken.core", name="Encoding"):
    """A pickle of `obj` as the state of module.name, which need not exist."""
    body = pickle.dumps(obj, protocol=3)[2:-1]
    return b"\x80\x03c" + f"{module}\n{name}\n".encode() + b")\x81" + body + b"b."


def encoding_state(**changes):
    ranks = {bytes([i]): i for i in range(256)}
    names = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
    special = {f"<|{name}|>": 256 + i for i, name in enumerate(names)}
    state = {"name": "x", "pat_str": ".", "mergeable_ranks": ranks, "special_tokens": special}
    return state | changes


RANKS = encoding_state()["mergeable_ranks"]
system = os.system.__module__ + ".system"
EVIL = {
    "os.system": (lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")), system),
    "eval": (lambda mark: pickle.dumps(Calls(eval, f"open({str(mark)!r}, 'w')")), "builtins.eval"),
    "protocol 0": (lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}"), 0), system),
    "nested reduce": (
        lambda mark: pickle.dumps([{"a": (1, Calls(Calls, Calls(os.system, f"touch {mark}")))}]),
        "test_convert_nanochat.Calls",
    ),
    "in the state": (
        lambda mark: own_state(encoding_state(name=Calls(os.system, f"touch {mark}"))),
        system,
    ),
    "attribute": (lambda mark: pickle.dumps(Calls(getattr, "", "join")), "builtins.getattr"),
    "other class of tiktoken": (
        lambda mark: own_state(encoding_state(), name="CoreBPE"),
        "tiktoken.core.CoreBPE",
    ),
    "class of the class": (
        lambda mark: b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93.",
        "tiktoken.core.Encoding.__init__",
    ),
    "encoding elsewhere": (lambda mark: own_state({}, module="tiktoken"), "tiktoken.Encoding"),
    "terminal codes": (lambda mark: own_state({}, module="\x1b[2J"), r"\x1b[2J.Encoding"),
}


@pytest.mark.parametrize("case", EVIL)
def test_pickles_that_import_are_refused_unrun(checkpoint, weights, convert, tmp_path, case):
    make, named = EVIL[case]
    mark, output = tmp_path / "mark", tmp_path / "out"
    evil = tmp_path / "evil.pkl"
    evil.write_bytes(make(mark))
    command = ("--checkpoint-dir", checkpoint, "--tokenizer", evil, "--output-dir", output)
    code, out, err = convert(*command)
    assert code == 2
    assert out == ""
    assert f"{named}; a tokenizer is tiktoken.core.Encoding and nothing else" in err
    assert not mark.exists()
    assert not output.exists()


HARMLESS = {
    "nothing": (b"", "no pickled tokenizer"),
    "text": (b"hello", "no pickled tokenizer"),
    "cut short": ((FIXTURES / "tokenizer.pkl").read_bytes()[:500], "no pickled tokenizer"),
    "a dictionary": (pickle.dumps({"a": 1}), "holds no Encoding of name, pat_str"),
    "the class itself": (b"\x80\x02ctiktoken.core\nEncoding\n.", "holds no Encoding"),
    "a name": (own_state("gpt2"), "only names tiktoken's encoding gpt2"),
    "extra state": (own_state(encoding_state(n_vocab=3)), "holds no Encoding"),
    "list of ranks": (own_state(encoding_state(mergeable_ranks=[1])), "mergeable_ranks has the"),
    "text as token": (own_state(encoding_state(mergeable_ranks={"a": 1})), "map bytes to int"),
    "text as id": (own_state(encoding_state(special_tokens={"a": "1"})), "map str to int"),
    "an id twice": (own_state(encoding_state(mergeable_ranks=RANKS | {b"ab": 3})), "each once"),
    "a byte missing": (own_state(encoding_state(mergeable_ranks={b"a": 0})), "lack 255 of the 256"),
    "no chat tokens": (own_state(encoding_state(special_tokens={})), "lacks <|bos|>"),
    "broken pattern": (own_state(encoding_state(pat_str="(")), "bad.pkl: "),
    "another size": (own_state(encoding_state()), "has 261 tokens, the model 273"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_tokenizer_is_named(checkpoint, weights, convert, tmp_path, case):
    data, message = HARMLESS[case]
    (tmp_path / "bad.pkl").write_bytes(data)
    command = ("--checkpoint-dir", checkpoint, "--tokenizer", tmp_path / "bad.pkl")
    code, _, err = convert(*command, "--output-dir", tmp_path / "out")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_import_are_refused_unrun(real_checkpoint, torch, convert, tmp_path):
    mark = tmp_path / "mark"
    state = {"lm_head.weight": torch.ones(2, 2), "x": [Calls(os.system, f"touch {mark}")]}
    torch.save(state, real_checkpoint / "model_000010.pt")
    command = ("--checkpoint-dir", real_checkpoint, "--output-dir", tmp_path / "out")
    code, _, err = convert(*command)
    assert code == 2
    assert f"model_000010.pt wants to import {system}" in err
    assert "nothing was run" in err
    (real_checkpoint / "model_000010.pt").write_bytes(pickle.dumps(state["x"]))
    code, _, err = convert(*command)
    assert code == 2
    assert "model_000010.pt is not what torch.save writes" in err
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [[1], {"a": 1}, {"a": "integers"}, {}])
def test_files_without_parameters_are_refused(real_checkpoint, torch, convert, tmp_path, value):
    if value == {"a": "integers"}:
        value = {"a": torch.arange(3)}
    torch.save(value, real_checkpoint / "model_000010.pt")
    code, _, err = convert("--checkpoint-dir", real_checkpoint, "--output-dir", tmp_path / "out")
    assert code == 2
    assert "parameter" in err


# What nanochat/gpt.py at 92d63d4 (3 July 2026) saves beyond the parameters that mlx-lm knows.
NEW_NAMES = {
    "resid_lambdas": "learned scales of the residual stream (resid_lambdas)",
    "x0_lambdas": "a learned skip from the embeddings to each layer (x0_lambdas)",
    "smear_gate.weight": "smear, the mixing with the previous token (smear_gate)",
    "smear_lambda": "(smear_lambda)",
    "backout_lambda": "backout, the subtraction of a middle layer (backout_lambda)",
    "value_embeds.1.weight": "value embeddings (value_embeds)",
    "transformer.h.1.attn.ve_gate.weight": "gates of value embeddings (ve_gate)",
}


def refused(convert, checkpoint, tmp_path):
    output = tmp_path / "out"
    code, out, err = convert("--checkpoint-dir", checkpoint, "--output-dir", output)
    assert (code, out) == (2, "")
    assert not output.exists()
    return err


def test_newer_models_are_refused_by_their_parameters(checkpoint, weights, convert, tmp_path):
    weights |= dict.fromkeys(NEW_NAMES, np.ones(1, np.float32))
    err = refused(convert, checkpoint, tmp_path)
    assert "does what mlx-lm's nanochat architecture does not" in err
    assert all(what in err for what in NEW_NAMES.values())
    assert "up to commit 2c4473d" in err


def change_meta(checkpoint, **changes):
    path = checkpoint / "meta_000010.json"
    meta = json.loads(path.read_text())
    meta["model_config"] |= changes
    path.write_text(json.dumps(meta))


BAD_META = {
    "sliding windows": ({"window_pattern": "SSSL"}, "sliding attention windows (window_pattern)"),
    "unknown": ({"rope_base": 1e5}, "architecture does not: rope_base"),
    "text": ({"n_head": "4"}, "n_head = '4' must be positive whole numbers"),
    "negative": ({"n_layer": -1}, "n_layer = -1 must be"),
    "heads": ({"n_head": 5}, "n_embd = 32, n_head = 5, n_kv_head = 2 do not divide"),
    "layers": ({"n_layer": 3}, "does not fit its meta file. Parameters missing: transformer.h.2."),
    "fewer layers": ({"n_layer": 1}, "Parameters left over: transformer.h.1.attn.c_k.weight"),
    "width": ({"n_embd": 64}, "of another shape: lm_head.weight (273, 32) instead of (273, 64)"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_what_does_not_fit_is_named(checkpoint, weights, convert, tmp_path, case):
    changes, message = BAD_META[case]
    change_meta(checkpoint, **changes)
    assert message in refused(convert, checkpoint, tmp_path)


def test_long_lists_of_parameters_are_cut(checkpoint, weights, convert, tmp_path):
    weights.clear()
    weights["head"] = np.ones(1, np.float32)
    err = refused(convert, checkpoint, tmp_path)
    assert "transformer.h.0.attn.c_proj.weight" in err
    assert "and 10 more; left over: head" in err


def test_missing_files_are_named(checkpoint, weights, convert, tmp_path):
    assert "nowhere is no folder" in refused(convert, tmp_path / "nowhere", tmp_path)
    err = refused(convert, checkpoint.parent.parent, tmp_path)
    assert f"has no model_NNNNNN.pt; there are some in {checkpoint}" in err
    (checkpoint.parent.parent / "tokenizer" / "tokenizer.pkl").rename(tmp_path / "moved.pkl")
    assert "say where it is with --tokenizer" in refused(convert, checkpoint, tmp_path)
    meta = checkpoint / "meta_000010.json"
    meta.write_text("{}")
    assert "meta_000010.json lacks 'model_config'" in refused(convert, checkpoint, tmp_path)
    meta.write_text("[")
    assert "meta_000010.json is no such file" in refused(convert, checkpoint, tmp_path)
    meta.unlink()
    assert "meta_000010.json is missing" in refused(convert, checkpoint, tmp_path)


def test_a_tokenizer_beside_the_model_is_found(checkpoint, weights, convert, tmp_path):
    (checkpoint.parent.parent / "tokenizer" / "tokenizer.pkl").rename(checkpoint / "tokenizer.pkl")
    assert convert("--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "out")[0] == 0


def test_existing_folders_are_kept_unless_forced(checkpoint, weights, convert, tmp_path):
    output = tmp_path / "out"
    command = ("--checkpoint-dir", checkpoint, "--output-dir", output)
    output.mkdir()
    (output / "thesis.tex").touch()
    assert "out exists already; --force replaces it" in convert(*command)[2]
    code, _, err = convert(*command, "--force")
    assert code == 2
    assert "replaces model folders only" in err
    (output / "config.json").write_text('{"model_type": "mine"}')
    code, _, err = convert(*command, "--force")
    assert (code, "thesis.tex, which is no part of a model" in err) == (2, True)
    (output / "thesis.tex").rename(output / "vocab.txt")
    assert convert(*command, "--force")[0] == 0
    assert not (output / "vocab.txt").exists()


def test_weights_that_compute_nan_leave_nothing(checkpoint, weights, convert, tmp_path):
    weights["lm_head.weight"] = np.full((320, 32), np.nan, np.float32)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = convert("--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "out")
    assert code == 1
    assert "computes NaN" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_interrupt_leaves_nothing(checkpoint, weights, convert, tmp_path, monkeypatch):
    def interrupted(folder, tokenizer):
        assert list(folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_nanochat, "try_model", interrupted)
    code, out, err = convert("--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "mlx")
    assert (code, out, err) == (130, "", "interrupted: nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["nanochat"]


def test_missing_torch_names_the_extra(checkpoint, convert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    err = refused(convert, checkpoint, tmp_path)
    assert "reading .pt files needs torch: uv sync --extra nanochat" in err


def test_old_torch_is_refused(torch, checkpoint, convert, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_nanochat, "version", lambda name: "2.5.1+cpu")
    assert "torch before 2.6" in refused(convert, checkpoint, tmp_path)


def test_help_teaches_and_is_quick(tmp_path):
    done, packages = imports_of(convert_nanochat.__file__, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert not packages & {*SLOW, "mlx", "numpy"}
    assert "--checkpoint-dir ~/.cache/nanochat/chatsft_checkpoints/d20" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
