"""transformers' callbacks: what they are told, and what they may ask for."""

from dataclasses import replace

import pytest
import runs
from runs import checkpoints, trainer
from transformers import EarlyStoppingCallback, TrainerCallback

from trpo_lm.errors import RunFault, TrpoLMError


class Listener(TrainerCallback):
    def __init__(self, **asks):
        self.heard, self.asks = [], asks

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hear(args, state, control, **kwargs):
            self.heard.append((name, state.global_step))
            if name == "on_log":
                assert kwargs["logs"]["objective/score_mean"] is not None
            if name == "on_evaluate":
                assert set(kwargs["metrics"]) == {"eval_score_mean", "eval_ref_kl"}
            for flag, (event, step) in self.asks.items():
                if (event, step) == (name, state.global_step):
                    setattr(control, flag, True)
            return control

        return hear


def test_callbacks_hear_what_transformers_would_tell_them(tmp_path):
    listener = Listener()
    trainer(
        tmp_path, updates=2, evals=runs.HELD_OUT, eval_steps=2, save_steps=1, logging_steps=2,
        callbacks=[listener],
    ).train()  # fmt: skip
    assert listener.heard == [
        ("on_train_begin", 0),
        ("on_step_begin", 0), ("on_step_end", 1), ("on_save", 1),
        ("on_step_begin", 1), ("on_step_end", 2), ("on_evaluate", 2), ("on_log", 2), ("on_save", 2),
        ("on_train_end", 2),
    ]  # fmt: skip


def test_what_callbacks_ask_for_is_done(tmp_path):
    listener = Listener(
        should_save=("on_step_end", 1),
        should_evaluate=("on_step_end", 2),
        should_training_stop=("on_evaluate", 2),
    )
    made = trainer(
        tmp_path, updates=5, save_steps=0, logging_steps=5, evals=runs.HELD_OUT,
        callbacks=[listener],
    )  # fmt: skip
    rows = made.train()
    assert len(rows) == 2 and rows[1]["objective/eval_score_mean"] is not None
    assert checkpoints(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]
    assert (tmp_path / "README.md").is_file()
    assert ("on_log", 2) in listener.heard and ("on_log", 1) not in listener.heard
    trainer(tmp_path, updates=3, evals=runs.HELD_OUT, resume_from_checkpoint="auto").train()
    assert len(runs.rows(tmp_path)) == 3


def test_stopping_by_callback_evaluates_and_saves(tmp_path):
    listener = Listener(should_training_stop=("on_step_end", 1))
    made = trainer(tmp_path, updates=5, save_steps=0, evals=runs.HELD_OUT, callbacks=[listener])
    made.train()
    assert made.after is not None and checkpoints(tmp_path) == ["checkpoint-000001"]


def test_a_dashboard_made_for_trl_finds_its_names(tmp_path):
    listener = Logs()
    trainer(tmp_path, updates=2, callbacks=[listener]).train()
    for logs, row in zip(listener.logs, runs.rows(tmp_path), strict=True):
        assert logs["reward"] == row["objective/score_mean"]
        assert logs["reward_std"] == row["objective/score_std"]
        assert logs["kl"] == row["objective/ref_kl_per_token"]
        assert logs["completions/mean_length"] == row["objective/completion_length"]
        assert logs["completions/clipped_ratio"] == 1 - row["objective/eos_rate"]
        assert logs.get("frac_reward_zero_std") == row["objective/equal_scores"]


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)


class Stops(EarlyStoppingCallback):
    """Made without arguments, and after several evaluations without a better score."""

    def __init__(self, patience=2):
        super().__init__(early_stopping_patience=patience)


@pytest.mark.parametrize("given", [Stops(), Stops, [Stops()], (Stops,), {Stops}])
def test_B39_early_stopping_follows_the_held_out_score(tmp_path, monkeypatch, given):
    made = trainer(tmp_path, updates=9, evals=runs.HELD_OUT, eval_steps=1, callbacks=given)
    measured, scores = made.evaluate(), iter([0.1, 0.5, 0.4, 0.6, 0.6, 0.2, 0.9])
    monkeypatch.setattr(made, "evaluate", lambda **_: replace(measured, score=next(scores)))
    monkeypatch.setattr(made, "_finish", lambda: None)
    rows = made.train()
    assert [row["objective/eval_score_mean"] for row in rows] == [0.5, 0.4, 0.6, 0.6, 0.2]
    assert made.callbacks.state.best_metric == 0.6 and made.callbacks.state.best_global_step == 3


def test_B39_a_resumed_run_remembers_the_best_score(tmp_path):
    options = {"evals": runs.HELD_OUT, "eval_steps": 1, "save_steps": 1, "callbacks": Stops(9)}
    rows = trainer(tmp_path, updates=2, **options).train()
    made = trainer(tmp_path, updates=3, resume_from_checkpoint="auto", **options)
    scores = [row["objective/eval_score_mean"] for row in rows]
    rows = made.train()
    scores.append(rows[-1]["objective/eval_score_mean"])
    assert made.callbacks.state.best_metric == max(scores)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_B39_a_resumed_run_stops_where_the_uninterrupted_one_does(tmp_path, monkeypatch, first):
    """Its patience is 2; the scores are those of updates 1 to 6."""
    scores = [0.5, 0.4, 0.6, 0.6, 0.2, 0.9]
    options = {"evals": runs.HELD_OUT, "eval_steps": 1, "save_steps": 1, "callbacks": Stops(2)}

    def run(updates, **resume):
        made = trainer(tmp_path, updates=updates, **options, **resume)
        plain = made.evaluate

        def scripted(**options):
            return replace(plain(**options), score=[0.1, *scores][made.updates_done])

        monkeypatch.setattr(made, "evaluate", scripted)
        return made.train()

    run(first)
    rows = run(6, resume_from_checkpoint="auto")
    assert [row["objective/eval_score_mean"] for row in rows] == scores[:5]
    assert len(run(6, resume_from_checkpoint="auto")) == 5


class Needs(TrainerCallback):
    def __init__(self, argument):
        pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda *_: None, "is no callback"),
        ([print], "is no callback"),
        ("wandb", "'wandb' is no callback"),
        ([Listener(), object()], "is no callback"),
        (int, "0 is no callback"),
        (Needs, "Needs cannot be made: TypeError.*argument"),
        (Stops(), "looks at evaluations, and there are none"),
    ],
)
def test_B39_what_is_no_callback_is_refused_at_construction(tmp_path, given, words):
    with pytest.raises(TrpoLMError, match=rf"(?s){words}.*callbacks"):
        trainer(tmp_path, callbacks=given)
    assert not any(tmp_path.iterdir())


class Fails(TrainerCallback):
    def __init__(self, event, *, raises=True):
        setattr(self, event, self.fail if raises else lambda *_, **__: 7)

    def fail(self, *_, **__):
        raise KeyError("no such thing")


@pytest.mark.parametrize("event", ["begin", "step_begin", "step_end", "log", "save", "end"])
def test_B39_a_callback_that_fails_is_named_and_what_was_accepted_is_kept(tmp_path, event):
    event = f"on_train_{event}" if event in ("begin", "end") else f"on_{event}"
    with pytest.raises(TrpoLMError, match=f"callback Fails failed: KeyError.*({event})") as caught:
        trainer(tmp_path, updates=1, callbacks=Fails(event)).train()
    assert isinstance(caught.value, RunFault) == (event != "on_train_begin")
    with pytest.raises(TrpoLMError, match=r"returned 7 instead of its control"):
        trainer(tmp_path / "7", updates=1, callbacks=Fails(event, raises=False)).train()
