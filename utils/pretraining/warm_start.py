"""Examples for a warm start: asked as GRPO will ask, ended as its sampler will end them.

Prompts are made by the trainer's own code, so that their ids are those of training. A completion is
tokenized apart, as it is when a model generates: after the reasoning prefix, up to the end of the
first stop string, or with the end-of-text token that the chat template puts behind an answer.
"""

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..base.errors import UserError
from ..base.say import say
from ..base.text import counted, shown
from ..data import files, questions
from ..data.chat_template import chat_ids
from ..data.files import MESSAGE, Row
from ..data.tokenizer import Messages, Tokenizer
from ..settings.checks import room_for_sampling
from ..settings.run_settings import Settings
from .data import Rows, padded

OPTIONS = ("train_data_path", "val_data_path")
ANSWERS = {"question", "completion", "correct", "finish_reason"}
"""Columns of what evaluate_model.py writes."""
GSM8K = ("gsm8k", "openai/gsm8k")
SHOWN = 3  # rows that a message names
NumberedRow = tuple[str, Row]
"""A row after the file and the number by which messages name it."""
Pair = tuple[object, object]
"""A question (a text or a conversation), and what the model is to say."""


class StopRule(Protocol):
    """Where a completion ends: rollouts/stop_rule.py has it."""

    eos_ids: set[int]
    stop_strings: Sequence[str]

    def length(self, ids: list[int], checked: int) -> int | None: ...


@dataclass(frozen=True)
class Example:
    """What the model is to say, and after what."""

    where: str
    """The file and the row, for messages."""
    question: Row
    """As the trainer takes it: `prompt` has the messages."""
    text: str


def settings_for(preset: Settings, data: str) -> Settings:
    """The preset's settings, with another data set of which every row is read."""
    own = copy.copy(preset)
    changes: dict[str, object] = {"dataset": data, "eval_samples": 0, "dataset_mix": []}
    if data in GSM8K:
        changes |= {"dataset": GSM8K[1], "dataset_config": "main"}
    elif data != preset.dataset:
        changes |= {"dataset_config": ""}
    vars(own).update(changes)
    return own


def read_examples(preset: Settings, data: str, option: str = OPTIONS[0]) -> list[Example]:
    """The examples of a file, of the training split of a folder, or of a data set of the hub.

    option: what names the data; what is only validated on may be of the test split.

    Raises:
        UserError: missing, malformed, without the columns, of the test split, or none is left.
        RunError: the hub is out of reach.
    """
    own = settings_for(preset, data)
    try:
        rows, start = files.find_rows(own, "train", own.train_split)
    except UserError as error:
        raise UserError(f"{option} = {data!r}: {error}") from None
    numbered = [(f"{data}, row {n}", row) for n, row in enumerate(rows, start=start)]
    files.refuse_media(data, rows[0])
    trains = option == OPTIONS[0]
    if rows[0].keys() >= ANSWERS:
        if trains:
            refuse_test_answers(numbered)
        numbered = right_answers(own, data, numbered)
    examples = [example for where, row in numbered for example in of_row(own, where, row)]
    if trains:
        refuse_test_questions(preset, examples)
    return without_repetitions(data, examples)


def refuse_test_answers(numbered: list[NumberedRow]) -> None:
    """Raises UserError for answers that were collected on a test split."""
    for where, row in numbered:
        if row.get("split") == "test":
            raise UserError(
                f"{where}: split = 'test', and what is evaluated on must not be trained on: "
                "collect answers to training questions (evaluate_model.py --split train)"
            )


def right_answers(own: Settings, data: str, numbered: list[NumberedRow]) -> list[NumberedRow]:
    """The rows of evaluate_model.py that are right and came to their end.

    Raises:
        UserError: none is right.
    """
    right = [(where, row) for where, row in numbered if row.get("correct") is True]
    if not right:
        raise UserError(
            f"{data}: none of its {counted(len(numbered), 'answer')} is right: ask for more of "
            "each question (evaluate_model.py --n 8), or ask more questions"
        )
    ended = [(where, row) for where, row in right if ends(own, row)]
    unended = len(right) - len(ended)
    more = f", {unended} of them without their end: left out" if unended else ""
    say(f"{data}: {len(right):,} of {counted(len(numbered), 'answer')} right{more}")
    if not ended:
        raise UserError(
            f"{data}: no right answer ends as stop_strings = {json.dumps(own.stop_strings)} says: "
            "collect them with the settings that prompt_from names, and more --max-tokens"
        )
    return ended


def ends(own: Settings, row: Row) -> bool:
    """Whether a right answer came to its end, and to the one that these settings ask for."""
    text = str(row["completion"])
    said = not own.stop_strings or any(stop in text for stop in own.stop_strings)
    return row["finish_reason"] == "stop" and said


def of_row(own: Settings, where: str, row: Row) -> list[Example]:
    """Raises UserError for a row that lacks the columns, or has something else in them."""
    examples = []
    for question, said in pairs_of(own, where, row):
        for name, value in (("question", question), ("completion", said)):
            if complaint := files.wrong_cell(value, name == "completion"):
                raise UserError(f"{where}: {complaint} as {name}: {shown(row)}")
        plain = copy.copy(own)
        vars(plain).update(question_column="question", answer_column="answer")
        asked = questions.as_question(plain, {"question": question, "answer": said})
        examples.append(Example(where, asked, str(said)))
    return examples


def pairs_of(own: Settings, where: str, row: Row) -> list[Pair]:
    """What a row asks and has said, by the names of its columns."""
    if row.keys() >= ANSWERS:
        return [(row.get("prompt") or row["question"], row["completion"])]
    named = own.question_column, own.answer_column
    for question, answer in (named, ("prompt", "completion"), ("question", "answer")):
        if files.is_there(row, question) and files.is_there(row, answer):
            said = files.cell(row, answer)
            return [(files.cell(row, question), one_message(where, said))]
    if "messages" in row:
        return turns_of(where, row["messages"])
    raise UserError(
        f"{where}: has {', '.join(row) or 'no column'}, but needs {named[0]} and {named[1]} "
        "(question_column and answer_column of prompt_from), prompt and completion, or messages"
    )


def one_message(where: str, said: object) -> object:
    """TRL writes a completion as a conversation of one message."""
    if not isinstance(said, list):
        return said
    if not is_conversation(said) or len(said) != 1 or said[0]["role"] != "assistant":
        raise UserError(
            f"{where}: completion = {shown(said)} must be a text, or one message of the assistant"
        )
    return said[0]["content"]


def is_conversation(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and isinstance(m.get(k), str) for m in value for k in MESSAGE)


def turns_of(where: str, messages: object) -> list[Pair]:
    """Every turn of the assistant, after what had been said before it: the template decides how
    that reads, and drops what was thought in earlier turns where it does so for GRPO."""
    if not is_conversation(messages):
        raise UserError(
            f"{where}: messages = {shown(messages)} must be a list of objects with role and "
            "content, both texts"
        )
    assert isinstance(messages, list)
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise UserError(f"{where}: messages has no turn of the assistant, so nothing to learn")
    for n in places:
        if n == 0 or messages[n - 1]["role"] != "user":
            raise UserError(
                f"{where}: message {n + 1} is the assistant's and follows no user's: GRPO asks "
                "only what ends in a user's message"
            )
    return [(messages[:n], messages[n]["content"]) for n in places]


def refuse_test_questions(preset: Settings, examples: Sequence[Example]) -> None:
    """Raises UserError where an example asks what the preset's (local) test split asks."""
    if not preset.eval_samples or not files.local_path(preset.dataset, preset.start):
        return
    test = {asked(row) for row in questions.load_questions(preset, "test")}
    found = [example.where for example in examples if asked(example.question) in test]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{'; '.join(found[:SHOWN])}{more}: the question is one of the test split of "
            f"{preset.dataset}, which the run is evaluated on: leave the row out"
        )


def asked(question: Row) -> str:
    """All that is said before the answer, to compare by."""
    return json.dumps(question["prompt"], sort_keys=True)


def without_repetitions(data: str, examples: list[Example]) -> list[Example]:
    """Several samples of a question may be the same: each counts once."""
    kept = list({(asked(e.question), e.text): e for e in reversed(examples)}.values())[::-1]
    if len(kept) < len(examples):
        left = len(examples) - len(kept)
        say(f"{data}: {left:,} of {counted(len(examples), 'row')} repeat others: left out")
    return kept


@dataclass(frozen=True)
class Encoder:
    """How texts become the ids that GRPO's sampler would have given."""

    tokenizer: Tokenizer
    vocabulary: int
    settings: Settings
    stop: StopRule

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """The questions with `prompt_ids` and `completion_ids`; what GRPO would not ask, or would
        cut off, is left out and counted.

        Raises:
            UserError: a completion that would not end, or would end earlier; none is left.
        """
        end = 0 if self.stop.stop_strings else self.end_of_text()
        asked = [{**e.question, "completion_ids": self.completion(e, end)} for e in examples]
        rows = questions.encode_questions(
            self.tokenizer, self.vocabulary, self.settings, asked, "training"
        )
        files.check_ids(
            self.settings.model_name,
            (i for row in rows for i in row["completion_ids"]),
            self.vocabulary,
        )
        return self.short_enough(rows)

    def short_enough(self, rows: list[Row]) -> list[Row]:
        prefix = self.tokenizer.encode(self.settings.reasoning_prefix, add_special_tokens=False)
        room = room_for_sampling(self.settings, len(prefix))
        most = min(self.settings.max_new_tokens, room)
        kept = [row for row in rows if len(row["completion_ids"]) <= most]
        what = f"over max_new_tokens = {most}, which GRPO would cut off"
        if not kept:
            least = min(len(row["completion_ids"]) for row in rows)
            raise UserError(
                f"every completion is {what}; the shortest has {least} tokens: raise "
                "max_new_tokens in the file of prompt_from"
            )
        if len(kept) < len(rows):
            left = counted(len(rows) - len(kept), "completion")
            say(f"{left} of {len(rows):,} {what}: left out")
        return kept

    def completion(self, example: Example, end: int) -> list[int]:
        """Ids of what follows the prompt, with the token that ends it."""
        text = self.sampled_text(example)
        ids = self.after_prefix(text)
        if not self.stop.stop_strings:
            while ids and ids[-1] in self.stop.eos_ids:
                ids.pop()
            ids = [*ids, end]
        length = self.stop.length(ids, 0)
        if length != len(ids) or not length:
            ended = ids[: length or 0]
            raise UserError(
                f"{example.where}: GRPO's sampler would end this completion after {len(ended)} of "
                f"its {len(ids)} tokens, at {shown(self.tokenizer.decode(ended[-1:]))}: take that "
                "out of the text"
            )
        return ids

    def sampled_text(self, example: Example) -> str:
        """Without the prefix, which is given, and up to the end of the first stop string."""
        text = without_prefix(example.text, self.settings.reasoning_prefix)
        if not text.strip():
            raise UserError(f"{example.where}: the completion is empty: leave the row out")
        if not self.stop.stop_strings:
            return text
        cuts = [text.index(s) + len(s) for s in self.stop.stop_strings if s in text]
        if not cuts:
            raise UserError(
                f"{example.where}: the completion {shown(text)} has none of stop_strings = "
                f"{json.dumps(list(self.stop.stop_strings))}, so that GRPO's sampler would not end "
                "it there: add one, or set stop_strings = [] in the file of prompt_from"
            )
        return text[: min(cuts)]

    def after_prefix(self, text: str) -> list[int]:
        """SentencePiece puts a space before what stands alone, which nobody would have sampled."""

        def encode(part: str) -> list[int]:
            return self.tokenizer.encode(part, add_special_tokens=False)

        line, alone, joined = encode("\n"), encode("a"), encode("\na")
        if joined[: len(line)] != line or joined[len(line) :] == alone:
            return encode(text)
        ids = encode("\n" + text)
        return ids[len(line) :] if ids[: len(line)] == line else encode(text)

    def end_of_text(self) -> int:
        """The token that the chat template puts behind an answer; else the tokenizer's own."""
        messages: Messages = [{"role": "user", "content": "?"}]
        if self.settings.chat_template != "plain":
            opened = chat_ids(self.tokenizer, self.settings, messages)
            answered = [*messages, {"role": "assistant", "content": "!"}]
            ids = chat_ids(self.tokenizer, self.settings, answered, opening=False)
            if (end := first_after(opened, ids, self.stop.eos_ids)) is not None:
                return end
        own = getattr(self.tokenizer, "eos_token_id", None)
        return own if own in self.stop.eos_ids else min(self.stop.eos_ids)


def first_after(opened: list[int], ids: list[int], wanted: Collection[int]) -> int | None:
    """The first wanted id behind what two lists begin with in common."""
    common = next((n for n, (a, b) in enumerate(zip(opened, ids, strict=False)) if a != b), None)
    start = min(len(opened), len(ids)) if common is None else common
    return next((token for token in ids[start:] if token in wanted), None)


def without_prefix(text: str, prefix: str) -> str:
    """What was sampled of a completion that begins with the prefix, with or without the white
    space at its end."""
    if text.startswith(prefix):
        return text[len(prefix) :]
    bare = prefix.rstrip()
    return text[len(bare) :].lstrip() if bare and text.startswith(bare) else text


def as_rows(rows: Sequence[Row], length: int, end: int, option: str) -> Rows:
    """Padded, with only the completions as targets."""
    pairs = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    return padded(pairs, length, end, option)
