"""The page of a run, served to this machine alone: every text, and a run that goes on is followed.

Only GET, only on 127.0.0.1, and only where the request names this machine: a page elsewhere whose
host name was made to lead here (DNS rebinding) gets nothing.
"""

import gzip
import re
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ..base.errors import UserError
from ..base.say import say
from ..base.text import Json
from . import page
from .page_source import Record, Shelf, Source, as_json

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
PORT = 8765
PAUSE = 2.0  # seconds between two looks at a folder
AT_ONCE = 200  # groups that are read while no request is answered
CHUNK_NAME = re.compile(r"/chunk/(text|tokens)-(\d{1,6})-(\d{1,9})")


class Shown:
    """A run as it is served. A thread reads it, and goes on to read what the run adds."""

    def __init__(self, source: Source) -> None:
        self.source, self.version = source, 0
        self.shelf = Shelf(assumed=1, level=1)
        self.seen: object = None
        self.trouble = ""
        self.reading = True
        self.lock = threading.Lock()
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        while True:
            try:
                self.refresh()
                self.trouble = ""
            except (UserError, OSError) as error:
                self.trouble = str(error)
            self.reading = False
            time.sleep(PAUSE)

    def refresh(self) -> None:
        """Read what is new; all, where files are gone or a resumed run has cut one."""
        now = signature(self.source.folder)
        if now == self.seen:
            return
        with self.lock:
            had = self.source.log[-1:]
            count = len(self.source.log)
            self.source.refresh()
            self.version += self.source.log[count - 1 : count] != had
        while not self.read_on():
            with self.lock:
                self.shelf, self.version = Shelf(assumed=1, level=1), self.version + 1
        self.seen = now

    def read_on(self) -> bool:
        """Add the groups that the shelf has not; False where those that it has are not these."""
        paths, known = self.source.spans(), [*self.shelf.spans]
        if paths[: len(known)] != known:
            return False
        for path in paths[max(len(known) - 1, 0) :]:
            groups = self.source.read(path, tokens=False)
            had = len(self.shelf) - self.shelf.spans.get(path, len(self.shelf))
            *_, last = [None, *islice(groups, had)]
            if had and (last is None or (last["update"], last["prompt_index"]) != self.last()):
                return False
            while some := [*islice(groups, AT_ONCE)]:
                with self.lock:
                    self.shelf.add_span(path, some)
        return True

    def last(self) -> tuple[int, int]:
        groups = self.shelf.groups
        return groups["update"][-1], groups["prompt"][-1]

    def mark(self) -> str:
        """Differs whenever there is something new to be told."""
        seen = hash(str(self.seen)) & 0xFFFFFFFF
        return f"{self.version}.{len(self.shelf)}.{seen:x}.{self.reading:d}"

    def facts(self, since: int, records: int) -> Record:
        completions = self.shelf.facts(since)
        kept = {"text": 1, "tokens": 1, "whole": True}
        return {**self.source.facts(records), "completions": completions, "kept": kept}

    def chunk(self, kind: str, number: int) -> bytes:
        """Empty where there is none."""
        if number >= len(self.shelf.texts):
            return b""
        if kind == "text":
            return self.shelf.texts[number]
        if number not in self.shelf.tokens:
            path = next(p for p, numbers in self.shelf.chunks.items() if number in numbers)
            tokens = page.Tokens(self.source, self.shelf, page.Room(), {})
            self.shelf.tokens = dict(tokens.chunks(path, 1.0))  # of one file at a time
        return self.shelf.tokens[number]


def signature(folder: Path) -> object:
    """Changes with everything that a run writes and the page shows."""
    names = ("training_log.jsonl", "config.resolved.json", "provenance.json", "final")
    files = [*(folder / name for name in names), *sorted((folder / "completions").glob("*"))]
    return [(p.name, s.st_size, s.st_mtime_ns) for p in files if (s := stat_of(p))]


def stat_of(path: Path) -> Json:
    try:
        return path.stat()
    except OSError:
        return None


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "mlx-grpo", ""
    protocol_version = "HTTP/1.1"
    timeout = 60  # a connection that says nothing holds a thread no longer

    def __init__(self, runs: Sequence[Shown], html: bytes, *args: Json) -> None:
        self.runs, self.html = runs, html
        super().__init__(*args)

    def do_GET(self) -> None:
        try:
            self.get()
        except UserError as error:  # a file that cannot be read any more
            self.answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error}\n".encode(), "text/plain")

    def get(self) -> None:
        port = self.server.server_port  # type: ignore[attr-defined]
        own = {*(f"{name}:{port}" for name in NAMES), *(NAMES if port == 80 else ())}
        if self.headers.get("Host") not in own:
            text = f"This page is for this machine alone: http://{LOOPBACK}:{port}/\n"
            return self.answer(HTTPStatus.FORBIDDEN, text.encode(), "text/plain")
        url = urlsplit(self.path)
        if url.path == "/":
            return self.answer(HTTPStatus.OK, self.html, "text/html")
        if url.path == "/data":
            return self.data(parse_qs(url.query, keep_blank_values=True))
        if (match := CHUNK_NAME.fullmatch(url.path)) and int(match[2]) < len(self.runs):
            run = self.runs[int(match[2])]
            with run.lock:
                part = run.chunk(match[1], int(match[3]))
            if part:
                return self.answer(HTTPStatus.OK, part, "application/gzip")
        return self.answer(HTTPStatus.NOT_FOUND, b"There is no such page.\n", "text/plain")

    def data(self, query: dict[str, list[str]]) -> None:
        """What is new since what the page says it has; nothing (204) where nothing is."""
        had = query.get("version", [""])[0].split("_")
        told, marks = [], []
        for n, run in enumerate(self.runs):
            with run.lock:
                if run.trouble:
                    raise UserError(run.trouble)
                same = n < len(had) and had[n].partition(".")[0] == str(run.version)
                since, records = had_of(query, "since", n), had_of(query, "records", n)
                told.append(run.facts(since, records) if same else run.facts(0, 0))
                marks.append(run.mark())
        if marks == had:
            return self.answer(HTTPStatus.NO_CONTENT, b"", "text/plain")
        body = {
            "runs": told,
            "version": "_".join(marks),
            "reading": any(r.reading for r in self.runs),
        }
        compressed = gzip.compress(as_json(body).encode(), 1)
        return self.answer(HTTPStatus.OK, compressed, "application/json", encoding="gzip")

    def answer(self, status: HTTPStatus, body: bytes, kind: str, encoding: str = "") -> None:
        self.send_response(status)
        charset = "" if "gzip" in kind else "; charset=utf-8"
        headers = {
            "Content-Type": f"{kind}{charset}",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }
        headers |= {"Content-Encoding": encoding} if encoding else {}
        headers |= {} if status == HTTPStatus.NO_CONTENT else {"Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Json) -> None:
        """Requests are no news."""


def had_of(query: dict[str, list[str]], name: str, run: int) -> int:
    """How many groups or records of a run the page has."""
    counts = query.get(name, [""])[0].split(",")
    text = counts[run] if run < len(counts) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


class Server(ThreadingHTTPServer):
    daemon_threads = True  # a request in progress holds nobody up at the end

    def handle_error(self, request: Json, client_address: Json) -> None:
        """A browser that closes a connection is no error of ours; the rest is shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def made(sources: Sequence[Source], port: int | None) -> Server:
    """A server that listens.

    Raises:
        UserError: the port is taken.
    """
    runs = [Shown(source) for source in sources]
    start, end = page.document(page.title_of(sources), None, connect="'self'")
    handler = partial(Handler, runs, (start + end).encode())
    for wanted in [PORT, 0] if port is None else [port]:
        try:
            return Server((LOOPBACK, wanted), handler)
        except OSError as error:
            reason = error.strerror
    raise UserError(f"--port {port}: {reason}; leave it out for a free one")


def serve(sources: Sequence[Source], port: int | None) -> int:
    """Until Ctrl-C, which is how this ends well."""
    with made(sources, port) as server:
        say(f"http://{LOOPBACK}:{server.server_port}/   (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
    return 0
