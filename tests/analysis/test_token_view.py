"""The page, the picture and the table of one completion."""

import pytest

from trpo_lm.analysis.token_view import COLUMNS, draw_tokens


def a_row(token, position=1, **numbers):
    row = dict.fromkeys(COLUMNS, 0.1) | {"position": position, "token_id": 7, "token": token}
    return row | numbers


def test_the_page_the_picture_and_the_table(tmp_path):
    evil = "<script>alert(1)</script>&\x1b[31m\u202e$x^$"
    rows = [a_row(evil, kl=2.0, shift=-0.5), a_row("a\n", 2, shift=1.0), a_row("", 3)]
    files = draw_tokens(rows, tmp_path / "new" / "row-0", title="of <b>", prompt=evil, note=evil)
    assert [p.name for p in files] == ["row-0.html", "row-0.png", "row-0.csv"]
    page, picture, table = (p.read_bytes() for p in files)
    page = page.decode()
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page and "of &lt;b&gt;" in page and "a⏎" in page
    assert not [word for word in ("src=", "href=", "http:", "https:", "url(") if word in page]
    assert "default-src 'none'" in page
    # the scale of each track ends at its largest number, and names its unit
    assert "2.00 nats" in page and "-1.00" in page and "units of the score" in page
    assert page.count("background:#") == 4 * len(rows)
    assert picture.startswith(b"\x89PNG")
    assert table.decode().splitlines()[0] == ",".join(COLUMNS)


@pytest.mark.parametrize("count", [1, 300])
def test_short_and_long_completions_without_a_critic(tmp_path, count):
    nothing = {"value": None, "advantage": None, "reward": None}
    rows = [a_row(f"t{i}", i + 1, kl=0.0, shift=0.0, **nothing) for i in range(count)]
    conversation = [{"role": "user", "content": "what?"}]
    page, picture, _ = draw_tokens(rows, tmp_path / "x", title="t", prompt=conversation)
    html = page.read_text()
    assert "Value" not in html and "Advantage" not in html and "what?" in html
    assert html.count("background:#") == 2 * count
    assert picture.read_bytes().startswith(b"\x89PNG")
