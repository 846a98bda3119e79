"""Where a completion ends, by its tokens and the text that they make, and who looks for it when."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..data.completion import Completion
from ..data.tokenizer import Tokenizer
from .caches import Waiting


class StopRule:
    """Decides on the host where a completion ends: at an EOS token, or within a stop string.

    `prefix` is the text that completions begin with, which was given and not sampled.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], prefix: str = "") -> None:
        self.tokenizer, self.prefix = tokenizer, prefix
        self.eos_ids = set(tokenizer.eos_token_ids)
        self.stop_strings = stop_strings
        # A stop string of n bytes can't be spread over more than n tokens.
        self.reach = max((len(s.encode()) for s in stop_strings), default=0)
        self.last_characters = {s[-1] for s in stop_strings}
        self.may_end: dict[int, bool] = {}  # token -> whether it has one of them

    def length(self, ids: list[int], checked: int) -> int | None:
        """How many of `ids` to keep if they reach an end; the first `checked` hold none."""
        ends = [n for n, token in enumerate(ids[checked:], checked + 1) if token in self.eos_ids]
        limit = ends[0] if ends else len(ids)
        start = max(0, checked - self.reach)
        if any(map(self._may_end, ids[checked:limit])) and self._stops(ids[start:limit]):
            return next(n for n in range(checked + 1, limit + 1) if self._stops(ids[start:n]))
        return limit if ends else None

    def _may_end(self, token: int) -> bool:
        """False if no stop string can be complete with this token: spares decoding most rows."""
        if token not in self.may_end:
            text = self.tokenizer.decode([token])
            unclear = "\ufffd" in text or any(c.isspace() for c in self.last_characters)
            self.may_end[token] = unclear or not self.last_characters.isdisjoint(text)
        return self.may_end[token]

    def _stops(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids) if self.stop_strings else ""
        return any(stop in text for stop in self.stop_strings)

    def text(self, ids: list[int]) -> str:
        """What was said: without the EOS token, cut right after the first stop string."""
        text = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)
        cuts = [text.index(s) + len(s) for s in self.stop_strings if s in text]
        return text[: min(cuts)] if cuts else text


def block_steps() -> int:
    """Decode steps between looks at the tokens on the host.

    A look costs a GPU more than a few steps of rows that have ended; a CPU pays as much for such
    rows as for any other.
    """
    return 2 if mx.default_device() == mx.cpu else 8


@dataclass(eq=False)
class Turn:
    """A completion, or a turn of one, that is being sampled, for so many steps that are `left`."""

    limit: int
    left: int = field(init=False)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self.left = self.limit

    @property
    def is_read(self) -> bool:
        """Whether all that it will ever be has been read."""
        return self.ended or len(self.ids) >= self.limit

    @property
    def over(self) -> bool:
        """Whether nothing more is sampled for it; the last of it may still be unread."""
        return self.ended or self.left <= 0


class Reader:
    """Reads sampled tokens, one block behind the device, which so never waits, into `count`
    completions of up to `max_tokens`, of which so many at once are sampled as there are `places`.
    """

    waiting: Waiting | None = None  # rows that leave and come back

    def __init__(self, stop: StopRule, count: int, places: int, max_tokens: int) -> None:
        self.stop, self.places, self.block = stop, places, block_steps()
        self.rows = [Turn(max_tokens) for _ in range(count)]
        self.begun = 0
        self.live: list[Turn] = []
        self.unread: tuple[list[Turn], mx.array, mx.array] | None = None
        self.done: list[Completion] = []

    def next(self) -> list[int]:
        """The numbers of the completions that take the free places, if any are left to begin."""
        first = self.begun
        self.begun = min(len(self.rows), first + self.places - len(self.live))
        self.live += self.rows[first : self.begun]
        return list(range(first, self.begun))

    def steps(self) -> range:
        """The next block; empty when all is sampled."""
        return range(min(self.block, max((row.left for row in self.live), default=0)))

    def read(self, block: Sequence[tuple[mx.array, mx.array]], part_to_leave: float) -> list[int]:
        """Take a block of (B,) tokens and their (B,) log-probs, and read the one before.

        Returns the indices of the rows that stay in the batch; none if all have ended. Rows leave
        once this part of it has ended, and at once when they have had their time, as their places
        in the cache are the oldest.
        """
        columns = zip(*block, strict=True)
        ids, logprobs = (mx.stack(list(column), axis=1) for column in columns)  # (B, K)
        mx.async_eval(ids, logprobs)  # now: later it would queue behind the next block
        self._read_unread()
        self.unread = list(self.live), ids, logprobs
        for row in self.live:
            row.left -= len(block)
        going = [i for i, row in enumerate(self.live) if not row.over]
        late = any(row.left <= 0 for row in self.live)
        if not late and len(going) > len(self.live) * (1 - part_to_leave):
            return list(range(len(self.live)))
        self.live = [self.live[i] for i in going]
        return going

    def completions(self) -> list[Completion]:
        """Read the last block. What has not ended by itself has ended by its length."""
        self._read_unread()
        self.unread = None
        return self.finished()

    def finished(self) -> list[Completion]:
        """The completions that are done, in order, up to the first that is not."""
        for row in self.rows[len(self.done) :]:
            if not row.is_read:
                break
            self.done.append(self._completion(row))
        return self.done

    @property
    def all_done(self) -> bool:
        return len(self.done) == len(self.rows)

    def _completion(self, row: Turn) -> Completion:
        return Completion(
            row.ids,
            row.logprobs,
            mask=[1] * len(row.ids),
            finish_reason="stop" if row.ended else "length",
            text=self.stop.prefix + self.stop.text(row.ids),
        )

    def _read_unread(self) -> None:
        if self.unread is None:
            return
        live, ids, logprobs = self.unread
        new_ids: list[list[int]] = ids.tolist()  # type: ignore[assignment]
        new_logprobs: list[list[float]] = logprobs.tolist()  # type: ignore[assignment]
        for row, new, new_values in zip(live, new_ids, new_logprobs, strict=True):
            if row.ended:
                continue
            checked = len(row.ids)
            row.ids += new[: row.limit - checked]
            row.logprobs += new_values[: row.limit - checked]
            end = self.stop.length(row.ids, checked)
            if end is not None:
                del row.ids[end:], row.logprobs[end:]
                row.ended = True
