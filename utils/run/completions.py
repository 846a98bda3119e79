"""Every completion of a run, in `completions/` of its folder, written once it was learnt from.

    duckdb.sql("from 'RUN/completions/groups-*.jsonl.gz'")             all of them, as a table
    pandas.read_json("RUN/completions/groups-000000000.jsonl.gz", lines=True)     some of them
    completions.read(Path("RUN"))                                    with their tokens, in Python

A line of groups-N is a prompt with its completions; the line of tokens-N with the same `n` has what
was sampled, token by token. A file holds a span of updates, from the group N on, and can be read
while it is written. When the store is full, the oldest tokens-N go first.

A run goes on while its completions are made into lines, packed and written: see background.py.
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from ..base.errors import readable, reason
from ..base.say import complain, say
from ..base.text import Json, counted, json_line, redact
from ..data.completion import Completion, Message
from ..data.files import Row
from ..data.tokenizer import Tokenizer
from ..gradient.micro_batch import MicroBatch
from ..rewards.answers import extract_xml_answer, same_answer
from ..rewards.builtin import last_number
from ..settings.run_settings import Settings
from . import spans
from .background import Background
from .log import finite
from .state import State
from .token_lines import Pieces, TokenLine, token_line, tokens_of, trained_logprobs

FOLDER = "completions"
GROUPS, TOKENS = "groups-", "tokens-"
SPANS = 60  # pairs of files, if all are full
LARGEST_SPAN = 8e6  # bytes
PIECES = '"pieces":'
BETWEEN = "\n\0\n"  # texts that are redacted together


class Kept(TypedDict):
    """A completion. Where its tokens were dropped, or not asked for, their lists are empty."""

    text: str
    ids: list[int]
    pieces: list[str]
    """The text of each token."""
    sampled_logprobs: list[float]
    trained_logprobs: list[float] | None
    """By the policy before it learnt from them; None: unknown, or the same as far as is stored."""
    mask: list[int]
    """1: sampled, 0: given."""
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float | None
    """None: not trained on (an evaluation, or a group that dynamic sampling replaced)."""
    finish_reason: str
    length: int
    """Sampled tokens."""
    parsed: str | None
    """The answer that the text gives."""
    correct: bool | None
    """Whether it is the expected one."""
    messages: list[dict[str, str]] | None
    """Of a conversation, from the question on."""
    images: list[str]


class Group(TypedDict):
    """A prompt with its completions."""

    update: int
    kind: str
    """train or eval."""
    split: str | None
    """Of an evaluation."""
    prompt_index: int
    """Row of the data set."""
    prompt: str
    question: str
    answer: str | None
    completions: list[Kept]


# Reading.


def read(run_folder: Path, *, tokens: bool = True) -> Iterator[Group]:
    """The groups of a run, which may be running, in the order in which they were written.

    A damaged part is left out, and said.
    """
    for path in span_files(run_folder / FOLDER, GROUPS):
        yield from read_span(path, tokens, warn)


def read_span(path: Path, tokens: bool, damaged: spans.Damaged) -> Iterator[Group]:
    """The groups of one of the files with groups; `damaged` is told of what can't be read."""
    # Before the tokens, which are written first.
    groups = [*lines_of(path, Group.__required_keys__, damaged)]
    numbered = [(group.pop("n"), group) for group in groups]
    lines = TokenLines(beside(path), damaged) if tokens else None
    yield from with_tokens(lines, numbered)


class TokenLines:
    """A file of tokens, read on as its groups are asked for, in the order of their numbers."""

    def __init__(self, path: Path, damaged: spans.Damaged) -> None:
        self.path, self.damaged = path, damaged
        self.pieces: dict[str, str] = {}  # texts of tokens by id, of all lines so far
        self.found = ((p.start, line) for p in spans.pieces(path, damaged) for line in p.lines)
        self.number, self.line, self.start = -1, "", 0

    def of(self, n: int) -> TokenLine | None:
        """The line of a group. Of those before it that were not asked for, no more is read than
        the texts of tokens that later ones need."""
        while self.number < n:
            self.start, self.line = next(self.found, (0, ""))
            if not self.line:
                return None
            self.number = number_of(self.line)
            if self.number < 0:
                self.complain()
            elif self.number < n:
                self.pieces |= pieces_of(self.line)
        if self.number > n:
            return None
        line: TokenLine | None = as_line(self.line, TokenLine.__required_keys__)
        if line is None:
            self.complain()
            return None
        self.pieces |= line["pieces"]
        return line

    def complain(self) -> None:
        self.damaged(self.path, none_of_a_store(self.start))


def with_tokens(lines: TokenLines | None, numbered: Iterable[tuple[int, Group]]) -> Iterator[Group]:
    """Groups with what is known of their tokens."""
    for n, group in numbered:
        own = lines.of(n) if lines else None
        pieces = lines.pieces if lines else {}
        for i, kept in enumerate(group["completions"]):
            kept |= tokens_of(own, i, pieces)  # type: ignore[typeddict-item]
        yield group


def span_files(folder: Path, kind: str = "") -> list[Path]:
    """In the order in which they were written, all or those of a kind."""
    return sorted(folder.glob(f"{kind or '*-'}{'[0-9]' * 9}.jsonl.gz"))


def beside(groups: Path) -> Path:
    """The file with the tokens of a span."""
    return groups.with_name(groups.name.replace(GROUPS, TOKENS))


def warn(path: Path, how: str) -> None:
    complain(f"warning: {path} is damaged: {how}; the rest of it is read")


def lines_of(path: Path, needed: frozenset[str], damaged: spans.Damaged) -> Iterator[Json]:
    for piece in spans.pieces(path, damaged):
        for line in piece.lines:
            if (found := as_line(line, needed)) is None:
                damaged(path, none_of_a_store(piece.start))
            else:
                yield found


def none_of_a_store(start: int) -> str:
    return f"a line of the piece at byte {start:,} is none of a store"


def pieces_of(line: str) -> dict[str, str]:
    """The texts of tokens that a line brings, without the rest of it."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.JSONDecoder().raw_decode(line, line.rindex(PIECES) + len(PIECES))[0]
        return found if isinstance(found, dict) else {}
    return {}


def as_line(line: str, needed: frozenset[str]) -> Json:
    """What a line says; None where it is not of its kind."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {"n", *needed} <= found.keys() else None


# Writing.


class Rollout(Protocol):
    """Of the script: P prompts, G completions each, F reward functions."""

    prompts: np.ndarray  # (P,) indices of the training set
    completions: np.ndarray  # (P, G)
    rewards: np.ndarray  # (P, G)
    values: np.ndarray  # (P, G, F)


class Store(Protocol):
    """Takes the completions of every update and evaluation."""

    def training(
        self,
        rollouts: Sequence[Rollout],
        advantages: np.ndarray,
        batches: Sequence[MicroBatch],
        update: int,
    ) -> None:
        """Of an update: the rollout that was learnt from, with its (P, G) advantages, and before it
        those of the groups that it replaced. The micro-batches know the trained log-probs."""

    def evaluation(
        self,
        split: str,
        update: int,
        questions: Sequence[Row],
        completions: Sequence[Completion],
        scores: dict[str, Sequence[float]],
    ) -> None:
        """Of the evaluation after an update, with the scores by the name of their metric."""

    def files(self) -> list[Path]:
        """Which this process has written to, once nothing is being written: a checkpoint counts on
        them."""

    def check(self) -> None:
        """Raise what has gone wrong meanwhile."""

    def settle(self) -> None:
        """Wait until all is written. Raises what went wrong meanwhile."""

    def close(self) -> None:
        """At the end of a run, whatever ended it: all is written, or why it is not is said."""

    def size(self) -> str:
        """What was kept, for the end of a run; empty where there is nothing to say."""


class NoStore:
    """Keeps nothing: `keep_completions` is none, or the run has no folder yet."""

    def training(self, *_: object) -> None:
        pass

    def evaluation(self, *_: object) -> None:
        pass

    def files(self) -> list[Path]:
        return []

    def check(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def size(self) -> str:
        return ""


@dataclass
class Answered:
    """A prompt of an update or an evaluation, and its G completions."""

    kind: str
    split: str | None
    row: int
    question: Row
    completions: Sequence[Completion]
    values: dict[str, Sequence[float]]  # G each
    rewards: Sequence[float]  # G
    advantages: Sequence[float | None]  # G
    trained: Sequence[np.ndarray | None]  # G


class Completions:
    """The store of a run.

    Args:
        args: `keep_completions`, `max_completions_gb`, `seed`.
        state: Counts the groups, and takes what the log should say.
        folder: The run's.
        tokenizer: Tells the text of a token.
        prompt_texts: Of questions, as the model reads them up to the reasoning prefix.
        rows: Of the data, by split.
        names: Returns those of the reward functions.
    """

    def __init__(
        self,
        args: Settings,
        state: State,
        folder: Path,
        tokenizer: Tokenizer,
        prompt_texts: Callable[[Sequence[Row]], list[str]],
        rows: dict[str, Sequence[Row]],
        names: Callable[[], Iterable[str]],
    ) -> None:
        self.args, self.state, self.folder = args, state, folder / FOLDER
        self.prompt_texts, self.rows, self.names = prompt_texts, rows, names
        self.pieces = Pieces(tokenizer)
        self.most = args.max_completions_gb * 1e9 or math.inf
        self.sizes = {p: p.stat().st_size for p in span_files(self.folder)}
        self.span: list[Path] = []  # the files of tokens and groups that are being written
        self.said: set[str] = set()
        self.to_say: list[str] = []  # by the training thread
        self.kept = self.written = 0  # completions and bytes, by this process
        self.writer = Background("completions")  # what is above is its own while it is at work

    def training(
        self,
        rollouts: Sequence[Rollout],
        advantages: np.ndarray,
        batches: Sequence[MicroBatch],
        update: int,
    ) -> None:
        *replaced, last = rollouts
        groups = [group for rollout in replaced for group in self.groups(rollout, None, {})]
        groups += self.groups(last, advantages, trained_logprobs(batches))
        most = wanted(self.args.keep_completions)
        if most < len(groups):  # the same ones in a resumed run
            generator = np.random.default_rng([self.args.seed, update])
            chosen = generator.choice(len(groups), int(most), replace=False)
            groups = [groups[i] for i in sorted(chosen)]
        self.write(update, groups)

    def groups(
        self, rollout: Rollout, advantages: np.ndarray | None, trained: dict[int, np.ndarray]
    ) -> list[Answered]:
        size, names = rollout.completions.shape[1], [*self.names()]
        return [
            Answered(
                "train",
                None,
                int(row),
                self.rows["train"][row],
                rollout.completions[p].tolist(),
                dict(zip(names, rollout.values[p].T.tolist(), strict=True)),
                rollout.rewards[p].tolist(),
                [None] * size if advantages is None else advantages[p].tolist(),
                [trained.get(p * size + i) for i in range(size)],
            )
            for p, row in enumerate(rollout.prompts)
        ]

    def evaluation(
        self,
        split: str,
        update: int,
        questions: Sequence[Row],
        completions: Sequence[Completion],
        scores: dict[str, Sequence[float]],
    ) -> None:
        numbers = {id(row): i for i, row in enumerate(self.rows[split])}
        most = min(len(questions), wanted(self.args.keep_completions))  # the same at every visit
        ((name, values),) = scores.items()
        groups = [
            Answered(
                "eval",
                split,
                numbers[id(question)],
                question,
                [completion],
                {name: [value]},
                [value],
                [None],
                [None],
            )
            for question, completion, value in zip(questions, completions, values, strict=True)
        ]
        self.write(update, groups[: int(most)])

    def write(self, update: int, groups: Sequence[Answered]) -> None:
        """Add groups, while the run goes on. Raises what went wrong with those before them."""
        self.settle()
        first = self.state.groups_kept
        self.state.groups_kept += len(groups)
        if not groups:
            return
        # Tokenizers are for one thread at a time.
        prompts = self.prompt_texts([group.question for group in groups])
        self.pieces.learn(completion.ids for group in groups for completion in group.completions)
        self.writer.begin(lambda: self.add(first, update, groups, prompts))

    def add(
        self, first: int, update: int, groups: Sequence[Answered], prompts: Sequence[str]
    ) -> None:
        """A disk that refuses ends no run: what is missing is said.

        Tokens come first, so that a group that can be read has its own.
        """
        try:
            self.begin_span(first)
            lines = [*self.lines(first, update, groups, prompts)]
            for path, texts in zip(self.span, zip(*lines, strict=True), strict=True):
                added = spans.append(path, texts)
                self.sizes[path] = self.sizes.get(path, 0) + added
                self.written += added
            self.kept += sum(len(group.completions) for group in groups)
            self.make_room()
        except OSError as error:
            self.span = []  # what is in it may lack tokens
            self.say_once(
                "lost",
                f"completions from update {update} on cannot be kept in {self.folder}: "
                f"{error.strerror or error}; the run goes on without those that do not fit",
            )

    def begin_span(self, first: int) -> None:
        """Go on in the present files, or in new ones once they are large."""
        present = sum(self.sizes.get(path, 0) for path in self.span)
        if self.span and present < min(LARGEST_SPAN, self.most / SPANS):
            return
        self.folder.mkdir(exist_ok=True)
        self.span = [self.folder / f"{kind}{first:09}.jsonl.gz" for kind in (TOKENS, GROUPS)]
        self.pieces.begin_file()

    def lines(
        self, first: int, update: int, groups: Sequence[Answered], prompts: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        """The lines of tokens-N and groups-N of each group."""
        shown = zip(groups, without_secrets(groups, prompts), strict=True)
        for n, (group, ((prompt, question, answer), spoken)) in enumerate(shown, start=first):
            line = {
                **{"n": n, "update": update, "kind": group.kind, "split": group.split},
                **{"prompt_index": group.row, "prompt": prompt, "question": question},
                "answer": None if group.question.get("answer") is None else answer,
                "completions": kept_of(group, spoken, self.args.eval_metric),
            }
            pairs = zip(group.completions, spoken, strict=True)
            open_ = [c if said(c) == own else None for c, own in pairs]  # or its ids would tell
            yield token_line(n, open_, group.trained, self.pieces), json_line(line)

    def make_room(self) -> None:
        """Drop the oldest tokens, then the oldest groups, where the store is too large."""
        for kind, what in ((TOKENS, "token ids and log-probs"), (GROUPS, "completions")):
            for path in span_files(self.folder, kind):
                if sum(self.sizes.values()) <= self.most:
                    return
                if path not in self.span:
                    path.unlink(missing_ok=True)
                    self.sizes.pop(path, None)
                    self.say_once(
                        what,
                        f"{self.folder} has reached max_completions_gb = "
                        f"{self.args.max_completions_gb:g}: the {what} of the oldest updates are "
                        "dropped from here on",
                    )

    def say_once(self, about: str, text: str) -> None:
        if about not in self.said:
            self.said.add(about)
            self.to_say.append(text)

    def check(self) -> None:
        self.writer.check()

    def settle(self) -> None:
        self.wait()
        self.writer.settle()

    def wait(self) -> None:
        self.writer.wait()
        for text in self.to_say:
            say(f"warning   {text}")
        self.state.notes += self.to_say
        self.to_say = []

    def close(self) -> None:
        try:
            self.settle()
        except Exception as error:  # noqa: BLE001 - the run ends already, and says of what
            say(f"warning   the last completions were not kept: {reason(error)}")

    def files(self) -> list[Path]:
        self.wait()
        return [path for path in self.span if path.exists()]

    def size(self) -> str:
        self.wait()
        if not self.kept:
            return ""
        each = self.written / self.kept * 1000
        return f"{counted(self.kept, 'completion')} ({readable(each)} for 1,000)"


def without_secrets(
    groups: Sequence[Answered], prompts: Sequence[str]
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Prompt, question and answer of each group, and what each completion said."""
    every = [texts_of(*pair) for pair in zip(groups, prompts, strict=True)]
    hidden = iter(redact_all([text for texts in every for text in texts]))
    for group in groups:
        asked = [next(hidden) for _ in range(3)]
        yield asked, [[next(hidden) for _ in said(c)] for c in group.completions]


def texts_of(group: Answered, prompt: str) -> list[str]:
    question = group.question
    spoken = [text for completion in group.completions for text in said(completion)]
    return [prompt, str(question["question"]), str(question.get("answer")), *spoken]


def said(completion: Completion) -> list[str]:
    """The text of a completion, and those of its messages."""
    return [completion.text, *(str(message["content"]) for message in messages_of(completion))]


def messages_of(completion: Completion) -> list[Message]:
    """Of a conversation, from the question on, as the environment may have added to it."""
    talk = completion.conversation
    return [*talk.prompt[-1:], *talk.messages] if talk else []


def kept_of(group: Answered, spoken: Sequence[Sequence[str]], metric: str) -> list[Json]:
    """What a line of groups-N says of each completion, whose texts may be shown."""
    read = last_number if metric == "last_number" else extract_xml_answer
    found: list[Json] = []
    for i, (completion, (text, *contents)) in enumerate(
        zip(group.completions, spoken, strict=True)
    ):
        pairs = zip(messages_of(completion), contents, strict=True)
        messages = [{"role": str(message["role"]), "content": own} for message, own in pairs]
        found.append(
            {
                "text": text,
                "rewards": {name: finite(values[i]) for name, values in group.values.items()},
                "reward": finite(group.rewards[i]),
                "advantage": finite(group.advantages[i]),
                "finish_reason": completion.finish_reason,
                "length": completion.sampled,
                "parsed": read(text) or None,
                "correct": is_right(group, i, metric),
                "messages": messages or None,
                "images": [],
            }
        )
    return found


def is_right(group: Answered, i: int, metric: str) -> bool | None:
    """By the exact match or the reward that evaluations count; None if nobody said it."""
    if metric != "em":
        value = finite(group.values[metric][i]) if metric in group.values else None
        return None if value is None else value > 0
    expected = group.question.get("answer")
    if expected is None:
        return None
    answer = extract_xml_answer(group.completions[i].text)
    return bool(answer) and same_answer(answer, str(expected))


def redact_all(texts: Sequence[str]) -> list[str]:
    """Each text without secrets; all at once, since most of the time it takes is per call."""
    together = redact(BETWEEN.join(texts)).split(BETWEEN)
    return together if len(together) == len(texts) else [redact(text) for text in texts]


def wanted(keep_completions: str) -> float:
    """How many prompts of an update or an evaluation are kept."""
    if keep_completions == "all":
        return math.inf
    return int(keep_completions.removeprefix("sample:"))


# Going on with a run.


def rewind(run_folder: Path, kept: int) -> None:
    """Cut the store to its first `kept` groups: the run writes the rest again.

    Whatever is wrong with it is said, and stops nothing.
    """

    def hurt(path: Path, how: str) -> None:
        say(
            f"warning   {path} is damaged: {how}. The run goes on beside it; delete it if you do "
            "not need what can still be read"
        )

    for kind in (GROUPS, TOKENS):
        earlier = []
        for path in span_files(run_folder / FOLDER, kind):
            if first_of(path) < kept:
                earlier.append(path)
            else:
                drop(path, hurt)
        if earlier:
            with as_damage(earlier[-1], hurt):
                spans.cut(earlier[-1], lambda line: number_of(line) >= kept, hurt)


def first_of(path: Path) -> int:
    """The number of the first group of a span."""
    return int(path.name.partition("-")[2].partition(".")[0])


def number_of(line: str) -> int:
    """Of a line's group; it stands in front."""
    match = re.search(r'"n": ?(\d+)', line)
    return int(match[1]) if match else -1


def drop(path: Path, hurt: spans.Damaged) -> None:
    with as_damage(path, hurt):
        path.unlink()


@contextlib.contextmanager
def as_damage(path: Path, hurt: spans.Damaged) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hurt(path, error.strerror or str(error))


def bring(theirs: Path, run_folder: Path) -> None:
    """The store of a run in another folder, which is gone on with in this one."""
    if (theirs / FOLDER).is_dir() and not (run_folder / FOLDER).exists():
        shutil.copytree(theirs / FOLDER, run_folder / FOLDER)
