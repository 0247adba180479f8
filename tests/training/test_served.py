"""Whole runs that are sampled by servers."""

import os
import signal
from dataclasses import replace

import processes
import pytest
import tiny
import torch
from lying_server import LyingServer

import runs
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.errors import Interrupted, RunFault, TrpoLMError
from trpo_lm.lm import servers as client
from trpo_lm.training import metrics
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages
from trpo_lm.training.trainer import Trainer

DISTANT = TRPO(max_kl=0.5, max_ref_kl=None, cg_iterations=4, fisher_completions=8)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.02)


@pytest.fixture
def server():
    with LyingServer(tiny.build("llama"), tiny.tokenizer()) as made:
        yield made


def served(folder, *servers, model=None, **options):
    options = {"updates": 3, "save_steps": 1, "rollout_timeout": 60.0} | options
    urls = [s if isinstance(s, str) else s.url for s in servers]
    model = tiny.build("llama") if model is None else model
    return runs.trainer(folder, model=model, rollout_servers=urls, **options)


@pytest.mark.parametrize("algorithm", ["trpo", "ppo"])
def test_a_run_samples_from_each_version_of_its_policy(server, tmp_path, algorithm):
    made = served(tmp_path / "run", server, evals=runs.HELD_OUT, algorithm=algorithm)
    made.train()
    rows = runs.rows(tmp_path / "run")
    assert [row["update"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["objective/sampler_kl"] < 1e-9 and row["objective/sampler_gap"] < 1e-5
        assert row["objective/sampler_truncated"] is None  # nothing to correct
    asked = [body["model"] for path, body in server.log if path == "/v1/completions"]
    versions = list(dict.fromkeys(asked))
    assert versions[1] == "base"  # the reference, between the probe and the policy
    assert [v.partition("-")[2] for v in versions] == [
        "probe0", "", "000000", "000001", "000002", "000003"
    ]  # fmt: skip
    assert not server.names and not list((tmp_path / "run").glob(".tmp-*"))


def test_a_run_in_process_reports_the_distance_of_the_rows_that_it_watched(tmp_path):
    runs.trainer(tmp_path / "run", updates=1).train()
    (row,) = runs.rows(tmp_path / "run")
    assert row["objective/sampler_kl"] < 1e-9 and 0 < row["objective/sampler_gap"] < 1e-4


def test_two_servers_draw_what_one_draws(server, tmp_path):
    with LyingServer(tiny.build("llama"), tiny.tokenizer()) as other:
        served(tmp_path / "two", server, other, updates=2).train()
    served(tmp_path / "one", server, updates=2).train()
    assert runs.rows(tmp_path / "one") == runs.rows(tmp_path / "two")
    assert runs.completions(tmp_path / "one") == runs.completions(tmp_path / "two")


def test_a_reference_that_came_as_an_adapter_is_published_too(server, tmp_path):
    model = tiny.policy("llama", spread=0.1).model
    made = Trainer(
        model, runs.score, train_dataset=runs.PROMPTS,
        args=runs.config(tmp_path / "run", rollout_servers=[server.url], updates=1),
        eval_dataset=runs.HELD_OUT, processing_class=tiny.tokenizer(), plots=False,
    )  # fmt: skip
    made.train()
    asked = [body["model"] for path, body in server.log if path == "/v1/completions"]
    assert "base" not in asked and any(name.endswith("-reference") for name in asked)
    assert made.before.ref_kl == 0


def rank_of_a_run(folder, url, shard_base):
    made = served(folder, url, updates=2, save_steps=0, shard_base=shard_base)
    made.train()
    return made.policy.parameters.checksum(), made.servers.folder.exists()


@pytest.mark.distributed
@pytest.mark.parametrize("shard_base", [False, True])
def test_two_ranks_publish_once_and_share_a_server(server, tmp_path, shard_base):
    given = tmp_path / "run", server.url, shard_base
    answers = processes.ranks(2, rank_of_a_run, *given, timeout=600)
    (one, left), (other, _) = (answer[1] for answer in answers)
    assert one == other and not left
    loaded = [body["lora_name"] for path, body in server.log if path == "/v1/load_lora_adapter"]
    assert len(loaded) == len(set(loaded)) == 3  # the probe and two versions
    prompts = [b["prompt"] for p, b in server.log if b and b.get("model") == loaded[1]]
    assert len(prompts) == 4  # of an update, of both ranks
    assert all(row["objective/sampler_gap"] < 1e-5 for row in runs.rows(tmp_path / "run"))


# ---------------------------------------------------------------- the start


def test_the_servers_are_part_of_the_examination(server, tmp_path):
    data = runs.PROMPTS
    found = Trainer.examine(
        tiny.build("llama"), runs.score, train_dataset=data,
        args=runs.config(tmp_path / "run", rollout_servers=[server.url]),
        processing_class=tiny.tokenizer(), peft_config=tiny.lora(),
    )  # fmt: skip
    checks = [f.checked for f in found.findings if "server" in f.checked]
    assert len(checks) == 3 and found.error is None and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "context, fits", [(9, False), (11, True)], ids=["no room", "room"]
)  # the longest prompt has 6 tokens
def test_a_server_has_room_for_the_longest_row(tmp_path, context, fits):
    with LyingServer(tiny.build("llama"), tiny.tokenizer(), context=context) as server:
        if fits:
            served(tmp_path / "run", server)
            return
        with pytest.raises(TrpoLMError, match=r"serves 9 tokens.*have 11"):
            served(tmp_path / "run", server)


@pytest.mark.parametrize("lie", ["ignored", "refuse"])
def test_an_adapter_that_is_not_served_ends_the_run_before_it_begins(server, tmp_path, lie):
    server.lie = lie
    with pytest.raises(TrpoLMError) as error:
        served(tmp_path / "run", server)
    assert error.value.exit_code == 2 and not list((tmp_path / "run").iterdir())


def test_another_model_ends_the_run_before_it_begins(server, tmp_path):
    with pytest.raises(TrpoLMError, match="another distribution"):
        served(tmp_path / "run", server, model=tiny.build("llama", seed=1))


# ---------------------------------------------------------------- the certificate


def test_a_stale_adapter_ends_the_run_and_keeps_the_last_good_update(server, tmp_path):
    made = served(tmp_path / "run", server, algorithm=DISTANT, updates=6)
    made.stage.on_enter = runs.entering("rollout", 2, action=lambda: server.tell("stale"))
    with pytest.raises(RunFault, match=r"nats per completion from the policy") as error:
        made.train()
    assert error.value.where == "rollout_servers" and "resume with" in error.value.hint
    last = len(runs.rows(tmp_path / "run"))
    assert last >= 1 and runs.checkpoints(tmp_path / "run")[-1] == f"checkpoint-{last:06d}"
    server.lie = None
    served(
        tmp_path / "run", server, algorithm=DISTANT, updates=last + 1,
        resume_from_checkpoint="auto",
    ).train()  # fmt: skip
    assert len(runs.rows(tmp_path / "run")) == last + 1


def shifted(batch, by):
    """The batch as if a sampler had drawn each first token with e^-by of the probability."""
    drawn = batch.rollout.padded(batch.old_logprobs).clone()
    drawn[:, 0] -= by
    return replace(batch, rollout=replace(batch.rollout, drawn_logprobs=drawn))


def test_the_distance_is_that_of_the_definition():
    policy, ranks = tiny.policy("llama", spread=0.2), Ranks(60.0, Stages())
    batch = tiny.batch(policy, each=64)
    each = torch.linspace(-0.4, 0.6, len(batch.rollout))
    row = metrics.sampler_distance(shifted(batch, each), ranks)
    x = each.double()
    assert row["objective/sampler_kl"] == pytest.approx(float((x.exp() - 1 - x).mean()), rel=1e-4)
    gap = float(x.abs().sum() / batch.rollout.lengths.sum())
    assert row["objective/sampler_gap"] == pytest.approx(gap, rel=1e-4)
    none = replace(batch, rollout=replace(batch.rollout, drawn_logprobs=None))
    assert set(metrics.sampler_distance(none, ranks).values()) == {None}


def test_the_estimate_is_the_kl_of_the_sampler_from_the_policy():
    """Drawn from one policy, measured under another: KL by samples against the exact one."""
    sampler, policy = tiny.policy("llama", spread=0.3), tiny.policy("llama", spread=0.25)
    drawn = tiny.batch(sampler, each=300, length=4)
    mine = tiny.Batch.from_rollout(policy, drawn.rollout)
    rollout = replace(
        drawn.rollout, drawn_logprobs=drawn.rollout.padded(drawn.old_logprobs)
    )  # every row's
    found = metrics.sampler_distance(replace(mine, rollout=rollout), Ranks(60.0, Stages()))
    exact = tiny.categorical_kl(
        old=sampler.logprobs(drawn.old_features), new=policy.logprobs(mine.old_features)
    )
    assert found["objective/sampler_kl"] == pytest.approx(
        float(exact.sum()) / len(rollout), rel=0.1
    )


@pytest.mark.parametrize("kl, max_kl, ends", [
    (0.024, 0.1, False), (0.026, 0.1, True), (0.026, 1.0, False), (0.026, None, True),
    (float("nan"), 0.1, True), (float("inf"), 0.1, True),
])  # fmt: skip
def test_a_share_of_the_trust_region_ends_the_run(kl, max_kl, ends):
    row = {"objective/sampler_kl": kl, "objective/sampler_gap": 0.1}
    if not ends:
        metrics.check_sampler(row, max_kl)
        return
    with pytest.raises(RunFault, match="25% of max_kl"):
        metrics.check_sampler(row, max_kl)


def test_weights_are_the_truncated_ratios_of_completions():
    batch, ranks = tiny.batch(tiny.policy("llama", spread=0.2)), Ranks(60.0, Stages())
    by = torch.tensor([-0.5, 0.0, 0.3, 0.69, 0.7, 2.0, 9.0, -3.0])
    for shift, expected in ((by, by.exp().clamp(max=2.0).double()), (0 * by + 1e-5, None)):
        row = metrics.sampler_distance(shifted(batch, shift), ranks)
        weights = metrics.sampler_weights(shifted(batch, shift), row, ranks)
        if expected is None:
            assert weights is None and "objective/sampler_truncated" not in row
            continue
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        assert row["objective/sampler_truncated"] == 3 / 8


def test_weights_make_the_surrogate_that_of_the_old_policy(server, tmp_path):
    """A server that is a little off: what the update gets are weighted advantages."""
    made = served(tmp_path / "run", server, algorithm=DISTANT, updates=1)
    with torch.no_grad():  # another base than ours from here on
        server.base.lm_head.weight += 0.02 * torch.randn(13, 8, generator=torch.manual_seed(0))
    seen = {}
    update = type(made.algorithm).update

    def watched(self, objective, state):
        seen["advantages"] = objective.batch.rollout.padded(objective.advantages)
        seen["batch"] = objective.batch
        return update(self, objective, state)

    object.__setattr__(made.algorithm, "update", watched.__get__(made.algorithm))
    advantages = type(made.algorithm).advantages

    def plain(self, *arguments):
        seen["plain"] = advantages(self, *arguments)
        return seen["plain"]

    object.__setattr__(made.algorithm, "advantages", plain.__get__(made.algorithm))
    made.train()
    ratio = metrics.drawn_log_ratio(seen["batch"]).sum(-1).exp().clamp(max=2.0)
    assert (ratio - 1).abs().max() > 1e-3
    mask = seen["batch"].rollout.action_mask
    expected = (seen["plain"] * ratio[:, None]).float().where(mask, 0)
    torch.testing.assert_close(seen["advantages"].float(), expected, rtol=1e-4, atol=1e-6)
    assert runs.rows(tmp_path / "run")[0]["objective/sampler_truncated"] == 0


# ---------------------------------------------------------------- accidents


@pytest.mark.parametrize("lie", ["drop", "busy", "hang", "engine"])
def test_a_server_that_dies_ends_the_run_with_a_checkpoint(server, tmp_path, lie):
    made = served(tmp_path / "run", server)

    def die():
        made.servers.patience = 0.6
        server.tell(lie)

    made.stage.on_enter = runs.entering("rollout", 2, action=die)
    with pytest.raises(RunFault, match=f"no answer from {server.url}") as error:
        made.train()
    assert "saved checkpoint-000001; resume with" in error.value.hint
    assert error.value.exit_code == 3


@pytest.mark.parametrize("lie, times", [("drop", 2), ("busy", 2), ("forget", 1)])
def test_a_fault_that_passes_changes_no_number(server, tmp_path, lie, times):
    served(tmp_path / "plain", server, updates=2).train()
    made = served(tmp_path / "run", server, updates=2)
    server.lie, server.times = lie, times
    made.train()
    assert server.times == 0
    assert runs.rows(tmp_path / "plain") == runs.rows(tmp_path / "run")


def test_a_run_resumes_on_other_servers(server, tmp_path):
    served(tmp_path / "whole", server, updates=3).train()
    served(tmp_path / "run", server, updates=2).train()
    with LyingServer(tiny.build("llama"), tiny.tokenizer()) as other:
        served(tmp_path / "run", other, updates=3, resume_from_checkpoint="auto").train()
    assert runs.rows(tmp_path / "whole") == runs.rows(tmp_path / "run")


def test_a_signal_does_not_wait_for_a_server_that_hangs(server, tmp_path):
    made = served(tmp_path / "run", server)
    server.lie = "hang"
    start = made.servers.complete

    def complete(*arguments, **options):
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        return start(*arguments, **options)

    made.servers.complete = complete
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Interrupted):
            made.train()
    finally:
        signal.signal(signal.SIGALRM, before)
