"""What a chat template puts between the turns of a conversation, as token ids.

A conversation is never tokenized again: to the ids that were sampled, those are added that the
template writes between them and the next turn of the model. A dummy conversation shows which.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from ..base.errors import UserError, panics_as_errors
from .tokenizer import Messages, Tokenizer

Message = Mapping[str, object]
QUESTION: Message = {"role": "user", "content": "What?"}
SAID = "\ue000said\ue001"  # characters for private use: in no template
THOUGHTS = "", "<think>\nHm.\n</think>\n\n"  # before what is said


class TurnTemplate:
    """The turns of a tokenizer's chat template.

    Args:
        options: What the tokenizer is to be called with.
        tools: Schemas of the tools that the model may call.

    Raises:
        UserError: there is no template, or it has no turns; with tools, also where it does not show
            what a tool says.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: dict, tools: Sequence[dict] | None = None
    ) -> None:
        self.tokenizer, self.options = tokenizer, dict(options)
        if "chat_template" not in options and not getattr(tokenizer, "has_chat_template", True):
            raise UserError("the tokenizer has no chat template, and so no turns")
        if tools:
            self.options["tools"] = list(tools)
        self.special = special_texts(tokenizer, self.options)
        self.shown: set[object] = set()
        self.check("user")
        if tools:
            self.check("tool")
        closing = tokenizer.encode(self.after([]), add_special_tokens=False)
        ends = closing[:1]
        self.end = ends[0] if ends and ends[0] in {*tokenizer.eos_token_ids} else None
        """The token that ends a turn, if that is one that ends a text."""

    def check(self, role: object) -> None:
        """Raises UserError where the template leaves out what that role says."""
        if role in self.shown:
            return
        for text in ("Why?", "How?"):
            if text not in self.after([{"role": role, "content": text, "name": "tool"}]):
                raise UserError(
                    f"the chat template does not show a message of the role {role} after one of "
                    "the model: set chat_template to a Jinja file that does"
                )
        self.shown.add(role)

    def rewrites(self) -> bool:
        """Whether the template would write earlier turns of the model in another way than they were
        sampled (Qwen3's drops thoughts, and some write an opening that they later leave out)."""
        opening = self.rendered([QUESTION], True)
        for thought in THOUGHTS:
            said: Message = {"role": "assistant", "content": f"{thought}{SAID}"}
            later = self.rendered([QUESTION, said, {**QUESTION, "content": "How?"}], True)
            if not later.startswith(f"{opening}{thought}{SAID}"):
                return True
        return False

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the messages that open a conversation, and of the beginning of the model's turn.
        They are the data's own: texts of special tokens in them are read as such."""
        options = {**self.options, "tokenize": True}
        with panics_as_errors():
            return self.tokenizer.apply_chat_template(
                as_given(messages), add_generation_prompt=True, **options
            )

    def between(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """Ids from the end of what was sampled to the beginning of the model's next turn.

        Args:
            messages: What comes between. Texts of special tokens in them are broken up.
            ended: Whether the sampled ids include the token that ends a turn.

        Raises:
            UserError: the template refuses the messages, or does not show what their role says.
        """
        for message in messages:
            self.check(message["role"])
        clean = [{key: self.harmless(part) for key, part in m.items()} for m in messages]
        ids = self.tokenizer.encode(self.after(clean), add_special_tokens=False)
        return ids[1:] if ended and self.end is not None else ids

    def harmless(self, value: object) -> object:
        """A text without what would be read as a special token; anything else as it is."""
        if not isinstance(value, str):
            return value
        for special in self.special:
            value = value.replace(special, f"{special[:1]} {special[1:]}")
        return value

    def after(self, messages: Sequence[Message]) -> str:
        """What the template writes after a turn of the model: these messages and, if there are any,
        the beginning of its next turn."""
        talk = [QUESTION, {"role": "assistant", "content": SAID}, *messages]
        try:
            text = self.rendered(talk, bool(messages))
        except Exception as error:  # a template is code: it can raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(f"the chat template refuses a turn of {roles}: {error}") from error
        _, said, rest = text.partition(SAID)
        if not said:
            raise UserError("the chat template does not show what the model said: it has no turns")
        return rest

    def rendered(self, messages: Sequence[Message], more: bool) -> str:
        """A conversation as text; with the opening of the model's next turn if there is `more`."""
        options = {**self.options, "tokenize": False}
        with panics_as_errors():
            return self.tokenizer.apply_chat_template(
                as_given(messages), add_generation_prompt=more, **options
            )


def as_given(messages: Sequence[Message]) -> Messages:
    """Messages as a tokenizer takes them: those of tools have more than role and content."""
    return cast(Messages, [dict(message) for message in messages])


def special_texts(tokenizer: Tokenizer, options: Mapping[str, object]) -> list[str]:
    """The texts that are read as special tokens, longest first; with them those of other tokens
    that were added and that the template writes, such as `<tool_call>`."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    template = str(options.get("chat_template") or getattr(tokenizer, "chat_template", ""))
    texts = {
        str(token)
        for token in added.values()
        if getattr(token, "special", False)
        or (len(str(token).strip()) > 1 and str(token) in template)
    }
    texts |= {str(text) for text in getattr(tokenizer, "all_special_tokens", [])}
    texts |= {*getattr(tokenizer, "special_tokens", {})}
    return sorted(filter(None, texts), key=len, reverse=True)
