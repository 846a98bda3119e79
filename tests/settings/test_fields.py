"""Every setting has an effect that is watched, and the watch fails when the setting is ignored.

The table FIELDS has an entry per field: two values, what is seen, and what the second must give.
We look where the effect is: sampled ids, gradients, weights, the log, files, the console, or what
arrives at the boundary of another library.
"""

import contextlib
import dataclasses
import functools
import importlib.machinery
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_script, make_model
from helpers import completion, make_config, make_trainer, mostly_long, read_log
from mlx.utils import tree_flatten, tree_map
from several import free_ports

from utils.rewards import servers
from utils.run import completions, trackers

grpo = load_script()
approx = pytest.approx

REWARDS = """
import asyncio, os

def vowels(completions, **_):
    texts = [c[0]["content"] for c in completions]
    return [sum(ch in "aeiou0123456789" for ch in t) / max(len(t), 1) for t in texts]

def length(completion_ids, **_):
    return [len(ids) for ids in completion_ids]

def nothing(completion_ids, **_):
    return [None] * len(completion_ids)

def where(completion_ids, log_metric, pid=0):
    log_metric("elsewhere", os.getpid() != pid)
    return length(completion_ids)

async def waits(completion_ids, **_):
    await asyncio.sleep(0.2)
    return length(completion_ids)

def odd(completions, question, **_):
    odd = [int(q.rstrip("?").split()[-1]) % 2 for q in question]
    return [x * y for x, y in zip(vowels(completions), odd)]
"""


WORLDS = """
import os, time

class Talks:
    def reset(self, **row):
        self.said = []

    def step(self, text):
        self.said.append(text)
        return "1 + 2 = 3 " * 9, False

    def get_reward(self):
        return float(sum(map(len, self.said)))

class Breaks(Talks):
    def step(self, text):
        raise OSError("broken")

class Late(Talks):
    def step(self, text):
        time.sleep(1)
        return super().step(text)
"""


def write_questions(path, count, words):
    rows = [
        {
            "question": f"{words} {'1 + ' * (n % 3)}{n}?",
            "answer": f"so\n#### {n}",
            "wording": f"Count to {n}.",
            "result": f"{n} apples",
            "difficulty": 7 * n % count,
            "importance": float(n < 3),
        }
        for n in range(count)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory):
    """Work in a folder that holds all that the table names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lab"))
        make_model(Path("model"))
        make_model(Path("other-model"), seed=1, layers=3)
        for folder, words in (("data", "How many is"), ("other-data", "What is")):
            write_questions(Path(folder, "train.jsonl"), 24 if folder == "data" else 20, words)
            write_questions(Path(folder, "test.jsonl"), 10, "Test:")
        Path("rewards.py").write_text(REWARDS)
        Path("worlds.py").write_text(WORLDS)
        Path("mood.jinja").write_text("{{ mood }}: {{ messages[0].content }} ")
        Path("tools.jinja").write_text(
            "{% for tool in tools or [] %}{{ tool.function.name }}: <tool_call>{% endfor %}"
            "{% for m in messages %}{{ m.content }} {% endfor %}{# tool_call.name #}"
        )
        trained_by_lora = {"train_type": "lora", "lora_learning_rate": 1e-2, "seed": 1}
        adapted = {**trained_by_lora, "output_dir": "adapted", "max_updates": 2}
        saved = {"output_dir": "saved", "save_steps": 2, "max_updates": 2}
        assert [console(adapted)[0], console(saved)[0]] == [0, 0]
        yield


def config_of(settings, make=make_config, **how):
    values = {"output_dir": "out", "reward_funcs": ["rewards.py:vowels"], **settings}
    return make("model", "data", values.pop("output_dir"), **how, **values)


def trainer_of(settings):
    return config_of(settings, make_trainer, reward=None)


def console(settings):
    """A whole run: its exit code, then the lines that it printed."""
    config_of(settings)  # leaves settings.toml
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        code = grpo.main(["--config", "settings.toml"])
    return [code, *printed.getvalue().splitlines()]


def waited_for(settings):
    """What rank 0 of two says when the other does not come."""
    config_of(settings)  # leaves settings.toml
    Path("hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    printed = io.StringIO()
    place = {"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}
    with mock.patch.dict(os.environ, place), contextlib.redirect_stderr(printed):
        assert grpo.main(["--config", "settings.toml"]) == 2
    return re.findall("did not come within (.*) s", printed.getvalue())


def lines(start):
    return lambda s: [line for line in console(s)[1:] if line.startswith(start)]


def files(pattern):
    """What a run leaves in its output folder."""

    def seen(settings):
        console(settings)
        return sorted(path.name for path in Path("out").glob(pattern))

    return seen


def prompts_kept(settings):
    """Update and kind of each in the store of completions."""
    console(settings)
    return [f"{group['update']} {group['kind']}" for group in completions.read(Path("out"))]


def updates_pictured(settings):
    """Of which updates trackers got distributions and a table."""
    act = functools.partial(console, settings)
    return [given[0].update for given, _ in calls(trackers.NullTracker, "show", act)]


def logged(*names, split=None):
    """From the log of a run: training records, or evaluations on a split."""

    def seen(settings):
        console(settings)
        records = [record for record in read_log("out") if record.get("split") == split]
        return [[record[name] for name in names] for record in records]

    return seen


def last(*names, steps=1):
    """Figures of the last update of so many calls of `train_step`."""

    def seen(settings):
        trainer = trainer_of(settings)
        records = [trainer.train_step([0, 1]) for _ in range(steps)]
        return [records[-1][-1].get(name) for name in names]

    return seen


def sampled(trainer):
    """Eight completions: four of each of two prompts."""
    trainer.refresh_old_policy()
    return trainer.generate_responses([0, 1])


def conversations(settings):
    """Turns and given tokens of eight completions, and how they ended."""
    completions = sampled(trainer_of(settings))
    turns = [c.conversation.turns if c.conversation else 0 for c in completions]
    given = [c.mask.count(0) for c in completions]
    return {"turns": turns, "given": given, "ends": {c.finish_reason for c in completions}}


def longest_answer(settings):
    """Most tokens that are given between two turns."""
    masks = ["".join(map(str, c.mask)) for c in sampled(trainer_of(settings))]
    return max(len(given) for mask in masks for given in mask.split("1"))


def filtered(settings):
    """Sampled ids, and whether the command says what the filter does to the gradient."""
    notes = lines("sampling ")({**settings, "max_updates": 1})
    return [[c.ids for c in sampled(trainer_of(settings))], len(notes)]


def greedy(*_):
    """Ids by arg max over a forward pass of the whole text for each token: what top_k 1 gives."""
    trainer, rows = trainer_of({}), []
    for row in trainer.train_dataset[:2]:
        ids = list(row["prompt_ids"])
        for _ in range(12):
            ids.append(mx.argmax(trainer.model(mx.array([ids]))[0, -1]).item())
        rows += [ids[-12:]] * 4
    return [rows, 1]


def tempered(settings):
    """Ids and their log-probs, and how far the learning policy and the reference are from them."""
    pairs = [[c.ids, c.logprobs] for c in sampled(trainer_of(settings))]
    return [pairs, last("sampler_mismatch", "kl")(settings)]


def tempered_by_hand(temperature):
    """Log-softmax of logits / temperature; no distance, since nothing has moved yet."""
    trainer, expected = trainer_of({"temperature": temperature}), []
    prompts = [row["prompt_ids"] for row in trainer.train_dataset[:2] for _ in range(4)]
    for prompt, said in zip(prompts, sampled(trainer), strict=True):
        ids = said.ids
        logits = np.array(trainer.model(mx.array([prompt + ids]))[0], np.float64) / temperature
        table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = table[np.arange(len(ids)) + len(prompt) - 1, ids]
        expected.append([ids, approx(chosen.tolist(), abs=1e-4)])
    return [expected, approx([0.0, 0.0], abs=1e-4)]


def timed(settings):
    """Updates of a run, and when it goes on, on a clock that moves 300 seconds at every look."""
    looks = itertools.count(step=300).__next__
    clock = types.SimpleNamespace(perf_counter=looks, time=looks)
    with mock.patch.object(grpo.ending, "time", clock):
        return [logged("update")({**settings, "resume": "auto"})[-1][0] for _ in range(2)]


def iterated(settings):
    """Updates in all; those of one rollout, and whether the ratio has left what is not clipped."""
    trainer = trainer_of(settings)
    trainer.args.clip_eps = 0.01  # refused for one update on each rollout
    records = trainer.train_step([0, 1])
    return [trainer.total_updates, *([r["update"], r["clip_high"] > 0] for r in records)]


def longest(settings):
    """Tokens of the longest completion, and of its prefix."""
    trainer = trainer_of(settings)
    return [max(len(c.ids) for c in sampled(trainer)), trainer.rewards.prefix_tokens]


def seeded(settings):
    trainer = trainer_of(settings)
    seen = {
        "order": [row for n in range(12) for row in trainer.prompts_of_update(n)],
        "ids": [c.ids for c in sampled(trainer)],
        "adapters": [
            x.sum().item() for _, x in tree_flatten(trainer.optimizer.masters(trainer.model))
        ],
        "evaluation": trainer.evaluate_em(trainer.train_dataset, 4, temperature=1.0),
    }
    trainer.train_step([0, 1])
    seen["dropout"] = mx.random.state[0].tolist()
    console({**settings, "max_updates": 1})
    return {**seen, "record": json.loads(Path("out/provenance.json").read_text())["seed"]}


def stopping(settings):
    texts = [c.text for c in sampled(trainer_of(settings))]
    console({**settings, "max_updates": 1})
    final = json.loads(Path("out/final/generation_config.json").read_text())
    return {"texts": texts, "final": final.get("stop_strings", [])}


def stops_at(stops):
    def check(_, b):
        ended = sum(text[-1] in stops for text in b["texts"])
        past = any(stop in text[:-1] for stop in stops for text in b["texts"])
        return ended > 2 and not past and b["final"] == stops

    return check


def embedding(settings):
    return grpo.load_model(config_of(settings)).model.model.embed_tokens.weight[5].tolist()


def saved_embedding(*_):
    return mx.load("other-model/model.safetensors")["model.embed_tokens.weight"][5].tolist()


def masters(settings):
    trainer = trainer_of(settings)
    return tree_flatten(trainer.optimizer.masters(trainer.model))


def adapters(settings):
    return {name: x.sum().item() for name, x in masters(settings)}


def saved_adapters(*_):
    saved = mx.load("adapted/final/adapters/adapters.safetensors")
    return {name: x.sum().item() for name, x in saved.items()}


def dtypes(settings):
    parameters = grpo.load_model(config_of(settings)).model.parameters()
    return {str(x.dtype) for _, x in tree_flatten(parameters)}


def trained(settings):
    """The shapes of what is trained, by name."""
    return {name: x.shape for name, x in masters(settings)}


def adapted(settings):
    """The same, and the adapters that mlx-lm makes of the files of a run."""
    import mlx_lm

    console({**settings, "max_updates": 1})
    files = Path("out/final/adapters")
    folder = {"adapter_path": str(files)} if files.exists() else {}
    parameters = tree_flatten(mlx_lm.load("model", **folder)[0].parameters())
    saved = {name: x.shape for name, x in parameters if "lora_" in name}
    return {"trained": trained(settings), "saved": saved}


def all_adapters(holds):
    """Whether it holds for name and shape of each, and there are as many saved as trained."""

    def check(_, b):
        every = [*b["trained"].items(), *b["saved"].items()]
        return b["trained"] == b["saved"] != {} and all(holds(*each) for each in every)

    return check


def movement(settings):
    """How far the first update moves a weight at most: with Adam, by the learning rate."""
    trainer = trainer_of(settings)
    before = trainer.optimizer.masters(trainer.model)
    trainer.train_step([0, 1])
    moved = tree_map(
        lambda a, b: mx.abs(a - b).max().item(), before, trainer.optimizer.masters(trainer.model)
    )
    return max(distance for _, distance in tree_flatten(moved))


def rates(settings):
    """The optimizer's learning rate at each of five updates."""
    trainer = trainer_of({**settings, "max_updates": 5})
    zeros, seen = tree_map(mx.zeros_like, trainer.optimizer.masters(trainer.model)), []
    for number in range(1, trainer.total_updates + 1):
        trainer.apply_gradients(0.0, zeros, number)
        seen.append(trainer.optimizer.learning_rate)
    return seen


def optimizer_state(settings):
    """The kinds of arrays that the optimizer keeps, and their size."""
    trainer = trainer_of(settings)
    state = {k: x for k, x in trainer.optimizer.arrays().items() if k != "steps"}
    kinds = {name.rpartition(".")[2] for name in state}
    return {"kinds": kinds, "bytes": sum(x.nbytes for x in state.values())}


GRADIENTS = (0.3, -0.1)


def stepped(settings):
    """A weight that starts at 1, after updates in which each gradient is the same everywhere."""
    trainer = trainer_of(settings)
    for update, number in enumerate(GRADIENTS, start=1):
        gradient = tree_map(
            functools.partial(mx.full_like, vals=number), trainer.optimizer.masters(trainer.model)
        )
        trainer.apply_gradients(0.0, gradient, update)
    return trainer.model.model.norm.weight[0].item()


def adamw(beta1=0.9, beta2=0.999, decay=0.0, norm=1e6):
    """The same by hand."""

    def by_hand(*_):
        size = sum(math.prod(shape) for shape in trained({}).values())
        weight, m, v = 1.0, 0.0, 0.0
        for step, number in enumerate(GRADIENTS, start=1):
            clipped = number * min(1.0, norm / (abs(number) * math.sqrt(size)))
            m = beta1 * m + (1 - beta1) * clipped
            v = beta2 * v + (1 - beta2) * clipped**2
            mean, square = m / (1 - beta1**step), v / (1 - beta2**step)
            weight = weight * (1 - 0.1 * decay) - 0.1 * mean / (math.sqrt(square) + 1e-8)
        return approx(weight, rel=1e-4)

    return by_hand


def questions(split, name="question"):
    return lambda s: [row[name] for row in grpo.load_questions(config_of(s), split)]


def column(path, name="question", count=None):
    """What a data file holds."""
    return lambda *_: [json.loads(x)[name] for x in Path(path).read_text().splitlines()][:count]


def by(name):
    """A column of the training data, and the questions."""
    return column("data/train.jsonl", name)(), column("data/train.jsonl")()


def used(settings):
    return [row["question"] for row in trainer_of(settings).train_dataset]


def asked(settings):
    """The questions of an epoch, in order."""
    trainer = trainer_of(settings)
    rows = trainer.train_dataset
    return [rows[i]["question"] for n in range(12) for i in trainer.prompts_of_update(n)]


def mixed(settings):
    """Where the questions of an epoch are from: how many of each, and which."""
    trainer = trainer_of(settings)
    rows = trainer.train_dataset
    sources = [rows[i].get("data_source") for i in trainer.order(0)]
    return {"counts": {name: sources.count(name) for name in {*sources}}, "asked": asked(settings)}


def prompts(settings):
    return [row["prompt_ids"] for row in trainer_of(settings).train_dataset]


def prompt(settings):
    trainer = trainer_of(settings)
    return trainer.tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])


def chat(question, before="", prefix="<reasoning>\n"):
    return f"{before}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{prefix}"


def prefixed(settings):
    trainer = trainer_of(settings)
    texts = [c.text[:3] for c in sampled(trainer)]
    return {"prompt": prompt(settings), "texts": texts, "length": trainer.rewards.prefix_tokens}


def rewards(settings):
    """Total and values per function of a perfect completion to the question with answer 0."""
    trainer = trainer_of(settings)
    text = "<reasoning>\nso\n</reasoning>\n<answer>\n0\n</answer>"
    response = completion([5], [0.0], text=text)
    totals, values = trainer.compute_rewards(trainer.train_dataset[:1], [response])
    return [totals.tolist(), {name: value.tolist() for name, value in values.items()}]


def prompts_and_batches(settings):
    """Prompts and batches of an update, and updates in all."""
    trainer = trainer_of(settings)
    rows = trainer.prompts_of_update(0)
    trainer.train_step(rows)
    return [len(rows), trainer.step, trainer.total_updates]


def gradient_away_from(distance, trainer, advantages):
    """The largest number of the gradient where every log-ratio is so much."""
    prompts = [trainer.train_dataset[i]["prompt_ids"] for i in [0] * 4 + [1] * 4]
    parts = prompts, sampled(trainer), advantages, np.ones(8), range(8), trainer.memory.plan
    [batch] = trainer.scorer.micro_batches(*parts)
    old = trainer.compute_grpo_loss(batch)[2] - distance
    batch = dataclasses.replace(batch, old_logprobs=old, sampler_logprobs=old)
    gradient = trainer.loss_and_grad(batch)[1]
    return max(mx.abs(g).max().item() for _, g in tree_flatten(gradient))


def clipping(settings):
    """Clipped share in a second update, and the gradient where every ratio is exp(0.1), A > 0."""
    trainer = trainer_of({**settings, "num_iterations": 2})
    second = trainer.train_step([0, 1])[1]
    largest = gradient_away_from(0.1, trainer, np.ones(8))
    return {"share": second["clip_low"] + second["clip_high"], "gradient": largest}


def two_sided(settings):
    """The gradient where every ratio is exp(2) and A < 0."""
    return gradient_away_from(2, trainer_of(settings), -np.ones(8))


def estimated(settings):
    """Rewards, advantages, lengths, KL penalty (each per completion) of one update."""
    trainer = trainer_of(settings)
    with mock.patch.object(grpo, "rollout_metrics", wraps=grpo.rollout_metrics) as log:
        [[[scores, _, penalty, _], _]] = calls(
            grpo, "estimate_advantages", lambda: trainer.train_step([0, 1])
        )
    advantages = log.call_args.args[1]
    penalty = np.zeros((2, 4)) + penalty
    parts = (scores.rewards, advantages, scores.lengths, penalty)
    return [part.reshape(-1).tolist() for part in parts]


def by_hand(formula):
    """Advantages are what `formula` makes of the (P, G) rewards, lengths and KL penalty."""

    def check(_, b):
        rewards, advantages, lengths, penalty = (np.array(x).reshape(2, 4) for x in b)
        return advantages == approx(formula(rewards, lengths, penalty), abs=1e-6)

    return check


def centre(rewards):
    return rewards - rewards.mean(axis=1, keepdims=True)


def z_score(rewards, eps=1e-4):
    return centre(rewards) / (rewards.std(axis=1, ddof=1, keepdims=True) + eps)


def gradients_of(settings):
    """(batch, log-probs) of the last gradient of an update, and the record of that update."""
    trainer, seen = trainer_of(settings), []

    def spy(batch, inner=trainer.loss_and_grad):
        result = inner(batch)
        seen.append((as_numpy(batch), result[0][2]))
        return result

    trainer.loss_and_grad = spy
    record = trainer.train_step([0, 1])[-1]
    return [batch for batch, _ in seen], seen, record


def as_numpy(batch):
    """As it is now."""
    arrays = {n: np.array(x) for n, x in vars(batch).items() if isinstance(x, mx.array)}
    return dataclasses.replace(batch, **arrays)


def ratios(settings):
    """What the second update says of policy_reward, and what it is by token and by sequence."""
    batches, seen, record = gradients_of({**settings, "num_iterations": 2})
    batch, logprobs = batches[-1], np.array(seen[-1][1])
    mask, advantages = batch.mask, batch.advantages[:, None]
    moved = (logprobs - batch.old_logprobs) * mask
    mean = moved.sum(1, keepdims=True) / mask.sum(1, keepdims=True)
    by = [(np.exp(x) * advantages * mask).sum() / mask.sum() for x in (moved, mean)]
    return [record["policy_reward"], *map(float, by)]


def estimates(settings):
    """The KL in the log, and k1, k2, k3 by hand."""
    batches, seen, record = gradients_of({**settings, "quantize_for_rollouts": True})
    batch, mask = batches[0], batches[0].mask
    x = np.array(seen[0][1]) - batch.ref_logprobs
    by_hand = (x, x**2 / 2, np.minimum(np.exp(-x) - 1 + x, 10))
    return [record["kl"], *(float((k * mask).sum() / mask.sum()) for k in by_hand)]


def penalised(settings):
    """Sum over tokens of k3 by hand is what the reward of each completion loses, times kl_coeff."""
    return estimated({**settings, "quantize_for_rollouts": True})


def coefficient(settings):
    """kl_coeff after an update that was far from its target."""
    trainer = trainer_of({**settings, "quantize_for_rollouts": True, "kl_coeff": 0.1})
    trainer.train_step([0, 1])
    return trainer.run.state.kl_coeff


def moved_reference(settings):
    """How far the reference went of the way that the policy went in one update."""
    trainer = trainer_of({**settings, "kl_coeff": 0.1})
    start = np.array(trainer.model.model.norm.weight)
    trainer.train_step([0, 1])
    policy, reference = (
        np.array(m.model.norm.weight) - start for m in (trainer.model, trainer.ref_model)
    )
    return float(np.abs(reference).sum() / np.abs(policy).sum())


def selected(settings):
    """Share of the update's tokens with a policy gradient."""
    batches, _, _ = gradients_of(settings)
    masks = [batch.mask for batch in batches]
    kept = [batch.trained for batch in batches]
    return float(sum(k.sum() for k in kept) / sum(m.sum() for m in masks))


def finished(settings):
    """Sequences in the gradient, and completions that ended by themselves."""
    ended = sum(c.finish_reason == "stop" for c in sampled(trainer_of(settings)))
    return [sum(size for size, _ in shapes(settings)), ended]


def calls(owner, name, act, answer=None):
    """What arrives at a function of another library while `act` runs."""
    with mock.patch.object(owner, name, side_effect=answer or getattr(owner, name)) as spy:
        act()
    return [[call.args, call.kwargs] for call in spy.call_args_list]


def evaluated(settings):
    """Questions of each evaluation, and the scores of the fused adapters and of the others."""
    fused = [re.findall(r"\d\.\d+", line) for line in lines("fused")(settings)]
    return [[r["em_subset"] for r in read_log("out") if r.get("split") == "test"], fused]


def hub_requests(settings):
    import datasets

    row, config = {"question": "1?", "answer": "1"}, config_of(settings)
    read = functools.partial(grpo.load_questions, config, "train")
    return calls(datasets, "load_dataset", read, lambda *_, **__: [row])


def trusted(settings):
    import mlx_lm

    [[_, given]] = calls(mlx_lm, "load", lambda: grpo.load_model(config_of(settings)))
    return [given["trust_remote_code"], given["tokenizer_config"]["trust_remote_code"]]


def limits(name):
    return lambda s: calls(mx, name, lambda: trainer_of(s), lambda _: 0)


def recomputed(settings):
    """Layers that a gradient recomputes, for prompts and for completions."""
    trainer = trainer_of(settings)
    trainer.train_step([0, 1])  # the first one checks how to score
    return len(calls(mx, "checkpoint", lambda: trainer.train_step([0, 1])))


def compiled(settings):
    """Steps that are compiled (the optimizer's; the gradient's with weights in and out), and the
    remainder of lengths by 32."""
    trainer_of({})  # importing a model's code compiles parts of it
    given = calls(mx, "compile", lambda: trainer_of(settings))
    steps = ["outputs" in arguments for _, arguments in given if "inputs" in arguments]
    return [steps, {tokens % 32 for _, tokens in shapes(settings)}]


def shapes(settings):
    """Completions of each micro-batch that a gradient is taken of, and the tokens that it reads."""
    trainer = trainer_of(settings)
    trainer.loss_and_grad = mock.Mock(side_effect=trainer.loss_and_grad)
    trainer.train_step([0, 1])
    batches = [call.args[0] for call in trainer.loss_and_grad.call_args_list]
    rows = [batch.layout.shared.rows for batch in batches]
    read = [
        batch.layout.shared.prompts.size + len(r) * (r.shape[1] - 1)
        for batch, r in zip(batches, rows, strict=True)
    ]
    return list(zip([len(batch.tokens) for batch in batches], read, strict=True))


def rollout_sizes(settings):
    given = calls(grpo, "sample_batch", lambda: sampled(trainer_of(settings)))
    return [arguments[-1].places for arguments, _ in given]


def asked_servers(settings):
    """The URLs that are sent completions, by a server that is not there."""

    async def answer(_, body):
        rewards = {"rewards": [*range(len(body["query"]))]}
        return types.SimpleNamespace(status_code=200, text="", json=lambda: rewards), ""

    step = functools.partial(trainer_of(settings).train_step, [0])
    return sorted(given[0] for given, _ in calls(servers.Endpoint, "ask", step, answer))


def tracked_as(what, settings):
    """What W&B is told of a run."""
    wandb = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec("wandb", None, origin="here"))
    wandb.init.return_value.configure_mock(id="abc", starting_step=0)
    with mock.patch.dict(sys.modules, wandb=wandb):
        console({**settings, "report_to": ["wandb"], "max_updates": 1})
    return wandb.init.call_args.kwargs.get(what)


def second_run(settings):
    """The exit code in a folder that holds a run, and what is left of that run."""
    old = {
        "training_log.jsonl": '{"update": 1}',
        "metrics.csv": "update,batch_step",
        "metrics_eval.csv": "update,batch_step,split",
        "checkpoint-77/trainer_state.safetensors": "old",
        "final/run.json": '{"updates": 1, "of": 9}',
        "tensorboard/.mlx-grpo": "",
        "tensorboard/events.out.tfevents.1": "old",
        "config.resolved.json": json.dumps({**vars(config_of(settings)), "seed": 77}, default=list),
    }
    for name, text in old.items():
        path = Path("out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = console(settings)[0]
    paths = {Path("out", name): text for name, text in old.items()}
    left = [p.name for p, text in paths.items() if p.exists() and p.read_text() == text]
    return {"code": code, "left": left}


def resumed(settings):
    """Exit code, what is said and the updates in the log, in the folder of a run that was cut."""
    shutil.copytree("saved", "out", ignore=shutil.ignore_patterns("final", "checkpoint-4"))
    code, *printed = console(settings)
    said = [line for line in printed if line.startswith("resume ")]
    return [code, said, [record["update"] for record in read_log("out")]]


def homes(settings):
    console(settings)
    return [name for name in ("out", "elsewhere") if Path(name, "final").is_dir()]


@dataclasses.dataclass
class Watch:
    """Settings with `a` and with `b` show different things in `seen`; with b what is `expected`:

    a value, a function that makes it by hand, or a check; the functions take what a and b gave.
    """

    a: Any
    b: Any
    seen: Callable[[dict[str, Any]], Any]
    expected: Any
    also: dict[str, Any] = dataclasses.field(default_factory=dict)


STOPS = [*"0123456789", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]  # ends random texts here and there
LORA = {"train_type": "lora"}
CALM = {"chat_template": "mood.jinja"}
CALLS = {"chat_template": "tools.jinja", "max_updates": 1}
ONE = {"max_updates": 1}
HERE = {"rewards.py:where": {"pid": os.getpid()}}
STEPPING = {"max_grad_norm": 1e6, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
SHORT = {"eval_max_new_tokens": 1, "max_updates": 4}
LENGTH = {"reward_funcs": ["rewards.py:length"], "eval_samples": 2, "max_updates": 1}

TALKS = {"environment": "worlds.py:Talks", "stop_strings": STOPS, "max_new_tokens": 60}

CENTRED = {"advantage_estimator": "dr_grpo"}

FIELDS = {
    "model_name": Watch("model", "other-model", embedding, saved_embedding),
    "output_dir": Watch("out", "elsewhere", homes, ["elsewhere"], ONE),
    "run_name": Watch("one", "two", functools.partial(tracked_as, "name"), "two"),
    "wandb_project": Watch("", "sums", functools.partial(tracked_as, "project"), "sums"),
    "wandb_entity": Watch("", "ann", functools.partial(tracked_as, "entity"), "ann"),
    "seed": Watch(
        0,
        1,
        seeded,
        lambda _, b: sorted(b["order"]) == [*range(24)] and b["record"] == 1,
        {**LORA, "eval_metric": "rewards.py:vowels"},
    ),
    "dtype": Watch("auto", "float16", dtypes, {"mlx.core.float16"}),
    "trust_remote_code": Watch(False, True, trusted, [True, True]),
    "train_type": Watch("full", "lora", adapted, all_adapters(lambda name, _: "lora_" in name)),
    "lora_rank": Watch(16, 4, adapted, all_adapters(lambda _, shape: 4 in shape), LORA),
    "lora_scale": Watch(
        2.0, 4.0, last("grad_norm"), lambda a, _: [approx(2 * a[0], rel=1e-3)], LORA
    ),  # the second matrix starts at 0: its gradient is in proportion
    "lora_layers": Watch(-1, 1, adapted, all_adapters(lambda name, _: "layers.1." in name), LORA),
    "lora_keys": Watch(
        [], ["self_attn.q_proj"], adapted, all_adapters(lambda name, _: "q_proj" in name), LORA
    ),
    "lora_dropout": Watch(
        0.0, 0.5, last("entropy", "grad_norm"), lambda a, b: a[0] == b[0], LORA
    ),  # the rollouts are without it
    "lora_learning_rate": Watch(2e-5, 3e-3, movement, approx(3e-3, rel=1e-2), LORA),
    "lora_plus_ratio": Watch(
        1.0, 16.0, movement, approx(16 * 3e-3, rel=1e-2), {**LORA, "lora_learning_rate": 3e-3}
    ),  # the first of two matrices has no gradient in the first update
    "adapter_path": Watch("", "adapted/final/adapters", adapters, saved_adapters),
    "dataset": Watch("data", "other-data", questions("train"), column("other-data/train.jsonl")),
    "dataset_config": Watch(
        "main",
        "socratic",
        hub_requests,
        [[("owner/name", "socratic"), {"split": "train"}]],
        {"dataset": "owner/name"},
    ),
    "train_split": Watch("train", "test", questions("train"), column("data/test.jsonl")),
    "test_split": Watch("test", "train", questions("test"), column("data/train.jsonl")),
    "question_column": Watch("question", "wording", prompt, chat("Count to 0.")),
    "answer_column": Watch(
        "answer", "result", questions("train", "answer"), column("data/train.jsonl", "result")
    ),
    "max_train_samples": Watch(0, 5, used, column("data/train.jsonl", count=5)),
    "dataset_mix": Watch(
        [],
        [{"dataset": "data", "weight": 1, "samples": 5}, {"dataset": "other-data", "weight": 4.0}],
        mixed,
        lambda _, b: b["counts"] == {"data": 5, "other-data": 20},
    ),
    "shuffle": Watch(True, False, asked, column("data/train.jsonl")),
    "curriculum": Watch(
        "none",
        "easy_to_hard",
        asked,
        lambda *_: [x for _, x in sorted(zip(*by("difficulty"), strict=True))],
    ),
    "curriculum_column": Watch(
        "difficulty",
        "importance",
        asked,
        lambda _, b: sorted(b) == sorted(8 * by("importance")[1][:3]),
        {"curriculum": "weights"},
    ),
    "system_prompt": Watch(
        "", "Be brief.", prompt, chat("How many is 0?", "<|im_start|>system\nBe brief.<|im_end|>\n")
    ),
    "reasoning_prefix": Watch(
        "<reasoning>\n",
        "So ",
        prefixed,
        {"prompt": chat("How many is 0?", prefix="So "), "texts": ["So "] * 8, "length": 3},
    ),
    "chat_template": Watch("", "plain", prompt, "How many is 0?\n\n<reasoning>\n"),
    "chat_template_kwargs": Watch(
        {}, {"mood": "calm"}, prompt, "calm: How many is 0? <reasoning>\n", CALM
    ),
    "max_prompt_length": Watch(512, 32, prompts, lambda a, _: [p for p in a if len(p) <= 32]),
    "reward_funcs": Watch(
        ["correctness", "int"],
        ["int", "strict_format"],
        rewards,
        [[1.0], {"int": [0.5], "strict_format": [0.5]}],
    ),
    "reward_weights": Watch(
        [], [3.0, 10.0], lambda s: rewards(s)[0], [21.5], {"reward_funcs": ["int", "correctness"]}
    ),
    "reward_kwargs": Watch(
        {},
        {"length": {"target": 0, "penalty": -6.0}},
        lambda s: rewards(s)[0],
        [-0.5],
        {"reward_funcs": ["length"]},
    ),  # of one token among twelve
    "reward_timeout": Watch(
        180.0,
        0.01,
        lambda s: console({**s, "max_updates": 1})[0],
        1,
        {"reward_funcs": ["rewards.py:waits"]},
    ),
    "reward_workers": Watch(
        0,
        2,
        lambda s: [metric > 0 for (metric,) in logged("metric/elsewhere")(s)],
        [True],
        {"reward_funcs": ["rewards.py:where"], "reward_kwargs": HERE, **ONE},
    ),
    "environment": Watch(
        "",
        "worlds.py:Talks",
        conversations,
        lambda _, b: (
            max(b["turns"]) > 1 and max(b["given"]) > 20 and "environment" not in b["ends"]
        ),
        {"stop_strings": STOPS, "max_new_tokens": 60},
    ),
    "tools": Watch(
        [],
        ["calculator"],
        prompt,
        "calculator: <tool_call>How many is 0? <reasoning>\n",
        CALLS,
    ),
    "max_turns": Watch(
        8, 2, conversations, lambda a, b: max(a["turns"]) > max(b["turns"]) == 2, TALKS
    ),
    "max_tool_tokens": Watch(
        256, 10, longest_answer, lambda a, b: a - b > 50 and 10 < b < 40, TALKS
    ),
    "environment_timeout": Watch(
        60.0,
        0.2,
        lambda s: conversations(s)["ends"],
        {"environment"},
        {**TALKS, "environment": "worlds.py:Late", "max_turns": 2},
    ),
    "on_environment_error": Watch(
        "mask",
        "stop",
        lambda s: console({**s, "max_updates": 1})[0],
        1,
        {**TALKS, "environment": "worlds.py:Breaks"},
    ),
    "remote_rm_url": Watch(
        ["http://a.test/"],
        ["http://b.test/rm", "http://c.test/"],
        asked_servers,
        ["http://b.test/rm", "http://c.test/"],
        {"reward_funcs": ["remote_rm"]},
    ),
    "reward_model": Watch(
        "model",
        "other-model",
        lambda s: rewards(s)[0],
        lambda a, b: 0 < a[0] < 1 and 0 < b[0] < 1,
        {"reward_funcs": ["reward_model"], "reward_kwargs": {"reward_model": {"yes": "1"}}},
    ),
    "num_generations": Watch(4, 3, lambda s: sum(size for size, _ in shapes(s)), 6),
    "batch_size": Watch(1, 2, prompts_and_batches, [4, 2, 6]),
    "gradient_accumulation_steps": Watch(2, 4, prompts_and_batches, [4, 4, 6]),
    "num_epochs": Watch(1, 2, logged("update"), [[1], [2]], {"max_train_samples": 2}),
    "max_updates": Watch(
        0, 2, logged("update", "lr"), [[1, 1e-3], [2, 5e-4]], {"max_train_samples": 6}
    ),
    "max_hours": Watch(0.0, 0.5, timed, lambda _, b: 0 < b[0] < b[1], {"max_updates": 6}),
    "rank_timeout": Watch(0.5, 0.2, waited_for, ["0.2"]),
    "num_iterations": Watch(1, 2, iterated, [24, [1, False], [2, True]]),
    "sync_every_updates": Watch(
        1, 2, last("sampler_mismatch", steps=2), lambda a, b: a[0] < 1e-4 < 1e-2 < b[0]
    ),
    "quantize_for_rollouts": Watch(
        False,
        True,
        last("sampler_mismatch", "kl"),
        lambda a, b: max(a) < 1e-4 < 1e-2 < min(b),
        {"kl_coeff": 0.1},
    ),
    "temperature": Watch(1.0, 2.0, tempered, lambda *_: tempered_by_hand(2.0), {"kl_coeff": 0.1}),
    "top_k": Watch(0, 1, filtered, greedy),
    "top_p": Watch(1.0, 1e-6, filtered, greedy),
    "min_p": Watch(0.0, 1.0, filtered, greedy),
    "max_new_tokens": Watch(12, 5, lambda s: longest(s)[0], 5),
    "max_completion_length": Watch(1024, 10, longest, lambda _, b: sum(b) == 10),
    "stop_strings": Watch([], STOPS, stopping, stops_at(STOPS)),
    "loss_type": Watch(
        "grpo",
        "dapo",
        last("loss", "policy_reward", "grad_norm"),
        lambda _, b: b[0] == approx(-b[1], rel=1e-3) and abs(b[0]) > 1e-3,
        {"stop_strings": STOPS},
    ),  # both are means over tokens; grpo's loss is 0 in value
    "clip_eps": Watch(
        *(0.2, 0.05, clipping),
        lambda a, b: a["gradient"] > 1e-3 > b["gradient"] == 0,
        {"num_iterations": 2},
    ),
    "importance_sampling_level": Watch(
        "auto", "sequence", ratios, lambda a, b: b[0] == approx(b[2]) and a[0] == approx(a[1])
    ),
    "clip_eps_high": Watch(
        0.0,
        0.5,
        clipping,
        lambda a, b: b["gradient"] > 1e-3 > a["gradient"] == 0,
        {"clip_eps": 0.05, "num_iterations": 2},
    ),
    "delta": Watch(0.0, 3.0, two_sided, lambda a, b: a > 1e-3 > b == 0, {"num_iterations": 2}),
    "entropy_coeff": Watch(
        0.0,
        0.5,
        last("loss", "policy_entropy"),
        lambda a, b: a[1] is None and a[0] - b[0] == approx(0.5 * b[1], rel=1e-4) and b[1] > 1,
    ),
    "top_entropy_quantile": Watch(1.0, 0.25, selected, approx(0.25, abs=0.02)),
    "mask_truncated_completions": Watch(
        False,
        True,
        finished,
        lambda a, b: b[0] == b[1] < a[0] == 8,
        {"stop_strings": STOPS, "kl_coeff": 0.1},
    ),  # with a KL penalty every sequence would have a gradient
    "advantage_estimator": Watch(
        "group_norm", "rloo", estimated, by_hand(lambda r, *_: centre(r) * 4 / 3)
    ),
    "advantage_eps": Watch(1e-4, 1.0, estimated, by_hand(lambda r, *_: z_score(r, 1.0))),
    "advantages_norm": Watch(
        False, True, estimated, by_hand(lambda r, *_: z_score(r) / z_score(r).std())
    ),  # all of them have the same length
    "advantage_clip": Watch(
        0.0, 0.5, estimated, by_hand(lambda r, *_: np.clip(z_score(r), -0.5, 0.5))
    ),
    "reward_running_norm": Watch(
        False, True, estimated, by_hand(lambda r, *_: centre(r) / r.std(ddof=1)), CENTRED
    ),
    "reward_running_norm_minus_mean": Watch(
        False,
        True,
        estimated,
        by_hand(lambda r, *_: centre(np.clip((r - r.mean()) / r.std(ddof=1), -1, 1))),
        {**CENTRED, "reward_running_norm": True, "reward_clip": 1.0},
    ),
    "reward_clip": Watch(
        0.0, 0.2, estimated, by_hand(lambda r, *_: centre(np.clip(r, -0.2, 0.2))), CENTRED
    ),
    "dynamic_sampling": Watch(
        0,
        9,
        last("resampled_prompts", "groups_without_signal"),
        lambda a, b: a == [None, 0.5] and b[0] >= 1 and b[1] == 0,
        {"reward_funcs": ["rewards.py:odd"]},
    ),  # every second question is worth nothing, whatever the answer
    "kl_estimator": Watch(
        "k3",
        "k2",
        estimates,
        lambda a, b: b[0] == approx(b[2], rel=1e-4) and a[0] == approx(a[3], rel=1e-4),
        {"kl_coeff": 0.1},
    ),
    "kl_placement": Watch(
        "loss",
        "reward",
        penalised,
        lambda a, b: by_hand(lambda r, _, p: z_score(r - p))(a, b) and min(b[3]) > 0.01,
        {"kl_coeff": 0.1},
    ),
    "kl_bias_correction": Watch(
        False,
        True,
        last("kl", "grad_norm"),
        lambda a, b: a[0] == b[0] > 0.01,
        {"kl_coeff": 1.0, "quantize_for_rollouts": True},
    ),  # with the ratio at 1 the value is the same, the gradient is not
    "kl_target": Watch(0.0, 1e-3, coefficient, approx(0.1 * (1 + 0.2 * 8 / 10000), rel=1e-6)),
    "kl_horizon": Watch(
        10000, 16, coefficient, approx(0.1 * (1 + 0.2 * 8 / 16)), {"kl_target": 1e-3}
    ),
    "ref_sync_updates": Watch(0, 1, moved_reference, approx(0.6, rel=1e-3)),
    "ref_sync_alpha": Watch(
        0.6, 0.25, moved_reference, approx(0.25, rel=1e-3), {"ref_sync_updates": 1}
    ),
    "importance_mode": Watch(
        "token_truncate",
        "token_mask",
        last("importance_weight", "importance_capped"),
        [0.0, 1.0],
        {"quantize_for_rollouts": True, "importance_cap": 1e-6},
    ),
    "importance_floor": Watch(
        0.0, 2.0, last("importance_weight"), approx([2.0]), {"quantize_for_rollouts": True}
    ),
    "kl_coeff": Watch(
        0.0,
        0.5,
        last("loss", "kl"),
        lambda a, b: a[1] is None and b[0] - a[0] == approx(0.5 * b[1], rel=1e-2) and b[1] > 0.1,
        {"num_iterations": 2, "loss_type": "dapo"},
    ),  # in value, both parts of the loss are means over tokens
    "importance_cap": Watch(
        2.0,
        1e-6,
        last("importance_weight", "importance_capped"),
        approx([1e-6, 1.0]),
        {"quantize_for_rollouts": True},
    ),
    "learning_rate": Watch(1e-3, 3e-3, movement, approx(3e-3, rel=1e-2)),
    "lr_scheduler_type": Watch("cosine", "linear", rates, approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])),
    "warmup_ratio": Watch(0.1, 0.6, rates, approx([1e-3 / 3, 2e-3 / 3, 1e-3, 7.5e-4, 2.5e-4])),
    "adam_beta1": Watch(0.9, 0.5, stepped, adamw(beta1=0.5), STEPPING),
    "adam_beta2": Watch(0.999, 0.9, stepped, adamw(beta2=0.9), STEPPING),
    "weight_decay": Watch(0.0, 0.1, stepped, adamw(decay=0.1), STEPPING),
    "max_grad_norm": Watch(1e6, 50.0, stepped, adamw(norm=50.0), STEPPING),
    "master_weights": Watch(
        True,
        False,
        optimizer_state,
        lambda a, b: "low" in a["kinds"] and b["kinds"] == {"m", "v"},
        {"dtype": "bfloat16"},
    ),
    "moment_bits": Watch(
        32,
        8,
        optimizer_state,
        lambda a, b: b["kinds"] - a["kinds"] == {"m_scale", "v_scale"},
    ),
    "eval_steps": Watch(
        0,
        4,
        logged("batch_step", split="test"),
        [[0], [4], [8]],
        {**SHORT, "eval_samples": 1},
    ),
    "eval_samples": Watch(
        0,
        3,
        evaluated,
        lambda _, b: b[0] == [3, 3] and b[1][0][0] == b[1][0][1],
        {**SHORT, **LORA, "eval_metric": "rewards.py:vowels"},
    ),
    "eval_every_updates": Watch(
        0, 2, logged("update", split="train"), [[2], [4]], {**SHORT, "eval_subset_size": 1}
    ),
    "eval_subset_size": Watch(
        0, 3, logged("em_subset", split="train"), [[3], [3]], {**SHORT, "eval_every_updates": 2}
    ),
    "eval_max_new_tokens": Watch(
        12,
        5,
        logged("em", split="test"),
        [[5.0], [5.0]],
        {**LENGTH, "eval_metric": "rewards.py:length"},
    ),
    "eval_metric": Watch(
        "em",
        "rewards.py:length",
        lines("result"),
        ["result    rewards.py:length 5.000 -> 5.000 after 1 update"],
        {**LENGTH, "eval_max_new_tokens": 5},
    ),
    "logging_steps": Watch(
        1,
        4,
        logged("batch_step", "reward_mean"),
        lambda a, _: [[4, mean_of(a[0], a[1])], [8, mean_of(a[2], a[3])]],
        {"max_updates": 4},
    ),
    "log_jsonl": Watch(True, False, files("*.jsonl"), [], ONE),
    "log_completions": Watch(0, 3, lambda s: len(lines("--- reward")(s)), 3, ONE),
    "plot_every": Watch(10, 2, updates_pictured, [2], {"max_updates": 3}),
    "keep_completions": Watch(
        "all", "sample:1", prompts_kept, ["0 eval", "1 train", "1 eval"], ONE | {"eval_samples": 4}
    ),
    "max_completions_gb": Watch(
        0.5, 1e-9, prompts_kept, ["2 train", "2 train"], {"max_updates": 2}
    ),
    "quiet": Watch(False, True, lines("plan"), [], ONE),
    "report": Watch(True, False, files("*.html"), [], ONE),
    "closing_note": Watch("", "Well done.", lines("note"), ["note      Well done."], ONE),
    "report_to": Watch([], ["csv"], files("*.csv"), ["metrics.csv"], ONE),
    "save_steps": Watch(
        0, 4, files("checkpoint-*"), ["checkpoint-4", "checkpoint-8"], {"max_updates": 4}
    ),
    "save_total_limit": Watch(
        3, 1, files("checkpoint-*"), ["checkpoint-6"], {"save_steps": 2, "max_updates": 3}
    ),
    "max_ckpt_gb": Watch(
        0.0, 1e-6, files("checkpoint-*"), ["checkpoint-6"], {"save_steps": 2, "max_updates": 3}
    ),
    "save_best": Watch(
        False,
        True,
        files("best"),
        ["best"],
        {
            **{"eval_metric": "rewards.py:vowels", "eval_samples": 10, "eval_steps": 2},
            **{"max_updates": 6, "learning_rate": 0.01, "eval_max_new_tokens": 12},
        },
    ),
    "early_stopping_patience": Watch(
        0,
        1,
        logged("update"),
        [[1]],
        {"max_updates": 3, "eval_samples": 2, "eval_steps": 2, "eval_max_new_tokens": 2},
    ),
    "watchdog_window": Watch(
        0,
        2,
        lines("warning"),
        lambda _, b: [line.split()[2] for line in b] == ["2:", "4:"] and "max_new_tokens" in b[0],
        {"max_updates": 5, "max_new_tokens": 2},
    ),
    "stop_without_reward": Watch(
        False,
        True,
        logged("update"),
        lambda a, b: len(a) == 6 and len(b) == 5,
        {"max_updates": 6, "reward_funcs": ["rewards.py:nothing"], "max_new_tokens": 2},
    ),
    "resume": Watch(
        "",
        "auto",
        resumed,
        [0, ["resume    out/checkpoint-2 at update 1"], [1, 2]],
        {"max_updates": 2},
    ),
    "overwrite": Watch(False, True, second_run, {"code": 0, "left": []}, ONE),
    "use_compile": Watch(False, True, compiled, [[True], {0}]),
    "gradient_checkpointing": Watch(False, True, recomputed, 4),
    "rollout_batch_size": Watch(0, 3, rollout_sizes, [3]),
    "micro_batch_tokens": Watch(
        0, 100, shapes, lambda _, b: sum(n for n, _ in b) == 8 and max(t for _, t in b) <= 100
    ),
    "wired_limit_gb": Watch(0.0, 0.5, limits("set_wired_limit"), [[(500_000_000,), {}]]),
    "cache_limit_gb": Watch(0.0, 0.5, limits("set_cache_limit"), [[(500_000_000,), {}]]),
    "memory_limit_gb": Watch(0.0, 0.5, limits("set_memory_limit"), [[(500_000_000,), {}]]),
}


def mean_of(*records):
    return approx(sum(reward for _, reward in records) / len(records))


def observe(name, value, ignored=False):
    """What is seen with a value; `ignored`: where the code goes on as if it had not been set."""
    watch, read = FIELDS[name], grpo.read_config

    def forget(*arguments):
        config = read(*arguments)
        assert getattr(config, name) in (value, watch.a), "the value arrives before it is ignored"
        setattr(config, name, watch.a)
        return config

    for folder in ("out", "elsewhere"):
        shutil.rmtree(folder, ignore_errors=True)
    with mock.patch.object(grpo, "read_config", forget if ignored else read):
        return watch.seen({**watch.also, name: value})


@functools.cache
def baseline(name):
    return observe(name, FIELDS[name].a)


def judge(name, a, b):
    """All that is seen differs, and with b it is what is expected.

    Raises:
        AssertionError: the field does nothing, or not what it should.
    """
    expected = FIELDS[name].expected
    assert a != b, f"{name} has no effect"
    if isinstance(b, dict) and b.keys() == a.keys():
        same = [part for part in b if a[part] == b[part]]
        assert not same, f"{name} has no effect on {same}"
    if callable(expected):
        expected = expected(a, b)
    assert expected is True or b == expected, f"{name}: {b!r:.500}"


PLANNED = [
    *("model_name", "train_type", "lora_rank", "lora_layers"),
    *("dataset", "train_split", "max_train_samples", "max_prompt_length"),
    *("num_generations", "batch_size", "gradient_accumulation_steps", "num_epochs"),
    *("max_updates", "num_iterations", "sync_every_updates", "quantize_for_rollouts"),
    *("max_new_tokens", "max_completion_length", "kl_coeff", "gradient_checkpointing"),
    "dynamic_sampling",
    *("rollout_batch_size", "micro_batch_tokens", "dtype", "master_weights", "moment_bits"),
    "memory_limit_gb",
]


def plan(settings):
    """What a dry run says, without the settings themselves."""
    config_of(settings)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert grpo.main(["--config", "settings.toml", "--dry-run"]) == 0
    lines = printed.getvalue().splitlines()
    return [line for line in lines if line.split(" = ")[0] not in FIELDS]


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_depends_on(name):
    watch = FIELDS[name]
    assert plan({**watch.also, name: watch.a}) != plan({**watch.also, name: watch.b})


def test_every_field_is_watched():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(grpo.MLXGRPOConfig)}


OWN_TESTS = {  # of these are quicker
    *("save_best", "save_steps", "save_total_limit", "max_ckpt_gb", "max_hours", "reward_timeout"),
    *("early_stopping_patience", "watchdog_window", "eval_steps", "eval_every_updates"),
}


@pytest.mark.parametrize("name", mostly_long(FIELDS, *(FIELDS.keys() - OWN_TESTS)))
def test_field_has_its_effect(name):
    watch = FIELDS[name]
    assert observe(name, watch.a) == baseline(name), "the same settings must show the same"
    judge(name, baseline(name), observe(name, watch.b))


@pytest.mark.parametrize("name", mostly_long(FIELDS, "seed", "learning_rate", "closing_note"))
def test_an_ignored_field_is_noticed(name):
    """The test above can fail: a mutation takes the value out of the parsed configuration."""
    seen = observe(name, FIELDS[name].b, ignored=True)
    assert seen == baseline(name)
    with pytest.raises(AssertionError, match="has no effect"):
        judge(name, baseline(name), seen)
