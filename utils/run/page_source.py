"""What a page shows of a run, read from its folder: log, settings, completions.

Numbers go into columns, texts into compressed chunks that a page decodes when it shows them.
"""

import contextlib
import functools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..base.errors import UserError
from ..base.text import Json, redacted
from . import completions
from .completions import Group, Kept
from .ours import CONFIG, LOG, PROVENANCE
from .trackers import Record, as_record

CHUNK = 200_000  # characters of text in a chunk: what is decoded to show one group
OWN_PLACE = ("resumed", "rewards")  # of what provenance.json says
RIGHT = {False: 0, True: 1, None: 2}
REMEMBERED = 300  # bytes of the log, by which it is known again
OF_TOKENS = {"ids", "pieces", "sampled_logprobs", "trained_logprobs", "mask"}
OF_GROUP = frozenset(Group.__annotations__)
OF_KEPT = frozenset(Kept.__annotations__) - OF_TOKENS
SPREAD = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, fill the interval evenly


@dataclass
class Source:
    """A run's folder; `refresh` reads what was added to it since."""

    folder: Path
    name: str
    log: list[Record] = field(default_factory=list)
    lines: int = 0
    """Of the log, so far."""
    place: int = 0
    """Bytes of the log that were read."""
    before: bytes = b""
    """The last of them."""
    bad_lines: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    damaged_files: list[str] = field(default_factory=list)
    settings: Record = field(default_factory=dict)
    provenance: Record = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path) -> "Source":
        """Raises UserError: it is no folder of a run."""
        if not folder.is_dir():
            kind = "is no folder" if folder.exists() else "is not there"
            raise UserError(f"{folder} {kind}: name the output_dir of a run, as outputs/tiny-math")
        if not any((folder / name).exists() for name in (LOG, CONFIG, "completions")):
            raise UserError(
                f"{folder} is no run's folder: it holds neither {LOG} nor {CONFIG}. Name the "
                "output_dir of a run, as outputs/tiny-math"
            )
        source = cls(folder, folder.resolve().name)
        source.refresh()
        return source

    def refresh(self) -> None:
        """Read what was added to the log, all of it where it was cut; settings and provenance."""
        self.damaged = []
        self.settings = self.object(CONFIG)
        self.provenance = self.object(PROVENANCE)
        path = self.folder / LOG
        try:
            with path.open("rb") if path.is_file() else BytesIO() as file:
                self.read_on(file)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def read_on(self, file: BinaryIO) -> None:
        """Whole lines from where the last look ended, if what stands before that is the same."""
        file.seek(max(self.place - len(self.before), 0))
        if file.read(len(self.before)) != self.before:
            self.log, self.bad_lines = [], []
            self.lines, self.place, self.before = 0, 0, b""
            file.seek(0)
        text = file.read()
        *whole, unfinished = text.split(b"\n")
        for line in whole:
            self.lines += 1
            if (record := as_record(line)) is not None:
                self.log.append(record)
            elif line.strip():
                self.bad_lines.append(f"line {self.lines} of {LOG} cannot be read")
        read = text[: len(text) - len(unfinished)]
        self.place += len(read)
        self.before = (self.before + read)[-REMEMBERED:]

    @property
    def prefix(self) -> str:
        """What every completion's text begins with, without having been sampled."""
        return str(self.settings.get("reasoning_prefix", ""))

    def spans(self) -> list[Path]:
        """Files that hold completions, in the order in which they were written."""
        return completions.span_files(self.folder / completions.FOLDER, completions.GROUPS)

    def read(self, path: Path, tokens: bool) -> Iterator[Group]:
        """The groups of one of these files."""
        try:
            for group in completions.read_span(path, tokens, self.note_damage):
                check(group)
                yield group
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            self.note_damage(path, f"it is not as this version writes it ({error!r})")

    def token_lines(self, path: Path) -> completions.TokenLines:
        """What is known of the tokens of the groups of one of these files."""
        return completions.TokenLines(completions.beside(path), self.note_damage)

    def with_tokens(
        self, path: Path, lines: completions.TokenLines, groups: Sequence[tuple[int, Group]]
    ) -> Iterator[Group]:
        """Numbered groups, with what the lines know of their tokens."""
        try:
            yield from completions.with_tokens(lines, groups)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            self.note_damage(path, f"its tokens are not as this version writes them ({error!r})")

    def note_damage(self, path: Path, how: str) -> None:
        """Once, however often the file is read."""
        text = f"{path.parent.name}/{path.name} is damaged: {how}"
        if text not in self.damaged_files:
            self.damaged_files.append(text)

    def all_damage(self) -> list[str]:
        return [*self.damaged, *self.bad_lines, *self.damaged_files]

    def object(self, name: str) -> Record:
        """A JSON file of the folder; empty, and that is said, where it can't be read."""
        path = self.folder / name
        try:
            value = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
        self.damaged.append(f"{name} cannot be read")
        return {}

    def facts(self, since: int = 0) -> Record:
        """All that the page is told of the run but its completions; of the training records those
        from `since` on."""
        records = [r for r in self.log if "split" not in r]
        names = [name for name in dict.fromkeys(chain(*records)) if name != "notes"]
        facts = {
            "name": self.name,
            "folder": str(self.folder),
            "settings": self.settings,
            "versions": {k: v for k, v in self.provenance.items() if k not in OWN_PLACE},
            "rewards_say": self.rewards_say(),
            "finished": (self.folder / "final").is_dir(),
            "evaluations": [evaluation(r) for r in self.log if "split" in r],
            "marks": [*self.marks(records)],
            "damaged": self.all_damage(),
        }
        rows = [numbers(record, names) for record in records[since:]]
        return {**redacted(facts), "figures": names, "since": since, "records": rows}

    def rewards_say(self) -> dict[str, str]:
        """What reward functions say of themselves; runs of earlier versions did not note it."""
        said = self.provenance.get("rewards")
        return said if isinstance(said, dict) else {}

    def marks(self, records: list[Record]) -> Iterator[Record]:
        """Notes of the log (warnings of learning, memory that ran out) and resumptions."""
        for record in records:
            for note in listed(record.get("notes")):
                yield {"update": record["update"], "kind": "note", "text": str(note)}
        for resumed in listed(self.provenance.get("resumed")):
            if isinstance(resumed, dict) and isinstance(resumed.get("update"), int):
                text = f"resumed from {resumed.get('from')}"
                if changed := resumed.get("changed"):
                    text += f", with other settings: {', '.join(changed)}"
                yield {"update": resumed["update"], "kind": "resume", "text": text}


def check(group: Group) -> None:
    """Raises KeyError where a group lacks something."""
    missing = OF_GROUP.difference(group)
    for own in group["completions"]:
        missing |= OF_KEPT.difference(own)
    for name in missing:
        raise KeyError(name)


def listed(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def evaluation(record: Record) -> Record:
    """What of its record is shown, with None for what is not known."""
    size = record.get("em_subset")
    return {
        "update": record["update"],
        "split": str(record["split"]),
        "em": number(record.get("em")) if isinstance(size, int) and size > 0 else None,
        "em_subset": size,
    }


def numbers(record: Record, names: list[str]) -> list[float | None]:
    return [number(record.get(name)) for name in names]


def number(value: Json) -> float | None:
    """A finite number with the digits that a curve shows."""
    if type(value) is float:
        return shortened(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else shortened(float(value))


@functools.lru_cache(maxsize=10_000)  # rewards are few numbers, again and again
def shortened(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def chosen(number: int, share: float) -> bool:
    """Whether a thing belongs to a share of all: those that do are spread evenly."""
    return number * SPREAD % 1 < share


def columns(*names: str) -> Callable[[], dict[str, list]]:
    return lambda: {name: [] for name in names}


@dataclass
class Shelf:
    """Completions of a run: columns of numbers about all, chunks of the texts of a share of the
    groups, and of what is known of each token of a share of those."""

    share: float = 1.0
    groups: dict[str, list] = field(
        default_factory=columns("update", "set", "prompt", "size", "chunk", "place", "tokens")
    )
    numbers: dict[str, list] = field(
        default_factory=columns("reward", "advantage", "length", "finish", "correct")
    )
    rewards: dict[str, list] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    """Compressed."""
    tokens: dict[int, bytes] = field(default_factory=dict)
    """Compressed, by the chunk of the texts."""
    members: list[range] = field(default_factory=list)
    """The groups among which those of each chunk are."""
    spans: dict[Path, int] = field(default_factory=dict)
    """The first group of each file."""
    chunks: dict[Path, range] = field(default_factory=dict)
    """Those of each file."""
    begun: int = 0
    """The first group that may belong to the next chunk."""
    text_size: int = 0
    assumed: int = 0
    """Whether groups are taken to have tokens as long as nobody has looked."""
    level: int = 6
    """Of compression, from 1 to 9."""
    most: float = math.inf
    """Bytes of texts; beyond, they are only measured."""
    waiting: list[Json] = field(default_factory=list)
    waiting_size: int = 0

    def __len__(self) -> int:
        return len(self.groups["update"])

    def add_span(self, path: Path, groups: Iterable[Group]) -> None:
        """All of a file, or what was added to it: no chunk is of two files."""
        self.begun = len(self)
        self.spans.setdefault(path, len(self))
        first = self.chunks.get(path, range(len(self.texts), 0)).start
        for group in groups:
            self.add(group)
        self.pack()
        self.chunks[path] = range(first, len(self.texts))

    def add(self, group: Group) -> None:
        kept, has_text = group["completions"], chosen(len(self), self.share)
        kind = set_of(group["kind"], group["split"])
        values = {
            "update": group["update"],
            "set": position(self.sets, kind),
            "prompt": group["prompt_index"],
            "size": len(kept),
            "chunk": len(self.texts) if has_text else -1,
            "place": len(self.waiting) if has_text else -1,
            "tokens": self.assumed,
        }
        for name, value in values.items():
            self.groups[name].append(value)
        self.count(kept)
        if has_text:
            self.waiting.append(texts_of(group))
            self.waiting_size += len(group["prompt"]) + sum(len(c["text"]) for c in kept) + 100
        if self.waiting_size > CHUNK:
            self.pack()

    def count(self, kept: Sequence[Kept]) -> None:
        """The numbers of a group."""
        columns, before = self.numbers, len(self.numbers["reward"])
        columns["reward"] += [number(c["reward"]) for c in kept]
        columns["advantage"] += [number(c["advantage"]) for c in kept]
        columns["length"] += [c["length"] for c in kept]
        columns["finish"] += [position(self.finishes, c["finish_reason"]) for c in kept]
        columns["correct"] += [RIGHT[c["correct"]] for c in kept]
        for name in dict.fromkeys(chain.from_iterable(c["rewards"] for c in kept)):
            self.rewards.setdefault(name, [None] * before)
        for name, column in self.rewards.items():
            column += [number(c["rewards"].get(name)) for c in kept]

    def pack(self) -> None:
        """Close the chunk that is being filled."""
        if not self.waiting:
            return
        part = packed(self.waiting, self.level)
        self.text_size += len(part)
        self.texts.append(part if self.text_size <= self.most else b"")
        self.members.append(range(self.begun, len(self)))
        self.begun, self.waiting, self.waiting_size = len(self), [], 0

    def token_chunk(self, chunk: int, groups: Iterator[Group], prefix: str, share: float) -> bytes:
        """What is known of the tokens of its groups, which come first among `groups`; empty where
        that is nothing."""
        found: list[Json] = []
        for n, group in zip(self.members[chunk], groups, strict=False):
            if self.groups["chunk"][n] == chunk:
                own = [tokens_of(c, prefix) for c in group["completions"]]
                known = any(own) and chosen(len(found), share)
                self.groups["tokens"][n] = int(known)
                found.append(own if known else None)
        return packed(found, self.level) if any(found) else b""

    def forget_tokens(self, chunks: Iterable[int]) -> None:
        """Those of some chunks are not kept."""
        for chunk in chunks:
            for group in self.members[chunk]:
                self.groups["tokens"][group] = 0

    def facts(self, since: int = 0) -> Record:
        """The columns from group `since` on."""
        first = sum(self.groups["size"][:since])
        return {
            "since": since,
            "groups": {name: column[since:] for name, column in self.groups.items()},
            "numbers": {name: column[first:] for name, column in self.numbers.items()},
            "rewards": {name: column[first:] for name, column in self.rewards.items()},
            "sets": self.sets,
            "finishes": self.finishes,
        }


def set_of(kind: str, split: str | None) -> str:
    """What a group belongs to: train, or the evaluations on a split."""
    return kind if split is None else f"{kind} {split}"


def position(names: list[str], name: str) -> int:
    """Where a name stands in a list, which gets it if it is new."""
    if name not in names:
        names.append(name)
    return names.index(name)


def packed(value: Json, level: int = 6) -> bytes:
    """JSON, compressed as a browser's DecompressionStream("gzip") reads it."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31)
    return compressor.compress(as_json(value).encode()) + compressor.flush()


def as_json(value: Json) -> str:
    """In ASCII, so that half a surrogate pair can be in it; what is no number is a text."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(with_finite_numbers(value), separators=(",", ":"))


def with_finite_numbers(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: with_finite_numbers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_finite_numbers(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def texts_of(group: Group) -> Record:
    return {
        "prompt": group["prompt"],
        "question": group["question"],
        "answer": group["answer"],
        "completions": [
            {
                "text": c["text"],
                "parsed": c["parsed"],
                **({"messages": c["messages"]} if c["messages"] else {}),
                **({"images": c["images"]} if c["images"] else {}),
            }
            for c in group["completions"]
        ],
    }


def tokens_of(completion: Kept, prefix: str) -> Record | None:
    """Where in the text each token stands, and how probable it was; None where that is not kept.

    Log-probs in hundredths, without the sign; what the trained policy's differ by in thousandths.
    """
    pieces, sampled = completion["pieces"], completion["sampled_logprobs"]
    if not pieces:
        return None
    record: Record = {"p": parts(sampled, -100, 9900)}
    text, joined = completion["text"], "".join(pieces)
    start = place_of(joined, text, prefix)
    if start is None:  # a character that is spread over several tokens, a cut that is not the end
        record["pieces"] = pieces
    else:
        size = len if joined.isascii() else units
        record |= {"start": units(text[:start]), "sizes": [*map(size, pieces)]}
        record["rest"] = joined[len(text) - start :]
    if (trained := completion["trained_logprobs"]) is not None:
        differences = [a - b for a, b in zip(trained, sampled, strict=True)]
        record["d"] = parts(differences, 1000, 30_000, unknown=0)
    if not all(completion["mask"]):
        record["mask"] = completion["mask"]
    return record


def place_of(joined: str, text: str, prefix: str) -> int | None:
    """Where in `text` the sampled tokens begin: it may begin with what was given, and end before
    the last token does."""
    for start in (len(prefix), 0):
        if text[:start] == prefix[:start] and joined.startswith(text[start:]):
            return start
    return None


def units(text: str) -> int:
    """Its length as JavaScript counts it."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def parts(values: Sequence[float], each: int, most: int, unknown: int | None = None) -> list[int]:
    """Numbers as whole parts of one, `most` at most; `unknown` (most) for what is no number."""
    with contextlib.suppress(ValueError, OverflowError):  # of what is no number, or infinite
        scaled = [round(value * each) for value in values]
        if not scaled or -most <= min(scaled) <= max(scaled) <= most:
            return scaled
    nan = most if unknown is None else unknown
    scaled = np.nan_to_num(np.asarray(values, float) * each, nan=nan)
    return np.rint(scaled.clip(-most, most)).astype(int).tolist()
