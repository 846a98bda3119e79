"""Folders of runs for the tests of the page: logs and completions of any number, made up."""

import itertools
import json
import math
import random

from utils.run import completions, spans

REWARDS = ("correctness", "xmlcount", "soft_format", "int")
SAID = {"correctness": "2.0 for the right answer.", "xmlcount": "0.25 for each pair of tags."}
WORDS = ("so", "we", "have", "and", "add", "it", "gives")
HOSTILE = (
    "</script><script>document.title='taken'</script><!-- <img src=x "
    "onerror=\"document.title='taken'\"> \x1b[31mred\x1b[0m \x00 \u202egnihtemos\u202c "
    "\u200b\x9b2J &amp; ]]> \r\n\ud83d \U0001f600"
)


def completion(rng, answer, *, skill, tokens=True, text=None, words=20):
    """A completion in the contract of utils/run/completions.py."""
    right = rng.random() < skill
    given = answer if right else answer + rng.randint(1, 9)
    whole = rng.random() < 0.9
    prose = " ".join(
        rng.choice(("so", "we", "have", "and", "add", "it", "gives")) for _ in range(words)
    )
    if text is None:
        text = f"<reasoning>\n{prose} {given}.\n</reasoning>\n"
        text += f"<answer>\n{given}\n</answer>" if whole else "<answer>"
    sampled = text.removeprefix("<reasoning>\n")
    pieces = [sampled[i : i + 4] for i in range(0, len(sampled), 4)]
    logprobs = [round(-rng.expovariate(4), 4) for _ in pieces]
    trained = [p + rng.gauss(0, 0.05) for p in logprobs]
    drift = rng.random() < 0.5
    rewards = {
        "correctness": 2.0 * (right and whole),
        "xmlcount": 0.5 if whole else 0.25,
        "soft_format": 0.5 * whole,
        "int": 0.5 if whole else None,
    }
    return {
        "text": text,
        "ids": [*range(len(pieces))] if tokens else [],
        "pieces": pieces if tokens else [],
        "sampled_logprobs": logprobs if tokens else [],
        "trained_logprobs": trained if tokens and drift else None,
        "mask": [1] * len(pieces) if tokens else [],
        "rewards": rewards,
        "reward": sum(value or 0.0 for value in rewards.values()),
        "advantage": None,
        "finish_reason": "stop" if whole else "length",
        "length": len(pieces),
        "parsed": str(given) if whole else None,
        "correct": right and whole,
        "messages": None,
        "images": [],
    }


def group(rng, update, index, *, kind="train", split=None, size=8, skill=0.5, **how):
    answer = 10 + index % 90
    kept = [completion(rng, answer, skill=skill, **how) for _ in range(size)]
    if kind == "train":
        rewards = [c["reward"] for c in kept]
        mean = sum(rewards) / size
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(size - 1, 1))
        for c in kept:
            c["advantage"] = (c["reward"] - mean) / (std + 1e-4)
    question = f"Question {index}: Ann has {answer - 3} apples and buys 3. How many has she got?"
    return {
        "update": update,
        "kind": kind,
        "split": split,
        "prompt_index": index,
        "prompt": f"<|user|>{question}<|assistant|>\n<reasoning>\n",
        "question": question,
        "answer": str(answer),
        "completions": kept,
    }


def groups(updates, prompts=8, size=8, asked=20, every=10, seed=0, **how):
    """A run that learns, with evaluations."""
    rng = random.Random(seed)
    evaluations = {"kind": "eval", "split": "test", "size": 1}
    for update in range(updates + 1):
        skill = 0.2 + 0.75 * update / max(updates, 1)
        if update:
            for n in range(prompts):
                index = (update * prompts + n) % 400
                yield group(rng, update, index, size=size, skill=skill, **how)
        if update % every == 0:
            for index in range(asked):
                yield group(rng, update, index, skill=skill, **evaluations, **how)


def records(updates, seed=0):
    rng = random.Random(seed)
    for update in range(updates + 1):
        part = update / max(updates, 1)
        if update:
            record = {
                "update": update,
                "batch_step": update,
                "lr": 1e-5 * (1 - part),
                "loss": rng.gauss(0, 1e-3),
                "grad_norm": 0.5 + rng.random() / 5,
                "kl": None,
                "reward_mean": 0.7 + 2.4 * part + rng.gauss(0, 0.15),
                "reward_std": 1.2 - part,
                "completion_length": 20 + rng.random(),
                "completion_length_max": 31.0,
                "truncation_rate": 0.1 * (1 - part),
                "entropy": 0.2 - 0.1 * part,
                "clip_low": 0.0,
                "clip_high": 0.01,
                "tokens": 1280.0,
                "tokens_per_second": 6000 + rng.random() * 300,
                "seconds": 4.0 + update,
                "seconds_rollout": 0.2,
                "seconds_rewards": 0.01,
                "seconds_gradient": 0.3,
                "peak_memory_gb": 0.14,
                "reward/correctness": 2 * part,
                "groups_without_signal": part / 2,
                "sampler_mismatch": 1e-6,
            }
            if update == updates // 2:
                record["notes"] = [f"update {update}: the entropy has fallen to a tenth"]
            yield record
        if update % 10 == 0:
            yield {
                "update": update,
                "split": "test",
                "em": 0.2 + 0.75 * part,
                "em_subset": 20,
                "truncation_rate": 0.0,
            }


def make_run(folder, updates=20, seed=0, settings=None, log=True, final=True):
    """The folder of a run but for its completions."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "output_dir": str(folder),
        "run_name": "made up",
        "reward_funcs": [*REWARDS],
        "reward_weights": [],
        "reasoning_prefix": "<reasoning>\n",
        "eval_metric": "em",
        "learning_rate": 1e-5,
        "seed": seed,
        "num_generations": 8,
        "max_new_tokens": 32,
        "eval_max_new_tokens": 48,
    }
    (folder / "config.resolved.json").write_text(json.dumps(config | (settings or {})))
    resumed = [{"from": "checkpoint-8", "update": min(8, updates), "changed": {}}]
    (folder / "provenance.json").write_text(
        json.dumps({"mlx": "0.32", "seed": seed, "resumed": resumed, "rewards": SAID})
    )
    if log:
        lines = "".join(json.dumps(record) + "\n" for record in records(updates, seed))
        (folder / "training_log.jsonl").write_text(lines)
    if final:
        (folder / "final").mkdir(exist_ok=True)
    return folder


TOKENS = ("ids", "pieces", "sampled_logprobs", "trained_logprobs", "mask")


def keep(folder, made, span=200, first=0):
    """Write groups as utils/run/completions.py does: a file for every `span` of them, in which an
    update or an evaluation is a piece."""
    place = folder / completions.FOLDER
    place.mkdir(exist_ok=True)
    made = [*made]
    for start in range(0, len(made), span):
        numbered = [*enumerate(made[start : start + span], first + start)]
        for _, piece in itertools.groupby(numbered, lambda own: (own[1]["update"], own[1]["kind"])):
            lines = [*zip(*(lines_of(n, group) for n, group in piece), strict=True)]
            for kind, texts in zip((completions.TOKENS, completions.GROUPS), lines, strict=True):
                spans.append(place / f"{kind}{first + start:09}.jsonl.gz", texts)
    return len(made)


def lines_of(n, group):
    """In the file of tokens, and in that of groups."""
    plain = [{k: v for k, v in c.items() if k not in TOKENS} for c in group["completions"]]
    line = json.dumps({"n": n, **group, "completions": plain})
    return json.dumps(token_line(n, group["completions"])), line


def token_line(n, kept):
    """Here a token is the number of its text in a list of all texts."""
    texts = sorted({piece for c in kept for piece in c["pieces"]})
    numbers = {text: hash(text) % 10**9 for text in texts}
    return {
        "n": n,
        "ids": [[numbers[p] for p in c["pieces"]] or None for c in kept],
        "sampled_logprobs": [c["sampled_logprobs"] or None for c in kept],
        "trained_logprobs": [c["trained_logprobs"] for c in kept],
        "mask": [c["mask"] if not all(c["mask"]) else None for c in kept],
        "pieces": {str(number): text for text, number in numbers.items()},
        "joined": [],
    }
