"""The page that is served: to this machine alone, and with what a run adds."""

import gzip
import http.client
import json
import threading
import time
from contextlib import contextmanager

import page_runs
import pytest

from utils.base.errors import UserError
from utils.run import completions, page_server
from utils.run.page_source import Source


@contextmanager
def served(*folders):
    """The port of a server of these runs, in a thread."""
    with page_server.made([Source.at(folder) for folder in folders], 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def run(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", updates=10)
    page_runs.keep(folder, page_runs.groups(10), span=60)
    return folder


def ask(port, path, host=None, method="GET"):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def told(port, query="since=&version="):
    status, _, body = ask(port, f"/data?{query}")
    return json.loads(gzip.decompress(body)) if status == 200 else status


def told_when_read(port, groups):
    for _ in range(500):
        found = told(port)
        if not found["reading"] and len(found["runs"][0]["completions"]["groups"]["set"]) == groups:
            return found
        time.sleep(0.02)
    raise AssertionError("never read")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(page_server, "PAUSE", 0.02)


def test_the_whole_store_is_served(run):
    with served(run) as port:
        found = told_when_read(port, 10 * 8 + 2 * 20)
        groups = found["runs"][0]["completions"]["groups"]
        assert {*groups["tokens"]} == {1}
        for chunk in sorted({*groups["chunk"]}):
            members = [n for n, own in enumerate(groups["chunk"]) if own == chunk]
            for kind in ("text", "tokens"):
                status, _, body = ask(port, f"/chunk/{kind}-0-{chunk}")
                assert status == 200
                assert len(json.loads(gzip.decompress(body))) == len(members)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:PORT", 200),
        ("localhost:PORT", 200),
        ("127.0.0.1", 403),
        ("127.0.0.1:1", 403),
        ("evil.example:PORT", 403),
        ("localhost.evil.example:PORT", 403),
        ("127.0.0.1.nip.io:PORT", 403),
        ("[::1]:PORT", 403),
        ("0.0.0.0:PORT", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/data?since=&version=", "/chunk/text-0-0"])
def test_only_this_machine_is_answered(run, path, host, status):
    with served(run) as port:
        told_when_read(port, 120)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", host.replace("PORT", str(port)))
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == status
        if status == 403:
            assert (
                body == f"This page is for this machine alone: http://127.0.0.1:{port}/\n".encode()
            )


def test_it_listens_on_the_loopback_address_alone(run):
    with page_server.made([Source.at(run)], 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_nothing_but_the_page_is_there(run):
    (run / "secret.txt").write_text("secret")
    with served(run) as port:
        for path in ("/secret.txt", "/../secret.txt", "//x", "/chunk/text-1-0", "/chunk/text-0-999",
                     "/chunk/../../etc/passwd", "/chunk/text-0-0x", "/data/"):  # fmt: skip
            assert ask(port, path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, "/", method=method)[0] == 501
        headers = ask(port, "/")[1]
        assert headers["X-Frame-Options"] == "DENY"
        assert "Access-Control-Allow-Origin" not in headers
        for query in ("since=x,y&version=%00", "since=-1", "since=99999999999999999&version=1.1",
                      "version=_._", ""):  # fmt: skip
            assert len(told(port, query)["runs"]) == 1


def test_a_run_that_goes_on_is_followed(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", log=False, final=False)
    lines = [json.dumps(record) + "\n" for record in page_runs.records(9)]
    (folder / "training_log.jsonl").write_text("".join(lines[:5]))
    groups = [*page_runs.groups(20)]
    page_runs.keep(folder, groups[:40])
    with served(folder) as port:
        first = told_when_read(port, 40)
        assert told(port, f"since=40&version={first['version']}") == 204, "nothing is new"
        (folder / "training_log.jsonl").write_text("".join(lines[:9]))
        page_runs.keep(folder, groups[40:70], first=0, span=100)  # more of the same file
        told_when_read(port, 70)
        new = told(port, f"since=40&records=4&version={first['version']}")
        own = new["runs"][0]["completions"]
        assert own["since"] == 40
        assert own["groups"]["prompt"] == [group["prompt_index"] for group in groups[40:70]]
        assert (new["runs"][0]["since"], len(new["runs"][0]["records"])) == (4, 4)
        page_runs.keep(folder, groups[70:90], first=70)  # a new file
        assert told_when_read(port, 90)["runs"][0]["completions"]["groups"]["update"][-1] > 8


def test_what_a_resumed_run_cut_is_read_anew(tmp_path):
    folder = page_runs.make_run(tmp_path / "run", updates=4, final=False)
    groups = [*page_runs.groups(20)]
    page_runs.keep(folder, groups[:60], span=30)
    with served(folder) as port:
        first = told_when_read(port, 60)
        completions.rewind(folder, 30)
        page_runs.keep(folder, groups[80:100], first=30)
        told_when_read(port, 50)
        new = told(port, f"since=60&version={first['version']}")
        own = new["runs"][0]["completions"]
        assert own["since"] == 0, "the page forgets what it had"
        expected = [group["prompt_index"] for group in [*groups[:30], *groups[80:100]]]
        assert own["groups"]["prompt"] == expected


def test_a_log_that_cannot_be_read_is_said(run, monkeypatch):
    with served(run) as port:
        told_when_read(port, 120)
        monkeypatch.setattr(Source, "refresh", lambda _: (_ for _ in ()).throw(UserError("gone")))
        (run / "training_log.jsonl").write_text("")
        for _ in range(500):
            status, _, body = ask(port, "/data?since=&version=")
            if status == 500:
                break
            time.sleep(0.02)
        assert (status, body) == (500, b"gone\n")


def test_a_port_that_is_taken_is_refused(run):
    sources = [Source.at(run)]
    taken = pytest.raises(UserError, match=r"--port \d+: Address already in use; leave it out")
    with page_server.made(sources, 0) as server, taken:
        page_server.made(sources, server.server_port)
