"""Likelihoods against SciPy, at extremes, with missing entries, and what they refuse."""

import numpy as np
import pytest
import torch
from mpmath import mp
from scipy import special, stats

from dlgm_tutorial.checks import check_close, check_mc
from dlgm_tutorial.likelihoods import Bernoulli, Gaussian

S, B, D = 5, 3, 7
GENERATOR = torch.Generator().manual_seed(0)
OUTPUT = 3 * torch.randn(S, B, D, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(B, D, generator=GENERATOR, dtype=torch.float64)
PIXELS = (X > 0).double()
OBSERVED = torch.rand(B, D, generator=GENERATOR) > 0.4


def test_bernoulli_matches_scipy():
    probability = special.expit(OUTPUT.numpy())
    check_close(Bernoulli(OUTPUT).log_prob(PIXELS), stats.bernoulli(probability).logpmf(PIXELS.numpy()).sum(-1), 1e-12)
    check_close(Bernoulli(OUTPUT).mean, probability, 1e-15)


def test_bernoulli_keeps_its_digits_for_large_logits():
    """softplus of PyTorch cuts off at 20, where the answer is still 2e-9; log(sigmoid) is -inf far below."""
    logits = torch.tensor([[21.0], [-21.0], [800.0], [-800.0]], dtype=torch.float64, requires_grad=True)
    log_prob = Bernoulli(logits).log_prob(torch.ones(1, dtype=torch.float64))
    check_close(log_prob[:2], [-np.log1p(np.exp(-21)), -21 - np.log1p(np.exp(-21))], rtol=1e-13)
    check_close(log_prob[2:], [0, -800], 1e-300, rtol=1e-13)
    log_prob.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("noise_var", [0.3, torch.linspace(0.1, 2, D, dtype=torch.float64)])
def test_gaussian_matches_scipy(noise_var):
    scale = np.sqrt(np.broadcast_to(np.asarray(noise_var), D))
    check_close(Gaussian(OUTPUT, noise_var).log_prob(X), stats.norm(OUTPUT.numpy(), scale).logpdf(X.numpy()).sum(-1), 1e-11)


@pytest.mark.parametrize(("likelihood", "x"), [(Bernoulli(OUTPUT), PIXELS), (Gaussian(OUTPUT, 0.3), X)])
def test_missing_entries_do_not_count(likelihood, x):
    """An unobserved entry may be anything, NaN included: summing both halves gives the whole."""
    hidden = torch.where(OBSERVED, x, torch.nan)
    parts = likelihood.log_prob(hidden, observed=OBSERVED) + likelihood.log_prob(x, observed=~OBSERVED)
    check_close(parts, likelihood.log_prob(x), 1e-12)


def test_gradient_with_missing_entries_has_no_nan():
    output = OUTPUT.clone().requires_grad_()
    Gaussian(output, 0.3).log_prob(torch.where(OBSERVED, X, torch.nan), observed=OBSERVED).sum().backward()
    assert bool(torch.isfinite(output.grad).all()) and not output.grad[:, ~OBSERVED].any()


def test_samples_follow_the_mean_and_the_noise():
    pixels = Bernoulli(OUTPUT[0].expand(20_000, B, D)).sample(generator=torch.Generator().manual_seed(1))
    check_mc(pixels, Bernoulli(OUTPUT[0]).mean)
    x = Gaussian(OUTPUT[0].expand(20_000, B, D), 0.3).sample(generator=torch.Generator().manual_seed(2))
    check_mc(x, OUTPUT[0])
    check_mc((x - OUTPUT[0]).square(), 0.3)
    noise = torch.full((S, B, D), 0.5, dtype=torch.float64)
    check_close(Gaussian(OUTPUT, 0.25).sample(noise=noise), OUTPUT + 0.25, 1e-15)
    check_close(Bernoulli(OUTPUT).sample(noise=noise), (OUTPUT > 0).double(), 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_arguments(dtype):
    assert Bernoulli(OUTPUT.to(dtype)).log_prob(PIXELS.to(dtype)).dtype == dtype
    assert Gaussian(OUTPUT.to(dtype), 0.3).log_prob(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Bernoulli(OUTPUT).log_prob(255 * PIXELS), "x must be 0 or 1 for a Bernoulli likelihood, got values from 0 to 255: binarise"),
    (lambda: Bernoulli(OUTPUT).log_prob(PIXELS * torch.nan), "x must be 0 or 1"),
    (lambda: Bernoulli(OUTPUT).log_prob(PIXELS[:, :3]), r"x must have 7 entries in its last dimension, as logits has, got shape \[3, 3\]"),
    (lambda: Gaussian(OUTPUT, 0.0), "noise_var must be positive and finite, got a minimum of 0"),
    (lambda: Gaussian(OUTPUT, 1.0).log_prob(X * torch.inf), "x must be finite"),
    (lambda: Gaussian(OUTPUT, 1.0).log_prob(X[:, :1]), "x must have 7 entries"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("pixel", [0.5, -1.0, 2.0, float("nan"), float("inf"), -float("inf"), 1 + 1e-7])
def test_bernoulli_refuses_one_pixel_outside_its_support(pixel):
    x = torch.ones(B, D, dtype=torch.float64)
    x[1, 2] = pixel
    with pytest.raises(ValueError, match="x must be 0 or 1 for a Bernoulli likelihood"):
        Bernoulli(OUTPUT).log_prob(x)


@pytest.mark.parametrize("logit", [-700.0, -50.001, -49.9, -20.1, -1.0, 0.0, 19.9, 36.0, 50.1, 700.0])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_bernoulli_keeps_all_digits_of_a_sure_pixel(logit, pixel):
    """Value and gradient, relative to 1e-15, against 800 digits: also on both sides of a threshold inside."""
    parameter = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    value = Bernoulli(parameter).log_prob(torch.tensor([pixel], dtype=torch.float64))
    value.backward()
    sign = 1 if pixel else -1
    with mp.workdps(800):
        odds = mp.exp(sign * mp.mpf(logit))
        assert abs(value.item() / -mp.log(1 + 1 / odds) - 1) < 1e-15
        assert abs(parameter.grad.item() / (sign / (1 + odds)) - 1) < 1e-15
