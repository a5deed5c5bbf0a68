"""The linear-Gaussian model against dense algebra, conditioning, finite differences, scikit-learn and limiting cases."""

from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from autograd import grad
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, FactorAnalysis

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_close, check_mc
from dlgm_tutorial.exact_inference import (
    EMResult,
    LinearGaussian,
    Selection,
    em_step,
    fit_factor_analysis,
    fit_ppca,
    select_num_latents,
)
from dlgm_tutorial.scratch import exact_inference as scratch

B, S, D, K = 3, 5, 7, 2
GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
noises = pytest.mark.parametrize("noise", ["number", "vector"])


def draw(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def build(noise="vector", device="cpu", dtype=torch.float64):
    noise_var = draw(D, seed=2).exp() if noise == "vector" else torch.tensor(0.3, dtype=torch.float64)
    return LinearGaussian(draw(D, K, dtype=dtype, device=device), draw(D, seed=1, dtype=dtype, device=device), noise_var)


def arrays(model):
    return [part.detach().cpu().numpy() for part in (model.weight, model.bias, model.noise_var)]


def data(num=B, seed=3, **kind):
    return 2 * draw(num, D, seed=seed, **kind)


MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()


# --- Inference

@devices
@noises
def test_posterior_and_evidence_match_dense_algebra(noise, device):
    model, x = build(noise, device), data(device=device)
    mean, cov = oracles.linear_gaussian_posterior(x.cpu().numpy(), *arrays(model))
    posterior = model.posterior(x)
    check_close(posterior.mean, mean, 1e-12, "eq-ei-posterior")
    check_close(posterior.covariance_matrix, np.stack([cov] * B), 1e-12, "eq-ei-posterior")
    want = oracles.linear_gaussian_evidence(x.cpu().numpy(), *arrays(model))
    estimate = model.log_likelihood(x)
    check_close(estimate.value, want, 1e-11, "eq-ei-evidence")
    check_close(model.bound(x), want, 1e-11, "eq-ei-evidence")
    assert estimate.standard_error.tolist() == [0.0] * B and estimate.value.device.type == device
    check_close(model.covariance(), arrays(model)[0] @ arrays(model)[0].T + np.diag(arrays(model)[2]), 1e-13)


@devices
@noises
def test_rows_with_different_masks_match_the_marginal_of_what_was_seen(noise, device):
    model, x = build(noise, device), data(device=device)
    weight, bias, noise_var = arrays(model)
    seen = torch.where(MASK.to(device), x, torch.nan)
    got, posterior = model.log_likelihood(seen, observed=MASK.to(device)).value, model.posterior(seen, MASK.to(device))
    filled, variance = model.impute(seen, MASK.to(device))
    cov = weight @ weight.T + np.diag(noise_var)
    for b in range(B):
        o = np.flatnonzero(MASK[b].numpy())
        row = x[b].cpu().numpy()
        if len(o) == 0:
            evidence, mean, cov_z, rest, cov_rest = 0.0, np.zeros(K), np.eye(K), bias, cov
        else:
            evidence = oracles.gaussian_log_density(row[o], bias[o], cov[np.ix_(o, o)])
            mean, cov_z = oracles.linear_gaussian_posterior(row[o], weight[o], bias[o], noise_var[o])
            rest, cov_rest = oracles.condition_gaussian(bias, cov, o, row[o])
        check_close(got[b], evidence, 1e-11, "eq-ei-missing")
        check_close(posterior.mean[b], mean.reshape(K), 1e-12, "eq-ei-missing")
        check_close(posterior.covariance_matrix[b], cov_z, 1e-12, "eq-ei-missing")
        if len(o) < D:
            missing = ~MASK[b].numpy()
            check_close(filled[b][missing], rest, 1e-12, "eq-ei-missing")
            check_close(variance[b][missing], np.diag(cov_rest), 1e-12, "eq-ei-missing")
        assert torch.equal(filled[b][MASK[b]], x[b][MASK[b]]) and not variance[b][MASK[b]].any()


def test_one_mask_for_all_is_the_same_as_one_for_each():
    model, x = build(), data()
    one, each = model.log_likelihood(x, observed=MASK[0]), model.log_likelihood(x, observed=MASK[0].expand(B, D))
    assert torch.equal(one.value, each.value)
    full = torch.ones(D, dtype=torch.bool)
    check_close(model.log_likelihood(x, observed=full).value, model.log_likelihood(x).value, 1e-12)
    check_close(model.reconstruct(x, observed=full), model.reconstruct(x), 1e-12)


def test_chunks_do_not_change_the_answer():
    model, x = build(), data(11)
    mask = draw(11, D, seed=5) > 0
    for observed in (None, mask):
        whole = model.log_likelihood(x, observed=observed).value
        check_close(model.log_likelihood(x, observed=observed, chunk=4).value, whole, 1e-13)


def test_evidence_is_joint_over_posterior_at_any_latent():
    model, x, z = build(), data(), draw(S, B, K, seed=6)
    for observed in (None, MASK):
        ratio = model.log_joint(x, z, observed=observed) - model.posterior(x, observed).log_prob(z)
        want = model.log_likelihood(x, observed=observed).value
        check_close(ratio, want.expand(S, B), 1e-11, "eq-ei-evidence")


def test_evidence_integrates_the_joint():
    model = LinearGaussian(draw(D, 1), draw(D, seed=1), 0.5)
    log_joint = lambda z: model.log_joint(data(1), torch.as_tensor(z)[:, None]).detach().numpy()[:, 0]
    want = oracles.grid_posterior(log_joint, -9, 9, 2001)[0]
    check_close(model.log_likelihood(data(1)).value, [want], 1e-11, "eq-ei-evidence")


def test_evidence_keeps_its_digits_at_small_noise():
    """r^T Psi^-1 r minus its explained part would lose them: both are of order 1e8 here."""
    weight, bias, noise_var = draw(D, K), draw(D, seed=1), torch.full((D,), 1e-8, dtype=torch.float64)
    x = draw(B, K, seed=3) @ weight.T + bias + 1e-4 * draw(B, D, seed=4)
    with mpmath.workdps(60):
        w = mpmath.matrix(weight.tolist())
        cov = w * w.T + mpmath.diag([mpmath.mpf(v) for v in noise_var.tolist()])
        want = []
        for row in x - bias:
            r = mpmath.matrix(row.tolist())
            square = (r.T * mpmath.lu_solve(cov, r))[0]
            want.append(float(-0.5 * (square + mpmath.log(mpmath.det(cov)) + D * mpmath.log(2 * mpmath.pi))))
    check_close(LinearGaussian(weight, bias, noise_var).log_likelihood(x).value, want, 1e-6, "eq-ei-evidence")


@pytest.mark.parametrize("which", ["weight", "bias", "log_noise_var"])
@noises
def test_gradient_of_the_evidence_matches_finite_differences(which, noise):
    model, x = build(noise), data()
    for observed in (None, MASK):
        model.zero_grad()
        model.bound(x, observed=observed).sum().backward()
        parameter = getattr(model, which) if which == "log_noise_var" else getattr(model.decoder, which)
        gradient, start = parameter.grad.numpy().copy(), parameter.detach().clone()

        def total(value, parameter=parameter, observed=observed):
            parameter.data.copy_(torch.as_tensor(value))
            return model.bound(x, observed=observed).sum().item()
        check_close(gradient, oracles.finite_difference(total, start.numpy()), 1e-6, "eq-ei-gradient")
        parameter.data.copy_(start)


def test_gradient_with_nan_where_nothing_was_seen_is_finite():
    model = build()
    model.bound(torch.where(MASK, data(), torch.nan), observed=MASK).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_elbo_is_the_evidence_minus_the_kl_by_dense_algebra():
    model, x = build(), data()
    loc, root = draw(B, K, seed=4), draw(B, K, K, seed=5)
    cov = root @ root.mT + 0.1 * torch.eye(K, dtype=torch.float64)
    for observed in (None, MASK):
        p = model.posterior(x, observed)
        kl = [oracles.gaussian_kl(*(part.detach().numpy() for part in parts))
              for parts in zip(loc, cov, p.mean, p.covariance_matrix, strict=True)]
        want = model.log_likelihood(x, observed=observed).value.detach().numpy() - kl
        check_close(model.elbo(x, loc, cov, observed), want, 1e-10, "eq-ei-elbo-closed")
        at_posterior = model.elbo(x, p.mean, p.covariance_matrix, observed)
        check_close(at_posterior, model.log_likelihood(x, observed=observed).value, 1e-11, "eq-ei-elbo-closed")


def test_elbo_is_the_mean_of_log_joint_minus_log_q():
    model, x = build(), data()
    q = model.mean_field(x)
    z = q.rsample((20_000,))
    draws = model.log_joint(x, z) - q.log_prob(z)
    check_mc(draws, model.elbo(x, q.mean, torch.diag_embed(q.variance)), "eq-ei-elbo-closed")


def test_mean_field_gap_is_the_kl_and_no_diagonal_does_better():
    model, x = build(), data()
    for observed in (None, MASK):
        q, p = model.mean_field(x, observed), model.posterior(x, observed)
        kl = [oracles.gaussian_kl(m.detach().numpy(), np.diag(v.detach().numpy()), n.detach().numpy(), c.detach().numpy())
              for m, v, n, c in zip(q.mean, q.variance, p.mean, p.covariance_matrix, strict=True)]
        gap = model.mean_field_gap(x, observed)
        check_close(gap, kl, 1e-12, "eq-ei-mean-field-gap")
        best = model.elbo(x, q.mean, torch.diag_embed(q.variance), observed)
        for seed in range(20):
            other = model.elbo(x, q.mean + 0.1 * draw(B, K, seed=seed),
                               torch.diag_embed(q.variance * (0.1 * draw(B, K, seed=50 + seed)).exp()), observed)
            assert (other < best).all()


def test_reconstruction_is_the_mean_of_decoded_posterior_samples():
    model, x = build(), data()
    draws = model.decoder(model.posterior(x).rsample((20_000,)))
    check_mc(draws, model.reconstruct(x))


def test_samples_have_the_mean_and_covariance_of_the_model():
    model = build()
    x = model.sample(50_000, generator=torch.Generator().manual_seed(1)).detach()
    check_mc(x, model.bias)
    centred = x - model.bias.detach()
    check_mc(centred[:, :, None] * centred[:, None, :], model.covariance(), "eq-ei-marginal")
    assert model.sample_latents(S).shape == (S, K)
    a, b = (model.sample(S, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)


# --- The contract

def test_a_given_decoder_is_used_as_it_is():
    linear = torch.nn.Linear(K, D).double()
    for decoder in (linear, torch.nn.Sequential(linear)):
        model = LinearGaussian(decoder=decoder, noise_var=0.3, freeze_decoder=True)
        assert model.weight is linear.weight and not any(p.requires_grad for p in model.parameters())
        same = LinearGaussian(linear.weight, linear.bias, 0.3)
        assert torch.equal(same.log_likelihood(data()).value, model.log_likelihood(data()).value)
        linear.requires_grad_(True)


def test_training_maximises_the_evidence_to_where_em_ends():
    from dlgm_tutorial.training import fit
    x = data(40)
    em = fit_factor_analysis(x, 1, noise="isotropic", tol=1e-11)
    model = LinearGaussian(draw(D, 1, seed=8), None, 1.0)
    fit(model, x, num_steps=500, batch_size=40, lr=lambda step: 0.1 * 0.01 ** (step / 500))
    check_close(model.bound(x).mean(), em.log_likelihoods[-1], 1e-6)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_of_the_arguments_are_those_of_the_results(dtype, device):
    x = data(40, dtype=dtype, device=device)
    model = fit_factor_analysis(x, K, num_steps=3).model
    results = [model.bound(x), model.log_likelihood(x).value, model.posterior(x).mean, model.reconstruct(x), model.noise_var,
               *model.impute(x, x > 0), model.mean_field(x).mean, model.mean_field_gap(x), model.sample(4),
               fit_ppca(x, K).log_likelihoods]
    assert {(r.dtype, r.device.type) for r in results} == {(dtype, device)}
    check_close(model.bound(x), build_like(model).bound(x.double().cpu()), 1e-3 if dtype == torch.float32 else 1e-11)


def build_like(model):
    return LinearGaussian(model.weight.double().cpu(), model.bias.double().cpu(), model.noise_var.double().cpu())


def test_no_latents_is_independent_noise():
    model, x = LinearGaussian(torch.zeros(D, 0, dtype=torch.float64), None, 0.5), data()
    want = oracles.gaussian_log_density(x.numpy(), np.zeros(D), 0.5 * np.eye(D))
    check_close(model.log_likelihood(x).value, want, 1e-12)
    check_close(model.log_likelihood(x, observed=MASK).value[2], want[2], 1e-12)


# --- Learning

def covariance(num=50, seed=3):
    x = data(num, seed) @ draw(D, D, seed=9)
    return x, torch.cov(x.T, correction=0)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
def test_em_never_falls_from_a_hundred_random_starts(noise, expand):
    _, cov = covariance()
    weight, noise_var = draw(100, D, K), draw(100, D, seed=4).exp()
    if noise == "isotropic":
        noise_var = noise_var[:, :1].expand(100, D)
    values = []
    for _ in range(100):
        weight, noise_var, value = em_step(weight, noise_var, cov, noise=noise, expand=expand)
        values.append(value)
    values = torch.stack(values)
    assert values.shape == (100, 100) and (values.diff(dim=0) > -1e-12).all()


def test_em_step_of_many_is_the_step_of_each():
    _, cov = covariance()
    weight, noise_var = draw(S, D, K), draw(S, D, seed=4).exp()
    together = em_step(weight, noise_var, cov)
    for s in range(S):
        for a, b in zip(together, em_step(weight[s], noise_var[s], cov), strict=True):
            check_close(a[s], b, 1e-12)


def test_em_step_maximises_the_expected_joint():
    """Against the sums over data that it avoids: posterior moments by the oracle, least squares for the weight."""
    x, cov = covariance()
    weight, noise_var = draw(D, K), draw(D, seed=4).exp()
    mean, post = oracles.linear_gaussian_posterior(x.numpy(), weight.numpy(), x.mean(0).numpy(), noise_var.numpy())
    centred = (x - x.mean(0)).numpy()
    second = mean.T @ mean / len(x) + post
    want = np.linalg.solve(second, mean.T @ centred / len(x)).T
    want_noise = ((centred - mean @ want.T) ** 2).mean(0) + np.einsum("dk,kl,dl->d", want, post, want)
    got, got_noise, value = em_step(weight, noise_var, cov)
    check_close(got, want, 1e-11, "eq-ei-em-weight")
    check_close(got_noise, want_noise, 1e-11, "eq-ei-em-noise")
    evidence = oracles.linear_gaussian_evidence(x.numpy(), weight.numpy(), x.mean(0).numpy(), noise_var.numpy())
    check_close(value, evidence.mean(), 1e-11, "eq-ei-evidence")


def test_expanded_em_step_takes_the_learnt_prior_into_the_weights():
    """Under the prior N(0, V), V the mean of E z z^T, the step of plain EM makes the same covariance of x."""
    x, cov = covariance()
    weight, noise_var = draw(D, K), draw(D, seed=4).exp()
    mean, post = oracles.linear_gaussian_posterior(x.numpy(), weight.numpy(), x.mean(0).numpy(), noise_var.numpy())
    prior = torch.as_tensor(mean.T @ mean / len(x) + post)
    plain, plain_noise, plain_value = em_step(weight, noise_var, cov)
    got, got_noise, value = em_step(weight, noise_var, cov, expand=True)
    check_close(got @ got.mT, plain @ prior @ plain.mT, 1e-11)
    check_close(got_noise, plain_noise, 1e-15)
    check_close(value, plain_value, 1e-15)


@pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
def test_expanded_em_reaches_the_same_maximum_sooner(noise):
    x = LinearGaussian(3 * draw(D, K), draw(D, seed=1), draw(D, seed=2).exp()).sample(
        200, generator=torch.Generator().manual_seed(4)).detach()
    start = 0.1 * draw(D, K, seed=11), x.var(0).mean().expand(D)
    plain, expanded = (fit_factor_analysis(x, K, noise=noise, start=start, tol=1e-12, num_steps=20_000, expand=expand)
                       for expand in (False, True))
    check_close(expanded.log_likelihoods[-1], plain.log_likelihoods[-1], 1e-8)
    check_close(expanded.model.covariance(), plain.model.covariance(), 1e-3)
    assert len(expanded.log_likelihoods) < len(plain.log_likelihoods)


def test_factor_analysis_ends_where_scikit_learn_ends():
    x = LinearGaussian(2 * draw(D, K), draw(D, seed=1), draw(D, seed=2).exp()).sample(
        200, generator=torch.Generator().manual_seed(4)).detach()
    result = fit_factor_analysis(x, K, tol=1e-12)
    peer = FactorAnalysis(K, tol=1e-12, max_iter=5000, svd_method="lapack").fit(x.numpy())
    assert isinstance(result, EMResult)
    check_close(result.log_likelihoods[-1], peer.score(x.numpy()), 1e-8)
    # Both stop where the likelihood is flat to 1e-12: the parameters are known to about the root of that, times 100.
    check_close(result.model.covariance(), peer.get_covariance(), 1e-3)
    check_close(result.model.log_likelihood(x).value.mean(), result.log_likelihoods[-1], 1e-10)


def test_ppca_is_scikit_learns_and_is_a_fixed_point_of_em():
    x, cov = covariance()
    result = fit_ppca(x, K)
    peer = PCA(K).fit(x.numpy())  # divides by N - 1
    check_close(result.model.covariance(), peer.get_covariance() * (len(x) - 1) / len(x), 1e-11, "eq-ei-ppca")
    want = oracles.linear_gaussian_evidence(x.numpy(), *arrays(result.model)).mean()
    check_close(result.log_likelihoods, [want], 1e-11, "eq-ei-ppca")
    weight, noise_var, _ = em_step(result.model.weight, result.model.noise_var, cov, noise="isotropic")
    check_close(weight, result.model.weight, 1e-11, "eq-ei-ppca")
    check_close(noise_var, result.model.noise_var, 1e-11, "eq-ei-ppca")


def test_em_reaches_the_closed_form_of_ppca():
    x = LinearGaussian(2 * draw(D, K), None, 0.5).sample(100, generator=torch.Generator().manual_seed(5)).detach()
    start = draw(D, K, seed=11), torch.ones(D, dtype=torch.float64)
    em = fit_factor_analysis(x, K, noise="isotropic", start=start, tol=0.0)
    closed = fit_ppca(x, K)
    check_close(em.log_likelihoods[-1], closed.log_likelihoods[0], 1e-9, "eq-ei-ppca")
    check_close(em.model.covariance(), closed.model.covariance(), 1e-9, "eq-ei-ppca")
    assert em.model.log_noise_var.ndim == 0


def test_no_perturbation_of_the_ppca_solution_is_more_likely():
    x, _ = covariance()
    model, best = fit_ppca(x, K).model, fit_ppca(x, K).log_likelihoods[0]
    for seed in range(30):
        other = LinearGaussian(model.weight + 0.01 * draw(D, K, seed=seed), x.mean(0),
                               model.noise_var[0] * (1 + 0.01 * draw(1, seed=seed + 90)[0]))
        assert other.bound(x).mean() < best


def test_factor_analysis_stops_by_tolerance_and_counts_its_steps():
    x, _ = covariance()
    assert len(fit_factor_analysis(x, K, num_steps=0).log_likelihoods) == 1
    assert len(fit_factor_analysis(x, K, num_steps=4, tol=0.0).log_likelihoods) == 5
    early = fit_factor_analysis(x, K, tol=1e-2).log_likelihoods
    assert early[-1] - early[-2] < 1e-2 <= early[-2] - early[-3]


def test_the_units_of_the_coordinates_do_not_matter():
    x, _ = covariance()
    units = draw(D, seed=12).exp()
    a, b = fit_factor_analysis(x, K, num_steps=20).model, fit_factor_analysis(x * units, K, num_steps=20).model
    check_close(b.covariance(), a.covariance() * torch.outer(units, units), 1e-8)
    check_close(b.bound(x * units), a.bound(x) - units.log().sum(), 1e-9)


def test_pixels_that_never_change_meet_the_floor():
    x = torch.as_tensor(load_digits().data / 16)
    model = fit_factor_analysis(x, 3, num_steps=20, min_noise_var=1e-4).model
    constant = x.std(0) == 0
    assert constant.sum() == 3 and (model.noise_var[constant] - 1e-4).abs().max() < 1e-12
    assert (model.noise_var >= 1e-4 - 1e-12).all() and torch.isfinite(model.bound(x)).all()


def test_selection_finds_the_number_of_latents_that_made_the_data():
    model = LinearGaussian(draw(D, K), None, 0.2)
    x = model.sample(400, generator=torch.Generator().manual_seed(2)).detach()
    fit = partial(fit_factor_analysis, num_steps=100)
    chosen = select_num_latents(x, [0, 1, 2, 3], fit=fit, generator=torch.Generator().manual_seed(3))
    assert isinstance(chosen, Selection) and chosen.num_latents == K and chosen.candidates == [0, 1, 2, 3]
    assert chosen.log_likelihoods.shape == (4, 400)
    fold = torch.arange(400) % 5
    fold = fold[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    left_out = fit(x[fold != 1], 3).model.bound(x[fold == 1])
    check_close(chosen.log_likelihoods[3, fold == 1], left_out, 1e-12)


# --- The from-scratch version of the chapter

def test_scratch_and_package_agree_in_values_and_gradients():
    model, x = build(), data()
    weight, bias, noise_var = arrays(model)
    mean, precision = scratch.posterior(x.numpy(), weight, bias, noise_var)
    check_close(model.posterior(x).mean, mean, 1e-11, "eq-ei-posterior")
    check_close(torch.linalg.inv(model.posterior(x).covariance_matrix[0]), precision, 1e-11, "eq-ei-posterior")
    check_close(model.bound(x), scratch.log_evidence(x.numpy(), weight, bias, noise_var), 1e-11, "eq-ei-evidence")
    seen = torch.where(MASK, x, torch.nan)
    mean, precision = scratch.posterior_missing(seen.numpy(), MASK.numpy(), weight, bias, noise_var)
    check_close(model.posterior(seen, MASK).mean, mean, 1e-11, "eq-ei-missing")
    gaps = [scratch.mean_field_gap(p) for p in precision]
    check_close(model.mean_field_gap(seen, MASK), gaps, 1e-11, "eq-ei-mean-field-gap")
    cov = np.diag([0.3, 0.7])
    want = [scratch.elbo(row, m, cov, weight, bias, noise_var) for row, m in zip(x.numpy(), mean, strict=True)]
    check_close(model.elbo(x, torch.as_tensor(mean), torch.as_tensor(cov)), want, 1e-11, "eq-ei-elbo-closed")
    total = lambda w, v: scratch.log_evidence(x.numpy(), w, bias, v).sum()
    model.bound(x).sum().backward()
    check_close(model.decoder.weight.grad, grad(total, 0)(weight, noise_var), 1e-10, "eq-ei-gradient")
    check_close(model.log_noise_var.grad, grad(total, 1)(weight, noise_var) * noise_var, 1e-10, "eq-ei-gradient")


def test_scratch_and_package_take_the_same_em_steps():
    _, cov = covariance()
    theirs, ours = (draw(D, K), draw(D, seed=4).exp()), (draw(D, K).numpy(), draw(D, seed=4).exp().numpy())
    for _ in range(10):
        *theirs, _ = em_step(*theirs, cov)
        ours = scratch.em_step(*ours, cov.numpy())
    check_close(theirs[0], ours[0], 1e-10, "eq-ei-em-weight")
    check_close(theirs[1], ours[1], 1e-10, "eq-ei-em-noise")
    x, cov = covariance()
    weight, noise_var = scratch.ppca(cov.numpy(), K)
    model = fit_ppca(x, K).model
    check_close(model.weight @ model.weight.mT, weight @ weight.T, 1e-10, "eq-ei-ppca")
    check_close(model.noise_var, np.full(D, noise_var), 1e-11, "eq-ei-ppca")


# --- Bad input

@pytest.mark.parametrize("error, message, call", [
    (ValueError, r"weight must have shape \[D, K\], got \[7\]", lambda: LinearGaussian(draw(D))),
    (ValueError, r"weight must have shape \[D, K\], got None", lambda: LinearGaussian()),
    (ValueError, r"bias must have shape \[7\], got \[2\]", lambda: LinearGaussian(draw(D, K), draw(K))),
    (ValueError, r"noise_var must be a number or have shape \[7\], got \[2\]", lambda: LinearGaussian(draw(D, K), None, draw(K))),
    (ValueError, "noise_var must be positive", lambda: LinearGaussian(draw(D, K), None, 0.0)),
    (ValueError, "noise_var must be positive", lambda: LinearGaussian(draw(D, K), None, torch.full((D,), torch.nan))),
    (ValueError, "weight and bias must be absent", lambda: LinearGaussian(draw(D, K), decoder=torch.nn.Linear(K, D))),
    (TypeError, "decoder must be one nn.Linear", lambda: LinearGaussian(decoder=torch.nn.Tanh())),
    (ValueError, r"x must have shape \[B, 7\], got \[3, 2\]", lambda: build().bound(draw(B, K))),
    (ValueError, "x must be finite where it is observed", lambda: build().bound(torch.full((B, D), torch.nan))),
    (TypeError, "observed must be a mask of booleans", lambda: build().bound(data(), observed=MASK.double())),
    (ValueError, r"observed must have shape \[3, 7\] or \[7\], got \[2\]", lambda: build().bound(data(), observed=MASK[0, :2])),
    (ValueError, r"z must have shape \[S, 3, 2\], got \[3, 2\]", lambda: build().log_joint(data(), draw(B, K))),
    (ValueError, "coordinates must be 'noise' or 'state', got 'x'", lambda: build().log_joint(data(), draw(S, B, K), coordinates="x")),
    (ValueError, r"loc must have shape \[3, 2\], got \[2\]", lambda: build().elbo(data(), draw(K), torch.eye(K))),
    (ValueError, r"cov must have shape \[..., K, K\], got \[3, 3\]", lambda: build().elbo(data(), draw(B, K), torch.eye(3))),
    (ValueError, "x must be a tensor of floats", lambda: fit_ppca(np.zeros((B, D)), K)),
    (ValueError, "x must be a tensor of floats", lambda: fit_factor_analysis(data(1), K)),
    (ValueError, "x must be finite, got NaN", lambda: fit_factor_analysis(torch.full((B, D), torch.nan), K)),
    (ValueError, "num_latents must be from 0 to 6 for data of dimension 7, got 7", lambda: fit_ppca(data(), D)),
    (ValueError, "noise must be 'diagonal' or 'isotropic', got 'full'", lambda: fit_factor_analysis(data(), K, noise="full")),
    (ValueError, "num_steps and tol must not be negative, got -1", lambda: fit_factor_analysis(data(), K, num_steps=-1)),
    (ValueError, r"start must be \(weight \[7, 2\]", lambda: fit_factor_analysis(data(), K, start=(draw(K, D), draw(D)))),
    (ValueError, "candidates is empty", lambda: select_num_latents(data(), [])),
    (ValueError, "num_folds must be from 2 to N = 3, got 1", lambda: select_num_latents(data(), [1], num_folds=1)),
])
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
