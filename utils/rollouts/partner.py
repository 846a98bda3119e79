"""An environment that a person's conversation goes on with."""

from collections.abc import Callable

from ..data.tokenizer import Messages
from ..settings.run_settings import Settings
from .environments import Environments, Failed, whose


class Partner:
    """Answers what a model says to a question, as in training.

    Args:
        note: Is told what the environment did wrong, and how it ended.
    """

    def __init__(
        self, a: Settings, environments: Environments, seed: int, note: Callable[[str], None]
    ) -> None:
        self.a, self.environments, self.seed, self.note = a, environments, seed, note

    def begin(self, messages: Messages) -> Messages:
        """The question, with what the environment adds; none if it cannot begin."""
        *before, last = messages
        self.instance, self.turns = self.environments.make(self.seed), 0
        row = {"question": last["content"], "prompt": messages}
        try:
            text = self.instance.begin(row).result() or ""
        except Failed as error:
            return self.failed(error)
        return [*before, {**last, "content": f"{last['content']}{text}"}]

    def answer(self, text: str) -> Messages:
        """What the environment answers; none when the conversation is over."""
        self.turns += 1
        try:
            messages, over = self.instance.step(text).result()
            if not over and self.turns < self.a.max_turns:
                return messages
            for message in messages:
                self.note(f"[{message['role']}] {message['content']}")
            reward, _ = self.instance.close().result()
        except Failed as error:
            return self.failed(error)
        self.note("(over)" if reward is None else f"(over, its reward is {reward:g})")
        return []

    def failed(self, error: Failed) -> Messages:
        """Say what the environment did; there is nothing to go on with."""
        self.note(f"{whose(self.a)} {error}")
        return []
