"""Chapter 5's experiments: the measures they report, against other routes."""

import math

import torch

from dlgm_tutorial import cast
from dlgm_tutorial.analytic_em import exact_elbo, exact_posterior
from dlgm_tutorial.exact_inference import fit_ppca
from dlgm_tutorial.experiments.ch05_analytic_em import (
    auprc,
    auroc,
    judge,
    judge_linear,
    mixture_gap,
    mixture_log_prob,
)


def mixture():
    weight = torch.tensor([[0.3, 0.7]] * 4, dtype=torch.float64)
    loc = torch.tensor([[[-0.5], [0.6]]] * 4, dtype=torch.float64)
    return weight, loc, torch.tensor([[[[0.4]], [[0.2]]]] * 4, dtype=torch.float64)


def test_mixture_log_prob_is_that_of_torch():
    weight, loc, factor = mixture()
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None].expand(5, 4, 1)
    normals = torch.distributions.Normal(loc[..., 0], factor[..., 0, 0])
    want = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weight), normals).log_prob(z[..., 0])
    torch.testing.assert_close(mixture_log_prob(z, weight, loc, factor), want, atol=1e-12, rtol=0)


def test_gap_of_a_mixture_matches_a_grid_and_that_of_one_gaussian_the_exact_bound():
    member = cast.wave()
    decoder, noise_var = member.decoder.requires_grad_(False), member.noise_var
    posterior = exact_posterior(decoder, member.x, noise_var)
    weight, loc, factor = mixture()
    z = torch.linspace(-5, 5, 20_001, dtype=torch.float64)[:, None, None].expand(-1, 4, 1)
    log_q = mixture_log_prob(z, weight, loc, factor)
    want = (torch.exp(log_q) * (log_q - posterior.log_prob(z))).sum(0) * 10 / 20_000
    gap = mixture_gap(decoder, member.x, noise_var, posterior.log_px, weight, loc, factor)
    torch.testing.assert_close(gap, want, atol=1e-5, rtol=1e-6)
    one = mixture_gap(decoder, member.x, noise_var, posterior.log_px, weight[:, :1] * 0 + 1, loc[:, :1], factor[:, :1])
    elbo = exact_elbo(decoder, member.x, noise_var, loc[:, 0], factor[:, 0] ** 2)
    torch.testing.assert_close(one, posterior.log_px - elbo, atol=1e-10, rtol=1e-12)


def test_detection_measures_on_a_case_by_hand():
    inside, outside = [1.0, 2.0, 4.0], [3.0, 5.0]
    assert math.isclose(auroc(inside, outside), 5 / 6)  # of six pairs one is in the wrong order
    assert math.isclose(auprc(inside, outside), (1 + 2 / 3) / 2)  # outsiders come first and third


def test_both_judges_agree_on_an_affine_decoder():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] += 2 * x[:, 0]
    model = fit_ppca(x[:20], 2).model
    affine = [(model.weight.detach(), model.bias.detach())]
    ours = judge(affine, model.noise_var.detach()[0], x[:20], x[20:30], x[30:])
    theirs = judge_linear(model, x[:20], x[20:30], x[30:])
    for key in ("train", "test", "auroc", "auprc", "imputation_mse", "conditional_nll", "noise_var"):
        assert math.isclose(ours[key], theirs[key], abs_tol=1e-10), key
