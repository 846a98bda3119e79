"""No pickle, no eval, no code that comes with a model, no network that nobody asked for."""

import ast
import contextlib
import json
import pickle
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.base.errors import UserError
from utils.model import loading

SOURCES = [ROOT / "mlx-grpo.py", *sorted((ROOT / "utils").rglob("*.py"))]
# What turns data into code. Three places do on purpose: the script is imported by its path, and the
# files of rewards and of environments are code. convert_nanochat reads the pickles that nanochat
# writes, by an unpickler that knows one name and with torch's weights_only.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MAY_IMPORT = {("convert_nanochat.py", "pickle")}
MAY_EXECUTE = {"script.py", "importing.py", "environment_worker.py"}


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def complaints(name, source):
    """What a source does that data must not lead to."""
    tree = ast.parse(source)
    for module in imports(tree):
        if module in FORBIDDEN_IMPORTS and (name, module) not in MAY_IMPORT:
            yield f"imports {module}"
    for call in calls(tree):
        what = ast.unparse(call.func)
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if what in FORBIDDEN_CALLS or what in ("os.system", "os.popen", "yaml.load"):
            yield f"calls {what}"
        if what.endswith("exec_module") and name not in MAY_EXECUTE:
            yield "executes a file"
        if what == "torch.load" and words.get("weights_only") != "True":
            yield "calls torch.load without weights_only"
        if what.startswith("pickle.") and what != "pickle.Unpickler":
            yield f"calls {what}"
        for word in ("shell", "allow_pickle", "trust_remote_code"):
            if words.get(word) == "True":
                yield f"passes {word}=True"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_turns_data_into_code(path):
    assert not list(complaints(path.name, path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import load",
        "eval(text)",
        "exec(text)",
        "numpy.load(file, allow_pickle=True)",
        "torch.load(file)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "spec.loader.exec_module(module)",
        "pickle.loads(data)",
    ],
)
def test_the_check_of_the_sources_sees(source):
    assert list(complaints("x.py", source))


@pytest.fixture
def model(model_dir, tmp_path):
    """A copy of the random model, and where code that ran leaves its mark."""
    return shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "ran"


def load(grpo, folder, **settings):
    return grpo.load_model(grpo.MLXGRPOConfig(model_name=str(folder), **settings))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_of_a_model_runs_only_when_it_is_trusted(grpo, model):
    folder, mark = model
    change(folder / "config.json", model_file="own.py")
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from mlx_lm.models.llama import Model, ModelArgs\n"
    )
    with pytest.raises(UserError, match="custom module"):
        load(grpo, folder)
    assert not mark.exists()
    assert load(grpo, folder, trust_remote_code=True).vocabulary == 384
    assert mark.exists()


def test_code_of_a_tokenizer_does_not_run(grpo, model):
    folder, mark = model
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own:\n    pass\n"
    )
    names = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    change(folder / "tokenizer_config.json", **names)
    with contextlib.suppress(UserError):  # transformers may do without the class
        load(grpo, folder)
    assert not mark.exists()


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


PICKLES = ("pytorch_model.bin", "model.pt", "model.pkl", "training_args.bin", "adapters.npz")


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_beside_the_weights_is_not_opened(grpo, model, name):
    folder, mark = model
    (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    load(grpo, folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_place_of_the_weights_is_refused(model, name):
    folder, mark = model
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(mark)) + b"." * 100)
    with pytest.raises(UserError, match=r"no model\*\.safetensors|no complete header"):
        loading.check_model(str(folder))
    assert not mark.exists()


def without_network(tmp_path, script, *words):
    """A command where any use of the network raises; returns (result, what asked for it)."""
    evidence = tmp_path / "evidence"
    code = (
        "import runpy, sys\n"
        "evidence, script, *words = sys.argv[1:]\n"
        "ways = {'connect', 'getaddrinfo', 'gethostbyname', 'gethostbyaddr', 'sendto', 'bind'}\n"
        "def refuse(event, arguments):\n"
        "    if event == 'urllib.Request' or event.removeprefix('socket.') in ways:\n"
        "        with open(evidence, 'a') as file:\n"
        "            print(event, arguments, file=file)\n"
        "        raise OSError('no network here')\n"
        "sys.addaudithook(refuse)\n"
        "sys.argv = [script, *words]\n"
        "sys.path[0] = script.rpartition('/')[0]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, evidence, ROOT / script, *words]
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    return done, evidence.read_text() if evidence.exists() else ""


def test_the_main_job_needs_no_network(tmp_path):
    out = tmp_path / "out"
    settings = f"output_dir={out}", "max_updates=2", "save_steps=1"
    words = [word for setting in settings for word in ("--set", setting)]
    words = ("--config", "configs/smoke_test.toml", *words)
    done, asked = without_network(tmp_path, "mlx-grpo.py", *words)
    assert done.returncode == 0, done.stderr
    assert not asked
    assert (out / "final" / "model.safetensors").is_file()


def test_asking_a_local_model_needs_no_network(tmp_path):
    words = ("--model", "models/tiny-math", "Why?", "--max-tokens", "3")
    done, asked = without_network(tmp_path, "utils/inference.py", *words)
    assert done.returncode == 0, done.stderr
    assert not asked


def test_the_watch_for_the_network_sees_a_model_from_the_hub(tmp_path):
    words = ("--dry-run", "--set", "model_name=owner/model")
    done, asked = without_network(tmp_path, "mlx-grpo.py", *words)
    assert done.returncode == 1
    assert "socket." in asked
    assert done.stderr.startswith("error: model owner/model: cannot be read from the hub")


def test_the_pages_say_that_reward_files_are_code():
    assert "Reward files are code" in (ROOT / "docs/settings.md").read_text()
    assert "Reward files and models with" in (ROOT / "README.md").read_text()
