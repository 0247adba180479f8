"""Errors that say what is wrong, where, and how to fix it.

A mistake of the user raises `TrpoLMError` before anything is generated; a fault at run time raises
`RunFault`, after the parameters are restored to the last accepted update. Command-line recipes
print either without a traceback and exit with its `exit_code`.
"""

# Controls but the line end, direction overrides, halves of surrogates: a name may hold any.
_UNPRINTABLE = dict.fromkeys(
    [*range(10), *range(11, 32), *range(127, 160), 0x200E, 0x200F, *range(0x202A, 0x202F),
     *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class TrpoLMError(ValueError):
    """A mistake in what the user passed; its text can be printed, whatever names it quotes.

    Args:
        what: The problem, naming the offending value.
        where: File and line, row index, argument or field that it concerns.
        hint: How to fix it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        where, hint = (t if t is None else str(t).translate(_UNPRINTABLE) for t in (where, hint))
        self.what = what = str(what).translate(_UNPRINTABLE)
        self.where, self.hint = where, hint
        text = what if where is None else f"{what} ({where})"
        super().__init__(text if hint is None else f"{text}\nhint: {hint}")


class RunFault(TrpoLMError):
    """A fault at run time: a bad reward, non-finite logits, a full disk."""

    exit_code = 3


class Interrupted(BaseException):
    """The run was stopped by a signal, after its state was saved.

    Like `KeyboardInterrupt` not an `Exception`: an `except Exception` in a reward function must not
    swallow it.

    Args:
        message: What was saved, and how to resume from it.
        signum: The signal's number; the exit code is 128 more, 130 for SIGINT and 143 for SIGTERM.
    """

    def __init__(self, message: str, *, signum: int):
        self.exit_code = 128 + signum
        super().__init__(message)
