"""What a chat template puts between the turns of a conversation, as token ids.

A conversation is never tokenized again: to the ids that were sampled, those are added that the
template writes between them and the next turn of the model. A dummy conversation shows which.
"""

from collections.abc import Mapping, Sequence

from ..base.errors import UserError, panics_as_errors
from .tokenizer import Tokenizer

Message = Mapping[str, object]
QUESTION: Message = {"role": "user", "content": "What?"}
SAID = "\ue000said\ue001"  # characters for private use: in no template


class TurnTemplate:
    """The turns of a tokenizer's chat template.

    Args:
        options: What the tokenizer is to be called with.

    Raises:
        UserError: the template has no turns.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: dict, tools: Sequence[dict] | None = None
    ) -> None:
        self.tokenizer, self.options = tokenizer, dict(options)
        if tools:
            self.options["tools"] = list(tools)
        self.special = special_texts(tokenizer)
        first, later = (self.after([{**QUESTION, "content": text}]) for text in ("Why?", "How?"))
        if "Why?" not in first or "How?" not in later:
            raise UserError("the chat template shows no second message of a user: it has no turns")
        closing = tokenizer.encode(self.after([]), add_special_tokens=False)
        ends = closing[:1]
        self.end = ends[0] if ends and ends[0] in {*tokenizer.eos_token_ids} else None
        """The token that ends a turn, if that is one that ends a text."""

    def between(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """Ids from the end of what was sampled to the beginning of the model's next turn.

        Args:
            messages: What comes between. Texts of special tokens in them are broken up.
            ended: Whether the sampled ids include the token that ends a turn.
        """
        clean = [{**message, "content": self.harmless(message)} for message in messages]
        ids = self.tokenizer.encode(self.after(clean), add_special_tokens=False)
        return ids[1:] if ended and self.end is not None else ids

    def harmless(self, message: Message) -> str:
        """Its text, without what would be read as a special token."""
        text = str(message["content"])
        for special in self.special:
            text = text.replace(special, f"{special[:1]} {special[1:]}")
        return text

    def after(self, messages: Sequence[Message]) -> str:
        """What the template writes after a turn of the model: these messages and, if there are any,
        the beginning of its next turn."""
        talk = [QUESTION, {"role": "assistant", "content": SAID}, *messages]
        try:
            with panics_as_errors():
                text = self.tokenizer.apply_chat_template(
                    talk,  # type: ignore[arg-type]
                    add_generation_prompt=bool(messages),
                    **{**self.options, "tokenize": False},
                )
        except Exception as error:  # a template is code: it can raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(f"the chat template refuses a turn of {roles}: {error}") from error
        _, said, rest = str(text).partition(SAID)
        if not said:
            raise UserError("the chat template does not show what the model said: it has no turns")
        return rest


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts that are read as special tokens, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {str(token) for token in added.values() if getattr(token, "special", False)}
    texts |= {str(text) for text in getattr(tokenizer, "all_special_tokens", [])}
    texts |= {*getattr(tokenizer, "special_tokens", {})}
    return sorted(filter(None, texts), key=len, reverse=True)
