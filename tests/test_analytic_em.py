"""Exact inference by regions: against quadrature, the brief's reference networks, limits, gauges, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from dlgm_tutorial import _normal_integrals as integrals
from dlgm_tutorial import _region_posterior
from dlgm_tutorial.analytic_em import (
    ExactPosterior,
    PiecewiseAffineGaussian,
    collect_statistics,
    e_step,
    exact_elbo,
    exact_log_likelihood,
    exact_posterior,
    fit_em,
    impute,
    m_step_direction,
    marginal_moments,
    num_parameters,
    partition,
)
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.exact_inference import LinearGaussian
from dlgm_tutorial.networks import initialise, mlp
from dlgm_tutorial.oracles import (
    finite_difference,
    linear_gaussian_evidence,
    linear_gaussian_posterior,
    relu_marginal,
    relu_network,
)


def T(values):
    return torch.tensor(values, dtype=torch.float64)


def network(*layers):
    return [(T(W), T(b)) for W, b in layers]


R1 = network(([[1.0], [-0.8], [0.5]], [0.3, -0.4, -0.6]), ([[1.0, -0.5, 0.7], [0.2, 0.9, -1.1]], [0.1, -0.2]))
R2 = network(([[1.2], [-0.7]], [0.2, 0.5]), ([[0.9, -0.6], [0.4, 1.1]], [-0.3, -0.9]), ([[1.0, -0.8], [0.5, 0.6]], [0.0, 0.1]))
R3 = network(([[1.0, 0.5], [-0.6, 0.8], [0.3, -1.1]], [0.2, -0.3, 0.4]), ([[0.9, -0.4, 0.6], [0.2, 1.0, -0.5]], [-0.1, 0.3]))
R3B = network(([[1.0, -0.4], [0.5, 0.9]], [0.3, -0.2]), ([[0.8, -0.7], [-0.6, 1.1]], [-0.4, 0.1]),
              ([[1.2, 0.3], [-0.5, 0.9], [0.4, 0.4]], [0.0, 0.2, -0.1]))
R4 = network(([[1.0, 0.2, -0.3], [-0.5, 0.8, 0.4], [0.3, -0.6, 0.9], [0.2, 0.5, 0.7]], [0.1, -0.3, 0.2, 0.4]),
             ([[0.9, -0.4, 0.6, 0.3], [0.2, 1.0, -0.5, -0.7]], [-0.1, 0.3]))
X1, XM = T([[0.7, -0.4]]), T([[0.7, -0.4], [-1.0, 0.5], [1.8, -1.2]])
ZIGZAG = network(([[1.0], [1.0], [1.0]], [1.0, 0.0, -1.0]), ([[1.0, -2.0, 2.0]], [0.0]))


def random_network(seed, sizes):
    rng = np.random.default_rng(seed)
    return [(torch.as_tensor(rng.normal(size=(n, m)) * np.sqrt(2 / m)), torch.as_tensor(0.5 * rng.normal(size=n)))
            for m, n in zip(sizes[:-1], sizes[1:], strict=True)]


def plain(layers):
    return [(W.numpy(), b.numpy()) for W, b in layers]


# --- Integrals

def test_interval_against_many_digits():
    mp = pytest.importorskip("mpmath")
    cases = [(c + s, c + s + w) for c in (0, 0.5, 3, 9, 40, 1e3) for w in (1e-9, 1e-4, 0.3, 5, np.inf) for s in (0, -0.1)]
    cases += [(-b, -a) for a, b in cases]
    got = integrals.interval(T([a for a, _ in cases]), T([b for _, b in cases]))
    def truth(a, b):
        """log mass, mean, mean square; of the reflected interval where that keeps erfc from cancelling."""
        if a + b < 0:
            log_mass, mean, square = truth(-b, -a)
            return log_mass, -mean, square
        phi = lambda t: mp.npdf(t) if mp.isfinite(t) else mp.mpf(0)
        times = lambda t: t * phi(t) if mp.isfinite(t) else mp.mpf(0)
        mass = (mp.erfc(a / mp.sqrt(2)) - mp.erfc(b / mp.sqrt(2))) / 2
        return mp.log(mass), (phi(a) - phi(b)) / mass, 1 + (times(a) - times(b)) / mass

    with mp.workdps(100):
        for i, (a, b) in enumerate(cases):
            want = [float(value) for value in truth(mp.mpf(a), mp.mpf(b))]
            check_close([part[i] for part in got], want, 1e-11, rtol=1e-11)


def test_interval_of_everything_and_of_half_lines():
    inf = float("inf")
    log_mass, mean, square = integrals.interval(T([-inf, 0.0, -inf]), T([inf, inf, 0.0]))
    check_close(log_mass, np.log([1, 0.5, 0.5]), 1e-15)
    check_close(mean, [0, np.sqrt(2 / np.pi), -np.sqrt(2 / np.pi)], 1e-15)
    check_close(square, [1.0, 1.0, 1.0], 1e-15)


def test_owens_t_against_scipy():
    rng = np.random.default_rng(0)
    h, a = 8 * rng.random(20_000) - 1, np.tan(3.1 * (rng.random(20_000) - 0.5))
    check_close(integrals.owens_t(T(h), T(a)), special.owens_t(h, a), 2e-16)
    check_close(integrals.owens_t(T([1.3, 0.0]), T([np.inf, 1.0])), [special.ndtr(-1.3) / 2, 1 / 8], 1e-16)


POLYGONS = {  # vertices, mass, first and second moments (11, 12, 22), by slices with 30 digits
    "P1": ([(0.5, 0.2), (2.0, 0.1), (2.5, 1.7), (0.8, 2.2)], 0.108826759444003, (0.124367655788307, 0.0866171396442779),
           (0.160023404671641, 0.100937741266672, 0.0920360062013676)),
    "P2": ([(-0.7, -0.5), (1.1, -0.3), (0.2, 1.4)], 0.21441449584648, (0.0374056192332602, 0.0345521993945927),
           (0.034387617633894, 0.00994968059533974, 0.0391378525118111))}


@pytest.mark.parametrize("name", POLYGONS)
def test_polygon_moments(name):
    vertices, mass, first, (s11, s12, s22) = POLYGONS[name]
    cell = T([[*vertices, vertices[-1]]])  # padded
    zero, one, two = integrals.polygon(cell, torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 1, 2, dtype=torch.float64))
    check_close(zero[0, 0], mass, 5e-15)
    check_close(one[0, 0], first, 5e-15)
    check_close(two[0, 0], [[s11, s12], [s12, s22]], 5e-15)
    if name == "P1":  # does not hold the origin, so the tail's formula must agree
        log_scale, zero, one, two = integrals.polygon_tail(cell, cell)
        check_close(torch.exp(log_scale) * zero, [mass], 1e-14)
        check_close(torch.exp(log_scale)[:, None] * one, [first], 1e-14)


def test_polygon_under_a_correlated_normal():
    cov, mean = T([[0.7, 0.25], [0.25, 0.4]]), T([0.4, 0.9])
    S = torch.linalg.cholesky(cov)
    C = torch.linalg.inv(S).T
    zero, one, two = integrals.polygon(T([POLYGONS["P1"][0]]), C[None], (C.T @ mean)[None, None])
    check_close(zero[0, 0], 0.339935113809, 1e-12)
    check_close(mean * zero[0, 0] + S @ one[0, 0], [0.392666524705, 0.37689897284], 1e-12)
    shift = S @ one[0, 0]
    second = zero[0, 0] * torch.outer(mean, mean) + torch.outer(mean, shift) + torch.outer(shift, mean) + S @ two[0, 0] @ S.T
    check_close(second, [[0.506546251416, 0.451051420525], [0.451051420525, 0.487499037427]], 1e-11)


def test_polygon_without_end():
    """Case P6, unbounded; the box at 50 stands for infinity. By one dimension after the other, and by the brief."""
    from scipy.integrate import quad

    inner = lambda z: np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * special.ndtr(-max(0.2, 1 - z))
    want = quad(inner, 0, 0.8, epsabs=1e-15)[0] + quad(inner, 0.8, 12, epsabs=1e-15)[0]
    assert abs(want - 0.167656877964945) < 1e-13
    corners = T([[0.0, 1.0], [0.8, 0.2], [50.0, 0.2], [50.0, 50.0], [0.0, 50.0]])
    zero = integrals.polygon(corners[None], torch.eye(2).double()[None], torch.zeros(1, 1, 2).double())[0]
    check_close(zero, [[want]], 1e-14)


@pytest.mark.parametrize(("vertices", "mass"), [
    ([(6, 0.5), (8, -0.5), (8.5, 2), (6.5, 2.5)], 1.714160184192638e-10),
    ([(20, 0.5), (22, -0.5), (22.5, 2), (20.5, 2.5)], 1.94675947609e-90),
    ([(30, -5), (33, -5), (33, 6), (30, 6)], 4.90671251579e-198)])
def test_polygon_far_from_the_mass(vertices, mass):
    cell = T([vertices])
    log_scale, zero, *_ = integrals.polygon_tail(cell, cell)
    check_close(log_scale + torch.log(zero), [np.log(mass)], 1e-11)


def test_derivatives_of_the_mass_give_the_moments():
    """eq (13) of the brief: the gradient and the Hessian of the mass in the mean, here by finite differences."""
    cell, eye = T([POLYGONS["P1"][0]]), torch.eye(2, dtype=torch.float64)[None]
    centre = np.array([0.3, -0.2])
    mass = lambda m: float(integrals.polygon(cell, eye, T(m)[None, None])[0])
    first = lambda m, i: float(integrals.polygon(cell, eye, T(m)[None, None])[1][0, 0, i])
    zero, one, two = integrals.polygon(cell, eye, T(centre)[None, None])
    check_close(one[0, 0], finite_difference(mass, centre), 1e-9)
    hessian = np.array([finite_difference(lambda m, i=i: first(m, i), centre) for i in range(2)])
    check_close(two[0, 0], hessian + float(zero) * np.eye(2), 1e-9)


def test_tetrahedron_by_signed_cones():
    from scipy.spatial import ConvexHull
    V = np.array([(0.1, 0.2, -0.3), (1.4, 0.1, 0.2), (0.3, 1.6, 0.1), (0.2, 0.4, 1.3)])
    mean, cov = T([0.3, 0.2, 0.1]), T([[0.8, 0.2, 0.1], [0.2, 0.6, -0.1], [0.1, -0.1, 0.9]])
    S = torch.linalg.cholesky(cov)
    C = torch.linalg.inv(S).T
    _, zero, one, two = integrals.polytope([(V.mean(0), V, ConvexHull(V).simplices)], C[None], (C.T @ mean)[None, None])
    check_close(zero[0, 0], 0.0356961747798014, 1e-12)
    shift = S @ one[0, 0]
    check_close(mean * zero[0, 0] + shift, [0.0179995248413, 0.0189837699232, 0.0109049833647], 1e-12)
    second = zero[0, 0] * torch.outer(mean, mean) + torch.outer(mean, shift) + torch.outer(shift, mean) + S @ two[0, 0] @ S.T
    want = [0.0109909092433, 0.00900772612655, 0.00542477440182, 0.0121311469706, 0.0057566107936, 0.00572270631164]
    check_close(second[torch.triu_indices(3, 3).unbind()], want, 1e-11)


# --- Partition

def test_knots_of_the_reference_networks():
    check_close(partition(R1, slope=0.1).cells[1:, 0], [-0.5, -0.3, 1.2], 1e-15)
    check_close(partition(R2, slope=0.1).cells[1:, 0],
                [-0.473684210526316, -0.166666666666667, 0.28, 0.714285714285714, 1.89826302729529], 1e-14)
    check_close(partition(R2).cells[1:, 0], [-5 / 11, -1 / 6, 0.28, 5 / 7, 1.70833333333333], 1e-14)


@pytest.mark.parametrize(("num_latents", "units", "count"), [(1, 8, 9), (2, 6, 22), (2, 10, 56), (3, 4, 15), (3, 6, 42),
                                                          pytest.param(3, 8, 93, marks=pytest.mark.slow)])
def test_one_layer_has_zaslavskys_count(num_latents, units, count):
    assert partition(random_network(1, [num_latents, units, 2]), box=1e4).num_regions == count


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [[1, 5, 4, 3], [2, 6, 5, 3], [3, 4, 3, 2]])
def test_regions_tile_the_space_and_the_map_is_affine_on_each(sizes, slope):
    layers = random_network(2, sizes)
    regions = partition(layers, slope=slope)
    z = 2 * np.random.default_rng(3).normal(size=(500, sizes[0]))
    output, hidden = relu_network(plain(layers), z, slope)
    match = (torch.as_tensor(np.concatenate(hidden, 1) > 0)[:, None] == regions.codes).all(-1)
    assert (match.sum(1) == 1).all()  # every point's code is listed exactly once
    r = match.double().argmax(1)
    check_close((regions.A[r] @ T(z)[..., None])[..., 0] + regions.b[r], output, 1e-12)
    if sizes[0] == 2:
        v, w = regions.cells, torch.roll(regions.cells, -1, 1)
        areas = 0.5 * (v[..., 0] * w[..., 1] - v[..., 1] * w[..., 0]).sum(1)
        assert (areas > 0).all()
        check_close(areas.sum(), 100.0**2, rtol=1e-12)


def test_duplicate_and_dead_units_make_no_regions():
    W, b = R3[0]
    dead = T([[0.0, 0.0]])
    layers = [(torch.cat([W, 2 * W[:1], W[1:2], dead]), torch.cat([b, 2 * b[:1], b[1:2], T([-1.0])])),
              (torch.cat([R3[1][0], torch.zeros(2, 3, dtype=torch.float64)], 1), R3[1][1])]
    assert partition(layers, slope=0.1).num_regions == partition(R3, slope=0.1).num_regions == 7
    check_close(exact_log_likelihood(layers, T([[0.8, 0.1]]), 0.16, slope=0.1), -1.6033941653702 * np.ones(1), 1e-12)
    same = [(torch.cat([R1[0][0]] * 2), torch.cat([R1[0][1]] * 2)), (torch.cat([R1[1][0]] * 2, 1) / 2, R1[1][1])]
    assert partition(same, slope=0.1).num_regions == 4
    check_close(exact_log_likelihood(same, XM, 0.25, slope=0.1), exact_log_likelihood(R1, XM, 0.25, slope=0.1), 1e-13)


def test_neighbouring_maps_agree_on_their_border():
    layers = random_network(5, [1, 6, 5, 3])
    regions = partition(layers, slope=0.1)
    knots = regions.cells[1:, :1]
    at = lambda part: (regions.A[part] @ knots[..., None])[..., 0] + regions.b[part]
    check_close(at(slice(1, None)), at(slice(None, -1)), 1e-11)


# --- Evidence and posterior

def test_reference_network_r1():
    log_px, e0, e1, e2 = e_step(R1, X1, 0.25, slope=0.1)
    check_close(log_px, [-1.47916896449348918], 1e-14)
    check_close(e0[0], [0.0868983405851129, 0.0733086882892201, 0.830990570304976, 0.00880240082069091], 1e-14)
    check_close(e1[0, :, 0], [-0.0625740378284036, -0.0290838616875953, 0.251561986238695, 0.0116538056266466], 1e-14)
    check_close(e2[0, :, 0, 0], [0.0482630533034524, 0.011781995098972, 0.170486867018437, 0.0155391223024931], 1e-14)
    check_close(exact_log_likelihood(R1, XM, 0.25, slope=0.1), [-1.47916896449349, -2.71428163170619, -4.56654898611657], 1e-13)
    log_px, e0, e1, e2 = e_step(R1, X1, 0.01, slope=0.1)
    check_close(log_px, [-4.49374512717657666], 1e-13)
    check_close(e0[0], [1.188477395339e-11, 9.18874463962886e-10, 0.999999999069241, 8.19584103037368e-24], 1e-14, rtol=1e-9)


@pytest.mark.parametrize(("slope", "log_px", "mean", "square"), [
    (0.1, -1.00683411529540936, 0.388191381304338336, 0.309287740312136418),
    (0.0, -0.918248241030033303, 0.32116577512342257, 0.310226329268153442)])
def test_reference_network_r2(slope, log_px, mean, square):
    got, _, e1, e2 = e_step(R2, T([[0.5, 0.25]]), 0.09, slope=slope)
    check_close(got, [log_px], 1e-14)
    check_close([e1.sum(), e2.sum()], [mean, square], 1e-14)


def test_reference_network_r3():
    log_px, e0, e1, e2 = e_step(R3, T([[0.8, 0.1]]), 0.16, slope=0.1)
    check_close(log_px, [-1.6033941653702], 2e-13)
    check_close(e1.sum(1)[0], [0.103862630594, -0.176450630332], 1e-12)
    check_close(e2.sum(1)[0], [[0.391574352385, 0.179861676170], [0.179861676170, 0.342840685962]], 1e-12)
    weight = {"111": 0.00184231684396, "110": 0.0665415844274, "101": 0.546315057494, "100": 0.0595434380820,
              "011": 0.0267109946072, "010": 0.00143274628059, "001": 0.297613862265}
    codes = ["".join(str(int(on)) for on in code) for code in partition(R3, slope=0.1).codes]
    check_close(e0[0], [weight[code] for code in codes], 1e-12)


@pytest.mark.parametrize(("slope", "count", "log_px", "mean"), [
    (0.1, 11, -2.35198983667263, [0.7340913701862, -0.4842272500497]),
    (0.0, 9, -2.0721458425939, [0.6814455222947, -0.511183858765])])
def test_reference_network_r3b(slope, count, log_px, mean):
    assert partition(R3B, slope=slope).num_regions == count
    posterior = exact_posterior(R3B, T([[0.9, 0.3, 0.2]]), 0.09, slope=slope)
    check_close(posterior.log_px, [log_px], 1e-12)
    check_close(posterior.mean[0], mean, 1e-11)


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("noise_var", [0.0025, 0.2, "diagonal", "full"])
@pytest.mark.parametrize("sizes", [[1, 7, 3], [1, 6, 5, 4]])
def test_one_latent_matches_quadrature(sizes, noise_var, slope):
    layers, D = random_network(7, sizes), sizes[-1]
    rng = np.random.default_rng(8)
    noise = {"diagonal": rng.uniform(0.02, 0.4, D), "full": 0.2 * np.cov(rng.normal(size=(D, 9)))}.get(noise_var, noise_var)
    x = relu_network(plain(layers), rng.normal(size=(3, 1)), slope)[0]
    x[2] += 2  # off the curve
    posterior = exact_posterior(layers, T(x), noise, slope=slope)
    assert isinstance(posterior, ExactPosterior)
    for row, datum in enumerate(x):
        log_px, mean, second = relu_marginal(plain(layers), datum, noise, slope, panels=400)
        check_close(posterior.log_px[row], log_px, 1e-12, rtol=1e-13)
        check_close(posterior.mean[row], mean, 1e-12)
        check_close(posterior.covariance[row].numpy() + np.outer(mean, mean), second, 1e-12, rtol=1e-12)


@pytest.mark.parametrize(("sizes", "noise_var", "slope"), [([2, 5, 3], 0.2, 0.1), ([2, 4, 3, 4], 0.1, 0.0)])
def test_two_latents_match_quadrature(sizes, noise_var, slope):
    layers = random_network(9, sizes)
    x = relu_network(plain(layers), np.random.default_rng(1).normal(size=(1, 2)), slope)[0][0] + 0.3
    posterior = exact_posterior(layers, T(x)[None], noise_var, slope=slope)
    log_px, mean, second = relu_marginal(plain(layers), x, noise_var, slope, panels=40, reach=8.0, outer=(600, 6))
    check_close(posterior.log_px[0], log_px, 1e-10)
    check_close(posterior.mean[0], mean, 1e-10)
    check_close(posterior.covariance[0], second - np.outer(mean, mean), 1e-10)


def test_three_latents_match_the_stored_quadrature():
    reference = json.loads((Path(__file__).parent / "references" / "analytic_em_k3.json").read_text())
    log_px, e0, e1, e2 = e_step(R4, T([reference["x"]]), reference["noise_var"], slope=reference["slope"])
    check_close(log_px, [reference["log_px"]], 1e-8)
    check_close(log_px, [-2.14025062156], 2e-11)  # the brief's value, by two-dimensional slices
    check_close(e1.sum(1)[0], reference["mean"], 1e-8)
    check_close(e2.sum(1)[0], reference["second"], 1e-8)
    check_close(e1.sum(1)[0], [-0.185622750256, -0.307736101238, 0.290547330671], 1e-10)
    assert e0.shape == (1, 15)


def test_affine_decoders_are_factor_analysis():
    rng = np.random.default_rng(4)
    for K, D in ((1, 4), (2, 7), (2, 1)):
        W, b, x, noise = rng.normal(size=(D, K)), rng.normal(size=D), rng.normal(size=(3, D)), rng.uniform(0.1, 1, D)
        posterior = exact_posterior([(T(W), T(b))], T(x), noise)
        check_close(posterior.log_px, linear_gaussian_evidence(x, W, b, noise), 1e-12)
        mean, cov = linear_gaussian_posterior(x, W, b, noise)
        check_close(posterior.mean, mean, 1e-12)
        check_close(posterior.covariance, np.broadcast_to(cov, (3, K, K)), 1e-12)
        check_close(posterior.log_px, LinearGaussian(T(W), T(b), T(noise)).log_likelihood(T(x)).value, 1e-11)


@pytest.mark.parametrize("sizes", [[1, 5, 4], [2, 4, 4]])
def test_units_without_a_kink_are_affine(sizes):
    layers = random_network(6, sizes)
    x = T(np.random.default_rng(0).normal(size=(3, sizes[-1])))
    W = (layers[1][0] @ layers[0][0]).numpy()
    b = (layers[1][0] @ layers[0][1] + layers[1][1]).numpy()
    check_close(exact_log_likelihood(layers, x, 0.3, slope=1.0), linear_gaussian_evidence(x.numpy(), W, b, 0.3), 1e-12)
    assert partition(layers, slope=1.0).num_regions == 1


def test_gauges_change_nothing():
    for layers, x in ((R1, XM), (R3, T([[0.8, 0.1], [-1.2, 0.7]]))):
        want = exact_log_likelihood(layers, x, 0.2, slope=0.1)
        (W1, b1), (W2, b2) = layers
        scale, order = T([2.0, 0.5, 3.0]), [2, 0, 1]
        K = W1.shape[1]
        turn = T([[-1.0]]) if K == 1 else T([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
        W, b, V = (scale[:, None] * W1)[order] @ turn, (scale * b1)[order], (W2 / scale)[:, order]
        check_close(exact_log_likelihood([(W, b), (V, b2)], x, 0.2, slope=0.1), want, 1e-12)
    assert num_parameters(R3) == 9 + 8 + 1 - 3 - 1 and num_parameters(R1, "full") == 6 + 8 + 3 - 3


def test_a_unit_without_outgoing_weights_changes_nothing():
    wide = [(torch.cat([R3[0][0], T([[0.7, -0.3]])]), torch.cat([R3[0][1], T([0.1])])),
            (torch.cat([R3[1][0], torch.zeros(2, 1, dtype=torch.float64)], 1), R3[1][1])]
    x = T([[0.8, 0.1], [-1.2, 0.7]])
    assert partition(wide, slope=0.1).num_regions > 7
    check_close(exact_log_likelihood(wide, x, 0.16, slope=0.1), exact_log_likelihood(R3, x, 0.16, slope=0.1), 1e-13)


def test_density_integrates_to_one():
    grid = torch.linspace(-12, 12, 401, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    density = torch.exp(exact_log_likelihood(R1, x, 0.25, slope=0.1))
    check_close(density.sum() * (grid[1] - grid[0]) ** 2, 1.0, 1e-12)


def test_small_noise_limit_weighs_the_preimages():
    posterior = exact_posterior(ZIGZAG, T([[0.6]]), 1e-6)
    edges = partition(ZIGZAG).cells
    weight = [posterior.region_weights[0, i] for i in range(len(edges)) if posterior.region_weights[0, i] > 1e-6]
    check_close(torch.stack(weight), [0.434556908652, 0.434556908652, 0.130886182696], 1e-10)
    check_close(torch.exp(posterior.log_px), [0.8474608925], 1e-9)


def test_reduction_of_the_data_dimension_changes_nothing():
    layers = random_network(3, [1, 8, 8, 200])
    x = T(np.random.default_rng(0).normal(size=(4, 200)))
    want = [relu_marginal(plain(layers), row, 0.5, 0.1, panels=300)[0] for row in x.numpy()]
    check_close(exact_log_likelihood(layers, x, 0.5, slope=0.1), want, 1e-10)


@pytest.mark.parametrize("layers", [R1, R3])
def test_data_forty_deviations_away_and_extreme_noise(layers):
    far = T([[30.0, -25.0], [0.2, 0.1]])
    for noise in (0.01, 1e-6, 1e6):
        value, e0, e1, e2 = e_step(layers, far, noise, slope=0.1)
        assert torch.isfinite(value).all() and torch.isfinite(e2).all()
        check_close(e0.sum(1), np.ones(2), 1e-12)
        if layers is R1 and noise > 1e-3:
            want = [relu_marginal(plain(R1), row, noise, 0.1, panels=2000, reach=60.0)[0] for row in far.numpy()]
            check_close(value, want, 1e-6, rtol=1e-9)
    # Under huge noise the posterior is the prior.
    check_close(e1.sum(1), np.zeros((2, e1.shape[2])), 1e-4)


def test_tails_of_two_latents_agree_with_one_latent():
    """A second latent that the decoder ignores changes nothing, however far the data: the polygons' tail against erfcx."""
    ignored = [(torch.cat([R1[0][0], torch.zeros(3, 1, dtype=torch.float64)], 1), R1[0][1]), R1[1]]
    x = T([[0.7, -0.4], [6.0, 5.0], [-9.0, 4.0], [30.0, -25.0]])
    for noise in (0.25, 0.01, 1e-3):
        check_close(exact_log_likelihood(ignored, x, noise, slope=0.1), exact_log_likelihood(R1, x, noise, slope=0.1),
                    1e-9, rtol=1e-11)
        one, two = exact_posterior(R1, x, noise, slope=0.1), exact_posterior(ignored, x, noise, slope=0.1)
        check_close(two.mean[:, 0], one.mean[:, 0], 1e-8)
        check_close(two.covariance[:, 1, 1], np.ones(4), 1e-7)


def test_corners_at_the_origin():
    """Units without biases: every line passes through z = 0, and every region has a corner there."""
    angle = T([0.3, 1.1, 2.0])
    W = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    layers = [(W, torch.zeros(3).double()), (torch.eye(3).double(), torch.zeros(3).double())]
    mean, cov = marginal_moments(layers, 0.5)
    torch.testing.assert_close(mean, torch.full((3,), 1 / np.sqrt(2 * np.pi), dtype=torch.float64), atol=1e-14, rtol=0)
    # E[relu(a) relu(b)] of unit normals at an angle t is (sin t + (pi - t) cos t) / (2 pi): the arc-cosine kernel.
    t = (angle[:, None] - angle).abs()
    want = (torch.sin(t) + (np.pi - t) * torch.cos(t)) / (2 * np.pi) - mean[:, None] * mean + 0.5 * torch.eye(3).double()
    torch.testing.assert_close(cov, want, atol=1e-14, rtol=0)
    # A datum whose pieces are all centred there, and one a rounding error away.
    for x in (torch.zeros(1, 3).double(), torch.full((1, 3), 1e-17).double()):
        want = relu_marginal(plain(layers), x[0].numpy(), 0.2, 0.0, panels=40, outer=(60, 12))
        log_px, e0, _, _ = e_step(layers, x, 0.2)
        torch.testing.assert_close(log_px[0], T(want[0]), atol=1e-9, rtol=0)
        torch.testing.assert_close(e0.sum(), T(1.0))


def test_thin_slivers_around_the_origin():
    """A polygon that holds the origin and has little mass: the tail's formula must not be asked."""
    width = 1e-3
    layers = [(T([[1.0, 0.0], [1.0, 0.0]]), T([width, -width])), (T([[0.3, -0.3]]), T([0.1]))]
    narrow = [(layers[0][0][:, :1], layers[0][1]), layers[1]]
    x = T([[0.1], [0.1 + 0.3 * width], [3.0]])
    for noise_var in (1e-2, 1e-6):
        for got, want in zip(e_step(layers, x, noise_var)[:2], e_step(narrow, x, noise_var)[:2], strict=True):
            order = lambda e: e.sort(1).values if e.ndim == 2 else e
            torch.testing.assert_close(order(got), order(want), atol=1e-9, rtol=1e-9)


def test_polygons_left_out_change_nothing():
    """The E-step skips pairs that a bound rules out; here every pair is integrated, near data and far ones."""
    layers = random_network(5, [2, 6, 5, 3])
    x = torch.cat([torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
                   T([[4.0, -6.0, 3.0]])])
    net = _region_posterior._read(layers, 0.1)
    cells, _, codes = _region_posterior._cut(net, 1000, 600.0)  # as far as the last datum asks for
    for noise_var in (0.5, 0.003):
        problem = _region_posterior._reduce(net, x, T(noise_var))
        pieces = _region_posterior._pieces(net, problem, cells, codes)
        r = problem.y[:, None] - pieces.b
        precision = torch.eye(2).double() + pieces.A.transpose(1, 2) @ pieces.A
        mean = torch.einsum("rkl,rdl,nrd->nrk", torch.linalg.inv(precision), pieces.A, r)
        log_kappa = -0.5 * ((r - torch.einsum("rdk,nrk->nrd", pieces.A, mean)) ** 2).sum(-1)
        log_kappa = log_kappa - 0.5 * (mean**2).sum(-1) - 0.5 * torch.logdet(precision)
        shifted = (cells[None] - mean[:, :, None]) @ pieces.C
        flat = shifted.reshape(-1, *cells.shape[1:])
        whole = cells.expand(len(x), *cells.shape).reshape(flat.shape)
        inside = integrals.polygon_distance(cells, pieces.C, torch.einsum("nrl,rlk->nrk", mean, pieces.C)) == 0
        scale, zero, *_ = integrals.polygon_tail(flat, whole)
        near = integrals.polygon(flat, torch.eye(2).double(), torch.zeros(len(flat), 2).double())[0]
        log_mass = torch.where(inside.reshape(-1), torch.log(near), scale + torch.log(zero)).reshape(inside.shape)
        want = torch.logsumexp(log_kappa + log_mass, 1) + problem.constant
        log_px, e0, _, _ = e_step(layers, x, noise_var, slope=0.1)
        torch.testing.assert_close(log_px, want, atol=1e-9, rtol=1e-11)
        torch.testing.assert_close(e0, torch.exp(log_kappa + log_mass + (problem.constant - want)[:, None]),
                                   atol=1e-9, rtol=0)
        assert int((e0 == 0).sum()) > 0  # some pairs were left out, so the test says something


def test_score_identity():
    x = X1.clone().requires_grad_()
    (score,) = torch.autograd.grad(exact_log_likelihood(R1, x, 0.25, slope=0.1).sum(), x)
    check_close(score[0], [-0.41952146, 1.28889550], 1e-8)
    check_close(score[0], finite_difference(lambda p: float(exact_log_likelihood(R1, T(p)[None], 0.25, slope=0.1)), [0.7, -0.4]), 1e-8)


@pytest.mark.parametrize(("layers", "data"), [(R1, XM), (R2, XM), (R3, XM), (R3B, T([[0.9, 0.3, 0.2], [-0.5, 1.0, 0.1]]))])
@pytest.mark.parametrize("noise", ["isotropic", "diagonal", "full"])
def test_gradient_matches_finite_differences(layers, data, noise):
    D = data.shape[1]
    start = {"isotropic": T(0.3), "diagonal": torch.linspace(0.2, 0.5, D, dtype=torch.float64),
             "full": 0.3 * torch.eye(D, dtype=torch.float64) + 0.1}[noise]
    leaves = [t.clone().requires_grad_() for layer in layers for t in layer] + [start.clone().requires_grad_()]
    build = lambda ts: list(zip(ts[:-1:2], ts[1:-1:2], strict=True))
    gradients = torch.autograd.grad(exact_log_likelihood(build(leaves), data, leaves[-1], slope=0.1).sum(), leaves)
    for number, gradient in enumerate(gradients):
        def value(array, number=number):
            ts = [t.detach() for t in leaves]
            ts[number] = T(array)
            if noise == "full" and number == len(ts) - 1:
                ts[number] = (ts[number] + ts[number].T) / 2
            return float(exact_log_likelihood(build(ts), data, ts[-1], slope=0.1).sum())
        want = finite_difference(value, leaves[number].detach().numpy(), 1e-5)
        got = (gradient + gradient.T) / 2 if noise == "full" and number == len(leaves) - 1 else gradient
        check_close(got, want, 2e-8, rtol=1e-8)


def test_log_prob_is_normalised_and_sampling_follows_it():
    x = T([[0.7, -0.4], [-1.0, 0.5], [1.8, -1.2]])
    posterior = exact_posterior(R1, x, 0.04, slope=0.1)
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = torch.exp(posterior.log_prob(z[:, None, None].expand(-1, 3, 1)))
    check_close(torch.trapezoid(density, z, dim=0), np.ones(3), 1e-6)
    draws = posterior.sample(20_000, generator=torch.Generator().manual_seed(0))
    check_mc(draws, posterior.mean)
    check_mc((draws - posterior.mean) ** 2, posterior.covariance[..., 0])
    posterior = exact_posterior(R3, x, 0.04, slope=0.1)
    draws = posterior.sample(20_000, generator=torch.Generator().manual_seed(1))
    check_mc(draws, posterior.mean)
    deviation = draws - posterior.mean
    check_mc(deviation[..., :, None] * deviation[..., None, :], posterior.covariance)
    grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    check_close(torch.exp(posterior.log_prob(z[:, None].expand(-1, 3, 2))).sum(0) * 1e-4, np.ones(3), 1e-4)


def test_simulation_based_calibration():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 1))
    x = relu_network(plain(R1), z, 0.1)[0] + 0.5 * rng.normal(size=(4000, 2))
    draws = exact_posterior(R1, T(x), 0.25, slope=0.1).sample(99, generator=torch.Generator().manual_seed(2))
    rank = (draws[..., 0].numpy() < z[:, 0]).mean(0) + 1 / 200
    check_mc(rank, 0.5)
    check_mc((rank - 0.5) ** 2, (1 - 1e-4) / 12)


def test_three_latents_are_sampled_exactly():
    posterior = exact_posterior(R4, T([[0.4, -0.7]]), 0.36, slope=0.1)
    draws = posterior.sample(4000, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (4000, 1, 3)
    check_mc(draws[:, 0], posterior.mean[0], what="mean, three latents")
    away = draws[:, 0] - posterior.mean[0]
    check_mc(away[:, :, None] * away[:, None], posterior.covariance[0], what="covariance")
    codes = (draws[:, 0] @ R4[0][0].T + R4[0][1] > 0).double()
    on = posterior.region_weights[0] @ partition(R4, slope=0.1).codes.double()
    check_mc(codes, on, what="how often each unit is on")


def test_rsample_is_decided_by_its_noise():
    posterior = exact_posterior(R1, XM, 0.25, slope=0.1)
    noise = torch.rand(5, 2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = posterior.rsample((5, 2), noise=noise)
    assert draws.shape == (5, 2, 3, 1)
    assert torch.equal(draws, posterior.rsample((5, 2), noise=noise))
    # Distribution function of a draw: the mass of the regions before its own, and its share of that one.
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = torch.exp(posterior.log_prob(z[:, None, None].expand(-1, 3, 1)))
    below = torch.cumsum(density, 0) * (z[1] - z[0])
    at = below.gather(0, torch.searchsorted(z, draws[..., 0]).reshape(10, 3)).reshape(5, 2, 3)
    bins = torch.cat([torch.zeros(3, 1).double(), torch.cumsum(posterior.region_weights, 1)], 1)
    region = torch.searchsorted(bins[:, 1:].contiguous(), noise[..., 0].reshape(10, 3).T.contiguous(), right=True)
    low, high = bins.gather(1, region).T.reshape(5, 2, 3), bins.gather(1, region + 1).T.reshape(5, 2, 3)
    torch.testing.assert_close(at, low + noise[..., 1] * (high - low), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="noise must have shape"):
        posterior.rsample((5,), noise=noise)


@pytest.mark.parametrize("latents", [1, 2])
def test_the_model_contract(latents):
    from dlgm_tutorial.training import fit

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = mlp([latents, 4, 3], lambda: nn.LeakyReLU(0.1), dtype=torch.float64)
    initialise(net, bias=1.0, generator=torch.Generator().manual_seed(2))
    model = PiecewiseAffineGaussian(decoder=net, noise_var=0.3)
    estimate = model.log_likelihood(x, 10, chunk=2)
    torch.testing.assert_close(estimate.value, exact_log_likelihood(net, x, 0.3))
    assert not estimate.standard_error.any() and bool((estimate.ess == 1).all())
    torch.testing.assert_close(model.bound(x), estimate.value)
    posterior = model.posterior(x)
    z = posterior.sample(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.log_joint(x, z) - posterior.log_prob(z), estimate.value.expand(6, -1))
    assert model.noise_spec(7) == {}
    many = posterior.sample(4000, generator=torch.Generator().manual_seed(4))
    check_mc(net(many).detach().reshape(4000, -1), model.reconstruct(x).detach().reshape(-1), what="reconstruction")
    fake = model.sample(4000, generator=torch.Generator().manual_seed(5)).detach()
    check_mc(fake, marginal_moments(net, 0.3)[0].detach(), what="mean of samples")
    assert model.sample_latents(4).shape == (4, latents)
    known = torch.tensor([True, False, True])
    torch.testing.assert_close(model.impute(x, known), impute(net, x, 0.3, known))
    torch.testing.assert_close(model.reconstruct(x, observed=known)[:, 1], model.impute(x, known)[:, 1])
    before = float(model.bound(x).detach().mean())
    fit(model, x, num_steps=20, batch_size=7, lr=0.02)
    assert float(model.bound(x).detach().mean()) > before + 0.05  # the shared loop climbs the exact likelihood
    frozen = PiecewiseAffineGaussian(decoder=net, noise_var=0.3, freeze_decoder=True)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_model_from_sizes_and_its_refusals():
    model = PiecewiseAffineGaussian(5, 2, [4, 3], slope=0.2, noise_var=torch.full((5,), 0.5))
    assert [m.out_features for m in model.decoder if isinstance(m, nn.Linear)] == [4, 3, 5]
    assert model.bound(torch.zeros(2, 5)).dtype == torch.float32 and model.noise_var.shape == (5,)
    for build, message in (
        (lambda: PiecewiseAffineGaussian(5, 2), "give either decoder"),
        (lambda: PiecewiseAffineGaussian(decoder=nn.Linear(1, 2), noise_var=torch.eye(2)), "noise_var must be a number"),
        (lambda: PiecewiseAffineGaussian(decoder=nn.Sequential(nn.Linear(1, 2), nn.Tanh())), "piecewise-affine"),
        (lambda: model.log_joint(torch.zeros(2, 5), torch.zeros(2, 2)), "z must have shape"),
        (lambda: model.log_joint(torch.zeros(2, 5), torch.zeros(1, 2, 2), coordinates="here"), "coordinates must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError, match="nn.Module"):
        PiecewiseAffineGaussian(decoder=R1)


def test_top_regions_give_a_bound_with_a_known_gap():
    log_px, e0, *_ = e_step(R1, XM, 0.25, slope=0.1)
    gaps = {1: [0.185, 0.076, 0.612], 2: [0.0857, 0.0360, 0.0013], 3: [0.0088, 4e-8, 4.4e-4]}
    for k, gap in gaps.items():
        bound, kept, *_ = e_step(R1, XM, 0.25, slope=0.1, top=k)
        check_below(bound, log_px)
        check_close(log_px - bound, -torch.log(e0.topk(k, 1).values.sum(1)), 1e-14)
        check_close(log_px - bound, gap, 6e-4)
        check_close(kept.sum(1), np.ones(3), 1e-14)
        assert int((kept > 0).sum(1).max()) == k


def test_chunks_and_batches_change_nothing():
    x = T(np.random.default_rng(0).normal(size=(7, 2)))
    for layers in (R1, R3):
        whole = e_step(layers, x, 0.2, slope=0.1)
        for part, want in zip(e_step(layers, x, 0.2, slope=0.1, chunk=2), whole, strict=True):
            check_close(part, want, 1e-14)
        check_close(exact_log_likelihood(layers, x[3:4], 0.2, slope=0.1), whole[0][3:4], 1e-14)


def test_modules_and_lists_and_dtypes():
    net = initialise(mlp([2, 5, 4, 3], "leaky_relu"), bias=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    value = exact_log_likelihood(net, x, 0.3)
    assert value.dtype == torch.float32 and value.requires_grad
    layers = [(m.weight.detach().double(), m.bias.detach().double()) for m in net if isinstance(m, nn.Linear)]
    want = exact_log_likelihood(layers, x.double(), 0.3, slope=0.01)
    check_close(value, want, 1e-5)
    numpy_layers = [(W.numpy(), b.numpy()) for W, b in layers]
    check_close(exact_log_likelihood(numpy_layers, x.double(), 0.3, slope=0.01), want, 1e-15)
    assert partition(net).A.dtype == torch.float32
    nested = nn.Sequential(nn.Sequential(net[0], net[1]), nn.Identity(), net[2:])
    check_close(exact_log_likelihood(nested, x, 0.3), value, 1e-6)
    # Units on the output, two layers in a row, a learned slope for each unit.
    odd = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 4), nn.PReLU(4, 0.3), nn.Linear(4, 2), nn.ReLU()).double()
    z = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    regions = partition(odd)
    r = torch.searchsorted(regions.cells[1:, 0].contiguous(), z[:, 0])
    check_close((regions.A[r] @ z[..., None])[..., 0] + regions.b[r], odd(z), 1e-12)


# --- What follows from the posterior

def test_exact_elbo_and_its_gap():
    elbo = exact_elbo(R1, X1, 0.25, T([[0.1]]), T([[0.25]]), slope=0.1)
    check_close(elbo, [-1.502013365697], 1e-11)
    check_close(exact_log_likelihood(R1, X1, 0.25, slope=0.1) - elbo, [0.022844401204], 1e-11)
    rng = np.random.default_rng(0)
    x, loc, root = T(rng.normal(size=(5, 2))), T(rng.normal(size=(5, 2))), T(rng.normal(size=(5, 2, 2)))
    cov = root @ root.transpose(1, 2) + 0.1 * torch.eye(2, dtype=torch.float64)
    elbo = exact_elbo(R3, x, 0.16, loc, cov, slope=0.1)
    check_below(elbo, exact_log_likelihood(R3, x, 0.16, slope=0.1))
    noise = torch.randn(20_000, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.distributions.MultivariateNormal(loc, cov)
    z = loc + (torch.linalg.cholesky(cov) @ noise[..., None])[..., 0]
    log_joint = exact_posterior(R3, x, 0.16, slope=0.1).log_prob(z) + exact_log_likelihood(R3, x, 0.16, slope=0.1)
    check_mc(log_joint - q.log_prob(z), elbo)
    check_close(exact_elbo(R3, x, 0.16, loc, cov.diagonal(dim1=1, dim2=2), slope=0.1),
                exact_elbo(R3, x, 0.16, loc, torch.diag_embed(cov.diagonal(dim1=1, dim2=2)), slope=0.1), 1e-14)


@pytest.mark.parametrize("layers", [R1, R3])
def test_marginal_moments_by_sampling_and_quadrature(layers):
    mean, cov = marginal_moments(layers, 0.25, slope=0.1)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200_000, layers[0][0].shape[1]))
    x = relu_network(plain(layers), z, 0.1)[0] + 0.5 * rng.normal(size=(200_000, 2))
    check_mc(x, mean)
    centred = x - mean.numpy()
    check_mc(centred[:, :, None] * centred[:, None, :], cov)
    if layers is R1:  # the output is piecewise linear in z: quadrature between its kinks
        edges = np.array([-10, -0.5, -0.3, 1.2, 10])
        t, w = np.polynomial.legendre.leggauss(80)
        half = np.diff(edges)[:, None] / 2
        z, w = (edges[:-1, None] + half * (t + 1)).ravel(), (half * w).ravel()
        w = w * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
        g = relu_network(plain(R1), z[:, None], 0.1)[0]
        check_close(mean, w @ g, 1e-12)
        check_close(cov, (w[:, None] * g).T @ g - np.outer(w @ g, w @ g) + 0.25 * np.eye(2), 1e-12)


def test_imputation_reference_and_limits():
    observed = torch.tensor([True, False])
    filled, cov = impute(R1, XM, 0.25, observed, slope=0.1, covariance=True)
    check_close(filled[:, 1], [-0.06382712176787, 0.5206959663929, -0.07846472457032], 1e-12)
    check_close(cov[:, 1, 1], [0.260717507235, 0.461729737819, 0.25413160418], 1e-11)
    check_close(filled[:, 0], XM[:, 0], 1e-15)
    check_close(cov[:, 0], np.zeros((3, 2)), 1e-15)
    # Nothing observed: the prior, and the marginal's moments. Everything: the data. NaN marks what is missing.
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    hidden = torch.full_like(XM, torch.nan)
    mean, marginal = marginal_moments(R1, 0.25, slope=0.1)
    filled, cov = impute(R1, hidden, 0.25, nothing, slope=0.1, covariance=True)
    check_close(filled, mean.expand(3, 2), 1e-12)
    check_close(cov, marginal.expand(3, 2, 2), 1e-12)
    posterior = exact_posterior(R1, hidden, 0.25, observed=nothing, slope=0.1)
    check_close(posterior.log_px, np.zeros(3), 1e-14)
    check_close(posterior.covariance, np.ones((3, 1, 1)), 1e-12)
    check_close(impute(R1, XM, 0.25, ~nothing, slope=0.1), XM, 1e-15)


@pytest.mark.parametrize("noise", ["diagonal", "full"])
def test_missing_values_marginalise(noise):
    layers = random_network(11, [1, 5, 4, 3])
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 3))
    variance = np.array([0.2, 0.4, 0.3]) if noise == "diagonal" else 0.3 * np.cov(rng.normal(size=(3, 9)))
    observed = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
    value = exact_log_likelihood(layers, T(np.where(observed, x, np.nan)), variance, observed=torch.as_tensor(observed), slope=0.1)
    filled, cov = impute(layers, T(np.where(observed, x, np.nan)), variance, torch.as_tensor(observed), slope=0.1, covariance=True)
    for row in range(4):
        o = observed[row]
        part = [*plain(layers)[:-1], (layers[-1][0].numpy()[o], layers[-1][1].numpy()[o])]
        kept = variance[o] if noise == "diagonal" else variance[np.ix_(o, o)]
        check_close(value[row], relu_marginal(part, x[row, o], kept, 0.1)[0], 1e-12)
    # One row's conditional density of the missing value, by the ratio of exact densities on a grid.
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    full = T(x[:1]).repeat(4001, 1)
    full[:, 2] = grid
    weight = torch.exp(exact_log_likelihood(layers, full, variance, slope=0.1) - value[0])
    check_close(torch.trapezoid(weight, grid), 1.0, 1e-10)
    check_close(torch.trapezoid(weight * grid, grid), float(filled[0, 2]), 1e-9)
    check_close(torch.trapezoid(weight * (grid - filled[0, 2]) ** 2, grid), float(cov[0, 2, 2]), 1e-9)


# --- Learning

def test_m_step_reference():
    stats = collect_statistics(R1, XM, 0.25, slope=0.1)
    W, b = m_step_direction(-1, stats, ridge=1e-15)
    check_close(torch.cat([W, b[:, None]], 1), [[1.322781917926, -1.167422701357, -3.174036881254, -0.254141378391],
                                                [-0.855644617525, 0.587268570338, 1.894372768381, 0.140801669362]], 1e-7)
    W, b = m_step_direction(0, stats, ridge=1e-15)
    check_close(torch.cat([W[:, 0], b]), [0.585645467804, -1.009093204323, -0.866077035406,
                                          0.33838989522, 0.039403450185, 2.260447206146], 1e-7)


def test_the_undamped_hidden_step_lowers_the_likelihood_and_backtracking_does_not():
    nll = lambda layers, noise=0.25: -float(exact_log_likelihood(layers, XM, noise, slope=0.1).mean())
    stats = collect_statistics(R1, XM, 0.25, slope=0.1)
    check_close(nll(R1), 2.91999986077, 1e-10)
    check_close(nll([R1[0], m_step_direction(-1, stats, ridge=1e-15)]), 1.89945758365, 1e-9)
    check_close(nll([m_step_direction(0, stats, ridge=1e-15), R1[1]]), 11.3047514155, 1e-6)
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 60)
    x = T(np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * np.random.default_rng(1).normal(size=(60, 2)))
    fell = 0
    for seed in (0, 5, 9):
        rng = np.random.default_rng(seed)
        net = [(T(rng.normal(size=(n, m)) * np.sqrt(2 / (m + n))), T(rng.normal(size=n))) for m, n in ((1, 8), (8, 2))]
        settings = {"noise_var": 0.09, "num_iterations": 6, "slope": 0.1}
        fell += bool((fit_em(net, x, method="em", **settings).log_likelihoods.diff() < -0.05).any())
        gains = fit_em(net, x, method="gem", **settings).log_likelihoods.diff()
        check_below(-gains, np.zeros(6), slack=1e-10)
    assert fell >= 2


def test_noise_update_reference():
    result = fit_em([R1[0], R1[1]], XM, noise_var=0.25, method="gem", num_iterations=1, slope=0.1)
    assert result.log_likelihoods[1] > result.log_likelihoods[0]
    from dlgm_tutorial._region_em import _noise_update
    new = _noise_update(collect_statistics(R1, XM, 0.25, slope=0.1), "isotropic")
    check_close(new, 0.403942960675164, 1e-12)
    check_close(exact_log_likelihood(R1, XM, new, slope=0.1).mean(), -2.73130782374, 1e-10)
    data = T([[0.8, 0.1], [-1.2, 0.7], [0.3, 1.9], [2.0, -1.0]])
    check_close(exact_log_likelihood(R3, data, 0.16, slope=0.1),
                [-1.60339416537, -4.273310475312, -3.64596561907, -3.140411435607], 1e-11)
    new = _noise_update(collect_statistics(R3, data, 0.16, slope=0.1), "isotropic")
    check_close(new, 0.2282006519924, 1e-12)
    check_close(exact_log_likelihood(R3, data, new, slope=0.1).mean(), -3.043075595, 1e-9)


@pytest.mark.parametrize("layers", [R2, R3B])
@pytest.mark.parametrize("noise", ["isotropic", "diagonal", "full"])
def test_direction_is_a_newton_step_of_the_surrogate_and_an_ascent_direction(layers, noise):
    """Fisher's identity: at the old weights the surrogate's gradient, gram times step, is the likelihood's; so their product is positive."""
    D = len(layers[-1][1])
    x = T(np.random.default_rng(3).normal(size=(6, D)))
    variance = {"isotropic": T(0.3), "diagonal": torch.linspace(0.2, 0.5, D, dtype=torch.float64),
                "full": 0.3 * torch.eye(D, dtype=torch.float64) + 0.1}[noise]
    stats = collect_statistics(layers, x, variance, slope=0.1)
    for layer in range(len(layers)):
        leaves = [(W.clone().requires_grad_(), b.clone().requires_grad_()) for W, b in layers]
        value = exact_log_likelihood(leaves, x, variance, slope=0.1).sum()
        gradient = torch.autograd.grad(value, leaves[layer])
        step = [n - o for n, o in zip(m_step_direction(layer, stats), layers[layer], strict=True)]
        slope = sum((g * s).sum() for g, s in zip(gradient, step, strict=True))
        assert float(slope) > 0
        # For the exact M-step of the last layer the gain is at least half the slope, for a quadratic it is just that.
        if layer == len(layers) - 1:
            moved = [*layers[:-1], tuple(o + s for o, s in zip(layers[-1], step, strict=True))]
            gain = exact_log_likelihood(moved, x, variance, slope=0.1).sum() - value
            check_below(slope.detach() / 2, gain.detach(), slack=1e-9)


def test_statistics_with_everything_observed_are_the_complete_ones():
    x = T(np.random.default_rng(5).normal(size=(6, 3)))
    noise = T([0.2, 0.3, 0.4])
    everything = torch.ones(6, 3, dtype=torch.bool)
    complete = collect_statistics(R3B, x, noise, slope=0.1)
    masked = collect_statistics(R3B, x, noise, slope=0.1, observed=everything)
    for layer in range(3):
        for a, b in zip(m_step_direction(layer, masked), m_step_direction(layer, complete), strict=True):
            check_close(a, b, 1e-7)


@pytest.mark.parametrize("layers", [R1, R3])
def test_statistics_are_the_moments_summed_whatever_the_chunk(layers):
    x = torch.cat([XM, torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    mask = torch.rand(9, 2, generator=torch.Generator().manual_seed(1)) > 0.3
    log_px, e0, e1, e2 = e_step(layers, x, 0.2, slope=0.1)
    for chunk in (None, 1, 4):
        stats = collect_statistics(layers, x, 0.2, slope=0.1, chunk=chunk)
        check_close(stats.e2[:, 0], e2.sum(0), 1e-12)
        check_close(stats.xe1, torch.einsum("nd,nrk->rdk", x, e1), 1e-12)
        check_close(stats.xe0, torch.einsum("nd,nr->rd", x, e0), 1e-12)
        check_close(stats.log_px, log_px, 1e-12)
        part = collect_statistics(layers, x, 0.2, observed=mask, slope=0.1, chunk=chunk)
        moments = e_step(layers, x, 0.2, observed=mask, slope=0.1)
        seen, kept = mask.double(), torch.where(mask, x, 0.0)
        check_close(part.e1, torch.einsum("nd,nrk->rdk", seen, moments[2]), 1e-12)
        check_close(part.xe1, torch.einsum("nd,nrk->rdk", kept, moments[2]), 1e-12)
        check_close(part.count, seen.sum(0), 1e-12)


@pytest.mark.parametrize("method", ["gem", "gradient"])
def test_learning_with_missing_values_climbs(method):
    rng = np.random.default_rng(6)
    x = T(relu_network(plain(R3B), rng.normal(size=(40, 2)), 0.1)[0] + 0.3 * rng.normal(size=(40, 3)))
    observed = torch.as_tensor(rng.random((40, 3)) < 0.7)
    x[~observed] = torch.nan
    result = fit_em(random_network(1, [2, 3, 3]), x, method=method, noise="diagonal", observed=observed, num_iterations=5, slope=0.1)
    check_below(result.log_likelihoods[:-1], result.log_likelihoods[1:], slack=1e-9)
    assert result.log_likelihoods[-1] > result.log_likelihoods[0] + 0.1


@pytest.mark.parametrize("noise", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("method", ["gem", "gradient"])
def test_likelihood_never_falls(method, noise):
    x = T(relu_network(plain(R2), np.random.default_rng(2).normal(size=(60, 1)), 0.1)[0]
          + 0.2 * np.random.default_rng(3).normal(size=(60, 2)))
    net = initialise(mlp([1, 4, 2], lambda: nn.LeakyReLU(0.1), dtype=torch.float64), bias=1.0, generator=torch.Generator().manual_seed(1))
    before = [p.clone() for p in net.parameters()]
    result = fit_em(net, x, method=method, noise=noise, num_iterations=12)
    check_below(result.log_likelihoods[:-1], result.log_likelihoods[1:], slack=1e-9)
    assert result.noise_var.shape == {"isotropic": (), "diagonal": (2,), "full": (2, 2)}[noise]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    check_close(exact_log_likelihood(result.decoder, x, result.noise_var).mean(), float(result.log_likelihoods[-1]), 1e-9)


def test_the_settings_of_fit_em_do_what_they_say():
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = lambda start=R1, **settings: fit_em(start, x, noise_var=0.25, slope=0.1, **settings)
    # damping: hidden layers move that share of the way, the last layer all of it.
    stats = collect_statistics(R1, x, 0.25, slope=0.1)
    W2, b2 = m_step_direction(1, stats)
    after = collect_statistics([R1[0], (W2, b2)], x, 0.25, slope=0.1)
    W1, b1 = m_step_direction(0, after)
    moved = fit(method="em", damping=0.3, num_iterations=1).decoder
    check_close(moved[1][0], W2, 1e-10)
    check_close(moved[0][0], 0.7 * R1[0][0] + 0.3 * W1, 1e-10)
    check_close(moved[0][1], 0.7 * R1[0][1] + 0.3 * b1, 1e-10)
    # noise_from: the noise waits.
    assert float(fit(num_iterations=2, noise_from=2).noise_var) == 0.25
    assert float(fit(num_iterations=3, noise_from=2).noise_var) != 0.25
    # noise_floor, in units of the data's variance, for every kind of noise and every method.
    least = 0.9 * float(x.var(0, correction=0).mean())
    for kind in ("isotropic", "diagonal", "full"):
        for method in ("gem", "gradient"):
            found = fit_em(R1, x, noise=kind, slope=0.1, num_iterations=3, noise_floor=0.9, method=method).noise_var
            values = torch.linalg.eigvalsh(found) if kind == "full" else found
            assert float(values.min()) >= least * (1 - 1e-9), (kind, method)
    # tolerance: it stops early, and not before.
    long = fit(num_iterations=12).log_likelihoods
    short = fit(num_iterations=12, tolerance=float(long.diff()[3]) * 1.0001).log_likelihoods
    assert 2 <= len(short) <= 5 and torch.equal(short, long[: len(short)])
    # callback: once an iteration, with what was reached.
    for method in ("gem", "gradient"):
        calls = []
        found = fit(num_iterations=3, method=method, callback=lambda *a, calls=calls: calls.append(a))
        assert [call[0] for call in calls] == [1, 2, 3]
        check_close([call[3] for call in calls], found.log_likelihoods[1:], 1e-12)
        value = exact_log_likelihood(calls[-1][1], x, calls[-1][2], slope=0.1).mean()
        check_close(value, found.log_likelihoods[-1], 1e-10)
    # What was given stays as it was, and a module comes back as one.
    net = nn.Sequential(nn.Linear(1, 3), nn.LeakyReLU(0.1), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for layer, (W, b) in zip((net[0], net[2]), R1, strict=True):
            layer.weight.copy_(W), layer.bias.copy_(b)
    found = fit(net, num_iterations=1)
    assert torch.equal(net[0].bias.detach(), R1[0][1]) and isinstance(found.decoder, nn.Sequential)
    check_close(exact_log_likelihood(found.decoder, x, found.noise_var).mean().detach(), found.log_likelihoods[-1], 1e-12)
    with pytest.raises(ValueError, match="max_regions is 2"):
        fit(num_iterations=1, max_regions=2)


def test_bounds_of_guesses_far_from_the_origin():
    """A Gaussian beyond the box that stands for the plane: the box grows with it."""
    loc, cov = T([[80.0, -60.0]]), 0.5 * torch.eye(2).double()[None]
    x = T([[10.0, -20.0]])
    elbo = exact_elbo(R3, x, 0.5, loc, cov, slope=0.1)
    z = loc + (0.5**0.5) * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = z @ R3[0][0].T + R3[0][1]
    g = torch.where(u > 0, u, 0.1 * u) @ R3[1][0].T + R3[1][1]
    terms = -0.5 * ((x - g) ** 2).sum(1) / 0.5 - np.log(2 * np.pi * 0.5) - 0.5 * (z**2).sum(1) - np.log(2 * np.pi)
    entropy = 0.5 * float(torch.logdet(2 * np.pi * np.e * cov[0]))
    check_mc(terms, float(elbo) - entropy, what="energy of a guess at (80, -60)")


@pytest.mark.parametrize(("sizes", "noise", "count"), [
    ([1, 8, 2], "isotropic", 8 + 8 + 16 + 2 + 1 - 8), ([2, 3, 5], "diagonal", 6 + 3 + 15 + 5 + 5 - 3 - 1),
    ([3, 4, 2], "full", 12 + 4 + 8 + 2 + 3 - 4 - 3)])
def test_parameters_are_counted_without_their_gauges(sizes, noise, count):
    assert num_parameters(random_network(0, sizes), noise) == count


def test_the_model_passes_its_mask_on():
    net = mlp([1, 4, 3], lambda: nn.LeakyReLU(0.1), dtype=torch.float64)
    model = PiecewiseAffineGaussian(decoder=net, noise_var=T([0.3, 0.2, 0.4]))
    x, known = torch.randn(5, 3).double(), torch.tensor([True, True, False])
    want = exact_log_likelihood(net, x, T([0.3, 0.2, 0.4]), observed=known)
    torch.testing.assert_close(model.log_likelihood(x, observed=known).value, want)
    torch.testing.assert_close(model.bound(x, observed=known), want)
    torch.testing.assert_close(model.posterior(x, observed=known).log_px, want.detach())
    draws = model.sample(4000, generator=torch.Generator().manual_seed(0)).detach()
    mean, cov = (part.detach() for part in marginal_moments(net, T([0.3, 0.2, 0.4])))
    check_mc((draws - mean) ** 2, cov.diagonal(), what="variance of samples")


@pytest.mark.slow
def test_likelihood_never_falls_from_a_hundred_starts():
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 100)
    x = T(np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * np.random.default_rng(1).normal(size=(100, 2)))
    for seed in range(100):
        result = fit_em(random_network(seed, [1, 8, 2]), x, num_iterations=10, slope=0.1)
        check_below(result.log_likelihoods[:-1], result.log_likelihoods[1:], slack=1e-9)


def test_affine_em_reaches_probabilistic_pca():
    rng = np.random.default_rng(0)
    x = T(rng.normal(size=(80, 1)) @ rng.normal(size=(1, 5)) + 0.5 * rng.normal(size=(80, 5)))
    result = fit_em([(T(rng.normal(size=(5, 1))), T(np.zeros(5)))], x, num_iterations=400)
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    check_close(result.noise_var, values[:-1].mean(), 1e-6)
    best = -0.5 * (5 * np.log(2 * np.pi) + torch.log(values[-1]) + 4 * torch.log(values[:-1].mean()) + 5)
    check_close(result.log_likelihoods[-1], float(best), 1e-6)


# --- Identities and the brief's other oracles

def test_reference_networks_have_the_other_stored_values():
    """R1 under little noise, R2's weights of the regions, R3b's second moments: by quadrature with many digits."""
    _, _, e1, e2 = e_step(R1, X1, 0.01, slope=0.1)
    check_close([e1.sum(), e2.sum()], [0.277534386021453121, 0.0855653808505501439], 1e-13)
    e0 = e_step(R2, T([[0.5, 0.25]]), 0.09, slope=0.1)[1]
    check_close(e0[0], [0.0431630298315331, 0.0768699600168447, 0.167253754542029, 0.538885660968892, 0.173827593220915,
                        1.41978597152586e-9], 1e-13)
    for slope, (s11, s12, s22) in ((0.1, (1.131688226921, -0.04828624693022, 0.8058625153341)),
                                   (0.0, (1.056019354121, -0.147653844101, 0.8714694467174))):
        square = e_step(R3B, T([[0.9, 0.3, 0.2]]), 0.09, slope=slope)[3].sum(1)[0]
        check_close(square, [[s11, s12], [s12, s22]], 1e-11)
    weights, limit = exact_posterior(ZIGZAG, T([[0.6]]), 1e-6).region_weights[0], T([0.434556976905] * 2 + [0.130886046190])
    check_close(weights.sort().values[1:], limit.sort().values, 2e-7)  # as the noise goes to zero: change of variables


def test_neighbouring_polygons_agree_at_every_vertex_they_share():
    layers = random_network(5, [2, 5, 4, 3])
    regions = partition(layers, slope=0.1)
    corners = torch.cat([cell.unique(dim=0) for cell in regions.cells])
    owner = torch.cat([torch.full((len(cell.unique(dim=0)),), r) for r, cell in enumerate(regions.cells)])
    near = torch.cdist(corners, corners) < 1e-9
    first, second = near.nonzero().unbind(1)
    assert int((owner[first] != owner[second]).sum()) > 3 * regions.num_regions  # there are such vertices
    value = lambda r: (regions.A[r] @ corners[first][..., None])[..., 0] + regions.b[r]
    check_close(value(owner[first]), value(owner[second]), 1e-10)
    check_close(value(owner[first]), relu_network(plain(layers), corners[first].numpy(), 0.1)[0], 1e-10)


def test_polygons_and_linear_programmes_find_the_same_regions():
    """Two latents, cut by clipping; the same decoder with a third latent that it ignores, by linear programmes."""
    layers = random_network(4, [2, 4, 3, 2])
    blind = [(torch.cat([layers[0][0], torch.zeros(4, 1).double()], 1), layers[0][1]), *layers[1:]]
    plane, space = partition(layers, slope=0.1), partition(blind, slope=0.1, box=50.0)
    code = lambda regions: {"".join(str(int(on)) for on in row) for row in regions.codes}
    assert code(plane) == code(space) and plane.num_regions == space.num_regions


def test_a_unit_without_outgoing_weights_leaves_the_moments():
    wide = [(torch.cat([R3[0][0], T([[0.7, -0.3]])]), torch.cat([R3[0][1], T([0.1])])),
            (torch.cat([R3[1][0], torch.zeros(2, 1).double()], 1), R3[1][1])]
    x = T([[0.8, 0.1], [-1.2, 0.7]])
    for got, want in zip(e_step(wide, x, 0.16, slope=0.1)[1:], e_step(R3, x, 0.16, slope=0.1)[1:], strict=True):
        check_close(got.sum(1), want.sum(1), 1e-13)


def test_posterior_moments_average_to_the_priors():
    """Total expectation over x: the weight of a region averages to its prior mass, E[z | x] to 0, E[z^2 | x] to 1."""
    grid = torch.linspace(-12, 12, 401, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    log_px, e0, e1, e2 = e_step(R1, x, 0.25, slope=0.1)
    weight = torch.exp(log_px) * (grid[1] - grid[0]) ** 2
    check_close(weight @ e0, np.diff(special.ndtr([-np.inf, -0.5, -0.3, 1.2, np.inf])), 1e-12)
    check_close([weight @ e1[..., 0].sum(1), weight @ e2[..., 0, 0].sum(1)], [0.0, 1.0], 1e-12)


def test_evidence_by_draws_of_the_prior():
    z = np.random.default_rng(0).normal(size=(1_000_000, 1))
    residual = X1.numpy() - relu_network(plain(R1), z, 0.1)[0]
    check_mc(np.exp(-(residual**2).sum(1) / 0.5) / (0.5 * np.pi), float(torch.exp(exact_log_likelihood(R1, X1, 0.25, slope=0.1))))


def test_reconstruction_is_where_the_score_points():
    model = PiecewiseAffineGaussian(decoder=_module(R1), noise_var=0.25)
    reconstruction = model.reconstruct(X1).detach()
    check_close(reconstruction, [[0.595119634993, -0.077776125039]], 1e-11)
    x = X1.clone().requires_grad_()
    (score,) = torch.autograd.grad(exact_log_likelihood(R1, x, 0.25, slope=0.1).sum(), x)
    check_close(score, (reconstruction - X1) / 0.25, 1e-12)


def _module(layers, slope=0.1):
    """The decoder as an nn.Sequential of Linear and LeakyReLU."""
    parts = []
    for W, b in layers:
        linear = nn.Linear(W.shape[1], W.shape[0]).double()
        with torch.no_grad():
            linear.weight.copy_(W), linear.bias.copy_(b)
        parts += [linear, nn.LeakyReLU(slope)]
    return nn.Sequential(*parts[:-1])


def _surrogate(leaves, layers, x, noise_var, moments):
    """EM's objective with every region's code frozen, differentiable in leaves: from the moments alone, no M-step code."""
    regions = partition(layers, slope=0.1)
    widths = [len(b) for _, b in layers[:-1]]
    slopes = torch.where(regions.codes, T(1.0), T(0.1)).split(widths, 1)
    A, b = leaves[0][0].expand(len(regions.codes), -1, -1), leaves[0][1].expand(len(regions.codes), -1)
    for (W, v), q in zip(leaves[1:], slopes, strict=True):
        A, b = W @ (q[..., None] * A), (q * b) @ W.T + v
    e0, e1, e2 = moments
    r = x[:, None] - b
    square = ((r**2).sum(-1) * e0).sum() - 2 * torch.einsum("nrd,rdk,nrk->", r, A, e1) + torch.einsum("rdk,nrkl,rdl->", A, e2, A)
    return -0.5 * square / noise_var


@pytest.mark.parametrize("layers", [R2, R3B])
def test_closed_form_is_the_stationary_point_of_the_surrogate(layers):
    """In every layer: at the old weights the surrogate has the likelihood's gradient, at the closed form none at all."""
    x = T(np.random.default_rng(3).normal(size=(6, len(layers[-1][1]))))
    moments = e_step(layers, x, 0.3, slope=0.1)[1:]
    stats = collect_statistics(layers, x, 0.3, slope=0.1)
    for layer in range(len(layers)):
        def gradient(value, new, layer=layer):
            leaf = [t.clone().requires_grad_() for t in new]
            leaves = [tuple(leaf) if i == layer else pair for i, pair in enumerate(layers)]
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value(leaves), leaf)])

        frozen = lambda leaves: _surrogate(leaves, layers, x, 0.3, moments)
        exact = lambda leaves: exact_log_likelihood(leaves, x, 0.3, slope=0.1).sum()
        check_close(gradient(frozen, layers[layer]), gradient(exact, layers[layer]), 1e-11)
        best = m_step_direction(layer, stats, ridge=1e-14)
        check_close(gradient(frozen, best), np.zeros(sum(t.numel() for t in best)), 1e-7)


def test_biases_alone_reference():
    """M1, only the biases of a layer free: the maximum of the same quadratic, by its gradient and curvature."""
    moments = e_step(R1, XM, 0.25, slope=0.1)[1:]
    for layer, want in ((0, [0.091986022418, -0.234970043346, 0.120750482707]), (1, [-0.013930746847, -0.667104774129])):
        def value(bias, layer=layer):
            leaves = [(W, bias if i == layer else b) for i, (W, b) in enumerate(R1)]
            return _surrogate(leaves, R1, XM, 0.25, moments)

        old = R1[layer][1]
        gradient = torch.autograd.functional.jacobian(value, old)
        curvature = torch.autograd.functional.hessian(value, old)
        check_close(old - torch.linalg.solve(curvature, gradient), want, 1e-11)


def test_last_layer_and_noise_never_lower_the_likelihood():
    from dlgm_tutorial._region_em import _noise_update

    rng = np.random.default_rng(1)
    x = T(rng.normal(size=(40, 2)) * [1.0, 0.5])
    for seed in range(20):
        layers, noise = random_network(seed, [1, 6, 4, 2]), T(0.3)
        for _ in range(3):
            before = exact_log_likelihood(layers, x, noise, slope=0.1).mean()
            stats = collect_statistics(layers, x, noise, slope=0.1)
            layers = [*layers[:-1], m_step_direction(-1, stats)]
            between = exact_log_likelihood(layers, x, noise, slope=0.1).mean()
            noise = _noise_update(collect_statistics(layers, x, noise, slope=0.1), "isotropic")
            after = exact_log_likelihood(layers, x, noise, slope=0.1).mean()
            check_below(torch.stack([before, between]), torch.stack([between, after]), slack=1e-10)


@pytest.mark.parametrize("sizes", [[1, 6, 4], [1, 5, 4, 3]])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_numpy_and_torch_agree_in_value_and_gradient(sizes, slope):
    """The pages' NumPy from scratch against the module: partition, E-step, gradient, M-step, to 1e-10."""
    from autograd import grad

    from dlgm_tutorial.scratch import analytic_em as scratch

    layers, noise_var = random_network(18, sizes), 1.0
    layers[-1] = (0.3 * layers[-1][0], layers[-1][1])  # wide pieces: the page's gradient subtracts distribution functions
    ours = plain(layers)
    rng = np.random.default_rng(13)
    x = scratch.decode(ours, rng.normal(size=(5, 1)), slope) + 0.4 * rng.normal(size=(5, sizes[-1]))
    knots, codes = scratch.partition_1d(ours, slope)
    A, b = scratch.affine_maps(ours, codes, slope)
    regions = partition(layers, slope=slope)
    for got, want in ((regions.cells[1:, 0], knots[1:-1]), (regions.A, A), (regions.b, b),
                      (regions.codes.double(), np.concatenate(codes, 1))):
        check_close(got, want, 1e-12)
    for got, want in zip(e_step(layers, T(x), noise_var, slope=slope), scratch.e_step(ours, x, noise_var, slope), strict=True):
        check_close(got.reshape(want.shape), want, 1e-10, rtol=1e-12)
    leaves = [(W.clone().requires_grad_(), v.clone().requires_grad_()) for W, v in layers]
    exact_log_likelihood(leaves, T(x), noise_var, slope=slope).mean().backward()
    ends = np.concatenate([[-40.0], knots[1:-1], [40.0]])
    for number, (W, v) in enumerate(ours):
        def value(W, v, number=number):
            net = [(W, v) if i == number else pair for i, pair in enumerate(ours)]
            return scratch.log_likelihood(net, x, noise_var, slope, ends, codes)

        for leaf, argument in zip(leaves[number], (0, 1), strict=True):
            check_close(leaf.grad, grad(value, argument)(W, v), 1e-10)
    stats = collect_statistics(layers, T(x), noise_var, slope=slope)
    for layer in range(len(layers)):
        W, v = m_step_direction(layer, stats, ridge=1e-10)
        check_close(torch.cat([W, v[:, None]], 1), scratch.direction(ours, x, noise_var, slope, layer), 1e-5, rtol=1e-5)  # the ridge is 1e-10


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_numpy_and_torch_agree_with_two_latents(slope):
    from dlgm_tutorial.scratch import analytic_em as scratch

    layers = random_network(14, [2, 4, 3, 5])
    rng = np.random.default_rng(15)
    x = scratch.decode(plain(layers), rng.normal(size=(3, 2)), slope) + 0.4 * rng.normal(size=(3, 5))
    posterior = exact_posterior(layers, T(x), 0.3, slope=slope)
    for row, datum in enumerate(x):
        log_px, mean, square = scratch.e_step_2d(plain(layers), datum, 0.3, slope)
        check_close(posterior.log_px[row], log_px, 1e-10)
        check_close(posterior.mean[row], mean, 1e-10)
        check_close(posterior.covariance[row], square - np.outer(mean, mean), 1e-10)


@pytest.mark.parametrize("layers", [R2, R3B])
def test_noise_of_every_kind_is_the_mean_of_the_residuals(layers):
    """eq-ae-noise on draws of the exact posterior: the residuals' mean square, whole, on the diagonal, or averaged."""
    from dlgm_tutorial._region_em import _noise_update

    D = len(layers[-1][1])
    x = T(np.random.default_rng(3).normal(size=(4, D)))
    noise = 0.3 * torch.eye(D, dtype=torch.float64) + 0.1
    posterior = exact_posterior(layers, x, noise, slope=0.1)
    z = posterior.sample(50_000, generator=torch.Generator().manual_seed(0))
    residual = x.numpy() - relu_network(plain(layers), z.reshape(-1, z.shape[-1]).numpy(), 0.1)[0].reshape(50_000, 4, D)
    square = (residual[..., :, None] * residual[..., None, :]).mean(1)
    full = _noise_update(collect_statistics(layers, x, noise, slope=0.1), "full")
    check_mc(square, full, what="full")
    stats = collect_statistics(layers, x, noise.diagonal().clone(), slope=0.1)
    want = _noise_update(collect_statistics(layers, x, torch.diag(noise.diagonal()), slope=0.1), "full").diagonal()
    check_close(_noise_update(stats, "diagonal"), want, 1e-12)
    check_close(_noise_update(stats, "isotropic"), want.mean(), 1e-12)


def test_the_box_grows_with_the_posterior():
    """Two latents whose posterior lies a hundred deviations out, beyond the square that stands for the plane."""
    W, b, x = np.array([[0.01, 0.0], [0.004, 0.007]]), np.array([0.1, -0.2]), np.array([[1.1, 0.3], [0.1, -0.9]])
    posterior = exact_posterior([(T(W), T(b))], T(x), 1e-8)
    mean, cov = linear_gaussian_posterior(x, W, b, 1e-8)
    assert np.abs(mean).max() > 95
    check_close(posterior.log_px, linear_gaussian_evidence(x, W, b, 1e-8), 1e-7)
    check_close(posterior.mean, mean, 1e-7)
    check_close(posterior.covariance, np.broadcast_to(cov, (2, 2, 2)), 1e-7)


def test_a_flat_strip_that_holds_its_own_centre():
    """A decoder flat for |z| < 0.01 and steep beyond: nearly all of the posterior is in a strip of little mass."""
    strip = [(T([[-1.0, 0.0], [1.0, 0.0]]), T([-0.01, -0.01])), (T([[-100.0, 100.0]]), T([0.0]))]
    line = [(strip[0][0][:, :1], strip[0][1]), strip[1]]
    x = T([[0.0], [0.02], [0.3]])
    flat, thin = exact_posterior(line, x, 0.01), exact_posterior(strip, x, 0.01)
    check_close(thin.log_px, flat.log_px, 1e-12)
    check_close(thin.mean[:, 0], flat.mean[:, 0], 1e-13)
    check_close(thin.covariance[:, 0, 0], flat.covariance[:, 0, 0], 1e-13)


def test_decoders_of_every_other_chapter_are_read():
    """The decoder of each chapter's model, as it is: log p(x) by the regions and by a grid over the model's own log_joint."""
    from dlgm_tutorial.exact_inference import LinearGaussian as Linear
    from dlgm_tutorial.gp_random_inference import RandomInferenceVAE
    from dlgm_tutorial.mixture_latents import MixtureDLGM
    from dlgm_tutorial.short_run_mcmc import MultiLayerGenerator
    from dlgm_tutorial.stochastic_backprop import DLGM

    torch.manual_seed(0)
    noise_var, options = 0.4, {"likelihood": "gaussian", "noise_var": 0.4}
    models = [DLGM(3, 2, 5, **options), MixtureDLGM(3, 2, 1, hidden_dims=(5, 4), **options),
              RandomInferenceVAE(3, 2, (5,), num_data=10, **options),
              MultiLayerGenerator(3, 2, (5,), noise_var=noise_var, activation="relu"),
              Linear(torch.randn(3, 2), torch.randn(3), torch.tensor(noise_var))]
    axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[:, None]
    x = torch.randn(1, 3, dtype=torch.float64)
    for model in models:
        model = model.double()
        decoder = next(getattr(model, name) for name in ("decoder", "networks", "readout", "weight") if hasattr(model, name))
        decoder = decoder[0] if isinstance(decoder, nn.ModuleList) else decoder
        decoder = [(decoder, model.bias)] if isinstance(decoder, torch.Tensor) else decoder
        with torch.no_grad():
            log_joint = torch.cat([model.log_joint(x, part, coordinates="state")[:, 0] for part in z.split(20_000)])
            want = torch.logsumexp(log_joint, 0) + 2 * torch.log(axis[1] - axis[0])
            got = exact_log_likelihood(decoder, x, noise_var)
        check_close(got, [float(want)], 1e-3, what=type(model).__name__)


# --- Refusals

@pytest.mark.parametrize("name", ["Tanh", "GELU", "Sigmoid", "Softplus", "ELU"])
def test_every_entry_refuses_smooth_units_and_says_why(name):
    smooth = nn.Sequential(nn.Linear(1, 3), getattr(nn, name)(), nn.Linear(3, 2)).double()
    loc = torch.zeros(3, 1).double()
    for call in (
        lambda: partition(smooth), lambda: e_step(smooth, XM, 0.25), lambda: exact_log_likelihood(smooth, XM, 0.25),
        lambda: exact_posterior(smooth, XM, 0.25), lambda: exact_elbo(smooth, XM, 0.25, loc, loc + 1),
        lambda: marginal_moments(smooth, 0.25), lambda: impute(smooth, XM, 0.25, torch.tensor([True, False])),
        lambda: fit_em(smooth, XM), lambda: collect_statistics(smooth, XM, 0.25), lambda: num_parameters(smooth),
        lambda: PiecewiseAffineGaussian(decoder=smooth)):
        with pytest.raises(ValueError, match=f"got {name}: a smooth unit has no regions on which it is affine"):
            call()


def test_regions_of_no_width_change_nothing():
    """Knots a rounding error apart: one, none or a few regions of no width between them, and the same answers."""
    W, b = R1[0]
    for gap in (0.0, 1e-16, 1e-13, 1e-9):
        twin = [(torch.cat([W, W]), torch.cat([b, b + gap])), (torch.cat([R1[1][0]] * 2, 1) / 2, R1[1][1])]
        log_px, e0, e1, e2 = e_step(twin, XM, 0.25, slope=0.1)
        want = e_step(R1, XM, 0.25, slope=0.1)
        check_close(log_px, want[0], 1e-13 + 10 * gap)
        check_close(e0.sum(1), np.ones(3), 1e-13)
        check_close(e2.sum(1), want[3].sum(1), 1e-12 + 10 * gap)
    # The same in the plane, where the region between two lines is a sliver.
    W, b = R3[0]
    x = T([[0.8, 0.1], [-1.2, 0.7]])
    want = e_step(R3, x, 0.16, slope=0.1)
    for gap in (0.0, 1e-16, 1e-13, 1e-9):
        twin = [(torch.cat([W, W]), torch.cat([b, b + gap])), (torch.cat([R3[1][0]] * 2, 1) / 2, R3[1][1])]
        log_px, e0, e1, e2 = e_step(twin, x, 0.16, slope=0.1)
        check_close(log_px, want[0], 1e-12 + 10 * gap)
        check_close(e2.sum(1), want[3].sum(1), 1e-11 + 10 * gap)


@pytest.mark.parametrize("sizes", [[1, 4, 3], [2, 4, 3]])
def test_layers_that_are_dead_everywhere_leave_an_affine_model(sizes):
    layers = random_network(3, sizes)
    dead = [(layers[0][0], layers[0][1] - 1e4), layers[1]]  # no unit is ever on where the prior has mass
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_px, e0, e1, _ = e_step(dead, x, 0.3)  # plain ReLU: the output is constant
    want = linear_gaussian_evidence(x.numpy(), np.zeros((3, 1)), layers[1][1].numpy(), 0.3)
    check_close(log_px, want, 1e-12)
    check_close(e1.sum(1), np.zeros((5, sizes[0])), 1e-12)
    fitted = fit_em(dead, x, noise_var=0.3, num_iterations=3)
    assert torch.isfinite(fitted.log_likelihoods).all()  # singular normal matrices keep the old weights
    check_close(fitted.decoder[0][0], dead[0][0], 1e-9)


def test_a_region_limit_is_kept_before_memory_is_spent():
    import tracemalloc

    for sizes in ([1, 3000, 2], [2, 300, 2]):
        layers = random_network(0, sizes)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"max_regions is 200, but the decoder has at least \d+ regions .*choose fewer"):
            exact_posterior(layers, torch.zeros(10, 2).double(), 0.1, max_regions=200)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6
    with pytest.raises(ValueError, match="max_regions is 20, but the decoder has at least"):
        partition(random_network(0, [3, 6, 2]), max_regions=20)


def test_all_coordinates_missing_with_two_latents_give_the_prior():
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    posterior = exact_posterior(R3, torch.full((2, 2), torch.nan).double(), 0.16, observed=nothing, slope=0.1)
    check_close(posterior.log_px, np.zeros(2), 1e-13)
    check_close(posterior.mean, np.zeros((2, 2)), 1e-12)
    check_close(posterior.covariance, np.broadcast_to(np.eye(2), (2, 2, 2)), 1e-12)
    draws = posterior.sample(2000, generator=torch.Generator().manual_seed(0))
    check_mc(draws[:, 0] ** 2, np.ones(2), what="the prior's variance")


@pytest.mark.parametrize("layers", [R1, R3])
def test_gradient_far_out_and_under_extreme_noise_is_finite_and_right(layers):
    """Forty deviations away: the score points to the reconstruction, and backpropagation gives that score."""
    spread = 0.25
    for far in ([[20.0, -15.0]], [[-30.0, 4.0]]):
        x = T(far).requires_grad_()
        exact_log_likelihood(layers, x, spread, slope=0.1).sum().backward()
        step = 1e-4
        for i in range(2):
            move = torch.zeros(1, 2).double()
            move[0, i] = step
            both = [exact_log_likelihood(layers, T(far) + s * move, spread, slope=0.1) for s in (1, -1)]
            check_close(x.grad[0, i], float(both[0] - both[1]) / (2 * step), 1e-4, rtol=1e-6)
    for noise_var, message in ((1e-250, "at least 1e-200"), (float("inf"), "finite"), (-1.0, "positive, got -1")):
        with pytest.raises(ValueError, match=message):
            exact_log_likelihood(layers, XM, noise_var, slope=0.1)


def test_smooth_units_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="Tanh: a smooth unit has no regions"):
        partition(mlp([1, 3, 2], "tanh"))


def test_too_many_regions_are_refused_with_the_count_before_memory_is_spent():
    with pytest.raises(ValueError, match="max_regions is 100, but the decoder has at least 1"):
        partition(random_network(0, [2, 40, 2]), max_regions=100)
    with pytest.raises(ValueError, match="at least 41 regions"):
        exact_log_likelihood(random_network(0, [1, 40, 2]), XM, 1.0, max_regions=40)


@pytest.mark.parametrize(("change", "message"), [
    ({"noise_var": 0.0}, "noise_var must be positive, got 0"), ({"noise_var": T([0.1, -1.0])}, "noise_var must be positive, got -1"),
    ({"noise_var": T([1.0, 1.0, 1.0])}, r"noise_var must be a number, \[2\] or \[2, 2\], got \[3\]"),
    ({"noise_var": T([[1.0, 2.0], [2.0, 1.0]])}, "symmetric and positive definite"),
    ({"noise_var": float("nan")}, "noise_var must be finite"), ({"x": T([[0.1, float("nan")]])}, "x must be finite"),
    ({"x": T([[0.1]])}, r"x must have shape \[B, 2\]"), ({"observed": T([1.0, 0.0])}, "observed must be bool"),
    ({"decoder": []}, "at least one layer"), ({"decoder": [(T([[1.0]]), T([1.0, 2.0]))]}, "decoder layer 0 must have weight"),
    ({"decoder": [(T([[float("inf")]]), T([1.0]))]}, "decoder layer 0 must be finite"),
    ({"decoder": nn.Sequential(nn.ReLU(), nn.Linear(1, 2))}, "decoder must alternate"), ({"chunk": 0}, "chunk must be a positive integer")])
def test_bad_arguments_are_named(change, message):
    arguments = {"decoder": R1, "x": XM, "noise_var": 0.25, "slope": 0.1} | change
    with pytest.raises(ValueError, match=message):
        exact_log_likelihood(arguments.pop("decoder"), arguments.pop("x"), arguments.pop("noise_var"), **arguments)


def test_wrong_types_and_settings_are_named():
    with pytest.raises(TypeError, match="x must be a tensor of floats, got ndarray"):
        exact_log_likelihood(R1, XM.numpy(), 0.25)
    with pytest.raises(TypeError, match="decoder must be an nn.Sequential or a list"):
        partition(3.0)
    with pytest.raises(ValueError, match="method must be 'em', 'gem' or 'gradient', got 'sgd'"):
        fit_em(R1, XM, method="sgd")
    with pytest.raises(ValueError, match="noise must be 'isotropic', 'diagonal' or 'full'"):
        fit_em(R1, XM, noise="spherical")
    with pytest.raises(ValueError, match="damping must be in"):
        fit_em(R1, XM, damping=0.0)
    with pytest.raises(ValueError, match="x must hold at least one datum"):
        fit_em(R1, XM[:0])
    with pytest.raises(ValueError, match="top must be a positive integer"):
        e_step(R1, XM, 0.25, top=0)
    with pytest.raises(ValueError, match="layer must be a number"):
        m_step_direction(2, collect_statistics(R1, XM, 0.25))
    with pytest.raises(ValueError, match="observed must be given"):
        impute(R1, XM, 0.25, None)
    with pytest.raises(ValueError, match=r"loc and cov must have shapes \[3, 1\]"):
        exact_elbo(R1, XM, 0.25, T([[0.0]]), T([[1.0]]))
    with pytest.raises(ValueError, match="noise must be one of"):
        num_parameters(R1, "none")
    with pytest.raises(ValueError, match="z must have shape"):
        exact_posterior(R1, XM, 0.25).log_prob(T([[0.0]]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU")])])
@pytest.mark.parametrize("layers", [R1, R3])
def test_results_live_where_the_arguments_do(layers, device):
    moved = [(W.to(device), b.to(device)) for W, b in layers]
    posterior = exact_posterior(moved, XM.to(device), 0.25, slope=0.1)
    assert posterior.mean.device.type == device
    check_close(posterior.log_px, exact_log_likelihood(layers, XM, 0.25, slope=0.1), 1e-12)
    result = fit_em(moved, XM.to(device), noise_var=0.25, num_iterations=2, slope=0.1)
    assert result.noise_var.device.type == device
