"""Chapter 6's experiments: their figures of merit against closed forms, and one of them run for a few steps."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_close
from dlgm_tutorial.experiments import ch06_short_run_mcmc as ch06
from dlgm_tutorial.short_run_mcmc import MultiLayerGenerator, ShortRunModel


def test_frechet_distance_matches_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)), rng.normal(size=(40, 3)) + 1
    cov = [np.cov(v.T) for v in (a, b)]
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov[0] + cov[1] - 2 * linalg.sqrtm(cov[0] @ cov[1]).real)
    check_close(ch06.frechet(torch.from_numpy(a), torch.from_numpy(b)), want, 1e-9)
    check_close(ch06.frechet(torch.from_numpy(a), torch.from_numpy(a)), 0.0, 1e-9)


def test_shares_of_the_layers_are_those_of_a_linear_model():
    # z_2 ~ N(0, 1), z_1 = 0.9 z_2 + 0.2 e_1, x = 1.5 z_1: the shares of the variance are 0.04 and 0.81 of 0.85.
    generator = MultiLayerGenerator(1, (1, 1), ((), ()), noise_var=0.09)
    with torch.no_grad():
        generator.heads[0][0].weight.copy_(torch.tensor([[0.9], [0.0]]))
        generator.heads[0][0].bias.copy_(torch.tensor([0.0, np.log(np.expm1(0.2 - 1e-3))]))
        generator.readout[0].weight.fill_(1.5)
        generator.readout[0].bias.zero_()
    x = torch.randn(4, 1)
    roles = ch06.layer_roles(ShortRunModel(generator), x, None, x, None, None, 0, num=40_000)
    for role, share in zip(roles, (0.04 / 0.85, 0.81 / 0.85), strict=True):
        check_close([role["alone"], role["total"]], [share, share], 0.03)
        assert "knn_error" not in role  # no labels, no judge


def test_a_run_gives_figures_with_a_curve_and_rows():
    class Run:
        seed, steps = 0, 8

        def fit_options(self, part):
            return {"num_steps": 8, "seed": 0, "device": "cpu", "checkpoint": None, "progress": None}
    torch.manual_seed(0)
    model = ShortRunModel(MultiLayerGenerator(6, (2, 3), 5, noise_var=0.1, output="sigmoid"), num_steps=3)
    data = torch.rand(8, 6)
    figures = ch06.train(Run(), "a", model, data, data, batch_size=4, cap=0.05, num_curvature=4)
    assert figures["updates"] == 8 and figures["epochs"] == 4 and len(figures["curve"]["error"]) == 4
    assert 0 < figures["final_step_size"] <= 0.0501 and len(figures["curve"]["curvature"]) == 4
    judge = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    figures.update(ch06.judged(model, data, judge, 0, num_samples=20, num_ais=2, ais_steps=4))
    row, = ch06.rows_by_method([{"figures": {"judge": {}, "one": figures}}])
    assert row["method"] == "one" and row["updates"] == 8 and row["test_error"] == pytest.approx(figures["test_error"])


def test_an_update_by_a_chain_takes_the_time_of_several_of_a_vae():
    make = lambda: MultiLayerGenerator(60, (5,), 40, noise_var=0.1, output="sigmoid")
    slower = ch06.time_ratio(make, ch06.vae(hidden_dims=40), torch.rand(80, 60), 40, num=10)
    assert 1.5 < slower < 60  # twenty passes against one, plus what both pay besides


def test_the_likelihood_on_the_plane_is_that_of_a_linear_decoder():
    generator = MultiLayerGenerator(decoder=nn.Linear(2, 2), noise_var=0.3)
    x, _ = ch06.moons(0)
    weight, bias = (p.detach().double().numpy() for p in generator.readout.parameters())
    want = oracles.linear_gaussian_evidence(x[:7].double().numpy(), weight, bias, 0.3)
    check_close(ch06.log_likelihood_on_plane(generator, x[:7]), want, 1e-5)
    check_close(x.mean(0), torch.zeros(2), 0.1)
    check_close(x.var(0), torch.ones(2), 0.15)
