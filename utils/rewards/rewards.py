"""The reward functions of a run: called for its completions, and what they logged meanwhile."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from ..data.completion import Completion, Message
from ..data.files import Row
from ..data.tokenizer import Tokenizer
from ..device import ranks
from ..settings.run_settings import Settings
from .calls import Columns, Reward, RewardCalls, TrainerState, takes_parts


class Rewards:
    """The functions by name, in the order of `reward_funcs`.

    Args:
        functions: Returns them, as `by_name.load_rewards` found them.
        args: Of these, `reward_timeout`.
        tokenizer: Shows them prompts as the model reads them.
        prefix_tokens: Of the reasoning prefix, at the end of `prompt_ids`.
        progress: How far training is; the start, for a command that does not train.
        pulse: Called with "rewards" while they are waited for; may raise to stop.
    """

    def __init__(
        self,
        functions: Callable[[], dict[str, Reward]],
        args: Settings,
        tokenizer: Tokenizer,
        prefix_tokens: int,
        progress: Callable[[], TrainerState] = TrainerState,
        pulse: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.functions, self.calls = functions, RewardCalls(args.reward_timeout)
        self.tokenizer, self.prefix_tokens = tokenizer, prefix_tokens
        self.progress, self.pulse = progress, pulse
        self.start()

    def start(self) -> None:
        """An update begins: what is logged from here on is of it."""
        self.logged: dict[str, list[float]] = {}
        self.columns: Columns = {}
        self.called = 0

    def __call__(
        self, questions: Sequence[Row], completions: Sequence[Completion]
    ) -> dict[str, np.ndarray]:
        """(B,) values by name of the function, for B question-completion pairs; NaN: none.

        Raises:
            RunError: a function failed, or returned something else than a number or None for each.
        """
        if not completions:  # this rank has no part of them
            return {name: np.zeros(0) for name in self.functions()}
        values = self.call(self.functions(), questions, completions)
        for name, numbers in self.calls.logged.metrics.items():
            self.logged.setdefault(name, []).extend(numbers)
        self.columns, self.called = self.calls.logged.columns, self.called + 1
        return values

    def of(
        self, name: str, questions: Sequence[Row], completions: Sequence[Completion]
    ) -> np.ndarray:
        """(B,) values of one function, for an evaluation: what it logs is no part of an update."""
        self.calls.reset()  # what was begun on a rollout that nobody scored
        return self.call({name: self.functions()[name]}, questions, completions)[name]

    def call(
        self,
        functions: dict[str, Reward],
        questions: Sequence[Row],
        completions: Sequence[Completion],
    ) -> dict[str, np.ndarray]:
        """NaN for those whose environment failed: no function gets them."""
        columns = self.keywords(*without_failed(questions, completions))
        values: dict[str, np.ndarray] = dict.fromkeys(functions, np.zeros(0))
        if columns["completions"] or not completions:
            pulse = functools.partial(self.pulse, "rewards")
            values = self.calls(functions, columns, self.progress(), pulse)
        used = np.array([not completion.failed for completion in completions])
        every = {name: np.full(len(completions), np.nan) for name in values}
        for name, known in values.items():
            every[name][used] = known
        return every

    def ahead(self, questions: Sequence[Row], group: int, completions: list[Completion]) -> None:
        """Let functions that wait for others begin on whole groups while the next are sampled.

        None, at the start of sampling: what they began on was sampled in vain, and is dropped.
        """
        if not completions:
            self.calls.reset()
        functions, whole = takes_parts(self.functions()), len(completions) // group
        if functions and 0 < whole < len(questions):
            repeated = [question for question in questions[:whole] for _ in range(group)]
            columns = self.keywords(*without_failed(repeated, completions[: whole * group]))
            self.calls.ahead(functions, columns, self.progress())

    def metrics(self) -> dict[str, float]:
        """What functions logged in this update, averaged over all their calls."""
        said: dict[str, list[float]] = {}
        for logged in ranks.here().all_say(self.logged):
            for name, numbers in logged.items():
                said.setdefault(name, []).extend(numbers)
        return {f"metric/{name}": float(np.mean(x)) for name, x in said.items()}

    def shown(self) -> dict[str, list]:
        """Values to show with the completions, by column, if there was one call for all of them."""
        return self.columns if self.called == 1 and ranks.here().size == 1 else {}

    def keywords(self, questions: Sequence[Row], completions: Sequence[Completion]) -> Columns:
        """TRL's keywords for B question-completion pairs, and `prompt_texts`."""
        names = set().union(*questions) - {"prompt_ids", "prompt"}
        columns: Columns = {n: [q.get(n) for q in questions] for n in sorted(names)}
        pairs = zip(questions, completions, strict=True)
        columns["prompts"] = [
            c.conversation.prompt if c.conversation else q["prompt"] for q, c in pairs
        ]
        columns["completions"] = [spoken(completion) for completion in completions]
        columns["completion_ids"] = [completion.sampled_ids for completion in completions]
        columns["prompt_texts"] = self.prompt_texts(questions)
        return columns | of_environments(completions)

    def prompt_texts(self, questions: Sequence[Row]) -> list[str]:
        """Prompts as the model reads them, up to the reasoning prefix; each is decoded once."""
        distinct = {id(question): question["prompt_ids"] for question in questions}
        end = -self.prefix_tokens or None
        texts = {key: self.tokenizer.decode(ids[:end]) for key, ids in distinct.items()}
        return [texts[id(question)] for question in questions]


def without_failed(
    questions: Sequence[Row], completions: Sequence[Completion]
) -> tuple[list[Row], list[Completion]]:
    """Those whose environment did not fail, with their questions."""
    pairs = zip(questions, completions, strict=True)
    used = [(question, completion) for question, completion in pairs if not completion.failed]
    return [question for question, _ in used], [completion for _, completion in used]


def prompt_of(question: Row, completion: Completion) -> list[Message]:
    """The messages before a completion, with what an environment added."""
    talk = completion.conversation
    return talk.prompt if talk else question["prompt"]


def spoken(completion: Completion) -> list[Message]:
    """A completion as TRL gives it to reward functions: the messages after the prompt."""
    if completion.conversation is None:
        return [{"role": "assistant", "content": completion.text}]
    return completion.conversation.messages


def of_environments(completions: Sequence[Completion]) -> Columns:
    """Of conversations, what their environments say of them."""
    talks = [completion.conversation for completion in completions]
    if None in talks or not talks:
        return {}
    known = [talk for talk in talks if talk]
    return {
        "environments": [talk.environment for talk in known],
        "environment_rewards": [talk.reward for talk in known],
        "turns": [talk.turns for talk in known],
    }
