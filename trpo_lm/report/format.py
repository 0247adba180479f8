"""Numbers and untrusted text, formatted for a terminal or a page."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

_ESCAPE_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # titles, links and other strings
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_DIRECTION_OVERRIDES = set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


def clean(text: Any) -> str:
    """Return `text` on one line without escape sequences, control and direction characters."""
    return "".join(
        " " if character.isspace() else character
        for character in _ESCAPE_SEQUENCE.sub("", str(text))
        if character.isspace()
        or not (
            unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION_OVERRIDES
        )
    )


def conversation(prompt: Any) -> str:
    """Return a prompt as text; of messages, a paragraph each: its role, a colon, its content."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def number(value: float, scale: float | None = None) -> str:
    """Format `value` with two decimals; more if `scale` needs them for two digits."""
    size = abs(value if scale is None else scale)
    if size and not 1e-6 < size < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(2, 1 - math.floor(math.log10(size or 1)))}f}"
