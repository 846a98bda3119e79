"""`--ranks` and `--hostfile`: every rank has to do well."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import write_toml

from utils.run import launch

RANK = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from utils.run import launch
def work():
    rank = int(os.environ["MLX_RANK"])
    print("rank", rank, "of", sys.argv[1:], flush=True)
    {what}
    return 0
sys.exit(launch.told(work))
"""


def launched(tmp_path, what, size=2):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(root=str(ROOT), what=what))
    word = "mark-of-this-test"
    _, where, _ = launch.place_of(size, None)
    command = [sys.executable, "-c", launch.START, *where, "--python", sys.executable]
    command += ["--env", f"{launch.MARK}={word}", "--backend", "ring"]
    return launch.Launch([*command, "--", str(script), "--config", "a b"], word, size)


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("pass", 0, ""),
        ("if rank: sys.exit(3)", 1, "did not come to its end"),
        ("if rank: return 1\n    time.sleep(0.5)", 1, ""),
    ],
)
def test_the_exit_code_is_that_of_all(tmp_path, capfd, what, code, told):
    started = launched(tmp_path, what)
    assert started.wait() == code
    out, err = capfd.readouterr()
    assert "rank 1 of ['--config', 'a b']" in out
    assert "mark-of-this-test" not in out
    assert told in err


@pytest.mark.long
def test_what_is_stopped_is_no_longer_there(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LINGER", 1.0)
    started = launched(
        tmp_path, "if rank: os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(1)\n    return 1"
    )
    assert started.wait() == 1
    end = time.monotonic() + 20
    while living(started.process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not living(started.process.pid)


def living(group):
    """Processes of a group, but for those that have ended and that nobody has asked about yet."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return []
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found if Path("/proc/self").exists() else [group]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ranks", "0"], "--ranks 0: must be from 1 to 1024"),
        (["--hostfile", "nowhere.json"], "--hostfile nowhere.json: no such file"),
        (["--ranks", "2", "--hostfile", "x"], "choose one"),
    ],
)
def test_bad_input_is_told(refused, options, told, monkeypatch):
    monkeypatch.delenv("MLX_RANK", raising=False)
    assert told in refused(*options)


@pytest.mark.parametrize("content", ["", "[]", '{"hosts": [{"ssh": "a", "ips": []}]}', "[1]"])
def test_a_broken_hostfile_is_told(tmp_path, content):
    file = tmp_path / "hosts.json"
    file.write_text(content)
    with pytest.raises(launch.UserError, match="it holds"):
        launch.hosts_of(file)
    file.write_text('[{"ssh": "mac1.local", "ips": ["10.0.0.1"]}]')
    assert len(launch.hosts_of(file)) == 1


@pytest.mark.long
def test_a_hostfile_of_two_hosts_on_one(tmp_path, model_dir, data_dir):
    """The whole command, as it is typed."""
    hosts = tmp_path / "hosts.json"
    host = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    hosts.write_text(json.dumps({"backend": "ring", "hosts": [host, host]}))
    values = {"model_name": str(model_dir), "dataset": str(data_dir), "system_prompt": ""}
    values |= {"output_dir": str(tmp_path / "run"), "max_updates": 1, "eval_samples": 0}
    values |= {"max_new_tokens": 8, "num_generations": 2, "quantize_for_rollouts": False}
    values |= {"use_compile": False, "learning_rate": 1e-3, "eval_subset_size": 0, "report": False}
    command = [sys.executable, "mlx-grpo.py", "--hostfile", str(hosts)]
    done = subprocess.run(
        [*command, "--config", write_toml(tmp_path, values)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished  the only update" in done.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
