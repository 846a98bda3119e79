"""What a model said to a prompt."""

from dataclasses import dataclass, field
from types import SimpleNamespace

Message = dict[str, object]
"""One of a conversation: role and content, and what else its role has."""


@dataclass(frozen=True)
class Conversation:
    """What a tool or an environment made of a completion."""

    prompt: list[Message]
    prompt_ids: list[int]
    """With what the environment added to the question."""
    messages: list[Message]
    """What came after the prompt, in turns."""
    turns: int
    """Of the model."""
    reward: float | None = None
    """By the environment; None where it has no opinion."""
    environment: SimpleNamespace = field(default_factory=SimpleNamespace)
    """Its attributes as the conversation ended."""
    problem: str = ""
    """What the environment did wrong: nothing is learnt from such a completion."""


@dataclass(frozen=True)
class Completion:
    """T tokens that follow a prompt, with the one that ended them; complete as it is returned.

    A tool or an environment may have given some of them: those are context, and nothing that is
    learnt, measured or limited counts them.
    """

    ids: list[int]
    """(T,) as they were sampled or given; never the text tokenized again."""
    logprobs: list[float]
    """(T,) log-probabilities by the policy that sampled, in nats; 0 where a token was given."""
    mask: list[int]
    """(T,) 1: sampled, 0: given."""
    finish_reason: str
    """"stop" (end of sequence or a stop string) or "length"; of a conversation also "turns" (it had
    all of them) and "environment" (which failed)."""
    text: str
    """Reasoning prefix and text, up to the end of the stop string; of a conversation the last
    turn's."""
    conversation: Conversation | None = None
    """Where it is one."""

    @property
    def failed(self) -> bool:
        """Whether it is to be left out, because its environment failed."""
        return self.conversation is not None and bool(self.conversation.problem)

    def after(self, prompt_ids: list[int]) -> list[int]:
        """The prompt that it follows: that of its question, unless an environment added to it."""
        return self.conversation.prompt_ids if self.conversation else prompt_ids

    @property
    def sampled(self) -> int:
        """How many of the tokens were sampled."""
        return sum(self.mask)

    @property
    def sampled_ids(self) -> list[int]:
        return [token for token, own in zip(self.ids, self.mask, strict=True) if own]
