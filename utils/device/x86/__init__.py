"""What only x86-64 processors run: exponentials several at a time."""

from .exponentials import WAYS, exp, logsumexp

__all__ = ["WAYS", "exp", "logsumexp"]
