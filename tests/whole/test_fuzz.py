"""The short version of tests/fuzz.py, five planted bugs that it finds, parsing in linear time."""

import json
import math
import re
import struct
from unittest import mock

import fuzz
import pytest
from fuzz_surfaces import SURFACES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.base import text
from utils.base.errors import UserError
from utils.data import files
from utils.model import fingerprints
from utils.model import shape as model_shape
from utils.rewards import answers, calls, mathematics, servers
from utils.settings import reading

IN_SHORT = (
    "opened",
    "pairs",
    "digits",
    "thousands",
    "addresses",
    "scores",
    "thoughts",
    "fractions",
)


@pytest.fixture(scope="module")
def world():
    with fuzz.new_world() as made:
        yield made


@pytest.mark.parametrize("cases", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_all_cases_end_well(world, cases):
    results = fuzz.run_all(world, cases, seed=0)
    failures = [failure for result in results for failure in result.failures]
    assert not failures, failures[0]
    assert sum(result.cases for result in results) >= cases - len(SURFACES)
    for result, surface in zip(results, SURFACES, strict=True):
        assert result.cases >= surface.minimum * cases / 20_000 - 1, surface.name
        assert result.valid >= 0.3 * result.cases, surface.name
    assert any(0 < result.refused < result.cases for result in results)


def test_the_long_version_keeps_the_minima_that_it_states():
    assert sum(surface.share for surface in SURFACES) == pytest.approx(1)
    for surface in SURFACES:
        assert surface.share * 20_000 >= surface.minimum, surface.name


def slow_answer(text):
    """A search that starts anew at every <answer>: quadratic where none is closed."""
    found = re.findall(r"<answer>((?:.|\n)*?)</answer>", text)
    return found[-1].strip() if found else ""


# What each does to the real code, and which surface finds it within how many cases.
PLANTED = {
    "an exception that a reader forgot": (
        (files, "_object", lambda path, number, line: json.loads(line)),
        ("data files", 150, "JSONDecodeError"),
    ),
    "a regular expression that takes quadratic time": (
        ("grpo", "extract_xml_answer", slow_answer),
        ("model outputs", 300, "OutOfTime"),
    ),
    "a token id beyond the vocabulary": (
        (files, "check_prompts", lambda *_: None),
        ("token ids", 60, "OutOfBounds"),
    ),
    "a reward of NaN": (
        (calls, "checked", lambda name, values, columns: list(values)),
        ("reward values", 150, "AssertionError"),
    ),
    "a checksum that is not compared": (
        (fingerprints, "of_file", lambda path: Same()),
        ("checkpoints", 100, "taken for a whole one"),
    ),
}


class Same(str):
    """A checksum that equals any other."""

    __hash__ = None

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(world, bug):
    (module, name, broken), (surface_name, cases, sign) = PLANTED[bug]
    surface = next(s for s in SURFACES if s.name == surface_name)
    module = world.grpo if module == "grpo" else module
    with mock.patch.object(module, name, broken), mock.patch.object(fuzz, "SECONDS", 1.0):
        result = fuzz.fuzz(world, surface, cases, seed=5, until=sign)
    assert any(sign in failure for failure in result.failures), result.failures[:1]
    assert not fuzz.fuzz(world, surface, 20, seed=5).failures, "it was the planted bug"


# Shapes that make a careless parser go back and forth; each is repeated to the length wanted.
LONG = {
    "opened": "<answer>",
    "closed": "</answer>",
    "pairs": "<answer>1</answer>",
    "nested": "<reasoning><answer>",
    "half tags": "<answer <answer",
    "hashes": "####",
    "digits": "1",
    "thousands": ",111",
    "signs": "-+$",
    "white space": " \n",
    "addresses": "https://a@b?key=c&",
    "slashes": "://",
    "questions": "?a.b-c",
    "bearers": "bearer ",
    "scores": "score: is ",
    "thoughts": "<think>",
    "fractions": "1 / ",
    "braces": "{answer}",
}


def parsers(grpo):
    def reward(name):
        return lambda t: grpo.REWARDS[name]([[{"content": t}]], answer=["7"], completion_ids=[[1]])

    names = ("correctness", "int", "strict_format", "soft_format", "xmlcount")
    return {
        **{name: reward(name) for name in names},
        "extract_xml_answer": grpo.extract_xml_answer,
        "extract_hash_answer": grpo.extract_hash_answer,
        "as_number": answers.as_number,
        "same_answer": lambda t: grpo.same_answer(t, "7"),
        "redact": text.redact,
        "without_secrets": text.without_secrets,
        "grade": lambda t: servers.grade(t, 10),
    }


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        *((shape, 600_000) for shape in IN_SHORT),
        *(pytest.param(shape, 2_000_000, marks=pytest.mark.long) for shape in LONG),
    ],
)
def test_parsing_takes_linear_time(grpo, shape, length):
    """A million characters take less than a second; in quadratic time they would take minutes.

    Time that grows with the square fails from 2.5e-12 s times the square of the length on.
    """
    unit = LONG[shape]
    for before, after in (("", ""), ("<answer>", "</answer>"), ("<reasoning>", "")):
        text = before + unit * (length // len(unit)) + after
        for name, parse in parsers(grpo).items():
            try:
                with fuzz.time_limit(10):
                    parse(text)
            except fuzz.OutOfTime:
                pytest.fail(f"{name} goes back and forth")


@pytest.mark.parametrize("unit", ["1 / ", "7 ", "\\\\frac{", "("])
def test_of_a_long_text_math_verify_gets_the_end(monkeypatch, unit):
    """Its time grows with the square of the length."""
    math_verify = pytest.importorskip("math_verify")
    parse, given = math_verify.parse, []

    def noted(text, **how):
        given.append(text)
        return parse(text, **how)

    monkeypatch.setattr(math_verify, "parse", noted)
    long = unit * (100_000 // len(unit))
    mathematics.read.cache_clear()
    assert not mathematics.equivalent(long, r"\sqrt{7}")
    assert given[0] == r"\boxed{\sqrt{7}}"
    end = long[-mathematics.LONGEST :]
    assert all(text.removeprefix("\\boxed{").removesuffix("}").strip() in end for text in given[1:])


def test_a_row_of_ten_million_characters_is_read(world):
    for name, line in (
        ("a.jsonl", json.dumps({"question": "q" * 10**7, "answer": "7"})),
        ("a.csv", f'question,answer\n"{"q" * 10**7}",7'),
    ):
        path = world.file(name, line.encode())
        with fuzz.time_limit(60):
            rows = world.grpo.load_questions(world.config(dataset=str(path)), "train")
        assert len(rows[0]["question"]) == 10**7


QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
TAGGED = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n"]) | st.text(),
    max_size=12,
).map("".join)


@QUICK
@given(typed=st.text() | JSON.map(json.dumps), kind=st.sampled_from([int, float, bool, str]))
def test_any_override_is_a_value_or_a_complaint(typed, kind):
    try:
        value = reading.parse_text("key", typed, kind)
    except UserError:
        return
    assert type(value) is kind


@QUICK
@given(rows=st.lists(st.dictionaries(st.sampled_from(["question", "answer", "x"]), JSON)))
def test_any_row_is_read_as_it_was_written_or_refused(world, rows):
    written = "".join(json.dumps(row) + "\n" for row in rows)
    path = world.file("rows.jsonl", written.encode())
    try:
        read = files.read_rows(path)
    except UserError:
        assert not rows or re.search(r"\d{4300}", written)
    else:
        assert json.dumps(read) == json.dumps(rows)


@QUICK
@given(completion=TAGGED, answer=st.text(min_size=1))
def test_any_completion_earns_what_its_answer_is_worth(grpo, completion, answer):
    found = grpo.extract_xml_answer(completion)
    expected = re.search(r"(?s).*<answer>(.*?)</answer>", completion)
    assert found == (expected[1].strip() if expected else "")
    given = [[{"role": "assistant", "content": completion}]]
    for name, most in (("correctness", 2), ("int", 0.5), ("soft_format", 0.5), ("xmlcount", 0.5)):
        (value,) = grpo.REWARDS[name](given, answer=[answer], completion_ids=[[1]])
        assert 0 <= value <= most


@QUICK
@given(header=st.dictionaries(st.text(max_size=9), JSON, max_size=3), tail=st.binary(max_size=64))
def test_any_header_is_a_table_of_tensors_or_a_complaint(world, header, tail):
    made = json.dumps(header).encode()
    path = world.file("model.safetensors", struct.pack("<Q", len(made)) + made + tail)
    try:
        tensors = model_shape.read_header(path)
    except ValueError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(tail)
    assert all(math.prod(tensor.shape) >= 0 for tensor in tensors.values())


@QUICK
@given(before=st.text(), secret=st.text("abcXYZ019_-", min_size=8), after=st.text())
def test_any_secret_in_an_address_is_hidden(before, secret, after):
    for address in (f"https://user:{secret}@host/a", f"https://host/a?b=c&api_key={secret}"):
        assert secret not in text.redact(f"{before} {address} {after}".replace(secret, "", 0)) or (
            secret in before + after + "https://user:host/a?b=c&api_key="
        )
