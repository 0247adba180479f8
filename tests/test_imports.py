"""Folders are layers: what stands earlier in docs/method.md imports nothing that comes later."""

import ast
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import trpo_lm

PACKAGE = Path(trpo_lm.__file__).parent
METHOD = (PACKAGE.parent / "docs" / "method.md").read_text(encoding="utf-8")
MODULES = {
    p.relative_to(PACKAGE).as_posix(): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name not in ("__init__.py", "__main__.py")
}


def tree():
    """Return the package's files in the order in which docs/method.md lists them."""
    block = METHOD[METHOD.index("    trpo_lm/\n") :]
    lines = block[: block.index("\n    recipes/")].splitlines()[1:]
    found, folder = [], ""
    for line in lines:
        names = list(takewhile(re.compile(r"\w+(/|\.py)").fullmatch, line.split()))
        if names[0].endswith("/"):
            folder = names[0]
        else:
            inside = line.startswith(" " * 8)
            found += [f"{folder if inside else ''}{name}" for name in names]
    return found


ORDER = tree()


def imports(path, *, toplevel=False):
    """Return the dotted names that a file imports; `toplevel` leaves functions out."""
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in parsed.body if toplevel else ast.walk(parsed):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own(names):
    """Return the files of the package that imported names lead to."""
    found = set()
    for parts in (name.split(".") for name in names):
        if parts[0] == "trpo_lm":
            paths = ("/".join(parts[1:n]) + ".py" for n in range(2, len(parts) + 1))
            found |= {path for path in paths if path in MODULES}
    return found


def foreign(names):
    return {name.split(".")[0] for name in names} - {"trpo_lm", "__future__"}


def folder(name):
    return name.rpartition("/")[0]


def test_the_tree_lists_every_file_once():
    assert sorted(ORDER) == sorted(MODULES)
    assert not {Path(n).stem for n in ORDER} & {
        "utils",
        "util",
        "helpers",
        "common",
        "misc",
        "base",
    }


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_what_is_listed_before_it(name):
    later = {n for n in own(imports(MODULES[name])) if ORDER.index(n) >= ORDER.index(name)}
    assert not later, f"{name} imports {later}"


@pytest.mark.parametrize("name", [n for n in MODULES if folder(n)])
def test_each_folder_imports_the_libraries_of_its_layer(name):
    """Only `training` and what stands on it may know accelerate; `core` is torch alone."""
    before = {folder(n) for n in ORDER[: ORDER.index(name)]} | {folder(name)}
    libraries = foreign(imports(MODULES[name])) - {*sys.stdlib_module_names}
    if "lm" not in before:
        assert libraries <= {"torch"}
    if "training" not in before:
        assert "accelerate" not in libraries
        assert not any(n.startswith("torch.distributed") for n in imports(MODULES[name]))
    if folder(name) == "report":
        assert not libraries & {"torch", "transformers", "peft"}


def test_only_one_file_imports_accelerate():
    users = [n for n, path in MODULES.items() if "accelerate" in foreign(imports(path))]
    assert users == ["training/ranks.py"]


FOLDERS = sorted(PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("path", FOLDERS, ids=lambda p: p.parent.name)
def test_each_folder_says_what_may_be_imported_there(path):
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    assert len(parsed.body) == 1 and "mports" in (ast.get_docstring(parsed) or "")


def test_the_command_line_does_not_import_torch():
    code = (
        "import sys, trpo_lm, trpo_lm.config, trpo_lm.errors, trpo_lm.cli, trpo_lm.storage\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_exists():
    for name in trpo_lm.__all__:
        assert getattr(trpo_lm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trpo_lm.nothing  # noqa: B018
