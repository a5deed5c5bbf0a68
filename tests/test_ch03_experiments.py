"""The helpers of chapter 3's experiments; the experiments themselves are run by their command."""

import math

import numpy as np
import torch

from dlgm_tutorial.checks import check_close
from dlgm_tutorial.evaluation import quasi_normal
from dlgm_tutorial.experiments.ch03_labels import CODES, labelled_rows, negative_objective
from dlgm_tutorial.experiments.ch03_mixture_latents import MixturePriorVAE, digits_rows, weights_used
from dlgm_tutorial.experiments.ch03_portrait import best_mixture, mixture_elbo
from dlgm_tutorial.mixture_latents import MixtureDLGM, MixtureNormal, SemiSupervisedVAE
from dlgm_tutorial.reproduce import experiments


def test_every_row_of_the_tables_has_its_command():
    known = {name for chapter, name in experiments() if chapter == "03"}
    rows = {f"{data}-{model}" for data in ("mnist", "omniglot") for model in ("gaussian", "mixture-3", "dp-17")}
    rows |= {"mnist-equal-compute", "mnist-draws", "mnist-stick-breaking", "mnist-spread-gaussian", "mnist-spread-mixture-5"}
    rows |= {f"mnist-labels-{code}-{percent}" for code in CODES for percent in (10, 5, 1)}
    assert rows | {"digits-bounds", "digits-equal-passes", "digits-labels", "portrait"} <= known


def test_labelled_rows_are_balanced_and_follow_the_seed():
    y = np.arange(500) % 10
    rows = labelled_rows(y, 10, 3)
    assert np.bincount(y[rows]).tolist() == [5] * 10 and len(set(rows)) == 50
    assert (rows == labelled_rows(y, 10, 3)).all() and (rows != labelled_rows(y, 10, 4)).any()
    assert len(labelled_rows(y, 0.1, 0)) == 10  # at least one of each class


def test_training_on_few_labels_averages_to_the_models_objective():
    torch.manual_seed(0)
    model = SemiSupervisedVAE(7, 4, 3, latent="stick_breaking", hidden_dims=(5,)).double()
    x, x_labelled = ((torch.rand(6, 7) < 0.5).double() for _ in range(2))
    y, noise = torch.arange(6) % 3, torch.rand(2, 6, 3).double()
    want = model.objective(x_labelled, y, x, noise=noise[:1], noise_unlabelled=noise[1:])
    check_close(-negative_objective(model, (x, x_labelled, y), noise).mean(), want, 1e-12)


def test_mixture_bound_of_an_exact_posterior_is_the_evidence():
    q = MixtureNormal(torch.tensor([[0.3, 0.7]]).log(), torch.tensor([[[-2.0], [1.0]]]), torch.tensor([[[-1.0], [0.2]]]))
    noise = quasi_normal(64, 1, dtype=torch.float32)
    check_close(mixture_elbo(lambda z: q.log_prob(z) - 3.0, q, noise), [-3.0], 1e-5)
    wrong = MixtureNormal(torch.tensor([[0.5, 0.5]]).log(), q.loc + 0.4, q.log_scale)
    assert mixture_elbo(lambda z: q.log_prob(z) - 3.0, wrong, noise).item() < -3.1


def test_best_mixture_finds_both_bumps_and_never_ends_below_its_start():
    truth = MixtureNormal(torch.tensor([[0.4, 0.6]]).double().log(), torch.tensor([[[-1.5], [1.5]]]).double(),
                          torch.tensor([[[-1.2], [-1.0]]]).double())
    start = MixtureNormal(torch.full((1, 2), -math.log(2)).double(), torch.tensor([[[-0.5], [0.5]]]).double(),
                          torch.zeros(1, 2, 1).double())
    q, found = best_mixture(truth.log_prob, [start], num_points=128, num_steps=200)
    assert -0.02 < found.item() < 1e-6
    check_close(q.log_weights.exp().sort().values, [[0.4, 0.6]], 0.02)
    _, again = best_mixture(truth.log_prob, [truth], num_points=128, num_steps=3)
    assert again.item() > -1e-9


def test_mixture_prior_with_one_gaussian_has_the_density_of_the_mixture():
    torch.manual_seed(0)
    model, other = MixturePriorVAE(7, 2, 3, hidden_dims=(5,)), MixtureDLGM(7, 2, 3, hidden_dims=(5,), prior_loc=torch.tensor([-1.5, 0.0, 1.5])[:, None].expand(3, 2))
    other.decoder = model.decoder
    x, z = torch.zeros(3, 7), torch.randn(5, 3, 2)
    check_close(model.log_joint(x, z), other.log_joint(x, z).detach(), 1e-5)
    with torch.no_grad():  # the bound is the mean log-weight, its entropy in closed form
        bound = model.bound(x, num_samples=20_000, generator=torch.Generator().manual_seed(0))
        q = model.posterior(x)
        z = q.rsample((20_000,), generator=torch.Generator().manual_seed(1))
        check_close(bound, (model.log_joint(x, z) - q.log_prob(z)).mean(0), 0.1)


def test_rows_hold_errors_between_seeds_and_paired_gains():
    cell = lambda nll: {"nll": nll, "bound": -nll - 1, "knn_samples_5": 1.0, "knn_means_5": 1.0, "seconds": 1.0}
    runs = [{"figures": {"first": cell(18.0 + s), "second": cell(17.5 + s)}} for s in (0.0, 0.5)]
    first, second = digits_rows(runs)
    assert first["gain"] is None and second["gain"] == 0.5 and second["gain_error"] == 0
    check_close(first["nll_error"], 0.25, 1e-12)


def test_use_of_the_weights_counts_every_image():
    class Run:
        device = "cpu"
    model = MixtureDLGM(7, 2, 3, hidden_dims=(5,))
    figures = weights_used(model, torch.zeros(11, 7), Run)
    assert sum(figures["largest_weights"]) == 11 and figures["largest_weights"][6] == 11  # one third, at the start
    check_close(figures["weight_entropy"], math.log(3), 1e-6)
