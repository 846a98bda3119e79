"""What a model said to a prompt."""

from dataclasses import dataclass


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
    """"stop" (end of sequence or a stop string) or "length"."""
    text: str
    """Reasoning prefix and text, up to the end of the stop string."""

    @property
    def sampled(self) -> int:
        """How many of the tokens were sampled."""
        return sum(self.mask)

    @property
    def sampled_ids(self) -> list[int]:
        return [token for token, own in zip(self.ids, self.mask, strict=True) if own]
