"""PEFT's adapters in and out: the numbers of PEFT itself, and what is refused by its name."""

import json
import shutil
import sys
from types import SimpleNamespace

import gguf_layout
import mlx.core as mx
import numpy as np
import pytest
from conftest import make_model

from utils import convert_model, inference
from utils.base.errors import UserError
from utils.model import adapters, fusing, peft_adapters

MODELS = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),
}
IDS = [[1, 5, 9, 200, 33, 7, 2, 90, 41, 300]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    for name, (kind, settings) in MODELS.items():
        gguf_layout.random_model(folder / name, kind, **settings)
    return folder


def logits(loaded):
    return np.array(loaded.model(mx.array(IDS)))


def opened(model, folder, **settings):
    from utils.base.script import load_script

    grpo = load_script()
    config = grpo.MLXGRPOConfig(model_name=str(model), adapter_path=str(folder), **settings)
    return grpo.load_model(config)


def write_peft(folder, names, kind="lora", rank=4, rows=64, config=None, weights=None):
    """A folder as PEFT writes it, without PEFT."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "use_dora": kind == "dora",
        "base_model_name_or_path": "some/base",
        "target_modules": ["q_proj"],
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
    }
    arrays = {}
    for name in names:
        base = f"base_model.model.{name}"
        arrays[f"{base}.lora_A.weight"] = rng.normal(0, 0.1, (rank, 64))
        arrays[f"{base}.lora_B.weight"] = rng.normal(0, 0.1, (rows, rank))
        if kind == "dora":
            arrays[f"{base}.lora_magnitude_vector"] = rng.normal(1, 0.1, rows)
    arrays |= weights or {}
    found = {k: mx.array(v.astype(np.float32)) for k, v in arrays.items() if v is not None}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), found)
    values |= config or {}
    kept = {k: v for k, v in values.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder


Q = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]


def by_hand(model, folder):
    """The model's logits with every product of PEFT's matrices added to its weight."""
    import mlx_lm

    base = mlx_lm.load(str(model))[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    for name, module in base.named_modules():
        low = arrays.get(f"base_model.model.{name}.lora_A.weight")
        if low is None:
            continue
        weight = module.weight + scale * (arrays[f"base_model.model.{name}.lora_B.weight"] @ low)
        size = arrays.get(f"base_model.model.{name}.lora_magnitude_vector")
        if size is not None:
            weight = weight * (size / mx.linalg.norm(weight, axis=1))[:, None]
        module.weight = weight
    return np.array(base(mx.array(IDS)))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
def test_the_numbers_without_peft(models, tmp_path, kind, config):
    folder = write_peft(tmp_path / "peft", Q, kind, config=config)
    loaded = opened(models / "llama", folder)
    assert loaded.train_type == kind
    np.testing.assert_allclose(logits(loaded), by_hand(models / "llama", folder), atol=1e-4)


@pytest.mark.parametrize(
    ("names", "layers", "keys"),
    [
        (Q, -1, ["self_attn.q_proj"]),
        (Q[1:], 1, ["self_attn.q_proj"]),
        (Q[:1], -1, Q[:1]),
        ([Q[0], "model.layers.1.self_attn.o_proj"], -1, [Q[0], "model.layers.1.self_attn.o_proj"]),
    ],
)
def test_any_choice_of_modules_can_be_saved_as_mlx_lm_s(models, tmp_path, names, layers, keys):
    """And what is trained on is saved as mlx-lm's, and loaded again, is the same."""
    from mlx_lm import load

    from utils.model.writing import write_adapters

    folder = write_peft(tmp_path / "peft", names)
    loaded = opened(models / "llama", folder)
    saved = loaded.adapter_config
    assert (saved["num_layers"], saved["lora_parameters"]["keys"]) == (layers, keys)
    assert saved["lora_parameters"]["scale"] == 1.5
    trainable = {name for name, _ in loaded.model.named_modules() if name in names}
    assert trainable == set(names)
    write_adapters(tmp_path / "ours", loaded.model, saved)
    again = load(str(models / "llama"), adapter_path=str(tmp_path / "ours"))[0]
    np.testing.assert_allclose(np.array(again(mx.array(IDS))), logits(loaded), atol=1e-5)


def test_out_and_in_again_is_the_same(models, tmp_path):
    folder = write_peft(tmp_path / "peft", Q, "dora")
    loaded = opened(models / "llama", folder)
    from utils.model.writing import write_adapters

    write_adapters(tmp_path / "ours", loaded.model, loaded.adapter_config)
    made = peft_adapters.write(tmp_path / "ours", tmp_path / "out", "owner/base")
    assert made == "dora of rank 4 on 2 matrices of owner/base"
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, True)
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["target_modules"] == ["self_attn.q_proj"]
    assert config["layers_to_transform"] == [0, 1]
    before, after = (
        mx.load(str(f / "adapter_model.safetensors")) for f in (folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


REFUSED = {
    "peft_type": "peft_type = 'IA3'; what can be read is LORA",
    "bias": "bias = 'lora_only'; biases are not trained here",
    "modules_to_save": "modules_to_save = ['lm_head'] has no counterpart",
    "rank_pattern": "rank_pattern = {'q_proj': 8} has no counterpart",
    "alpha_pattern": "alpha_pattern = {'q_proj': 8} has no counterpart",
    "fan_in_fan_out": "fan_in_fan_out = True has no counterpart",
    "layer_replication": "layer_replication = [[0, 1]] has no counterpart",
    "trainable_token_indices": "trainable_token_indices = [1] has no counterpart",
    "target_parameters": "target_parameters = ['x'] has no counterpart",
    "lora_bias": "lora_bias = True has no counterpart",
    "alora_invocation_tokens": "alora_invocation_tokens = [1] has no counterpart",
    "something_new": "something_new = 1 has no counterpart",
    "init_lora_weights": "init_lora_weights = 'pissa' changes the base as well",
    "r": "r = 0 should be a positive whole number",
    "lora_alpha": "lora_alpha = 'a' should be a number",
    "lora_dropout": "lora_dropout = 1.0 should be at least 0 and below 1",
}
VALUES = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "alora_invocation_tokens": [1],
    "something_new": 1,
    "init_lora_weights": "pissa",
    "r": 0,
    "lora_alpha": "a",
    "lora_dropout": 1.0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_peft_has_and_we_do_not_is_refused_by_name(tmp_path, key):
    folder = write_peft(tmp_path / "peft", Q, config={key: VALUES.get(key, True)})
    with pytest.raises(UserError) as caught:
        peft_adapters.read(folder)
    assert REFUSED[key] in str(caught.value)


A, B = (f"base_model.model.{Q[0]}.lora_{x}.weight" for x in "AB")
WRONG = {
    "no B": ({B: None}, {}, f"lacks lora_B of '{Q[0]}'"),
    "rank": (
        {A: np.ones((3, 64))},
        {},
        "have the rank 3 and 4, but adapter_config.json says r = 4",
    ),
    "another part": (
        {f"base_model.model.{Q[0]}.weight": np.ones((2, 2))},
        {},
        "which is no LoRA matrix",
    ),
    "no prefix": ({"a.lora_A.weight": np.ones((4, 64))}, {}, "which is no LoRA matrix"),
    "axes": ({A: np.ones(64)}, {}, "has the shape (64,)"),
    "no magnitude": ({}, {"use_dora": True}, f"lacks lora_magnitude_vector of '{Q[0]}'"),
    "a magnitude": (
        {f"base_model.model.{Q[0]}.lora_magnitude_vector": np.ones(64)},
        {},
        "says use_dora = false",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_weights(tmp_path, what):
    weights, config, message = WRONG[what]
    folder = write_peft(tmp_path / "peft", Q[:1], config=config, weights=weights)
    with pytest.raises(UserError) as caught:
        peft_adapters.read(folder)
    assert message in str(caught.value)


MISFITS = {
    "a layer more": ({"names": ["model.layers.7.self_attn.q_proj"]}, "there is no such layer"),
    "another width": ({"names": Q, "rows": 48}, "gives 64, but its lora_b has the shape (4, 48)"),
    "a norm": ({"names": ["model.norm"]}, "that is no linear layer"),
    "embeddings": ({"names": ["model.embed_tokens"]}, "adapts the embeddings"),
    "a tied head": ({"names": ["lm_head"]}, "it adapts lm_head, and there is no such layer"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_adapters_of_another_model_name_both(models, tmp_path, what):
    settings, message = MISFITS[what]
    folder = write_peft(tmp_path / "peft", **settings)
    with pytest.raises(UserError) as caught:
        opened(models / "tied", folder)
    assert message in str(caught.value)
    if what != "embeddings":
        assert f"trained on some/base, put on {models / 'tied'}" in str(caught.value)


def test_a_base_of_another_name_is_told(models, tmp_path, capsys):
    opened(models / "llama", write_peft(tmp_path / "peft", Q))
    assert "were trained on some/base; this is" in capsys.readouterr().err
    named = {"base_model_name_or_path": "other/Llama"}
    opened(models / "llama", write_peft(tmp_path / "same", Q, config=named))
    assert "were trained on" not in capsys.readouterr().err


def test_train_type_and_files_are_checked(models, tmp_path):
    folder = write_peft(tmp_path / "peft", Q)
    with pytest.raises(UserError, match="holds lora adapters, but train_type = dora"):
        opened(models / "llama", folder, train_type="dora")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged: .*truncated"):
        opened(models / "llama", folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        opened(models / "llama", folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only adapter_model\.bin: save it anew"):
        opened(models / "llama", folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        opened(models / "llama", folder)


def test_a_folder_of_both_is_refused(models, tmp_path):
    folder = write_peft(tmp_path / "peft", Q)
    shutil.copyfile(folder / "adapter_model.safetensors", folder / "adapters.safetensors")
    with pytest.raises(UserError, match="holds adapters of PEFT and of mlx-lm"):
        opened(models / "llama", folder)
    other = write_peft(tmp_path / "more", Q, config={"lora_parameters": {}})
    with pytest.raises(UserError, match="has lora_parameters"):
        opened(models / "llama", other)


def test_a_model_folder_that_holds_adapters_too_is_refused(tmp_path):
    make_model(tmp_path / "both")
    write_peft(tmp_path / "both", Q)
    with pytest.raises(UserError, match="holds a model and adapters"):
        inference.check_model(str(tmp_path / "both"))


def test_five_bits_and_dora(models, tmp_path):
    model = SimpleNamespace(named_modules=lambda: [("a", SimpleNamespace(bits=5))])
    with pytest.raises(UserError, match="do not work on 5-bit weights, which BASE has"):
        adapters.check_dora(model, "dora", "BASE")


def test_inference_finds_the_base_that_peft_names(models, tmp_path):
    named = {"base_model_name_or_path": str(models / "llama")}
    folder = write_peft(tmp_path / "peft", Q, config=named)
    assert inference.check_model(str(folder)) == (str(models / "llama"), str(folder))
    loaded = inference.open_model(str(folder))
    np.testing.assert_allclose(logits(loaded), by_hand(models / "llama", folder), atol=1e-4)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert_model.py", *map(str, words)])
    return convert_model.main()


def test_adapters_are_merged_into_their_model(models, tmp_path, monkeypatch, capsys):
    import mlx_lm

    folder = write_peft(tmp_path / "peft", Q)
    words = ("--hf-path", models / "llama", "--adapter-path", folder)
    assert run(monkeypatch, *words, "--output-dir", tmp_path / "out") == 0, capsys.readouterr().err
    found = mlx_lm.load(str(tmp_path / "out"))[0](mx.array(IDS))
    np.testing.assert_allclose(np.array(found), by_hand(models / "llama", folder), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run(monkeypatch, *words, "--output-dir", tmp_path / "q", "-q", "--group-size", 32) == 0
    small = ("--hf-path", tmp_path / "q", "--adapter-path", folder, "--to", "gguf")
    assert run(monkeypatch, *small, "--output-dir", tmp_path / "m.gguf") == 0
    capsys.readouterr()
    assert run(monkeypatch, "--hf-path", folder, "--output-dir", tmp_path / "no") == 2
    assert f"--hf-path MODEL --adapter-path {folder}" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--output-dir", folder, "--force") == 2
    assert "would replace the source" in capsys.readouterr().err
    folder.rename(tmp_path / "adapters")
    none = ("--hf-path", models / "llama", "--adapter-path", tmp_path)
    assert run(monkeypatch, *none, "--output-dir", tmp_path / "no") == 2
    said = f"{tmp_path} holds none (no adapter_config.json); {tmp_path / 'adapters'} does"
    assert f"--adapter-path takes adapters, and {said}" in capsys.readouterr().err


def test_the_prompt_of_adapters_comes_with_them(models, tmp_path):
    folder = write_peft(tmp_path / "peft", Q)
    prompt = {"format": 1, "settings": {"stop_strings": ["</answer>"], "system_prompt": "S"}}
    (folder / "grpo_prompt.json").write_text(json.dumps(prompt))
    (folder / "chat_template.jinja").write_text("served")
    fusing.fuse(models / "llama", folder, tmp_path / "out", ("BASE", "ADAPTERS"), False)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "served"
    assert json.loads((tmp_path / "out/grpo_prompt.json").read_text()) == prompt
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings["stop_strings"] == ["</answer>"]


def test_to_peft_by_the_command(models, tmp_path, monkeypatch, capsys):
    from utils.model.writing import write_adapters

    ours = tmp_path / "ours"
    loaded = opened(models / "llama", write_peft(tmp_path / "peft", Q))
    write_adapters(ours, loaded.model, loaded.adapter_config)
    (ours / "chat_template.jinja").write_text("served")
    words = ("--hf-path", ours, "--to", "peft", "--output-dir", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    assert "lora of rank 4 on 2 matrices" in capsys.readouterr().out
    assert (tmp_path / "out/chat_template.jinja").read_text() == "served"
    for again, message in (
        (words, "exists already"),
        ((*words, "--force", "-q"), "--quantize goes with --to mlx"),
        (("--hf-path", models / "llama", *words[2:]), "holds none (no adapter_config.json)"),
        (("--hf-path", tmp_path / "peft", *words[2:]), "holds adapters of PEFT already"),
        (("--hf-path", ours, "--to", "peft", "--output-dir", ours), "would replace the source"),
    ):
        assert run(monkeypatch, *again) == 2
        assert message in capsys.readouterr().err
    assert run(monkeypatch, *words, "--force", "--base", "owner/name") == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    for file, content, message in (
        ("adapters.safetensors", b"{}", "is damaged"),
        ("adapters.safetensors", None, "has no adapters.safetensors"),
        ("adapter_config.json", b'{"fine_tune_type": "full"}', "does not describe LoRA or DoRA"),
    ):
        if content is None:
            (ours / file).unlink()
        else:
            (ours / file).write_bytes(content)
        assert run(monkeypatch, *words, "--force") == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch, capsys):
    from utils.model.writing import write_adapters

    loaded = opened(models / "llama", write_peft(tmp_path / "peft", Q))
    write_adapters(tmp_path / "ours", loaded.model, loaded.adapter_config)

    def full(*_):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    words = ("--hf-path", tmp_path / "ours", "--to", "peft", "--output-dir", tmp_path / "d/out")
    assert run(monkeypatch, *words) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "peft"]


# With PEFT itself: `uv run --group torch pytest tests/model/test_peft_adapters.py`.
CONFIGS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["o_proj", "gate_proj"], "use_rslora": True},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "pattern": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
}


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    return pytest.importorskip("peft")


def base_of_torch(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_peft(peft, models, tmp_path, name, how):
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **CONFIGS[how])
    model = peft.get_peft_model(base_of_torch(models / name), config).eval()
    for key, value in model.named_parameters():
        if "lora_B" in key or "magnitude" in key:
            value.data += 0.02 * torch.randn_like(value)
    model.save_pretrained(tmp_path / "theirs")
    wanted = torch_logits(model)
    loaded = opened(models / name, tmp_path / "theirs")
    difference = np.abs(logits(loaded) - wanted).max() / np.abs(wanted).max()
    print(f"in  {name} {how}: {difference:.1e} of {np.abs(wanted).max():.3g}")
    assert difference < 1e-5
    assert np.abs(wanted - torch_logits(base_of_torch(models / name))).max() > 0.01

    from utils.model.writing import write_adapters

    write_adapters(tmp_path / "ours", loaded.model, loaded.adapter_config)
    peft_adapters.write(tmp_path / "ours", tmp_path / "out", str(models / name))
    again = peft.PeftModel.from_pretrained(base_of_torch(models / name), tmp_path / "out").eval()
    difference = np.abs(torch_logits(again) - logits(loaded)).max() / np.abs(wanted).max()
    print(f"out {name} {how}: {difference:.1e}")
    assert difference < 1e-5
