"""The cast keeps what it promises: small frozen decoders, exact answers, and four points with the stated posteriors."""

import numpy as np
import pytest
import torch

from dlgm_tutorial import cast, oracles
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.evaluation import log_likelihood_ais
from dlgm_tutorial.experiments import ch00_cast

EXACT = ("line", "wave", "digits2")
EASY, BENT, TORN, STRANGER = range(4)
SHAPES = {"line": (1, 2), "wave": (1, 2), "digits2": (2, 64), "digits10": (10, 64)}
each = pytest.mark.parametrize("name", cast.NAMES)
curved = pytest.mark.parametrize("name", ["wave", "digits2"])


@each
def test_decoders_are_small_frozen_and_the_same_in_torch_and_numpy(name):
    member, (K, D) = cast.load(name), SHAPES[name]
    assert isinstance(member, cast.Member)
    assert member.x.shape == (4, D) and member.num_latents == K and tuple(member.points) == cast.POINTS
    assert sum(len(b) for _, b in member.weights[:-1]) <= 32
    assert not any(p.requires_grad for p in member.decoder.parameters())
    z = torch.randn(5, 3, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check_close(member.decoder(z), oracles.relu_decoder(member.weights, z.numpy()), 1e-12)
    assert getattr(cast, name)().noise_var == member.noise_var > 0
    for i, point in enumerate(cast.POINTS):
        assert torch.equal(member.points[point], member.x[i])


def test_line_is_closed_form():
    line = cast.line()
    W, b = line.weights[0]
    mean, cov = oracles.linear_gaussian_posterior(line.x.numpy(), W, b, line.noise_var)
    check_close(line.log_evidence, oracles.linear_gaussian_evidence(line.x.numpy(), W, b, line.noise_var), 1e-12)
    check_close(line.mean, mean, 1e-12)
    check_close(line.covariance, np.broadcast_to(cov, (4, 1, 1)), 1e-12)
    assert torch.equal(line.x, cast.wave().x)


def test_line_is_the_best_line():
    """Its likelihood on the training data falls in every direction of its parameters."""
    train, _ = ch00_cast.wave_data()
    (W, b), noise_var = cast.line().weights[0], cast.line().noise_var
    value = lambda p: oracles.linear_gaussian_evidence(train.numpy(), p[:2, None], p[2:4], p[4]).mean()
    check_close(oracles.finite_difference(value, np.concatenate([W[:, 0], b, [noise_var]]), 1e-5), np.zeros(5), 1e-7)


@pytest.mark.parametrize(("name", "rule"), [("wave", {"num_cells": 50, "num_nodes": 8}), ("digits2", {"num_cells": 24, "num_nodes": 10})])
def test_stored_answers_are_the_quadrature_at_another_rule(name, rule):
    member = cast.load(name)
    assert member.converged_to < 1e-9
    for i in range(4):
        evidence, mean, cov, _ = oracles.relu_posterior(member.weights, member.x[i].numpy(), member.noise_var,
                                                        member.low[i].numpy(), member.high[i].numpy(), **rule)
        tolerance = 1e-11 if name == "wave" else 1e-6  # a coarser rule, to save time
        check_close(member.log_evidence[i], evidence, tolerance)
        check_close(member.mean[i], mean, tolerance)
        check_close(member.covariance[i], cov, tolerance)


@pytest.mark.parametrize("name", EXACT)
def test_the_grid_agrees_to_its_own_accuracy(name):
    member = cast.load(name)
    grid = member.posterior_grid()
    check_close(grid.log_evidence, member.log_evidence, 3e-3)
    check_close(grid.mean, member.mean, 3e-3)
    check_close(grid.covariance, member.covariance, 3e-3)


def modes(grid, i, num_points, num_latents):
    """The local maxima of a gridded density, highest first."""
    p = grid.log_prob[:, i].reshape([num_points] * num_latents)
    padded = torch.nn.functional.pad(p, [1] * (2 * num_latents), value=-torch.inf)
    shifts = [tuple(s - 1 for s in shift) for shift in np.ndindex(*[3] * num_latents)]
    higher = [torch.roll(padded, shift, tuple(range(num_latents)))[(slice(1, -1),) * num_latents]
              for shift in shifts if any(shift)]
    peak = (p > torch.stack(higher).amax(0)).flatten()
    return grid.points[peak, i][grid.log_prob[peak, i].argsort(descending=True)]


def dip(member, row, first, second):
    way = first + torch.linspace(0, 1, 301, dtype=torch.float64)[:, None, None] * (second - first)
    values = member.log_joint(row[None], way)[:, 0]
    return float((values.min() - torch.minimum(values[0], values[-1])).exp())


@curved
def test_the_torn_point_has_two_modes(name):
    member = cast.load(name)
    num_points = 2001 if member.num_latents == 1 else 201
    grid = member.posterior_grid(num_points)
    first, *others = modes(grid, TORN, num_points, member.num_latents)
    apart = [other for other in others if dip(member, member.x[TORN], first, other) < 0.5]
    assert apart, "no second mode behind a valley"
    z, mass = grid.points[:, TORN], grid.log_prob[:, TORN].exp() * grid.volume[TORN]
    share = [float(mass[(z - other).norm(dim=1) < (z - first).norm(dim=1)].sum()) for other in apart]
    assert max(min(s, 1 - s) for s in share) > 0.2


def test_the_torn_point_of_digits10_has_two_modes():
    member = cast.digits10()
    first, second = member.modes
    assert dip(member, member.x[TORN], first, second) < 0.5
    generator = torch.Generator().manual_seed(0)
    for mode in member.modes:  # nowhere near it is higher
        near = mode + 1e-3 * torch.randn(500, 1, 10, generator=generator, dtype=torch.float64)
        assert bool((member.log_joint(member.x[[TORN]], near) < member.log_joint(member.x[[TORN]], mode[None, None])).all())
    samples = ch00_cast.posterior_samples(member.decoder, member.noise_var, member.x[[TORN]], num_chains=200, num_steps=60, seed=9)[:, 0]
    near_first = torch.cdist(samples, member.modes).argmin(1) == 0
    assert 0.2 < near_first.double().mean() < 0.8


def third_moment(grid, i):
    """Skewness along the principal axis with the largest skewness, from the grid."""
    mass, delta = grid.log_prob[:, i].exp() * grid.volume[i], grid.points[:, i] - grid.mean[i]
    values, axes = torch.linalg.eigh(grid.covariance[i])
    return float((mass[:, None] * (delta @ axes / values.sqrt()) ** 3).sum(0).abs().max())


def strangeness(grid, i):
    """KL from the posterior to the normal of its moments, in nats."""
    entropy = -(grid.log_prob[:, i].exp() * grid.volume[i] * grid.log_prob[:, i]).sum()
    return float(0.5 * torch.logdet(2 * np.pi * np.e * grid.covariance[i]) - entropy)


@curved
def test_the_bent_point_is_skewed_and_the_easy_one_is_nearly_normal(name):
    grid = cast.load(name).posterior_grid()
    assert third_moment(grid, BENT) > 0.5 > 2 * third_moment(grid, EASY)
    assert strangeness(grid, EASY) < 0.02 < strangeness(grid, BENT)


def test_the_bent_point_of_digits10_is_skewed_and_the_easy_one_is_not():
    """Quantiles of fresh samples along the principal axes: the far one lies further from the median than the near one."""
    member = cast.digits10()
    samples = ch00_cast.posterior_samples(member.decoder, member.noise_var, member.x[[EASY, BENT]], num_chains=1000, num_steps=80, seed=7)
    lean = []
    for z in samples.transpose(0, 1).numpy():
        axes = np.linalg.svd(z - z.mean(0), full_matrices=False)[2]
        low, middle, high = np.quantile(z @ axes.T, [0.05, 0.5, 0.95], axis=0)
        lean.append(np.max(np.abs(low + high - 2 * middle) / (high - low)))
    assert lean[0] < 0.15 < 0.3 < lean[1]


@each
def test_the_stranger_is_far_from_the_model(name):
    evidence = cast.load(name).log_evidence
    check_below(evidence[STRANGER], evidence[:STRANGER].min() - 5)


def test_evidence_of_digits10_is_confirmed_by_another_annealing():
    member = cast.digits10()
    assert bool((member.standard_error < 0.1).all())
    again = log_likelihood_ais(member, member.x, 48, num_steps=120, num_latents=10, generator=torch.Generator().manual_seed(11))
    check_mc(again.value, member.log_evidence, standard_error=torch.hypot(again.standard_error, member.standard_error))


# The making

def test_training_on_the_grid_raises_the_likelihood_and_repeats_itself():
    train, _ = ch00_cast.wave_data()
    fit = lambda steps: ch00_cast.train_on_grid([1, 4, 2], train, num_points=60, limit=5, num_steps=steps, batch_size=100, noise_var=0.3, seed=0)
    value = lambda decoder, noise_var: float(ch00_cast.on_common_grid(decoder, noise_var, train, 5, 200).log_evidence.mean())
    assert value(*fit(60)) > value(*fit(1)) + 0.3
    (first, first_var), (second, second_var) = fit(5), fit(5)
    assert first_var == second_var
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_training_with_chains_raises_the_likelihood():
    train, _ = ch00_cast.wave_data()
    fit = lambda steps: ch00_cast.train_with_chains([1, 4, 2], train, num_chains=2, num_steps=steps, batch_size=100, noise_var=0.3, step_size=0.3, seed=0)[:2]
    value = lambda decoder, noise_var: float(ch00_cast.on_common_grid(decoder, noise_var, train, 5, 200).log_evidence.mean())
    assert value(*fit(100)) > value(*fit(1)) + 0.3


@pytest.mark.parametrize(("call", "message"), [
    (lambda: cast.load("circle"), "name must be one of line, wave, digits2, digits10, got 'circle'"),
    (lambda: cast.digits10().posterior_grid(), "digits10 has 10 latents: its posteriors fit no grid"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
