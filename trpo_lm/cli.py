"""The command line of the recipes: settings from flags and YAML, errors without tracebacks.

The dataclasses of `config.py`, and a recipe's own, are the only list of settings; their fields
become flags here. Nothing is guessed: an unknown key, a wrong type or a value out of range is an
error that names its file and line, and all errors are reported at once.

This module never imports torch, so that `--help` answers at once. It does not use
`transformers.HfArgumentParser`: importing it costs 0.7 s, and that parser stops at the first error,
guesses abbreviations and does not know the lines of a file. argparse only formats the help text.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from trpo_lm.config import ELSEWHERE
from trpo_lm.errors import Interrupted, TrpoLMError

# ---------------------------------------------------------------- settings

_EXPECTED = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text",
    dict: "a mapping as JSON or YAML",
}  # fmt: skip
_METAVAR = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Setting(NamedTuple):
    """One field of a dataclass, as the command line sees it."""

    item: type  # bool, int, float, str or dict
    many: bool  # a list of them
    optional: bool  # None is a value
    default: Any
    help: str

    @property
    def expected(self) -> str:
        plural = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}
        what = f"a list of {plural[self.item]}" if self.many else _EXPECTED[self.item]
        return f"{what}, or none" if self.optional else what


class _Entry(NamedTuple):
    """A value from a file or the command line, not validated yet."""

    name: str
    place: str  # file and line, or 'command line'
    source: str  # the text there
    value: yaml.Node | list[str]  # the words after a flag


def parse(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    positional: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Turn the command line, and the file that `--config` names, into settings.

    The command line wins over the file, the file over the defaults. `--max_kl 0.05`,
    `--max-kl 0.05` and `--max_kl=0.05` are the same; `--load_in_4bit` alone means true; `none` or
    `null` is None where None is allowed; a list is `--reward_weights 1 0.5`. `--help` prints the
    settings and exits. `--debug` is left to `main`. Two classes with a field of the same name share
    one flag.

    Args:
        classes: Dataclasses whose fields are declared with `trpo_lm.config.option`, of type bool,
            int, float, str, a list of one of them, a dict, or one of these or None.
        argv: The words after the name of the program; default: those of this process.
        description: First paragraph of the help text.
        positional: Required settings, whose flags may be left out in this order.

    Returns:
        One instance of each class, in order.

    Raises:
        TrpoLMError: If anything is unknown, mistyped or out of range; one error lists them all.
    """
    settings: dict[str, _Setting] = {}
    for cls in classes:
        settings = _settings_of(cls) | settings
    flags, problems = _split(sys.argv[1:] if argv is None else argv, positional)
    if "help" in flags:
        _help_parser(classes, settings, description, positional).print_help()
        raise SystemExit(0)

    config = flags.pop("config", None)
    flags.pop("debug", None)
    entries = [] if config is None else _read_yaml(config, problems)
    for name, words in flags.items():
        entries.append(_Entry(name, "command line", shlex.join(words) or "nothing", words))

    for name in positional:
        if name not in {e.name for e in entries}:
            problems.append(TrpoLMError(f"{name.upper()} is missing", where="command line"))

    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, place, source, value in entries:
        if name not in settings:
            problems.append(TrpoLMError(_unknown(name, settings), where=place))
            continue
        setting = settings[name]
        try:
            if isinstance(value, yaml.Node):
                values[name] = _from_node(value, setting)
            else:
                values[name] = _from_words(value, setting)
            places[name] = place
        except ValueError as error:
            advice = f" ({error})" if isinstance(error, _Advice) else ""
            what = f"{name} must be {setting.expected}, not {source}{advice}"
            problems.append(TrpoLMError(what, where=place))

    instances = []
    for cls in classes:
        try:
            instances.append(cls(**{n: v for n, v in values.items() if n in _settings_of(cls)}))
        except TrpoLMError as error:  # a value out of range
            named = [n for n in places if re.search(rf"\b{n} = ", error.what)]
            where = ", ".join(f"{n}: {places[n]}" for n in named) or error.where
            problems.append(TrpoLMError(error.what, where=where, hint=error.hint))
    _raise_all(problems)
    return tuple(instances)


def _settings_of(cls: type) -> dict[str, _Setting]:
    """Return the fields of a dataclass that have a help text."""
    hints = get_type_hints(cls)
    return {
        f.name: _setting(f.name, hints[f.name], f.default, f.metadata["help"])
        for f in fields(cls)
        if "help" in f.metadata
    }


def _setting(name: str, hint: Any, default: Any, help: str) -> _Setting:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in choices if kind is not NoneType]
    many = get_origin(kinds[0]) is list
    item = get_args(kinds[0])[0] if many else get_origin(kinds[0]) or kinds[0]
    if len(kinds) != 1 or item not in _EXPECTED:
        raise TypeError(f"the command line cannot set {name}: {hint}")
    return _Setting(item, many, NoneType in choices, default, help)


def _split(
    argv: Sequence[str], positional: Sequence[str]
) -> tuple[dict[str, list[str]], list[TrpoLMError]]:
    """Split words into {flag: its values}; words before any flag are the positional ones."""
    flags: dict[str, list[str]] = {}
    problems = []
    current = None
    for word in argv:
        if word == "-h":
            word = "--help"
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = flags[name.replace("-", "_")] = [value] if equals else []
        elif current is None and len(flags) < len(positional):
            flags[positional[len(flags)]] = [word]
        elif current is None:
            problems.append(TrpoLMError(f"unexpected argument {word!r}", where="command line"))
        else:
            current.append(word)
    return flags, problems


def _read_yaml(config: list[str], problems: list[TrpoLMError]) -> list[_Entry]:
    """Return the settings of a file; errors in the file itself are added to `problems`.

    Nodes are read, not the values that YAML makes of them: a message can then quote the source and
    its line, `1e-3` is a number (text in YAML 1.1) and `1:30` is not 90.
    """
    if len(config) != 1:
        problems.append(TrpoLMError("--config takes one YAML file", where="command line"))
        return []
    path = config[0]
    what, where = "the settings file is not YAML text", path
    text, root = "", None
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        what = f"the settings file is {'not a mapping' if root else 'empty'}"
    except OSError as error:
        what, where = f"cannot read the settings file {path!r}: {error.strerror}", "--config"
    except yaml.MarkedYAMLError as error:
        what = f"the settings file is not valid YAML: {error.problem}"
        where = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else path
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    if not isinstance(root, yaml.MappingNode):
        hint = "a settings file holds one 'setting: value' a line"
        problems.append(TrpoLMError(what, where=where, hint=hint))
        return []

    entries, lines = [], {}
    for key, node in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _source(text, key)
        line = key.start_mark.line + 1
        place = f"{path}, line {line}"
        if name in lines:
            what = f"{name} is set twice, first in line {lines[name]}"
            problems.append(TrpoLMError(what, where=place))
        lines.setdefault(name, line)
        entries.append(_Entry(name, place, _source(text, node), node))
    return entries


def _source(text: str, node: yaml.Node) -> str:
    """Return the text of a node, shortened to a line."""
    line = " ".join(text[node.start_mark.index : node.end_mark.index].split()) or "nothing"
    return line if len(line) <= 60 else line[:57] + "..."


class _Advice(ValueError):
    """A value of the wrong type, with a way to fix it."""


def _from_words(words: list[str], setting: _Setting) -> Any:
    """Convert the words after a flag; ValueError if they do not fit the setting."""
    if setting.item is bool and not setting.many and not words:
        return True
    if setting.many and words and not (setting.optional and _is_none(words)):
        return [_scalar(word, setting.item) for word in words]
    (word,) = words
    return None if setting.optional and _is_none(words) else _scalar(word, setting.item)


def _from_node(node: yaml.Node, setting: _Setting) -> Any:
    """Convert a YAML node; ValueError if it does not fit the setting."""
    if setting.item is dict and isinstance(node, yaml.MappingNode):
        return _mapping(yaml.serialize(node))
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(n, yaml.ScalarNode) for n in nodes):
        raise ValueError
    if setting.optional and nodes == [node] and (_is_null(node) or _is_none([node.value])):
        return None
    if setting.many != isinstance(node, yaml.SequenceNode) or any(map(_is_null, nodes)):
        raise ValueError
    if setting.item is str and any(n.tag != "tag:yaml.org,2002:str" for n in nodes):
        raise _Advice("YAML reads it as something else; put it in quotes")
    items = [_scalar(n.value, setting.item) for n in nodes]
    return items if setting.many else items[0]


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _is_none(words: list[str]) -> bool:
    return len(words) == 1 and words[0].lower() in ("none", "null")


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError from error
    if not isinstance(value, dict):
        raise ValueError
    return value


def _scalar(text: str, item: type) -> Any:
    if item is dict:
        return _mapping(text)
    if item is not bool:
        return item(text)
    if text.lower() not in _BOOLS:
        raise ValueError
    return _BOOLS[text.lower()]


def _unknown(name: str, settings: dict[str, _Setting]) -> str:
    plain = name.replace("-", "_")
    if plain in ELSEWHERE:
        return f"unknown setting {name!r}: {ELSEWHERE[plain]}"
    close = difflib.get_close_matches(plain, [*settings, "config", "debug"], n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {close[0]}?" if close else "")


def _raise_all(problems: list[TrpoLMError]) -> None:
    """Raise one error that lists all problems, if there are any."""
    if len(problems) == 1:
        hint = problems[0].hint or "--help lists every setting"
        raise TrpoLMError(problems[0].what, where=problems[0].where, hint=hint)
    if problems:
        lines = "".join(f"\n  {p.what} ({p.where})" for p in problems)
        raise TrpoLMError(
            f"{len(problems)} settings are wrong:{lines}", hint="--help lists every setting"
        )


def _with_commands(description: str) -> str:
    """Return a recipe's description with commands that work in the current folder."""

    def command(match: re.Match[str]) -> str:
        here = recipe_command(match[1])
        return here if here.startswith("trpo-lm") else match[0]

    return re.sub(r"(?:accelerate launch|python) recipes/(\w+)\.py", command, description)


def _help_parser(
    classes: Sequence[type],
    settings: dict[str, _Setting],
    description: str,
    positional: Sequence[str],
) -> argparse.ArgumentParser:
    """Return an argparse parser that formats the help text; it parses nothing."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(
        prog=recipe_command(script.stem) if script.parent.resolve() == recipes() else None,
        description=_with_commands(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=" ".join(
            ["%(prog)s", *map(str.upper, positional), "[--config FILE.yaml] [--setting value ...]"]
        ),
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--help", action="store_true", help="show this text and exit")
    text = "YAML file of 'setting: value' lines; the command line wins over it"
    general.add_argument("--config", metavar="FILE.yaml", help=text)
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    names = set()
    for cls in classes:
        summary = (cls.__doc__ or cls.__name__).strip().splitlines()[0]
        group = parser.add_argument_group(cls.__name__, summary.replace("%", "%%"))
        for name in [n for n in _settings_of(cls) if n not in names]:
            names.add(name)
            setting = settings[name]
            default = str(setting.default)
            if setting.default is None or isinstance(setting.default, bool):
                default = default.lower()
            help_text = f"{setting.help} [{default}]".replace("%", "%%")
            metavar = _METAVAR[setting.item] + (" ..." if setting.many else "")
            group.add_argument(f"--{name}", metavar=metavar, help=help_text)
    return parser


# ---------------------------------------------------------------- running


def recipes() -> Path:
    """Return the folder of the recipes: in a clone beside the package, where installed in it."""
    package = Path(__file__).resolve().parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def recipe_command(name: str) -> str:
    """Return the words that run a recipe here: by its path in a clone's root, else by `trpo-lm`."""
    script = Path("recipes", f"{name}.py")
    if script.is_file() and script.resolve() == recipes() / script.name:
        return f"python {script}"
    return f"trpo-lm {name.replace('_', '-')}"


def redraw(draw: Callable[[], None]) -> int:
    """Call `draw` for a `python -m` command, print an error in one line, return the exit code."""
    try:
        draw()
    except TrpoLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def main(run: Callable[[], None], *, debug: bool | None = None) -> NoReturn:
    """Run a recipe and exit with its exit code.

    0: done; 2: a mistake of the user; 3: a fault at run time; 130 and 143: stopped by SIGINT and
    SIGTERM. Errors are printed on stderr in two lines. Any other exception is a bug and passes
    through with its traceback.

    Args:
        run: The recipe. It also parses its settings, so that their errors are printed here.
        debug: Print the traceback of an error too; default: whether `--debug` was given.
    """
    if debug is None:
        debug = "debug" in _split(sys.argv[1:], ())[0]
    code = 0
    try:
        run()
    except TrpoLMError as error:
        if debug:
            traceback.print_exc()
        where = "" if error.where is None else f" ({error.where})"
        print(f"error: {error.what}{where}", file=sys.stderr)
        if error.hint is not None:
            print(f"hint: {error.hint}", file=sys.stderr)
        code = error.exit_code
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)


# A flag or variable that holds a secret, by a word of its name: hub_token, but not max_tokens.
_SECRET_NAME = re.compile(
    r"(?:^|[-_])(?:token|key|apikey|password|passwd|passphrase|secret|credentials?)(?:$|[-_])",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)")


def command_line() -> str:
    """Return the command that started this process, quoted for a shell, its secrets masked.

    Masked are the values of flags and variables with the name of a secret (`--hub_token x`,
    `API_KEY=x`), and words that look like one (`hf_...`, `https://user:password@host`).
    """
    words, masked = [], False
    for word in sys.orig_argv:
        name, equals, _ = word.partition("=")
        secret = _SECRET_NAME.search(name) is not None
        if masked and not word.startswith("--"):
            words.append("***")
        elif secret and equals:
            words.append(f"{name}=***")
        else:
            words.append(_SECRET_VALUE.sub("***", word))
        masked = secret and not equals and word.startswith("--")
    return shlex.join(words)
