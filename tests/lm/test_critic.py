"""Critics: fitted on the past, applied to the present, and blind to units."""

import pytest
import torch

from trpo_lm.lm.critic import NoCritic, PrefixCritic, ValueHead, make_critic

T, D = 6, 4


def whole(t):
    return t


def data(seed=0, n=200, *, line=None, noise=0.1, width=D, alpha=1.0, beta=0.0):
    """Hidden states, prefix scores, mask, targets and validity of a batch."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (n,), generator=g)
    mask = torch.arange(T)[None] < lengths[:, None]
    x = torch.rand(n, T, generator=g, dtype=torch.float64)
    a, c = line or (torch.linspace(0.2, 2.0, T), torch.linspace(-1.0, 1.0, T))
    y = a * x + c + noise * torch.randn(n, T, generator=g, dtype=torch.float64)
    hidden = torch.randn(int(mask.sum()), width, generator=g)
    return hidden, alpha * x + beta, mask, (alpha * y + beta) * mask, torch.ones(n).bool()


def fit(critic, *batch):
    critic.fit(*batch, whole)
    return critic


def values(critic, batch, untrained=0.0):
    return critic.values(*batch[:3], untrained=untrained)


KINDS = {
    "prefix": lambda: PrefixCritic(T),
    "value_head": lambda: ValueHead(D),
    "value_head+prefix": lambda: ValueHead(D, use_prefix=True),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def linear_in_hidden(seed=0, n=300, noise=0.05, scale=1.0, shift=0.0):
    hidden, x, mask, _, valid = data(seed, n)
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(seed + 100)
    y = torch.zeros(mask.shape, dtype=torch.float64)
    y[mask] = hidden.double() @ weight + 0.7
    y = (y + noise * torch.randn(y.shape, generator=g, dtype=torch.float64)) * mask
    return hidden, scale * x + shift, mask, (scale * y + shift) * mask, valid


# ---- all of them ----


def test_before_the_first_fit():
    batch = data()
    _, x, mask, *_ = batch
    assert torch.equal(values(PrefixCritic(T), batch, 9.0), x * mask)
    assert torch.equal(values(ValueHead(D), batch, 9.0), 9.0 * mask)
    assert torch.equal(values(NoCritic(), batch, 9.0), torch.zeros(mask.shape).double())


def test_the_batch_that_is_valued_does_not_enter_its_own_baseline(kind):
    """Values depend on the past and on the states, never on this batch's returns or its fit."""
    critic = fit(fit(KINDS[kind](), *data(0)), *data(1))
    now = data(2)
    before = values(critic, now)
    state = {k: v.clone() for k, v in critic.state().items()}
    again = values(critic, now)
    assert torch.equal(before, again)
    assert all(torch.equal(critic.state()[k], v) for k, v in state.items())
    fit(critic, *now)
    assert not torch.equal(values(critic, now), before)


def test_values_are_zero_in_the_padding(kind):
    critic = fit(KINDS[kind](), *data(0))
    now = data(1)
    assert bool((values(critic, now)[~now[2]] == 0).all())


def test_order_of_rows_and_what_stands_in_the_padding_do_not_matter(kind):
    batch, now = data(0), data(3)
    plain = values(fit(fit(KINDS[kind](), *batch), *data(1)), now)
    hidden, x, mask, y, valid = batch
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    index = torch.zeros(mask.shape, dtype=torch.long)
    index[mask] = torch.arange(len(hidden))
    moved = hidden[index[order][mask[order]]], x[order], mask[order], y[order], valid[order]
    torch.testing.assert_close(values(fit(fit(KINDS[kind](), *moved), *data(1)), now), plain)
    rubbish = torch.where(mask, 0.0, 1e3)
    dirty = hidden, x + rubbish, mask, y - rubbish, valid
    torch.testing.assert_close(values(fit(fit(KINDS[kind](), *dirty), *data(1)), now), plain)


def test_rows_without_a_score_teach_nothing(kind):
    hidden, x, mask, y, valid = data(0)
    valid[::3] = False
    wrong = y.clone()
    wrong[::3] = 1e6
    index = torch.zeros(mask.shape, dtype=torch.long)
    index[mask] = torch.arange(len(hidden))
    only = hidden[index[valid][mask[valid]]], x[valid], mask[valid], y[valid], valid[valid]
    now = data(1)
    torch.testing.assert_close(
        values(fit(KINDS[kind](), hidden, x, mask, wrong, valid), now),
        values(fit(KINDS[kind](), *only), now),
    )


def test_a_batch_without_any_score_changes_nothing_that_is_said(kind):
    batch = data(0)
    none = *batch[:4], torch.zeros(len(batch[1])).bool()
    now = data(1)
    fresh = values(fit(KINDS[kind](), *none), now, untrained=0.3)
    assert torch.isfinite(fresh).all()
    torch.testing.assert_close(fresh, values(KINDS[kind](), now, untrained=0.3))
    trained = fit(KINDS[kind](), *data(2))
    before = values(trained, now)
    torch.testing.assert_close(values(fit(trained, *none), now), before)


@pytest.mark.parametrize("alpha, beta", [(1e12, 0.0), (1.0, 1e9), (1e-6, 3.0), (-2.0, 1.0)])
def test_R13_units_of_the_score_do_not_matter(kind, alpha, beta):
    """score -> alpha score + beta, in prefixes and returns alike, does the same to the values."""
    plain = KINDS[kind]()
    other = KINDS[kind]()
    for seed in (0, 1, 2):
        fit(plain, *linear_in_hidden(seed))
        fit(other, *linear_in_hidden(seed, scale=alpha, shift=beta))
    one = values(plain, linear_in_hidden(3))
    two = values(other, linear_in_hidden(3, scale=alpha, shift=beta))
    mask = data(3, 300)[2]
    torch.testing.assert_close((two[mask] - beta) / alpha, one[mask], rtol=1e-4, atol=1e-4)


def test_state_and_load_are_exact(kind):
    critic = fit(fit(KINDS[kind](), *data(0)), *data(1))
    saved = {k: v.clone() for k, v in critic.state().items()}
    other = KINDS[kind]()
    other.load(saved)
    for c in (critic, other):
        fit(c, *data(2))
    now = data(3)
    assert torch.equal(values(critic, now), values(other, now))
    assert all(torch.equal(critic.state()[k], v) for k, v in other.state().items())
    assert all(not torch.equal(critic.state()[k], v) for k, v in saved.items() if k != "origin")


def test_ranks_add_up(kind):
    """One process with all rows equals two with a part each, their sums played by hand."""
    one = fit(KINDS[kind](), *data(0))
    hidden, x, mask, y, valid = data(0)
    cut, tokens = 50, int(mask[:50].sum())
    first = hidden[:tokens], x[:cut], mask[:cut], y[:cut], valid[:cut]
    second = hidden[tokens:], x[cut:], mask[cut:], y[cut:], valid[cut:]
    sums: list[torch.Tensor] = []
    for _ in range(2):  # the first reduction (the origin) must be known before the second is
        caught: list[list[torch.Tensor]] = [[], []]
        critics = [KINDS[kind](), KINDS[kind]()]
        for rank, part in enumerate((first, second)):

            def reduce(t, caught=caught[rank], sums=sums):
                caught.append(t)
                k = len(caught) - 1
                return sums[k] if k < len(sums) else t

            critics[rank].fit(*part, reduce)
        sums = [a + b for a, b in zip(*caught, strict=True)]
    critics[0] = KINDS[kind]()
    calls = iter(sums)
    critics[0].fit(*first, lambda t: next(calls))
    now = data(1)
    torch.testing.assert_close(values(critics[0], now), values(one, now), rtol=1e-7, atol=1e-9)


# ---- the prefix critic ----


def test_prefix_recovers_the_line_of_each_position():
    critic = PrefixCritic(T)
    for seed in range(3):
        fit(critic, *data(seed, n=20_000, noise=0.3))
    now = data(9, noise=0.0)
    found = values(critic, now)
    assert float((found - now[3])[now[2]].abs().max()) < 0.05


def test_prefix_a_position_that_was_never_seen_takes_the_common_line():
    """Targets are 2 x + 1 everywhere; only the first three positions occur."""
    line = (torch.full((T,), 2.0), torch.full((T,), 1.0))
    hidden, x, mask, y, valid = data(0, n=5000, line=line)
    early = mask & (torch.arange(T) < 3)
    critic = fit(PrefixCritic(T), hidden[: int(early.sum())], x, early, y * early, valid)
    a, c = critic.lines()
    assert a[3:].tolist() == pytest.approx([2.0] * 3, abs=0.05)
    now = data(1, line=line, noise=0.0)
    assert float((values(critic, now) - now[3])[now[2]].abs().max()) < 0.1


def test_prefix_a_rare_position_is_drawn_to_the_common_line():
    critic = PrefixCritic(T)
    hidden, x, mask, y, valid = data(0, n=400, line=(torch.full((T,), 1.0), torch.zeros(T)))
    mask[:, -1] = False
    mask[0] = True  # one completion reaches the last position, with a wild return
    y = y * mask
    y[0, -1] = 50.0
    fit(critic, torch.zeros(int(mask.sum()), D), x, mask, y, valid)
    assert float(values(critic, (None, x, mask))[0, -1]) < 10.0  # far less than 50


def test_prefix_scores_that_tell_nothing_give_the_mean_of_each_position():
    """x depends on the position only, and rounds: no slope may be read out of the rounding."""
    g = torch.Generator().manual_seed(0)
    n = 3000
    mask = torch.ones(n, T).bool()
    x = torch.tensor([0.1, 0.7, 1 / 3, 0.2, 0.9, 0.55], dtype=torch.float64).expand(n, T)
    y = torch.linspace(0, 1, T).double() + 0.1 * torch.randn(n, T, generator=g, dtype=torch.float64)
    critic = fit(PrefixCritic(T), None, x, mask, y, torch.ones(n).bool())
    found = critic.values(None, x, mask, untrained=0.0)
    torch.testing.assert_close(found.mean(0), y.mean(0), rtol=0, atol=0.02)


def test_prefix_a_narrow_batch_uses_the_first_positions():
    critic = fit(PrefixCritic(T), *data(0))
    hidden, x, mask, y, valid = data(1)
    narrow = hidden[: int(mask[:, :2].sum())], x[:, :2], mask[:, :2], y[:, :2], valid
    assert values(critic, narrow).shape == (200, 2)
    fit(critic, *narrow)
    assert critic.sums.shape == (T, 5)


# ---- the value head ----


def test_value_head_learns_a_linear_value():
    critic = ValueHead(D)
    for seed in range(3):
        fit(critic, *linear_in_hidden(seed))
    now = linear_in_hidden(9, noise=0.0)
    assert float((values(critic, now) - now[3])[now[2]].abs().max()) < 0.05


def test_value_head_takes_the_prefix_score_as_a_feature():
    with_prefix, without = ValueHead(D, use_prefix=True), ValueHead(D)
    line = (torch.full((T,), 2.0), torch.zeros(T))
    for seed in range(3):
        for critic in (with_prefix, without):
            fit(critic, *data(seed, n=1000, line=line))
    now = data(9, line=line, noise=0.0)
    one, two = (((values(c, now) - now[3])[now[2]] ** 2).mean() for c in (with_prefix, without))
    assert float(one) < 1e-3 < 0.1 < float(two)


def test_value_head_chooses_a_strong_ridge_where_there_is_nothing_to_learn():
    """100 features, few rows, returns of pure noise: the weakest ridge would fit the noise."""
    noise = ValueHead(100)
    for seed in range(4):
        hidden, x, mask, _, valid = data(seed, n=40, width=100)
        g = torch.Generator().manual_seed(seed)
        fit(noise, hidden, x, mask, torch.randn(mask.shape, generator=g).double() * mask, valid)
    assert int(noise.errors.argmin()) == 0
    signal = ValueHead(D)
    for seed in range(4):
        fit(signal, *linear_in_hidden(seed, n=100))
    assert int(signal.errors.argmin()) == len(ValueHead.RIDGES) - 1


def test_value_head_judges_a_ridge_before_it_learns_from_the_batch():
    critic = fit(ValueHead(D), *data(0))
    before = values(critic, data(1))
    expected = []
    hidden, x, mask, y, valid = data(1)
    for k in range(len(ValueHead.RIDGES)):
        critic.errors = torch.ones(5).double()
        critic.errors[k] = 0.0
        error = ((values(critic, data(1)) - y)[mask] ** 2).sum()
        expected.append(float(error))
    critic.errors = torch.zeros(5).double()
    fit(critic, *data(1))
    assert critic.errors.tolist() == pytest.approx(expected)
    assert before.shape == mask.shape


def test_constant_features_and_dead_units_do_no_harm():
    hidden, x, mask, y, valid = linear_in_hidden(0)
    hidden[:, 3], hidden[:, 2] = 0.0, 5.0
    critic = fit(fit(ValueHead(D), hidden, x, mask, y, valid), hidden, x, mask, y, valid)
    assert torch.isfinite(values(critic, (hidden, x, mask))).all()


# ---- choice ----


def test_make_critic():
    options = {"width": D, "length": T}
    kinds = [
        ("auto", True, "prefix", 0.5), ("auto", False, "value_head", 0.95),
        ("value_head", True, "value_head+prefix", 0.95), ("prefix", True, "prefix", 0.5),
        ("none", True, "none", 1.0),
    ]  # fmt: skip
    for choice, can, name, lam in kinds:
        critic = make_critic(choice, can_score_prefixes=can, **options)
        assert (critic.name, critic.default_lam) == (name, lam)
