"""The helpers of chapter 1's experiment: masses of cells and the logistic model, against quadrature."""

import math

import numpy as np
import torch
from scipy.stats import norm

from dlgm_tutorial.checks import check_close, check_mc
from dlgm_tutorial.evaluation import log_likelihood_is
from dlgm_tutorial.exact_inference import LinearGaussian
from dlgm_tutorial.experiments.ch01_factor_analysis import LogisticFactorAnalysis, half_error, probit_mass

D, B = 4, 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_grid(log_likelihood):
    """log of the integral of N(z | 0, 1) exp(log_likelihood(z)) over one latent; log_likelihood: [N] -> [N, B]."""
    z = np.linspace(-9, 9, 3001)
    terms = log_likelihood(z) + norm.logpdf(z)[:, None]
    return np.log(np.exp(terms).sum(0) * (z[1] - z[0]))


def test_mass_of_a_cell_matches_the_grid():
    model = LinearGaussian(draw(D, 1), 0.5 + 0.2 * draw(D, seed=1), 0.3)
    x = (draw(B, D, seed=2) > 0).double()
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    margin = lambda z: (z[:, None, None] * weight[:, 0] + bias - 0.5) / math.sqrt(0.3) * (2 * x.numpy() - 1)
    want = on_grid(lambda z: norm.logcdf(margin(z)).sum(-1))
    with torch.no_grad():
        got = probit_mass(model, x, 20_000, torch.Generator().manual_seed(3), widen=2.0)
    check_mc(got.value, want, standard_error=got.standard_error)


def test_masses_of_all_binary_pictures_add_up_to_one():
    model = LinearGaussian(draw(D, 1), 0.5 + 0.2 * draw(D, seed=1), 0.3)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * D)
    with torch.no_grad():
        got = probit_mass(model, x, 20_000, torch.Generator().manual_seed(3), widen=2.0)
    mass = got.value.exp()
    check_mc(mass.sum(), 1.0, standard_error=(mass * got.standard_error).square().sum().sqrt())


def test_logistic_factor_analysis_matches_the_grid():
    torch.manual_seed(0)
    model = LogisticFactorAnalysis(D, 1, torch.tensor([0.2, 0.4, 0.6, 0.7]), num_hidden=5).double()
    x = (draw(B, D, seed=2) > 0).double()
    weight, bias = model.decoder.weight.detach().numpy(), model.decoder.bias.detach().numpy()
    logits = lambda z: (z[:, None, None] * weight[:, 0] + bias) * (2 * x.numpy() - 1)
    want = on_grid(lambda z: -np.log1p(np.exp(-logits(z))).sum(-1))
    with torch.no_grad():
        got = log_likelihood_is(model, x, 20_000, generator=torch.Generator().manual_seed(1))
        bounds = model.bound(x, num_samples=20_000, noise=draw(20_000, B, 1, seed=4))
    check_mc(got.value, want, standard_error=got.standard_error)
    assert (bounds.numpy() < want).all()


def test_half_error_is_that_of_the_lower_half():
    x = draw(B, D, seed=5)
    model = LinearGaussian(torch.zeros(D, 1, dtype=torch.float64), draw(D, seed=6), 1.0)
    with torch.no_grad():
        got = half_error(model, x)
    want = np.sqrt(((x - model.bias)[:, 2:] ** 2).mean().item())
    check_close(got, [want, want], 1e-12)
