"""Where a completion ends, by its tokens and the text that they make."""

from collections.abc import Sequence
from typing import Any


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
