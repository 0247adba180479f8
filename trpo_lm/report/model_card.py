"""The model card: the README of a saved adapter."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from trpo_lm.report.format import clean, number
from trpo_lm.report.run_log import Rows, column, load_run
from trpo_lm.report.statistics import largest
from trpo_lm.report.style import KL_UNIT

_LIMITS = """## Limits

- The KL is exact for each visited state, averaged over sampled completions of the training prompts
  at the training temperature; on other prompts it may be larger.
- A higher score is what the reward measures, which may not be what its author meant: read samples
  before trusting it.
- The adapter keeps the base model's licence, biases and errors. It was not tested for safety."""


def model_card(run_dir: str | Path, facts: Mapping[str, Any]) -> str:
    """Return the README of a saved adapter, from the run's metrics and facts of the caller.

    Texts are escaped for Markdown and HTML. No folder of this machine appears.

    Args:
        run_dir: Folder of the run.
        facts: `base_model` and `command` (a string, or a list of arguments); and, if known,
            `name` and `dataset` (as a hub names them), `algorithm` ("TRPO"), `rewards` (list of
            names), `data` (in words), `seed`, `versions`
            (package to version), `settings` (name to value), and `samples` (rows as
            for `Console.samples`).
    """
    base, rows = str(facts["base_model"]), load_run(run_dir)
    algorithm = _escape(facts.get("algorithm", "TRPO"))
    rewards = ", ".join(_escape(_public(name)) for name in facts.get("rewards", [])) or "a reward"
    command = facts["command"]
    command = shlex.split(command) if isinstance(command, str) else command
    origin = {"data": facts.get("data"), "seed": facts.get("seed"), **facts.get("versions", {})}
    parts = [
        f"---\n{_front_matter(facts, rows).to_yaml()}\n---",
        f"# LoRA adapter trained with {algorithm}",
        f"An adapter for **{_escape(_public(base))}**, fine-tuned with trpo_lm ({algorithm}) to "
        f"raise **{rewards}**.",
        "![Score, KL of each update and KL to the reference](plots/overview.png)",
        _result(rows),
        "## Use\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(_public(base))})\n"
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")\n'
        "```",
        f"## How it was made\n\n```bash\n{clean(_portable(command))}\n```",
        _table(["", ""], [(k, _public(str(v))) for k, v in origin.items() if v is not None]),
    ]
    if facts.get("settings"):
        lines = [f"{name}: {_yaml(value)}" for name, value in facts["settings"].items()]
        parts += ["### Settings", "```yaml\n" + "\n".join(lines) + "\n```"]
    if facts.get("samples"):
        columns = ["prompt", "reference", "policy", "score_before", "score_after"]
        header = ["prompt", "reference", "policy", "before", "after"]
        samples = [[row.get(name, "") for name in columns] for row in facts["samples"]]
        parts += ["## Samples", "Written by the models, not by a person.", _table(header, samples)]
    return "\n\n".join([*parts, _LIMITS]) + "\n"


def _front_matter(facts: Mapping[str, Any], rows: Rows) -> Any:
    """Return what a hub reads of the card: base, data, and the last held-out score."""
    from huggingface_hub import EvalResult, ModelCardData  # half a second, for the card alone

    scores = column(rows, "objective/eval_score_mean")
    scores = scores[np.isfinite(scores)]
    data = facts.get("dataset") if _on_hub(facts.get("dataset")) else None
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data or "prompts",
            dataset_name=data or "held-out prompts",
            metric_type="reward",
            metric_name="mean score of held-out prompts",
            metric_value=round(float(score), 4),
        )
        for score in scores[-1:]
    ]
    base = facts["base_model"]
    return ModelCardData(
        library_name="peft",
        base_model=base if _on_hub(base) else None,
        base_model_relation="adapter" if _on_hub(base) else None,
        datasets=[data] if data else None,
        pipeline_tag="text-generation",
        tags=["lora", "reinforcement-learning", "trpo_lm"],
        model_name=facts.get("name", "adapter") if results else None,
        eval_results=results or None,
    )


def _on_hub(name: Any) -> bool:
    """Whether this has the form of a hub id, and is no folder here."""
    form = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name or ""))
    return form is not None and not Path(str(name)).exists()


def _portable(words: Sequence[str]) -> str:
    """Return a command with placeholders for the paths of this machine."""
    words = list(words)
    if words and re.fullmatch(r"python[\d.]*(\.exe)?", re.split(r"[/\\]", words[0])[-1]):
        words[0] = "python"
        if re.split(r"[/\\]", " ".join(words[1:2]))[-1] == "trpo-lm":
            words[:2] = ["trpo-lm"]

    def placed(match: re.Match[str]) -> str:
        *folders, name = re.split(r"[/\\]", match[2].rstrip("/\\"))
        return match[1] + ("recipes/" if folders[-1:] == ["recipes"] else "path/to/") + name

    path = r"(^|=)((?:file://)?(?:~|[A-Za-z]:)?[/\\].*)"
    return shlex.join(re.sub(path, placed, word, flags=re.DOTALL) for word in words)


def _yaml(value: Any) -> str:
    """Return a value in one line of JSON, which is YAML too, without paths of this machine."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return json.dumps(clean(_public(value)) if isinstance(value, str) else value, default=str)


def summary(rows: Rows) -> list[tuple[str, float, float]]:
    """Return the changes over a run: a metric in words, its first and its last value."""
    words = {
        "objective/score_mean": "mean score, training prompts",
        "objective/eval_score_mean": "mean score, held-out prompts",
        "objective/ref_kl": "KL to the reference, nats per completion",
        "objective/entropy": "entropy, nats per token",
        "objective/completion_length": "completion length, tokens",
        "objective/eos_rate": "completions that end by themselves, share",
    }
    lines = []
    for name, text in words.items():
        values = column(rows, name)
        values = values[np.isfinite(values)]
        if len(values) > 1 or len(values) == len(rows) == 1:  # measured once is no change
            lines.append((text, float(values[0]), float(values[-1])))
    return lines


def _result(rows: Rows) -> str:
    """Return the section on scores and KLs."""
    last = rows[-1]
    skipped = sum(bool(row.get("skipped")) for row in rows)
    rejected = int((column(rows, "line_search/accepted") == 0).sum())
    kl, ref_kl = column(rows, "trust_region/kl"), column(rows, "objective/ref_kl")
    return "\n\n".join(
        [
            "## Result",
            _table(["", "first", "last"], summary(rows)),
            f"- {last['update']} updates, of which {skipped} skipped and {rejected} rejected; "
            f"{last.get('completions') or 0:,} completions sampled.\n"
            f"- Largest KL of one update: {_of_limit(largest(kl), last['max_kl'])}.\n"
            f"- Largest KL to the reference: {_of_limit(largest(ref_kl), last['max_ref_kl'])}.",
            "Training prompts are measured before an update's step, held-out prompts after it.",
        ]
    )


def _of_limit(value: float, limit: float | None) -> str:
    if limit is None:
        return f"{value:.4g} {KL_UNIT} (no limit)"
    return f"{value:.4g} of {limit:g} {KL_UNIT} allowed"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; cells are escaped, floats rounded."""
    lines = [header, ["---"] * len(header)]
    lines += [[_escape(_text(value)) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _escape(text: Any) -> str:
    """Return `text` escaped so that Markdown and HTML show it literally, anywhere in a line."""
    special = r"[^\w .,;'?%+=()/-]|\b_|_\b|(?<=www)\."  # an underscore inside a word is harmless
    return re.sub(special, lambda match: f"&#{ord(match[0])};", clean(text))


def _public(text: str) -> str:
    """Return `text` with every absolute path reduced to its last part."""
    text = text.replace("file://", "")
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        text = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return re.sub(r"(?<![\w./\\])(~|[A-Za-z]:)?[/\\]([^\s/\\]+[/\\])*(?=[^\s/\\])", "", text)
