"""The best policy of a run: which it is, and how it is kept. Cases X07 and S09."""

import itertools
import json
import signal
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

import runs
from runs import checkpoints, in_child, killed_at, trainer
from trpo_lm import Trainer
from trpo_lm.errors import RunFault
from trpo_lm.training.best import BestPolicy, is_better, load_best, recover_best, save_best
from trpo_lm.training.folder import RunFolder
from trpo_lm.training.stages import Stages

# ---------------------------------------------------------------- which it is


@pytest.mark.parametrize(
    ("score", "ref_kl", "budget", "best", "better"),
    [
        (0.6, 0.5, 1.0, None, True),
        (0.6, 0.5, 1.0, 0.5, True),
        (0.6, 0.5, 1.0, 0.6, False),  # of equal ones the first
        (0.6, 1.04, 1.0, 0.5, True),  # the tolerance: 5% of the budget
        (0.6, 1.06, 1.0, None, False),
        (0.6, 9.0, None, 0.5, True),
        (None, None, 1.0, None, False),  # not evaluated, or every reward abstained
    ],
)
def test_which_policy_is_the_best(score, ref_kl, budget, best, better):
    before = best and BestPolicy(1, best, 0.1, budget)
    assert is_better(BestPolicy(2, score, ref_kl, budget), before) == better


# ---------------------------------------------------------------- in best/


def save_best_of(folder, update, score, on_enter=lambda name: None):
    policy = BestPolicy(update, score, 0.1, None)

    def write(path):
        (path / "x").write_text(str(update))

    save_best(RunFolder(folder), policy, write, Stages(on_enter))


def best_of(folder, update=99):
    best = recover_best(RunFolder(folder), update)
    assert not list(folder.glob(".tmp-*"))
    if best is None:
        assert not (folder / "best").exists()
        return None
    assert (folder / "best" / "x").read_text() == str(best.update)
    assert load_best(folder / "best") == best
    return best.update


def test_a_better_policy_takes_the_place_of_the_best(tmp_path):
    assert best_of(tmp_path) is None
    for update, score in ((2, 0.5), (4, 0.6)):
        save_best_of(tmp_path, update, score)
        assert best_of(tmp_path) == update
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]


def test_a_best_policy_of_an_abandoned_continuation_is_deleted(tmp_path):
    save_best_of(tmp_path, 4, 0.6)
    assert best_of(tmp_path, update=4) == 4
    assert best_of(tmp_path, update=3) is None


@pytest.mark.parametrize(
    "facts",
    ["", "[]", "{}", '{"update": 2}', '{"update": "2", "score": 1, "ref_kl": 0, "max_ref_kl": 1}'],
)
def test_a_best_policy_without_facts_is_deleted(tmp_path, facts):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text(facts)
    assert best_of(tmp_path) is None


@pytest.mark.parametrize("first", [False, True])
def test_X07_killed_at_every_stage_of_saving_the_best(tmp_path, first):
    """Afterwards there is a whole one: the new one, or where that was not finished the old one."""
    points = 0
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        folder.mkdir()
        if not first:
            save_best_of(folder, 2, 0.5)
        code = in_child(lambda: save_best_of(folder, 4, 0.6, killed_at(k)))  # noqa: B023
        if code == 0:
            break
        assert code == -signal.SIGKILL
        points += 1
        before = None if first else 2
        assert best_of(folder) == (before if k <= 2 else 4)  # from its last file on it is whole
    assert points == 4
    assert best_of(folder) == 4


def test_S09_a_disk_that_is_full_leaves_the_best_policy_before(tmp_path):
    save_best_of(tmp_path, 2, 0.5)

    def write(folder):
        (folder / "x").write_text("4")
        raise OSError(28, "No space left on device", "x")

    with pytest.raises(RunFault, match="No space left on device"):
        save_best(RunFolder(tmp_path), BestPolicy(4, 0.6, 0.1, None), write, Stages())
    assert best_of(tmp_path) == 2


# ---------------------------------------------------------------- over a run


def test_the_best_policy_within_the_budget_is_kept_and_survives_resuming(
    tmp_path, capsys, monkeypatch
):
    # score and reference KL after each update; the budget is 0.3, the tolerance 5% of it
    told = {1: (0.5, 0.1), 2: (0.9, 0.316), 3: (0.7, 0.314), 4: (0.7, 0.2), 5: (0.6, 0.1)}
    evaluate = Trainer.evaluate

    def scripted(self, *, reference=False):
        found = evaluate(self, reference=reference)
        if reference:
            return found
        score, ref_kl = told[self.updates_done]
        return replace(found, score=score, ref_kl=ref_kl)

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    options = {"evals": runs.HELD_OUT, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    made = trainer(tmp_path / "straight", updates=5, **options)
    made.train()
    expected = BestPolicy(update=3, score=0.7, ref_kl=0.314, max_ref_kl=0.3)
    assert made.best == expected
    best = tmp_path / "straight" / "best"
    assert json.loads((best / "best.json").read_text()) == asdict(expected)
    assert "best within the budget, update 3" in capsys.readouterr().out
    assert checkpoints(tmp_path / "straight") == ["checkpoint-000005"]  # best/ is not counted

    made.policy.load(load_file(best / "adapter_model.safetensors"), where="best")
    rows = runs.rows(tmp_path / "straight")
    assert made.policy.parameters.checksum() == rows[2]["policy/checksum"]

    for stop in (2, 4):
        folder = tmp_path / f"stopped at {stop}"
        trainer(folder, updates=stop, **options).train()
        resumed = trainer(folder, updates=5, resume_from_checkpoint="auto", **options)
        resumed.train()
        assert resumed.best == expected
        one, other = (runs.tensors(f / "best") for f in (tmp_path / "straight", folder))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    trainer(tmp_path / "straight", updates=1, overwrite_output_dir=True).train()
    assert not best.exists()  # it was the other run's


def test_without_evaluation_on_the_way_there_is_no_best(tmp_path):
    made = trainer(tmp_path, updates=1, evals=runs.HELD_OUT)
    made.train()
    assert made.best is None and not (tmp_path / "best").exists()
