"""One HTML file that shows runs: curves, every completion, questions over time, runs compared.

It holds all it needs (styles, scripts, numbers, texts in compressed chunks), and its content
security policy forbids everything else: no network, no script but those that are here.
"""

import base64
import hashlib
import html
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from ..base.errors import UserError, disk_errors_named
from ..base.text import Json, visible
from . import ours
from .completions import Group
from .page_sample import Numbered, Sample, spread, taken
from .page_source import Record, Shelf, Source, packed

ASSETS = Path(__file__).resolve().parent / "page_assets"
STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = (
    *("uPlot.iife.min.js", "text.js", "data.js", "curves.js", "rollouts.js"),
    *("questions.js", "compare.js", "start.js"),
)
LIMIT = 30_000_000  # bytes of a file
FOR_TEXT = 0.7  # of the room at most: the rest is for tokens
CAUTION = 0.95  # chunks are not all of one size, and stand in elements
BASE64 = 4 / 3
QUICK, THOROUGH = 2, 6  # levels of compression
# Parts of a limited time after which looking into files, reading, packing what was read (it takes
# about as long) and adding tokens should be over.
FOR_LOOKING, FOR_READING, FOR_PACKING, FOR_TOKENS = 0.1, 0.35, 0.6, 0.9


@dataclass
class Room:
    """What a page may take: bytes, and time."""

    size: int = LIMIT
    limited: bool = False
    is_over: Callable[[float], bool] = lambda share: False
    """Whether so much of the time is, if that is limited: what was not read by then is left out."""


@dataclass
class Kept:
    """Of a run's completions, what a page holds."""

    shelf: Shelf
    sample: Sample
    """What there was time to read; `whole`: all."""
    tokens: float
    """Of the groups with a text, the share of which each token is known, where it was kept."""

    def told(self) -> Record:
        sample = self.sample
        told: Record = {"text": self.shelf.share, "tokens": self.tokens, "whole": sample.whole}
        if not sample.whole:
            told |= {"completions": sample.completions, "updates": sample.updates}
            told |= {"evaluations": sample.evaluations}
        return told


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def policy(scripts: Sequence[str], styles: Sequence[str], connect: str) -> str:
    """Only these scripts and styles, by their hashes, so that no text on the page can be one."""

    def hashes(texts: Sequence[str]) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{encoded(digest)}'" for digest in digests)

    parts = {
        "default-src": "'none'",
        "script-src": hashes(scripts),
        "style-src": hashes(styles),
        "connect-src": connect,
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def document(title: str, data: Json, connect: str = "'none'") -> tuple[str, str]:
    """A page up to its data, and its end: chunks stand between, after the scripts, so that curves
    are seen before a browser has read 30 MB."""
    styles = ["\n".join(map(asset, STYLES))]
    scripts = [asset(name) for name in SCRIPTS]
    security = html.escape(policy(scripts, styles, connect))
    head = [
        f"{ours.PAGE_OPENING}\n<html lang=en>\n<head>\n<meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{security}">',
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        '<meta name=color-scheme content="light dark">',
        f"<title>{html.escape(visible(title))}</title>",
        f"<style>{styles[0]}</style>\n</head>\n<body>\n{asset('page.html')}",
        f'<script type="text/plain" id=data>{encoded(packed(data)) if data else ""}</script>',
        f"<!-- The plots are uPlot's, which is under\n{asset('uPlot.LICENSE')}-->",
        *(f"<script>{script}</script>" for script in scripts),
    ]
    return "\n".join(head) + "\n", "</body>\n</html>\n"


def title_of(sources: Sequence[Source]) -> str:
    return f"MLX-GRPO: {', '.join(source.name for source in sources)}"


def write(path: Path, sources: Sequence[Source], room: Room | None = None) -> list[Kept]:
    """Write the page in one piece.

    Raises:
        UserError: something that is no page stands there.
        DiskError: it cannot be written; what stood there still does.
    """
    room = room or Room()
    refuse_to_replace(path)
    each = replace(room, size=(room.size - size_without(sources)) // len(sources))
    kept = [within(source, each) for source in sources]
    told = [
        {**source.facts(), "completions": own.shelf.facts(), "kept": own.told()}
        for source, own in zip(sources, kept, strict=True)
    ]
    start, end = document(title_of(sources), {"runs": told})
    with disk_errors_named(path), written_aside(Path(os.path.realpath(path))) as file:
        file.write(start)
        for number, own in enumerate(kept):
            file.writelines(chunks(number, own.shelf))
        file.write(end)
    return kept


def size_without(sources: Sequence[Source]) -> int:
    """Bytes of a page without completions."""
    data = {"runs": [source.facts() for source in sources]}
    return sum(len(part.encode()) for part in document(title_of(sources), data))


@contextmanager
def written_aside(path: Path) -> Iterator[TextIO]:
    """A file that takes the name `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def chunks(run: int, shelf: Shelf) -> Iterator[str]:
    """Elements that hold the chunks, by which the page finds them."""
    for kind, parts in (("text", dict(enumerate(shelf.texts))), ("tokens", shelf.tokens)):
        for number, part in parts.items():
            if part:
                name = f"{kind}-{run}-{number}"
                yield f'<script type="text/plain" id={name}>{encoded(part)}</script>\n'


def refuse_to_replace(path: Path) -> None:
    """Raises UserError where something stands that is no page of ours."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file, such as -o {path / ours.PAGE}")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.exists() and not (ours.is_page(path) or ours.empty(path)):
        raise UserError(f"{path} exists and is no page of this command: name another file by -o")


def within(source: Source, room: Room) -> Kept:
    """A run's completions, in as much room as there is: where they are too many, texts and tokens
    of a share of the groups, evenly over the run. The numbers of all stay."""
    left, sample = room.size / BASE64, Sample()
    spans: Iterable[tuple[Path, Iterable[Group]]] = streamed(source)
    if room.limited:
        sample = taken(source, room.is_over, FOR_LOOKING, FOR_READING)
        spans = [(path, [group for _, group in own]) for path, own in sample.groups.items()]
    level = QUICK if room.limited else THOROUGH
    shelf = shelved(spans, Shelf(most=left, level=level))
    left -= len(packed(shelf.facts()))
    if shelf.text_size > FOR_TEXT * left:
        share = max(FOR_TEXT * left / shelf.text_size, 0) * CAUTION
        again = spans if room.limited else streamed(source)
        shelf = shelved(again, Shelf(share, most=left, level=level))
    most = CAUTION * left - shelf.text_size
    return Kept(shelf, sample, with_tokens(Tokens(source, shelf, room, sample.groups), most))


def shelved(spans: Iterable[tuple[Path, Iterable[Group]]], shelf: Shelf) -> Shelf:
    for path, groups in spans:
        shelf.add_span(path, groups)
    return shelf


def streamed(source: Source) -> Iterator[tuple[Path, Iterator[Group]]]:
    """All, one at a time: there may be more than memory holds."""
    return ((path, source.read(path, tokens=False)) for path in source.spans())


@dataclass
class Tokens:
    """What is known of the tokens of a run's completions, chunk by chunk as its texts are."""

    source: Source
    shelf: Shelf
    room: Room
    read: dict[Path, Numbered]
    """Groups of which nothing else need be read."""
    seen: int = 0

    def chunks(self, path: Path, share: float) -> Iterator[tuple[int, bytes]]:
        """Of a file. Where time is short some are left out, here and there, so that those that are
        left are from the whole run."""
        lines, prefix = self.source.token_lines(path), self.source.prefix
        groups = None if path in self.read else self.source.read(path, tokens=True)
        for chunk in self.shelf.chunks[path]:
            self.seen += 1
            part = min(self.seen / max(len(self.shelf.texts), 1), 1.0)
            if self.room.is_over(FOR_PACKING + (FOR_TOKENS - FOR_PACKING) * part):
                continue
            own = groups or self.source.with_tokens(path, lines, self.numbered(path, chunk))
            yield chunk, self.shelf.token_chunk(chunk, own, prefix, share)

    def numbered(self, path: Path, chunk: int) -> Numbered:
        """The groups among which those of a chunk are."""
        members, first = self.shelf.members[chunk], self.shelf.spans[path]
        return self.read[path][members.start - first : members.stop - first]


def with_tokens(tokens: Tokens, most: float) -> float:
    """Add what is known of the tokens, of as many groups as there is room for; their share."""
    shelf = tokens.shelf
    share, size, order = 1.0, 0, spread([*shelf.spans])
    for path in order:
        made = dict(tokens.chunks(path, share))
        if path == order[0] and (fits := most / estimated(shelf, made)) < 1:
            share = max(fits, 0) * CAUTION
            made = dict(tokens.chunks(path, share))
        size += sum(map(len, made.values()))
        if size > most:
            shelf.forget_tokens(made)
            break
        shelf.tokens |= made
    return share * len(shelf.tokens) / max(len(shelf.texts), 1)


def estimated(shelf: Shelf, made: dict[int, bytes]) -> float:
    """Bytes of the tokens of all files, if they are as those `made` of one."""
    groups = sum(len(shelf.members[n]) for n in made)
    return max(1, sum(map(len, made.values())) * len(shelf) / max(groups, 1))
