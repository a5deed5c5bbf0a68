"""Distributions against dense algebra, quadrature in many digits, and the reference cases of the literature."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_close, check_mc
from dlgm_tutorial.distributions import (
    DiagonalNormal,
    FullNormal,
    Kumaraswamy,
    LowRankPrecisionNormal,
    RankOnePrecisionNormal,
)

B, K, R = 3, 4, 2
GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def full_covariance(scale_tril):
    return scale_tril @ scale_tril.mT


# name -> (class, parameters, dense covariance by another route)
NORMALS = {
    "diagonal": (DiagonalNormal, lambda k: (draw(B, k), draw(B, k, seed=1)), lambda p: torch.diag_embed(p[1].exp())),
    "rank1": (RankOnePrecisionNormal, lambda k: (draw(B, k), draw(B, k, seed=1), 2 * draw(B, k, seed=2)),
              lambda p: torch.linalg.inv(torch.diag_embed(p[1].exp()) + p[2][..., :, None] * p[2][..., None, :])),
    "rank_r": (LowRankPrecisionNormal, lambda k: (draw(B, k), draw(B, k, seed=1), 2 * draw(B, k, R, seed=2)),
               lambda p: torch.linalg.inv(torch.diag_embed(p[1].exp()) + p[2] @ p[2].mT)),
    "full": (FullNormal, lambda k: (draw(B, k), draw(B, k, k, seed=1).tril(-1) / k + torch.diag_embed(draw(B, k, seed=2).exp())),
             lambda p: full_covariance(p[1])),
}
normals = pytest.mark.parametrize("name", NORMALS)


def build(name, k=K, device="cpu", dtype=torch.float64):
    family, parameters, covariance = NORMALS[name]
    parameters = parameters(k)
    return family(*(p.to(device, dtype) for p in parameters)), parameters, covariance(parameters)


@devices
@normals
@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_normal_matches_dense_algebra(name, k, device):
    q, parameters, covariance = build(name, k, device)
    z = 3 * draw(5, B, k, seed=9)
    mean, dense = parameters[0].numpy(), covariance.numpy()
    want = np.stack([oracles.gaussian_log_density(z[:, b].numpy(), mean[b], dense[b]) for b in range(B)], 1)
    kl = [oracles.gaussian_kl(mean[b], dense[b], np.zeros(k), np.eye(k)) for b in range(B)]
    entropy = [stats.multivariate_normal(mean[b], dense[b]).entropy() for b in range(B)]
    check_close(q.log_prob(z.to(device)), want, 1e-10, rtol=1e-11)
    check_close(q.kl_to_standard(), kl, 1e-10, rtol=1e-12)
    check_close(q.entropy(), entropy, 1e-11, rtol=1e-12)
    check_close(q.covariance_matrix, dense, 1e-12, rtol=1e-9)
    check_close(q.variance, np.diagonal(dense, axis1=1, axis2=2), 1e-12, rtol=1e-9)
    assert (q.batch_shape, q.event_shape) == ((B,), (k,)) and torch.equal(q.mean, q.loc)
    # The factor: columns of R are the draws at unit noise, R R^T the covariance.
    factor = q.rsample((k,), noise=torch.eye(k, dtype=torch.float64, device=device)[:, None].expand(k, B, k)) - q.loc
    factor = factor.permute(1, 2, 0)
    check_close(factor @ factor.mT, dense, 1e-12, rtol=1e-9)
    assert bool((torch.linalg.det(factor) > 0).all())  # not a reflection


@normals
def test_draws_have_the_mean_and_covariance(name):
    q, parameters, covariance = build(name)
    z = q.rsample((20_000,), generator=torch.Generator().manual_seed(3))
    assert z.shape == (20_000, B, K)
    check_mc(z, parameters[0])
    delta = z - parameters[0]
    check_mc(delta[..., :, None] * delta[..., None, :], covariance)
    # The mean log-density of its own draws is minus the entropy.
    check_mc(-q.log_prob(z), q.entropy())


@devices
@normals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_those_of_the_arguments(name, dtype, device):
    q, _, _ = build(name, device=device, dtype=dtype)
    noise = draw(5, B, K, seed=4, dtype=dtype).to(device)
    z = q.rsample((5,), noise=noise)
    for value in (z, q.rsample((5,)), q.log_prob(z), q.kl_to_standard(), q.entropy(), q.variance):
        assert (value.dtype, value.device.type) == (dtype, device)
    on_cpu, _, _ = build(name)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    check_close(z, on_cpu.rsample((5,), noise=noise.cpu().double()), tolerance, rtol=tolerance)


@normals
def test_gradients_by_finite_differences(name):
    family, parameters, _ = NORMALS[name]
    parameters = [p.clone().requires_grad_() for p in parameters(K)]
    noise, upstream, z = draw(5, B, K, seed=4), draw(5, B, K, seed=5), draw(5, B, K, seed=6)

    def loss(*p):
        q = family(*p)
        return (q.rsample((5,), noise=noise) * upstream).sum() + q.log_prob(z).sum() + q.kl_to_standard().sum()

    gradients = torch.autograd.grad(loss(*parameters), parameters)
    for i, (p, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        def f(value, i=i):
            changed = [q.detach() for q in parameters]
            changed[i] = torch.from_numpy(value)
            return float(loss(*changed))
        if name == "full" and i == 1:  # above its diagonal a factor is not free
            free, lower = np.tril_indices(K), p.detach().numpy()
            entries = oracles.finite_difference(lambda v, f=f, free=free, lower=lower: f(with_entries(lower, free, v)), lower[:, free[0], free[1]])
            check_close(gradient.numpy()[:, free[0], free[1]], entries, 1e-5, rtol=1e-6)
        else:
            check_close(gradient, oracles.finite_difference(f, p.detach().numpy()), 1e-5, rtol=1e-6)


def with_entries(array, index, values):
    changed = array.copy()
    changed[:, index[0], index[1]] = values
    return changed


@normals
def test_standard_normal_is_at_distance_zero(name):
    zero = torch.zeros(B, K)
    extra = {"diagonal": (zero,), "rank1": (zero, zero), "rank_r": (zero, torch.zeros(B, K, R)),
             "full": (torch.eye(K).expand(B, K, K),)}[name]
    assert torch.equal(NORMALS[name][0](zero, *extra).kl_to_standard(), torch.zeros(B))


def test_rank_one_reference_case():
    """Case F of the brief on stochastic backpropagation, computed with 40 digits."""
    d, u = torch.tensor([[0.5, 1.2, 2.0, 3.5]], dtype=torch.float64), torch.tensor([[0.7, -1.1, 0.4, 2.0]], dtype=torch.float64)
    loc, noise = torch.tensor([[0.3, -0.2, 1.0, 0.0]], dtype=torch.float64), torch.tensor([[1, -0.5, 0.25, 2]], dtype=torch.float64)
    log_d, u = d.log().requires_grad_(), u.requires_grad_()
    q = RankOnePrecisionNormal(loc, log_d, u)
    check_close(q.kl_to_standard(), [1.4349395758305009], 1e-14)
    check_close(q.variance.sum(-1), [2.8670492452083451], 1e-14)
    check_close(q.entropy(), [0.5 * (-2.8728299064526566 + 4 * (1 + math.log(2 * math.pi)))], 1e-14)
    z = q.rsample(noise=noise)
    check_close(z, [[0.88698936551, -0.114800573785, 1.058601810031, 0.731402438318]], 1e-11)
    upstream = torch.tensor([0.3, -1.0, 0.7, 0.2], dtype=torch.float64)
    gradients = torch.autograd.grad((z * upstream).sum(), [log_d, u], retain_graph=True)
    check_close(gradients[0], [[-0.021160485553, 0.188970449680, 0.014898587055, 0.018850112900]], 1e-11)
    check_close(gradients[1], [[-0.191108340781, 0.266128611950, -0.177046102826, -0.091990356732]], 1e-11)
    gradients = torch.autograd.grad(q.kl_to_standard().sum(), [log_d, u])
    check_close(gradients[0], [[-0.238430070298, 0.073117361719, 0.242857142149, 0.196947938514]], 1e-11)
    check_close(gradients[1], [[-0.082447535581, -0.199969492053, 0.059460543564, 0.198964313422]], 1e-11)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-7, 1e-6, 1e-4])
def test_rank_one_factor_is_exact_for_a_tiny_u_in_float32(size):
    """The printed quotient (1 - sqrt(eta)) / t is 0 / 0 at u = 0 and loses all digits near it."""
    u = torch.full((1, K), size, requires_grad=True)
    q = RankOnePrecisionNormal(torch.zeros(1, K), torch.zeros(1, K), u)
    noise = torch.full((1, K), 1e3)
    z = q.rsample(noise=noise)
    want = 1e3 - 0.5 * (K * size * 1e3) * size  # to first order in t
    check_close(z, np.full((1, K), want), rtol=3e-7)
    (z.sum() + q.log_prob(z.detach()) + q.kl_to_standard()).sum().backward()
    assert bool(torch.isfinite(u.grad).all())
    if size == 0:
        assert not u.grad.any()  # every function of the law is even in u


def test_rank_one_is_even_in_u():
    loc, log_d, u = (draw(B, K, seed=s) for s in range(3))
    plus, minus = RankOnePrecisionNormal(loc, log_d, u), RankOnePrecisionNormal(loc, log_d, -u)
    noise = draw(5, B, K, seed=4)
    assert torch.equal(plus.rsample((5,), noise=noise), minus.rsample((5,), noise=noise))
    assert torch.equal(plus.kl_to_standard(), minus.kl_to_standard())


def test_low_rank_with_one_column_is_rank_one():
    loc, log_d, u = (draw(B, K, seed=s) for s in range(3))
    one, low = RankOnePrecisionNormal(loc, log_d, u), LowRankPrecisionNormal(loc, log_d, u[..., None])
    noise = draw(5, B, K, seed=4)
    check_close(low.rsample((5,), noise=noise), one.rsample((5,), noise=noise), 1e-12)


def test_low_rank_has_finite_gradients_at_zero_and_with_equal_columns():
    """Where a factor by eigenvectors has none: the eigenvalues coincide."""
    for U in (torch.zeros(B, K, R), torch.ones(B, K, R)):
        U.requires_grad_()
        q = LowRankPrecisionNormal(torch.zeros(B, K), torch.zeros(B, K), U)
        (q.rsample((5,)).square().sum() + q.kl_to_standard().sum()).backward()
        assert bool(torch.isfinite(U.grad).all())


def test_rank_one_variance_survives_a_dominant_direction_in_float32():
    u = torch.tensor([[1e6, 1.0]])
    variance = RankOnePrecisionNormal(torch.zeros(1, 2), torch.zeros(1, 2), u).variance
    check_close(variance, [[2 / (2 + 1e12), (1 + 1e12) / (2 + 1e12)]], rtol=1e-6)


def test_tiny_kl_in_float32():
    log_var = torch.tensor([[1e-4]])
    want = 2.49991652e-09  # 1/2 (exp(-x) + x - 1) at x = 1e-4
    check_close(DiagonalNormal(torch.zeros(1, 1), -log_var).kl_to_standard(), [want], rtol=1e-3)
    zero = torch.zeros(1, 1)
    check_close(RankOnePrecisionNormal(zero, log_var, zero).kl_to_standard(), [want], rtol=1e-3)


# Kumaraswamy

EXTREMES = [(a, b) for a in (1e-6, 1e-2, 1.0, 30.0, 1e6) for b in (1e-6, 1e-2, 1.0, 30.0, 1e6)]


def kum(a, b, dtype=torch.float64, k=1):
    return Kumaraswamy(torch.full((k,), a, dtype=dtype), torch.full((k,), b, dtype=dtype))


def test_kumaraswamy_reference_case():
    """Case R2 of the brief on mixture latents: draw, both derivatives, mean and variance."""
    a, b = torch.tensor([1.7], dtype=torch.float64, requires_grad=True), torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    q = Kumaraswamy(a, b)
    v = q.rsample(noise=torch.tensor([0.37], dtype=torch.float64))
    check_close(v, [0.818500018530962], 1e-14)
    check_close(torch.stack(torch.autograd.grad(v.sum(), [a, b])), [[0.0964298269043379], [-0.303393845660144]], 1e-13)
    check_close(q.mean, [0.674143148120130], 1e-14)
    check_close(q.variance, [0.0632471031543910], 1e-14)


@pytest.mark.parametrize(("a", "b"), [(2, 3), (0.5, 0.7), (1, 4), (5, 1), (30, 0.1)])
def test_kumaraswamy_against_quadrature(a, b):
    q = kum(a, b)
    for v in (1e-5, 0.2, 0.5, 0.9, 1 - 1e-9):
        check_close(q.log_prob(torch.tensor([v], dtype=torch.float64)), oracles.kumaraswamy_log_density(v, a, b), 1e-7, rtol=1e-12)
    with mpmath.workdps(30):
        quantile = lambda s: mpmath.power(-mpmath.expm1(mpmath.log(s) / b), mpmath.mpf(1) / a)
        want = [float(mpmath.quad(lambda s, n=n: quantile(s) ** n, [0, 1e-6, 0.5, 1])) for n in (1, 2)]
    check_close(q.mean, [want[0]], 1e-9)
    check_close(q.variance, [want[1] - want[0] ** 2], 1e-9)
    check_close(q.kl_to_standard(), oracles.kumaraswamy_beta_kl(a, b, 1, 1), 1e-8)


def test_kumaraswamy_entropy_known_values():
    check_close(kum(2, 3).entropy(), -0.2084261359, 1e-10)
    check_close(kum(0.5, 0.7).entropy(), -0.1645128438, 1e-10)
    assert float(kum(1, 1).kl_to_standard()) == 0


@pytest.mark.parametrize(("a", "b"), [(1, 4), (5, 1)])
def test_kumaraswamy_is_beta_where_a_or_b_is_one(a, b):
    v = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)[:, None]
    check_close(kum(a, b).log_prob(v), stats.beta(a, b).logpdf(v[:, 0]), 1e-12)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a", "b"), EXTREMES)
def test_kumaraswamy_log_draws_are_right_at_the_extremes(a, b, dtype, device):
    """log v, log(1 - v) and the density at both, against arithmetic with 60 digits; gradients finite."""
    u = torch.tensor([1e-30, 1e-4, 0.3, 0.999], dtype=dtype)
    pa, pb = (torch.full((4,), n, dtype=dtype, device=device, requires_grad=True) for n in (a, b))
    q = Kumaraswamy(pa, pb)
    log_v, log1m_v = q.rsample_log(noise=u.to(device))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    with mpmath.workdps(60):
        ma, mb = mpmath.mpf(pa[0].item()), mpmath.mpf(pb[0].item())
        for i in range(4):
            log_t = mpmath.log(mpmath.mpf(u[i].item())) / mb
            loglog = log_t - mpmath.log(ma) if log_t < -100 else mpmath.log(-mpmath.log(-mpmath.expm1(log_t))) - mpmath.log(ma)
            want_v = -mpmath.exp(loglog)
            want_1mv = loglog if loglog < -100 else mpmath.log(-mpmath.expm1(want_v))
            want_density = mpmath.log(ma * mb) + (ma - 1) * want_v + (mb - 1) * log_t
            size = abs((ma - 1) * want_v) + abs((mb - 1) * log_t) + 1
            smallest = torch.finfo(dtype).tiny
            assert abs(log_v[i].item() - want_v) <= tolerance * abs(want_v) * (1 + abs(loglog)) + smallest
            assert abs(log1m_v[i].item() - want_1mv) <= tolerance * (abs(want_1mv) + 1) + smallest
            one = Kumaraswamy(pa[i:i + 1], pb[i:i + 1]).log_prob_log(log_v[i:i + 1], log1m_v[i:i + 1])
            assert abs(one.item() - want_density) <= 30 * tolerance * size
    gradients = torch.autograd.grad(log_v.sum() + log1m_v.sum() + q.log_prob_log(log_v, log1m_v), [pa, pb])
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize(("a", "b"), EXTREMES)
def test_kumaraswamy_draws_stay_inside_and_have_a_finite_density_in_float32(a, b):
    q = kum(a, b, torch.float32, k=3)
    v = q.rsample((2000,), generator=torch.Generator().manual_seed(0))
    assert bool(((v > 0) & (v < 1)).all())
    for value in (q.log_prob(v), q.mean, q.variance, q.entropy()):
        assert bool(torch.isfinite(value).all()) and value.dtype == torch.float32


def test_kumaraswamy_draws_have_the_moments():
    a, b = torch.tensor([[0.3, 2.0], [5.0, 1.2]]), torch.tensor([[0.4, 3.0], [0.6, 9.0]])
    q = Kumaraswamy(a.double(), b.double())
    v = q.rsample((20_000,), generator=torch.Generator().manual_seed(1))
    check_mc(v, q.mean)
    check_mc((v - q.mean).square(), q.variance)
    check_mc(-q.log_prob(v), q.entropy())


# Bad input

@pytest.mark.parametrize(("build", "error", "message"), [
    (lambda: DiagonalNormal(torch.zeros(3, 2), torch.zeros(2)), ValueError, r"log_var must have the shape of loc, \[3, 2\], got \[2\]"),
    (lambda: RankOnePrecisionNormal(torch.zeros(3, 2), torch.zeros(3, 2), torch.full((3, 2), math.nan)), ValueError, "u must be finite"),
    (lambda: RankOnePrecisionNormal(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1)), ValueError, r"u must have the shape of loc"),
    (lambda: LowRankPrecisionNormal(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 4, 2)), ValueError, r"U must have shape \[3, 2\] \+ \[r\]"),
    (lambda: FullNormal(torch.zeros(3, 2), torch.zeros(3, 2)), ValueError, r"scale_tril must have shape \[3, 2, 2\]"),
    (lambda: FullNormal(torch.zeros(3, 2), -torch.eye(2).expand(3, 2, 2)), ValueError, "positive diagonal"),
    (lambda: FullNormal(torch.zeros(3, 2), torch.ones(3, 2, 2)), ValueError, "zero above its diagonal"),
    (lambda: DiagonalNormal(torch.zeros(2), torch.zeros(2, dtype=torch.float64)), TypeError, "log_var is torch.float64 on cpu, loc is torch.float32"),
    (lambda: DiagonalNormal(torch.zeros(2, dtype=int), torch.zeros(2, dtype=int)), TypeError, "loc must be a tensor of floats"),
    (lambda: DiagonalNormal(torch.zeros(()), torch.zeros(())), ValueError, "got a scalar"),
    (lambda: Kumaraswamy(torch.ones(2), torch.tensor([1.0, 0.0])), ValueError, "b must be positive, got a minimum of 0"),
    (lambda: kum(2, 2).log_prob(torch.ones(1, dtype=torch.float64)), ValueError, "v must lie strictly between 0 and 1"),
    (lambda: DiagonalNormal(torch.zeros(3, 2), torch.zeros(3, 2)).rsample((5,), noise=torch.zeros(3, 2)), ValueError, r"noise must have shape sample_shape \+ \[3, 2\] = \[5, 3, 2\], got \[3, 2\]"),
    (lambda: DiagonalNormal(torch.zeros(3, 2), torch.zeros(3, 2)).rsample(noise=torch.zeros(3, 2, dtype=torch.float64)), TypeError, "noise is torch.float64"),
    (lambda: DiagonalNormal(torch.zeros(3, 2), torch.zeros(3, 2)).log_prob(torch.zeros(3, 4)), ValueError, r"the value must have shape \[..., 2\], got \[3, 4\]"),
])
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
