"""A model of one's own as the reward: a classifier with a score head, or a language model's Yes.

Which of the two it is, its weights say. With a head (`score.weight`, as in Hugging Face's
...ForSequenceClassification) the reward is the head's output at the last token of the conversation
in the model's own chat template: its logit, as TRL takes it. Without one the model is asked whether
the answer is right, and the reward is P(yes) / (P(yes) + P(no)) of its next token (a generative
verifier, arXiv:2408.15240). mlx-lm must know the architecture.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn

from ..base.errors import RunError, UserError, panics_as_errors, reason
from ..base.text import Json, filled
from ..data import files
from ..gradient import head as head_module
from ..model import hf_config, loading, served_prompt
from .answers import last_text

QUESTION = """Question:
{question}

Reference answer:
{answer}

Proposed answer:
{completion}

Is the proposed answer correct? Reply with Yes or No."""


Head = tuple[mx.array, mx.array]
"""Float32 (labels, H) weight and (labels,) bias."""


class Tokenizer(Protocol):
    """What is read of one of mlx-lm's."""

    has_chat_template: bool

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, messages: list, *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class RewardModel:
    """Scores completions with a model in a folder or on the hub.

    Args:
        reward_model: Folder, or hub name.
        head: Name of the score head's weights.
        label: Which output of a head with several; -1 where there is one.
        prompt: What a model without a head is asked, with {question}, {answer} and {completion}.
        yes, no: The words whose first tokens are compared.
        batch_tokens: Tokens (with padding) of one forward pass, at least one completion.
        unload: Free its memory after each call and load it again for the next.

    Raises:
        UserError: no such model, or one that can't score.
    """

    own_timeout = True  # it is not to be interrupted: what it computes has an end
    model: nn.Module | None
    tokenizer: Tokenizer
    head: Head | None

    def __init__(
        self,
        reward_model: str,
        trust_remote_code: bool = False,
        head: str = "score",
        label: int = -1,
        prompt: str = QUESTION,
        yes: str = "Yes",
        no: str = "No",
        batch_tokens: int = 8192,
        unload: bool = False,
    ) -> None:
        if not reward_model:
            raise UserError("set reward_model to a folder or a hub name")
        if label < -1 or batch_tokens < 1:
            raise UserError(f"label = {label} must be at least 0, batch_tokens at least 1")
        if "{completion}" not in prompt:
            raise UserError("its prompt must contain {completion}")
        self.name, self.trust = reward_model, trust_remote_code
        self.head_name, self.label = head, label
        self.prompt, self.batch_tokens, self.unload = prompt, batch_tokens, unload
        self.folder = find_folder(reward_model)
        self.load()
        self.words = [self.first_token(word) for word in (yes, no)] if self.head is None else []
        if len({*self.words}) == 1:
            raise UserError(f"{yes!r} and {no!r} begin with the same token")
        self.release()

    def __call__(
        self, prompts: list, completions: list, question: list[str], answer: list[str]
    ) -> list[float]:
        if self.model is None:
            self.load()
        texts = [last_text(completion) for completion in completions]
        if self.head is not None:
            pairs = zip(prompts, completions, strict=True)
            chats = [([*prompt, *completion], False) for prompt, completion in pairs]
        else:
            fields = zip(question, answer, texts, strict=True)
            chats = [([{"role": "user", "content": self.asked(*f)}], True) for f in fields]
        values = self.scores([self.encode(*chat) for chat in chats])
        self.release()
        return values

    def load(self) -> None:
        try:
            with panics_as_errors():
                loaded = load_scorer(self.folder, self.head_name, self.trust)
            self.model, self.tokenizer, self.head = loaded
            self.vocabulary = loading.embeddings(loaded[0])
        except Exception as error:  # other libraries on untrusted files: they raise anything
            raise UserError(f"model {self.name} cannot be loaded: {reason(error)}") from error
        if not self.tokenizer.has_chat_template:
            raise UserError(f"the tokenizer of {self.name} has no chat template")
        count = 0 if self.head is None else self.head[0].shape[0]
        if self.head is not None and not (self.label < count if self.label >= 0 else count == 1):
            raise UserError(f"the head of {self.name} has {count} outputs: set label below {count}")

    def release(self) -> None:
        """Give the memory back, if it is wanted."""
        if self.unload:
            self.model = self.head = None
            mx.clear_cache()

    def first_token(self, word: str) -> int:
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if not ids:
            raise UserError(f"{word!r} is no token of {self.name}")
        files.check_ids(self.name, ids, self.vocabulary)
        return ids[0]

    def asked(self, question: str, answer: str, completion: str) -> str:
        fields = {"question": str(question), "answer": str(answer), "completion": completion}
        return filled(self.prompt, fields)

    def encode(self, messages: list[dict[str, str]], opened: bool) -> list[int]:
        """Token ids of a conversation, with the opening of an answer if one is to follow."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template is code, although in a sandbox
            raise RunError(
                f"the chat template of {self.name} refuses the prompt: {error}"
            ) from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def scores(self, rows: list[list[int]]) -> list[float]:
        files.check_ids(self.name, chain(*rows), self.vocabulary)
        values = [0.0] * len(rows)
        for batch in batches([len(row) for row in rows], self.batch_tokens):
            lengths = mx.array([len(rows[i]) for i in batch])
            longest = max(len(rows[i]) for i in batch)
            tokens = mx.array([rows[i] + [0] * (longest - len(rows[i])) for i in batch])  # (B, T)
            found = cast(list[float], self.score(tokens, lengths).tolist())
            for i, value in zip(batch, found, strict=True):
                values[i] = value
            mx.clear_cache()
        return values

    def score(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """(B,) scores of (B, T) tokens of which (B,) count: the rest is padding at the end."""
        assert self.model is not None
        hidden = head_module.hidden_states(self.model, tokens)
        last = hidden[mx.arange(len(lengths)), lengths - 1]  # (B, H)
        if self.head is not None:
            weight, bias = self.head
            return (last.astype(mx.float32) @ weight.T + bias)[:, self.label]
        logits = head_module.head(self.model, last).astype(mx.float32)  # (B, V)
        yes, no = self.words
        return mx.sigmoid(logits[:, yes] - logits[:, no])


def find_folder(name: str) -> Path:
    from mlx_lm.utils import _download

    try:
        loading.check_model(name)
        local = loading.find_model(name)
        return local.absolute() if local else _download(name)
    except UserError as error:
        raise UserError(str(error).replace("model_name", "reward_model")) from None
    except (OSError, ValueError) as error:
        raise RunError(f"reward_model = {name!r} cannot be loaded from the hub: {error}") from error


def load_scorer(folder: Path, head: str, trust: bool) -> tuple[nn.Module, Tokenizer, Head | None]:
    """Model, tokenizer and the head; None where there is none."""
    from mlx_lm import utils

    config = utils.load_config(folder)
    names = [name for file in folder.glob("model*.safetensors") for name in mx.load(str(file))]
    found: dict[str, mx.array] = {}
    added = hf_config.translate_config(config)
    if f"{head}.weight" in names:
        added["tie_word_embeddings"] = True  # a classifier has no vocabulary head to load
    elif "SequenceClassification" in str(config.get("architectures")):
        raise ValueError(f"it is a classifier without {head}.weight: set head")

    def with_head(config: dict[str, Json]) -> tuple[type[nn.Module], type]:
        """The architecture's class, which takes the head's weights out before all must fit."""
        base, arguments = utils._get_classes(config)

        class Scorer(base):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                for part in ("weight", "bias"):
                    if f"{head}.{part}" in weights:
                        found[part] = weights.pop(f"{head}.{part}")
                return super().sanitize(weights) if hasattr(base, "sanitize") else weights

        return Scorer, arguments

    model, _ = utils.load_model(
        folder, model_config=added, get_model_classes=with_head, trust_remote_code=trust
    )
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # other types are slower on the CPU
    options = {"trust_remote_code": trust}
    tokenizer = utils.load_tokenizer(folder, options)
    served_prompt.ask_plainly(tokenizer, folder)
    if not found:
        return model, tokenizer, None
    weight = found["weight"].astype(mx.float32)  # (labels, H)
    return model, tokenizer, (weight, found.get("bias", mx.zeros(1)).astype(mx.float32))


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, as many as fit into `budget` tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
