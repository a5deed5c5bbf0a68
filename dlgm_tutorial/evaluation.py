"""How good is a model, and how good its inference: log-likelihoods with error bars, gaps, calibration, grids.

Everything is per example, in nats. A `model` is anything with the methods used here, which the chapters' models have:
`log_joint(x, z)` -> [S, B] with z [S, B, K], `posterior(x)`, `bound(x, num_samples=)`, `log_likelihood(x)` and
`reconstruct(x)`. Memory is bounded by `chunk`, the number of (sample, example) pairs in flight at once.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch.distributions import transform_to

from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.mcmc import fresh_noise, hmc_step, init, langevin_step, mala_step

__all__ = ["Calibration", "Estimate", "Gaps", "GridPosterior", "RankCorrelation", "estimate", "fit_posterior",
           "inference_gaps", "knn_error", "log_likelihood_ais", "log_likelihood_is", "posterior_on_grid",
           "quasi_normal", "rank_correlation", "reconstruction_error", "simulation_based_calibration"]


class Estimate(NamedTuple):
    """An estimate of log p(x) per example in nats, its standard error, and the effective sample size: [B] each."""

    value: torch.Tensor
    standard_error: torch.Tensor
    ess: torch.Tensor


def _estimate(log_sum, log_sum_of_squares, num):
    ess = torch.exp(2 * log_sum - log_sum_of_squares)
    # The variance of the mean weight, relative to its square (delta method): (S / ESS - 1) / (S - 1).
    error = torch.sqrt((num / ess - 1).clamp(min=0) / (num - 1)) if num > 1 else torch.full_like(log_sum, math.nan)
    return Estimate(log_sum - math.log(num), error, ess)


def estimate(log_w):
    """Estimate log of the mean weight from log-weights log_w [S, B], by the delta method -> Estimate([B], [B], [B]).

    The value is biased down by about half the square of the standard error. Where the weights have no variance
    (a proposal much narrower than the posterior) the error printed means nothing; a tiny ess is the warning.

    >>> estimate(torch.tensor([[0.0], [0.0], [0.0]], dtype=torch.float64)).standard_error
    tensor([0.], dtype=torch.float64)
    """
    log_w = log_w.double()
    return _estimate(torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0), log_w.shape[0])


def _check_data(x):
    if not isinstance(x, torch.Tensor) or x.ndim != 2 or len(x) == 0:
        raise ValueError(f"x must be a tensor [B, D] with at least one row, got {list(getattr(x, 'shape', []))}")


def _check_positive(**counts):
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _draw(q, num, generator):
    return q.rsample((num,)) if generator is None else q.rsample((num,), generator=generator)


@torch.no_grad()
def log_likelihood_is(model, x, num_samples=1000, *, proposal=None, noise=None, generator=None, chunk=None):
    """Estimate log p(x) by importance sampling, log mean_s p(x, z_s) / q(z_s), z_s from the proposal q.

    model: log_joint and, without a proposal, posterior; x: [B, D]; num_samples: S; proposal: maps x [B, D] to a
    distribution over z (default model.posterior); noise: what the proposal's rsample takes, [S, B, K], else drawn, by
    generator for reproducible draws; chunk: pairs in memory at once (default 1,000 on the CPU, where larger arrays fall
    out of its cache, 100,000 on a GPU).
    Returns Estimate in float64, each [B]. A proposal should be wider than the posterior, never narrower.
    """
    _check_data(x)
    if noise is not None and noise.shape[:2] != (num_samples, len(x)):
        raise ValueError(f"noise must have shape [{num_samples}, {len(x)}, K], got {list(noise.shape)}")
    if chunk is None:
        chunk = 1_000 if x.device.type == "cpu" else 100_000
    _check_positive(num_samples=num_samples, chunk=chunk)
    parts, first = [], 0
    for rows in x.split(chunk):
        q = (proposal or model.posterior)(rows)
        log_sum = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=x.device)
        log_sum_of_squares, left = log_sum, num_samples
        while left:
            num, done = min(left, max(1, chunk // len(rows))), num_samples - left
            z = _draw(q, num, generator) if noise is None else q.rsample(
                (num,), noise=noise[done:done + num, first:first + len(rows)])
            log_w = (model.log_joint(rows, z) - q.log_prob(z)).double()
            log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
            log_sum_of_squares = torch.logaddexp(log_sum_of_squares, (2 * log_w).logsumexp(0))
            left -= num
        parts.append(_estimate(log_sum, log_sum_of_squares, num_samples))
        first += len(rows)
    return Estimate(*map(torch.cat, zip(*parts, strict=True)))


KERNELS = {"hmc": hmc_step, "mala": mala_step,
           "langevin": lambda state, noise, **kw: langevin_step(state, noise["normal"], **kw)}


def _anneal(log_base, log_joint, z, betas, kernel, step_sizes, generator, target=None):
    """One annealed run of all chains z [S, B, K] -> (log_w [S, B], step sizes used, one [B] or number a temperature).

    With a target acceptance the step sizes follow it as they go; a run that counts takes the sizes of an earlier one.
    """
    log_w = torch.zeros(z.shape[:-1], dtype=torch.float64, device=z.device)
    used, log_s = [], None if target is None else torch.full(z.shape[1:2], math.log(step_sizes[0])).to(z)
    for k in range(1, len(betas)):
        with torch.no_grad():
            log_w += (betas[k] - betas[k - 1]) * (log_joint(z) - log_base(z)).double()
        if k == len(betas) - 1:
            break
        log_density = lambda z, beta=betas[k]: (1 - beta) * log_base(z) + beta * log_joint(z)
        used.append(step_sizes[k - 1] if target is None else log_s.exp()[:, None])
        state, noise = init(log_density, z), fresh_noise(z, generator)
        (z, _, _), info = kernel(state, noise, log_density=log_density, step_size=used[-1])
        if target is not None:
            log_s = log_s + 0.2 * (info.acceptance.mean(0) - target)
    return log_w, used


def log_likelihood_ais(model, x, num_chains=16, *, num_steps=500, kernel="hmc", step_size=None, num_leapfrog=5,
                       betas=None, base=None, num_latents=None, generator=None, chunk=10_000):
    """Estimate log p(x) by annealed importance sampling: chains that walk from a base q to the posterior.

    The path is q^(1 - beta) p(x, z)^beta; log-weights gather (beta_k - beta_(k-1)) log p(x, z) / q(z) before each step
    (Neal 2001; Wu et al. 2017). E w = p(x), so the estimate is low on average.
    model: log_joint (and `split`, where it takes latents in layers); x: [B, D]; num_chains: S per example; num_steps:
    temperatures, spaced like a sigmoid, or betas: rising from 0 to 1. kernel: "hmc" (num_leapfrog steps), "mala", or
    "langevin", which leaves no temperature invariant and is biased. step_size: as in `mcmc`; None finds one for each
    temperature and example in a run of its own, whose chains are thrown away. base: maps x to a distribution with
    z [S, B, K] (default N(0, I) in num_latents dimensions, else those of model.noise_spec); generator, chunk: as in
    `log_likelihood_is`. Returns Estimate, [B] each.
    """
    _check_data(x)
    _check_positive(num_chains=num_chains, num_steps=num_steps, chunk=chunk)
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {sorted(KERNELS)}, got {kernel!r}")
    if betas is None:
        betas = torch.sigmoid(torch.linspace(-4, 4, num_steps + 1, dtype=torch.float64))
        betas = (betas - betas[0]) / (betas[-1] - betas[0])
    betas = [float(b) for b in betas]
    if betas[0] != 0 or betas[-1] != 1 or any(b <= a for a, b in zip(betas, betas[1:], strict=False)):
        raise ValueError("betas must rise from 0 to 1")
    if base is None:
        if num_latents is None:
            shapes = [shape for kind, shape, _ in model.noise_spec(1).values() if kind == "normal"]
            num_latents = sum(shape[-1] for shape in shapes)
            if not num_latents:
                raise ValueError("num_latents must be given: model.noise_spec has no normal noise to count")
        base = lambda rows: DiagonalNormal(*torch.zeros(2, len(rows), num_latents, dtype=x.dtype, device=x.device))
    step = partial(KERNELS[kernel], num_leapfrog=num_leapfrog) if kernel == "hmc" else KERNELS[kernel]
    split = getattr(model, "split", lambda z: z)
    parts = []
    for rows in x.split(max(1, chunk // num_chains)):
        q = base(rows)
        log_joint = lambda z, rows=rows: model.log_joint(rows, split(z))
        run = partial(_anneal, q.log_prob, log_joint, betas=betas, kernel=step, generator=generator)
        if step_size is None:
            target = 0.8 if kernel == "hmc" else 0.6
            with torch.no_grad():
                z = _draw(q, min(num_chains, 8), generator)
            _, step_sizes = run(z, step_sizes=[0.5], target=target)
        else:
            step_sizes = [step_size] * len(betas)
        with torch.no_grad():
            z = _draw(q, num_chains, generator)
        parts.append(estimate(run(z, step_sizes=step_sizes)[0]))
    return Estimate(*map(torch.cat, zip(*parts, strict=True)))


def quasi_normal(num_samples, num_latents, *, seed=0, dtype=torch.float64, device=None):
    """Spread num_samples points like a standard normal in num_latents dimensions: [S, K].

    A Sobol sequence scrambled with seed, mirrored, and scaled so that its mean is 0 and its covariance I exactly:
    averages of quadratic functions are exact, of smooth ones far better than with random draws. dtype, device: of the
    result. num_samples must be even and more than twice num_latents.
    """
    if num_samples % 2 or num_samples <= 2 * num_latents:
        raise ValueError(f"num_samples must be even and more than 2 * {num_latents}, got {num_samples}")
    sobol = torch.quasirandom.SobolEngine(num_latents, scramble=True, seed=seed)
    half = torch.special.ndtri(sobol.draw(num_samples // 2, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
    factor = torch.linalg.cholesky(half.mT @ half / len(half))
    half = torch.linalg.solve_triangular(factor, half.mT, upper=False).mT
    return torch.cat([half, -half]).to(device, dtype)


def _layers(q):
    """The normals that q is made of: its layers, or itself."""
    return q.layers if hasattr(q, "layers") else (q,)


def _like(q, layers):
    return type(q)(layers, flat=q.flat) if hasattr(q, "layers") else layers[0]


def _points(q, num_samples, seed):
    """Quasi-normal points for all layers of q, one set for every example: [S, 1, K]."""
    loc, num_latents = _layers(q)[0].loc, sum(layer.event_shape[-1] for layer in _layers(q))
    return quasi_normal(num_samples, num_latents, seed=seed, dtype=loc.dtype, device=loc.device)[:, None]


def _elbo(log_joint, q, noise):
    layers = _layers(q)
    z = q.rsample(noise.shape[:1], noise=noise.expand(-1, *layers[0].batch_shape, -1))
    return log_joint(z).mean(0) + sum(layer.entropy() for layer in layers)


def fit_posterior(log_joint, q, *, num_samples=256, num_steps=300, lr=0.1, seed=0):
    """Improve a normal q example by example until its ELBO rises no more: (the best q found, its ELBO [B]).

    log_joint: maps z [S, B, K] to [S, B]; q: one of `distributions`' normals, [B, K], or something with `layers` of
    them (z in tuples): where the search starts, and the family that it stays in. All examples at once: Adam on the
    parameters, num_steps of a rate falling from lr to lr / 1000, on the fixed points of
    `quasi_normal(num_samples, K, seed=seed)`. The answer is never below the start.
    It is found and judged on the same points: many latents ask for many of them, and another seed tells how many.
    """
    # Free parameters, layer by layer: (layer, name, map from the real numbers, value there).
    names = [(layer, name, transform_to(constraint))
             for layer in _layers(q) for name, constraint in layer.arg_constraints.items()]
    free = [t.inv(getattr(layer, name).detach()).clone().requires_grad_() for layer, name, t in names]

    def build(values):
        parts = {}
        for (layer, name, t), value in zip(names, values, strict=True):
            parts.setdefault(layer, {})[name] = t(value)
        return _like(q, [type(layer)(**parameters) for layer, parameters in parts.items()])

    noise = _points(q, num_samples, seed)
    optimizer = torch.optim.Adam(free, lr, betas=(0.9, 0.9))  # exact gradients need no long memory
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-3 ** (1 / num_steps))
    best = _elbo(log_joint, q, noise).detach()
    kept = [value.detach().clone() for value in free]
    for _ in range(num_steps + 1):
        value = _elbo(log_joint, build(free), noise)
        with torch.no_grad():
            better = value > best
            best = torch.where(better, value, best)
            keep = lambda p, old, better=better: torch.where(better.reshape(-1, *[1] * (p.ndim - 1)), p, old)
            kept = list(map(keep, free, kept))
        for p, gradient in zip(free, torch.autograd.grad(-value.sum(), free), strict=True):
            p.grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return build(kept), best


class Gaps(NamedTuple):
    """What separates a bound from log p(x), per example in nats, [B] each; None where a method has no such number.

    log_likelihood - bound = approximation + amortization: what the best member of the family misses, and what the
    recognition model loses to it. kl_to_posterior = KL(q || p(z | x)) of the model's own posterior.
    """

    log_likelihood: torch.Tensor | None = None
    bound: torch.Tensor | None = None
    approximation: torch.Tensor | None = None
    amortization: torch.Tensor | None = None
    kl_to_posterior: torch.Tensor | None = None


def inference_gaps(model, x, *, log_likelihood=None, best_bound=None, num_samples=256, num_steps=300, lr=0.1, seed=0,
                   posterior=None, starts=None, num_judged=None, chunk=None):
    """Split log p(x) - bound into approximation gap and amortization gap -> Gaps, each [B].

    model: posterior, and log_joint or bound; x: [B, D]; log_likelihood: [B] or Estimate (default model.log_likelihood).
    A posterior made of `distributions`' normals is improved by `fit_posterior` (num_samples, num_steps, lr,
    seed), and both bounds are taken at the same points, so that amortization is never negative. For other posteriors
    give best_bound [B], the best of the family by other means (eq-gp-decomposition; Cremer, Li and Duvenaud 2018).

    posterior: maps x to the q whose bound is split (default model.posterior); starts: maps x to a list of further
    normals of q's family from which the search begins too: the best of all ends counts. num_judged: take both bounds
    at so many fresh points instead: with few points for the search, an optimum fits them, and its bound is too high on
    them. chunk: examples at once.
    """
    _check_data(x)
    if chunk is not None:
        _check_positive(chunk=chunk)
        value = getattr(log_likelihood, "value", log_likelihood)
        pick = lambda v, i: None if v is None else v[i:i + chunk]
        parts = [inference_gaps(model, rows, log_likelihood=pick(value, i * chunk), num_samples=num_samples,
                                best_bound=pick(best_bound, i * chunk), num_steps=num_steps, lr=lr, seed=seed,
                                posterior=posterior, starts=starts, num_judged=num_judged)
                 for i, rows in enumerate(x.split(chunk))]
        return Gaps(*(None if v[0] is None else torch.cat(v) for v in zip(*parts, strict=True)))
    with torch.no_grad():
        log_likelihood = model.log_likelihood(x) if log_likelihood is None else log_likelihood
        log_likelihood = getattr(log_likelihood, "value", log_likelihood).to(x.device)
        q = (posterior or model.posterior)(x)
    if all(hasattr(layer, "loc") and hasattr(layer, "kl_to_standard") for layer in _layers(q)):
        log_joint = lambda z: model.log_joint(x, z)
        with torch.no_grad():
            judged = _points(q, num_judged or num_samples, seed + (num_judged is not None))
            bound = _elbo(log_joint, q, judged)
            begin = [q, *(starts(x) if starts else [])]
        kl = log_likelihood - bound
        if best_bound is None:
            found = [fit_posterior(log_joint, one, num_samples=num_samples, num_steps=num_steps, lr=lr, seed=seed)
                     for one in begin]
            with torch.no_grad():
                ends = [value if num_judged is None else _elbo(log_joint, one, judged) for one, value in found]
            best_bound = torch.stack(ends).amax(0)
    else:
        with torch.no_grad():
            bound = model.bound(x, num_samples=num_samples) if hasattr(model, "bound") else None
            kl = None
            if hasattr(q, "log_prob") and hasattr(q, "rsample"):
                z = q.rsample((num_samples,))
                kl = log_likelihood - (model.log_joint(x, z) - q.log_prob(z)).mean(0)
    approximation = None if best_bound is None else log_likelihood - best_bound
    amortization = None if best_bound is None or bound is None else best_bound - bound
    return Gaps(log_likelihood, bound, approximation, amortization, kl)


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation and its bootstrap standard error, numbers."""

    value: float
    standard_error: float


def rank_correlation(a, b, *, num_bootstrap=200, seed=0):
    """Correlate the ranks of a [N] and b [N] (Spearman) -> RankCorrelation, in [-1, 1]; ties get their mean rank.

    num_bootstrap: resamples of the pairs for the standard error; seed: of the resamples.
    Raises ValueError for fewer than three pairs, values that are not finite, or a constant array.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0]), num_bootstrap=0).value
    1.0
    """
    a, b = (np.asarray(v.detach().cpu() if torch.is_tensor(v) else v, float) for v in (a, b))
    if a.ndim != 1 or a.shape != b.shape or len(a) < 3:
        raise ValueError(f"a and b must be arrays [N] of one length of at least 3, got {a.shape} and {b.shape}")
    for name, value in (("a", a), ("b", b)):
        if not np.isfinite(value).all() or np.ptp(value) == 0:
            raise ValueError(f"{name} must be finite and not constant")
    both = np.stack([stats.rankdata(a), stats.rankdata(b)])
    value = float(np.corrcoef(both)[0, 1])
    if num_bootstrap < 2:
        return RankCorrelation(value, math.nan)
    rows = np.random.default_rng(seed).integers(len(a), size=(num_bootstrap, len(a)))
    ranks = stats.rankdata(np.stack([a[rows], b[rows]]), axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(-1).prod(0))
    values = np.divide((ranks[0] * ranks[1]).sum(-1), spread, out=np.zeros(num_bootstrap), where=spread > 0)
    return RankCorrelation(value, float(values.std(ddof=1)))


class Calibration(NamedTuple):
    """Ranks [N, J] of the true statistics among num_draws posterior draws: 0 to num_draws, uniform if right."""

    ranks: torch.Tensor
    num_draws: int

    def histogram(self, num_bins=10):
        """Count ranks in num_bins equal bins, [num_bins, J]; num_bins must divide num_draws + 1."""
        if (self.num_draws + 1) % num_bins:
            raise ValueError(f"num_bins must divide num_draws + 1 = {self.num_draws + 1}, got {num_bins}")
        bins = self.ranks * num_bins // (self.num_draws + 1)
        return torch.stack([(bins == i).sum(0) for i in range(num_bins)])

    def chi_square(self, num_bins=10):
        """Pearson's statistic against uniform ranks and its p-value, [J] each (num_bins - 1 degrees of freedom)."""
        expected = len(self.ranks) / num_bins
        statistic = ((self.histogram(num_bins) - expected).double().square() / expected).sum(0)
        return statistic, torch.as_tensor(stats.chi2.sf(statistic.cpu().numpy(), num_bins - 1))


@torch.no_grad()
def simulation_based_calibration(sample_joint, posterior, num_data=1000, *, num_draws=99, statistic=None,
                                 generator=None, chunk=10_000):
    """Rank the truth among posterior draws, on data from the model itself -> Calibration with ranks [N, J].

    sample_joint: maps (num, generator) to (z [num, K], x [num, D]), drawn from the model; posterior: maps x to a
    distribution or sampler; num_data: N; num_draws: draws for each; statistic: maps (z [S, B, K], x [B, D]) to
    [S, B, J] (default: the coordinates of z); generator, chunk: as in `log_likelihood_is`. Ranks are uniform if the
    posterior is exact (Talts et al. 2018). Choose statistics that depend on the data, such as log p(x | z): the prior,
    for one, passes on the coordinates.
    """
    _check_positive(num_data=num_data, num_draws=num_draws, chunk=chunk)
    statistic = statistic or (lambda z, x: z)
    z_true, x = sample_joint(num_data, generator)
    ranks = []
    for z, rows in zip(*(t.split(max(1, chunk // num_draws)) for t in (z_true, x)), strict=True):
        draws = statistic(_draw(posterior(rows), num_draws, generator), rows)
        ranks.append((draws < statistic(z[None], rows)).sum(0))
    return Calibration(torch.cat(ranks), num_draws)


class GridPosterior(NamedTuple):
    """A posterior on a grid of its own for each example: points [N, B, K], log_prob [N, B], cell volume [B]."""

    points: torch.Tensor
    log_prob: torch.Tensor
    volume: torch.Tensor
    log_evidence: torch.Tensor

    @property
    def mean(self):
        """Posterior mean, [B, K]."""
        return (self.points * self._mass).sum(0)

    @property
    def covariance(self):
        """Posterior covariance, [B, K, K]."""
        delta = self.points - self.mean
        return torch.einsum("nbi,nbj->bij", self._mass * delta, delta)

    @property
    def _mass(self):
        return (self.log_prob.exp() * self.volume)[..., None]


@torch.no_grad()
def posterior_on_grid(log_joint, low, high, num_points=201, *, dtype=torch.float64, device=None, chunk=100_000):
    """Tabulate the posterior by brute force, for one or two latents -> GridPosterior, its log_evidence [B].

    log_joint: maps z [N, 1 or B, K] to [N, B]; low, high: [K], a box that holds every posterior; num_points: along each
    axis. The box shrinks, example by example, to where the density is within exp(-45) of its largest value, until it
    shrinks no more; then the midpoint rule. Errors fall like 1 / num_points^2 with kinks in the decoder, faster
    without. dtype, device: of the grid; chunk: pairs of point and example at once.
    """
    low, high = (torch.as_tensor(v, dtype=dtype, device=device).reshape(1, -1) for v in (low, high))
    num_latents = low.shape[1]
    if num_latents not in (1, 2) or high.shape != low.shape or not bool((low < high).all()):
        raise ValueError("low and high must be [K] with K = 1 or 2 and low < high, "
                         f"got {low[0].tolist()} and {high[0].tolist()}")
    steps = torch.arange(num_points, dtype=dtype, device=device) + 0.5
    unit = torch.cartesian_prod(*[steps / num_points] * num_latents).reshape(-1, 1, num_latents)
    num_data = log_joint(low[None]).shape[1]
    for _ in range(20):
        points = low + (high - low) * unit  # [N, 1 or B, K]
        values = torch.cat([log_joint(part) for part in points.split(max(1, chunk // num_data))])
        points = points.expand(*values.shape, num_latents)
        inside = (values > values.max(0).values - 45)[..., None]
        cell = (high - low) / num_points
        new_low = torch.where(inside, points, torch.inf).amin(0) - 2 * cell
        new_high = torch.where(inside, points, -torch.inf).amax(0) + 2 * cell
        new_low, new_high = torch.maximum(new_low, low), torch.minimum(new_high, high)
        shrinks = ((new_high - new_low) < 0.8 * (high - low)).any(-1)
        if not bool(shrinks.any()):
            break
        low, high = new_low, new_high
    volume = cell.prod(-1).expand(values.shape[1])
    log_evidence = values.logsumexp(0) + volume.log()
    return GridPosterior(points, values - log_evidence, volume, log_evidence)


@torch.no_grad()
def knn_error(train_features, train_labels, test_features, test_labels, num_neighbours=5, *, chunk=1000):
    """Share of test points that the majority of their nearest training points (Euclidean) labels wrongly: a number.

    train_features [N, K], train_labels [N] integers from 0, test_features [M, K], test_labels [M]; num_neighbours: how
    many vote, ties go to the smallest label; chunk: test points at once. Give it posterior means and posterior samples:
    in many dimensions the two tell different stories.
    """
    if not 1 <= num_neighbours <= len(train_features):
        raise ValueError(f"num_neighbours must be between 1 and {len(train_features)}, got {num_neighbours}")
    num_classes, wrong = int(train_labels.max()) + 1, 0
    for rows, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        nearest = torch.cdist(rows, train_features).topk(num_neighbours, largest=False).indices
        votes = torch.nn.functional.one_hot(train_labels[nearest].long(), num_classes).sum(1)
        wrong += int((votes.argmax(1) != labels).sum())
    return wrong / len(test_features)


@torch.no_grad()
def reconstruction_error(model, x, *, num_samples=1, generator=None):
    """Squared distance between x and its reconstruction through the latents, summed over the data dimension: [B].

    model: reconstruct(x, num_samples=, generator=) -> [B, D]; x: [B, D]; num_samples, generator: handed on.
    """
    _check_data(x)
    return (x - model.reconstruct(x, num_samples=num_samples, generator=generator)).square().sum(-1)
