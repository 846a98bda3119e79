"""Kill runs with SIGKILL at random moments, resume them, and compare with runs that never stopped.

    python tests/kill_resume.py --kills 30        the long version; prints where the kills fell
    python tests/kill_resume.py --kills 6         the short one, which pytest runs

Each cycle starts a run of its own, kills it (some twice: the resumed run as well), resumes it to
the end and compares final weights, last checkpoint, log and what lies in the folder with the run
that was not stopped. Full fine-tuning and LoRA with several updates a rollout and a stale sampler
take turns. Every attempt is a process of its own; on Linux it is forked from one that has imported
everything, which saves the seconds that the imports take.

The phase a kill falls into is read from memory shared with the process, where wrappers around the
trainer's methods write it. Half of the kills are aimed: they wait until a phase that is short by
the clock (save, gradient, rollout) has begun, and a random part of its usual time.
"""

import argparse
import collections
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from utils.base.script import load_script  # noqa: E402
from utils.run import checkpoints, completions, ending, folders  # noqa: E402
from utils.run import log as runlog  # noqa: E402

grpo = load_script()

# What a run imports late is imported here, once; nothing is computed before the forks, since MLX's
# threads would not be there in the new process.
import mlx_lm.utils  # noqa: E402, F401
import transformers  # noqa: E402, F401

PHASES = ("load", "between", "rollout", "reward", "gradient", "log", "evaluation", "save", "final")
TIMES = ("seconds", "tokens_per_second", "peak_memory", "active_memory", "cache_memory")
AIMED = ("save", "gradient", "rollout")
RUNS = {
    "full": {"learning_rate": 0.01},
    "lora": {
        **{"train_type": "lora", "lora_learning_rate": 0.01, "lora_dropout": 0.1},
        **{"num_iterations": 2, "sync_every_updates": 3, "quantize_for_rollouts": True},
    },
}
COMMON = {
    **{"system_prompt": "", "use_compile": False, "quantize_for_rollouts": False},
    **{"num_generations": 4, "gradient_accumulation_steps": 2, "max_new_tokens": 24},
    **{"max_updates": 8, "save_steps": 4, "save_total_limit": 2, "logging_steps": 3},
    **{"eval_samples": 4, "eval_steps": 6, "eval_every_updates": 3, "eval_subset_size": 4},
    **{"eval_max_new_tokens": 8, "max_grad_norm": 1.0, "temperature": 1.0},
    **{"reward_funcs": [f"{TESTS / 'helpers.py'}:digest"], "resume": "auto"},
}


class Marker:
    """One byte that the run writes and the killer reads: the phase, as an index into PHASES."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"\0")
        self.path, self.file = path, path.open("r+b")
        self.memory = mmap.mmap(self.file.fileno(), 1)

    def phase(self) -> str:
        return PHASES[self.memory[0]]


def instrument(memory: mmap.mmap, spent: dict[str, list[float]]) -> None:
    """Wrap what a run does, so that `memory` says what it is doing now."""

    def watch(owner: object, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def watched(*args: object, **options: object) -> object:
            before, start = memory[0], time.perf_counter()
            memory[0] = PHASES.index(phase)
            try:
                return inner(*args, **options)
            finally:
                memory[0] = before
                spent.setdefault(phase, []).append(time.perf_counter() - start)

        setattr(owner, name, watched)

    trainer = grpo.MLXGRPOTrainer
    watch(trainer, "train", "between")
    watch(trainer, "generate_responses", "rollout")
    watch(trainer, "compute_rewards", "reward")
    watch(trainer, "update", "gradient")
    watch(trainer, "evaluate", "evaluation")
    watch(runlog.RunLog, "append", "log")
    watch(completions.Completions, "write", "log")
    watch(ending, "finish", "final")
    watch(checkpoints, "save", "save")
    watch(folders, "prune", "save")


def attempt(config: Path, marker: Path, times: Path) -> int:
    """The command itself, in this process."""
    with marker.open("r+b") as file:
        spent: dict[str, list[float]] = {}
        instrument(mmap.mmap(file.fileno(), 1), spent)
        code = grpo.main(["--config", str(config)])
        times.write_text(json.dumps({name: max(values) for name, values in spent.items()}))
        return code


def start(config: Path, marker: Marker, times: Path, log: Path) -> int:
    """The number of a new process that makes an attempt."""
    marker.memory[0] = 0
    words = [str(config), str(marker.path), str(times)]
    if sys.platform != "linux":
        with log.open("ab") as out:
            command = [sys.executable, __file__, "--attempt", *words]
            return subprocess.Popen(command, stdout=out, stderr=out).pid
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 99
    try:
        code = attempt(*map(Path, words))
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit status if the process has ended; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


class Lab:
    """A model, questions, and the runs that are never stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, Marker(folder / "marker")
        make = f"from conftest import *; make_model(Path({str(folder / 'model')!r}), hidden=128)"
        subprocess.run([sys.executable, "-c", make], cwd=TESTS, check=True)
        for split, count in (("train", 24), ("test", 8)):
            rows = [{"question": f"How many is {n} + 1?", "answer": str(n)} for n in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / f"{split}.jsonl").write_text(text)
        self.whole, self.usual, self.seconds = {}, {}, {}
        for kind in RUNS:
            config, output = self.config(kind, f"whole-{kind}")
            begun = time.perf_counter()
            self.finish(config, output)
            self.seconds[kind] = time.perf_counter() - begun
            self.whole[kind] = described(output)
            self.usual[kind] = json.loads((folder / "times.json").read_text())

    def config(self, kind: str, name: str) -> tuple[Path, Path]:
        output = self.folder / name
        values = {**COMMON, **RUNS[kind], "output_dir": str(output)}
        values |= {"model_name": str(self.folder / "model"), "dataset": str(self.folder / "data")}
        path = self.folder / f"{name}.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        return path, output

    def start(self, config: Path, output: Path) -> int:
        log = output.with_suffix(".txt")
        return start(config, self.marker, self.folder / "times.json", log)

    def finish(self, config: Path, output: Path) -> None:
        """Run to the end."""
        pid = self.start(config, output)
        while (code := ended(pid)) is None:
            time.sleep(0.01)
        text = output.with_suffix(".txt").read_text()
        assert code == 0, f"exit code {code}:\n{text}"

    def kill(self, config: Path, output: Path, kind: str, aim: str, chance: random.Random) -> str:
        """Start the run and kill it; the phase it was in, or "" when it ended before."""
        pid = self.start(config, output)
        if aim:
            occasion, entered, before = chance.randint(1, 4), 0, ""
            while (code := ended(pid)) is None and entered < occasion:
                phase = self.marker.phase()
                entered, before = entered + (phase == aim != before), phase
            wait = chance.random() * self.usual[kind][aim]
        else:
            code, wait = None, chance.random() * self.seconds[kind]
        until = time.perf_counter() + wait
        while code is None and time.perf_counter() < until:
            code = ended(pid)
            time.sleep(0.0005)
        if code is None:
            os.kill(pid, signal.SIGSTOP)  # so that the marker is that of the moment of the kill
            phase = self.marker.phase()
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return ""  # it was faster than that
        assert code == -signal.SIGKILL, (
            f"exit code {code}:\n{output.with_suffix('.txt').read_text()}"
        )
        return phase


def without_times(record: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in record.items() if not k.startswith(TIMES)}


def described(output: Path) -> dict[str, object]:
    """What must be the same to the last bit: all that is in the folder, the times in it apart."""
    lines = (output / "training_log.jsonl").read_text().splitlines()
    found: dict[str, object] = {"log": [without_times(json.loads(line)) for line in lines]}
    found["groups"] = [*completions.read(output)]
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.parent.name == "completions":  # each process begins new files
            continue
        if path.is_dir():
            found[name] = "folder"
        elif path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            for key in ("elapsed", "log_bytes", "pending", "config", "watched", "started_on"):
                del state[key]
            found[name] = state
        else:
            found[name] = "file"
    return found


def cycle(lab: Lab, kind: str, aims: list[str], chance: random.Random) -> list[str]:
    """Kill a new run once per aim, resume it to the end, compare. The phases that were hit."""
    config, output = lab.config(kind, "killed")
    shutil.rmtree(output, ignore_errors=True)
    output.with_suffix(".txt").unlink(missing_ok=True)
    phases = [lab.kill(config, output, kind, aim, chance) for aim in aims]
    lab.finish(config, output)
    expected, found = lab.whole[kind], described(output)
    differing = [n for n in expected | found if expected.get(n) != found.get(n)]
    text = output.with_suffix(".txt").read_text()
    assert not differing, f"killed in {phases}, the resumed {kind} run differs: {differing}\n{text}"
    return [phase for phase in phases if phase]


def enough(hits: collections.Counter, kills: int) -> bool:
    least = 5 if kills >= 30 else kills // 10
    return sum(hits.values()) >= kills and all(hits[phase] >= least for phase in AIMED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--attempt", nargs=3, metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attempt:
        return attempt(*map(Path, args.attempt))
    chance, hits, begun = random.Random(args.seed), collections.Counter(), time.perf_counter()
    cycles = 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        while not enough(hits, args.kills):
            wanting = min(AIMED, key=lambda phase: hits[phase])
            aims = [chance.choice([wanting, ""]) for _ in range(1 + (cycles % 3 == 2))]
            hits.update(cycle(lab, [*RUNS][cycles % 2], aims, chance))
            cycles += 1
    for phase in PHASES:
        print(f"{phase:<11} {hits[phase]:>3}  {'#' * hits[phase]}")
    total = sum(hits.values())
    print(
        f"{total} kills in {cycles} runs, each resumed to the same weights, checkpoints and log as "
        f"a run that never stopped ({time.perf_counter() - begun:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
