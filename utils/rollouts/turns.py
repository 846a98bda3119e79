"""Completions that are conversations: what the model says is answered by an environment, in turns.

A conversation is one sequence of ids, to which turns are added and of which nothing is tokenized
again: the ids that were sampled (mask 1), and those that the chat template makes of the answers
(mask 0). A row whose turn has ended leaves its place in the batch, as any row that has ended; once
its environment has answered, it takes a free place again. When that happens depends on what was
sampled alone, never on the clock: all that wait come back together when half of the places are
free.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.errors import RunError
from ..base.say import say
from ..data.chat_template import template_options
from ..data.completion import Completion, Conversation, Message
from ..data.files import Row
from ..data.questions import encode_prompt
from ..data.tokenizer import Tokenizer
from ..data.turns import TurnTemplate
from ..settings.run_settings import Settings
from .environments import Environments, Failed, Instance, settled, whose
from .sampler import Asked, Batch, Sampler
from .stop_rule import Reader, StopRule, Turn
from .waiting import Waiting


@dataclass
class World:
    """What conversations of a run share.

    Args:
        prefix: Ids that each turn of the model begins with, which are given.
    """

    a: Settings
    tokenizer: Tokenizer
    template: TurnTemplate
    environments: Environments
    stop: StopRule
    prefix: list[int]
    cut: int = 0
    """Answers that were too long."""
    told: bool = False

    def failed(self, problem: str) -> None:
        """Raises RunError where an environment's failure ends the run."""
        if self.a.on_environment_error == "stop":
            raise RunError(f"{whose(self.a)} {problem}")

    def tell(self) -> None:
        """Say once that answers were cut."""
        if self.cut and not self.told:
            self.told = True
            say(
                f"warning   an environment's answers are longer than max_tool_tokens = "
                f"{self.a.max_tool_tokens}: the model reads their beginning"
            )

    def answered(self, messages: list[Message], last: int) -> list[int]:
        """The ids after the token `last`, to the opening of the model's next turn."""
        short = [{**message, "content": self.shortened(message)} for message in messages]
        return [*self.template.between(short, last == self.template.end), *self.prefix]

    def shortened(self, message: Message) -> str:
        """Its text, of at most max_tool_tokens."""
        text, most = str(message["content"]), self.a.max_tool_tokens
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= most:
            return text
        self.cut += 1
        return self.tokenizer.decode(ids[:most])


@dataclass(eq=False)
class Talk:
    """A conversation that is under way."""

    instance: Instance
    question: Row
    key: np.ndarray
    left: int
    """Tokens that may be sampled yet."""
    room: int
    """Tokens that may be sampled or given yet."""
    prompt: list[Message] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    turns: int = 0
    end: str = ""
    """Its finish reason, once it has one."""
    problem: str = ""
    answer: Future | None = None
    """Of the environment, while it is waited for."""
    completion: Completion | None = None

    def open(self, world: World) -> None:
        """The environment has begun, and may have added to the prompt."""
        assert self.answer is not None
        answer, self.answer = self.answer, None
        self.prompt, self.prompt_ids = self.question["prompt"], self.question["prompt_ids"]
        try:
            text = answer.result()
        except Failed as error:
            self.fail(str(error), world)
            return
        if text:
            *before, last = self.prompt
            self.prompt = [*before, {**last, "content": f"{last['content']}{text}"}]
            own = {**self.question, "prompt": self.prompt}
            self.prompt_ids = encode_prompt(world.tokenizer, world.a, own)
        if len(self.prompt_ids) > world.a.max_prompt_length:
            count, most = len(self.prompt_ids), world.a.max_prompt_length
            self.fail(f"made a prompt of {count} tokens (max_prompt_length = {most})", world)

    def add(self, turn: Turn, world: World) -> None:
        """A turn that was sampled. It goes to the environment if it has an end."""
        self.ids += turn.ids
        self.logprobs += turn.logprobs
        self.mask += [1] * len(turn.ids)
        self.left -= len(turn.ids)
        self.room -= len(turn.ids)
        self.turns += 1
        self.text = world.stop.prefix + world.stop.text(turn.ids)
        self.messages.append({"role": "assistant", "content": self.text})
        if turn.ended:
            self.answer = self.instance.step(self.text)
        else:
            self.finish("length")

    def finish(self, why: str) -> None:
        """Nothing more is sampled; the environment says what came of it."""
        self.end = why
        self.answer = self.instance.close()

    def fail(self, problem: str, world: World) -> None:
        world.failed(problem)
        self.end, self.problem, self.answer = "environment", problem, None
        self.completion = self.completed(None, {})

    def hear(self, world: World) -> list[int]:
        """The environment has answered. Returns the ids that are given for the next turn, if there
        is one."""
        assert self.answer is not None
        answer, self.answer = self.answer, None
        try:
            result = answer.result()
        except Failed as error:
            self.fail(str(error), world)
            return []
        if self.end:
            self.completion = self.completed(*result)
            return []
        messages, over = result
        self.messages += messages
        if over or self.turns >= world.a.max_turns:
            self.finish("stop" if over else "turns")
            return []
        given = world.answered(messages, self.ids[-1])
        if len(given) >= self.room or not self.left:
            self.finish("length")
            return []
        return given

    def give(self, ids: list[int]) -> None:
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [0] * len(ids)
        self.room -= len(ids)

    def completed(self, reward: float | None, attributes: dict[str, object]) -> Completion:
        conversation = Conversation(
            self.prompt,
            self.prompt_ids,
            self.messages,
            self.turns,
            reward,
            SimpleNamespace(**attributes),
            self.problem,
        )
        whole = self.ids, self.logprobs, self.mask
        return Completion(*whole, self.end, self.text, conversation)


def turn_key(key: np.ndarray, turn: int) -> np.ndarray:
    """(2,) random key of a completion's nth turn; the first has the completion's own."""
    if not turn:
        return key
    return np.random.SeedSequence((*map(int, key), turn)).generate_state(2, np.uint32)


class TurnReader(Reader):
    """Reads turns, asks environments, and gives rows whose environment has answered places again.

    Args:
        talks: Those that have not failed are sampled, in order.

    Turn n of the batch goes on from prompts[prompt_of[n]] by keys[n]: first those that open the
    conversations; later ones are added as they begin.
    """

    def __init__(
        self,
        world: World,
        talks: Sequence[Talk],
        places: int,
        longest: int,
        pulse: Callable[[], None],
    ) -> None:
        self.world, self.talks, self.pulse = world, talks, pulse
        self.players = [talk for talk in talks if not talk.end]
        super().__init__(world.stop, len(self.players), places, longest)
        count = len(self.players) * world.a.max_turns
        self.prompts, first = distinct([talk.prompt_ids for talk in self.players])
        self.prompt_of = [*first, *[0] * (count - len(first))]
        self.keys = np.zeros((count, 2), np.uint32)
        for n, talk in enumerate(self.players):
            self.keys[n] = talk.key
        self.playing: list[tuple[Turn, Talk]] = []
        self.asking: list[Talk] = []
        self.waiting: Waiting = Waiting(places)
        self.partners: list[Talk] = []  # of the turns in the batch, in order

    def next(self) -> list[int]:
        new = super().next()
        begun = [self.players[n] for n in new]
        self.playing += zip(self.live[len(self.live) - len(new) :], begun, strict=True)
        self.partners += begun
        if any(turn not in self.live for turn, _ in self.playing):  # its last block is unread
            self._read_unread()
            self.unread = None
        if not new and self.begun == len(self.rows) and len(self.asking) >= len(self.live):
            return self.rejoin()
        return new

    def read(self, block: Sequence[tuple[mx.array, mx.array]], part_to_leave: float) -> list[int]:
        keep = super().read(block, part_to_leave)
        if len(keep) < len(self.partners):
            stay = {*keep}
            left = [(i, talk) for i, talk in enumerate(self.partners) if i not in stay]
            self.waiting.leaving = [(i, self.players.index(talk)) for i, talk in left]
            self.partners = [self.partners[i] for i in keep]
        return keep

    def rejoin(self) -> list[int]:
        """The numbers of turns that begin in free places, in the order in which those before them
        ended; waits for their environments."""
        new: list[int] = []
        while self.asking and (free := self.places - len(self.live)):
            some, self.asking = self.asking[:free], self.asking[free:]
            settled([talk.answer for talk in some if talk.answer], self.pulse)
            for talk in some:
                if given := talk.hear(self.world):
                    new.append(self.go_on(talk, given))
                else:
                    self.waiting.forget(self.players.index(talk))
        return new

    def go_on(self, talk: Talk, given: list[int]) -> int:
        """The number of the turn that begins after what was given."""
        talk.give(given)
        player = self.players.index(talk)
        number = player + talk.turns * len(self.players)
        self.waiting.owners[len(self.prompts)] = player
        self.prompt_of[number] = len(self.prompts)
        self.prompts.append(talk.prompt_ids + talk.ids)
        self.keys[number] = turn_key(talk.key, talk.turns)
        turn = Turn(min(talk.left, talk.room))
        self.live.append(turn)
        self.playing.append((turn, talk))
        self.partners.append(talk)
        return number

    def _read_unread(self) -> None:
        super()._read_unread()
        for turn, talk in self.playing:
            if turn.is_read:
                talk.add(turn, self.world)
                if not talk.end:
                    self.asking.append(talk)
                    length = len(talk.prompt_ids) + len(talk.ids)
                    self.waiting.lengths[self.players.index(talk)] = length
        self.playing = [(turn, talk) for turn, talk in self.playing if not turn.is_read]

    def completions(self) -> list[Completion]:
        self._read_unread()
        self.unread = None
        while last := [talk for talk in self.talks if talk.answer]:
            settled([talk.answer for talk in last if talk.answer], self.pulse)
            for talk in last:
                talk.hear(self.world)
        return self.finished()

    def finished(self) -> list[Completion]:
        for talk in self.talks[len(self.done) :]:
            if talk.completion is None:
                break
            self.done.append(talk.completion)
        return self.done

    @property
    def all_done(self) -> bool:
        return len(self.done) == len(self.talks)


def distinct(prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Prompts without repetition, and which of them each one is."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts]
    return [list(ids) for ids in numbers], rows


class Conversations(Sampler):
    """The sampler of conversations: see `Sampler`."""

    def __init__(self, plain: Sampler, world: World) -> None:
        super().__init__(plain.sample_batch, plain.stop, plain.memory, plain.pulse)
        self.world = world

    def sample(
        self, work: Callable[[], list[Completion]], most: Callable[[], int]
    ) -> list[Completion]:
        try:
            completions = super().sample(work, most)
        except BaseException:  # also when the run is stopped: nobody waits for them
            self.world.environments.stop()
            raise
        self.world.tell()
        return completions

    def alike(self, asked: Asked) -> int:
        return 1

    def begin(
        self, policy: nn.Module, asked: Asked, chunk: range, places: int
    ) -> tuple[Reader, Batch]:
        talks = self.open(asked, chunk)
        reader = TurnReader(self.world, talks, places, asked.how.max_tokens, self.sign)
        if not reader.players:
            return reader, nothing(reader)
        given = policy, reader.prompts, reader.prompt_of, reader.keys, asked.how, reader
        return reader, self.sample_batch(*given)

    def open(self, asked: Asked, chunk: range) -> list[Talk]:
        """The conversations of completions n of `chunk`, each with an environment of its own."""
        talks: list[Talk] = []
        for n in chunk:
            key, how = asked.keys[n], asked.how
            instance = self.world.environments.make(int(key[0]) << 32 | int(key[1]))
            question = asked.questions[n // asked.group]
            talks.append(Talk(instance, question, key, how.max_tokens, how.longest))
            talks[-1].answer = instance.begin(question)
        settled([talk.answer for talk in talks if talk.answer], self.sign)
        for talk in talks:
            talk.open(self.world)
        return talks

    def sign(self) -> None:
        """Of life, while environments are waited for."""
        self.pulse("sampling")


def nothing(reader: Reader) -> Batch:
    """No environment could begin."""
    yield from ()
    return reader.completions()


def conversations(
    plain: Sampler, a: Settings, tokenizer: Tokenizer, environments: Environments
) -> Conversations:
    """The sampler of conversations for these settings.

    Raises:
        UserError: a chat template without turns.
    """
    template = TurnTemplate(tokenizer, template_options(tokenizer, a), a.tool_schemas)
    if template.rewrites():
        say(
            "warning   the chat template writes earlier turns in another way than they were "
            "sampled (without thoughts, or their opening): training keeps what was sampled"
        )
    prefix = tokenizer.encode(a.reasoning_prefix, add_special_tokens=False)
    return Conversations(plain, World(a, tokenizer, template, environments, plain.stop, prefix))
