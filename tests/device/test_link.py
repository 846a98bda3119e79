"""Ranks on a line, here threads of one process: they agree, and one that falls silent is lost."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from several import free_ports

from utils.base.errors import RunError, Signalled, UserError
from utils.device import link
from utils.device.link import Link, Stop, named


def meet(size, timeout=20.0, heard=None, late=()):
    """The ends of a line, by rank."""
    address = "127.0.0.1", free_ports(1)[0]
    say = (heard if heard is not None else []).append

    def end(rank):
        time.sleep(0.5 * (rank in late))
        return Link(rank, size, address, timeout, say)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(end, range(size)))


def everywhere(ends, work):
    """What `work` returns or raises at each end."""

    def one(end):
        try:
            return work(end)
        except (RunError, UserError, Signalled) as error:
            return error

    with ThreadPoolExecutor(len(ends)) as pool:
        return list(pool.map(one, ends))


def closed(ends):
    everywhere(ends, Link.close)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_one_says_all_get(size):
    ends = meet(size)
    for n in range(3):
        said = everywhere(ends, lambda end, n=n: end.exchange([end.rank, n, 0.1]))
        assert said == [[[rank, n, 0.1] for rank in range(size)]] * size
    closed(ends)


def test_a_late_one_is_waited_for_by_name(monkeypatch):
    monkeypatch.setattr(link, "SHOW_AFTER", 0.2)
    heard = []
    ends = meet(3, heard=heard, late=[2])
    assert heard == ["waiting   for rank 2"]

    def late(end):
        time.sleep(0.5 * (end.rank == 1))
        return end.exchange(None)

    everywhere(ends, late)
    assert heard[1:].count("waiting   for rank 1") == 1  # rank 0 knows whom
    closed(ends)


def test_who_does_not_come_is_named():
    address = "127.0.0.1", free_ports(1)[0]
    with pytest.raises(UserError, match=r"ranks 1, 2 did not come within 0.5 s \(rank_timeout\)"):
        Link(0, 3, address, 0.5, lambda _: None)
    with pytest.raises(UserError, match="rank 1 cannot reach rank 0 at"):
        Link(1, 3, address, 0.5, lambda _: None)


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with pytest.raises(UserError, match="is another run on it"):
            Link(0, 2, address, 0.5, lambda _: None)


def test_a_stranger_is_left_outside():
    address = "127.0.0.1", free_ports(1)[0]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Link, 0, 2, address, 20.0, lambda _: None)
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 7 + b"\2{}"):
            while True:
                try:
                    stranger = socket.create_connection(address)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
        second = pool.submit(Link, 1, 2, address, 20.0, lambda _: None)
        ends = [first.result(), second.result()]
    assert everywhere(ends, lambda end: end.exchange(end.rank)) == [[0, 1], [0, 1]]
    closed(ends)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_of_one_ends_all(rank):
    ends = meet(3)
    ends[rank].ask(Stop(rank, f"rank {rank}: broke", code=1))
    others = [end for end in ends if end.rank != rank]
    for error in everywhere(others, lambda end: end.exchange(None)):
        assert isinstance(error, RunError)
        assert str(error) == f"rank {rank}: broke"
    closed(ends)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_signal_of_one_is_a_signal_of_all(rank):
    ends = meet(3)
    ends[rank].asked = lambda: 15

    def until_it_ends(end):
        """All do as many updates as any before they hear of it."""
        while True:
            time.sleep(0.3 * (end.rank == 1))
            end.exchange(None)

    for error in everywhere(ends, until_it_ends):
        assert isinstance(error, Signalled)
        assert error.args == (15,)
    closed(ends)


def test_bad_input_of_one_is_bad_input_of_all():
    ends = meet(2)
    ends[1].ask(Stop(1, "rank 1: no such file", code=2))
    error, *_ = everywhere(ends[:1], lambda end: end.exchange(None))
    assert isinstance(error, UserError)
    closed(ends)


def test_who_is_gone_is_lost():
    ends = meet(3)
    ends[1].peers[0].sock.shutdown(socket.SHUT_RDWR)
    for error in everywhere([ends[0], ends[2]], lambda end: end.exchange(None)):
        assert str(error).startswith("rank 1 is gone")
    closed(ends)


def test_who_falls_silent_is_lost(monkeypatch):
    ends = meet(3, timeout=1.5)
    send = link.Peer.send
    silent = ends[2].peers[0]
    monkeypatch.setattr(
        link.Peer, "send", lambda self, message: None if self is silent else send(self, message)
    )
    for error in everywhere(ends[:2], lambda end: end.exchange(None)):
        assert str(error) == "rank 2 has not been heard of for 1.5 s (rank_timeout)"
    closed(ends[:2])


def test_who_hangs_in_a_collective_is_ended(monkeypatch):
    left = threading.Event()
    told = []
    monkeypatch.setattr(link, "GRACE", 0.1)
    monkeypatch.setattr(link, "complain", told.append)

    def leave(code):
        assert code == 1
        left.set()
        ends[0].closed = True

    monkeypatch.setattr(link.os, "_exit", leave)
    ends = meet(2)
    ends[0].in_collective = True
    ends[1].peers[0].sock.shutdown(socket.SHUT_RDWR)
    assert left.wait(20)
    assert "rank 1 is gone" in told[0]
    assert "rank 0 waited for it, and was ended" in told[0]
    closed(ends[:1])


@pytest.mark.parametrize("rank", [0, 1])
def test_who_has_left_is_not_waited_for(rank):
    ends = meet(2)
    peer = ends[rank].peers[1 - rank]
    ends[rank].try_to(peer, {"kind": "bye"})
    with pytest.raises(RunError, match=f"rank {rank} has ended"):
        ends[1 - rank].exchange(None)


def test_names():
    assert named([2]) == "rank 2"
    assert named([1, 3]) == "ranks 1, 3"
