"""Evaluation against models whose log-likelihood, posterior and gaps are known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

from dlgm_tutorial import evaluation, oracles
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.distributions import DiagonalNormal, FullNormal, LowRankPrecisionNormal, RankOnePrecisionNormal
from dlgm_tutorial.evaluation import (
    Calibration,
    GridPosterior,
    estimate,
    fit_posterior,
    inference_gaps,
    knn_error,
    log_likelihood_ais,
    log_likelihood_is,
    posterior_on_grid,
    quasi_normal,
    rank_correlation,
    reconstruction_error,
    simulation_based_calibration,
)
from dlgm_tutorial.likelihoods import Gaussian

B, D = 3, 5
GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


class Linear:
    """x = W z + b + noise: the contract's methods, and answers by dense algebra."""

    def __init__(self, num_latents=2, num_data=D, noise_var=0.4, seed=0):
        draw = lambda *shape: torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
        self.W, self.b, self.noise_var, self.K = draw(num_data, num_latents), draw(num_data), noise_var, num_latents
        self.x = draw(B, num_latents) @ self.W.T + self.b + 0.5 * draw(B, num_data)

    def to(self, device):
        self.W, self.b, self.x = (t.to(device) for t in (self.W, self.b, self.x))
        return self

    def log_joint(self, x, z):
        return Gaussian(z @ self.W.T + self.b, self.noise_var).log_prob(x) - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def truth(self, x):
        """(evidence [B], posterior mean [B, K], covariance [K, K]) by the oracle."""
        arrays = [t.cpu().numpy() for t in (x, self.W, self.b)]
        return oracles.linear_gaussian_evidence(*arrays, self.noise_var), *oracles.linear_gaussian_posterior(*arrays, self.noise_var)

    def log_likelihood(self, x):
        return evaluation.Estimate(torch.from_numpy(self.truth(x)[0]), torch.zeros(len(x)), torch.full((len(x),), torch.inf))

    def posterior(self, x, widen=1.0):
        _, mean, cov = (torch.from_numpy(np.asarray(a)).to(x) for a in self.truth(x))
        return FullNormal(mean, torch.linalg.cholesky(widen * cov).expand(len(x), -1, -1))

    def noise_spec(self, batch_size, num_samples=1):
        return {"z": ("normal", (num_samples, batch_size, self.K), 1)}

    def sample_joint(self, num, generator):
        z = torch.randn(num, self.K, generator=generator, dtype=torch.float64)
        return z, Gaussian(z @ self.W.T + self.b, self.noise_var).sample(generator=generator)

    def reconstruct(self, x, num_samples=1, generator=None):
        return self.posterior(x).mean @ self.W.T + self.b


# Importance sampling

@devices
def test_importance_sampling_with_the_exact_posterior_has_no_error(device):
    model = Linear().to(device)
    value, error, ess = log_likelihood_is(model, model.x, 7)
    check_close(value, model.truth(model.x)[0], 1e-12)
    check_close(ess, np.full(B, 7.0), 1e-9)
    assert bool((error < 1e-6).all()) and value.dtype == torch.float64 and value.device.type == device


@devices
def test_importance_sampling_is_within_its_standard_error(device):
    model = Linear().to(device)
    value, error, ess = log_likelihood_is(model, model.x, 20_000, proposal=lambda x: model.posterior(x, widen=2.0),
                                          generator=seeded(1, device))
    check_mc(value, model.truth(model.x)[0], standard_error=error)
    assert bool((error < 0.01).all()) and bool((ess < 20_000).all())


def test_standard_error_and_ess_have_the_closed_form():
    """Case I of the brief on stochastic backpropagation: the relative variance of the weights is 0.15187 for a normal proposal."""
    model = Linear(1, 1, noise_var=0.5)
    model.W, model.b, x = torch.tensor([[1.2]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 0.8, dtype=torch.float64)
    proposal = lambda x: DiagonalNormal(torch.full_like(x, 0.6948453608247423), torch.full_like(x, math.log(0.4)))
    value, error, ess = log_likelihood_is(model, x, 100_000, proposal=proposal, generator=seeded())
    check_mc(value, [-1.4152309733505386], standard_error=error)
    check_close(error, [math.sqrt(0.15187210123703987 / 1e5)], rtol=0.05)
    check_close(ess, [1e5 / 1.15187210123703987], rtol=0.01)


def test_the_standard_error_is_the_spread_over_repetitions():
    model = Linear()
    proposal = lambda x: model.posterior(x, widen=3.0)
    runs = [log_likelihood_is(model, model.x, 200, proposal=proposal, generator=seeded(i)) for i in range(200)]
    values, errors = torch.stack([r.value for r in runs]), torch.stack([r.standard_error for r in runs])
    check_close(values.std(0), errors.mean(0), rtol=0.25)
    check_mc(values.exp() / torch.from_numpy(np.exp(model.truth(model.x)[0])), 1.0)  # unbiased before the logarithm


@pytest.mark.parametrize("chunk", [1, 2, 11, 40, 1000])
def test_chunks_do_not_change_the_estimate(chunk):
    """The same noise, so the same weights, cut differently."""
    model = Linear()
    wide = lambda x: model.posterior(x, widen=2.0)
    noise = torch.randn(13, B, 2, generator=seeded(5), dtype=torch.float64)
    got = log_likelihood_is(model, model.x, 13, proposal=wide, noise=noise, chunk=chunk)
    q = wide(model.x)
    z = q.loc + torch.einsum("bij,sbj->sbi", q.scale_tril, noise)
    log_w = (model.log_joint(model.x, z) - q.log_prob(z)).numpy()
    weights = np.exp(log_w)
    check_close(got.value, np.log(weights.mean(0)), 1e-12)
    check_close(got.standard_error, weights.std(0, ddof=1) / weights.mean(0) / math.sqrt(13), 1e-12)
    check_close(got.ess, weights.sum(0) ** 2 / (weights**2).sum(0), 1e-10)
    check_close(estimate(torch.from_numpy(log_w)).standard_error, got.standard_error, 1e-12)


# Annealed importance sampling

@devices
@pytest.mark.parametrize("kernel", ["hmc", "mala"])
def test_annealing_is_within_its_standard_error(kernel, device):
    model = Linear(4).to(device)
    value, error, _ = log_likelihood_ais(model, model.x, 256, num_steps=100, kernel=kernel, generator=seeded(2, device))
    check_mc(value, model.truth(model.x)[0], standard_error=error)
    assert bool((error < 0.1).all()) and value.device.type == device


def test_unadjusted_annealing_is_biased_and_the_adjusted_one_is_not():
    model = Linear(2, noise_var=0.1)
    run = {kernel: log_likelihood_ais(model, model.x, 2000, num_steps=30, kernel=kernel, step_size=0.45, generator=seeded(3))
           for kernel in ("mala", "langevin")}
    want = model.truth(model.x)[0]
    check_mc(run["mala"].value, want, standard_error=run["mala"].standard_error)
    biased = run["langevin"]
    assert bool(((biased.value - torch.from_numpy(want)).abs() > 10 * biased.standard_error).any())


def test_more_temperatures_raise_the_mean_log_weight():
    """log p(x) is approached from below, as the number of temperatures grows."""
    model, means = Linear(2), []
    for num_steps in (1, 4, 40):
        runs = log_likelihood_ais(model, model.x.repeat(100, 1), 1, num_steps=num_steps, step_size=0.4, generator=seeded(1))
        means.append(runs.value.reshape(100, B).mean(0))
    check_below(means[0], means[1])
    check_below(means[1], means[2])
    check_below(means[2], model.truth(model.x)[0], slack=0.05)


def test_one_temperature_is_importance_sampling_from_the_base():
    """With betas = (0, 1) no step is taken: the mean log-weight is the known E log p(x | z) under the prior."""
    model = Linear(1, 1, noise_var=0.5)
    model.W, model.b, x = torch.tensor([[1.2]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 0.8, dtype=torch.float64)
    runs = log_likelihood_ais(model, x.expand(20_000, 1), 1, betas=[0, 1], step_size=1.0, generator=seeded(4))
    check_mc(runs.value, -2.652364942924699)
    check_mc(runs.value.exp(), math.exp(-1.4152309733505386))


def test_annealing_from_a_base_that_is_the_posterior_is_exact():
    model = Linear()
    value, error, _ = log_likelihood_ais(model, model.x, 5, num_steps=6, base=model.posterior)
    check_close(value, model.truth(model.x)[0], 1e-12)


def test_annealing_reads_layered_latents_through_split():
    model = Linear(2)
    flat = model.log_joint
    model.split = lambda z: (z[..., :1], z[..., 1:])
    model.log_joint = lambda x, z: flat(x, torch.cat(z, -1))
    value, error, _ = log_likelihood_ais(model, model.x, 256, num_steps=60, generator=seeded(6), chunk=300)
    check_mc(value, model.truth(model.x)[0], standard_error=error)


# Gaps

FAMILIES = {"diagonal": lambda k: DiagonalNormal(*torch.zeros(2, B, k, dtype=torch.float64)),
            "rank1": lambda k: RankOnePrecisionNormal(*torch.zeros(2, B, k, dtype=torch.float64), torch.full((B, k), 0.1, dtype=torch.float64)),
            "rank_r": lambda k: LowRankPrecisionNormal(*torch.zeros(2, B, k, dtype=torch.float64), 0.1 * torch.randn(B, k, 2, generator=seeded(), dtype=torch.float64)),
            "full": lambda k: FullNormal(torch.zeros(B, k, dtype=torch.float64), torch.eye(k, dtype=torch.float64).expand(B, k, k))}


@devices
def test_gap_of_a_diagonal_posterior_has_its_closed_form(device):
    """The best diagonal normal has the variances 1 / precision_ii; its gap is 1/2 (sum log precision_ii - log |precision|)."""
    model = Linear().to(device)
    model.posterior = lambda x: DiagonalNormal(*torch.zeros(2, B, 2, dtype=torch.float64, device=device))
    gaps = inference_gaps(model, model.x)
    evidence, mean, cov = model.truth(model.x)
    precision = np.linalg.inv(cov)
    approximation = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    kl = [oracles.gaussian_kl(np.zeros(2), np.eye(2), m, cov) for m in mean]
    check_close(gaps.approximation, np.full(B, approximation), 1e-6)
    check_close(gaps.kl_to_posterior, kl, 1e-9)  # averages of quadratic functions are exact
    check_close(gaps.amortization, np.array(kl) - approximation, 1e-6)
    check_close(gaps.bound, evidence - kl, 1e-9)
    check_close(gaps.log_likelihood, evidence, 1e-12)


@pytest.mark.parametrize(("family", "num_latents"), [("full", 3), ("rank1", 2), ("rank_r", 3)])
def test_a_family_that_holds_the_posterior_has_no_approximation_gap(family, num_latents):
    """With two latents a diagonal plus rank one is every normal; with two data a posterior precision is I plus rank two."""
    model = Linear(num_latents, 2 if family == "rank_r" else D)
    q, best = fit_posterior(lambda z: model.log_joint(model.x, z), FAMILIES[family](num_latents), num_steps=600)
    evidence, mean, cov = model.truth(model.x)
    check_close(best, evidence, 1e-5)
    check_close(q.mean, mean, 0.01)
    check_close(q.covariance_matrix, np.broadcast_to(cov, (B, num_latents, num_latents)), 0.01)


def test_rank_one_gap_of_the_reference_case():
    """Case D of the brief on stochastic backpropagation: 0.098428658 at the boundary d_2 = 0, 0.6308 for a diagonal."""
    model = Linear(3, 2)
    model.W = torch.tensor([[1, -2, 0.5], [0.3, 0.8, -1.5]], dtype=torch.float64)
    model.b, model.noise_var = torch.zeros(2, dtype=torch.float64), torch.tensor([0.4, 0.7], dtype=torch.float64)
    x = torch.tensor([[1.5, -0.5]], dtype=torch.float64).expand(B, 2)
    model.x = x
    evidence = oracles.linear_gaussian_evidence(x.numpy(), model.W.numpy(), model.b.numpy(), model.noise_var.numpy())
    check_close(evidence, np.full(B, -3.441710495270965), 1e-12)
    log_joint = lambda z: model.log_joint(x, z)
    _, best = fit_posterior(log_joint, FAMILIES["diagonal"](3))
    check_close(evidence - best.numpy(), np.full(B, 0.6308043372498942), 1e-6)
    # From several starts: some reach the boundary optimum, none goes below it.
    starts = RankOnePrecisionNormal(*torch.zeros(2, 8, 3, dtype=torch.float64), torch.randn(8, 3, generator=seeded(), dtype=torch.float64))
    _, best = fit_posterior(lambda z: model.log_joint(x[:1], z), starts, num_steps=1000, lr=0.3)
    gap = evidence[0] - best.numpy()
    assert gap.min() >= 0.098428658 - 1e-8
    check_close(gap.min(), 0.098428658, 2e-3)


class Layers:
    """Two independent normals, tuples in and out."""

    def __init__(self, layers, flat=False):
        self.layers, self.flat = layers, flat

    def rsample(self, sample_shape, noise):
        return tuple(layer.rsample(sample_shape, noise=part) for layer, part in zip(self.layers, noise.split([2, 1], -1), strict=True))


def test_gap_of_layers_that_are_independent_of_each_other():
    """The best product of a full normal and a scalar has the precision's diagonal blocks; the gap is what |blocks| exceed."""
    model = Linear(3)
    flat = model.log_joint
    model.log_joint = lambda x, z: flat(x, torch.cat(z, -1))
    model.posterior = lambda x: Layers([FAMILIES["full"](2), FAMILIES["full"](1)])
    gaps = inference_gaps(model, model.x)
    precision = np.linalg.inv(model.truth(model.x)[2])
    want = 0.5 * (np.linalg.slogdet(precision[:2, :2])[1] + np.log(precision[2, 2]) - np.linalg.slogdet(precision)[1])
    check_close(gaps.approximation, np.full(B, want), 1e-6)


def test_fit_never_falls_below_its_start():
    model = Linear()
    exact = model.posterior(model.x)
    _, best = fit_posterior(lambda z: model.log_joint(model.x, z), exact, num_steps=3, lr=10.0)
    check_close(best, model.truth(model.x)[0], 1e-10)


def test_gaps_that_do_not_exist_are_none():
    """A sampler without a density has neither; a model with its own bound and another family has what can be had."""
    class Sampler:
        def rsample(self, sample_shape):
            return torch.zeros(*sample_shape, B, 2)
    model = Linear()
    model.posterior = lambda x: Sampler()
    gaps = inference_gaps(model, model.x)
    assert gaps.bound is gaps.approximation is gaps.amortization is gaps.kl_to_posterior is None
    model.bound = lambda x, num_samples: torch.full((B,), -50.0, dtype=torch.float64)
    gaps = inference_gaps(model, model.x, best_bound=torch.full((B,), -40.0, dtype=torch.float64))
    check_close(gaps.amortization, np.full(B, 10.0), 1e-12)
    check_close(gaps.approximation, gaps.log_likelihood + 40, 1e-12)


def test_quasi_normal_points_have_exact_moments():
    points = quasi_normal(64, 3)
    check_close(points.mean(0), np.zeros(3), 1e-14)
    check_close(points.mT @ points / 64, np.eye(3), 1e-13)
    check_close(quasi_normal(1024, 2).square().square().mean(0), [3.0, 3.0], 0.1)  # 0.3 with random draws
    assert torch.equal(points, quasi_normal(64, 3)) and not torch.equal(points, quasi_normal(64, 3, seed=1))


# Calibration

def widened(model, factor):
    def posterior(x):
        _, mean, cov = model.truth(x)
        return FullNormal(torch.from_numpy(mean), torch.linalg.cholesky(torch.from_numpy(factor * cov)).expand(len(x), -1, -1))
    return posterior


def test_exact_posterior_is_calibrated_and_others_are_not():
    model = Linear()
    right = simulation_based_calibration(model.sample_joint, model.posterior, 2000, generator=seeded(7))
    assert right.ranks.shape == (2000, 2) and right.ranks.min() >= 0 and right.ranks.max() <= 99
    assert bool((right.chi_square()[1] > 1e-4).all())
    check_mc(right.ranks.double(), 49.5)
    for factor, shape in ((3.0, "dome"), (0.3, "bowl")):
        wrong = simulation_based_calibration(model.sample_joint, widened(model, factor), 2000, generator=seeded(7), chunk=1000)
        histogram = wrong.histogram().double()
        assert bool((wrong.chi_square()[1] < 1e-10).all())
        middle, ends = histogram[4:6].sum(0), histogram[[0, -1]].sum(0)
        assert bool((middle > ends).all() if shape == "dome" else (middle < ends).all())


def test_the_prior_passes_on_coordinates_and_fails_on_the_likelihood():
    """The blind spot of ranks of z: a posterior that ignores the data."""
    model = Linear()
    prior = lambda x: DiagonalNormal(*torch.zeros(2, len(x), 2, dtype=torch.float64))
    likelihood = lambda z, x: (model.log_joint(x, z) + 0.5 * z.square().sum(-1))[..., None]
    blind = simulation_based_calibration(model.sample_joint, prior, 1000, generator=seeded(8))
    seen = simulation_based_calibration(model.sample_joint, prior, 1000, statistic=likelihood, generator=seeded(8))
    assert bool((blind.chi_square()[1] > 1e-4).all()) and bool((seen.chi_square()[1] < 1e-10).all())


def test_histogram_and_chi_square_by_hand():
    calibration = Calibration(torch.tensor([[0], [1], [2], [9], [9], [5]]), 9)
    assert calibration.histogram(5)[:, 0].tolist() == [2, 1, 1, 0, 2]
    statistic, p = calibration.chi_square(5)
    want = stats.chisquare([2, 1, 1, 0, 2])
    check_close(statistic, [want.statistic], 1e-12)
    check_close(p, [want.pvalue], 1e-12)


# Grids

@devices
@pytest.mark.parametrize("num_latents", [1, 2])
def test_grid_gives_the_exact_evidence_and_moments(num_latents, device):
    model = Linear(num_latents, noise_var=0.01).to(device)
    model.x = model.x + torch.tensor([[0.0], [0.0], [2.0]], device=device)
    grid = posterior_on_grid(lambda z: model.log_joint(model.x, z), [-9.0] * num_latents, [9.0] * num_latents, 121, device=device)
    evidence, mean, cov = model.truth(model.x)
    assert isinstance(grid, GridPosterior)
    check_close(grid.log_evidence, evidence, 1e-9)
    check_close(grid.mean, mean, 1e-9)
    check_close(grid.covariance, np.broadcast_to(cov, (B, num_latents, num_latents)), 1e-9)
    at = grid.log_prob - torch.stack([torch.as_tensor(stats.multivariate_normal(mean[b], cov).logpdf(grid.points[:, b].cpu().numpy())) for b in range(B)], 1).to(device)
    check_close(at, np.zeros(at.shape), 1e-8)


def test_grid_keeps_every_mode():
    log_joint = lambda z: torch.logaddexp(-0.5 * ((z[..., 0] - 3) / 0.01) ** 2, -0.5 * ((z[..., 0] + 4) / 0.02) ** 2).expand(-1, 1)
    grid = posterior_on_grid(log_joint, [-6.0], [6.0], 4001)
    check_close(grid.log_evidence, [math.log(0.03 * math.sqrt(2 * math.pi))], 1e-9)
    check_close(grid.mean, [[(0.01 * 3 - 0.02 * 4) / 0.03]], 1e-9)


# Features and reconstructions

@pytest.mark.parametrize("num_neighbours", [1, 3, 6])
def test_knn_matches_scikit_learn(num_neighbours):
    train, test = (torch.randn(n, 3, generator=seeded(i), dtype=torch.float64) for i, n in enumerate((60, 40)))
    label = lambda z: (z[:, 0] > 0).long() + 2 * (z[:, 1] > 0.5).long()
    want = 1 - KNeighborsClassifier(num_neighbours).fit(train, label(train)).score(test, label(test))
    check_close(knn_error(train, label(train), test, label(test), num_neighbours, chunk=7), want, 1e-12)


def test_reconstruction_error_of_a_linear_model():
    model = Linear()
    _, mean, _ = model.truth(model.x)
    want = ((model.x.numpy() - mean @ model.W.numpy().T - model.b.numpy()) ** 2).sum(1)
    check_close(reconstruction_error(model, model.x), want, 1e-12)


# Bad input

MODEL = Linear()


class NoNoise(Linear):
    def noise_spec(self, batch_size, num_samples=1):
        return {}


@pytest.mark.parametrize(("call", "message"), [
    (lambda: log_likelihood_is(MODEL, torch.zeros(0, D)), r"x must be a tensor \[B, D\] with at least one row, got \[0, 5\]"),
    (lambda: log_likelihood_is(MODEL, MODEL.x[0]), r"x must be a tensor \[B, D\]"),
    (lambda: log_likelihood_is(MODEL, MODEL.x, 0), "num_samples must be at least 1, got 0"),
    (lambda: log_likelihood_is(MODEL, MODEL.x, 4, noise=torch.zeros(4, 2, 2)), r"noise must have shape \[4, 3, K\], got \[4, 2, 2\]"),
    (lambda: log_likelihood_ais(MODEL, MODEL.x, kernel="gibbs"), "kernel must be one of .*, got 'gibbs'"),
    (lambda: log_likelihood_ais(MODEL, MODEL.x, betas=[0, 0.5]), "betas must rise from 0 to 1"),
    (lambda: log_likelihood_ais(NoNoise(), MODEL.x), "num_latents must be given: model.noise_spec has no normal noise"),
    (lambda: quasi_normal(7, 3), r"num_samples must be even and more than 2 \* 3, got 7"),
    (lambda: Calibration(torch.zeros(2, 1), 98).histogram(10), r"num_bins must divide num_draws \+ 1 = 99, got 10"),
    (lambda: posterior_on_grid(None, [0.0, 0, 0], [1.0, 1, 1]), "low and high must be"),
    (lambda: knn_error(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 2), torch.zeros(2), 4), "num_neighbours must be between 1 and 3, got 4"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Rank correlation, and gaps from several starts

def test_rank_correlation_matches_scipy_and_its_error_the_spread_of_repetitions():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 80))
    b = 0.6 * a + rng.standard_normal((200, 80))
    a[0, :10] = a[0, 10:20]  # ties
    got = rank_correlation(torch.from_numpy(a[0]), b[0])
    check_close(got.value, stats.spearmanr(a[0], b[0]).statistic, 1e-12)
    repeated = np.array([rank_correlation(x, y, num_bootstrap=0).value for x, y in zip(a, b, strict=True)])
    check_close(np.mean([rank_correlation(x, y).standard_error for x, y in zip(a[:20], b[:20], strict=True)]),
                repeated.std(ddof=1), rtol=0.25)
    for values, message in ((([1.0, 2.0], [1.0, 2.0]), "at least 3"), (([1.0, 1, 1], [1.0, 2, 3]), "a must be finite and not constant"),
                            (([1.0, 2, 3], [1.0, math.nan, 3]), "b must be finite")):
        with pytest.raises(ValueError, match=message):
            rank_correlation(*map(torch.tensor, values))


def test_gaps_take_the_best_of_several_starts_and_fresh_points():
    """A torn posterior: the search from the far mode ends lower; a start at the better mode wins."""
    class Torn:
        def log_joint(self, x, z):
            modes = torch.stack([-0.5 * ((z - 3) / 0.3).square(), math.log(0.2) - 0.5 * ((z + 3) / 0.3).square()])
            return torch.logsumexp(modes, 0).sum(-1) + 0 * x.sum(-1)
        def posterior(self, x):
            return DiagonalNormal(torch.full((len(x), 1), -3.0).double(), torch.full((len(x), 1), -2.0).double())
    x, model = torch.zeros(5, 2).double(), Torn()
    known = torch.full((5,), math.log(1.2 * 0.3 * math.sqrt(2 * math.pi)), dtype=torch.float64)
    options = {"log_likelihood": known, "num_samples": 32, "num_judged": 512}
    one = inference_gaps(model, x, **options)
    near = lambda rows: [DiagonalNormal(torch.full((len(rows), 1), 2.5).double(), torch.zeros(len(rows), 1).double())]
    two = inference_gaps(model, x, starts=near, **options)
    check_close(one.approximation, torch.full((5,), math.log(6.0)), 1e-3)
    check_close(two.approximation, torch.full((5,), math.log(1.2)), 1e-3)
    check_close(two.amortization - one.amortization, torch.full((5,), math.log(5.0)), 1e-3)
    parts = inference_gaps(model, x, starts=near, chunk=2, **options)
    for got, want in zip(parts, two, strict=True):
        check_close(got, want, 1e-12)
    other = inference_gaps(model, x, posterior=lambda rows: near(rows)[0], **options)
    check_close(other.approximation, two.approximation, 1e-3)
