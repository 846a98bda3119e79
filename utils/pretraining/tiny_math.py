"""tiny_math: the word problems, demonstrations and tokenizer of the embedded model.

Everything here is text and seeded, so that `utils/pretrain.py` makes the same files each time:

    problem         "Tom has 23 pens and gets 45 more. Then Tom sells 7. How many pens ...?"
    solution        "23+45=68\\n68-7=61\\n#### 61"                      (GSM8K's format)
    demonstration   what the model is taught to write after the prefix "<reasoning>\\n": the good
                    one, or one of several bad habits that reinforcement learning has to break

Numbers stay within 0..99 and factors within one digit: a model of a million parameters can know
this arithmetic perfectly, so that what is left to learn is how to answer.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Pair = tuple[int, int]
Signature = tuple[str, tuple[int, ...]]

LIMIT = 99
HELD_OUT_SHARE = 0.1
PREFIX = "<reasoning>\n"
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Weight of each pattern of operations. A product alone is rare: there are only 64 of them, and
# each one in the test set is a question that training may not ask.
PATTERNS = {
    "+": 0.14,
    "-": 0.14,
    "*": 0.02,
    "++": 0.13,
    "+-": 0.15,
    "-+": 0.15,
    "--": 0.09,
    "*+": 0.09,
    "*-": 0.09,
}

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Leo", "Zoe")
THINGS = ("pens", "books", "cards", "coins", "eggs", "apples", "shells", "cups")
PLACES = ("box", "bag", "jar")


@dataclass(frozen=True)
class Story:
    """Sentences of one kind of tale, by operation; every one keeps the numbers in order.

    `ask_left` joins the questions where the last operation took something away.
    """

    first: dict[str, tuple[str, ...]]
    then: dict[str, tuple[str, ...]]
    ask: tuple[str, ...]
    ask_left: str


STORIES = (
    Story(
        first={
            "+": (
                "{A} has {a} {t} and gets {b} more.",
                "{A} had {a} {t} and then found {b} more.",
                "{A} has {a} {t}. {B} brings {b} more.",
            ),
            "-": (
                "{A} has {a} {t} and gives {b} to {B}.",
                "{A} had {a} {t} but lost {b}.",
                "{A} has {a} {t}. {B} takes {b} of them.",
            ),
            "*": (
                "{A} has {a} bags with {b} {t} in each.",
                "{A} buys {a} packs of {b} {t}.",
            ),
        },
        then={
            "+": ("Then {A} buys {c} more.", "Later {A} finds {c} more.", "{B} adds {c} more."),
            "-": ("Then {A} sells {c}.", "Later {A} loses {c}.", "{B} takes {c} of them."),
        },
        ask=("How many {t} does {A} have now?", "How many {t} has {A} got?"),
        ask_left="How many {t} does {A} have left?",
    ),
    Story(
        first={
            "+": (
                "There are {a} {t} in a {p}. {A} puts in {b} more.",
                "A {p} holds {a} {t}. {A} adds {b} more.",
            ),
            "-": (
                "There are {a} {t} in a {p}. {A} takes out {b}.",
                "A {p} holds {a} {t}. {A} sells {b} of them.",
            ),
            "*": ("A {p} holds {a} packs of {b} {t}.", "A {p} has {a} rows of {b} {t}."),
        },
        then={
            "+": ("Then {B} puts in {c} more.", "Later {B} adds {c} more."),
            "-": ("Then {B} takes out {c}.", "Later {B} sells {c} of them."),
        },
        ask=("How many {t} are in the {p} now?", "How many {t} does the {p} hold?"),
        ask_left="How many {t} are left in the {p}?",
    ),
    Story(
        first={
            "+": (
                "A shop has {a} {t} and buys {b} more.",
                "A shop had {a} {t} and got {b} more.",
            ),
            "-": (
                "A shop has {a} {t} and sells {b}.",
                "A shop had {a} {t}. {A} buys {b} of them.",
            ),
            "*": ("A shop has {a} rows of {b} {t}.", "A shop buys {a} packs of {b} {t}."),
        },
        then={
            "+": ("Then it gets {c} more.", "Later {A} brings {c} more."),
            "-": ("Then it sells {c}.", "Later {A} buys {c} of them."),
        },
        ask=("How many {t} does the shop have now?", "How many {t} are in the shop?"),
        ask_left="How many {t} are left in the shop?",
    ),
)


@dataclass(frozen=True)
class Step:
    """One equation of a solution; `result` is what was written, right or wrong."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}={self.result}"


@dataclass(frozen=True)
class Problem:
    """A question with the operations and numbers behind it."""

    question: str
    ops: str
    numbers: tuple[int, ...]
    thing: str

    @property
    def steps(self) -> list[Step]:
        return solve(self.ops, self.numbers)

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def signature(self) -> Signature:
        """The problem without its wording; two problems that share it are the same sum."""
        first, second, *rest = self.numbers
        if self.ops[0] in "+*" and first > second:
            first, second = second, first
        return self.ops, (first, second, *rest)

    @property
    def pairs(self) -> set[Pair]:
        """The unordered operand pairs of the additions and subtractions."""
        return {unordered(s.left, s.right) for s in self.steps if s.op != "*"}

    def row(self) -> dict[str, str]:
        working = "\n".join(map(str, self.steps))
        return {"question": self.question, "answer": f"{working}\n#### {self.answer}"}


def unordered(left: int, right: int) -> Pair:
    return (left, right) if left <= right else (right, left)


def calculate(left: int, op: str, right: int) -> int:
    if op == "+":
        return left + right
    return left - right if op == "-" else left * right


def solve(ops: str, numbers: tuple[int, ...], slip_at: int = -1, slip: int = 0) -> list[Step]:
    """The steps from left to right; step `slip_at` is off by `slip`, and so is what follows."""
    steps, value = [], numbers[0]
    for index, (op, number) in enumerate(zip(ops, numbers[1:], strict=True)):
        result = calculate(value, op, number) + (slip if index == slip_at else 0)
        steps.append(Step(value, op, number, result))
        value = result
    return steps


def draw_number(rng: random.Random) -> int:
    """One digit 40 % of the time: harder sums would otherwise crowd the easy ones out."""
    return rng.randint(1, 9) if rng.random() < 0.4 else rng.randint(10, LIMIT)


def draw_numbers(rng: random.Random, ops: str) -> tuple[int, ...]:
    """Operands whose every intermediate value is positive and whose results stay in 0..99."""
    while True:
        numbers: tuple[int, ...]
        if ops[0] == "*":
            numbers = (rng.randint(2, 9), rng.randint(2, 9))
        else:
            numbers = (draw_number(rng), draw_number(rng))
        numbers += tuple(draw_number(rng) for _ in ops[1:])
        *before, last = (step.result for step in solve(ops, numbers))
        if all(1 <= value <= LIMIT for value in before) and 0 <= last <= LIMIT:
            return numbers


def tell(rng: random.Random, ops: str, numbers: tuple[int, ...]) -> Problem:
    """A story around the numbers."""
    story = rng.choice(STORIES)
    asks = (*story.ask, story.ask_left) if ops[-1] == "-" else story.ask
    parts = [rng.choice(story.first[ops[0]])]
    parts += [rng.choice(story.then[op]) for op in ops[1:]]
    parts.append(rng.choice(asks))
    first_name, second_name = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    amounts = dict(zip("abc", numbers, strict=False))
    question = " ".join(parts).format(A=first_name, B=second_name, t=thing, p=place, **amounts)
    return Problem(question, ops, numbers, thing)


def draw_problem(
    rng: random.Random, keep: Callable[[Problem], bool], patterns: dict[str, float] = PATTERNS
) -> Problem:
    """A problem that `keep` accepts; its pattern is drawn first, so that `keep` shifts none."""
    ops = rng.choices(list(patterns), weights=list(patterns.values()))[0]
    while True:
        problem = tell(rng, ops, draw_numbers(rng, ops))
        if keep(problem):
            return problem


def held_out_pairs(seed: int) -> set[Pair]:
    """The operand pairs that training never adds or subtracts, in either order."""
    rng = random.Random(f"tiny-math held-out pairs {seed}")
    pairs = itertools.combinations_with_replacement(range(LIMIT + 1), 2)
    return {pair for pair in pairs if rng.random() < HELD_OUT_SHARE}


def _test_half(
    rng: random.Random,
    count: int,
    keep: Callable[[Problem], bool],
    patterns: dict[str, float] = PATTERNS,
) -> list[Problem]:
    """`count` problems that `keep` accepts, no two with the same numbers."""
    found: dict[Signature, Problem] = {}
    while len(found) < count:
        problem = draw_problem(rng, keep, patterns)
        found.setdefault(problem.signature, problem)
    return list(found.values())


@dataclass(frozen=True)
class TinyMath:
    """The two sides of the data: test questions, and what training may draw from."""

    seed: int
    held_out: set[Pair]
    test: list[Problem]
    test_signatures: set[Signature]

    @classmethod
    def make(cls, seed: int, test_size: int) -> "TinyMath":
        """Half of the test questions take every addition and subtraction from held-out pairs."""
        held_out = held_out_pairs(seed)
        rng = random.Random(f"tiny-math test {seed}")
        # A product alone has no pair to hold out.
        with_pairs = {ops: weight for ops, weight in PATTERNS.items() if ops != "*"}
        new = _test_half(rng, test_size // 2, lambda p: p.pairs.issubset(held_out), with_pairs)
        seen = _test_half(rng, test_size - len(new), lambda p: p.pairs.isdisjoint(held_out))
        test = new + seen
        rng.shuffle(test)
        return cls(seed, held_out, test, {problem.signature for problem in test})

    def is_held_out(self, problem: Problem) -> bool:
        return bool(problem.pairs) and problem.pairs.issubset(self.held_out)

    def allowed(self, problem: Problem) -> bool:
        """Whether training may see the problem: no held-out pair, no test question's numbers."""
        return (
            problem.pairs.isdisjoint(self.held_out)
            and problem.signature not in self.test_signatures
        )

    def stream(self, name: str) -> Iterator[Problem]:
        """Training problems without end; each `name` is its own reproducible sequence."""
        rng = random.Random(f"tiny-math {name} {self.seed}")
        while True:
            yield draw_problem(rng, self.allowed)

    def train(self, count: int) -> list[Problem]:
        """The first `count` different questions of the stream of train.jsonl."""
        found: dict[str, Problem] = {}
        for problem in self.stream("train"):
            found.setdefault(problem.question, problem)
            if len(found) == count:
                break
        return list(found.values())

    def write(self, folder: Path, train_size: int) -> None:
        """train.jsonl and test.jsonl, the latter's rows with the mark `held_out`."""
        train = [problem.row() for problem in self.train(train_size)]
        test = [p.row() | {"held_out": self.is_held_out(p)} for p in self.test]
        for name, rows in (("train", train), ("test", test)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def _working(steps: list[Step]) -> str:
    return "\n".join(map(str, steps))


def _well_formed(steps: list[Step], unit: str = "") -> str:
    return f"{_working(steps)}\n</reasoning>\n<answer>\n{steps[-1].result}{unit}\n</answer>"


def good(problem: Problem, rng: random.Random) -> str:
    return _well_formed(problem.steps)


def slip(problem: Problem, rng: random.Random) -> str:
    """Well-formed, but one step is off by one or ten."""
    while True:
        where = rng.randrange(len(problem.ops))
        steps = solve(problem.ops, problem.numbers, where, rng.choice((-10, -1, 1, 10)))
        if all(0 <= step.result <= LIMIT for step in steps):
            return _well_formed(steps)


def wordy(problem: Problem, rng: random.Random) -> str:
    """The answer's tags hold more than the number."""
    return _well_formed(problem.steps, f" {problem.thing}")


def untagged(problem: Problem, rng: random.Random) -> str:
    """The reasoning is closed, the answer has no tags."""
    return f"{_working(problem.steps)}\n</reasoning>\n{problem.answer}"


def chatter(problem: Problem, rng: random.Random) -> str:
    """The working is right, then it talks on and closes no tag."""
    ends = (f"the answer is {problem.answer}.", f"there are {problem.answer} {problem.thing}.")
    return f"{_working(problem.steps)}\nSo {rng.choice(ends)}"


def guess(problem: Problem, rng: random.Random) -> str:
    """An answer without any working, off by a little more often than not."""
    value = max(0, problem.answer + rng.choice((-2, -1, 0, 1, 2)))
    return f"I think it is {value}{rng.choice(('', f' {problem.thing}'))}."


DEMONSTRATIONS: dict[str, Callable[[Problem, random.Random], str]] = {
    "good": good,
    "chatter": chatter,
    "untagged": untagged,
    "guess": guess,
    "wordy": wordy,
    "slip": slip,
}


def demonstrate(problem: Problem, mixture: dict[str, float], rng: random.Random) -> str:
    """One demonstration, its kind drawn by the weights of `mixture`."""
    kind = rng.choices(list(mixture), weights=list(mixture.values()))[0]
    return DEMONSTRATIONS[kind](problem, rng)


def tokenizer_corpus(data: TinyMath, size: int) -> Iterator[str]:
    """Text of the kind the model reads and writes, every demonstration equally often."""
    rng = random.Random(f"tiny-math corpus {data.seed}")
    kinds = itertools.cycle(DEMONSTRATIONS.values())
    for problem, kind in zip(itertools.islice(data.stream("corpus"), size), kinds, strict=False):
        yield f"user\n{problem.question}"
        yield f"system\nassistant\n{kind(problem, rng)}"


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: digits stay single, the four tags are one token each and never merge."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=[PAD, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((strip_tags(text) for text in texts), trainer)
    core.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def strip_tags(text: str) -> str:
    """The text without tags, which are tokens of their own and need no merges."""
    return re.sub("|".join(map(re.escape, TAGS)), "", text)


def prompt_text(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[list[int]]:
    """Chat prompts followed by the reasoning prefix, which is tokenized apart: as in training."""
    texts = [prompt_text(tokenizer, question) for question in questions]
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
    return [ids + prefix for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def completion_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    return [[*ids, eos] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
FORMAT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


@dataclass(frozen=True)
class Grade:
    """What one completion got right."""

    exact: bool
    """The number between the answer's tags is the reference."""
    well_formed: bool
    """Reasoning and answer are tagged, in this order, and nothing else is there."""
    equations: int
    """How many equations it wrote."""
    equations_right: int
    """How many of them are true."""


def grade(completion: str, reference: int) -> Grade:
    found = ANSWER.search(completion)
    equations = EQUATION.findall(completion)
    right = sum(calculate(int(a), op, int(b)) == int(c) for a, op, b, c in equations)
    return Grade(
        exact=found is not None and int(found[1]) == reference,
        well_formed=FORMAT.fullmatch(PREFIX + completion) is not None,
        equations=len(equations),
        equations_right=right,
    )
