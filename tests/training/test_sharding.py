"""A base divided among processes: the same numbers, on ranks of unequal work, in whole runs."""

import os

import processes
import pytest
import tiny
import torch
from peft import get_peft_model

import runs
from trpo_lm.analysis.saved_run import open_run
from trpo_lm.config import TrainerConfig
from trpo_lm.core.fisher import ForwardFisher, ScoreFisher
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.policy import held
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.sharding import shards_of

distributed = pytest.mark.distributed
WHOLE, SHARDED = False, True
DTYPES = {"gemma2": torch.float32}  # in float64 it cannot read padded rows


def same(answers):
    """Return what all ranks returned, once they all did."""
    assert all(ok for ok, _ in answers), answers
    return [value for _, value in answers]


# ---------------------------------------------------------------- numbers


def policy_of(kind, adapter, shards, **options):
    """Return a policy whose adapter is not the identity; it comes with its model or is added."""
    model = tiny.build(kind, dtype=DTYPES.get(kind, torch.float64))
    if adapter == "came":
        torch.manual_seed(0)
        model = get_peft_model(model, tiny.lora())
    peft = None if adapter == "came" else tiny.lora()
    made = tiny.Policy(model, peft, seed=0, shards=shards, **options)
    tiny.perturb(made, 0.3)
    return made


def numbers(policy, ranks):
    """Return what a run asks of a batch; ranks have unequal prompts, passes and rollouts."""
    prompts, each = (tiny.PROMPTS, 2) if ranks.rank == 0 else (tiny.PROMPTS[:3], 3 + ranks.rank)
    if ranks.rank == 1:
        policy.room.limits["rollout"] = 30  # several rollouts, beside one
    batch = tiny.batch(policy, prompts=prompts, each=each, micro_batch_tokens=24)
    made = tiny.objective(policy, batch)
    made.reduce = ranks.reduce
    made.N = float(ranks.reduce(torch.tensor(float(len(batch.rollout)))))
    g, b = made.gradients(reference=True)
    F, S = made.fisher(6), ScoreFisher(made.scores(5), reduce=ranks.reduce)
    v = g.sum(0)
    trial = made.measure()
    rows = torch.arange(len(batch.rollout))[: 4 * ranks.rank]  # none on rank 0
    told = {
        "tokens": batch.rollout.input_ids.double(), "reference KL": batch.ref_kl, "g": g, "b": b,
        "F": F(v), "S": S(v), "clipped": made.clipped_gradient(rows, 0.2),
        "measured": torch.tensor([trial.kl, trial.ref_kl, trial.gain]),
    }  # fmt: skip
    return F, told


def compared(kind, adapter, options, nodes=1):
    """Return how far numbers of a sharded base are from those of a whole one, by name."""
    os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // nodes)
    ranks = Ranks(60)
    shards = shards_of(ranks, 60)
    whole = policy_of(kind, adapter, None, **options)
    parted = policy_of(kind, adapter, shards, **options)
    (_, expected), (F, found) = numbers(whole, ranks), numbers(parted, ranks)
    assert isinstance(F, ForwardFisher) and parted.exact_products == ["forward"]
    assert "sharded" in parted.product_faults["retained"]
    assert all(torch.is_nonzero(value.abs().sum()) for value in found.values())
    apart = {n: float((found[n] - expected[n]).norm() / expected[n].norm()) for n in found}
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():  # no backward pass behind it that would drop what was gathered
        parted.features(ids, ids, ids.bool())
    layers = [m for m in parted.base.modules() if hasattr(m, "reshard")]
    parts = sum(held(p).nbytes for m in layers for p in m.parameters() if held(p) is not p)
    size = sum(p.nbytes for m in layers for p in m.parameters() if held(p) is not p)
    return apart, parts / size


@distributed
@pytest.mark.parametrize(
    ("kind", "adapter", "options"),
    [
        ("llama", "new", {}),
        ("gpt2", "came", {}),
        ("neox", "new", {"gradient_checkpointing": True}),
        ("gemma2", "came", {"temperature": 0.7}),  # its head is no linear layer
    ],
)
def test_a_sharded_base_has_the_numbers_of_a_whole_one(kind, adapter, options):
    for apart, share in same(processes.ranks(2, compared, kind, adapter, options)):
        assert apart["tokens"] == 0.0
        assert max(apart.values()) < (1e-5 if kind in DTYPES else 1e-10), apart
        assert 0.4 < share < 0.6  # a last part may be shorter


@distributed
def test_each_node_holds_a_base_of_its_own():
    for apart, share in same(processes.ranks(4, compared, "llama", "new", {}, 2, timeout=600)):
        assert max(apart.values()) < 1e-10, apart
        assert 0.4 < share < 0.6  # of two processes, not of four


# ---------------------------------------------------------------- runs


def trained(folder, sharded, **options):
    os.fsync = lambda descriptor: None
    made = runs.trainer(
        folder, model=tiny.build("llama", dtype=torch.float64), shard_base=sharded,
        prompts_per_update=7, completions_per_prompt=1, save_steps=2, evals=runs.HELD_OUT,
        eval_steps=2, **options,
    )  # fmt: skip
    made.display.samples_due = lambda update: made.ranks.main and update == 1
    assert made.policy.sharded == sharded
    made.train()
    return made.archive.settings["digests"]["base"]


def several(folder):
    whole = trained(folder / "whole", WHOLE, updates=4)
    parted = trained(folder / "sharded", SHARDED, updates=4)
    trained(folder / "resumed", SHARDED, updates=2)
    trained(folder / "resumed", SHARDED, updates=4, resume_from_checkpoint="auto")
    return whole == parted


@distributed
def test_runs_on_a_sharded_base_take_the_same_steps_and_resume(tmp_path):
    assert same(processes.ranks(2, several, tmp_path, timeout=600)) == [True, True]
    one, two = tmp_path / "whole", tmp_path / "sharded"
    assert runs.completions(one) == runs.completions(two)
    for key, tensor in runs.tensors(one).items():  # float64: CG amplifies the order of sums
        assert torch.allclose(runs.tensors(two)[key], tensor, atol=1e-6), key
    kinds = [{row["cg/product"] for row in runs.rows(folder)} for folder in (one, two)]
    assert kinds == [{"retained"}, {"forward"}]
    runs.assert_same_end(two, tmp_path / "resumed", 4)


def broken_run(folder):
    def score(completions):
        if int(os.environ["RANK"]) == 1:
            raise KeyError("label")
        return runs.score(completions)

    trained(folder, SHARDED, reward=score)


@distributed
def test_D04_a_rank_that_fails_between_passes_ends_the_run_on_all(tmp_path):
    for ok, (kind, code, message) in processes.ranks(2, broken_run, tmp_path, timeout=100):
        assert (ok, kind, code) == (False, "RunFault", 3)
        assert "raised KeyError: 'label'" in message and "rank 1" in message


# ---------------------------------------------------------------- what cannot be divided


def test_one_process_holds_the_whole_base_and_says_so(tmp_path, capsys):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    made = runs.trainer(tmp_path / "run", model=str(tmp_path / "base"), shard_base=True, updates=1)
    assert "one process holds the whole base" in capsys.readouterr().out
    assert not made.policy.sharded and "retained" in made.policy.exact_products
    made.train()
    assert not open_run(tmp_path / "run", reward=runs.score).policy.sharded


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_is_quantised_or_sharded(bits):
    with pytest.raises(TrpoLMError, match="shard_base"):
        TrainerConfig(shard_base=True, **{bits: True})


def refused(kind):
    shards = shards_of(Ranks(60))
    model = tiny.build("llama", dtype=torch.float64)
    if kind == "quantised":
        model.is_quantized = True
    else:  # layers of its own, which transformers does not know
        model.model.layers = torch.nn.ModuleList()
    tiny.policy(model=model, shards=shards)


@distributed
@pytest.mark.parametrize("kind", ["quantised", "no layers"])
def test_what_cannot_be_divided_is_refused(kind):
    for ok, (name, code, message) in processes.ranks(2, refused, kind):
        assert (ok, name, code) == (False, "TrpoLMError", 2), message
        assert "shard_base" in message and "hint" in message
