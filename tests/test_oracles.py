"""The oracles against each other and against SciPy: an oracle that is wrong would be believed."""

import mpmath
import numpy as np
import pytest
from scipy import integrate, special, stats

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_close, check_mc

RNG = np.random.default_rng(0)
N, D, K = 6, 4, 2
WEIGHT, BIAS, X = RNG.standard_normal((D, K)), RNG.standard_normal(D), RNG.standard_normal((N, D))
NOISE_VAR = np.array([0.3, 0.5, 0.2, 1.1])
COV = 0.5 * np.eye(D) + WEIGHT @ WEIGHT.T


def test_gaussian_density_and_kl_match_scipy():
    normal = stats.multivariate_normal(BIAS, COV)
    check_close(oracles.gaussian_log_density(X, BIAS, COV), normal.logpdf(X), 1e-12)
    assert np.isclose(oracles.gaussian_log_density(X[0], BIAS, COV), normal.logpdf(X[0]), rtol=1e-13)
    draws = normal.rvs(50_000, random_state=1)
    other = np.diag(NOISE_VAR) + 1.0
    ratio = normal.logpdf(draws) - stats.multivariate_normal(X[0], other).logpdf(draws)
    check_mc(ratio, oracles.gaussian_kl(BIAS, COV, X[0], other))


def test_conditioning_factorises_the_joint():
    """p(a, b) = p(b) p(a | b) at any point."""
    observed, rest = np.array([2, 0]), np.array([1, 3])
    mean, cov = oracles.condition_gaussian(BIAS, COV, observed, X[0, observed])
    parts = (oracles.gaussian_log_density(X[0, rest], mean, cov)
             + oracles.gaussian_log_density(X[0, observed], BIAS[observed], COV[np.ix_(observed, observed)]))
    check_close(parts, oracles.gaussian_log_density(X[0], BIAS, COV), 1e-12)


@pytest.mark.parametrize("noise_var", [0.4, NOISE_VAR, np.diag(NOISE_VAR) + 0.1])
def test_bayes_rule_holds_for_the_linear_gaussian_model(noise_var):
    """log p(x) = log p(z) + log p(x | z) - log p(z | x), whatever z."""
    noise = noise_var if np.ndim(noise_var) == 2 else np.diag(np.broadcast_to(noise_var, D))
    mean, cov = oracles.linear_gaussian_posterior(X, WEIGHT, BIAS, noise_var)
    z = np.array([0.7, -1.9])
    want = [oracles.gaussian_log_density(z, np.zeros(K), np.eye(K)) - oracles.gaussian_log_density(z, m, cov) for m in mean]
    want += oracles.gaussian_log_density(X, BIAS + WEIGHT @ z, noise)
    check_close(oracles.linear_gaussian_evidence(X, WEIGHT, BIAS, noise_var), want, 1e-11)


@pytest.mark.parametrize("k", [1, 2])
def test_grid_gives_the_evidence_and_posterior_of_a_linear_model(k):
    log_joint = lambda z: oracles.gaussian_log_density(z, np.zeros(k), np.eye(k)) + np.array(
        [oracles.gaussian_log_density(X[0], BIAS + WEIGHT[:, :k] @ point, np.diag(NOISE_VAR)) for point in z])
    evidence, mean, cov = oracles.grid_posterior(log_joint, -6 * np.ones(k), 6 * np.ones(k), 101)
    want_mean, want_cov = oracles.linear_gaussian_posterior(X[:1], WEIGHT[:, :k], BIAS, NOISE_VAR)
    check_close(evidence, oracles.linear_gaussian_evidence(X[:1], WEIGHT[:, :k], BIAS, NOISE_VAR)[0], 1e-8)
    check_close(mean, want_mean[0], 1e-8)
    check_close(cov, want_cov, 1e-8)


def test_gauss_hermite_integrates_polynomials_exactly():
    mean, cov = np.array([0.3, -0.7]), np.array([[0.9, 0.35], [0.35, 0.5]])
    moments = oracles.gauss_hermite(lambda z: z[:, :, None] * z[:, None, :], mean, cov, 4)
    check_close(moments, cov + np.outer(mean, mean), 1e-13)
    # E sin(z_0) z_1^2, case H of the brief on stochastic backpropagation.
    check_close(oracles.gauss_hermite(lambda z: np.sin(z[:, 0]) * z[:, 1] ** 2, mean, cov), -0.13501846274735985, 1e-13)


@pytest.mark.parametrize(("parameters", "want"), [
    ((2, 3, 1, 5), 1.398988223460621), ((1.5, 0.6, 1, 5), 6.644215715093428), ((1.2, 0.25, 1, 5), 16.76697334703447),
    ((3, 0.4, 1, 2), 4.102286008718463), ((0.5, 0.7, 1, 1), 0.1645128438477777), ((5, 2, 1, 4), 4.129385969969393),
    ((0.8, 4, 2, 3), 1.408902431254843), ((2, 2, 1, 1), 0.1362943611198906), ((2.5, 1.5, 1, 4), 2.697706841385140),
    ((0.3, 0.3, 0.5, 0.5), 0.1367195920037349), ((2, 1, 3, 2), 0.208240530771945)])
def test_kumaraswamy_beta_kl_reference_values(parameters, want):
    check_close(oracles.kumaraswamy_beta_kl(*parameters), want, 1e-9)


def test_kumaraswamy_is_a_beta_where_a_is_one():
    check_close(oracles.kumaraswamy_beta_kl(1, 3.5, 2, 0.7), oracles.beta_kl(1, 3.5, 2, 0.7), 1e-9)
    check_close(oracles.kumaraswamy_log_density(0.3, 1, 3.5), stats.beta(1, 3.5).logpdf(0.3), 1e-13)
    p, q = stats.beta(2, 3), stats.beta(1.5, 0.8)
    want, _ = integrate.quad(lambda v: p.pdf(v) * (p.logpdf(v) - q.logpdf(v)), 0, 1)
    check_close(oracles.beta_kl(2, 3, 1.5, 0.8), want, 1e-9)


def test_langevin_law_matches_a_simulation_and_its_stationary_variance():
    precision, mean = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([0.5, -1.0])
    z = np.zeros((20_000, K))
    for _ in range(7):
        z = z - 0.045 * (z - mean) @ precision + 0.3 * RNG.standard_normal(z.shape)
    m, cov = oracles.langevin_chain_law(mean, precision, 0.3, 7, np.zeros(K), np.zeros((K, K)))
    check_mc(z, m)
    check_mc((z - m)[:, :, None] * (z - m)[:, None, :], cov)
    # One dimension, precision 4, h = 0.02: variance 1 / (4 (1 - h 4 / 2)) in the long run.
    _, cov = oracles.langevin_chain_law([0.0], [[4.0]], 0.2, 2000, [3.0], [[0.0]])
    check_close(cov, [[1 / (4 * (1 - 0.04))]], 1e-12)


def test_relu_knots_are_where_the_slope_changes():
    weights = [(RNG.standard_normal((5, 1)), RNG.standard_normal(5)), (RNG.standard_normal((4, 5)), RNG.standard_normal(4)),
               (RNG.standard_normal((3, 4)), RNG.standard_normal(3))]
    knots = oracles.relu_knots(weights, [0.0], [1.0], -4.0, 4.0)
    decode = lambda t: oracles.relu_decoder(weights, np.atleast_1d(t)[:, None])
    edges = np.concatenate([[-4.0], knots, [4.0]])
    for a, b in zip(edges[:-1], edges[1:], strict=True):  # affine between: the middle is the average of the ends
        check_close(decode((a + b) / 2), (decode(a) + decode(b)) / 2, 1e-12)
    slope = lambda t, h: (decode(t + h) - decode(t)) / h
    assert len(knots) > 3 and all(np.abs(slope(k, 1e-6) - slope(k, -1e-6)).max() > 1e-6 for k in knots)


def test_relu_posterior_of_one_latent_matches_adaptive_quadrature():
    weights = [(RNG.standard_normal((6, 1)), RNG.standard_normal(6)), (RNG.standard_normal((4, 6)), RNG.standard_normal(4)),
               (RNG.standard_normal((3, 4)), RNG.standard_normal(3))]
    x = np.array([0.3, -0.2, 0.9])
    log_evidence, mean, cov, third = oracles.relu_posterior(weights, x, 0.3, [-9.0], [9.0])
    density = lambda z: np.exp(stats.norm.logpdf(z) + stats.norm(oracles.relu_decoder(weights, np.array([[z]]))[0], np.sqrt(0.3)).logpdf(x).sum())
    knots = oracles.relu_knots(weights, [0.0], [1.0], -9.0, 9.0)
    moment = lambda f: integrate.quad(lambda z: f(z) * density(z), -9, 9, points=knots, epsabs=1e-14, epsrel=1e-12, limit=500)[0]
    total = moment(lambda z: 1.0)
    want = moment(lambda z: z) / total
    check_close(log_evidence, np.log(total), 1e-10)
    check_close(mean, [want], 1e-10)
    check_close(cov, [[moment(lambda z: (z - want) ** 2) / total]], 1e-10)
    check_close(third, [moment(lambda z: (z - want) ** 3) / total], 1e-10)


def test_relu_posterior_of_two_latents_matches_a_grid_and_a_rotation():
    """The grid's error is 1 / n^2; the quadrature agrees with itself after the latent plane is turned, to rounding."""
    weights = [(RNG.standard_normal((7, 2)), RNG.standard_normal(7)), (RNG.standard_normal((4, 7)), RNG.standard_normal(4))]
    x = np.array([0.3, -0.2, 0.9, 0.1])
    box = -9 * np.ones(2), 9 * np.ones(2)
    log_evidence, mean, cov, _ = oracles.relu_posterior(weights, x, 0.5, *box, num_cells=30, num_nodes=12)
    log_joint = lambda z: stats.norm.logpdf(z).sum(-1) + stats.norm(oracles.relu_decoder(weights, z), np.sqrt(0.5)).logpdf(x).sum(-1)
    grid = oracles.grid_posterior(log_joint, *box, 901)
    check_close(grid[0], log_evidence, 1e-4)
    check_close(grid[1], mean, 1e-4)
    check_close(grid[2], cov, 1e-4)
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    turned = oracles.relu_posterior([(weights[0][0] @ turn, weights[0][1]), weights[1]], x, 0.5, *box, num_cells=30, num_nodes=12)
    check_close(turned[0], log_evidence, 1e-10)
    check_close(turn @ turned[1], mean, 1e-9)


def test_small_helpers():
    check_close(oracles.log_mean_exp(np.array([[1000.0, 0.0], [1000.0, 0.0]])), [1000.0, 0.0], 1e-9)
    check_close(oracles.finite_difference(lambda x: float(np.sum(x**3)), np.array([[1.0, 2.0]])), [[3.0, 12.0]], 1e-6)
    assert mpmath.mp.dps == 15  # no oracle leaves a changed precision behind


def test_log_normal_is_scipy_s():
    z = np.array([[-1.0, 0.5], [2.0, 0.0]])
    check_close(oracles.log_normal(z, 0.3, 0.7), stats.norm(0.3, 0.7).logpdf(z), 1e-13)


def test_kumaraswamy_nodes_integrate_its_moments():
    """E v^n = b B(1 + n / a, b), and E log v = -(psi(b + 1) + gamma) / a."""
    a, b = 1.7, 0.6
    v, w = oracles.kumaraswamy_nodes(a, b)
    for n in (0, 1, 2):
        check_close(w @ v**n, b * special.beta(1 + n / a, b), 1e-12)
    check_close(w @ np.log(v), -(special.digamma(b + 1) + np.euler_gamma) / a, 1e-9)
