"""The best evaluated policy within the budget, kept in `best/` beside the checkpoints.

It is a policy to use, not to resume from, and the limit on checkpoints does not count it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from trpo_lm.errors import TrpoLMError
from trpo_lm.storage import read_json, strict_json, sync, write_through
from trpo_lm.training.folder import RunFolder, discard, disk_fault, temporary
from trpo_lm.training.manifest import damaged, read_manifest, verify, write_manifest
from trpo_lm.training.stages import Stages

FACTS = "best.json"
TOLERANCE = 0.05  # a few hundred completions measure the reference KL to a few per cent


@dataclass(frozen=True)
class BestPolicy:
    """An evaluated policy; content of `best.json`.

    Attributes:
        update: Number of the update that made it.
        score: Mean held-out score; None where nothing was scored.
        ref_kl: KL to the reference on held-out prompts, nats per completion.
        max_ref_kl: Budget of the whole run, nats per completion; None without one.
    """

    update: int
    score: float | None
    ref_kl: float
    max_ref_kl: float | None


def is_better(policy: BestPolicy, best: BestPolicy | None) -> bool:
    """Whether an evaluated policy replaces the best one so far.

    It must lie within `1 + TOLERANCE` of the budget, because its reference KL is measured on a few
    hundred completions. Of equal scores the first wins.
    """
    budget = policy.max_ref_kl
    if policy.score is None:
        return False
    if budget is not None and policy.ref_kl > (1 + TOLERANCE) * budget:
        return False
    return best is None or best.score is None or policy.score > best.score


def save_best(
    run: RunFolder, policy: BestPolicy, write: Callable[[Path], None], stage: Stages
) -> None:
    """Replace the policy in `best/`. Call it on rank 0 only.

    Args:
        run: Folder of the run.
        policy: What `best.json` holds.
        write: Writes the policy's files into the folder it is given.
        stage: Names the steps.

    Raises:
        RunFault: If a file cannot be written; the policy that was there before still is.
    """
    final = run.best
    folder, old = temporary(final), temporary(final)
    try:
        with stage("best/policy"):
            folder.mkdir()
            write(folder)
        with stage("best/facts"):
            write_through(folder / FACTS, strict_json(asdict(policy)))
            write_manifest(folder, policy.update)  # last: it marks the folder as complete
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise disk_fault(error, folder) from error
    with stage("best/replace"):
        if os.path.lexists(final):
            os.rename(final, old)
    with stage("best/rename"):
        os.rename(folder, final)
        sync(final.parent)
        discard(old)


def load_best(folder: Path) -> BestPolicy:
    """Read the facts of a policy that `save_best` wrote, once all its files are found whole.

    Raises:
        TrpoLMError: Names a file that is missing or damaged.
    """
    if folder.is_symlink():
        raise TrpoLMError("it is a link", where=str(folder))
    manifest = read_manifest(folder)
    verify(folder, manifest)
    facts = read_json(folder / FACTS)
    numbers = [facts.get(name) for name in ("score", "ref_kl", "max_ref_kl")]
    sound = all(value is None or type(value) in (int, float) for value in numbers)
    if facts.get("update") != manifest.update or not sound or numbers[1] is None:
        raise damaged(folder, FACTS, "is not complete")
    return BestPolicy(manifest.update, *numbers)  # type: ignore[arg-type]


def recover_best(run: RunFolder, update: int) -> BestPolicy | None:
    """Return the best policy of a run as of an update; None where there is none.

    A best policy of a later update belongs to an abandoned continuation and is deleted. Where a
    killed process left several complete copies, the best of them becomes `best/`.
    """
    complete: list[tuple[float, Path, BestPolicy]] = []
    folders = [run.best, *run.path.glob(f".tmp-{run.best.name}-*")]
    for folder in folders:
        try:
            policy = load_best(folder)
            if policy.update <= update and policy.score is not None:
                complete.append((float(policy.score), folder, policy))
        except TrpoLMError:
            continue
    _, kept, policy = max(complete, key=lambda entry: entry[0], default=(0.0, None, None))
    for folder in folders:
        if folder != kept:
            discard(folder)
    if kept is not None and kept != run.best:
        os.rename(kept, run.best)
    return policy
