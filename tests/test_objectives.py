"""Bounds from log-weights: their limits, their order, and the closed form of a linear-Gaussian model."""

import numpy as np
import pytest
import torch

from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.objectives import elbo, iwae, renyi
from dlgm_tutorial.oracles import log_mean_exp

S, B = 5, 3
LOG_W = 4 * torch.randn(S, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_bounds_by_their_definitions():
    weights = LOG_W.numpy()
    check_close(elbo(LOG_W), weights.mean(0), 1e-14)
    check_close(iwae(LOG_W), log_mean_exp(weights), 1e-13)
    for alpha in (-2.0, 0.5, 2.0, 0.995, 1.003):
        check_close(renyi(LOG_W, alpha), np.log(np.mean(np.exp((1 - alpha) * weights), 0)) / (1 - alpha), 1e-11)


def test_limits_of_renyi():
    assert torch.equal(renyi(LOG_W, 0.0), iwae(LOG_W)) and torch.equal(renyi(LOG_W, 1.0), elbo(LOG_W))
    # Near alpha = 1 the slope is minus half the variance of the log-weights.
    slope = -0.5 * LOG_W.var(0, correction=0)
    check_close((renyi(LOG_W, 1 + 1e-7) - elbo(LOG_W)) / 1e-7, slope, 1e-4)
    check_close(renyi(LOG_W, 1e4), LOG_W.min(0).values, 1e-3)


def test_renyi_falls_as_alpha_rises():
    values = [renyi(LOG_W, alpha) for alpha in (-3, -1, 0, 0.5, 0.985, 0.995, 1, 1.005, 1.02, 2, 5)]
    check_below(torch.stack(values[1:]), torch.stack(values[:-1]), slack=1e-12)


def test_bounds_of_a_linear_gaussian_model_have_the_closed_form_means():
    """Case I of the brief on stochastic backpropagation: x = 1.2 z + noise of variance 0.5, proposal N(0.69, 0.4)."""
    z = 0.6948453608247423 + np.sqrt(0.4) * torch.randn(2, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    normal = torch.distributions.Normal
    log_w = normal(1.2 * z, np.sqrt(0.5)).log_prob(torch.tensor(0.8)) + normal(0, 1).log_prob(z) - normal(0.6948453608247423, np.sqrt(0.4)).log_prob(z)
    check_mc(elbo(log_w), -1.5490587624700247)
    check_mc(iwae(log_w), -1.4642382561733576)
    check_mc(iwae(log_w).exp(), np.exp(-1.4152309733505386))


def test_no_overflow_and_zero_weights():
    log_w = torch.tensor([[1e4, -1e4], [1e4, -torch.inf]])
    check_close(iwae(log_w), [1e4, -1e4 - np.log(2)], 1e-3)
    assert elbo(log_w)[1] == -torch.inf


@pytest.mark.parametrize(("call", "message"), [
    (lambda: iwae(torch.zeros(0, 3)), r"log_w must have shape \[S, B\] with at least one sample, got \[0, 3\]"),
    (lambda: elbo(torch.zeros(())), r"log_w must have shape"),
    (lambda: renyi(LOG_W, float("nan")), "alpha must be a finite number, got nan"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
