"""Chapter 4's experiments: what judges the methods, on models whose answers are known, and every cell's wiring."""

import numpy as np
import pytest
import torch
from torch import nn

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.experiments import ch04_gp_random_inference as ch04
from dlgm_tutorial.gp_random_inference import AmortizedVAE, RandomInferenceVAE
from dlgm_tutorial.reproduce import Run, experiments

D, K, B = 6, 2, 40


def linear_model(kind=AmortizedVAE, **options):
    torch.manual_seed(0)
    decoder = nn.Linear(K, D)
    return kind(D, K, (5,), decoder=decoder, likelihood="gaussian", noise_var=0.4, **options).double()


def truth(model, x):
    weight, bias = (p.detach().numpy() for p in (model.decoder.weight, model.decoder.bias))
    evidence = oracles.linear_gaussian_evidence(x.numpy(), weight, bias, 0.4)
    precision = np.eye(K) + weight.T @ weight / 0.4
    return evidence, 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])


def test_judge_finds_the_exact_gaps_of_a_linear_decoder():
    model = linear_model()
    x = model.sample(B, generator=torch.Generator().manual_seed(1))
    evidence, approximation = truth(model, x)
    rows = np.arange(B)
    figures, arrays = ch04.judge(model, x, rows, rows[::2], seed=0, sizes=(50, 4000), num_steps=200,
                                num_temperatures=60)
    check_close(arrays["log_likelihood"], evidence[::2], 0.15)
    exact = np.array([evidence[n] - oracles.linear_gaussian_bound(
        x[n].numpy(), model.decoder.weight.detach().numpy(), model.decoder.bias.detach().numpy(), 0.4,
        *(lambda m, v: (m[n].numpy(), np.diag(v[n].exp().numpy())))(*(t.detach() for t in model.encode(x))))
        for n in rows[::2]])
    check_close(arrays["amortization"], exact - approximation, 5e-3)  # both bounds on the same quasi-random points
    assert figures["num_gaps"] == 20 and set(figures["importance"]) == {"own, 50", "own, 4000", "wider, 50", "wider, 4000"}
    check_below(figures["iw_50"], figures["iw_4000"], slack=0.1)
    assert figures["num_ais"] == B  # fewer rows than it may anneal: all of them
    check_close(figures["ais"], evidence.mean(), 5 * figures["ais_minus_iw_se"] + 0.02)
    check_close(figures["iw_same"], figures["iw_4000"], 1e-9)
    check_close(figures["ais_minus_iw"], figures["ais"] - figures["iw_same"], 1e-9)
    assert set(figures["rank_correlation"]) >= {"minus bound", "distance to the mean", "reconstruction error", "norm"}


def test_judged_random_encoder_keeps_its_three_bounds_apart():
    model = linear_model(RandomInferenceVAE, num_data=B, initial_log_var=-1.0)
    x = model.sample(B, generator=torch.Generator().manual_seed(1))
    bounds = ch04.Judged(model, 0).bounds(x, num_samples=4000)
    with torch.no_grad():
        information = model.posterior(x).mutual_information()
        law = model.encoder(x)
    check_close((bounds["bound"] - bounds["average_bound"]).mean(), information.mean(), 0.05)
    precision = 1 + model.decoder.weight.detach().square().sum(0) / 0.4
    cost = 0.5 * law.var_f @ precision  # and the log-variance's: Lambda e^mean_g (e^(var_g / 2) - 1) / 2
    cost = cost + 0.5 * (law.mean_g.exp() * torch.expm1(0.5 * law.var_g)) @ precision
    check_close((bounds["mean_bound"] - bounds["average_bound"]).mean(), cost.mean(), 0.05)
    found = ch04.signals(model, ch04.Judged(model, 0), x, x.mean(0))
    check_close(found["uncertainty, nats"], model.uncertainty(x), 1e-15)
    pictures = ch04.sorted_images(model, x.clamp(0, 1), num=3)
    assert pictures["easy"].shape == (3, D) and pictures["hard"].dtype == torch.uint8


@pytest.mark.parametrize("method", ch04.METHODS)
def test_every_method_trains_and_is_judged(method):
    torch.manual_seed(0)
    data = (torch.rand(100, D) < 0.4).float()
    title, make, _ = ch04.METHODS[method]
    model = make(D, K, (5,), num_data=100)
    run = Run("04-test", 0, 8, torch.device("cpu"))
    figures = {title: ch04.train(run, method, method, model, data, data[:20], batch_size=25)}
    assert figures[title]["epochs"] == 2 and figures[title]["updates"] == 8
    rows = np.arange(16)
    judged, arrays = ch04.judge(model, data[:20], rows, rows[::2], seed=0, train_x=data, sizes=(5, 2000), num_steps=5,
                                num_ais=2, num_temperatures=3)
    figures[title] |= judged
    gap = arrays["total_gap"]
    check_mc(gap.numpy(), float(gap.mean()), standard_error=None)
    assert torch.isfinite(gap).all() and judged["seconds_per_batch"] > 0
    row, = ch04.rows_by_method([{"figures": figures}])
    assert row["method"] == title and row["epochs"] == 2 and row["seeds"] == 1
    assert (row["uncertainty, nats"] is None) == (method not in ("random", "random-30"))


def test_every_cell_is_a_command():
    known = experiments()
    for name, latent, method in ch04.CELLS:
        entry = known["04", f"{name}-{latent}-{method}"]
        assert entry.steps == ch04.STEPS[name] and str(latent) in entry.title


def test_a_cell_runs_from_data_to_row(monkeypatch):
    torch.manual_seed(0)
    image = lambda num: (torch.rand(num, 784) < 0.2).float()
    monkeypatch.setattr(ch04, "image_parts", lambda run, name: ((image(256), image(20), image(40)), None, {}))
    real = ch04.judge
    monkeypatch.setattr(ch04, "judge", lambda *a, **k: real(*a, **k, sizes=(2, 4), num_steps=2, num_temperatures=2))
    run = Run("04-test", 0, 2, torch.device("cpu"))
    figures, arrays = ch04.image_cell("mnist", 10, "random")(run)
    assert list(figures) == ["random encoder"] and arrays["hard"].shape == (16, 784)
