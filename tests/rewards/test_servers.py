"""Rewards over HTTP, against real servers: what they may do wrong, secrets, the judge."""

import asyncio
import contextlib
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import make_config, make_trainer, read_log, run_training

from utils.base.errors import RunError, UserError
from utils.base.text import redact
from utils.rewards import by_name
from utils.rewards import calls as reward_calls
from utils.rewards import servers as remote_rewards

FAST = {"retries": 3, "backoff": 0.01}


def lengths(body):
    """A well-behaved reward server: the length of each query."""
    return 200, {"rewards": [len(text) for text in body["query"]]}


class Server:
    """Answers requests by `behaviour(body) -> (status, JSON or bytes)`, or by a list of them."""

    def __init__(self, behaviour=lengths):
        self.behaviours = behaviour if isinstance(behaviour, list) else []
        self.behaviour = behaviour
        self.requests, self.heads, outer = [], [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.heads.append((self.path, dict(self.headers)))
                act = outer.behaviours.pop(0) if outer.behaviours else outer.behaviour
                status, answer = (lengths if isinstance(act, list) else act)(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"127.0.0.1:{self.http.server_port}"
        self.url = f"http://{self.address}/get_reward"

    def die(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(*behaviours):
        servers.append(Server(*behaviours))
        return servers[-1]

    yield start
    for server in servers:
        with contextlib.suppress(OSError):
            server.die()


def ask(urls, texts=("aa", "b", "cccc"), timeout=5.0, **parameters):
    reward = remote_rewards.RemoteReward(list(urls), timeout, **{**FAST, **parameters})
    columns = {
        "completions": [[{"content": text}] for text in texts],
        "prompt_texts": [f"Q{n}:" for n in range(len(texts))],
        "answer": [str(n) for n in range(len(texts))],
        "other": [None] * len(texts),
    }
    return reward_calls.RewardCalls(0.001)({"remote_rm": reward}, columns)["remote_rm"].tolist()


def test_the_protocol_is_that_of_openrlhf(serve):
    server = serve()
    assert ask([server.url]) == [5, 4, 7]
    assert server.requests == [
        {
            "query": ["Q0:aa", "Q1:b", "Q2:cccc"],
            "prompts": ["Q0:", "Q1:", "Q2:"],
            "labels": ["0", "1", "2"],
        }
    ]
    ((path, headers),) = server.heads
    assert path == "/get_reward"
    assert headers["Content-Type"] == "application/json"


def test_several_servers_share_the_completions_in_order(serve):
    servers = [serve() for _ in range(3)]
    texts = [f"{'x' * n}" for n in range(10)]
    assert ask([s.url for s in servers], texts) == [3 + n for n in range(10)]
    assert [[len(r["query"]) for r in s.requests] for s in servers] == [[4], [4], [2]]


def test_a_batch_size_cuts_requests(serve):
    servers = [serve(), serve()]
    assert ask([s.url for s in servers], ["x"] * 5, batch_size=2) == [4] * 5
    assert [sorted(len(r["query"]) for r in s.requests) for s in servers] == [[1, 2], [2]]


def fails(status, answer=b"busy"):
    return lambda body: (status, answer)


@pytest.fixture
def released():
    """What a server that hangs waits for; set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def hangs(released):
    def behaviour(body):
        released.wait(60)
        return lengths(body)

    return behaviour


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_what_may_pass_is_tried_again(serve, status):
    server = serve([fails(status), fails(status), lengths])
    assert ask([server.url]) == [5, 4, 7]
    assert len(server.requests) == 3


def test_a_slow_answer_is_asked_for_again(serve, released):
    server = serve([hangs(released), lengths])
    assert ask([server.url], timeout=0.2) == [5, 4, 7]
    assert len(server.requests) > 1, "the first has no answer to this day"


def test_an_answer_that_trickles_is_too_slow_as_well(released):
    """The limit is on the whole request, not on the pause between two bytes."""

    def trickle():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address.append(listener.getsockname()[1])
            ready.set()
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not released.wait(0.05):  # for as long as somebody reads
                    connection.sendall(b" ")

    address, ready = [], threading.Event()
    threading.Thread(target=trickle, daemon=True).start()
    ready.wait()
    with pytest.raises(RunError, match=r"no answer within 0.3 s; given up after 1 attempts"):
        ask([f"http://127.0.0.1:{address[0]}"], timeout=0.3, retries=0)


@pytest.mark.parametrize(("first", "pauses"), [(0.1, [0.1, 0.2, 0.4]), (20.0, [20.0, 30.0, 30.0])])
def test_pauses_grow(serve, monkeypatch, first, pauses):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    own = types.SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
    monkeypatch.setattr(remote_rewards, "asyncio", own)
    server = serve([fails(500)] * 3 + [lengths])
    assert ask([server.url], backoff=first) == [5, 4, 7]
    assert slept == pauses


def test_giving_up_says_what_was_wrong(serve):
    server = serve(fails(503, b"no GPU is free"))
    with pytest.raises(RunError) as caught:
        ask([server.url])
    assert re.fullmatch(
        rf"reward remote_rm: {re.escape(server.url)}: status 503: 'no GPU is free'; "
        r"given up after 4 attempts in 0\.\d s",
        str(caught.value),
    )


WRONG = {
    "garbage": (b"<html>hello</html>", "answered no JSON: '<html>hello</html>'"),
    "a list": ([1, 2, 3], r"answered no list under 'rewards': \[1, 2, 3\]"),
    "another key": ({"scores": [1, 2, 3]}, "answered no list under 'rewards': {'scores'"),
    "too few": ({"rewards": [1, 2]}, "answered 2 rewards for 3 completions"),
    "too many": ({"rewards": [1] * 4}, "answered 4 rewards for 3 completions"),
    "NaN": (b'{"rewards": [1, NaN, 2]}', "answered nan, not a finite number.*\nb"),
    "infinity": (b'{"rewards": [1, 2, -Infinity]}', "answered -inf, not a finite.*\ncccc"),
    "null": ({"rewards": [None, 1, 2]}, "answered None, not a finite number.*\naa"),
    "text": ({"rewards": ["1", 1, 2]}, "answered '1', not a finite number"),
    "true": ({"rewards": [1, True, 2]}, "answered True, not a finite number.*\nb"),
    "nested": ({"rewards": [[1], [1], [2]]}, r"answered \[1\], not a finite number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_an_error_at_once(serve, case):
    """What came with status 200 is meant: asking again would hide the mistake."""
    answer, complaint = WRONG[case]
    server = serve(fails(200, answer))
    with pytest.raises(RunError, match=f"reward remote_rm: {re.escape(server.url)} {complaint}"):
        ask([server.url])
    assert len(server.requests) == 1


def test_a_wrong_answer_is_laid_to_the_server_that_gave_it(serve):
    """The first is down; the second answers in its place, and wrongly."""
    dead, wrong = serve(), serve(lambda body: (200, {"rewards": []}))
    dead.die()
    with pytest.raises(RunError) as caught:
        ask([dead.url, wrong.url], ["x"])
    assert f"{wrong.url} answered 0 rewards for 1 completions" in str(caught.value)
    assert dead.url not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 301])
def test_a_refusal_is_an_error_at_once(serve, status):
    server = serve(fails(status, b"no"))
    with pytest.raises(RunError, match=f"answered status {status}: 'no'"):
        ask([server.url])
    assert len(server.requests) == 1


def test_another_server_takes_over_from_one_that_died(serve):
    dead, alive = serve(), serve()
    dead.die()
    assert ask([dead.url, alive.url]) == [5, 4, 7]
    assert sorted(len(r["query"]) for r in alive.requests) == [1, 2]


def test_the_field_of_the_answer_and_a_bearer_token(serve, monkeypatch):
    monkeypatch.setenv("RM_KEY", "sk-very-secret")
    server = serve(lambda body: (200, {"scores": [0.5] * len(body["query"])}))
    assert ask([server.url], field="scores", api_key_env="RM_KEY") == [0.5] * 3
    assert server.heads[0][1]["Authorization"] == "Bearer sk-very-secret"


BAD = {
    "no url": ([], {}, "set remote_rm_url"),
    "no scheme": (["localhost:5000"], {}, "must start with http"),
    "a file": (["reward.py"], {}, "must start with http"),
    "no host": (["http://"], {}, "must start with http"),
    "a port": (["http://host:port/"], {}, "is no URL"),
    "variable": (["http://$NO_SUCH_HOST/"], {}, "no environment variable NO_SUCH_HOST"),
    "no key": (["http://h"], {"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    "retries": (["http://h"], {"retries": -1}, "retries = -1"),
    "batch": (["http://h"], {"batch_size": -1}, "batch_size = -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_asked_is_refused(case):
    urls, parameters, complaint = BAD[case]
    with pytest.raises(UserError, match=complaint):
        remote_rewards.RemoteReward(urls, 5.0, **parameters)


def test_settings_reach_the_reward(grpo, serve, model_dir, data_dir, tmp_path):
    config = {"reward_funcs": ["remote_rm"], "remote_rm_url": ["http://127.0.0.1:9"]}
    config |= {"reward_timeout": 7.0, "reward_kwargs": {"remote_rm": {"retries": 2}}}

    def load(config):
        made = make_config(model_dir, data_dir, tmp_path / "o", **config)
        return by_name.load_rewards(made, grpo.REWARDS)["remote_rm"]

    endpoint = load(config).endpoint
    assert (endpoint.urls, endpoint.timeout) == (["http://127.0.0.1:9"], 7.0)
    assert (endpoint.retries, endpoint.backoff) == (2, 1.0)
    for change, complaint in (
        ({"reward_funcs": ["int"], "reward_kwargs": {}}, "remote_rm_url has no effect unless"),
        ({"remote_rm_url": []}, "reward remote_rm: set remote_rm_url"),
        ({"reward_kwargs": {"remote_rm": {"urls": []}}}, "no parameter 'urls'"),
        ({"reward_kwargs": {"remote_rm": {"timeout": 1.0}}}, "no parameter 'timeout'"),
    ):
        with pytest.raises(UserError, match=complaint):
            load({**config, **change})


REMOTE = {"reward_funcs": ["remote_rm"], "reward_kwargs": {"remote_rm": FAST}}


def scores(body):
    """Rewards with variance on random text."""
    return 200, {"rewards": [sum(map(ord, text)) % 7 for text in body["query"]]}


def test_training_on_a_server(serve, model_dir, data_dir, tmp_path):
    server = serve(scores)
    code, trainer = run_training(
        model_dir, data_dir, tmp_path / "o", **REMOTE, remote_rm_url=[server.url], max_updates=2
    )
    assert code == 0
    first = server.requests[0]
    row = trainer.train_dataset[trainer.prompts_of_update(0)[0]]
    prompt = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
    assert first["prompts"][0] == prompt
    assert first["query"][0].startswith(prompt + "<reasoning>\n")
    assert first["labels"][0] == row["answer"]
    assert [r["reward/remote_rm"] > 0 for r in read_log(tmp_path / "o")] == [True] * 2


def test_a_server_that_dies_in_mid_run_loses_no_finished_update(
    serve, model_dir, data_dir, tmp_path, typed
):
    """Exit code 1 with the reason, the last update saved; the run goes on elsewhere."""
    server, url = serve(), []
    server.behaviour = lambda body: (
        server.die() or (500, b"") if len(server.requests) > 2 else (scores(body))
    )
    arguments = {**REMOTE, "max_updates": 4, "output_dir": str(tmp_path / "o")}
    code, out, err, _ = typed(**arguments, remote_rm_url=[server.url])
    assert code == 1
    assert err.startswith(f"error: reward remote_rm: {server.url}: ")
    assert "given up after 4 attempts" in err
    assert "stopped   after update 2, saved in" in out
    url.append(serve(scores).url)
    code, out, err, _ = typed(**arguments, remote_rm_url=url, resume="auto")
    assert (code, err) == (0, "")
    assert [r["update"] for r in read_log(tmp_path / "o")] == [1, 2, 3, 4]


def test_ctrl_c_does_not_wait_for_a_server(serve, released, model_dir, data_dir, tmp_path):
    trainers, answered = [], []

    def behaviour(body):
        if len(server.requests) == 1:
            return scores(body)
        trainers[0].run.interrupted = True  # while the second update waits for its rewards
        answered.append(released.wait(60))
        return scores(body)

    server = serve(behaviour)
    code, trainer = run_training(
        model_dir, data_dir, tmp_path / "o", trainers.append, **REMOTE, remote_rm_url=[server.url]
    )
    assert (code, trainer.update_step, len(server.requests)) == (130, 1, 2)
    assert not answered


SECRETS = ("hunter2", "t0ken", "sk-judge-key", "private-place")


def test_secrets_are_neither_shown_nor_written(
    serve, model_dir, data_dir, tmp_path, typed, monkeypatch
):
    """Password, query and key, in output, messages, commands to type, logs and checkpoints."""
    monkeypatch.setenv("JUDGE_KEY", "sk-judge-key")
    monkeypatch.setenv("RM_PASSWORD", "hunter2")
    judge = serve(lambda body: (200, {"choices": [{"message": {"content": "Score: 5"}}]}))
    dying = serve([scores, scores])
    dying.behaviours.append(lambda body: (400, b"bad token t0ken of anna:hunter2"))
    monkeypatch.setenv("RM_PATH", "private-place")
    url = f"http://anna:$RM_PASSWORD@{dying.address}/rm/${{RM_PATH}}?token=t0ken"
    kwargs = {"remote_rm": FAST, "judge": {"url": judge.url, "api_key_env": "JUDGE_KEY", **FAST}}
    arguments = {"output_dir": str(tmp_path / "o"), "report_to": ["csv"], "log_completions": 1}
    arguments |= {"reward_funcs": ["remote_rm", "judge"], "reward_kwargs": kwargs}
    words = ("--set", f"remote_rm_url={url}")
    shown = [typed("--dry-run", *words, **arguments), typed(*words, **arguments)]
    code, out, err, _ = shown[1]
    assert code == 1
    assert "answered status 400: 'bad token *** of ***'" in err
    assert f"http://***@{dying.address}/rm/${{RM_PATH}}?***" in err
    assert "--set 'remote_rm_url=***'" in out
    assert dying.heads[0][0] == "/rm/private-place?token=t0ken"
    assert dying.heads[0][1]["Authorization"].startswith("Basic ")
    assert judge.heads[0][1]["Authorization"] == "Bearer sk-judge-key"
    written = [p.read_bytes() for p in (tmp_path / "o").rglob("*") if p.is_file()]
    assert len(written) > 8
    for secret in SECRETS:
        assert not any(secret.encode() in data for data in written)
        assert not any(secret in text for run in shown for text in run[1:3])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Score: 7", 7),
        ("It is right.\n\n**Score:** 8.5/10", 8.5),
        ("score is 3 out of 10", 3),
        ('```json\n{"reason": "3 errors", "score": 4}\n```', 4),
        ("Grade = 10", 10),
        ("Rating (0-10): 6", 6),
        ("First Score: 2. On reflection, Score: 9", 9),
        ("<think>Score: 1? no</think>Score: 5", 5),
        ("<think>Score: 1? I must", None),
        ("7", 7),
        ("7 / 10", 7),
        ("I'd say 4.", 4),
        ("2 of the 3 steps are right", None),
        ("Score: 11", None),
        ("Score: -3", None),
        ("Score: N", None),
        ("", None),
    ],
)
def test_reading_a_grade(text, value):
    assert remote_rewards.grade(text, 10) == value


def reply(text):
    return lambda body: (200, {"choices": [{"message": {"content": text}}]})


def judge(server, texts=("good", "bad {question}"), **parameters):
    reward = remote_rewards.Judge(60.0, url=f"http://{server.address}/v1/", **FAST, **parameters)
    columns = {
        "completions": [[{"content": text}] for text in texts],
        "question": [f"Why {n}?" for n in range(len(texts))],
        "answer": [n for n in range(len(texts))],
    }
    calls = reward_calls.RewardCalls()
    values = calls({"judge": reward}, columns)["judge"].tolist()
    return [None if math.isnan(v) else v for v in values], calls


def test_the_judge_grades_each_completion(serve):
    def by_length(body):
        text = body["messages"][0]["content"]
        return reply("Score: 9" if "to grade:\ngood\n" in text else "none")(body)

    server = serve(by_length)
    values, calls = judge(server, model="m", max_tokens=9, extra={"seed": 3})
    assert values == [0.9, None]
    assert calls.logged.metrics == {"judge_without_grade": [0.5]}
    assert calls.logged.columns == {"judge": ["Score: 9", "none"]}
    bodies = sorted(server.requests, key=lambda body: body["messages"][0]["content"])
    text = bodies[1]["messages"][0]["content"]
    assert text.startswith("You grade an answer to a question.\n\nQuestion:\nWhy 1?\n")
    assert "Reference answer:\n1\n" in text
    assert "bad {question}" in text, "what a completion says is not filled in"
    assert "from 0 (worthless) to 10" in text
    fields = {"model": "m", "max_tokens": 9, "temperature": 0.0, "seed": 3}
    assert [{**body, "messages": None} for body in bodies] == [{**fields, "messages": None}] * 2
    assert server.heads[0][0] == "/v1/chat/completions"


def test_the_judges_prompt_and_scale_are_parameters(serve):
    server = serve(reply("2"))
    assert judge(server, ["x"], prompt="{completion}|{scale}", scale=4)[0] == [0.5]
    assert server.requests[0]["messages"][0]["content"] == "x|4"


def test_the_judge_keeps_to_its_concurrency(serve):
    """Three requests are under way at once, each waiting for two others, and never a fourth."""
    together, busy, most, lock = threading.Barrier(3), [0], [0], threading.Lock()

    def counted(body):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        together.wait(60)
        with lock:
            busy[0] -= 1
        return reply("5")(body)

    server = serve(counted)
    assert judge(server, ["x"] * 12, concurrency=3)[0] == [0.5] * 12
    assert most[0] <= 3
    assert len(server.requests) == 12, "none was given up and sent again"


@pytest.mark.parametrize(
    ("behaviour", "complaint"),
    [
        (reply("no idea"), "none of 2 answers of the judge holds a grade: 'no idea'"),
        (reply(None), "none of 2 answers of the judge holds a grade: ''"),
        (fails(200, {"error": "x"}), "answered no chat completion: {'error': 'x'}"),
        (fails(200, {"choices": []}), "answered no chat completion"),
        (fails(200, b"{"), "answered no JSON"),
        (fails(401, b"who are you?"), "status 401: 'who are you"),
        (fails(500), "status 500: 'busy'; given up after 4 attempts"),
    ],
    ids=range(7),
)
def test_a_judge_that_can_not_be_used_stops_the_run(serve, behaviour, complaint):
    with pytest.raises(RunError, match=f"(?s)reward judge: .*{complaint}"):
        judge(serve(behaviour))


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"url": ""}, "set its url"),
        ({"prompt": "Grade this."}, "must contain {completion}"),
        ({"scale": 0}, "must be at least 1"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)
def test_a_judge_without_sense_is_refused(parameters, complaint):
    with pytest.raises(UserError, match=complaint):
        remote_rewards.Judge(5.0, **{"url": "http://h/v1", **parameters})


@pytest.fixture
def mlx_server(model_dir):
    """`mlx_lm.server` with the random model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model_dir)]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        assert process.poll() is None
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait()


@pytest.mark.long
def test_a_model_behind_mlx_lm_server_judges(mlx_server, model_dir, data_dir, tmp_path):
    """Its random text is pushed to one digit, so that there is a grade to read."""
    from transformers import AutoTokenizer

    digit = AutoTokenizer.from_pretrained(model_dir).encode("7")[-1]
    kwargs = {"url": mlx_server, "max_tokens": 1, "extra": {"logit_bias": {str(digit): 1000.0}}}
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        None,
        reward_funcs=["judge"],
        reward_kwargs={"judge": kwargs},
    )
    (record,) = trainer.train_step([0, 1])
    assert record["reward/judge"] == pytest.approx(0.7)
    assert record["metric/judge_without_grade"] == 0


def test_a_key_in_the_path_is_hidden_in_every_message(serve, monkeypatch):
    """The server says it as it got it, percent-encoded, and so do the library's own errors."""
    key = "s3cr/t k+y"
    monkeypatch.setenv("RM_KEY", key)
    monkeypatch.setenv("RM_OTHER", key[:6])  # the other one begins with it
    server = serve(lambda body: (400, f"no {server.heads[-1][0]} {key!r}".encode()))
    answering = f"http://{server.address}/a/${{RM_KEY}}/b?z=$RM_OTHER"
    for url in (answering, "http://127.0.0.1:1/$RM_KEY"):
        with pytest.raises(RunError) as caught:
            ask([url], retries=0)
        told = str(caught.value)
        assert "$" in told, "variables stand by their names"
        for part in ("s3cr", "k+y", "k%2By", "t k", "t%20k"):
            assert part not in told
        assert (
            redact(f"http://h/{urllib.parse.quote(key, safe='')}/x {key}") == "http://h/***/x ***"
        )
