"""Questions as the trainer takes them, and prompts as the model reads them."""

from collections.abc import Sequence
from decimal import Decimal

from ..settings.run_settings import Settings
from .chat_template import chat_ids
from .files import MESSAGE, Row, cell, is_conversation, read_dataset, sources, usable_prompts
from .tokenizer import Messages, Tokenizer


def extract_hash_answer(text: str) -> str | None:
    """GSM8K's final answer: what follows the last `####`; None where it is plain."""
    return text.rpartition("####")[2].strip() if "####" in text else None


def written(value: object) -> str:
    """An answer as its user writes it: 72 for the 72.0 of a column of floats, no exponent where
    the digits are few enough to read."""
    if isinstance(value, float | Decimal):
        number = Decimal(str(value))
        if number.is_finite() and -20 < number.adjusted() < 20:
            text = format(number, "f")
            return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value).strip()


def load_questions(config: Settings, split: str) -> list[Row]:
    """Rows of "train" or "test": the file's columns with `question`, `answer` (extracted; the raw
    text is kept as `solution`) and `prompt` (chat messages).

    Raises:
        UserError: missing file, split or column, malformed or empty data.
        RunError: the hub is out of reach.
    """
    each = sources(config, split)  # the settings, by data set of `dataset_mix`
    return [as_question(own, row) for own in each for row in read_dataset(own, split)]


def as_question(config: Settings, row: Row) -> Row:
    """A row of the data as the trainer takes it."""
    question, solution = cell(row, config.question_column), cell(row, config.answer_column)
    messages: Messages = []
    if is_conversation(question):
        messages = [{key: message[key] for key in MESSAGE} for message in question]
        question = messages[-1]["content"]
    text = written(solution)
    answer = extract_hash_answer(text)
    messages = messages or [{"role": "user", "content": str(question)}]
    if config.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return {
        "solution": solution,
        **row,
        "question": question,
        "answer": text if answer is None else answer,
        "prompt": messages,
    }


def encode_prompt(tokenizer: Tokenizer, config: Settings, question: Row) -> list[int]:
    """Token ids of chat template + reasoning prefix, each tokenized apart so that no merge crosses.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    prefix = tokenizer.encode(config.reasoning_prefix, add_special_tokens=False)
    return [*chat_ids(tokenizer, config, question["prompt"]), *prefix]


def encode_questions(
    tokenizer: Tokenizer, vocabulary: int, config: Settings, questions: Sequence[Row], what: str
) -> list[Row]:
    """Add `prompt_ids` to each; prompts over max_prompt_length are left out and counted.

    `vocabulary`: the ids below this one are tokens that the model knows.
    """
    rows = [{**q, "prompt_ids": encode_prompt(tokenizer, config, q)} for q in questions]
    return usable_prompts(config, rows, what, vocabulary)
