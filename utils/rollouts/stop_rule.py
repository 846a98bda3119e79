"""Where a completion ends, by its tokens and the text that they make, and who looks for it when."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class StopRule:
    """Decides on the host where a completion ends: at an EOS token, or within a stop string."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
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
        """What rewards read: without the EOS token, cut right after the first stop string."""
        text = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)
        cuts = [text.index(s) + len(s) for s in self.stop_strings if s in text]
        return text[: min(cuts)] if cuts else text


def block_steps() -> int:
    """Decode steps between looks at the tokens on the host.

    A look costs a GPU more than a few steps of rows that have ended; a CPU pays as much for such
    rows as for any other.
    """
    return 2 if mx.default_device() == mx.cpu else 8


class Reader:
    """Reads sampled tokens into completions, one block behind the device, which so never waits.

    Rows leave the batch once this `part_to_leave` of it has ended.
    """

    def __init__(self, stop: StopRule, completions: Sequence[Any], part_to_leave: float) -> None:
        self.stop, self.part_to_leave, self.block = stop, part_to_leave, block_steps()
        self.completions = self.live = list(completions)
        self.unread: tuple[list[Any], Any, Any] | None = None

    def read(self, block: Sequence[tuple[Any, Any]]) -> list[int]:
        """Take a block of (B,) tokens and their (B,) log-probs, and read the one before.

        Returns the indices of the rows that stay in the batch; none if all have ended.
        """
        columns = zip(*block, strict=True)
        ids, logprobs = (mx.stack(list(column), axis=1) for column in columns)  # (B, K)
        mx.async_eval(ids, logprobs)  # now: later it would queue behind the next block
        self._read_unread()
        self.unread = self.live, ids, logprobs
        going = [i for i, completion in enumerate(self.live) if not completion.finish_reason]
        if len(going) > len(self.live) * (1 - self.part_to_leave):
            return list(range(len(self.live)))
        self.live = [self.live[i] for i in going]
        return going

    def finish(self) -> None:
        """Read the last block; what has not ended by itself ends by its length."""
        self._read_unread()
        for completion in self.completions:
            completion.finish_reason = completion.finish_reason or "length"
            completion.text = self.stop.text(completion.ids)

    def _read_unread(self) -> None:
        if self.unread is None:
            return
        live, ids, logprobs = self.unread
        for completion, new, new_logprobs in zip(
            live, ids.tolist(), logprobs.tolist(), strict=True
        ):
            if completion.finish_reason:
                continue
            checked = len(completion.ids)
            completion.ids += new
            completion.logprobs += new_logprobs
            end = self.stop.length(completion.ids, checked)
            if end is not None:
                del completion.ids[end:], completion.logprobs[end:]
                completion.finish_reason = "stop"
