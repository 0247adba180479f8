"""Fisher products against a dense Fisher built from Jacobians, in float64."""

import gc
import weakref

import pytest
import tiny
import torch

import trpo_lm.lm.objective
import trpo_lm.lm.policy
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.fisher import (
    FisherOperator,
    ForwardFisher,
    ScoreFisher,
    hessian_operator,
    linearised_activations,
    pullback,
    softmax_curvature,
    twice_differentiable,
)
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.lm.memory import saved_bytes
from trpo_lm.lm.objective import BatchObjective, head_curvature
from trpo_lm.lm.rollout import Batch

WIDE = 10**6  # completions in the Fisher: all
EXACT = 1e-6  # Llama's norm and rotary angles are float32 in a float64 model; N01 asks for 1e-4


def relative(a, b):
    return float((a - b).norm() / b.norm())


def dense_fisher(policy, batch):
    """E[J^T (diag p - p p^T) J] with J the Jacobian of the model's own logits, row by row."""
    theta = policy.parameters
    with twice_differentiable():
        logits = tiny.own_logits(policy, batch.rollout)
    J = torch.stack(
        [torch.stack([theta.gradient(z, retain=True) for z in state]) for state in logits]
    )  # (S, V, M)
    p = logits.detach().softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("sam,sab,sbn->mn", J, H, J) / len(batch.rollout)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request):
    """A float64 policy away from its initial point, a batch of it, and its dense Fisher."""
    adapter = tiny.lora(target_modules=["c_attn", "q_proj", "up_proj"])
    policy = tiny.policy(
        request.param, dtype=torch.float64, spread=0.3, temperature=0.7, peft=adapter
    )
    batch = tiny.batch(policy, each=1, length=3)
    return policy, batch, dense_fisher(policy, batch)


def test_N01_products_equal_the_dense_jacobian_fisher(case):
    policy, batch, F = case
    assert torch.linalg.matrix_rank(F) > 5
    product = tiny.dense(tiny.objective(policy, batch).fisher(WIDE), policy.parameters.size)
    assert relative(product, F) < EXACT


def test_N01_products_are_linear_symmetric_and_positive_semidefinite(case):
    policy, batch, F = case
    operator = tiny.objective(policy, batch).fisher(WIDE)
    x, y = torch.randn(2, policy.parameters.size, dtype=torch.float64)
    assert relative(operator(2 * x - 3 * y), 2 * operator(x) - 3 * operator(y)) < EXACT
    assert float(x @ operator(y)) == pytest.approx(float(y @ operator(x)), rel=EXACT)
    matrix = tiny.dense(operator, policy.parameters.size)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -EXACT * float(matrix.norm())


def test_N01_the_fisher_is_the_hessian_of_the_kl(case):
    policy, batch, F = case
    old = tiny.own_logits(policy, batch.rollout).detach().log_softmax(-1)
    with twice_differentiable():
        new = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    D = categorical_kl(old=old, new=new).sum() / len(batch.rollout)
    assert D.item() == pytest.approx(0, abs=1e-12)
    hessian = hessian_operator(policy.parameters, D)
    assert relative(tiny.dense(hessian, policy.parameters.size), F) < EXACT


def test_products_do_not_depend_on_the_size_of_micro_batches(case):
    policy, batch, F = case
    v = torch.randn(policy.parameters.size, dtype=torch.float64)
    for size in (1, 12, 999):
        policy.room.most = size
        assert relative(tiny.objective(policy, batch).fisher(WIDE)(v), F @ v) < EXACT


@pytest.mark.parametrize("chunk", [1, tiny.V * 2, tiny.V * 3 + 1])
def test_products_do_not_depend_on_the_chunks_of_the_head(case, monkeypatch, chunk):
    policy, batch, F = case
    v = torch.randn(policy.parameters.size, dtype=torch.float64)
    monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_STATES", 1)
    monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_ELEMENTS", chunk)
    policy.room.most = 999
    assert relative(tiny.objective(policy, batch).fisher(WIDE)(v), F @ v) < EXACT


def test_the_curvature_of_many_chunks_is_computed_anew_and_never_held(monkeypatch):
    policy = tiny.policy(dtype=torch.float64, spread=0.3)
    features = torch.randn(40, 8, dtype=torch.float64)
    u = torch.randn_like(features)
    cached = head_curvature(policy, features)(u)
    monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_STATES", 1)
    monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_ELEMENTS", 2 * tiny.V)  # 20 chunks
    alive, most = [], []

    def counting(logprobs):
        curvature = softmax_curvature(logprobs)
        alive.append(weakref.ref(curvature))
        most.append(sum(r() is not None for r in alive))
        return curvature

    monkeypatch.setattr(trpo_lm.lm.objective, "softmax_curvature", counting)
    product = head_curvature(policy, features)
    assert not most  # nothing is prepared
    torch.testing.assert_close(product(u), cached)
    assert len(most) == 20 and max(most) <= 2  # [tokens, V] never stands for more than a chunk


def test_softmax_curvature_is_the_covariance_of_the_tokens():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    H = softmax_curvature(p.log())
    expected = torch.diag(p[0]) - p[0][:, None] * p[0][None]
    torch.testing.assert_close(tiny.dense(lambda z: H(z[None])[0], 3), expected)


def test_N03_at_initialisation_the_block_of_lora_a_is_exactly_zero():
    policy = tiny.policy()  # float32, B = 0
    batch = tiny.batch(policy)
    F = tiny.objective(policy, batch).fisher(WIDE)
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    ones = policy.parameters.unflatten(F(torch.ones(policy.parameters.size)))
    for name, part in zip(names, ones, strict=True):
        assert bool((part == 0).all()) == ("lora_A" in name), name


def test_a_subset_of_whole_completions_is_their_own_mean():
    policy = tiny.policy(dtype=torch.float64, spread=0.3)
    batch = tiny.batch(policy, each=1)
    v = torch.randn(policy.parameters.size, dtype=torch.float64)
    part = tiny.objective(policy, batch).fisher(2)(v)  # rows 0 and 3
    rows = torch.tensor([0, 3])
    with twice_differentiable():
        features = policy.features(*batch.rollout.model_inputs(rows))
    pieces = [(features, head_curvature(policy, features.detach()))]
    torch.testing.assert_close(part, FisherOperator(policy.parameters, pieces, count=2)(v))


def test_ranks_sum_and_divide_once():
    """Two ranks with half the rows each, their reduction played by hand."""
    policy = tiny.policy(dtype=torch.float64, spread=0.3)
    batch = tiny.batch(policy, each=1)
    v = torch.randn(policy.parameters.size, dtype=torch.float64)

    def half(rows):
        with twice_differentiable():
            features = policy.features(*batch.rollout.model_inputs(torch.tensor(rows)))
        pieces = [(features, head_curvature(policy, features.detach()))]
        return FisherOperator(policy.parameters, pieces, count=4)(v)

    torch.testing.assert_close(
        half([0]) + half([1, 2, 3]), tiny.objective(policy, batch).fisher(4)(v)
    )


def test_a_parameter_that_the_outputs_ignore_has_no_curvature():
    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    theta = ParameterVector([x, unused])
    F = FisherOperator(theta, [(x.sin()[None], lambda z: z)])
    expected = torch.cat([x.detach().cos() ** 2, torch.zeros(2)])
    torch.testing.assert_close(F(torch.ones(5)), expected)
    H = hessian_operator(theta, (x**2).sum())
    torch.testing.assert_close(H(torch.ones(5)), torch.tensor([2.0, 2, 2, 0, 0]))


def test_N08_the_default_attention_has_no_second_derivative_and_the_switch_mends_it():
    policy = tiny.policy("llama", spread=0.3)
    assert policy.base.config._attn_implementation == "sdpa"
    batch = tiny.batch(policy)
    inputs = batch.rollout.model_inputs(torch.arange(len(batch.rollout)))
    fast = policy.features(*inputs)
    pieces = [(fast, lambda z: z)]
    with pytest.raises(RuntimeError, match="derivative"):
        FisherOperator(policy.parameters, pieces)(torch.ones(policy.parameters.size))
    product = tiny.objective(policy, batch).fisher(WIDE)(torch.ones(policy.parameters.size))
    assert torch.isfinite(product).all()


# ---- products that retain nothing, and those of sampled scores ----


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "neox"])
@pytest.mark.parametrize("way", ["retained", "forward"])
def test_exact_products_in_float32_equal_the_dense_ones_to_1e5(kind, way):
    adapter = tiny.lora(target_modules=["c_attn", "q_proj", "up_proj", "query_key_value"])
    exact = tiny.policy(kind, dtype=torch.float64, spread=0.3, peft=adapter)
    policy = tiny.policy(kind, spread=0.3, peft=adapter)
    batch = tiny.batch(exact, each=1, length=3)
    policy.room.most = 12  # several pieces
    F, policy.exact_products = dense_fisher(exact, batch), [way]
    same = Batch.from_rollout(policy, batch.rollout)
    operator = tiny.objective(policy, same).fisher(WIDE)
    assert isinstance(operator, FisherOperator if way == "retained" else ForwardFisher)
    product = tiny.dense(lambda v: operator(v.float()).double(), policy.parameters.size)
    assert relative(product, F) < 1e-5


def test_a_forward_product_keeps_nothing_and_leaves_the_parameters_alone():
    policy = tiny.policy("llama", spread=0.3)
    batch, policy.exact_products = tiny.batch(policy), ["forward"]
    operator = tiny.objective(policy, batch).fisher(WIDE)
    v = torch.ones(policy.parameters.size)
    before, names = policy.parameters.checksum(), [n for n, _ in policy.model.named_parameters()]
    counts = []
    for _ in range(3):
        operator(v)
        counts.append(live_tensors())
    assert counts[0] == counts[1] == counts[2]
    assert policy.parameters.checksum() == before
    assert [n for n, _ in policy.model.named_parameters()] == names


def live_tensors():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def test_what_a_pullback_saves_that_is_zero_takes_no_memory(monkeypatch):
    policy = tiny.policy("llama", spread=0.3)
    inputs = policy._probe_rows(32)
    held, hooks = [], torch.autograd.graph.saved_tensors_hooks

    def counting(pack, unpack):
        def counted(tensor):
            kept = pack(tensor)
            new = kept if isinstance(kept, torch.Tensor) else kept[1]
            held.append((tensor.nbytes, new.untyped_storage().data_ptr(), new.nbytes))
            return kept

        return hooks(counted, unpack)

    outputs = policy.linearised(*inputs)
    graph = saved_bytes(lambda: policy.linearised(*inputs), policy.model.parameters())
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
    pullback(policy.parameters, outputs)
    saved, kept = sum(h[0] for h in held), sum(h[2] for h in held if h[2] < 64)
    assert saved > 0.5 * graph, "a pullback saves about as much as the graph of the outputs"
    zeros = sum(h[0] for h in held if h[2] < 64)
    assert zeros > 0.3 * saved and kept < 0.01 * saved


def sampled_fisher(policy, batch, seeds, draws):
    """Return the mean of S^T S / N over seeds, dense."""
    total = torch.zeros(policy.parameters.size, policy.parameters.size, dtype=torch.float64)
    for seed in seeds:
        objective = BatchObjective(policy, batch, None, tiny.identity, (seed,))
        S = objective.scores(draws)
        total += S.T @ S / len(batch.rollout) / len(seeds)
    return total


@pytest.mark.parametrize("draws", [999, 2])  # one score a completion, or one for half the batch
def test_products_of_sampled_scores_converge_as_one_over_the_root_of_their_number(draws):
    adapter = tiny.lora(target_modules=["q_proj", "up_proj"])
    policy = tiny.policy("llama", dtype=torch.float64, spread=0.3, temperature=0.7, peft=adapter)
    batch = tiny.batch(policy, each=1, length=3)
    F = dense_fisher(policy, batch)
    errors = [relative(sampled_fisher(policy, batch, range(n), draws), F) for n in (20, 320)]
    assert errors[1] < 0.25 and 2.5 < errors[0] / errors[1] < 6.5  # root of 16, by sampling


def test_scores_make_the_product_where_no_exact_one_works():
    policy = tiny.policy(spread=0.3)
    batch, policy.exact_products = tiny.batch(policy, each=6), []
    objective = tiny.objective(policy, batch)
    F, S = objective.fisher(), objective.scores()
    assert isinstance(F, ScoreFisher) and len(S) == len(batch.rollout)
    v = torch.randn(policy.parameters.size)
    torch.testing.assert_close(F(v), S.T @ (S @ v) / len(batch.rollout))
    rule = TRPO(max_kl=0.01)
    _, row = rule.update(objective, rule.init_state(policy.parameters))
    assert row["line_search/accepted"] and row["cg/product"] == "scores"


# ---- which products work ----


class Kernel(torch.autograd.Function):
    """A tanh as hand-written kernels are: its backward pass is not differentiable.

    Nothing raises: autograd leaves the path out, also where `once_differentiable` marks it.
    """

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        slope = (1 - y * y).detach()
        return grad.detach() * slope


class MarkedKernel(Kernel):
    backward = staticmethod(torch.autograd.function.once_differentiable(Kernel.backward))


class Distorted(torch.autograd.Function):
    """A product whose own derivative is 1.3 times too large."""

    @staticmethod
    def forward(ctx, grad, slope):
        ctx.save_for_backward(slope)
        return grad * slope

    @staticmethod
    def backward(ctx, grad):
        return 1.3 * grad * ctx.saved_tensors[0], None


class WrongKernel(Kernel):
    @staticmethod
    def forward(ctx, x):
        y = Kernel.forward(ctx, x)
        ctx.save_for_forward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return Distorted.apply(grad, (1 - y * y).detach())

    @staticmethod
    def jvp(ctx, tangent):
        (y,) = ctx.saved_tensors
        return 1.3 * tangent * (1 - y * y)


class Activation(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def with_activation(function, layers=2, dtype=torch.float32):
    model = tiny.build(n_layer=layers, dtype=dtype)
    for block in model.transformer.h:
        block.mlp.act = Activation(function)
    return tiny.policy(model=model, spread=0.3)


@pytest.mark.parametrize("kernel", [Kernel, MarkedKernel, WrongKernel])
@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_B22_a_kernel_that_drops_or_distorts_a_derivative_is_found(kernel, layers, dtype):
    assert with_activation(torch.tanh, layers, dtype).exact_products == ["retained", "forward"]
    assert with_activation(kernel.apply, layers, dtype).exact_products == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "neox", "gemma2"])
@pytest.mark.parametrize(("layers", "width"), [(1, 8), (2, 64), (12, 16), (40, 32)])
def test_B22_an_exact_model_is_never_called_inexact(kind, layers, width):
    size = {"n_layer": layers, "n_embd": width} if kind == "gpt2" else {
        "num_hidden_layers": layers, "hidden_size": width,
    }  # fmt: skip
    policy = tiny.policy(model=tiny.build(kind, **size))
    assert policy.exact_products == ["retained", "forward"]


@pytest.mark.parametrize(
    ("kind", "layers"), [("gpt2", 12), ("gpt2", 40), ("neox", 12), ("neox", 40), ("llama", 12)]
)
def test_B22_rounding_to_bfloat16_is_no_wrong_derivative(kind, layers):
    size = {"gpt2": {"n_layer": layers, "n_embd": 64}}.get(
        kind, {"num_hidden_layers": layers, "hidden_size": 64}
    )
    policy = tiny.policy(model=tiny.build(kind, dtype=torch.bfloat16, **size))
    assert policy.exact_products == ["retained", "forward"]


@pytest.mark.parametrize("function", [torch.nn.SiLU(), torch.nn.GELU("tanh"), torch.nn.ReLU()])
def test_linearised_activations_change_no_product_with_the_jacobian(function):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    forward = function.forward = lambda z: type(function).forward(function, z)  # as a hook would
    with linearised_activations([function]):
        y = function(x)
    assert function.forward is forward
    torch.testing.assert_close(y, function(x))
    u = torch.zeros_like(y, requires_grad=True)
    (vjp,) = torch.autograd.grad(y, x, u, create_graph=True)
    v = torch.randn_like(x)
    (Jv,) = torch.autograd.grad(vjp, u, v)
    slope = torch.autograd.grad(function(x).sum(), x)[0]
    torch.testing.assert_close(Jv, slope * v)
    with pytest.raises(ValueError), linearised_activations([function]):
        raise ValueError
    del function.forward
    with linearised_activations([function]):
        pass
    assert "forward" not in vars(function)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_models_activations_are_known(kind):
    policy = tiny.policy(kind)
    assert len(policy._activations) == policy.base.config.num_hidden_layers
    batch = tiny.batch(policy)
    inputs = batch.rollout.model_inputs(torch.arange(len(batch.rollout)))
    torch.testing.assert_close(policy.linearised(*inputs), policy.features(*inputs))
