"""Chapter 3's module against quadrature, closed forms, limits, and its NumPy twin."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.mixture_latents import (
    KINDS,
    Kumaraswamy,
    MixtureDLGM,
    MixtureNormal,
    MixturePrior,
    SemiSupervisedVAE,
    StickBreakingVAE,
    beta_rsample,
    expected_log1m,
    factor_mixture_log_likelihood,
    kl_kumaraswamy_beta,
    mixture_bound,
    stick_breaking,
    stick_mean_log_weights,
    stick_prior,
)
from dlgm_tutorial.objectives import iwae, renyi

GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
on_each_device = pytest.mark.parametrize("device", ["cpu", GPU])
B, S, D, K, C = 3, 5, 7, 2, 4
TOY = dict(prior_loc=(-1.5, 1.0), prior_scale=(0.5, 0.8), slope=1.3, intercept=0.2, noise_scale=0.6)
TOY_Q = dict(loc=(-0.8, 0.6), scale=(0.5, 0.4), a=1.4, b=0.9)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# --- The KL

KL_CASES = [  # a, b, alpha, beta, KL: 50 digits of quadrature
    (2, 3, 1, 5, 1.398988223460621), (1.5, 0.6, 1, 5, 6.644215715093428), (1.2, 0.25, 1, 5, 16.76697334703447),
    (3, 0.4, 1, 2, 4.102286008718463), (0.5, 0.7, 1, 1, 0.1645128438477777), (5, 2, 1, 4, 4.129385969969393),
    (0.8, 4, 2, 3, 1.408902431254843), (2, 2, 1, 1, 0.1362943611198906), (2.5, 1.5, 1, 4, 2.697706841385140),
    (0.3, 0.3, 0.5, 0.5, 0.1367195920037349), (2, 1, 3, 2, 0.208240530771945)]


@on_each_device
def test_kl_matches_reference_values(device):
    a, b, alpha, beta, want = (torch.tensor(column, dtype=torch.float64, device=device) for column in zip(*KL_CASES, strict=True))
    check_close(kl_kumaraswamy_beta(a, b, alpha, beta), want, 2e-8)


def test_kl_matches_quadrature_on_the_whole_range():
    for a, b in itertools.product([0.1, 1.3, 20.0], [0.1, 0.9, 30.0]):
        check_close(kl_kumaraswamy_beta(t(a), t(b), 1.0, 2.0), [oracles.kumaraswamy_beta_kl(a, b, 1.0, 2.0)], 2e-9)


def test_expected_log_has_its_closed_forms():
    b = t(0.1, 0.25, 1.0, 7.0, 30.0)
    check_close(expected_log1m(torch.ones_like(b), b), -1 / b, 2e-9)
    a = t(0.1, 0.5, 3.0, 20.0)
    check_close(expected_log1m(a, torch.ones_like(a)), special.digamma(1) - special.digamma(a.numpy() + 1), 2e-9)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_kl_is_right_for_extreme_parameters(dtype, rtol):
    for a, b in itertools.product([1e-6, 1e-3, 0.05, 40.0, 1e6], [1e-6, 1e-3, 1.0, 50.0, 1e6]):
        a32, b32 = float(torch.tensor(a, dtype=dtype)), float(torch.tensor(b, dtype=dtype))
        want = oracles.kumaraswamy_beta_kl(a32, b32, 1.0, 2.0, digits=40)
        got = kl_kumaraswamy_beta(torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype), 1.0, 2.0)
        assert got.dtype == dtype
        check_close(got, [want], 1e-9, rtol=rtol, what=f"a = {a}, b = {b}")


def test_kl_gradient_matches_finite_differences_and_reference():
    for a, b, want in [(2.0, 3.0, (1.31166666667, -0.526705729702)), (1.5, 0.6, (2.51371153621, -12.9224147109))]:
        q = t(a, b).requires_grad_()
        kl_kumaraswamy_beta(q[:1], q[1:], 1.0, 5.0).sum().backward()
        check_close(q.grad, want, 1e-7)
    q = t(0.03, 41.0).requires_grad_()  # the second branch
    kl_kumaraswamy_beta(q[:1], q[1:], 1.0, 5.0).sum().backward()
    want = oracles.finite_difference(lambda p: kl_kumaraswamy_beta(t(p[0]), t(p[1]), 1.0, 5.0).item(), q.detach().numpy(), 1e-5)
    check_close(q.grad, want, rtol=1e-4)


@on_each_device
def test_kl_gradient_is_finite_for_extreme_parameters_in_float32(device):
    """Values too large for float32 are infinite there (1 / b^2 at b = 1e-6 still fits); NaN never comes."""
    a, b = (torch.tensor(n, device=device).requires_grad_() for n in zip(
        *itertools.product([1e-6, 1e-3, 1.0, 40.0, 1e6], repeat=2), strict=True))
    kl_kumaraswamy_beta(a, b, 1.0, 2.0).sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_kl_to_itself_vanishes_and_is_never_negative():
    b = t(0.1, 0.5, 3.0, 30.0, 1e3)
    check_close(kl_kumaraswamy_beta(torch.ones_like(b), b, 1.0, b), torch.zeros_like(b), 1e-6)
    a, b = (g.reshape(-1) for g in torch.meshgrid(torch.logspace(-1, 1.3, 12).double(), torch.logspace(-1, 1.47, 12).double(), indexing="ij"))
    for alpha, beta in [(1.0, 1.0), (1.0, 5.0), (0.5, 0.5), (3.0, 0.7)]:
        check_below(-kl_kumaraswamy_beta(a, b, alpha, beta), 1e-8)


def test_the_published_series_is_wrong_as_documented():
    series = lambda a, b, alpha, beta, n=10: kl_kumaraswamy_beta(t(a), t(b), alpha, beta, method="series", num_terms=n)
    check_close(series(1.0, 3.0, 1.0, 3.0), [-0.002331], 1e-6)  # a divergence below zero
    check_close(series(1.0, 3.0, 1.0, 3.0, 11), [-0.001832], 1e-6)
    check_close([series(2.0, 3.0, 1.0, 5.0).item(), series(1.5, 0.6, 1.0, 5.0).item(), series(1.2, 0.25, 1.0, 5.0).item()],
                [1.372165, 4.836760, 8.365275], 1e-6)
    check_close(series(2.0, 3.0, 1.0, 5.0, 3000), [1.398988223460621], 1e-8)  # and it converges, where b is large


def test_kl_refuses_bad_parameters():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="a must be positive and finite, got a minimum of -1"):
        kl_kumaraswamy_beta(-one, one, 1.0, 1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        kl_kumaraswamy_beta(one, one, 1.0, 0.0)
    with pytest.raises(ValueError, match="method must be"):
        kl_kumaraswamy_beta(one, one, 1.0, 1.0, method="taylor")
    with pytest.raises(ValueError, match="num_terms must be an integer of at least 1"):
        kl_kumaraswamy_beta(one, one, 1.0, 1.0, method="series", num_terms=0)
    with pytest.raises(ValueError, match="b must have the shape of a"):
        kl_kumaraswamy_beta(one, torch.ones(3), 1.0, 1.0)


# --- Sticks

def test_stick_breaking_is_the_product_of_fractions():
    v = uniform(S, B, C - 1)
    pi, v = stick_breaking(v.log(), torch.log1p(-v)).exp().numpy(), v.numpy()
    for k in range(C):
        want = (v[..., k] if k < C - 1 else 1) * np.prod(1 - v[..., :k], -1)
        check_close(pi[..., k], want, 1e-14)
    check_close(pi.sum(-1), np.ones((S, B)), 1e-12)


@on_each_device
@pytest.mark.parametrize("a, b", [(1e-6, 1e-6), (1e-6, 1e6), (1e6, 1e-6), (1e6, 1e6), (0.02, 50.0), (50.0, 0.02), (0.05, 0.05)])
def test_log_weights_and_gradients_survive_extreme_sticks_in_float32(a, b, device):
    log_a, log_b = (torch.full((C - 1,), math.log(n), device=device).requires_grad_() for n in (a, b))
    u = uniform(2000, C - 1).float().clamp(1e-30, 1 - 6e-8).to(device)
    sticks = Kumaraswamy(log_a.exp().expand(u.shape), log_b.exp().expand(u.shape)).rsample_log(noise=u)
    log_pi = stick_breaking(*sticks)
    log_pi.sum().backward()
    assert log_pi.isfinite().all() and log_a.grad.isfinite().all() and log_b.grad.isfinite().all()
    assert torch.logsumexp(log_pi, -1).abs().max() < 1e-5
    assert stick_mean_log_weights(log_a, log_b).exp().sum().sub(1).abs() < 1e-6


def test_stick_prior_of_a_dirichlet_gives_its_moments():
    alpha, beta = stick_prior("dirichlet", 0.7, C)
    rng = np.random.default_rng(0)
    v = rng.beta(alpha.numpy(), beta.numpy(), (40000, C - 1))
    pi = stick_breaking(torch.log(torch.from_numpy(v)), torch.log1p(-torch.from_numpy(v))).exp().numpy()
    check_mc(pi, np.full(C, 1 / C))
    check_mc(pi**2, np.full(C, (0.7 + 1) / (C * (C * 0.7 + 1))))


def test_kl_of_a_dirichlet_is_the_sum_over_its_sticks():
    q, p = np.array([0.7, 2.3, 1.1, 0.4]), np.ones(4)
    alpha, beta = stick_prior("dirichlet", 1.0, 4)
    after = np.cumsum(q[::-1])[::-1][1:]
    by_sticks = oracles.beta_kl(q[:-1], after, alpha.numpy(), beta.numpy()).sum()
    whole = torch.distributions.kl_divergence(torch.distributions.Dirichlet(torch.from_numpy(q)), torch.distributions.Dirichlet(torch.from_numpy(p)))
    check_close(by_sticks, whole.item(), 1e-12)
    check_close(by_sticks, 1.4461937038, 1e-9)


def test_gem_prior_has_geometric_weights():
    alpha, beta = stick_prior("gem", 2.0, 6)
    log_w = MixturePrior(None, None, alpha, beta).log_weights()
    want = [(1 / 3) * (2 / 3) ** k for k in range(5)] + [(2 / 3) ** 5]
    check_close(log_w.exp(), want, 1e-14)
    check_close(MixturePrior(None, None, *stick_prior("dirichlet", 0.3, C)).log_weights().exp(), np.full(C, 1 / C), 1e-14)
    v = np.random.default_rng(0).beta(*(part.numpy() for part in stick_prior("gem", 2.0, 60)), (20_000, 59))
    pi = stick_breaking(torch.log(torch.from_numpy(v)), torch.log1p(-torch.from_numpy(v))).exp()
    check_mc((pi**2).sum(-1), 1 / 3)  # 1 / (1 + concentration): how likely two draws share a component


def test_mean_weights_of_symmetric_kumaraswamy_sticks_are_lopsided():
    alpha, beta = stick_prior("dirichlet", 0.2, 3)
    check_close(stick_mean_log_weights(alpha.log(), beta.log()).exp(), [0.44209603, 0.36285587, 0.19504810], 1e-8)
    check_close(stick_mean_log_weights(alpha.log(), beta.log(), family="beta").exp(), [1 / 3] * 3, 1e-14)


def test_mean_weights_match_draws():
    log_a, log_b = normal(C - 1), normal(C - 1, seed=1)
    u = uniform(40000, C - 1)
    for family in ("kumaraswamy", "beta"):
        if family == "kumaraswamy":
            log_v, log1m = Kumaraswamy(log_a.exp().expand(u.shape), log_b.exp().expand(u.shape)).rsample_log(noise=u)
        else:
            v = beta_rsample(log_a.exp().expand(u.shape), log_b.exp().expand(u.shape), u)
            log_v, log1m = v.log(), torch.log1p(-v)
        check_mc(stick_breaking(log_v, log1m).exp(), stick_mean_log_weights(log_a, log_b, family=family).exp())


def test_sticks_refuse_bad_input():
    with pytest.raises(ValueError, match="num_components must be an integer of at least 1, got 0"):
        stick_prior("dirichlet", 1.0, 0)
    with pytest.raises(ValueError, match="truncation of a Dirichlet process.*at least 2, got 1"):
        stick_prior("gem", 1.0, 1)
    with pytest.raises(ValueError, match="concentration must be a positive number, got -1"):
        stick_prior("gem", -1.0, 3)
    with pytest.raises(ValueError, match="prior must be 'dirichlet' or 'gem', got 'pitman'"):
        stick_prior("pitman", 1.0, 3)
    with pytest.raises(ValueError, match="log1m_v must have the shape of log_v"):
        stick_breaking(torch.zeros(2), torch.zeros(3))


def test_kumaraswamy_draw_and_derivatives_at_the_reference_point():
    p = t(1.7, 0.8).requires_grad_()
    v = Kumaraswamy(p[:1], p[1:]).rsample(noise=t(0.37))
    v.sum().backward()
    check_close(v, [0.818500018530962], 1e-14)
    check_close(p.grad, [0.0964298269043379, -0.303393845660144], 1e-13)
    check_close(Kumaraswamy(t(1.7), t(0.8)).mean, [0.674143148120130], 1e-13)


def test_beta_draw_is_the_quantile_and_its_gradient_is_implicit():
    a, b, u = t(0.4, 2.0, 7.0), t(1.5, 3.0, 0.6), t(0.2, 0.55, 0.9)
    v = special.betaincinv(a.numpy(), b.numpy(), u.numpy())
    p, q = a.clone().requires_grad_(), b.clone().requires_grad_()
    draw = beta_rsample(p, q, u)
    draw.sum().backward()
    check_close(draw, v, 1e-14)
    quantile = lambda n: special.betaincinv(n[:3], n[3:], u.numpy()).sum()
    check_close(torch.cat([p.grad, q.grad]), oracles.finite_difference(quantile, torch.cat([a, b]).numpy()), rtol=1e-3)  # torch's routine is good to 1e-4


def test_mean_of_beta_draws_has_its_exact_gradient():
    p = t(2.0, 3.0).requires_grad_()
    u = uniform(20000)
    jacobian = torch.autograd.functional.jacobian(lambda n: beta_rsample(n[0].expand(500), n[1].expand(500), u[:500]), p)
    check_mc(jacobian, [0.12, -0.08])


# --- The bounds

def toy_arguments(size, q=TOY_Q, device="cpu"):
    """The two-component toy, `size` copies of its datum: arguments of mixture_bound up to the prior."""
    row = lambda *values: torch.tensor(values, dtype=torch.float64, device=device)
    loc, log_scale = row(*q["loc"])[:, None].expand(size, 2, 1), row(*q["scale"]).log()[:, None].expand(size, 2, 1)
    prior = MixturePrior(row(*TOY["prior_loc"])[:, None], row(*TOY["prior_scale"]).log()[:, None],
                         *(part.to(device) for part in stick_prior("dirichlet", 1.0, 2)))
    log_px = lambda z: torch.distributions.Normal(1.3 * z[..., 0] + 0.2, 0.6).log_prob(row(0.9))
    sticks = (row(math.log(q["a"])).expand(size, 1), row(math.log(q["b"])).expand(size, 1))
    return log_px, loc, log_scale, *sticks, prior


@on_each_device
@pytest.mark.parametrize("kind", ["paper", "indicator", "mixture", "collapsed", "siw"])
def test_bound_matches_quadrature(kind, device):
    want = oracles.mixture_bounds_1d(0.9, **TOY, **TOY_Q, alpha=1, beta=1, rho=(0.35, 0.65))
    size = 100_000
    u, eps = uniform(1, size, 1, seed=1).to(device), normal(1, size, 2, 1, seed=2).to(device)
    rho = {"log_rho": t(0.35, 0.65).log().expand(size, 2).to(device)} if kind in ("collapsed", "siw") else {}
    check_mc(mixture_bound(kind, *toy_arguments(size, device=device), u, eps, **rho), want[kind])


def test_order_of_the_bounds_by_quadrature():
    toys = [(0.9, TOY, TOY_Q), (-2.0, TOY, TOY_Q), (0.3, TOY, dict(loc=(0.2, 0.2), scale=(0.3, 0.9), a=0.4, b=0.3)),
            (0.0, dict(prior_loc=(-4, 4), prior_scale=(0.5, 0.5), slope=1, intercept=0, noise_scale=5),
             dict(loc=(-4 / 1.01, 4 / 1.01), scale=(math.sqrt(25 / 101),) * 2, a=1, b=1))]
    for x, model, q in toys:
        found = oracles.mixture_bounds_1d(x, **model, **q, alpha=1, beta=1, rho=(0.4, 0.6))
        for lower, upper in itertools.pairwise(("paper", "indicator", "mixture", "log_px")):
            check_below(found[lower], found[upper], slack=1e-9)
        for lower, upper in itertools.pairwise(("collapsed", "collapsed_mixture", "siw", "log_px")):
            check_below(found[lower], found[upper], slack=1e-6)
    assert found["hybrid"] > found["log_px"] + 0.49  # the obvious repair is no bound
    check_close(found["indicator"], found["log_px"], 1e-9)


def test_reference_values_of_the_toy():
    found = oracles.mixture_bounds_1d(0.9, **TOY, **TOY_Q, alpha=1, beta=1, rho=(0.35, 0.65))
    want = dict(log_px=-1.90266837236, kl=0.07553716748, entropy=1.02136550773, cross=-1.62722785208, diagonal=0.55811768848,
                paper=-4.39018075546, indicator=-4.31029651920, mixture=-4.14736820217, hybrid=-3.92693293621,
                collapsed=-3.0118799516613)
    for name, value in want.items():
        check_close(found[name], value, 2e-9, what=name)
    check_close(found["collapsed_mixture"], -2.9001951221, 1e-6)
    check_close(found["siw"], -1.9419107315, 1e-6)


def test_reference_values_of_the_terms_and_of_the_repair_that_is_no_bound():
    found = oracles.mixture_bounds_1d(0.9, **TOY, **TOY_Q, alpha=1, beta=1, rho=(0.007074113215, 0.992925886785))
    check_close(found["mean_weights"], [0.60657869166, 0.39342130834], 1e-10)
    check_close(found["R"], [-5.19991846499, -0.79255735388], 1e-9)
    check_close(found["C"], [-1.70579135264, -0.94579498189], 1e-9)
    check_close(found["H"], [0.72579135264, 0.50264780133], 1e-9)
    check_close(found["collapsed"], -1.9217524616160, 1e-9)  # the best responsibilities
    slope = [oracles.mixture_bounds_1d(0.9, **TOY, **TOY_Q, alpha=1, beta=1, rho=(r, 1 - r))["collapsed"] for r in (0.006, 0.008)]
    check_below(slope, found["collapsed"])
    # Two separated prior components, exact component posteriors, equal weights: `indicator` is tight, `hybrid` too high.
    found = oracles.mixture_bounds_1d(0.0, prior_loc=(-4, 4), prior_scale=(0.5, 0.5), slope=1, intercept=0, noise_scale=5,
                                      loc=(-4 / 1.01, 4 / 1.01), scale=(math.sqrt(25 / 101),) * 2, a=1, b=1, alpha=1, beta=1)
    for name, value in dict(log_px=-2.8501832942, indicator=-2.8501832942, mixture=-2.8501832942, paper=-2.9248880016,
                            hybrid=-2.3501832942).items():
        check_close(found[name], value, 2e-9, what=name)


def test_entropy_of_a_mixture_and_the_term_that_stands_for_it():
    """Weights (0.3, 0.7): the entropy of the mixture, between its two ends, and the published term below them all."""
    w, loc, log_scale = t(0.3, 0.7), t(-1.0, 1.5)[:, None], t(0.5, 1.2).log()[:, None]
    q = MixtureNormal(w.log(), loc, log_scale)
    z = q.sample((200_000,), generator=torch.Generator().manual_seed(0))
    check_mc(-q.log_prob(z), 1.7751420671861)
    inner = (w * (log_scale[:, 0] + 0.5 * (1 + math.log(2 * math.pi)))).sum()
    check_close(inner, 1.3386194687925, 1e-12)
    check_close(inner - (w * w.log()).sum(), 1.9494837708474, 1e-12)
    size, sharp = 100_000, 1e6  # sticks of a sharp Beta law: weights as good as fixed, and no price for them
    prior = MixturePrior(loc, log_scale, t(0.3 * sharp), t(0.7 * sharp))
    args = (lambda z: z.new_zeros(z.shape[:-1]), loc.expand(size, 2, 1), log_scale.expand(size, 2, 1),
            prior.alpha.log().expand(size, 1), prior.beta.log().expand(size, 1), prior, uniform(1, size, 1), normal(1, size, 2, 1, seed=5))
    slack = mixture_bound("indicator", *args, family="beta") - mixture_bound("paper", *args, family="beta")
    check_mc(slack, 1.3386194687925 - 1.1489816901324)


def test_importance_estimates_rise_to_the_evidence():
    q = MixtureNormal(t(0.60657869166, 0.39342130834).log(), t(-0.8, 0.6)[:, None], t(0.5, 0.4).log()[:, None])
    prior = MixtureNormal(t(0.5, 0.5).log(), t(-1.5, 1.0)[:, None], t(0.5, 0.8).log()[:, None])
    z = q.sample((1_000_000,), generator=torch.Generator().manual_seed(0))
    log_w = torch.distributions.Normal(1.3 * z[..., 0] + 0.2, 0.6).log_prob(t(0.9)) + prior.log_prob(z) - q.log_prob(z)
    estimates = [torch.logsumexp(log_w.reshape(-1, n), 1) - math.log(n) for n in (1, 5, 50, 500, 5000)]
    means = torch.stack([e.mean() for e in estimates])
    check_below(means[:-1], means[1:])
    check_mc(log_w.exp(), math.exp(-1.90266837236))
    check_mc(estimates[-1], -1.90266837236)


def test_all_bounds_are_the_plain_one_with_one_component():
    loc, log_scale, eps = normal(B, 1, K), 0.3 * normal(B, 1, K, seed=1), normal(S, B, 1, K, seed=2)
    prior = MixturePrior(torch.zeros(1, K).double(), torch.zeros(1, K).double(), *stick_prior("dirichlet", 1.0, 1))
    log_px = lambda z: -(z**2).sum(-1)
    none = torch.zeros(B, 0).double()
    args = (log_px, loc, log_scale, none, none, prior, torch.zeros(S, B, 0).double(), eps)
    z = loc + log_scale.exp() * eps
    q = torch.distributions.Normal(loc, log_scale.exp())
    p = torch.distributions.Normal(torch.zeros(1).double(), torch.ones(1).double())
    log_w = (log_px(z) + (p.log_prob(z) - q.log_prob(z)).sum(-1))[..., 0]
    analytic = log_px(z).mean(0)[:, 0] - torch.distributions.kl_divergence(q, p).sum((-1, -2))
    for kind in ("indicator", "collapsed"):
        check_close(mixture_bound(kind, *args), analytic, 1e-12)
    check_close(mixture_bound("mixture", *args), log_w.mean(0), 1e-12)
    check_close(mixture_bound("siw", *args), iwae(log_w), 1e-12)
    sampled = mixture_bound("paper", *args) - analytic  # the entropy by its draws instead of in closed form
    check_close(sampled, -q.log_prob(z).sum(-1).mean(0)[:, 0] - q.entropy().sum((-1, -2)), 1e-12)


def test_slack_of_the_published_bound_is_exact_and_blind_to_the_means():
    size, far = 100_000, 100.0
    values = []
    for shift in (0.0, far):
        loc = torch.zeros(size, 2, 2).double()
        loc[:, 1] = shift
        q = dict(log_a=torch.full((size, 1), 10.0).double(), log_b=torch.full((size, 1), 10.0).double())
        alpha = torch.tensor([1e3]).double()  # weights of one half: Beta(a, a) with large a, by implicit reparameterisation
        prior = MixturePrior(loc[0], torch.zeros(2, 2).double(), alpha, alpha)
        args = (lambda z: torch.zeros(z.shape[:-1]).double(), loc, torch.zeros_like(loc), q["log_a"], q["log_b"], prior,
                uniform(1, size, 1), normal(1, size, 2, 2, seed=5))
        values.append(mixture_bound("indicator", *args, family="beta") - mixture_bound("paper", *args, family="beta"))
    check_mc(values[0], math.log(2) - 0.5)
    check_close(values[0], values[1], 1e-8)


def test_identical_components_give_the_plain_bound_minus_the_price_of_the_weights():
    loc, log_scale = (normal(B, 1, K, seed=s).expand(B, C, K) for s in (0, 1))
    prior = MixturePrior(normal(1, K, seed=2).expand(C, K), torch.zeros(C, K).double(), *stick_prior("dirichlet", 1.5, C))
    log_a, log_b = normal(B, C - 1, seed=3), normal(B, C - 1, seed=4)
    eps = normal(S, B, 1, K, seed=5).expand(S, B, C, K)
    log_px = lambda z: -(z - 1).abs().sum(-1)
    got = mixture_bound("indicator", log_px, loc, log_scale, log_a, log_b, prior, uniform(S, B, C - 1), eps)
    z = loc[:, :1] + log_scale[:, :1].exp() * eps[:, :, :1]
    q, p = torch.distributions.Normal(loc[:, 0], log_scale[:, 0].exp()), torch.distributions.Normal(prior.loc[0], 1.0)
    plain = log_px(z).mean(0)[:, 0] - torch.distributions.kl_divergence(q, p).sum(-1)
    kl = kl_kumaraswamy_beta(log_a.exp(), log_b.exp(), prior.alpha, prior.beta).sum(-1)
    check_close(got, plain - kl, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["kumaraswamy", "beta"])
def test_gradient_of_every_bound_matches_finite_differences(kind, family):
    shapes = dict(loc=(B, C, K), log_scale=(B, C, K), log_a=(B, C - 1), log_b=(B, C - 1), prior_loc=(C, K))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    start = 0.4 * normal(sum(sizes.values()), seed=7)
    u, eps = uniform(S, B, C - 1), normal(S, B, C, K)

    def objective(flat):
        parts = {name: part.reshape(shapes[name]) for name, part in zip(sizes, flat.split(list(sizes.values())), strict=True)}
        prior = MixturePrior(parts.pop("prior_loc"), torch.zeros(C, K).double(), *stick_prior("gem", 1.5, C))
        log_px = lambda z: -((z[..., 0] - z[..., 1].sin()) ** 2)
        return mixture_bound(kind, log_px, **parts, prior=prior, u=u, eps=eps, family=family).sum()

    flat = start.clone().requires_grad_()
    objective(flat).backward()
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = torch.from_numpy(rng.standard_normal(len(start)))
        with torch.no_grad():
            slope = (objective(start + 1e-5 * direction) - objective(start - 1e-5 * direction)) / 2e-5
        check_close(flat.grad @ direction, slope.item(), 1e-6, rtol=1e-5)


def test_gradient_of_the_indicator_bound_is_unbiased():
    """Its expectation on the toy is a closed form of the means, so its gradient is known."""
    size = 100_000
    log_px, loc, log_scale, log_a, log_b, prior = toy_arguments(size)
    loc = loc.clone().requires_grad_()
    mixture_bound("indicator", log_px, loc, log_scale, log_a, log_b, prior, None, normal(1, size, 2, 1)).sum().backward()
    m, pi = np.array(TOY_Q["loc"]), np.array([0.60657869166, 0.39342130834])
    want = pi * ((0.9 - 0.2 - 1.3 * m) * 1.3 / 0.36 - (m - TOY["prior_loc"]) / np.square(TOY["prior_scale"]))
    check_mc(loc.grad[..., 0], want)


def test_exact_components_make_the_collapsed_bound_tight_and_the_weights_constant():
    m, s = t(-0.399361022364, 0.65371809101), t(0.339140051367, 0.399777962792)
    log_z = t(-5.283528302205, -1.226676602401)
    log_rho = torch.log_softmax(log_z, 0).expand(B, 2)
    q = dict(loc=m.tolist(), scale=s.tolist(), a=1.0, b=1.0)
    args, eps = toy_arguments(B, q), normal(S, B, 2, 1)
    exact = torch.full((B,), -1.902668372356).double()
    check_close(mixture_bound("siw", *args, None, eps, log_rho=log_rho), exact, 1e-7)
    # the collapsed bound averages the reconstruction over draws; many make it the closed form
    found = oracles.mixture_bounds_1d(0.9, **TOY, **q, alpha=1, beta=1, rho=log_rho[0].exp())
    check_close(found["collapsed"], -1.902668372356, 1e-9)


def test_best_sticks_reach_the_reference_and_not_more():
    f = t(-5.283528302205, -1.226676602401)
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([p], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss():
        optimiser.zero_grad()
        value = -(stick_mean_log_weights(p[:1], p[1:]).exp() @ f) + kl_kumaraswamy_beta(p[:1].exp(), p[1:].exp(), 1.0, 1.0).sum()
        value.backward()
        return value

    optimiser.step(loss)
    check_close(-loss().item(), -2.657636352165, 1e-8)
    check_close(p.exp(), [0.869135689, 2.779907944], 1e-4)
    gap = f[1] - f[0]
    check_close(f[0] + torch.log(torch.expm1(gap) / gap), -2.644538695232, 1e-9)


def test_truncations_are_nested():
    f = t(-3.0, -1.0, -2.0)
    log_a, log_b = t(1.4, 0.7).log(), t(0.9, 2.2).log()
    value = lambda log_a, log_b, f: (stick_mean_log_weights(log_a, log_b).exp() @ f
                                     - kl_kumaraswamy_beta(log_a.exp(), log_b.exp(), 1.0, 1.5).sum())
    three = value(log_a, log_b, f)
    four = value(torch.cat([log_a, t(0.0)]), torch.cat([log_b, t(1.5).log()]), t(-3.0, -1.0, -2.0, -2.0))
    check_close(three, -3.171881524681681, 1e-9)
    check_close(four, three, 1e-9)


def test_permuting_components_leaves_the_collapsed_bounds():
    loc, log_scale, eps = normal(B, C, K), 0.2 * normal(B, C, K, seed=1), normal(S, B, C, K, seed=2)
    alpha, beta = stick_prior("dirichlet", 1.0, C)
    prior_loc, log_rho = normal(C, K, seed=3), torch.log_softmax(normal(B, C, seed=4), -1)
    log_px = lambda z: -(z**2).sum(-1)
    order = torch.tensor([2, 0, 3, 1])
    for kind in ("collapsed", "siw"):
        value = lambda n: mixture_bound(kind, log_px, loc[:, n], log_scale[:, n], None, None,  # noqa: B023
                                        MixturePrior(prior_loc[n], torch.zeros(C, K).double(), alpha, beta), None, eps[:, :, n],
                                        log_rho=log_rho[:, n])
        check_close(value(order), value(torch.arange(C)), 1e-12)


def test_bound_refuses_bad_input():
    log_px, loc, log_scale, log_a, log_b, prior = toy_arguments(B)
    eps = normal(S, B, 2, 1)
    with pytest.raises(ValueError, match="kind must be one of .*got 'hybrid'"):
        mixture_bound("hybrid", log_px, loc, log_scale, log_a, log_b, prior, None, eps)
    with pytest.raises(ValueError, match="loc must have shape"):
        mixture_bound("indicator", log_px, loc[:2], log_scale, log_a, log_b, prior, None, eps)
    with pytest.raises(ValueError, match=r"u must have shape \[5, 3, 1\], got None"):
        mixture_bound("mixture", log_px, loc, log_scale, log_a, log_b, prior, None, eps)
    with pytest.raises(ValueError, match="must sum to one"):
        mixture_bound("siw", log_px, loc, log_scale, log_a, log_b, prior, None, eps, log_rho=torch.zeros(B, 2).double())
    with pytest.raises(ValueError, match="log_rho belongs to"):
        mixture_bound("paper", log_px, loc, log_scale, log_a, log_b, prior, None, eps, log_rho=torch.zeros(B, 2).double())
    with pytest.raises(ValueError, match="log_px must have shape"):
        mixture_bound("indicator", torch.zeros(S, B), loc, log_scale, log_a, log_b, prior, None, eps)
    with pytest.raises(ValueError, match=r"eps must have shape \[S, B, C, K\]"):
        mixture_bound("indicator", log_px, loc, log_scale, log_a, log_b, prior, None, eps[0])


def test_renyi_bounds_fall_with_alpha_on_the_toy():
    q = MixtureNormal(t(0.35, 0.65).log(), t(-0.8, 0.6)[:, None], t(0.5, 0.4).log()[:, None])
    z = q.sample((2000, 1), generator=torch.Generator().manual_seed(0))
    prior = MixtureNormal(t(0.5, 0.5).log(), t(-1.5, 1.0)[:, None], t(0.5, 0.8).log()[:, None])
    log_w = torch.distributions.Normal(1.3 * z[..., 0] + 0.2, 0.6).log_prob(t(0.9)) + prior.log_prob(z) - q.log_prob(z)
    values = torch.cat([renyi(log_w, alpha) for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)])
    check_below(values[1:], values[:-1], slack=1e-12)
    check_close(values[1], iwae(log_w)[0].item(), 1e-12)


# --- Mixtures of normals, linear decoders

def test_mixture_density_and_draws():
    log_w, loc, log_scale = torch.log_softmax(normal(B, C), -1), normal(B, C, K, seed=1), 0.3 * normal(B, C, K, seed=2)
    q = MixtureNormal(log_w, loc, log_scale)
    z = q.sample((20000,), generator=torch.Generator().manual_seed(0))
    check_mc(z, q.mean)
    second = (log_w.exp()[..., None] * (loc**2 + torch.exp(2 * log_scale))).sum(-2)
    check_mc(z**2, second)
    want = np.stack([[oracles.gaussian_path_density(z[s, b].numpy(), [
        (math.exp(log_w[b, k]), loc[b, k].numpy(), np.diag(np.exp(2 * log_scale[b, k].numpy()))) for k in range(C)])
        for b in range(B)] for s in range(4)])
    check_close(q.log_prob(z[:4]), want, 1e-11)
    with pytest.raises(ValueError, match="weights must sum to one, got a sum of 3"):
        MixtureNormal(torch.zeros(3), loc[0, :3], log_scale[0, :3])
    with pytest.raises(ValueError, match=r"noise\['normal'\] must have shape"):
        q.rsample((2,), noise={"component": uniform(2, B), "normal": normal(2, B, K + 1)})


FMA = dict(weight=np.array([[1, 0.5], [-0.3, 0.8], [0.2, -1.1]]), bias=np.array([0.1, -0.2, 0.3]), noise_var=np.array([0.3, 0.5, 0.2]))
FMA_X = np.array([0.7, -0.4, 1.2])


def fma_paths(weights):
    cov = FMA["weight"] @ FMA["weight"].T + np.diag(FMA["noise_var"])
    return [(w, FMA["weight"] @ (shift * np.ones(2)) + FMA["bias"], cov) for w, shift in zip(weights, (-1.5, 0, 1.5), strict=True)]


@pytest.mark.parametrize("weights, want", [((0.5, 0.3, 0.2), -4.486390539821375), ((1 / 3,) * 3, -4.389730325171011),
                                           ((0.5, 0.25, 0.25), -4.5930733707986)])
def test_linear_decoder_gives_factor_mixture_analysis(weights, want):
    prior_loc = t(-1.5, 0.0, 1.5)[:, None].expand(3, 2)
    log_px, responsibilities = factor_mixture_log_likelihood(
        torch.from_numpy(FMA_X)[None], *(torch.from_numpy(FMA[n]) for n in ("weight", "bias", "noise_var")),
        t(*weights).log(), prior_loc, torch.ones(3, 2).double())
    check_close(log_px, [want], 1e-11)
    check_close(log_px, [oracles.gaussian_path_density(FMA_X, fma_paths(weights))], 1e-12)
    for shift, centre in ((-1.5, (0.334125838499, -0.632843678356)), (0.0, (0.649416813975, -0.472129806171)),
                        (1.5, (0.964707789451, -0.311415933985))):  # the posterior of each component, by dense algebra
        away = FMA_X - FMA["weight"] @ np.full(2, shift)
        mean, cov = oracles.linear_gaussian_posterior(away[None], FMA["weight"], FMA["bias"], FMA["noise_var"])
        check_close(mean[0] + shift, centre, 1e-11)
        check_close(cov, [[0.212200977251, -0.002006993601], [-0.002006993601, 0.109149575058]], 1e-11)
    if weights[0] == 0.5 and weights[1] == 0.3:
        check_close(responsibilities, [[0.145392343585, 0.755618907372, 0.098988749043]], 1e-11)


def test_factor_mixture_with_components_of_different_widths():
    rng = np.random.default_rng(8)
    scale, loc, w = np.exp(0.5 * rng.standard_normal((3, 2))), rng.standard_normal((3, 2)), np.array([0.2, 0.5, 0.3])
    W, bias, noise = FMA["weight"], FMA["bias"], FMA["noise_var"]
    paths = [(w[c], W @ loc[c] + bias, W @ np.diag(scale[c] ** 2) @ W.T + np.diag(noise)) for c in range(3)]
    x = rng.standard_normal((4, 3))
    log_px, responsibilities = factor_mixture_log_likelihood(
        torch.from_numpy(x), *(torch.from_numpy(n) for n in (W, bias, noise, np.log(w), loc, scale)))
    check_close(log_px, [oracles.gaussian_path_density(row, paths) for row in x], 1e-12)
    check_close(responsibilities.sum(-1), np.ones(4), 1e-12)


def linear_model(num_components=3, **options):
    prior_loc = torch.tensor([-1.5, 0.0, 1.5])[:num_components, None].expand(num_components, 2)
    decoder = torch.nn.Linear(2, 3).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.from_numpy(FMA["weight"]))
        decoder.bias.copy_(torch.from_numpy(FMA["bias"]))
    model = MixtureDLGM(3, 2, num_components, hidden_dims=(5,), prior_loc=prior_loc, likelihood="gaussian", decoder=decoder,
                        freeze_decoder=True, noise_var=torch.tensor([0.3, 0.5, 0.2]), **options).double()
    model.noise_var = torch.from_numpy(FMA["noise_var"])  # not rounded to float32
    return model


def test_model_with_a_linear_decoder_is_exact_and_importance_sampling_agrees():
    torch.manual_seed(0)
    model = linear_model()
    x = torch.from_numpy(FMA_X)[None]
    exact = model.log_likelihood(x)
    check_close(exact.value, [-4.389730325171011], 1e-10)
    assert exact.standard_error.item() == 0
    found = model.log_likelihood(x, 20_000, generator=torch.Generator().manual_seed(0))
    check_mc(found.value, exact.value, standard_error=found.standard_error)
    assert not any(p.requires_grad for p in model.decoder.parameters())


def test_one_component_with_a_linear_decoder_is_factor_analysis():
    model = linear_model(1)
    model.prior_loc.zero_()
    want = oracles.linear_gaussian_evidence(FMA_X[None], FMA["weight"], FMA["bias"], FMA["noise_var"])
    check_close(model.log_likelihood(torch.from_numpy(FMA_X)[None]).value, want, 1e-12)


# --- Two layers

def two_layer_linear(C1=3, C2=2, K1=2, K2=1, weights="sticks"):
    """Affine conditional priors and decoder: a deep Gaussian mixture, and its paths enumerated."""
    torch.manual_seed(1)
    rng = np.random.default_rng(3)
    A, shift, scale1 = rng.standard_normal((C1, K1, K2)), rng.standard_normal((C1, K1)), np.exp(0.3 * rng.standard_normal((C1, K1)))
    loc2, scale2 = rng.standard_normal((C2, K2)), np.exp(0.3 * rng.standard_normal((C2, K2)))
    W, bias, noise = rng.standard_normal((4, K1)), rng.standard_normal(4), 0.5
    model = MixtureDLGM(4, (K1, K2), (C1, C2), hidden_dims=(5,), num_layers=2, likelihood="gaussian", weights=weights,
                        prior_loc=loc2, prior_scale=scale2, decoder=torch.nn.Linear(K1, 4)).double()
    model.noise_var, model.prior_body = torch.tensor(noise).double(), torch.nn.Identity()
    model.prior_loc, model.prior_log_scale = torch.from_numpy(loc2), torch.from_numpy(np.log(scale2))
    head = model.prior_components
    head.loc, head.log_scale = torch.nn.Linear(K2, C1 * K1).double(), torch.nn.Linear(K2, C1 * K1).double()
    with torch.no_grad():
        for layer, weight, b in ((model.decoder, W, bias), (head.loc, A.reshape(C1 * K1, K2), shift.reshape(-1)),
                                 (head.log_scale, np.zeros((C1 * K1, K2)), 5 * np.arctanh(np.log(scale1) / 5).reshape(-1))):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(b))
        for part in (model.components, model.lower_components):
            torch.nn.init.normal_(part.log_scale.weight, 0, 0.3)
        for part in (model.mixing, model.lower_mixing):
            torch.nn.init.normal_((part.head if weights == "sticks" else part).weight, 0, 0.5)
    w1, w2 = np.full(C1, 1 / C1), np.full(C2, 1 / C2)
    paths = [(w2[k] * w1[j], W @ (A[j] @ loc2[k] + shift[j]) + bias,
              W @ (A[j] @ np.diag(scale2[k] ** 2) @ A[j].T + np.diag(scale1[j] ** 2)) @ W.T + noise * np.eye(4))
             for k in range(C2) for j in range(C1)]
    return model, paths


def test_two_linear_layers_are_the_enumerated_deep_gaussian_mixture():
    model, paths = two_layer_linear()
    x = normal(1, 4, seed=2)
    found = model.log_likelihood(x, 100_000, generator=torch.Generator().manual_seed(0))
    check_mc(found.value, [oracles.gaussian_path_density(x[0].numpy(), paths)], standard_error=found.standard_error)


@pytest.mark.parametrize("weights, kind", [("sticks", "indicator"), ("softmax", "collapsed")])
def test_two_layer_bound_is_the_ancestral_elbo(weights, kind):
    """Every choice drawn, no sum taken: log p - log q of (v, c, z) of both layers, averaged, is the same number."""
    model, paths = two_layer_linear(weights=weights)
    x, size = normal(1, 4, seed=2), 40_000
    g = torch.Generator().manual_seed(1)
    rows = x.expand(size, 4)
    with torch.no_grad():
        marginal = model.bound(rows, kind=kind, generator=g)
        h = model.encoder(rows)

        def choose(mix, layer):
            log_a, log_b, log_rho = mix
            alpha, beta = getattr(model, f"alpha_{layer}"), getattr(model, f"beta_{layer}")
            if kind == "collapsed":
                c = torch.multinomial(log_rho.exp(), 1, generator=g)
                log_w = MixturePrior(None, None, alpha, beta).log_weights().expand_as(log_rho)
                return c, (torch.gather(log_w, 1, c) - torch.gather(log_rho, 1, c))[:, 0]
            q = Kumaraswamy(log_a.exp(), log_b.exp())
            log_v, log1m = q.rsample_log(generator=g)
            c = torch.multinomial(stick_breaking(log_v, log1m).exp(), 1, generator=g)
            log_p = ((alpha - 1) * log_v + (beta - 1) * log1m - torch.lgamma(alpha) - torch.lgamma(beta) + torch.lgamma(alpha + beta)).sum(-1)
            return c, log_p - q.log_prob_log(log_v, log1m)

        def draw(loc, log_scale, c):
            pick = lambda n: torch.gather(n, 1, c[..., None].expand(-1, 1, n.shape[-1]))[:, 0]
            law = torch.distributions.Normal(pick(loc), pick(log_scale).exp())
            z = law.sample()
            return z, -law.log_prob(z).sum(-1), pick

        torch.manual_seed(2)
        c2, value = choose(model._mix(model.mixing, h), 2)
        z2, minus_q, _ = draw(*model.components(h), c2)
        value += minus_q + torch.distributions.Normal(model.prior_loc[c2[:, 0]], model.prior_log_scale[c2[:, 0]].exp()).log_prob(z2).sum(-1)
        loc1, log_scale1, *mix = (n if n is None else n[0] for n in model._lower_recognition(h, z2[None]))
        c1, more = choose(mix, 1)
        z1, minus_q, pick = draw(loc1, log_scale1, c1)
        loc_p, log_scale_p = model._conditional(z2)
        value += more + minus_q + torch.distributions.Normal(pick(loc_p), pick(log_scale_p).exp()).log_prob(z1).sum(-1)
        value += model._log_px(rows)(z1[None])[0]
    estimate, error = float(marginal.mean()), float(marginal.std() / math.sqrt(size))
    other, other_error = float(value.mean()), float(value.std() / math.sqrt(size))
    check_mc(estimate, other, standard_error=math.hypot(error, other_error))
    check_below(estimate - 5 * error, oracles.gaussian_path_density(x[0].numpy(), paths))


def test_two_layer_bound_is_tight_with_exact_posteriors():
    """One lower component, two upper: q(z_2 | x, c) and q(z_1 | x, z_2) exact, responsibilities exact."""
    model, paths = two_layer_linear(C1=1, C2=2, K1=1, K2=1, weights="softmax")
    x = normal(1, 4, seed=2)
    W, bias = model.decoder.weight.detach().numpy(), model.decoder.bias.detach().numpy()
    head = model.prior_components
    A, shift, var1 = head.loc.weight.item(), head.loc.bias.item(), math.exp(2 * 5 * math.tanh(head.log_scale.bias.item() / 5))
    noise = model.noise_var.item() * np.eye(4)
    loc2, var2 = model.prior_loc.numpy()[:, 0], np.exp(2 * model.prior_log_scale.numpy()[:, 0])
    posterior2 = [oracles.condition_gaussian(  # z_2 given x in path k
        np.r_[loc2[k], paths[k][1]], np.block([[np.array([[var2[k]]]), (var2[k] * A * W).T], [var2[k] * A * W, paths[k][2]]]),
        np.arange(1, 5), x[0].numpy()) for k in range(2)]
    var_post = 1 / (1 / var1 + float(W.T @ np.linalg.solve(noise, W)[:, 0]) if W.ndim == 1 else 1 / var1 + (W.T @ np.linalg.solve(noise, W)).item())
    slope_x = var_post * np.linalg.solve(noise, W)[:, 0]
    logits = [math.log(p[0]) + oracles.gaussian_log_density(x[0].numpy(), p[1], p[2]) for p in paths]
    model.encoder, model.lower_body = torch.nn.Identity(), torch.nn.Identity()
    model.components.loc, model.components.log_scale, model.mixing = (torch.nn.Linear(4, 2).double() for _ in range(3))
    lower = model.lower_components
    lower.loc, lower.log_scale = torch.nn.Linear(5, 1).double(), torch.nn.Linear(5, 1).double()
    model.lower_mixing = torch.nn.Linear(5, 1).double()
    limit = lambda log_scale: 5 * np.arctanh(np.asarray(log_scale) / 5)
    settings = [(model.components.loc, 0, [m[0] for m, _ in posterior2]),
                (model.components.log_scale, 0, limit([0.5 * math.log(c[0, 0]) for _, c in posterior2])),
                (model.mixing, 0, logits), (lower.log_scale, 0, [limit(0.5 * math.log(var_post))]), (model.lower_mixing, 0, [0.0]),
                (lower.loc, np.r_[slope_x, var_post * A / var1][None], [var_post * shift / var1 - slope_x @ bias])]
    with torch.no_grad():
        for layer, weight, b in settings:
            layer.weight.copy_(torch.as_tensor(weight, dtype=torch.float64).expand_as(layer.weight))
            layer.bias.copy_(torch.as_tensor(np.array(b)))
    got = model.bound(x.expand(20_000, 4), kind="collapsed", generator=torch.Generator().manual_seed(0))
    check_mc(got, oracles.gaussian_path_density(x[0].numpy(), paths))


# --- The models' contract

def models():
    yield "mixture", lambda: MixtureDLGM(D, K, C, hidden_dims=(6,))
    yield "mixture of kind", lambda: MixtureDLGM(D, K, C, hidden_dims=(6, 5), kind="mixture", learn_prior=True)
    yield "gem, beta", lambda: MixtureDLGM(D, K, C, hidden_dims=(6,), prior="gem", concentration=2.0, sticks="beta")
    yield "softmax", lambda: MixtureDLGM(D, K, C, hidden_dims=(6,), weights="softmax", kind="siw")
    yield "two layers", lambda: MixtureDLGM(D, (K, 3), (C, 2), hidden_dims=(6,), num_layers=2)
    yield "stick-breaking", lambda: StickBreakingVAE(D, C, hidden_dims=(6,), concentration=3.0)
    yield "stick-breaking, beta", lambda: StickBreakingVAE(D, C, hidden_dims=(6,), sticks="beta")


each_model = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in models()])


def binary(*shape, seed=0):
    return (uniform(*shape, seed=seed) < 0.4).double()


@each_model
@on_each_device
def test_contract_and_bound_below_the_estimate(build, device):
    torch.manual_seed(0)
    model = build().double().to(device)
    x, g = binary(B, D).to(device), torch.Generator(device).manual_seed(0)
    bound = model.bound(x, num_samples=400, generator=g)
    estimate = model.log_likelihood(x, 2000, generator=g, chunk=700)
    assert bound.shape == (B,) and estimate.value.shape == estimate.ess.shape == (B,)
    check_below(bound, estimate.value + 5 * estimate.standard_error, slack=0.05)
    assert model.sample(6, generator=g).shape == (6, D) and model.reconstruct(x, num_samples=3).shape == (B, D)
    q = model.posterior(x)
    z = q.rsample((S,), generator=g)
    assert model.log_joint(x, z).shape == q.log_prob(z).shape == (S, B)
    noise = {name: (normal if kind == "normal" else uniform)(*shape).to(device) for name, (kind, shape, _) in model.noise_spec(B, S).items()}
    once, twice = (model.bound(x, num_samples=S, noise=noise) for _ in range(2))
    assert torch.equal(once, twice)
    for name, (_, shape, axis) in model.noise_spec(B, S).items():
        assert shape[axis] == B and noise[name].shape == torch.Size(shape)


@each_model
def test_bound_averages_to_the_mean_log_weight_where_it_is_the_elbo(build):
    """For these posteriors with one component the bound's mean is E log w of the same draws."""
    torch.manual_seed(0)
    model = build().double()
    if not isinstance(model, StickBreakingVAE):
        pytest.skip("a mixture's bounds are not the mean log-weight of its collapsed posterior")
    with torch.no_grad():
        model.mixing.head.weight.normal_(0, 0.5)
        x = binary(1, D).expand(3000, D)
        q = model.posterior(x)
        z = q.rsample((1,), generator=torch.Generator().manual_seed(1))
        log_w = (model.log_joint(x, z) - q.log_prob(z))[0]
        bound = model.bound(x, generator=torch.Generator().manual_seed(2))
    error = math.hypot(log_w.std() / math.sqrt(3000), bound.std() / math.sqrt(3000))
    check_mc(float(bound.mean()), float(log_w.mean()), standard_error=error)


@each_model
def test_float32_follows_float64(build):
    torch.manual_seed(0)
    model = build().double()
    x = binary(B, D)
    noise = {name: (normal if kind == "normal" else uniform)(*shape) for name, (kind, shape, _) in model.noise_spec(B, S).items()}
    exact = model.bound(x, num_samples=S, noise=noise).detach()
    single = model.float().bound(x.float(), num_samples=S, noise={n: v.float() for n, v in noise.items()})
    assert single.dtype == torch.float32
    check_close(single, exact, 1e-3)


def test_sticks_start_at_the_prior_or_at_its_means():
    x = binary(B, D)
    for concentration, options in itertools.product((0.2, 1.0, 6.0), ({}, {"prior": "gem"}, {"sticks": "beta"}, {"prior": "gem", "weights": "softmax"})):
        model = MixtureDLGM(D, K, C, hidden_dims=(6,), concentration=concentration, **options).double()
        check_close(model.component_weights(x), model._top().log_weights.exp().expand(B, C), 1e-6)
    model = MixtureDLGM(D, K, C, hidden_dims=(6,)).double()
    _, _, log_a, log_b, _ = model.recognise(x)
    check_close(kl_kumaraswamy_beta(log_a.exp(), log_b.exp(), model.alpha_1, model.beta_1), torch.zeros(B, C - 1), 1e-7)


def test_one_wild_step_of_the_heads_cannot_blow_up_the_posterior():
    """log scales stay within 5, log a and log b within 4 of their start; near zero the limit is not felt."""
    torch.manual_seed(0)
    model, x = MixtureDLGM(D, K, C, hidden_dims=(6,)).double(), binary(B, D)
    for size in (1e-6, 1e6):
        with torch.no_grad():
            for head in (model.components.log_scale, model.mixing.head):
                head.weight.normal_(0, size)
        _, log_scale, log_a, log_b, _ = model.recognise(x)
        away = torch.stack([log_a, log_b], 1) - model.mixing.start
        h = model.encoder(x)
        if size < 1:
            check_close(log_scale.flatten(1), model.components.log_scale(h), 1e-12)
            check_close(away.flatten(1), model.mixing.head(h), 1e-12)
        else:
            check_below(log_scale.abs(), 5.0)
            check_below(away.abs(), 4.0)
            assert model.bound(x).isfinite().all()


def test_samples_of_the_prior_have_its_weights():
    model = MixtureDLGM(D, 1, 3, hidden_dims=(6,), prior="gem", prior_loc=[[-9.0], [0.0], [9.0]], prior_scale=[[0.1]] * 3)
    z = model.sample_latents(20_000, generator=torch.Generator().manual_seed(0))
    check_mc(torch.cat([z < -5, z.abs() < 5, z > 5], 1).double(), [0.5, 0.25, 0.25])
    assert (model.sample_latents(50, component=2) > 5).all()
    sticks = StickBreakingVAE(D, C, hidden_dims=(6,), concentration=2.0)
    pi = sticks.weights(sticks.sample_latents(20_000, generator=torch.Generator().manual_seed(0)))
    check_mc(pi, [1 / 3, 2 / 9, 4 / 27, 8 / 27])


TOY_STICKS = dict(a=(1.3, 0.8), b=(2.5, 1.7))


def test_stick_breaking_bound_on_the_toy():
    """x | pi ~ N(pi_1 - pi_2 / 2 + 2 pi_3, 0.4^2): reference values by quadrature."""
    decoder = torch.nn.Linear(3, 1, bias=False)
    model = StickBreakingVAE(1, 3, hidden_dims=(2,), concentration=2.0, likelihood="gaussian", noise_var=0.16, decoder=decoder).double()
    model.noise_var = torch.tensor(0.16).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0, -0.5, 2.0]]))
        model.mixing.head.weight.zero_()
        raw = (torch.stack([t(*TOY_STICKS["a"]), t(*TOY_STICKS["b"])]).log() - model.mixing.start) / 4
        model.mixing.head.bias.copy_(4 * torch.atanh(raw).reshape(-1))
        x = t(0.8)[:, None].expand(50_000, 1)
        check_mc(model.bound(x, generator=torch.Generator().manual_seed(0)), -0.97317137081)
        found = model.log_likelihood(x[:1], 50_000, generator=torch.Generator().manual_seed(1))
    check_mc(found.value, [-0.56590527598], standard_error=found.standard_error)
    kl = kl_kumaraswamy_beta(t(*TOY_STICKS["a"]), t(*TOY_STICKS["b"]), 1.0, 2.0)
    check_close(kl, [0.0277748567954, 0.0224978204658], 1e-8)


@pytest.mark.parametrize("latent", ["gaussian", "stick_breaking"])
def test_semi_supervised_bound_sums_the_labels_out(latent):
    torch.manual_seed(0)
    model = SemiSupervisedVAE(D, C, 3, latent=latent, hidden_dims=(6,)).double()
    x = binary(B, D)
    (kind, shape, _), = model.noise_spec(B, S).values()
    noise = (normal if kind == "normal" else uniform)(*shape)
    labelled = torch.stack([model.bound(x, torch.full((B,), y), num_samples=S, noise=noise) for y in range(3)], -1)
    log_qy = model.classify(x)
    check_close(model.bound(x, num_samples=S, noise=noise), (log_qy.exp() * (labelled - log_qy)).sum(-1), 1e-12)
    with torch.no_grad():  # a classifier that is certain: the unlabelled bound is the labelled one
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(t(0.0, 1e4, 0.0))
    check_close(model.bound(x, num_samples=S, noise=noise), labelled[:, 1], 1e-12)
    z = (normal(S, B, C, seed=3))
    one_hot = torch.eye(3).double()
    slow = torch.stack([model.tail(torch.nn.functional.linear(torch.cat([z, one_hot[y].expand(S, B, 3)], -1), torch.cat(
        [model.from_latent.weight, model.from_label.weight], 1), model.from_latent.bias)) for y in range(3)], 2)
    check_close(model.decode(z, torch.arange(3)), slow, 1e-12)


@pytest.mark.parametrize("latent", ["gaussian", "stick_breaking"])
def test_semi_supervised_bound_pays_the_divergence_of_its_code(latent):
    """A decoder that says nothing: the bound is that of fair coins and a uniform label, less the divergence."""
    torch.manual_seed(0)
    model = SemiSupervisedVAE(D, C, 3, latent=latent, hidden_dims=(6,), concentration=2.0).double()
    with torch.no_grad():
        last = model.tail[1][-1] if isinstance(model.tail[1], torch.nn.Sequential) else model.tail[1]
        last.weight.zero_(), last.bias.zero_()
        heads = (model.components.log_scale, model.components.loc) if latent == "gaussian" else (model.mixing.head,)
        for head in heads:
            head.weight.normal_(0, 0.7)
    x = binary(B, D)
    h = model.encoder(x)
    if latent == "gaussian":
        loc, log_scale = (part[:, 0] for part in model.components(h))
        q = torch.distributions.Normal(loc, log_scale.exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(1).double(), torch.ones(1).double())).sum(-1)
    else:
        log_a, log_b = model.mixing(h)
        kl = kl_kumaraswamy_beta(log_a.exp(), log_b.exp(), 1.0, 2.0).sum(-1)
    want = -D * math.log(2) - math.log(3) - kl
    check_close(model.bound(x, torch.tensor([0, 2, 1])), want, 1e-10)
    log_qy = model.classify(x)
    check_close(model.bound(x), want - (log_qy.exp() * log_qy).sum(-1), 1e-10)


def test_semi_supervised_objective_is_its_formula():
    torch.manual_seed(0)
    model = SemiSupervisedVAE(D, C, 3, hidden_dims=(6,)).double()
    x, x_unlabelled, y = binary(B, D), binary(5, D, seed=1), torch.tensor([0, 2, 1])
    noise, other = normal(1, B, C), normal(1, 5, C, seed=1)
    labelled = (model.bound(x, y, noise=noise) + model.classify(x)[torch.arange(B), y]).mean()
    unlabelled = model.bound(x_unlabelled, noise=other).mean()
    for mixing in (0.0, 0.375, 1.0):
        got = model.objective(x, y, x_unlabelled, mixing=mixing, noise=noise, noise_unlabelled=other)
        check_close(got.detach(), (mixing * labelled + (1 - mixing) * unlabelled).detach(), 1e-12)


def test_a_code_of_sticks_depends_on_the_datum_from_the_start():
    x = binary(B, D)
    for model in (StickBreakingVAE(D, C, hidden_dims=(6,)).double(), SemiSupervisedVAE(D, C, 3, latent="stick_breaking", hidden_dims=(6,)).double()):
        log_a, log_b = model.mixing(model.encoder(x))
        assert (log_a[0] != log_a[1]).all() and (log_b[0] != log_b[1]).all()


def test_semi_supervised_training_learns_to_classify():
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = (torch.nn.functional.one_hot(y, 3).repeat_interleave(4, 1) + (torch.rand(60, 12) < 0.05)).clamp(max=1).float()
    model = SemiSupervisedVAE(12, 2, 3, latent="stick_breaking", hidden_dims=(20,))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (-model.objective(x[:6], y[:6], x[6:])).backward()
        optimiser.step()
    assert (model.classify(x[6:]).argmax(-1) == y[6:]).double().mean() > 0.9


def test_models_refuse_bad_input():
    cases = [
        (lambda: MixtureDLGM(D, K, 0), "num_components must be an integer of at least 1, got 0"),
        (lambda: MixtureDLGM(D, K, 1, prior="gem"), "truncation of a Dirichlet process"),
        (lambda: MixtureDLGM(D, K, C, concentration=-2.0), "concentration must be a positive number, got -2"),
        (lambda: MixtureDLGM(D, K, C, weights="hard"), "weights must be 'sticks' or 'softmax'"),
        (lambda: MixtureDLGM(D, K, C, sticks="gamma"), "sticks must be 'kumaraswamy' or 'beta'"),
        (lambda: MixtureDLGM(D, K, C, num_layers=3), "num_layers must be 1 or 2, got 3"),
        (lambda: MixtureDLGM(D, K, C, prior_loc=torch.zeros(C, K + 1)), r"prior_loc must have shape \[4, 2\], got \[4, 3\]"),
        (lambda: MixtureDLGM(D, K, C, prior_scale=torch.zeros(C, K)), "prior_scale must be positive"),
        (lambda: MixtureDLGM(D, K, C, kind="hybrid"), "kind must be one of"),
        (lambda: MixtureDLGM(D, K, C, weights="softmax", kind="paper"), "softmax weights have the bounds"),
        (lambda: MixtureDLGM(D, K, C, num_layers=2, kind="siw"), "two layers have the bounds"),
        (lambda: MixtureDLGM(D, K, C, likelihood="poisson"), "likelihood must be"),
        (lambda: MixtureDLGM(D, K, C, likelihood="gaussian", noise_var=0.0), "noise_var must be positive"),
        (lambda: MixtureDLGM(D, K, C, hidden_dims=(5,)).bound(torch.full((B, D), 255.0)), "x must be 0 or 1"),
        (lambda: MixtureDLGM(D, K, C, hidden_dims=(5,)).bound(torch.zeros(B, D + 1)), r"x must have shape \[B, 7\]"),
        (lambda: MixtureDLGM(D, K, C, hidden_dims=(5,)).bound(torch.zeros(B, D), num_samples=0), "num_samples must be"),
        (lambda: MixtureDLGM(D, K, C, hidden_dims=(5,), kind="mixture").bound(torch.zeros(B, D), noise=torch.zeros(1)), "noise must be a dict"),
        (lambda: MixtureDLGM(D, K, C, hidden_dims=(5,)).log_joint(torch.zeros(B, D), torch.zeros(S, B, K), coordinates="noise"), "coordinates must be"),
        (lambda: MixtureDLGM(D, K, C, hidden_dims=(5,)).sample_latents(3, component=C), "component must be from 0 to 3, got 4"),
        (lambda: StickBreakingVAE(D, 1), "truncation"),
        (lambda: StickBreakingVAE(D, C, concentration=-1.0), "concentration must be a positive number, got -1"),
        (lambda: StickBreakingVAE(D, C, concentration=math.nan), "concentration must be a positive number, got nan"),
        (lambda: MixtureDLGM(D, K, C, prior="gem", concentration=0.0), "concentration must be a positive number, got 0"),
        (lambda: MixtureDLGM(D, K, -1), "num_components must be an integer of at least 1, got -1"),
        (lambda: MixtureDLGM(D, K, 2.0), "num_components must be an integer of at least 1, got 2.0"),
        (lambda: SemiSupervisedVAE(D, C, 3, latent="stick_breaking", concentration=-1.0), "concentration must be a positive number"),
        (lambda: SemiSupervisedVAE(D, 1, 3, latent="stick_breaking"), "latent_dim must be an integer of at least 2, got 1"),
        (lambda: SemiSupervisedVAE(D, K, 3, hidden_dims=(5,)).bound(torch.zeros(B, D), torch.tensor([0, -1, 2])), "y must be labels from 0 to 2, got values from -1 to 2"),
        (lambda: factor_mixture_log_likelihood(torch.zeros(B, D), torch.zeros(D, K), torch.zeros(D), torch.ones(D), torch.zeros(C), torch.zeros(C, K), torch.ones(C, K)), "weights must sum to one, got a sum of 4"),
        (lambda: factor_mixture_log_likelihood(torch.zeros(B, D), torch.zeros(D, K), torch.zeros(D), -torch.ones(D), torch.full((C,), -math.log(C)), torch.zeros(C, K), torch.ones(C, K)), "noise_var must be positive, got -1"),
        (lambda: SemiSupervisedVAE(D, K, 3, latent="discrete"), "latent must be"),
        (lambda: SemiSupervisedVAE(D, K, 3, hidden_dims=(5,)).bound(torch.zeros(B, D), torch.tensor([0, 1, 3])), "y must be labels from 0 to 2, got values from 0 to 3"),
        (lambda: SemiSupervisedVAE(D, K, 3, hidden_dims=(5,)).bound(torch.zeros(B, D), torch.zeros(B)), "integer labels"),
        (lambda: SemiSupervisedVAE(D, K, 3, hidden_dims=(5,)).objective(torch.zeros(B, D), torch.zeros(B).long(), torch.zeros(B, D), mixing=2), "mixing must be"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="x must be finite"):
        MixtureDLGM(D, K, C, hidden_dims=(5,), likelihood="gaussian").bound(torch.full((B, D), math.nan))


# --- The NumPy twin of the pages

def test_numpy_and_torch_agree_in_value_and_gradient():
    from autograd import grad

    from dlgm_tutorial.scratch import mixture_latents as scratch
    parts = [n.numpy() for n in (normal(B, C, K), 0.3 * normal(B, C, K, seed=1), 0.4 * normal(B, C - 1, seed=2), 0.4 * normal(B, C - 1, seed=3))]
    prior = (normal(C, K, seed=4).numpy(), 0.2 * normal(C, K, seed=5).numpy(), *scratch.stick_prior("gem", 1.7, C))
    u, eps = uniform(S, B, C - 1).numpy(), normal(S, B, C, K, seed=6).numpy()
    W = normal(K, seed=7).numpy()
    numpy_px = lambda z: -((z @ W - 0.3) ** 2)
    torch_px = lambda z: -((z @ torch.from_numpy(W) - 0.3) ** 2)
    tensors = [torch.tensor(n, requires_grad=True) for n in parts]
    torch_prior = MixturePrior(*(torch.as_tensor(n) for n in prior))
    log_w = torch_prior.log_weights().numpy()
    for kind in KINDS:
        if kind in ("paper", "indicator", "mixture"):
            f = lambda *p, kind=kind: scratch.mixture_bound(kind, numpy_px, *p, prior, u, eps)
        else:
            bound = scratch.collapsed_bound if kind == "collapsed" else scratch.siw_bound
            f = lambda *p, bound=bound: bound(numpy_px, *p[:2], scratch.stick_mean_log_weights(*p[2:]), prior, log_w, eps)
        theirs = mixture_bound(kind, torch_px, *tensors, torch_prior, torch.from_numpy(u), torch.from_numpy(eps))
        check_close(theirs, f(*parts), 1e-10, what=kind)
        slopes = torch.autograd.grad(theirs.sum(), tensors)
        for i in range(4):
            check_close(slopes[i], grad(lambda *p, f=f: f(*p).sum(), i)(*parts), 1e-8, what=f"{kind}, argument {i}")


def test_numpy_and_torch_agree_on_kl_and_sticks():
    from dlgm_tutorial.scratch import mixture_latents as scratch
    a, b = (np.exp(normal(S, B, seed=s).numpy()) for s in (0, 1))
    as_torch = torch.from_numpy
    check_close(kl_kumaraswamy_beta(as_torch(a), as_torch(b), 1.0, 3.0), scratch.kl_kumaraswamy_beta(a, b, 1.0, 3.0), 1e-11)
    check_close(stick_mean_log_weights(as_torch(np.log(a)), as_torch(np.log(b))), scratch.stick_mean_log_weights(np.log(a), np.log(b)), 1e-12)
    u = uniform(S, B, seed=2)
    log_v, log1m = scratch.kumaraswamy_draw(np.log(a), np.log(b), u.numpy())
    theirs = Kumaraswamy(as_torch(a), as_torch(b)).rsample_log(noise=u)
    check_close(theirs[0], log_v, 1e-11)
    check_close(theirs[1], log1m, 1e-11)
    check_close(stick_breaking(*theirs), scratch.stick_breaking(log_v, log1m), 1e-11)
    for kind in ("dirichlet", "gem"):
        check_close(torch.stack(stick_prior(kind, 0.7, C)), np.stack(scratch.stick_prior(kind, 0.7, C)), 1e-15)


def test_prior_components_are_the_models_own_memory():
    """An expanded tensor as prior_loc: the state can be saved and loaded, and the caller's array stays as it was."""
    shift = torch.tensor([-1.0, 0.0, 1.0, 2.0])[:, None]
    model = MixtureDLGM(D, K, C, hidden_dims=(5,), prior_loc=shift.expand(C, K), learn_prior=True)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    check_close(model.prior_loc, (shift + 1).expand(C, K), 1e-6)
    assert shift[0] == -1
