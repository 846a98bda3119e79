"""Conversations: whose tokens are whose, where they end, and that no batch changes them."""

import numpy as np
import pytest
from conftest import load_script
from helpers import gradient, make_trainer, micro_batches, sample
from mlx_lm.models import llama

from utils.base.errors import RunError
from utils.rollouts import turns, waiting

WORLDS = """
import os, random, time

class Echo:
    turns = 3

    def reset(self, question, **row):
        self.question, self.said = question, []

    def step(self, text):
        self.said.append(text)
        return f"{len(text)} {text[-1:]}", len(self.said) == self.turns

    def get_reward(self):
        return sum(map(len, self.said)) / 10

class Once(Echo):
    turns = 1

class Long(Echo):
    turns = 99

class Chance(Echo):
    def reset(self, **row):
        self.said = []
        return f" Number {random.randint(0, 9999)}."

    def step(self, text):
        return super().step(f"{text}{random.random()}")

class Odd(Echo):
    '''Fails in the second turn of every second one, in a way of its own.'''
    way = "raises"

    def step(self, text):
        answer = super().step(text)
        if len(self.said) == 2 and len("".join(self.said)) % 2:
            return getattr(self, self.way)(answer)
        return answer

    def raises(self, answer):
        raise LookupError("no such place")

class Hangs(Odd):
    way = "hangs"

    def hangs(self, answer):
        time.sleep(60)

class Dies(Odd):
    way = "dies"

    def dies(self, answer):
        os._exit(3)

class Mute(Odd):
    way = "mute"

    def mute(self, answer):
        return 7, False

class Bad(Echo):
    def reset(self, **row):
        raise ValueError("no board")

class Wordy(Echo):
    def step(self, text):
        return "1 + 2 = 3 " * 40, super().step(text)[1]
"""
STOPS = ["t", "0", "a", "e"]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    path = tmp_path_factory.mktemp("worlds") / "worlds.py"
    path.write_text(WORLDS)
    return path


@pytest.fixture
def trainer_in(model_dir, data_dir, tmp_path, worlds):
    """Makes a trainer whose completions are conversations with a class of WORLDS."""

    def make(name, **settings):
        given = {"environment": f"{worlds}:{name}"} if name else {}
        defaults = {"stop_strings": STOPS, "max_new_tokens": 40, "reasoning_prefix": ""}
        given |= {**defaults, "reward_funcs": ["environment"] if name else ["int"], **settings}
        return make_trainer(model_dir, data_dir, tmp_path / "o", None, **given)

    return make


def parts(completions):
    return [(c.ids, c.mask, c.finish_reason, c.text) for c in completions]


def by_hand(trainer, question, key, answers):
    """A conversation sampled turn by turn, each from all that was said before it, read anew."""
    grpo, loaded = load_script(), (trainer.model, trainer.tokenizer)
    ids, mask, texts = [], [], []
    while True:
        left = trainer.args.max_new_tokens - sum(mask)
        own = np.stack([turns.turn_key(key, len(texts))])
        prompt = question["prompt_ids"] + ids
        (said,) = sample(grpo, loaded, [prompt], None, own, STOPS, max_tokens=left)
        ids, mask = ids + said.ids, mask + said.mask
        texts.append(said.text)
        if said.finish_reason == "length" or len(texts) == 3:
            return ids, mask, texts
        text = f"<|im_end|>\n<|im_start|>user\n{answers(said.text)}<|im_end|>\n"
        if said.ids[-1] == 2:
            text = text.removeprefix("<|im_end|>")
        given = trainer.tokenizer.encode(f"{text}<|im_start|>assistant\n", add_special_tokens=False)
        ids, mask = ids + given, mask + [0] * len(given)


@pytest.mark.parametrize("places", [1, 3, 8])
def test_a_conversation_is_its_turns_one_after_the_other(trainer_in, places):
    trainer = trainer_in("Echo", rollout_batch_size=places)
    grpo = load_script()
    completions = trainer.generate_responses([0, 1])
    assert 3 in {c.conversation.turns for c in completions}
    for n, completion in enumerate(completions):
        question = trainer.train_dataset[n // 4]
        key = grpo.random_key(0, grpo.ROLLOUT, (0, n // 4, n % 4))
        ids, mask, texts = by_hand(trainer, question, key, lambda t: f"{len(t)} {t[-1:]}")
        assert (completion.ids, completion.mask) == (ids, mask)
        said = [m["content"] for m in completion.conversation.messages if m["role"] == "assistant"]
        assert said == texts
        assert completion.text == texts[-1]


def test_the_samplers_log_probs_are_those_of_the_whole_text(trainer_in):
    """So the context of every sampled token is what the update reads."""
    trainer = trainer_in("Chance", max_turns=3)
    (record,) = trainer.train_step([0, 1])
    assert record["turns"] > 1.2
    assert record["sampler_mismatch"] < 1e-5
    assert record["environment_failures"] == 0
    given = [c for c in trainer.rollout.completions.reshape(-1) if 0 in c.mask]
    assert all(c.logprobs[i] == 0 for c in given for i, own in enumerate(c.mask) if not own)


def test_no_environment_and_one_that_ends_at_once_are_the_same_to_the_bit(trainer_in):
    plain, once = trainer_in(""), trainer_in("Once")
    one, other = plain.generate_responses([0, 1]), once.generate_responses([0, 1])
    assert parts(one) == parts(other)
    assert [c.logprobs for c in one] == [c.logprobs for c in other]
    advantages = np.arange(8.0)
    rows = [plain.train_dataset[n // 4] for n in range(8)]
    losses = [
        gradient(t, micro_batches(t, (rows, c, advantages)))
        for t, c in ((plain, one), (once, other))
    ]
    assert losses[0][0] == losses[1][0]
    for name, value in losses[0][1].items():
        assert (value == losses[1][1][name]).all()


def test_nothing_after_the_end_of_a_turn_is_trained(trainer_in):
    """A turn ends at its first end-of-sequence token or stop string, and what follows is given."""
    trainer = trainer_in("Echo", num_generations=8, stop_strings=["0"])
    trainer.sampler.stop.eos_ids = set(range(3, 60))
    completions = trainer.generate_responses([0, 1, 2])
    ends = 0
    for completion in completions:
        pairs = [*zip(completion.ids, completion.mask, strict=True)]
        for (token, own), (_, after) in zip(pairs, [*pairs[1:], (0, 0)], strict=True):
            if own and token in trainer.sampler.stop.eos_ids:
                assert not after
                ends += 1
    assert ends > 24


def test_random_environments_say_the_same_again(trainer_in):
    """In another order, in other processes, in other batches."""
    seen = []
    for places, batch in ((8, [0, 1]), (3, [0, 1]), (2, [1, 0])):
        trainer = trainer_in("Chance", rollout_batch_size=places)
        found = trainer.generate_responses(batch)
        halves = found[:4], found[4:]
        seen.append(halves if batch == [0, 1] else halves[::-1])
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert parts(one) == parts(two)
            assert [c.conversation.messages for c in one] == [c.conversation.messages for c in two]
    prompts = {c.conversation.prompt[-1]["content"] for c in [*seen[0][0], *seen[0][1]]}
    assert len(prompts) == 8, "each completion has an environment of its own"
    assert all(" Number " in prompt for prompt in prompts)


FAILURES = {
    "Odd": r"step raised LookupError: no such place \(.*worlds.py, line \d+\)",
    "Hangs": "took longer than environment_timeout = 1 s",
    "Dies": "its process ended with exit code 3",
    "Mute": r"step returned 7, which is neither a text nor messages",
}


@pytest.mark.parametrize(("name", "problem"), FAILURES.items())
def test_what_fails_is_left_out_and_the_rest_stays(trainer_in, name, problem):
    import re

    good = trainer_in("Echo").generate_responses([0, 1])
    trainer = trainer_in(name, environment_timeout=1.0)
    (record,) = trainer.train_step([0, 1])
    completions = trainer.rollout.completions.reshape(-1)
    failed = [c.failed for c in completions]
    assert 0 < sum(failed) < 8
    assert record["environment_failures"] == sum(failed)
    for one, other in zip(good, completions, strict=True):
        if other.failed:
            assert re.fullmatch(problem, other.conversation.problem)
            assert other.finish_reason == "environment"
        else:
            assert parts([one]) == parts([other])
            assert one.conversation.messages == other.conversation.messages
    assert (np.isnan(trainer.rollout.rewards.reshape(-1)) == failed).all()
    batches = trainer.micro_batches(trainer.rollout, np.ones((2, 4)))
    trained = {int(n) for b in batches for n in np.array(b.completion)[np.array(b.mask).any(1)]}
    assert trained == {n for n in range(8) if not failed[n]}


def test_a_failure_stops_the_run_where_that_is_set(trainer_in):
    trainer = trainer_in("Odd", on_environment_error="stop")
    with pytest.raises(RunError, match=r"environment .*worlds.py:Odd step raised LookupError"):
        trainer.generate_responses([0, 1])


def test_environments_that_never_begin_are_counted(trainer_in):
    trainer = trainer_in("Bad")
    (record,) = trainer.train_step([0, 1])
    assert record["environment_failures"] == 8
    assert record["grad_norm"] == 0


def test_a_conversation_ends_at_its_limits(trainer_in):
    many = trainer_in("Long", max_turns=2, max_new_tokens=200).generate_responses([0, 1])
    assert {c.finish_reason for c in many} == {"turns"}
    assert {c.conversation.turns for c in many} == {2}
    short = trainer_in("Long", max_completion_length=60, max_turns=50).generate_responses([0, 1])
    assert {c.finish_reason for c in short} == {"length"}
    assert max(len(c.ids) for c in short) <= 60
    assert max(len(c.ids) for c in short) > 40
    few = trainer_in("Long", max_new_tokens=7, max_turns=50).generate_responses([0, 1])
    assert {c.sampled for c in few} == {7}


def test_long_answers_are_cut_and_said(trainer_in, capsys):
    trainer = trainer_in("Wordy", max_tool_tokens=9)
    completions = trainer.generate_responses([0, 1])
    assert capsys.readouterr().out.count("longer than max_tool_tokens = 9") == 1
    runs = "".join(map(str, completions[0].mask)).strip("1").split("1")
    outside = trainer.sampler.world.answered([{"role": "user", "content": ""}], 5)
    assert max(map(len, runs)) == len(outside) + 9


def test_the_reasoning_prefix_opens_every_turn(trainer_in):
    trainer = trainer_in("Echo", reasoning_prefix="3 = ")
    completion = next(c for c in trainer.generate_responses([0]) if c.conversation.turns > 1)
    said = [m["content"] for m in completion.conversation.messages if m["role"] == "assistant"]
    assert all(text.startswith("3 = ") for text in said)
    whole = trainer.tokenizer.decode(completion.ids)
    assert whole.count("assistant\n3 = ") == completion.conversation.turns - 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:Echo", "environment = 'nowhere.py:Echo' cannot be imported: file nowhere.py"),
        ("{worlds}:Eco", r"worlds.py has no class 'Eco' \(it has Echo, Once"),
        (
            "{broken}:Echo",
            r"cannot be imported: NameError: name 'nowhere' .* \(.*broken.py, line 2",
        ),
    ],
)
def test_an_environment_that_cannot_be_imported_is_refused(
    refused, worlds, tmp_path, spec, message
):
    import re

    (tmp_path / "broken.py").write_text("x = 1\nnowhere\n")
    spec = spec.format(worlds=worlds, broken="broken.py")
    told = refused(environment=spec, reward_funcs=["environment"])
    assert re.search(message, told)


def test_rewards_get_the_conversation(trainer_in):
    trainer, seen = trainer_in("Echo"), []

    def note(completions, environments, turns, prompts, **_):
        seen.append((completions, environments, turns, prompts))
        return [float(n) for n in turns]

    trainer.reward_funcs = {"note": note}
    trainer.train_step([0, 1])
    ((completions, environments, counts, prompts),) = seen
    for talk, environment, count, prompt in zip(
        completions, environments, counts, prompts, strict=True
    ):
        said = [m["content"] for m in talk if m["role"] == "assistant"]
        assert len(said) == count
        assert environment.question == prompt[-1]["content"]
        assert environment.said == said[: len(environment.said)]


@pytest.fixture
def tokens_read(monkeypatch):
    """Sizes of all that a model of the tests reads beside single tokens."""
    sizes, forward = [], llama.Model.__call__

    def noted(self, tokens, *args, **kwargs):
        if tokens.shape[1] > 1:
            sizes.append(tokens.size)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(llama.Model, "__call__", noted)
    return sizes


@pytest.mark.parametrize(("places", "known"), [(16, True), (8, True), (2, False)])
def test_a_turn_reads_only_what_is_new(trainer_in, tokens_read, monkeypatch, places, known):
    """With places for all; where rows wait for places, there is no memory for what they read."""
    trainer = trainer_in("Echo", rollout_batch_size=places)
    tokens_read.clear()
    kept = trainer.generate_responses([0, 1])
    once = sum(tokens_read)
    monkeypatch.setattr(waiting.Waiting, "read", lambda *_: None)
    tokens_read.clear()
    again = trainer.generate_responses([0, 1])
    assert parts(kept) == parts(again)
    assert [c.logprobs for c in kept] == [pytest.approx(c.logprobs, abs=1e-5) for c in again]
    assert (once < 0.6 * sum(tokens_read)) is known


CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "2 ** 70"}}</tool_call>'
TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }}: {% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{# <tool_call> tool_call.name #}"
)


def test_tools_answer_what_the_model_calls(trainer_in, tmp_path, capsys):
    """Every turn opens with a call, whatever the random model says after it."""
    (tmp_path / "tools.jinja").write_text(TOOLS)
    template = str(tmp_path / "tools.jinja")
    given = {"tools": ["calculator"], "reasoning_prefix": CALL, "chat_template": template}
    given["stop_strings"] = [*"bdfhkwy134568"]  # that are not in the call
    trainer = trainer_in("", **given, max_turns=3, max_completion_length=900)
    prompt = trainer.tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])
    assert prompt.startswith("calculator: ")
    completions = trainer.generate_responses([0, 1])
    assert max(c.conversation.turns for c in completions) > 1
    for completion in completions:
        said = [m["content"] for m in completion.conversation.messages if m["role"] == "tool"]
        assert {*said} == {"1180591620717411303424"} or not said
        assert sum(completion.conversation.environment.calls.values()) == len(said)
        text = trainer.tokenizer.decode(completion.ids)
        given = f"<|im_start|>tool\n1180591620717411303424<|im_end|>\n<|im_start|>assistant\n{CALL}"
        assert text.count(given) == completion.conversation.turns - 1
    assert "writes earlier turns" not in capsys.readouterr().out
