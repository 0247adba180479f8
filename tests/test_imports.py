"""The layer rule: the dependency order is the reading order. Read from the imports, with ast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trpo_lm

PACKAGE = Path(trpo_lm.__file__).parent
LAYERS = (
    ("errors", "config", "divergences", "advantages", "parameters", "conjugate_gradient",
     "trust_region", "line_search", "steering", "seeds"),
    ("fisher", "policy", "critic", "reward_models", "reward_workers", "rewards", "mdp", "prompts",
     "objective"),
    ("trpo", "ppo"),
)  # fmt: skip
ORDER = [name for names in LAYERS for name in names]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
NO_TORCH = ("errors", "config", "cli", "__init__")


def imports(path, *, toplevel=False):
    """Return the dotted names that a file imports; `toplevel` leaves functions out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if toplevel else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own(names):
    """Return the modules of the package among imported names."""
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "trpo_lm" and len(p) > 1}


def foreign(names):
    return {name.split(".")[0] for name in names} - {"trpo_lm", "__future__"}


def files():
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def layer(path):
    """Layers 0 to 2 are listed above, in reading order; every other file orchestrates: layer 3."""
    return LAYER.get(path.stem, len(LAYERS))


def test_the_listed_files_exist_and_there_is_no_drawer_for_odds_and_ends():
    names = {p.stem for p in files()}
    assert set(LAYER) <= names and all(p.parent == PACKAGE for p in files())
    assert not names & {"utils", "util", "helpers", "common", "misc", "base"}


@pytest.mark.parametrize("path", files(), ids=lambda p: p.stem)
def test_a_file_imports_lower_layers_or_earlier_files_of_its_own(path):
    for other in own(imports(path)) & {p.stem for p in files()}:
        if layer(path) < len(LAYERS):
            assert other in ORDER, f"{path.stem} imports {other}, of a higher layer"
            assert ORDER.index(other) < ORDER.index(path.stem), f"{path.stem} imports {other}"


def test_no_circle_of_imports():
    needs = {p.stem: own(imports(p)) & {q.stem for q in files()} for p in files()}
    while needs:
        ready = {name for name, others in needs.items() if not others & set(needs)}
        assert ready, f"circle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in ready}


def test_layer_0_needs_torch_only():
    for name in LAYERS[0]:
        allowed = {*sys.stdlib_module_names} | ({"torch"} if name not in NO_TORCH else set())
        assert foreign(imports(PACKAGE / f"{name}.py")) <= allowed, name


def test_only_layer_3_imports_accelerate():
    for path in files():
        if layer(path) < 3:
            assert "accelerate" not in foreign(imports(path)), path.name


def test_layers_0_to_2_know_no_ranks():
    for path in files():
        if layer(path) < 3:
            names = imports(path)
            assert not any(n.startswith("torch.distributed") for n in names), path.name


@pytest.mark.parametrize("name", NO_TORCH)
def test_settings_and_command_line_do_not_import_torch(name):
    assert not foreign(imports(PACKAGE / f"{name}.py", toplevel=True)) & {
        "torch", "transformers", "peft", "accelerate", "datasets",
    }  # fmt: skip


def test_import_trpo_lm_does_not_import_torch():
    code = (
        "import sys, trpo_lm, trpo_lm.config, trpo_lm.errors, trpo_lm.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_exists():
    for name in trpo_lm.__all__:
        assert getattr(trpo_lm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trpo_lm.nothing  # noqa: B018
