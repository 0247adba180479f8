"""The README's map: every file::symbol exists, every path it names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_fits_in_150_lines():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`(\w+\.py)::([\w.]+)`", README))))
def test_every_symbol_of_the_map_exists(place):
    file, symbol = place
    body = ast.parse((ROOT / "trpo_lm" / file).read_text(encoding="utf-8")).body
    for part in symbol.split("."):
        found = [n for n in body if getattr(n, "name", None) == part]
        assert found, f"{file} has no {symbol}"
        body = getattr(found[0], "body", [])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


def test_the_annotated_tree_names_every_module():
    named = set(re.findall(r"(\w+)\.py", README))
    modules = {p.stem for p in (ROOT / "trpo_lm").glob("*.py")} - {"__init__", "errors", "seeds"}
    assert modules <= named, modules - named


def test_python_examples_compile():
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        compile(block, "README.md", "exec")
