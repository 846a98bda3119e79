"""Fixtures: the script as a module, and a random model in real shapes with a toy tokenizer."""

import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402

runtime.preload_blas()  # as the script does, before any test file imports MLX
os.environ["MLX_ENABLE_TF32"] = "0"  # its products of float32 have 10 bits

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

# Equality to 1e-5 is a matter of float32 on the CPU; tests/device/ has what compares a GPU with it.
mx.set_default_device(mx.cpu)
# A shell that starts the tests in the background ignores Ctrl-C for them, and so would the programs
# that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_finish():
    """Modules and tests stay to the end: 0.3 s less for each gc.collect() of a test of memory."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def grpo():
    return load_script()


@pytest.fixture(autouse=True)
def quantized_layers():
    """Put back: what is switched on for CUDA, or for a test's, is so for the whole process."""
    before = nn.QuantizedLinear.__call__, nn.QuantizedEmbedding.as_linear
    yield
    nn.QuantizedLinear.__call__, nn.QuantizedEmbedding.as_linear = before


def make_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = ["<reasoning>\n1 + 2 = 3\n</reasoning>\n<answer>\n3\n</answer> How many apples?"] * 9
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(folder, *, model_type="llama", hidden=64, layers=2, vocab=384, seed=0, **extra):
    """A random model folder that mlx_lm.load reads; hidden 64 can be quantized."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        **extra,
    }
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    # Larger than the initialisation, so that the distribution is not flat and tests can fail.
    model.update(tree_map(lambda p: p * 3 if p.ndim > 1 else p, model.parameters()))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def quantized_dir(tmp_path_factory):
    """The random model in 4 bits, as convert_model writes it."""
    import mlx_lm
    from mlx_lm.utils import quantize_model, save_config, save_model

    folder = make_model(tmp_path_factory.mktemp("models") / "4bit")
    model, _, config = mlx_lm.load(str(folder), return_config=True)
    model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(folder, model)
    save_config(config, config_path=folder / "config.json")
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("test", 10)):
        rows = [
            {"question": f"How many is {'1 + ' * (n % 3)}{n}?", "answer": f"so\n#### {n}"}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def typed(grpo, model_dir, data_dir, tmp_path, monkeypatch, capsys):
    """Type the command in an empty folder: (exit code, stdout, stderr, files that changed).

    Keywords are the settings of its TOML file, on top of a small run on the random model.
    """
    from helpers import quiet, tree, write_toml

    monkeypatch.chdir(tmp_path)
    for name in ("MLX_GRPO_CONFIG", "UV"):  # `uv run pytest` sets the second
        monkeypatch.delenv(name, raising=False)
    base = {"model_name": str(model_dir), "dataset": str(data_dir), "output_dir": "out"}

    def run(*words, **settings):
        values = base | settings
        config = write_toml(tmp_path, quiet(values) | values)
        before = tree(tmp_path)
        capsys.readouterr()
        code = grpo.main(["--config", Path(config).name, *words])
        out, err = capsys.readouterr()
        after = tree(tmp_path)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        return code, out, err, changed

    return run


@pytest.fixture
def refused(typed):
    """Type a command that must be refused with nothing written; returns the message."""

    from helpers import the_message

    def run(*words, **settings):
        code, out, err, changed = typed(*words, **settings)
        assert not changed
        return the_message(code, out, err)

    return run


@pytest.fixture
def own_model(model_dir, tmp_path):
    """A copy of the random model to break."""
    return shutil.copytree(model_dir, tmp_path / "model")
