"""A line between the ranks of a run, beside MLX's collectives: agreement, and signs of life.

MLX waits for ever for a rank that is stopped or cut off. So ranks meet here first, over TCP with
rank 0 in the middle. What one says, all get; when one ends, all hear it in the same order; a rank
that is silent for too long is lost, and the others end, even those that hang in a collective.
Messages are JSON behind their length.
"""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar

from ..base.errors import RunError, Signalled, UserError
from ..base.say import complain
from ..base.text import Json

T = TypeVar("T")
SHOW_AFTER = 5.0  # seconds before a person is told who is waited for
GRACE = 10.0  # seconds for a rank to end by itself, once another is lost
HEADER = struct.Struct("!Q")


class Stop(NamedTuple):
    """Why all ranks end: the first reason of any."""

    rank: int
    text: str
    signal: int = 0
    code: int = 1


def as_signal(number: int) -> NoReturn:
    raise Signalled(number)


class Peer:
    """A rank at the other end of a connection."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank, self.sock, self.sending = rank, sock, threading.Lock()
        self.left = False

    def send(self, message: Json) -> None:
        data = json.dumps(message).encode()
        with self.sending:
            self.sock.sendall(HEADER.pack(len(data)) + data)

    def receive(self) -> dict[str, Json]:
        (size,) = HEADER.unpack(self.exactly(HEADER.size))
        message = json.loads(self.exactly(size))
        if not isinstance(message, dict):
            raise ValueError("a message that no rank sends")
        return message

    def exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.sock.recv(min(size - len(data), 2**20))
            if not part:
                raise ConnectionError("closed")
            data += part
        return bytes(data)


class Link:
    """This rank's end of the line. `say` gets lines for a person.

    Raises:
        UserError: the ranks did not meet within `timeout` seconds, or were started differently.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: tuple[str, int],
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self.rank, self.size, self.timeout, self.say = rank, size, timeout, say
        self.changed = threading.Condition(threading.RLock())
        self.peers: dict[int, Peer] = {}
        self.count = 0  # of exchanges
        self.arrived: dict[int, dict[int, Json]] = {}  # exchange -> rank -> what it says
        self.stop: Stop | None = None
        self.wanted = False
        self.obeyed = self.closed = self.in_collective = False
        self.asked: Callable[[], int] = lambda: 0
        self.obey: Callable[[int], NoReturn] = as_signal
        until = time.monotonic() + timeout
        if rank == 0:
            self.accept(address, until)
        else:
            self.connect(address, until)
        for peer in self.peers.values():
            peer.sock.settimeout(timeout)
            for work in (self.read, self.beat):
                threading.Thread(target=work, args=[peer], daemon=True).start()

    # Meet.

    def accept(self, address: tuple[str, int], until: float) -> None:
        try:
            server = socket.create_server(address)
        except OSError as error:
            raise UserError(
                f"rank 0 cannot listen on {address[0]} port {address[1]}: {error.strerror}; is "
                "another run on it? choose another --starting-port of mlx.launch"
            ) from error
        told = time.monotonic() + SHOW_AFTER
        with server:
            server.settimeout(0.2)
            while missing := self.missing(self.peers):
                if time.monotonic() > min(told, until):
                    told = float("inf")
                    self.say(f"waiting   for {named(missing)}")
                if time.monotonic() > until:
                    raise UserError(
                        f"{named(missing)} did not come within {self.timeout:g} s "
                        "(rank_timeout): look at the machine, its network and its first lines"
                    )
                try:
                    sock, _ = server.accept()
                except TimeoutError:
                    continue
                self.welcome(sock)

    def missing(self, there: dict[int, T]) -> list[int]:
        return [rank for rank in range(1, self.size) if rank not in there]

    def welcome(self, sock: socket.socket) -> None:
        """Take a rank in; what else connects is left outside."""
        sock.settimeout(2.0)
        peer = Peer(0, sock)
        try:
            hello = peer.receive()
            rank = hello.get("rank")
            if hello.get("size") != self.size or rank not in self.missing(self.peers):
                raise ValueError("no rank of this run")
        except (OSError, ValueError):
            sock.close()
            return
        assert isinstance(rank, int)
        peer.rank = rank
        self.peers[rank] = peer

    def connect(self, address: tuple[str, int], until: float) -> None:
        while True:
            try:
                sock = socket.create_connection(address, timeout=2.0)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"rank {self.rank} cannot reach rank 0 at {address[0]} port {address[1]} "
                        f"within {self.timeout:g} s (rank_timeout): {error}"
                    ) from error
                time.sleep(0.1)
        peer = Peer(0, sock)
        peer.send({"rank": self.rank, "size": self.size})
        self.peers[0] = peer

    # In threads of their own.

    def beat(self, peer: Peer) -> None:
        """Signs of life."""
        while not (self.closed or peer.left):
            try:
                peer.send({"kind": "beat"})
            except OSError:
                return  # `read` tells why
            time.sleep(min(1.0, self.timeout / 4))

    def read(self, peer: Peer) -> None:
        try:
            while not peer.left:
                self.take(peer, peer.receive())
        except TimeoutError:
            self.lose(peer, f"has not been heard of for {self.timeout:g} s (rank_timeout)")
        except (OSError, ValueError) as error:
            self.lose(peer, f"is gone: its process ended, or the network did ({error})")

    def lose(self, peer: Peer, why: str) -> None:
        with self.changed:
            expected = self.closed or peer.left
            peer.left = True
            if not expected:
                self.end(Stop(peer.rank, f"rank {peer.rank} {why}"))
            self.changed.notify_all()

    def take(self, peer: Peer, message: dict[str, Json]) -> None:
        kind = message.get("kind")
        if kind == "stop":
            self.end(Stop(**message["stop"]))
        with self.changed:
            if kind == "part":
                self.arrived.setdefault(message["n"], {})[peer.rank] = message["value"]
            peer.left = peer.left or kind == "bye"
            self.changed.notify_all()

    def end(self, stop: Stop) -> None:
        """This rank is to end, and with rank 0 all are: for the first reason that it hears of."""
        with self.changed:
            if self.stop:
                return
            self.stop = stop
            for peer in self.peers.values():
                if not (self.rank or peer.left):
                    message: dict[str, Json] = {"kind": "stop", "stop": stop._asdict()}
                    threading.Thread(target=self.try_to, args=[peer, message], daemon=True).start()
            self.changed.notify_all()
        threading.Thread(target=self.leave_if_stuck, args=[stop], daemon=True).start()

    def try_to(self, peer: Peer, message: Json) -> None:
        try:
            peer.send(message)
        except OSError:
            peer.left = True

    def leave_if_stuck(self, stop: Stop) -> None:
        """A collective that waits for a rank that is lost never returns."""
        time.sleep(min(GRACE, self.timeout))
        while not (self.obeyed or self.closed):
            if self.in_collective:
                complain(f"error: {stop.text}; rank {self.rank} waited for it, and was ended")
                os._exit(1)
            time.sleep(0.2)

    # In the main thread.

    def check(self) -> None:
        """Raise what ends this run, if anything does."""
        if self.stop:
            self.obeyed = True
            if self.stop.signal:
                self.obey(self.stop.signal)
            kind = UserError if self.stop.code == 2 else RunError
            raise kind(self.stop.text)

    def check_soon(self) -> None:
        """Give the line a moment to say which rank was lost."""
        with self.changed:
            self.changed.wait_for(lambda: self.stop is not None, 2.0)
        self.check()

    def ask(self, stop: Stop) -> None:
        """Want all to end. That they do is known when rank 0 says so: it may have said that they go
        on, and then they do until they meet again."""
        if self.rank == 0:
            self.end(stop)
        elif not self.wanted:
            self.wanted = True
            self.try_to(self.peers[0], {"kind": "stop", "stop": stop._asdict()})

    def exchange(self, value: Json) -> list[Json]:
        """What each rank says here, by rank. All have to come; who is late is named."""
        n, self.count = self.count, self.count + 1
        if self.rank:
            self.give(self.peers[0], n, value)
            with self.changed:
                self.wait(lambda: n in self.arrived, [0])
                everything = self.arrived.pop(n)[0]
                assert isinstance(everything, list)
                return everything
        with self.changed:  # that it goes on and that it ends reach all ranks in the same order
            there = self.arrived.setdefault(n, {})
            self.wait(lambda: not self.missing(there), None, there)
            self.check()
            del self.arrived[n]
            values = [value, *(there[rank] for rank in range(1, self.size))]
            for peer in self.peers.values():
                self.give(peer, n, values)
            return values

    def give(self, peer: Peer, n: int, value: Json) -> None:
        try:
            peer.send({"kind": "part", "n": n, "value": value})
        except OSError as error:
            self.lose(peer, f"does not take what it is sent ({error})")
            self.check()

    def wait(
        self,
        ready: Callable[[], bool],
        whom: list[int] | None,
        there: dict[int, Json] | None = None,
    ) -> None:
        """Until it is `ready`, or this rank is to end."""
        start, told = time.monotonic(), False
        while not ready():
            self.check()
            late = whom or self.missing(there or {})
            if gone := [rank for rank in late if self.peers[rank].left]:
                self.end(Stop(gone[0], f"rank {gone[0]} has ended"))
                continue
            if number := self.asked():
                self.ask(Stop(self.rank, "", number))
            self.changed.wait(0.2)
            if not told and time.monotonic() > start + SHOW_AFTER:
                told = True
                self.say(f"waiting   for {named(late)}")

    def close(self) -> None:
        """The end: rank 0 leaves last, so that what it saves is whole before anybody is gone."""
        with self.changed:
            if self.rank:
                self.try_to(self.peers[0], {"kind": "bye"})
            while not all(peer.left for peer in self.peers.values()):
                self.changed.wait(0.2)
            self.closed = True
        for peer in self.peers.values():
            if not self.rank:
                self.try_to(peer, {"kind": "bye"})
            peer.sock.close()


def named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
