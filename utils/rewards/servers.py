"""Rewards over HTTP: a server for reward models, and a language model as judge.

Both are async reward functions, so they wait while others compute. A request that fails for a
reason that may pass (no connection, too slow, status 408, 429 or 5xx) is tried again, with growing
pauses and at the next URL; what a server answers with status 200 is checked and never guessed at.
URLs may hold `user:password@`, a `?query`, or `$NAME` of an environment variable; none of these
is ever shown.
"""

import asyncio
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..base.errors import RunError, UserError
from ..base.text import Json, filled, keep_secrets, redact, shown, without_secrets
from .answers import last_text

if TYPE_CHECKING:
    import httpx2

RETRIED = (408, 429, *range(500, 600))  # statuses that another attempt may change
LONGEST_PAUSE = 30.0
VARIABLE = re.compile(r"\$\{?(\w+)")


Body = dict[str, Json]
"""Of a request."""


class Endpoint:
    """One service at one or several URLs."""

    def __init__(
        self, urls: list[str], timeout: float, retries: int, backoff: float, api_key_env: str
    ) -> None:
        """
        Args:
            timeout: Seconds of one request, from connecting to the last byte of its answer.
            retries: Attempts after the first.
            backoff: Seconds before the first retry; twice as many before each next one.
            api_key_env: Environment variable with a key to send as a bearer token; empty for none.

        Raises:
            UserError: no URL, or no key where one is named.
        """
        self.urls = [checked_url(url) for url in urls]
        self.shown = [without_secrets(url) for url in urls]  # variables by their names
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        if retries < 0 or backoff < 0:
            raise UserError(f"retries = {retries} and backoff = {backoff} must be at least 0")
        filled_in = [os.environ[name] for url in urls for name in VARIABLE.findall(url)]
        self.headers = {}
        if api_key_env:
            key = key_of(api_key_env)
            self.headers["Authorization"] = f"Bearer {key}"
            filled_in.append(key)
        self.secrets = [*filled_in, *(s for url in self.urls for s in secrets_of(url))]
        keep_secrets(filled_in)  # wherever else they might be said
        self.loop: asyncio.AbstractEventLoop | None = None

    async def post(self, body: Body, first: int = 0) -> tuple[Json, str]:
        """The JSON that the service answers, asked at the URL number `first`, then the next ones;
        and the URL that answered, as it may be shown.

        Raises:
            RunError: no attempt brought an answer, or one that is not JSON.
        """
        begin, problem, pause, place = time.monotonic(), "", self.backoff, 0
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            place = (first + attempt) % len(self.urls)
            response, problem = await self.ask(self.urls[place], body)
            if response is not None:
                return self.content(self.shown[place], response), self.shown[place]
        raise RunError(
            f"{self.shown[place]}: {problem}; given up after {self.retries + 1} attempts in "
            f"{time.monotonic() - begin:.1f} s"
        )

    async def ask(self, url: str, body: Body) -> tuple["httpx2.Response | None", str]:
        """One attempt: a response, or None and why another attempt may help."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout):
                response = await self.client().post(url, json=body)
        except TimeoutError:
            return None, f"no answer within {self.timeout:g} s"
        except httpx2.TransportError as error:
            return None, self.hidden(f"{type(error).__name__}: {error}")
        if response.status_code in RETRIED:
            return None, f"status {response.status_code}: {self.hidden(response.text)[:200]!r}"
        return response, ""

    def content(self, shown_url: str, response: "httpx2.Response") -> Json:
        text = self.hidden(response.text)[:200]
        if response.status_code != 200:
            raise RunError(f"{shown_url} answered status {response.status_code}: {text!r}")
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise RunError(f"{shown_url} answered no JSON: {text!r}") from None

    def client(self) -> "httpx2.AsyncClient":
        """Connections stay open between calls, as long as the event loop is the same."""
        import httpx2

        if self.loop is not asyncio.get_running_loop():
            self.loop = asyncio.get_running_loop()
            limits = httpx2.Limits(max_connections=None)
            self.http = httpx2.AsyncClient(headers=self.headers, timeout=None, limits=limits)
        return self.http

    def hidden(self, text: str) -> str:
        return redact(text, self.secrets)


def key_of(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key:
        raise UserError(f"api_key_env: the environment variable {variable} is not set")
    return key


def checked_url(url: str) -> str:
    """The URL with environment variables filled in."""
    import httpx2

    missing = [name for name in VARIABLE.findall(url) if name not in os.environ]
    if missing:
        raise UserError(f"{without_secrets(url)!r}: no environment variable {missing[0]}")
    full = os.path.expandvars(url)
    try:
        parts = httpx2.URL(full)
    except httpx2.InvalidURL:
        raise UserError(f"{without_secrets(url)!r} is no URL") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(f"{without_secrets(url)!r} must start with http:// or https://")
    return full


def secrets_of(url: str) -> list[str]:
    """What a server's message might repeat of a URL and must not be shown."""
    import httpx2

    parts = httpx2.URL(url)
    found = {parts.userinfo.decode(), parts.password, parts.query.decode(), *parts.params.values()}
    return [text for text in found if len(text) > 2]


class RemoteReward:
    """Rewards of a server with LightRFT's and OpenRLHF's protocol.

    It is sent {"query": [prompt + completion], "prompts": [...], "labels": [expected answers]} and
    answers {"rewards": [one number each]}. Several URLs share the completions of a call.
    """

    own_timeout = per_prompt = True

    def __init__(
        self,
        urls: list[str],
        timeout: float,
        retries: int = 5,
        backoff: float = 1.0,
        batch_size: int = 0,
        field: str = "rewards",
        api_key_env: str = "",
    ) -> None:
        """
        Args:
            batch_size: Completions of a request; 0 is all, divided by the number of URLs.
            field: Where the answer has the rewards.
        """
        if not urls:
            raise UserError('set remote_rm_url, such as ["http://localhost:5000/get_reward"]')
        self.endpoint = Endpoint(urls, timeout, retries, backoff, api_key_env)
        if batch_size < 0:
            raise UserError(f"batch_size = {batch_size} must be at least 0")
        self.batch_size, self.field = batch_size, field

    async def __call__(
        self, completions: list, prompt_texts: list[str], answer: list[str]
    ) -> list[float]:
        texts = [last_text(completion) for completion in completions]
        size = self.batch_size or math.ceil(len(texts) / len(self.endpoint.urls)) or 1
        parts = [slice(start, start + size) for start in range(0, len(texts), size)]
        answers = await asyncio.gather(
            *(self.rewards(n, prompt_texts[p], texts[p], answer[p]) for n, p in enumerate(parts))
        )
        return [value for values in answers for value in values]

    async def rewards(
        self, number: int, prompts: list[str], texts: list[str], labels: list[str]
    ) -> list[float]:
        query = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        body = {"query": query, "prompts": prompts, "labels": labels}
        answer, where = await self.endpoint.post(body, first=number)
        said = self.endpoint.hidden(shown(answer))
        values = answer.get(self.field) if isinstance(answer, dict) else None
        if not isinstance(values, list):
            raise RunError(f"{where} answered no list under {self.field!r}: {said}")
        if len(values) != len(texts):
            raise RunError(
                f"{where} answered {len(values)} rewards for {len(texts)} completions: {said}"
            )
        for value, text in zip(values, texts, strict=True):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and abs(value) <= sys.float_info.max):
                raise RunError(
                    f"{where} answered {self.endpoint.hidden(shown(value))}, not a finite number, "
                    "for the completion:\n"
                    f"{text[:2000]}"
                )
        return [float(value) for value in values]


JUDGE_PROMPT = """You grade an answer to a question.

Question:
{question}

Reference answer:
{answer}

Answer to grade:
{completion}

Grade it from 0 (worthless) to {scale} (right and well reasoned). Think briefly, then end with a \
line "Score: N"."""


class Judge:
    """A language model that grades, behind any endpoint with OpenAI's chat completions."""

    own_timeout = per_prompt = True

    def __init__(
        self,
        timeout: float,
        url: str = "",
        model: str = "",
        prompt: str = JUDGE_PROMPT,
        scale: int = 10,
        max_tokens: int = 512,
        temperature: float = 0.0,
        concurrency: int = 16,
        retries: int = 5,
        backoff: float = 1.0,
        api_key_env: str = "",
        extra: dict[str, Json] | None = None,
    ) -> None:
        """
        Args:
            url: Base of the API, such as http://localhost:8080/v1.
            model: Its name there; empty where the server has only one.
            prompt: With {question}, {answer}, {completion} and {scale}.
            scale: The best grade; rewards are grade / scale.
            concurrency: Requests at a time.
            extra: Further fields of the request.
        """
        if not url:
            raise UserError('set its url: reward_kwargs = {judge = {url = "http://.../v1"}}')
        if min(scale, max_tokens, concurrency) < 1:
            raise UserError("scale, max_tokens and concurrency must be at least 1")
        if "{completion}" not in prompt:
            raise UserError("its prompt must contain {completion}")
        address = url.rstrip("/") + "/chat/completions"
        self.endpoint = Endpoint([address], timeout, retries, backoff, api_key_env)
        self.request = {"max_tokens": max_tokens, "temperature": temperature, **(extra or {})}
        if model:
            self.request["model"] = model
        self.prompt, self.scale, self.concurrency = prompt, scale, concurrency

    async def __call__(
        self,
        completions: list,
        question: list[str],
        answer: list[str],
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, list], None],
    ) -> list[float | None]:
        """Grades from 0 to 1; None where an answer holds no grade.

        Raises:
            RunError: the endpoint failed, or no answer of the call holds a grade.
        """
        slots = asyncio.Semaphore(self.concurrency)

        async def one(*row: str) -> str:
            async with slots:
                return await self.answer(*row)

        texts = [last_text(completion) for completion in completions]
        rows = zip(question, answer, texts, strict=True)
        said = await asyncio.gather(*(one(*map(str, row)) for row in rows))
        grades = [grade(text, self.scale) for text in said]
        if said and not any(g is not None for g in grades):
            raise RunError(
                f"none of {len(said)} answers of the judge holds a grade: "
                f"{self.endpoint.hidden(shown(said[0]))}"
            )
        log_metric("judge_without_grade", sum(g is None for g in grades) / max(len(grades), 1))
        log_extra("judge", list(said))
        return [None if g is None else g / self.scale for g in grades]

    async def answer(self, question: str, answer: str, completion: str) -> str:
        fields = {"question": question, "answer": answer, "completion": completion}
        prompt = filled(self.prompt, fields | {"scale": str(self.scale)})
        body = {"messages": [{"role": "user", "content": prompt}], **self.request}
        reply, _ = await self.endpoint.post(body)
        try:
            return str(reply["choices"][0]["message"].get("content") or "")
        except (LookupError, TypeError, AttributeError):
            said = self.endpoint.hidden(shown(reply))
            raise RunError(f"the judge answered no chat completion: {said}") from None


NUMBER = r"(-?\d+(?:\.\d+)?)"
GRADE = re.compile(
    rf"(?:score|grade|rating)\W{{0,20}}?(?:is|of)?\W{{0,20}}?{NUMBER}", re.IGNORECASE
)


def grade(text: str, scale: int) -> float | None:
    """The last "Score: N" (or grade, rating; JSON and Markdown too), or the only number there is.

    None without one, or where it is not within 0 and `scale`.
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    text = re.sub(rf"\(?\b0\s*(?:-|to)\s*{scale}\b\)?", "", text)  # the range is not a grade
    found = GRADE.findall(text)
    if not found:
        found = re.findall(NUMBER, re.sub(rf"(?<=\d)\s*/\s*{scale}\b", "", text))
        found = found if len(found) == 1 else []
    value = float(found[-1]) if found else math.nan
    return value if 0 <= value <= scale else None
