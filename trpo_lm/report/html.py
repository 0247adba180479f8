"""The style that HTML pages share, and text that cannot become markup."""

from __future__ import annotations

import html
from typing import Any

from trpo_lm.report.format import clean

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
.note, figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #e5e5e5; text-align: right; font-variant-numeric: tabular-nums; }
th { color: #555; vertical-align: bottom; }
td.t, th.t { text-align: left; }
"""


def escape(text: Any) -> str:
    """Return `text` on one line, without control characters, for an element or an attribute."""
    return html.escape(clean(text))
