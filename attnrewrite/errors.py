"""What can go wrong, one class per audience. Every message is one clear sentence."""

from __future__ import annotations


class AttnRewriteError(Exception):
    """Base of the errors attnrewrite raises on purpose."""


class UserError(AttnRewriteError):
    """Bad usage or bad input: names the file or option and what is wrong with it (exit code 2)."""


class VerificationError(AttnRewriteError):
    """A rewritten model does not compute what the original computes (exit code 1)."""


class CompilerError(AttnRewriteError):
    """TVM, a linker or a GPU compiler failed (exit code 3); the rewritten model is still valid."""


class PassError(AttnRewriteError):
    """Our own bug: a pass left the graph invalid; names the pass and those that ran before it."""


def last_line(error: BaseException) -> str:
    """What went wrong in one line: TVM's messages start with a stack trace and say it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def first_error(log: str) -> str:
    """The line of a compiler's output that says what went wrong: the first with the word, or the first."""
    lines = [line.strip().rstrip("\0") for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
