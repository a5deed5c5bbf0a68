"""The cast: four decoders and four points of each, trained and chosen here, read by `dlgm_tutorial.cast`.

`line` is the maximum-likelihood line through the data of `wave`, in closed form. `wave` and `digits2` are trained on
the likelihood itself, by a grid over the latents that is shifted at random in each step, so that the decoder cannot
settle between its points. `digits10` has too many latents for a grid: its gradient is taken at posterior samples, from
chains that each training image keeps (Fisher's identity; Gu and Kong 1998). No encoder has a hand in any of them.
"""

import math
from pathlib import Path

import numpy as np
import torch

from dlgm_tutorial import datasets, oracles
from dlgm_tutorial.distributions import FullNormal
from dlgm_tutorial.evaluation import (
    GridPosterior,
    estimate,
    log_likelihood_ais,
    posterior_on_grid,
)
from dlgm_tutorial.likelihoods import Gaussian
from dlgm_tutorial.mcmc import fresh_noise, hmc_step, init
from dlgm_tutorial.networks import initialise, mlp, weights_of
from dlgm_tutorial.reproduce import experiment

DATA = Path(__file__).parents[1] / "data"
LOG_2PI = math.log(2 * math.pi)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def log_prior(z):
    return -0.5 * (z.square() + LOG_2PI).sum(-1)


def log_joint(decoder, noise_var, x, z):
    return Gaussian(decoder(z), noise_var).log_prob(x) + log_prior(z)


# --- Training

def train_on_grid(sizes, x, *, num_points, limit, num_steps, batch_size, noise_var, seed):
    """Fit a decoder to x [N, D] by the likelihood on a grid of num_points an axis, from -limit to limit."""
    decoder = initialise(mlp(sizes, dtype=torch.float64), bias=1.0, generator=seeded(seed))
    log_var = torch.tensor(math.log(noise_var), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*decoder.parameters(), log_var], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator, cell = seeded(seed + 1), 2 * limit / num_points
    axis = -limit + cell * torch.arange(num_points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * sizes[0]).reshape(-1, sizes[0])
    for _ in range(num_steps):
        z = grid + cell * torch.rand(sizes[0], generator=generator, dtype=torch.float64)
        rows = x[torch.randperm(len(x), generator=generator)[:batch_size]]
        f = decoder(z)
        squares = rows.square().sum(1, keepdim=True) - 2 * rows @ f.T + f.square().sum(1)
        log_px = -0.5 * (squares / log_var.exp() + x.shape[1] * (log_var + LOG_2PI)) + log_prior(z)
        loss = -(log_px.logsumexp(1) + sizes[0] * math.log(cell)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return decoder.requires_grad_(False), float(log_var.detach().exp())


def train_with_chains(sizes, x, *, num_chains, num_steps, batch_size, noise_var, step_size, seed):
    """Fit a decoder to x [N, D] at posterior samples: every image keeps num_chains chains, moved when it is used."""
    decoder = initialise(mlp(sizes, dtype=torch.float64), bias=1.0, generator=seeded(seed))
    log_var = torch.tensor(math.log(noise_var), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*decoder.parameters(), log_var], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = seeded(seed + 1)
    chains = torch.randn(num_chains, len(x), sizes[0], generator=generator, dtype=torch.float64)
    for _ in range(num_steps):
        index = torch.randperm(len(x), generator=generator)[:batch_size]
        rows, z = x[index], chains[:, index]
        density = lambda z, rows=rows: log_joint(decoder, log_var.detach().exp(), rows, z)
        state, info = hmc_step(init(density, z), fresh_noise(z, generator), log_density=density, step_size=step_size)
        chains[:, index] = state.z
        step_size *= math.exp(0.05 * (float(info.acceptance.mean()) - 0.8))
        loss = -log_joint(decoder, log_var.exp(), rows, state.z).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return decoder.requires_grad_(False), float(log_var.detach().exp())


# --- Choosing the points

def on_common_grid(decoder, noise_var, x, limit, num_points):
    """Posteriors of all rows of x on one grid, good enough for choosing: GridPosterior."""
    num_latents, cell = decoder[0].in_features, 2 * limit / num_points
    axis = -limit + cell * (torch.arange(num_points, dtype=torch.float64) + 0.5)
    z = torch.cartesian_prod(*[axis] * num_latents).reshape(-1, num_latents)
    f = decoder(z)
    squares = f.square().sum(1, keepdim=True) - 2 * f @ x.T + x.square().sum(1)
    values = -0.5 * (squares / noise_var + x.shape[1] * (math.log(noise_var) + LOG_2PI)) + log_prior(z)[:, None]
    volume = torch.full((len(x),), cell**num_latents, dtype=torch.float64)
    log_evidence = values.logsumexp(0) + volume.log()
    return GridPosterior(z[:, None].expand(-1, len(x), -1), values - log_evidence, volume, log_evidence)


def dip(decoder, noise_var, row, ends):
    """Lowest density on the straight way between two modes, ends [2, K], relative to the lower of them."""
    way = ends[0] + torch.linspace(0, 1, 201, dtype=torch.float64)[:, None, None] * (ends[1] - ends[0])
    values = log_joint(decoder, noise_var, row, way)[:, 0]
    return float((values.min() - torch.minimum(values[0], values[-1])).exp())


def how_torn(decoder, noise_var, x, grid, num_points):
    """Score each example: (smaller share of mass) * (1 - dip) of its highest mode and the best other one, [B]."""
    num_latents = grid.points.shape[-1]
    p = grid.log_prob.T.reshape(-1, 1, *[num_points] * num_latents)
    pool = torch.nn.functional.max_pool1d if num_latents == 1 else torch.nn.functional.max_pool2d
    peak = ((p == pool(p, 5, 1, 2)) & (p > p.amax(tuple(range(1, p.ndim)), keepdim=True) - 5)).flatten(1)
    scores = torch.zeros(len(p), dtype=torch.float64)
    for b in peak.sum(1).gt(1).nonzero()[:, 0]:
        z, where = grid.points[:, b], peak[b].nonzero()[:, 0]
        first, *others = z[where[grid.log_prob[where, b].argsort(descending=True)[:6]]]
        for second in others:  # some are only shoulders of the first
            near_first = (z - first).square().sum(1) < (z - second).square().sum(1)
            share = float(grid.log_prob[near_first, b].exp().sum() * grid.volume[b])
            score = min(share, 1 - share) * (1 - dip(decoder, noise_var, x[b][None], torch.stack([first, second])))
            scores[b] = max(float(scores[b]), score)
    return scores


def skewness(grid):
    """How lopsided each posterior is along the worse of its principal axes: [B], from 0 to 1.

    From quantiles, (q95 + q05 - 2 q50) / (q95 - q05): a speck of mass far away, which would rule the third moment,
    does not count.
    """
    mass = grid.log_prob.exp() * grid.volume
    delta = grid.points - grid.mean
    _, axes = torch.linalg.eigh(torch.einsum("nb,nbi,nbj->bij", mass, delta, delta))
    along, order = torch.einsum("nbi,bij->nbj", delta, axes).sort(0)
    total = mass[..., None].expand_as(along).gather(0, order).cumsum(0)
    low, middle, high = (along.gather(0, (total < level).sum(0, keepdim=True))[0] for level in (0.05, 0.5, 0.95))
    return ((low + high - 2 * middle) / (high - low)).abs().amax(-1)


def strangeness(grid):
    """KL from each posterior to the normal with its mean and covariance, in nats: [B]."""
    mass = grid.log_prob.exp() * grid.volume
    entropy = -(mass * grid.log_prob).sum(0)
    return 0.5 * torch.logdet(2 * math.pi * math.e * grid.covariance) - entropy


def choose(evidence, strange, skew, torn, stranger):
    """Indices of the easy, bent, torn and stranger point, from scores [B] each; the stranger's index is given."""
    plain, typical = torn < 0.01, evidence > evidence.quantile(0.1)
    easy = torch.where(plain & (evidence > evidence.median()), strange, torch.inf).argmin()
    bent = torch.where(plain & typical, skew, -1.0).argmax()
    torn = torch.where(evidence > evidence.quantile(0.02), torn, -1.0).argmax()
    return [int(easy), int(bent), int(torn), int(stranger)]


def exact(decoder, noise_var, x):
    """Evidence and posterior of each row of x by quadrature between the bends, and how far a finer rule moves them."""
    weights = weights_of(decoder)
    num_latents = weights[0][0].shape[1]
    grid = posterior_on_grid(lambda z: log_joint(decoder, noise_var, x, z), [-12.0] * num_latents,
                             [12.0] * num_latents, 301)
    found = {"low": grid.points.amin(0).numpy(), "high": grid.points.amax(0).numpy()}
    rules = ({"num_cells": 36, "num_nodes": 12}, {"num_cells": 40, "num_nodes": 16})
    answers = []
    for rule in rules:
        rows = [oracles.relu_posterior(weights, row.numpy(), noise_var, low, high, **rule)
                for row, low, high in zip(x, found["low"], found["high"], strict=True)]
        answers.append([np.stack(part) for part in zip(*rows, strict=True)])
    coarse, fine = answers
    evidence, mean, cov, third = fine
    return {**found, "log_evidence": evidence, "standard_error": np.zeros(len(x)), "mean": mean, "covariance": cov,
            "converged_to": max(float(np.abs(a - b).max()) for a, b in zip(coarse, fine, strict=True))}


def save(name, decoder, noise_var, x, answers):
    layers = {}
    for i, (W, b) in enumerate(weights_of(decoder)):
        layers |= {f"W{i}": W, f"b{i}": b}
    np.savez_compressed(DATA / f"cast_{name}.npz", noise_var=noise_var, x=x.numpy(), **layers, **answers)


# --- The four

def wave_data():
    draw = lambda num, seed: datasets.wave(num, noise_std=0.3, generator=seeded(seed), dtype=torch.float64)
    return draw(500, 0), draw(1000, 1)


def make_wave(steps):
    train, test = wave_data()
    decoder, noise_var = train_on_grid([1, 16, 16, 2], train, num_points=200, limit=5, num_steps=steps, batch_size=500,
                                       noise_var=0.3, seed=0)
    # The stranger is put where no data are; the others are draws of the wave that the decoder has not seen.
    x = torch.cat([test, torch.tensor([[-1.0, 3.0]], dtype=torch.float64)])
    grid = on_common_grid(decoder, noise_var, x, 6, 1001)
    torn = how_torn(decoder, noise_var, x, grid, 1001)
    x = x[choose(grid.log_evidence, strangeness(grid), skewness(grid), torn, len(test))]
    answers = exact(decoder, noise_var, x)
    save("wave", decoder, noise_var, x, answers)

    # The line: probabilistic PCA with one latent, through the same data and for the same four points.
    values, vectors = np.linalg.eigh(np.cov(train.numpy().T, bias=True))
    line = mlp([1, 2], dtype=torch.float64).requires_grad_(False)
    line[0].weight.copy_(torch.from_numpy(vectors[:, [1]] * np.sqrt(values[1] - values[0]) * np.sign(vectors[0, 1])))
    line[0].bias.copy_(train.mean(0))
    W, b = weights_of(line)[0]
    mean, cov = oracles.linear_gaussian_posterior(x.numpy(), W, b, values[0])
    evidence = oracles.linear_gaussian_evidence(x.numpy(), W, b, values[0])
    reach = 12 * np.sqrt(cov[0, 0])
    save("line", line, float(values[0]), x, {
        "log_evidence": evidence, "standard_error": np.zeros(4), "mean": mean,
        "covariance": np.broadcast_to(cov, (4, 1, 1)), "low": mean - reach, "high": mean + reach, "converged_to": 0.0})
    held_out = oracles.linear_gaussian_evidence(test.numpy(), W, b, values[0]).mean()
    return {"line": {"noise_var": values[0], "test_log_likelihood": held_out},
            "wave": {"noise_var": noise_var, "test_log_likelihood": float(grid.log_evidence[:-1].mean()),
                     "converged_to": answers["converged_to"]}}


def digits(split):
    return datasets.load("digits", split).x.double()


def sideways(x):
    """The stranger among digits, [1, 64]: the seventh image of x, an eight, lying on its side."""
    return torch.rot90(x[6].reshape(8, 8)).reshape(1, 64)


def make_digits2(steps):
    train, test = digits("train"), digits("test")
    decoder, noise_var = train_on_grid([2, 32, 64], train, num_points=48, limit=4.5, num_steps=steps, batch_size=100,
                                       noise_var=0.1, seed=0)
    x = torch.cat([test, sideways(test)])
    grid = on_common_grid(decoder, noise_var, x, 4.5, 121)
    torn = how_torn(decoder, noise_var, x, grid, 121)
    x = x[choose(grid.log_evidence, strangeness(grid), skewness(grid), torn, len(test))]
    answers = exact(decoder, noise_var, x)
    save("digits2", decoder, noise_var, x, answers)
    return {"noise_var": noise_var, "test_log_likelihood": float(grid.log_evidence[:-1].mean()),
            "converged_to": answers["converged_to"]}


class Model:
    """A decoder as `evaluation` wants it."""

    def __init__(self, decoder, noise_var):
        self.decoder, self.noise_var = decoder, noise_var

    def log_joint(self, x, z):
        return log_joint(self.decoder, self.noise_var, x, z)


def posterior_samples(decoder, noise_var, x, *, num_chains, num_steps, seed):
    """Samples of p(z | x) [S, B, K]: HMC along rising temperatures from the prior, then 50 steps at the posterior."""
    generator = seeded(seed)
    z = torch.randn(num_chains, len(x), decoder[0].in_features, generator=generator, dtype=torch.float64)
    log_s = torch.full((len(x), 1), math.log(0.5), dtype=torch.float64)
    for beta in torch.cat([torch.linspace(0, 1, num_steps, dtype=torch.float64) ** 3, torch.ones(50)]):
        density = lambda z, beta=beta: log_prior(z) + beta * Gaussian(decoder(z), noise_var).log_prob(x)
        state, info = hmc_step(init(density, z), fresh_noise(z, generator), log_density=density, step_size=log_s.exp())
        z, log_s = state.z, log_s + 0.2 * (info.acceptance.mean(0)[:, None] - 0.8)
    return z


def climb(decoder, noise_var, x, z, num_steps=600):
    """Gradient ascent from z [S, B, K] to local maxima of the posterior, [S, B, K]."""
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05, betas=(0.9, 0.9))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-5 ** (1 / num_steps))
    for _ in range(num_steps):
        optimizer.zero_grad()
        (-log_joint(decoder, noise_var, x, z).sum()).backward()
        optimizer.step()
        schedule.step()
    return z.detach()


def two_modes(decoder, noise_var, x, tops):
    """The two modes that most climbs tops [S, 1, K] of one posterior ended at: (score as in how_torn, modes [2, K])."""
    ends, counts = [], []
    for z in tops:
        close = [i for i, end in enumerate(ends) if (z - end).norm() < 0.05]
        if close:
            counts[close[0]] += 1
        else:
            ends.append(z)
            counts.append(1)
    order = np.argsort(counts)[::-1]
    best = (0.0, torch.cat([ends[order[0]]] * 2))
    for i in order[1:4]:
        pair = torch.cat([ends[order[0]], ends[i]])
        score = counts[i] / len(tops) * (1 - dip(decoder, noise_var, x, pair))
        if score > best[0]:
            best = (score, pair)
    return best


def from_samples(samples):
    """Posterior samples [S, B, K] as a GridPosterior of equal weights."""
    num = len(samples)
    even = torch.zeros(samples.shape[:2], dtype=torch.float64)
    return GridPosterior(samples, even, torch.full(samples.shape[1:2], 1 / num, dtype=torch.float64), None)


def most_bent(decoder, noise_var, x, least_evidence):
    """Which row of x [B, D] has the most lopsided posterior, of those with hardly a second mode and enough evidence.

    Skewness asks for many samples, so there are two rounds: few chains for every row, then many for the thirty best.
    """
    samples = posterior_samples(decoder, noise_var, x, num_chains=64, num_steps=100, seed=11)
    tops = climb(decoder, noise_var, x, samples[:32], 300)
    torn = torch.tensor([two_modes(decoder, noise_var, x[[i]], tops[:, [i]])[0] for i in range(len(x))])
    best = torch.where(torn < 0.03, skewness(from_samples(samples)), -1.0).argsort(descending=True)[:30]
    many = posterior_samples(decoder, noise_var, x[best], num_chains=400, num_steps=150, seed=12)
    evidence = log_likelihood_ais(Model(decoder, noise_var), x[best], 32, num_steps=100, num_latents=10,
                                  generator=seeded(13)).value
    return int(best[torch.where(evidence > least_evidence, skewness(from_samples(many)), -1.0).argmax()])


def make_digits10(steps):
    train, test = digits("train"), digits("test")
    decoder, noise_var = train_with_chains([10, 32, 64], train, num_chains=1, num_steps=steps, batch_size=150,
                                           noise_var=0.05, step_size=0.1, seed=0)
    candidates = torch.cat([test[:60], sideways(test)])
    samples = posterior_samples(decoder, noise_var, candidates, num_chains=48, num_steps=150, seed=1)
    skew = skewness(from_samples(samples))
    tops = climb(decoder, noise_var, candidates, samples)
    scores = [two_modes(decoder, noise_var, candidates[[i]], tops[:, [i]]) for i in range(len(candidates))]
    torn = torch.tensor([score for score, _ in scores], dtype=torch.float64)
    model = Model(decoder, noise_var)
    coarse = log_likelihood_ais(model, candidates, 32, num_steps=100, num_latents=10, generator=seeded(2)).value
    index = choose(coarse, skew, skew, torn, len(candidates) - 1)
    x = candidates[index]
    # With ten latents a posterior that leans is rare: the bent one is sought in the whole test set.
    x[1] = test[most_bent(decoder, noise_var, test, coarse.quantile(0.1))]
    # Moments from long chains; then annealing, and importance sampling as a second opinion, from a wider normal.
    many = posterior_samples(decoder, noise_var, x, num_chains=600, num_steps=200, seed=3)
    delta = many - many.mean(0)
    cov = torch.einsum("sbi,sbj->bij", delta, delta) / len(many)
    wide = FullNormal(many.mean(0), torch.linalg.cholesky(1.5 * cov))
    ais = log_likelihood_ais(model, x, 600, num_steps=300, base=lambda rows: wide, generator=seeded(4))
    z = wide.rsample((20_000,), generator=seeded(5))
    second = estimate(torch.cat([model.log_joint(x, part) - wide.log_prob(part) for part in z.split(5000)]))
    save("digits10", decoder, noise_var, x, {
        "log_evidence": ais.value.numpy(), "standard_error": ais.standard_error.numpy(), "mean": many.mean(0).numpy(),
        "covariance": cov.numpy(), "low": np.full((4, 10), -np.inf), "high": np.full((4, 10), np.inf),
        "converged_to": np.nan, "modes": scores[index[2]][1].numpy()})
    return {"noise_var": noise_var, "test_log_likelihood_of_60_by_ais": float(coarse[:-1].mean()),
            "ais": ais.value, "ais_standard_error": ais.standard_error, "ais_ess": ais.ess,
            "importance": second.value, "importance_standard_error": second.standard_error,
            "importance_ess": second.ess}


@experiment("00", "cast", hours=0.2, steps=2000)
def cast(run):
    """The four decoders of the book and their four points each, written to dlgm_tutorial/data/cast_*.npz."""
    return {**make_wave(run.steps), "digits2": make_digits2(run.steps), "digits10": make_digits10(3 * run.steps // 2)}
