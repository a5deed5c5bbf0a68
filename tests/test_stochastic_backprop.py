"""Chapter 2: gradient estimators, the deep latent Gaussian model, its families of q, imputation.

The reference numbers are the chapter's cases A to K: closed forms, quadrature and forty-digit arithmetic.
"""

import itertools
import math

import autograd.numpy as anp
import numpy as np
import pytest
import torch
from autograd import value_and_grad
from autograd.misc.flatten import flatten
from scipy import optimize

from dlgm_tutorial import oracles
from dlgm_tutorial import stochastic_backprop as sb
from dlgm_tutorial.checks import check_mc
from dlgm_tutorial.networks import mlp_from_weights
from dlgm_tutorial.scratch import stochastic_backprop as scratch
from dlgm_tutorial.training import fit

FAMILIES = ("diagonal", "rank1", "rank_r", "full")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def t(value):
    return torch.as_tensor(np.asarray(value, dtype=float))


def num(value):
    return torch.as_tensor(value).detach().item()


def close(got, want, atol=1e-12):
    np.testing.assert_allclose(np.asarray(torch.as_tensor(got).detach().cpu()), np.asarray(want), rtol=0, atol=atol)


def nodes(mean, cov, num=60):
    z, w = oracles.gauss_hermite_nodes(mean, cov, num)
    return t(z), t(w)


def device_or_skip(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return device


# ---------------------------------------------------------------- estimators (cases A, G, H)
H_LOC, H_COV = np.array([0.3, -0.7]), np.array([[0.9, 0.35], [0.35, 0.5]])
H_BONNET = [0.62076882, 0.16259980]
H_PRICE = [[0.06750923, -0.49235581], [-0.49235581, 0.18843200]]
H_PATH = [[-0.23520225, -0.59400959], [-0.79514213, 0.22733644]]


def f_case_h(z):
    return torch.sin(z[:, 0]) * z[:, 1] ** 2


def case_h(num=40):
    noise, weight = nodes(np.zeros(2), np.eye(2), num)
    return (f_case_h, t(H_LOC), torch.linalg.cholesky(t(H_COV)), noise), weight


def test_case_h_bonnet_price_and_pathwise_by_quadrature():
    args, weight = case_h()
    assert num(weight @ f_case_h(args[1] + args[3] @ args[2].mT)) == pytest.approx(-0.13501846274735985, abs=1e-10)
    close(weight @ sb.bonnet_gradient(*args), H_BONNET, 1e-8)
    close(torch.einsum("s,sij->ij", weight, sb.price_gradient(*args)), H_PRICE, 1e-8)
    estimate = sb.pathwise_gradient(*args)
    close(weight @ estimate.loc, H_BONNET, 1e-8)
    close(torch.einsum("s,sij->ij", weight, estimate.scale), H_PATH, 1e-8)


def test_pathwise_is_not_its_transpose():
    args, weight = case_h()
    got = torch.einsum("s,sij->ij", weight, sb.pathwise_gradient(*args).scale)
    assert num((got - t(H_PATH).mT).abs().max()) > 0.19


def test_stein_lemma_links_price_and_pathwise():
    args, weight = case_h()
    curvature = 2 * torch.einsum("s,sij->ij", weight, sb.price_gradient(*args))
    close(torch.einsum("s,sij->ij", weight, sb.pathwise_gradient(*args).scale), curvature @ args[2], 1e-9)


def test_price_counts_entries_separately():
    args, weight = case_h()
    price = torch.einsum("s,sij->ij", weight, sb.price_gradient(*args))
    value = lambda cov: oracles.gauss_hermite(lambda z: np.sin(z[:, 0]) * z[:, 1] ** 2, H_LOC, cov)
    step = 1e-4 * np.array([[0, 1], [1, 0]])
    tied = (value(H_COV + step) - value(H_COV - step)) / 2e-4
    assert num(2 * price[0, 1]) == pytest.approx(tied, abs=1e-7)


@pytest.mark.parametrize("baseline", [None, 0.7, "mean", "optimal"])
def test_score_function_is_unbiased_in_mean_and_factor(baseline):
    args, _ = case_h()
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # A factor that is not triangular: R^-T must not be taken for R^-1
    turn = t([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    got = sb.score_function_gradient(f_case_h, args[1], args[2] @ turn, noise, baseline)
    check_mc(got.loc, H_BONNET)
    check_mc(got.scale, t(H_PATH) @ turn)


def test_exponential_closed_form():
    a, cov = np.array([0.7, -0.4, 0.2]), np.diag([0.5, 0.8, 0.3]) + 0.1
    noise, weight = nodes(np.zeros(3), np.eye(3), 20)
    f = lambda z: torch.exp(z @ t(a))
    args = (f, t([0.5, -0.2, 0.1]), torch.linalg.cholesky(t(cov)), noise)
    value = np.exp(a @ [0.5, -0.2, 0.1] + 0.5 * a @ cov @ a)
    close(weight @ sb.bonnet_gradient(*args), a * value, 1e-10)
    close(torch.einsum("s,sij->ij", weight, sb.price_gradient(*args)), 0.5 * np.outer(a, a) * value, 1e-10)


def test_variance_table():
    c, mu, sigma = 1.7, 0.6, 1.3
    noise = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    args = (lambda z: 0.5 * c * z[:, 0] ** 2, t([mu]), t([[sigma]]), noise)
    mean, best = c / 2 * (mu**2 + sigma**2), c / 2 * (mu**2 + 3 * sigma**2)
    score = lambda b: num(sb.score_function_gradient(*args, b).loc.var())
    assert num(sb.bonnet_gradient(*args).var()) == pytest.approx(4.8841, rel=0.05)
    assert num(sb.price_gradient(*args).var()) < 1e-20
    assert num(sb.pathwise_gradient(*args).scale.var()) == pytest.approx(10.8086, rel=0.05)
    assert score(mean) == pytest.approx(14.29105, rel=0.05)
    assert score(best) == pytest.approx(9.40695, rel=0.05) and score("optimal") == pytest.approx(9.40695, rel=0.05)
    assert score(None) == pytest.approx(22.01218, rel=0.05)


def test_variance_at_fifty_dimensions():
    c, mu, sigma, K = 1.7, 0.6, 1.3, 50
    generator = torch.Generator().manual_seed(2)
    f, loc, scale = lambda z: 0.5 * c * (z**2).sum(-1), t(np.full(K, mu)), sigma * t(np.eye(K))
    mean, none, path = [], [], []
    for _ in range(20):  # [S, K, K] is large
        noise = torch.randn(2000, K, generator=generator, dtype=torch.float64)
        mean.append(sb.score_function_gradient(f, loc, scale, noise, "mean").loc[:, 0])
        none.append(sb.score_function_gradient(f, loc, scale, noise).loc[:, 0])
        path.append(sb.bonnet_gradient(f, loc, scale, noise)[:, 0])
    for draws, want in ((path, 4.8841), (mean, 184.931), (none, 4972.73)):
        assert num(torch.cat(draws).var()) == pytest.approx(want, rel=0.05)


def test_pathwise_loses_on_a_rough_cost():
    noise, weight = nodes(np.zeros(1), np.eye(1), 120)
    args = (lambda z: torch.sin(2 * z[:, 0]), t([0.0]), t([[1.0]]), noise)
    variance = lambda e: num(weight @ e[:, 0] ** 2 - (weight @ e[:, 0]) ** 2)
    assert variance(sb.bonnet_gradient(*args)) == pytest.approx(1.92741, abs=1e-5)
    assert variance(sb.score_function_gradient(*args).loc) == pytest.approx(0.42925, abs=1e-5)


def test_price_misses_a_kink_and_pathwise_does_not():
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    args = (lambda z: z[:, 0].abs(), t([0.0]), t([[0.7]]), noise)
    assert not sb.price_gradient(*args).any()
    check_mc(sb.pathwise_gradient(*args).scale[:, 0, 0] / 1.4, 0.5699175434306182)


def test_price_of_a_linear_cost_is_zero():
    noise = torch.randn(5, 2, dtype=torch.float64)
    assert not sb.price_gradient(lambda z: z @ t([1.0, 2.0]), t([0.0, 0.0]), torch.eye(2).double(), noise).any()


def test_case_g_poisson_bound():
    a, v = t([0.7, -0.4]), 3.0
    noise, weight = nodes(np.zeros(2), np.eye(2), 40)
    q = sb.RankOnePrecisionNormal(t([[0.5, -0.2]]), t([[1.5, 0.8]]).log(), t([[0.6, 1.1]]))
    factor = torch.linalg.cholesky(q.covariance_matrix[0])
    f = lambda z: v * (z @ a + 0.3) - torch.exp(z @ a + 0.3) - torch.lgamma(t(v + 1))
    fit = num(weight @ f(q.loc[0] + noise @ factor.mT))
    assert fit == pytest.approx(-2.2664577254396923, abs=1e-11)
    assert num(q.kl_to_standard()) == pytest.approx(0.3282466358746261, abs=1e-12)
    slope = weight @ sb.bonnet_gradient(f, q.loc[0], factor, noise) - q.loc[0]
    close(slope, [-0.265288779348, 0.065879302485], 1e-10)
    price = torch.einsum("s,sij->ij", weight, sb.price_gradient(f, q.loc[0], factor, noise))
    precision = torch.linalg.inv(q.covariance_matrix[0])
    close(price - 0.5 * (torch.eye(2) - precision), [[-0.222851072772, 0.703057755870], [0.703057755870, 0.291824139503]],
          1e-10)


def test_estimators_refuse_wrong_shapes():
    with pytest.raises(ValueError, match=r"noise must have shape \[S, K\] with K = 2"):
        sb.bonnet_gradient(f_case_h, t(H_LOC), torch.eye(2).double(), torch.zeros(5, 3).double())
    with pytest.raises(ValueError, match=r"f must map \[S, K\] to \[S\]"):
        sb.pathwise_gradient(lambda z: z, t(H_LOC), torch.eye(2).double(), torch.zeros(5, 2).double())
    with pytest.raises(ValueError, match="baseline must be"):
        sb.score_function_gradient(f_case_h, t(H_LOC), torch.eye(2).double(), torch.zeros(5, 2).double(), "best")
    with pytest.raises(ValueError, match="S >= 2"):
        sb.score_function_gradient(f_case_h, t(H_LOC), torch.eye(2).double(), torch.zeros(1, 2).double(), "mean")


# ---------------------------------------------------------------- case A: one layer, Bernoulli, K = 2
A_NET = [(np.array([[1.0, -0.5], [0.3, 0.8]]), np.array([0.1, -0.2])),
         (np.array([[1.5, -1.0], [0.5, 2.0], [-1.2, 0.7]]), np.array([0.2, -0.3, 0.4]))]
A_X = t([[1.0, 0.0, 1.0]])
A_LOG_PX = -1.7943329654139


def case_a_model(recognition="rank1"):
    return sb.DLGM(3, 2, 4, recognition=recognition, decoder=mlp_from_weights(A_NET, "tanh")).double()


def case_a_q():
    parameters = [t([[0.4, -0.6]]), t([[1.3, 2.5]]).log(), t([[0.9, -1.4]])]
    return [p.requires_grad_() for p in parameters]


def test_case_a_bound_evidence_and_gradients():
    model, parameters = case_a_model(), case_a_q()
    q = sb.RankOnePrecisionNormal(*parameters)
    noise, weight = nodes(np.zeros(2), np.eye(2), 80)
    fit = weight @ model.observation(q.rsample((len(noise),), noise=noise[:, None])).log_prob(A_X)[:, 0]
    assert num(fit) == pytest.approx(-1.6907509177174616, abs=1e-10)
    assert num(q.kl_to_standard()) == pytest.approx(0.7084496897401973, abs=1e-12)
    grads = torch.autograd.grad(q.kl_to_standard().sum() - fit, parameters)
    close(grads[0][0], [0.76824946971752, -0.46134776562035], 1e-9)
    close(grads[1][0], [0.12263792601363, 0.16108352257020], 1e-9)
    close(grads[2][0], [0.18541833789639, -0.19044981736472], 1e-9)
    prior, prior_weight = nodes(np.zeros(2), np.eye(2), 160)
    evidence = torch.log(prior_weight @ model.observation(prior[:, None]).log_prob(A_X)[:, 0].exp())
    assert num(evidence) == pytest.approx(A_LOG_PX, abs=1e-9)


def test_case_a_monte_carlo_gradient_has_the_known_mean_and_spread():
    model, parameters = case_a_model(), case_a_q()
    S = 100_000
    noise = torch.randn(S, 1, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    each = [p.detach().expand(S, 2).clone().requires_grad_() for p in parameters]  # one q per draw: one gradient each
    q = sb.RankOnePrecisionNormal(*each)
    fit = model.observation(q.rsample(noise=noise[:, 0])).log_prob(A_X)
    slopes = torch.autograd.grad(fit.sum(), each)
    spreads = ([0.1634178824, 0.3242841638], [0.1109459497, 0.0859821423], [0.0693802088, 0.0548695349])
    for slope, spread in zip(slopes, spreads, strict=True):
        np.testing.assert_allclose(slope.std(0), spread, rtol=0.02)
    q = sb.RankOnePrecisionNormal(*parameters)
    kl = torch.autograd.grad(q.kl_to_standard().sum(), parameters)
    wants = ([0.76824946971752, -0.46134776562035], [0.12263792601363, 0.16108352257020],
             [0.18541833789639, -0.19044981736472])
    for slope, own, want in zip(slopes, kl, wants, strict=True):
        check_mc(own - slope, want)


def test_case_a_score_function_spread():
    model = case_a_model()
    q = sb.RankOnePrecisionNormal(*[p.detach() for p in case_a_q()])
    factor = torch.linalg.cholesky(q.covariance_matrix[0])
    noise = torch.randn(300_000, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    f = lambda z: model.observation(z).log_prob(A_X)
    got = sb.score_function_gradient(f, q.loc[0], factor, noise, "mean").loc
    np.testing.assert_allclose(got.std(0), [0.5428387217, 0.8367950013], rtol=0.02)
    check_mc(q.loc[0] - got, [0.76824946971752, -0.46134776562035])


def test_case_a_best_gaussian_is_the_fixed_point_of_bonnet_and_price():
    model = case_a_model()
    noise, weight = nodes(np.zeros(2), np.eye(2), 80)
    f = lambda z: model.observation(z).log_prob(A_X)

    def parts(p):
        q = sb.FullNormal(p[None, :2], torch.stack([torch.stack([p[2].exp(), 0 * p[2]]), torch.stack([p[3], p[4].exp()])])[None])
        return q, weight @ f(q.loc[0] + noise @ q.scale_tril[0].mT) - q.kl_to_standard()[0]

    def loss(p):
        p = t(p).requires_grad_()
        value = -parts(p)[1]
        return num(value), torch.autograd.grad(value, p)[0].numpy()
    found = optimize.minimize(loss, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert -found.fun == pytest.approx(-1.8018158763330, abs=1e-9)
    q = parts(t(found.x))[0]
    close(q.loc[0], [-0.2354206135, -0.3443463237], 1e-6)
    close(q.covariance_matrix[0], [[0.8924065924, 0.0129746208], [0.0129746208, 0.6825628937]], 1e-6)
    args = (f, q.loc[0], q.scale_tril[0], noise)
    close(weight @ sb.bonnet_gradient(*args), q.loc[0], 1e-6)
    curvature = 2 * torch.einsum("s,sij->ij", weight, sb.price_gradient(*args))
    close(q.covariance_matrix[0] @ (torch.eye(2) - curvature), np.eye(2), 1e-6)


@pytest.mark.parametrize("proposal", ["widened", 0.1, 0.2, 0.5])
def test_case_a_importance_sampling_with_a_safe_proposal(proposal):
    model, q = case_a_model(), sb.RankOnePrecisionNormal(*[p.detach() for p in case_a_q()])
    safe = sb.widen(q, 4.0) if proposal == "widened" else sb.DefensiveMixture(q, proposal)
    estimate = model.log_likelihood(A_X, 200_000, proposal=lambda x: safe, generator=torch.Generator().manual_seed(6),
                                    chunk=50_000)
    assert abs(num(estimate.value) - A_LOG_PX) < 5 * num(estimate.standard_error) < 0.05


def test_case_a_defensive_weights_are_bounded():
    q = sb.RankOnePrecisionNormal(*[p.detach() for p in case_a_q()])
    mixture = sb.DefensiveMixture(q, 0.1)
    z = 4 * torch.randn(10_000, 1, 2, dtype=torch.float64)
    assert num((case_a_model().log_joint(A_X, z) - mixture.log_prob(z)).max()) <= np.log(10)


# ---------------------------------------------------------------- case B: two layers
B_X = t([[1.0, 0.0]])


def case_b_model():
    model = sb.DLGM(2, (1, 1), ((), 1), activation="tanh").double()
    with torch.no_grad():
        model.networks[0] = mlp_from_weights([(np.array([[1.6], [-0.8]]), np.array([-0.3, 0.5]))], "tanh")
        model.networks[1] = mlp_from_weights([(np.array([[0.9]]), np.array([-0.2])), (np.array([[1.1]]), np.array([0.1]))],
                                             "tanh")
        model.noise_matrices[0].fill_(0.7)
        model.noise_matrices[1].fill_(1.3)
    return model


def test_case_b_bound_gradients_and_slack():
    model = case_b_model()
    loc, sd = [t([[0.5]]), t([[0.3]])], [t([[0.6]]), t([[0.8]])]
    for p in (*loc, *sd):
        p.requires_grad_()
    q = sb.LayeredPosterior([sb.DiagonalNormal(m, 2 * s.log()) for m, s in zip(loc, sd, strict=True)], flat=True)
    noise, weight = nodes(np.zeros(2), np.eye(2), 150)
    z = q.rsample((len(noise),), noise=noise[:, None])
    bound = weight @ model.observation(z).log_prob(B_X)[:, 0] - q.kl_to_standard()[0]
    assert num(bound) == pytest.approx(-1.7814867787371387, abs=1e-9)
    assert num(q.kl_to_standard()) == pytest.approx(0.40396917508020036, abs=1e-12)
    grads = torch.autograd.grad(bound, [*loc, *sd, *model.noise_matrices, *model.networks[0].parameters()])
    wants = [0.223493295736, 0.549609189485, 0.889335770189, 0.192837340121, 0.364783014259, 0.0378097145712,
             [[0.026837349144], [-0.168833700962]], [0.389755353121, -0.512441607574]]
    for got, want in zip(grads, wants, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=1e-9)
    log_ratio = q.log_prob(z) - model.log_joint(B_X, z)
    assert num(weight @ log_ratio[:, 0]) - 1.5087394715901412 == pytest.approx(0.2727473071469977, abs=1e-9)


@pytest.mark.parametrize("coordinates", ["noise", "state"])
def test_case_b_evidence_and_posterior_in_both_coordinates(coordinates):
    model = case_b_model()
    log_joint = lambda z: model.log_joint(B_X, t(z)[:, None], coordinates=coordinates).detach().numpy()[:, 0]
    evidence, mean, cov = oracles.grid_posterior(log_joint, [-10, -10], [10, 10], 801)
    assert evidence == pytest.approx(-1.5087394715901412, abs=1e-8)
    if coordinates == "noise":  # layer 1 comes first
        np.testing.assert_allclose(mean, [0.586725110147, 0.632892062784], atol=1e-7)
        np.testing.assert_allclose(cov, [[0.831229055802, -0.170874526250], [-0.170874526250, 0.765828979706]], atol=1e-7)


@pytest.mark.parametrize("noise_matrix", ["identity", "dense", "triangular", "diagonal"])
def test_state_coordinates_invert_and_carry_the_jacobian(noise_matrix):
    torch.manual_seed(0)
    model = sb.DLGM(7, (3, 2), (5, 4), noise_matrix=noise_matrix).double()
    with torch.no_grad():
        for g in model.noise_matrices:
            g.add_(0.3 * torch.randn_like(g))
    x, z = (torch.rand(4, 7) < 0.5).double(), torch.randn(6, 4, 5, dtype=torch.float64)
    h = model.states(z)
    close(model.concat(model.noises(h)), z, 1e-12)
    flat_states = lambda v: model.concat(model.states(v))
    jacobian = torch.autograd.functional.jacobian(flat_states, z[0, 0])
    difference = model.log_joint(x, z) - model.log_joint(x, h, coordinates="state")
    close(difference, np.broadcast_to(torch.linalg.slogdet(jacobian).logabsdet.detach(), (6, 4)), 1e-11)


def test_case_b_annealed_importance_sampling():
    from dlgm_tutorial.evaluation import log_likelihood_ais
    estimate = log_likelihood_ais(case_b_model(), B_X, 2000, num_steps=60, step_size=0.4,
                                  generator=torch.Generator().manual_seed(7))
    assert abs(num(estimate.value) + 1.5087394715901412) < 5 * num(estimate.standard_error) < 0.05


# ---------------------------------------------------------------- cases C, D, E: linear layers
def linear_gap(cov, precision):
    ratio = precision @ cov
    return 0.5 * num(torch.trace(ratio) - torch.linalg.slogdet(ratio).logabsdet - len(cov))


def test_case_c_rank_one_precision_is_exact_for_one_number():
    w, psi, x = np.array([1.0, -2.0, 0.5]), 0.4, 1.5
    decoder = mlp_from_weights([(w[None], np.zeros(1))])
    model = sb.DLGM(1, 3, 4, recognition="rank1", likelihood="gaussian", decoder=decoder, noise_var=psi).double()
    mean, cov = oracles.linear_gaussian_posterior(np.array([[x]]), w[None], np.zeros(1), psi)
    q = sb.RankOnePrecisionNormal(t(mean), torch.zeros(1, 3).double(), t(w)[None] / psi**0.5)
    close(q.covariance_matrix[0], cov, 1e-12)
    z = q.rsample((5,))
    close(model.log_joint(t([[x]]), z) - q.log_prob(z), np.full((5, 1), -1.983881350031635), 1e-12)
    precision = torch.linalg.inv(t(cov))
    assert linear_gap(torch.diag(1 / torch.diagonal(precision)), precision) == pytest.approx(0.744109890021468, abs=1e-11)
    assert scratch.independence_gap(precision.numpy(), [[0], [1], [2]]) == pytest.approx(0.744109890021468, abs=1e-11)


def test_case_c_half_in_the_gradient_gives_too_wide_a_posterior():
    w, psi, x = np.array([1.0, -2.0, 0.5]), 0.4, 1.5
    A = np.outer(w, w) / psi
    mean = np.linalg.solve(np.eye(3) + A, w * x / psi)
    bound = lambda C: (-0.5 * ((x - w @ mean) ** 2 + w @ C @ w) / psi - 0.5 * np.log(2 * np.pi * psi)
                       - 0.5 * (mean @ mean + np.trace(C) - np.linalg.slogdet(C)[1] - 3))
    assert bound(np.linalg.inv(np.eye(3) + A)) == pytest.approx(-1.983881350031635, abs=1e-11)
    assert bound(np.linalg.inv(np.eye(3) + A / 2)) == pytest.approx(-2.105393420714524, abs=1e-11)
    # The package's own gradient vanishes at the posterior, not at the wide one
    noise, weight = nodes(np.zeros(3), np.eye(3), 6)
    f = lambda z: -0.5 * (x - z @ t(w)) ** 2 / psi
    for C, zero in ((np.linalg.inv(np.eye(3) + A), True), (np.linalg.inv(np.eye(3) + A / 2), False)):
        R = torch.linalg.cholesky(t(C))
        slope = torch.einsum("s,sij->ij", weight, sb.pathwise_gradient(f, t(mean), R, noise).scale)
        total = slope - R + torch.linalg.inv(R).mT
        assert (num(total.abs().max()) < 1e-10) is zero


def test_case_d_rank_one_is_better_but_not_exact():
    W, Psi = np.array([[1, -2, 0.5], [0.3, 0.8, -1.5]]), np.array([0.4, 0.7])
    precision = t(np.eye(3) + W.T @ (W / Psi[:, None]))
    assert oracles.linear_gaussian_evidence(np.array([[1.5, -0.5]]), W, np.zeros(2), Psi)[0] == pytest.approx(-3.441710495270965)
    assert linear_gap(torch.diag(1 / torch.diagonal(precision)), precision) == pytest.approx(0.6308043372498942, abs=1e-11)

    def loss(p):
        p = t(p).requires_grad_()
        cov = sb.RankOnePrecisionNormal(torch.zeros(3).double(), torch.log(1e-2 + p[:3].exp()), p[3:]).covariance_matrix
        ratio = precision @ cov
        value = 0.5 * (torch.trace(ratio) - torch.linalg.slogdet(ratio).logabsdet - 3)
        return num(value), torch.autograd.grad(value, p)[0].numpy()
    rng = np.random.default_rng(0)
    best = min(optimize.minimize(loss, rng.standard_normal(6), jac=True, method="BFGS").fun for _ in range(10))
    assert best == pytest.approx(0.0986663, abs=2e-6)


def test_case_e_independence_between_layers():
    model = sb.DLGM(3, (2, 2), ((), ()), likelihood="gaussian", noise_var=t([0.3, 0.3, 0.5])).double()
    with torch.no_grad():
        for p, a in zip(model.noise_matrices, ([[0.6, 0.1], [0, 0.9]], [[1.2, 0], [0.3, 0.8]]), strict=True):
            p.copy_(t(a))
        for net, (W, b) in zip(model.networks, [([[1, 0.5], [-0.3, 1.1], [0.2, 0.4]], [0, 0, 0]),
                                                ([[0.5, -1.0], [0.2, 0.7]], [0.1, -0.2])], strict=True):
            net[0].weight.copy_(t(W))
            net[0].bias.copy_(t(b))
    x = t([[0.7, -1.2, 0.4]])
    log_joint = lambda z: model.log_joint(x, z[None, None])[0, 0]
    zero = torch.zeros(4, dtype=torch.float64)
    precision = -torch.autograd.functional.hessian(log_joint, zero)  # the log-joint is quadratic
    mean = torch.linalg.solve(precision, torch.autograd.functional.jacobian(log_joint, zero))
    close(mean, [0.426249760643, -0.126645942534, 0.114281095667, -0.691338612871], 1e-10)
    log_px = log_joint(mean) + 0.5 * (4 * np.log(2 * np.pi) - torch.linalg.slogdet(precision).logabsdet)
    assert num(log_px) == pytest.approx(-3.6800386538757173, abs=1e-10)
    gap = lambda blocks: scratch.independence_gap(precision.detach().numpy(), blocks)
    assert gap([[0, 1], [2, 3]]) == pytest.approx(0.6361394242905971, abs=1e-10)
    assert gap([[0], [1], [2], [3]]) == pytest.approx(0.6548649725344611, abs=1e-10)


# ---------------------------------------------------------------- case F and the rank-one algebra
def test_case_f_by_hand_and_in_torch():
    d, u, eps = np.array([0.5, 1.2, 2.0, 3.5]), np.array([0.7, -1.1, 0.4, 2.0]), np.array([1, -0.5, 0.25, 2])
    loc, g = np.array([0.3, -0.2, 1.0, 0.0]), np.array([0.3, -1.0, 0.7, 0.2])
    tensors = [t(a).requires_grad_() for a in (loc, np.log(d), u)]
    q = sb.RankOnePrecisionNormal(*tensors)
    want = [0.88698936551, -0.114800573785, 1.058601810031, 0.731402438318]
    z = q.rsample(noise=t(eps))
    close(z, want, 1e-11)
    close(scratch.rank1_sample(loc, np.log(d), u, eps), want, 1e-11)
    assert num(q.kl_to_standard()) == pytest.approx(1.4349395758305009, abs=1e-12)
    assert num(torch.trace(q.covariance_matrix)) == pytest.approx(2.8670492452083451, abs=1e-12)
    in_torch = torch.autograd.grad(z @ t(g), tensors, retain_graph=True)
    by_hand = scratch.rank1_backward(np.log(d), u, eps, g)
    for a, b, c in zip(in_torch, by_hand, (g, [-0.021160485553, 0.188970449680, 0.014898587055, 0.018850112900],
                                          [-0.191108340781, 0.266128611950, -0.177046102826, -0.091990356732]), strict=True):
        close(a, c, 1e-11)
        np.testing.assert_allclose(b, c, atol=1e-11)
    kl = torch.autograd.grad(q.kl_to_standard(), tensors)
    close(kl[1], [-0.238430070298, 0.073117361719, 0.242857142149, 0.196947938514], 1e-11)
    close(kl[2], [-0.082447535581, -0.199969492053, 0.059460543564, 0.198964313422], 1e-11)


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_rank_one_scratch_matches_dense_algebra(size):
    rng = np.random.default_rng(size)
    loc, log_d, u, z = rng.standard_normal((4, size))
    precision = np.diag(np.exp(log_d)) + np.outer(u, u)
    factor = scratch.rank1_sample(np.zeros(size), log_d, u, np.eye(size)).T
    np.testing.assert_allclose(factor @ factor.T @ precision, np.eye(size), atol=1e-11)
    assert np.linalg.det(factor) > 0
    dense = torch.distributions.MultivariateNormal(t(loc), precision_matrix=t(precision))
    standard = torch.distributions.MultivariateNormal(torch.zeros(size).double(), torch.eye(size).double())
    assert scratch.rank1_log_prob(loc, log_d, u, z) == pytest.approx(num(dense.log_prob(t(z))), abs=1e-10)
    assert scratch.rank1_kl(loc, log_d, u) == pytest.approx(
        num(torch.distributions.kl_divergence(dense, standard)), abs=1e-10)


def test_rank_one_at_zero_u_in_float32_has_no_nan():
    loc, log_d, u = (torch.zeros(1, 3, requires_grad=True) for _ in range(3))
    q = sb.RankOnePrecisionNormal(loc, log_d, u)
    value = q.rsample(noise=torch.ones(1, 3)).sum() + q.kl_to_standard().sum()
    grads = torch.autograd.grad(value, (loc, log_d, u))
    assert all(bool(torch.isfinite(g).all()) for g in grads) and not grads[2].any()  # the saddle: no slope in u


def test_tiny_divergence_keeps_its_digits_in_float32():
    q = sb.RankOnePrecisionNormal(torch.zeros(1, 1), torch.full((1, 1), 1e-4), torch.zeros(1, 1))
    assert num(q.kl_to_standard()) == pytest.approx(2.49991652e-09, rel=1e-3)
    assert scratch.kl_diagonal(np.zeros(1), np.array([-1e-4])) == pytest.approx(2.49991652e-09, rel=1e-6)


def test_recognition_head_starts_away_from_the_saddle():
    torch.manual_seed(0)
    model = sb.DLGM(7, 3, 5, recognition="rank1")
    u = model.posterior((torch.rand(4, 7) < 0.5).float()).u
    assert num(u.abs().min()) > 0


# ---------------------------------------------------------------- case I: importance sampling
def case_i(proposal_loc, proposal_var):
    decoder = mlp_from_weights([(np.array([[1.2]]), np.zeros(1))])
    model = sb.DLGM(1, 1, 3, likelihood="gaussian", decoder=decoder, noise_var=0.5).double()
    return model, lambda x: sb.DiagonalNormal(t([[proposal_loc]]), t([[np.log(proposal_var)]]))


@pytest.mark.parametrize("loc, var, rho, first, second", [
    (0.6948453608, 0.4, 0.15187210123703987, -1.5490587624700247, -1.4642382561733576),
    (0.0, 1.0, 0.717503019855146, -2.652364942924699, -1.795021939165459)])
def test_case_i_bounds_rise_and_bias_and_variance_are_as_predicted(loc, var, rho, first, second):
    model, proposal = case_i(loc, var)
    x, truth = t([[0.8]]), -1.4152309733505386
    q = proposal(x)
    with torch.no_grad():
        z = q.rsample((400_000,), noise=torch.randn(400_000, 1, 1, generator=torch.Generator().manual_seed(8),
                                                   dtype=torch.float64))
        log_w = (model.log_joint(x, z) - q.log_prob(z))[:, 0]
    check_mc(log_w, first)
    check_mc(torch.logsumexp(log_w.reshape(-1, 2), 1) - np.log(2), second)
    check_mc(log_w.exp(), np.exp(truth))  # unbiased
    hundred = torch.logsumexp(log_w.reshape(-1, 100), 1) - np.log(100)
    assert num(hundred.var()) == pytest.approx(rho / 100, rel=0.15)
    assert num(hundred.mean()) - truth == pytest.approx(-rho / 200, abs=5 * num(hundred.std()) / 4000**0.5 + 2e-5)


def test_log_likelihood_is_exact_when_q_is_the_posterior():
    model, _ = case_i(0.0, 1.0)
    exact = case_i(0.4948453608247423, 0.2577319587628866)[1]
    estimate = model.log_likelihood(t([[0.8]]), 7, proposal=exact)
    close(estimate.value, [-1.4152309733505386], 1e-12)
    close(estimate.standard_error, [0.0], 1e-7)


# ---------------------------------------------------------------- case J and imputation
def linear_model(q_scale=1.0, q_shrink=1.0):
    """Case J: x = W z + noise with three pixels; its recognition network is set to the exact posterior, or spoilt."""
    W, psi = np.array([1.0, 0.8, -1.5]), np.array([0.3, 0.4, 0.5])
    model = sb.DLGM(3, 1, ((),), recognition_dims=(), likelihood="gaussian", noise_var=t(psi),
                    decoder=mlp_from_weights([(W[:, None], np.zeros(3))])).double()
    precision = 1 + np.sum(W**2 / psi)
    raw = 10 * np.arctanh(np.log(q_scale / precision) / 10)
    with torch.no_grad():
        head = model.recognition[0].network[0]
        head.weight.copy_(t(np.stack([q_shrink * W / psi / precision, np.zeros(3)])))
        head.bias.copy_(t([0.0, raw]))
    return model


def chain(model, method, num_chains=4000, num_sweeps=60):
    x, observed = t([[0.9, np.nan, np.nan]]), torch.tensor([True, False, False])
    return sb.impute(model, x, observed, num_sweeps=num_sweeps, method=method, num_chains=num_chains,
                     generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("method", ["gibbs", "metropolis"])
def test_case_j_exact_q_reaches_the_conditional(method):
    result = chain(linear_model(), method)
    missing = result.x[:, 0, 1:]
    check_mc(missing, [0.553846153846, -1.038461538462])
    delta = missing - t([0.553846153846, -1.038461538462])
    check_mc(delta[:, :, None] * delta[:, None, :], [[0.547692307692, -0.276923076923], [-0.276923076923, 1.019230769231]])
    assert num(result.acceptance.min()) == 1.0  # an exact proposal is never refused
    assert bool((result.x[:, 0, 0] == 0.9).all())


def test_case_j_narrow_q_shrinks_gibbs_and_not_metropolis():
    wide = lambda method, sweeps: chain(linear_model(q_scale=0.25), method, num_sweeps=sweeps).x[:, 0, 1:]
    lyapunov = [[0.477791563275, -0.145859181141], [-0.145859181141, 0.773485964640]]
    gibbs = wide("gibbs", 60) - t([0.553846153846, -1.038461538462])
    check_mc(gibbs[:, :, None] * gibbs[:, None, :], lyapunov)
    metropolis = wide("metropolis", 300) - t([0.553846153846, -1.038461538462])
    check_mc(metropolis[:, :, None] * metropolis[:, None, :],
             [[0.547692307692, -0.276923076923], [-0.276923076923, 1.019230769231]])


def test_case_j_shrunken_mean_moves_gibbs():
    check_mc(chain(linear_model(q_shrink=0.8), "gibbs").x[:, 0, 1], 0.345738)


def test_case_j_rate_of_the_chain():
    """The mean of the missing pixels approaches its limit by the factor sum_m tau^2 W^2 / psi a sweep."""
    model, x = linear_model(), t([[0.9, 0.0, 0.0]])
    result = sb.impute(model, x, torch.tensor([True, False, False]), num_sweeps=6, num_chains=400_000, keep_trace=True,
                       noise=None, generator=torch.Generator().manual_seed(10))
    error = result.trace[:, :, 0, 1].mean(1) - 0.553846153846
    np.testing.assert_allclose(error[1:4] / error[:3], 0.5846645367412141, rtol=0.05)


@pytest.mark.parametrize("method", ["gibbs", "metropolis"])
def test_impute_with_given_noise_equals_a_plain_loop(method):
    torch.manual_seed(2)
    model = sb.DLGM(4, (2, 1), 3).double()
    C, B, D, K, T = 2, 3, 4, 3, 6
    x, observed = (torch.rand(B, D) < 0.5).double(), torch.rand(B, D) < 0.5
    noise = {"start": torch.randn(C, B, K), "start_x": torch.rand(C, B, D), "z": torch.randn(T, C, B, K),
             "x": torch.rand(T, C, B, D), "accept": torch.rand(T, C, B)}
    noise = {k: v.double() for k, v in noise.items()}
    got = sb.impute(model, x, observed, num_sweeps=T, method=method, num_chains=C, num_plain=2, noise=noise)
    for c, b in itertools.product(range(C), range(B)):  # one chain at a time
        row, z = x[b:b + 1], None
        fill = lambda z, u, b=b, row=row: torch.where(observed[b], row, (u < model.observation(z).mean).double())
        state = fill(noise["start"][c, b][None], noise["start_x"][c, b])
        for s in range(T):
            q = model._posterior(state, flat=True)
            new = q.rsample(noise=noise["z"][s, c, b][None])
            if method == "gibbs" or s < 2:
                z = new
            else:
                weigh = lambda v, q=q, state=state: model.log_joint(state, v[None])[0] - q.log_prob(v)
                z = new if noise["accept"][s, c, b].log() < weigh(new) - weigh(z) else z
            state = fill(z, noise["x"][s, c, b])
        close(got.x[c, b], state[0].detach(), 1e-12)


def test_metropolis_within_gibbs_leaves_the_enumerated_target_alone():
    """A wrong q, two latent values, three binary pixels, all enumerated: the joint kernel keeps p(z, x_m | x_o)."""
    rng = np.random.default_rng(3)
    prior, prob = np.array([0.3, 0.7]), rng.uniform(0.1, 0.9, (2, 3))
    states = np.array(list(itertools.product([0, 1], [0, 1])))  # pixels 1 and 2 missing, pixel 0 observed as 1
    likelihood = np.array([[prob[z, 0] * np.prod(np.where(m == 1, prob[z, 1:], 1 - prob[z, 1:])) for m in states] for z in (0, 1)])
    target = prior[:, None] * likelihood
    target = target / target.sum()
    q = rng.uniform(0.1, 0.9, (4, 2))
    q /= q.sum(1, keepdims=True)
    kernel = np.zeros((8, 8))
    for z, m in itertools.product(range(2), range(4)):
        move = np.zeros(2)
        for new in range(2):
            ratio = (target[new, m] / q[m, new]) / (target[z, m] / q[m, z])
            move[new] += q[m, new] * min(1.0, ratio)
        move[z] += 1 - move.sum()
        for new, m2 in itertools.product(range(2), range(4)):
            p_m = np.prod(np.where(states[m2] == 1, prob[new, 1:], 1 - prob[new, 1:]))
            kernel[4 * z + m, 4 * new + m2] += move[new] * p_m
    assert np.abs(target.ravel() @ kernel - target.ravel()).sum() < 1e-14


def test_impute_with_nothing_missing_or_nothing_observed():
    model = sb.DLGM(4, 2, 3)
    x = (torch.rand(3, 4) < 0.5).float()
    everything = sb.impute(model, x, torch.ones(4, dtype=torch.bool), num_sweeps=2)
    assert torch.equal(everything.x[0], x) and torch.equal(everything.mean, x)
    nothing = sb.impute(model, torch.full((3, 4), float("nan")), torch.zeros(4, dtype=torch.bool), num_sweeps=2)
    assert bool(torch.isfinite(nothing.x).all())


def test_impute_with_nothing_observed_samples_the_model():
    """A mask that hides everything: the tested chain's law is p(x), whatever q is."""
    torch.manual_seed(11)
    model = sb.DLGM(4, 2, 3, activation="tanh").double()
    with torch.no_grad():
        for p in model.networks.parameters():
            p.mul_(2.0)
    nodes, weights = (torch.as_tensor(a) for a in oracles.gauss_hermite_nodes(np.zeros(2), np.eye(2), 40))
    want = weights @ model.observation(nodes).mean.detach()
    chain = sb.impute(model, torch.full((1, 4), float("nan")).double(), torch.zeros(4, dtype=torch.bool), num_sweeps=40,
                      method="metropolis", num_chains=20_000, generator=torch.Generator().manual_seed(12))
    check_mc(chain.x[:, 0], want, "eq-sb-metropolis", what="nothing observed: the model's own marginals")


def test_impute_refuses_bad_input():
    model, x = sb.DLGM(4, 2, 3), torch.zeros(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    for keywords, message in [({"observed": mask[:2]}, "observed must be bool of shape"),
                              ({"observed": mask.float()}, "observed must be bool"),
                              ({"method": "gibs"}, "method must be one of"), ({"num_sweeps": 0}, "num_sweeps"),
                              ({"num_discard": 5}, "num_discard"), ({"x": torch.full((3, 4), float("nan"))}, "not finite")]:
        arguments = {"x": x, "observed": mask, "num_sweeps": 5, **keywords}
        with pytest.raises(ValueError, match=message):
            sb.impute(model, **arguments)


# ---------------------------------------------------------------- NumPy and torch
def ten_steps(family, layers, noise_matrix="dense", steps=10):
    torch.manual_seed(1)
    B, D, S = 4, 6, 2
    model = sb.DLGM(D, layers, (5,) * len(layers), recognition=family, activation="tanh", noise_matrix=noise_matrix).double()
    x = (torch.rand(B, D) < 0.5).double()
    values, unflatten = flatten(model.as_arrays())
    optimizer, memory = torch.optim.Adam(model.parameters(), lr=0.01), None
    for _ in range(steps):
        noise = torch.randn(S, B, sum(layers), dtype=torch.float64)
        parts = [part.numpy() for part in noise.split(list(layers), -1)]
        loss = lambda v, parts=parts: -anp.sum(scratch.bound(unflatten(v), x.numpy(), parts, family))
        value, slopes = value_and_grad(loss)(values)
        optimizer.zero_grad()
        in_torch = -model.bound(x, num_samples=S, noise=noise).sum()
        in_torch.backward()
        yield model, value, in_torch.item(), slopes
        optimizer.step()
        values, memory = scratch.adam_step(values, slopes, memory, 0.01)
    yield model, None, None, values


@pytest.mark.parametrize("layers", [(3,), (3, 2), (2, 4, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_numpy_and_torch_agree_for_ten_steps(family, layers):
    *steps, (model, _, _, values) = ten_steps(family, layers)
    for _, value, in_torch, _ in steps:
        assert value == pytest.approx(in_torch, abs=1e-9)
    np.testing.assert_allclose(values, flatten(model.as_arrays())[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_numpy_and_torch_agree_on_every_gradient(family):
    model, _, _, slopes = next(ten_steps(family, (3, 2)))
    with torch.no_grad():  # as_arrays of the gradients: same order
        for p in model.parameters():
            p.copy_(p.grad)
    np.testing.assert_allclose(slopes, flatten(model.as_arrays())[0], rtol=0, atol=1e-10)


def test_bound_is_below_and_log_likelihood_at_the_evidence():
    model = case_b_model()
    generator = torch.Generator().manual_seed(11)
    bound = model.bound(B_X, num_samples=20_000, generator=generator)
    estimate = model.log_likelihood(B_X, 20_000, proposal=lambda x: sb.DefensiveMixture(model.posterior(x), 0.5),
                                    generator=generator)
    assert num(bound) < -1.5087
    assert abs(num(estimate.value) + 1.5087394715901412) < 5 * num(estimate.standard_error) < 0.1


def test_score_function_loss_has_the_bound_as_value_and_its_gradient_on_average():
    torch.manual_seed(3)
    model = sb.DLGM(4, 2, 3, activation="tanh").double()
    x = (torch.rand(1, 4) < 0.5).double()
    noise = torch.randn(2, 60_000, 2, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    bias = model.recognition[0].network[-1].bias
    S = noise.shape[1]

    def each(loss):  # gradient in the bias, one row a draw: the bias enters each row by itself
        rows = bias.detach().expand(S, -1).clone().requires_grad_()
        base = model.recognition[0].network[:-1](x) @ model.recognition[0].network[-1].weight.mT
        out = base.detach() + rows
        q = sb.DiagonalNormal(out[:, :2], 10 * torch.tanh(out[:, 2:] / 10))
        return torch.autograd.grad(loss(q).sum(), rows)[0]
    X = x.expand(S, 4)
    path = each(lambda q: q.kl_to_standard() - model.observation(q.rsample((2,), noise=noise)).log_prob(X).mean(0))

    def score(q):
        model._posterior = lambda rows, flat=False: sb.LayeredPosterior([q], flat=flat)
        return sb.score_function_loss(model, X, noise=noise)
    by_score = each(score)
    difference = by_score - path
    check_mc(difference, 0.0)
    assert num(by_score.var(0).sum()) > num(path.var(0).sum())


def test_wake_sleep_moves_each_half_alone():
    torch.manual_seed(4)
    model = sb.DLGM(5, (3, 2), 4).double()
    wake, sleep = sb.wake_sleep_losses(model, (torch.rand(3, 5) < 0.5).double())
    assert wake.shape == sleep.shape == (3,)
    theta, phi = model.generative_parameters(), list(model.recognition.parameters())
    grads = lambda loss, on: torch.autograd.grad(loss.sum(), on, allow_unused=True, retain_graph=True)
    assert all(g is None for g in grads(wake, phi)) and all(g is not None for g in grads(wake, theta))
    assert all(g is None for g in grads(sleep, theta)) and all(g is not None for g in grads(sleep, phi))


def test_minibatch_free_energy_averages_to_the_full_one():
    torch.manual_seed(5)
    model = sb.DLGM(4, 2, 3, likelihood="gaussian").double()
    x, noise = torch.randn(5, 4).double(), torch.randn(1, 5, 2).double()
    energy = lambda rows: sb.minibatch_free_energy(model, x[rows], 5, weight_variance=2.0, noise=noise[:, rows])
    full = energy(list(range(5)))
    batches = [energy(list(rows)) for rows in itertools.combinations(range(5), 2)]
    assert num(torch.stack(batches).mean()) == pytest.approx(num(full), abs=1e-11)
    parameters = list(model.parameters())
    mean = [sum(g) / 10 for g in zip(*[torch.autograd.grad(b, parameters) for b in batches], strict=True)]
    for got, want in zip(mean, torch.autograd.grad(full, parameters), strict=True):
        close(got, want, 1e-11)


def test_input_flips_touch_the_recognition_input_only():
    torch.manual_seed(6)
    model = sb.DLGM(6, 2, 5, input_flip=0.3).double()
    x = (torch.rand(4, 6) < 0.5).double()
    spec = model.noise_spec(4, 3)
    noise = {"z": torch.randn(spec["z"][1]).double(), "flip": torch.rand(spec["flip"][1]).double()}
    flipped = torch.where(noise["flip"] < 0.3, 1 - x, x)
    q = model.posterior(flipped)
    want = model.observation(q.rsample((3,), noise=noise["z"])).log_prob(x).mean(0) - q.kl_to_standard()
    close(model.bound(x, num_samples=3, noise=noise), want.detach())
    model.eval()
    assert set(model.noise_spec(4)) == {"z"}
    clean = model.posterior(x)
    want = model.observation(clean.rsample((3,), noise=noise["z"])).log_prob(x).mean(0) - clean.kl_to_standard()
    close(model.bound(x, num_samples=3, noise=noise["z"]), want.detach())


def test_rotated_noise_changes_nothing_but_the_diagonal_bound():
    model = case_b_model()
    turned = sb.DLGM(2, 2, ((),), recognition_dims=(), noise_matrix="dense").double()
    turn = t([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    grid, weight = nodes(np.zeros(2), np.eye(2), 160)
    evidence = lambda: num(torch.log(weight @ turned.observation(grid[:, None]).log_prob(B_X)[:, 0].exp()))
    with torch.no_grad():
        turned.noise_matrices[0].copy_(t([[1.5, 0.2], [-0.4, 0.6]]))
    before = evidence()
    with torch.no_grad():
        turned.noise_matrices[0].copy_(turned.noise_matrices[0] @ turn.mT)
    assert evidence() == pytest.approx(before, abs=1e-9)
    assert model.num_layers == 2


# ---------------------------------------------------------------- the contract, shapes, bad input
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_contract_shapes_and_dtypes(family, likelihood, device):
    device = device_or_skip(device)
    B, S, D = 3, 5, 7
    for dtype, layers in ((torch.float32, (4,)), (torch.float64, (4, 2))):
        model = sb.DLGM(D, layers, 6, recognition=family, likelihood=likelihood).to(device, dtype)
        x = (torch.rand(B, D, device=device) < 0.5).to(dtype)
        bound = model.bound(x, num_samples=S)
        assert bound.shape == (B,) and bound.dtype == dtype and bound.device.type == device
        kind, shape, axis = model.noise_spec(B, S)["z"]
        assert (kind, shape, axis) == ("normal", (S, B, sum(layers)), 1)
        z = model.posterior(x).rsample((S,))
        assert model.log_joint(x, z).shape == (S, B)
        assert model.posterior(x).log_prob(z).shape == (S, B)
        assert model.sample(6).shape == (6, D) and model.reconstruct(x, num_samples=2).shape == (B, D)
        assert model.log_likelihood(x, 11).value.shape == (B,)
        assert (z[0].shape if len(layers) > 1 else z.shape) == (S, B, 4)


@pytest.mark.cuda
def test_cpu_and_cuda_agree():
    device = device_or_skip("cuda")
    torch.manual_seed(7)
    model = sb.DLGM(7, (3, 2), 5, recognition="rank1").double()
    x, noise = (torch.rand(4, 7) < 0.5).double(), torch.randn(2, 4, 5).double()
    on_cpu = model.bound(x, num_samples=2, noise=noise)
    close(model.to(device).bound(x.to(device), num_samples=2, noise=noise.to(device)), on_cpu.detach(), 1e-10)


def test_one_noise_row_per_example():
    """Equal data rows get different draws: no draw is shared by the batch."""
    model = sb.DLGM(4, 2, 3).double()
    values = model.bound(torch.ones(6, 4).double(), generator=torch.Generator().manual_seed(0))
    assert len(set(values.tolist())) == 6


def test_values_are_per_example_sums():
    """Two copies of an image side by side: twice the log-likelihood, one divergence (no mean over pixels or batch)."""
    torch.manual_seed(8)
    model = sb.DLGM(4, 2, 3).double()
    x, noise = (torch.rand(5, 4) < 0.5).double(), torch.randn(1, 5, 2).double()
    z = model.posterior(x).rsample((1,), noise=noise)
    logits = model.networks[0](z)
    pixelwise = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x[None], reduction="none")
    want = pixelwise.sum(-1)[0] - model.posterior(x).kl_to_standard()
    close(model.bound(x, noise=noise), want.detach(), 1e-12)


def test_divergence_vanishes_at_the_prior_for_every_family():
    model = [sb.DiagonalNormal(*torch.zeros(2, 3, 4)), sb.RankOnePrecisionNormal(*torch.zeros(3, 3, 4)),
             sb.LowRankPrecisionNormal(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4, 2)),
             sb.FullNormal(torch.zeros(3, 4), torch.eye(4).expand(3, 4, 4))]
    for q in model:
        close(q.kl_to_standard(), np.zeros(3), 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_widen_multiplies_the_covariance(family):
    torch.manual_seed(9)
    q = sb.DLGM(5, 3, 4, recognition=family).double().posterior((torch.rand(2, 5) < 0.5).double())
    close(sb.widen(q, 4.0).covariance_matrix, 4 * q.covariance_matrix.detach(), 1e-12)
    close(sb.widen(sb.LayeredPosterior([q, q]), 4.0).layers[1].covariance_matrix, 4 * q.covariance_matrix.detach(), 1e-12)


def test_learned_noise_variance_has_a_floor():
    model = sb.DLGM(3, 2, 4, likelihood="gaussian", min_noise_var=0.01)
    with torch.no_grad():
        model.log_noise_var.fill_(-100.0)
    close(model.noise_var, np.full(3, 0.01), 1e-9)


def test_frozen_decoder_is_left_alone():
    decoder = torch.nn.Linear(2, 3)
    model = sb.DLGM(3, 2, 4, decoder=decoder, freeze_decoder=True, likelihood="gaussian", noise_var=0.1)
    assert not any(p.requires_grad for p in model.generative_parameters())
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arguments, message", [
    (((3,), ((4,), (4,))), "hidden_dims must have one entry per layer"),
    (((0,), (4,)), "must be positive"),
    (((2,), (4,), {"recognition": "rank-1"}), "recognition must be one of"),
    (((2,), (4,), {"noise_matrix": "sparse"}), "noise_matrix must be one of"),
    (((2,), (4,), {"likelihood": "poisson"}), "likelihood must be one of"),
    (((2, 2), 4, {"decoder": torch.nn.Linear(2, 5)}), "decoder replaces T_0"),
    (((2,), (4,), {"decoder": torch.nn.Linear(3, 5)}), r"decoder must map \[..., 2\] to \[..., 5\], but refuses"),
    (((2,), (4,), {"decoder": torch.nn.Linear(2, 4)}), r"but makes \[2, 4\] of \[2, 2\]"),
    (((2,), (4,), {"noise_var": 0.1}), "noise_var belongs to"),
    (((2,), (4,), {"noise_var": -0.1, "likelihood": "gaussian"}), "noise_var must be positive"),
    (((2,), (4,), {"input_flip": 0.1, "likelihood": "gaussian"}), "input_flip must lie"),
])
def test_constructor_refuses(arguments, message):
    latent, hidden, *options = arguments
    with pytest.raises(ValueError, match=message):
        sb.DLGM(5, latent, hidden, **(options[0] if options else {}))


@pytest.mark.parametrize("value", [0.5, 255.0, -1.0, 1e-7, 1 - 6e-8, float("nan"), float("inf"), -float("inf")])
def test_a_single_pixel_outside_the_support_is_refused(value):
    model, x = sb.DLGM(4, 2, 3), torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    x[1, 2] = value
    with pytest.raises(ValueError, match="x must be 0 or 1 for a Bernoulli likelihood" if math.isfinite(value)
                       else "x must be finite, got NaN or infinity: `impute` is for missing entries"):
        model.bound(x)
    with pytest.raises(ValueError, match="x must be 0 or 1 for a Bernoulli likelihood"):
        model.log_joint(x, torch.zeros(1, 3, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_the_gaussian_likelihood(value):
    model, x = sb.DLGM(4, 2, 3, likelihood="gaussian"), torch.zeros(3, 4)
    x[1, 2] = value
    with pytest.raises(ValueError, match="must be finite"):
        model.bound(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_not_finite_are_named(family):
    """A run that diverged says which parameter of q is not a number; it does not hand NaN on."""
    model = sb.DLGM(4, 2, 3, recognition=family)
    with torch.no_grad():
        model.recognition[0].network[-1].bias[-1] = float("nan")
    with pytest.raises(ValueError, match=r"^(loc|log_var|log_d|u|U|scale_tril) must be"):
        model.bound(torch.zeros(3, 4))


def test_mean_over_the_batch_is_refused_by_fit():
    """The sum-or-mean mistake cannot be made in silence: a loss is one number per example."""
    model = sb.DLGM(4, 2, 3)
    with pytest.raises(ValueError, match="loss must return one value per example"):
        fit(model, torch.zeros(6, 4), num_steps=1, batch_size=3, lr=1e-3, device="cpu",
            loss=lambda model, x, noise: -model.bound(x, noise=noise).mean())


def test_model_refuses_bad_data():
    model = sb.DLGM(4, (2, 1), 3)
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 4\]"):
        model.bound(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="x must be 0 or 1"):
        model.bound(torch.full((3, 4), 255.0))
    with pytest.raises(ValueError, match="noise must hold 'z'"):
        model.bound(x, noise=torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="layer sizes"):
        model.log_joint(x, torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="coordinates must be one of"):
        model.log_joint(x, torch.zeros(1, 3, 3), coordinates="h")
    with pytest.raises(ValueError, match="u must be finite"):
        sb.RankOnePrecisionNormal(torch.zeros(1, 2), torch.zeros(1, 2), torch.full((1, 2), float("nan")))
    with pytest.raises(ValueError, match="factor must be positive"):
        sb.widen(model.posterior(x), 0.0)
    with pytest.raises(TypeError, match="posterior must be one of"):
        sb.widen(torch.distributions.Normal(0, 1), 2.0)
    with pytest.raises(ValueError, match="weight must lie"):
        sb.DefensiveMixture(model.posterior(x), 1.0)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        sb.score_function_loss(model, x, num_samples=1)
