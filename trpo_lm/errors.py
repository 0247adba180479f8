"""What goes wrong, said once: what, where, and how to mend it.

A mistake of the user raises `TrpoLMError` before anything is generated; a fault at run time raises
`RunFault`, after the parameters were put back to the last accepted update. Command-line recipes
print either without a traceback and leave with its `exit_code`.
"""


class TrpoLMError(ValueError):
    """A mistake in what the user passed.

    Args:
        what: The complaint, naming the offending value.
        where: File and line, row index, argument or field that it concerns.
        hint: How to mend it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        text = what if where is None else f"{what} ({where})"
        super().__init__(text if hint is None else f"{text}\nhint: {hint}")


class RunFault(TrpoLMError):
    """A fault met while running: a bad reward, non-finite logits, a full disk."""

    exit_code = 3
