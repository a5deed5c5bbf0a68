"""Chapter 6's module against closed forms, grids, mpmath's numbers, NumPy replicas and the exact posteriors of chapter 5."""

import autograd
import autograd.misc
import autograd.numpy as anp
import numpy as np
import pytest
import torch
from torch import nn

from dlgm_tutorial import analytic_em, cast, oracles
from dlgm_tutorial._endpoint import _jvp, _objective
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.evaluation import reconstruction_error
from dlgm_tutorial.mcmc import init, langevin_step
from dlgm_tutorial.networks import mlp
from dlgm_tutorial.scratch import short_run_mcmc as scratch
from dlgm_tutorial.scratch.stochastic_backprop import adam_step
from dlgm_tutorial.short_run_mcmc import (
    BottomUpEncoder,
    ChainState,
    LayeredVAE,
    MultiLayerGenerator,
    ShortRunModel,
    ShortRunPosterior,
    inpaint,
    jacobian_bound,
    largest_curvature,
    law_of_endpoint,
    propagate_on_grid,
    semi_implicit_bounds,
    short_run,
    short_run_loss,
    short_run_step,
    tune_step_size,
)
from dlgm_tutorial.training import epoch_order, fit, step_noise

B, S, D, T = 3, 5, 7, 4
double = {"dtype": torch.float64}
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device")])]


def t(values, device="cpu"):
    return torch.tensor(values, dtype=torch.float64, device=device)


def draws(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


# ---------------------------------------------------------------- reference cases
# Model A: linear, two latents, three data; numbers from 40-digit arithmetic.
WEIGHT, BIAS, NOISE_VAR, X = [[2.0, 0.5], [0.0, 1.0], [-1.0, 0.5]], [0.1, -0.2, 0.3], 0.25, [[1.0, 0.5, -0.75]]
LOG_PX = -4.722642526910289
SMALLEST, LARGEST = 6.71989011071948, 21.2801098892805


def model_a(device="cpu", **options):
    decoder = nn.Linear(2, 3, **double, device=device)
    with torch.no_grad():
        decoder.weight.copy_(t(WEIGHT))
        decoder.bias.copy_(t(BIAS))
    return ShortRunModel(decoder=decoder, noise_var=NOISE_VAR, **{"step_size": 0.15, **options}).to(device)


def law_a(step_size, num_steps, **options):
    return law_of_endpoint(t(WEIGHT), t(BIAS), NOISE_VAR, t(X), step_size, num_steps, **options)


class ToyN:
    """One latent, x | z ~ N(log cosh 2z, 1/4), x = 1.5: a posterior with two modes."""

    num_latents = num_layers = 1
    log_px = -1.44030302453487

    def log_joint(self, x, z):
        mean = torch.logaddexp(2 * z, -2 * z) - np.log(2)
        return (-0.5 * z**2 - 2 * (x - mean) ** 2 - np.log(2 * np.pi) + np.log(2)).sum(-1)

    def at(self, z):
        return self.log_joint(t([[1.5]], z.device), z)


def score_of(log_density):
    return torch.func.grad(lambda z: log_density(z).sum())


def small(hierarchy="conditional", seed=0, **options):
    """A generator whose sizes all differ: D = 7, K = (3, 2, 4)."""
    torch.manual_seed(seed)
    return MultiLayerGenerator(D, (3, 2, 4), (8, 6, 5), noise_var=0.3, hierarchy=hierarchy, activation="tanh",
                               **options).double()


def small_conv(seed=0, **options):
    return MultiLayerGenerator.convolutional((1, 8, 8), (3, 2, 4), 5, noise_var=0.3, sizes=(4, 4, 2),
                                             generator=torch.Generator().manual_seed(seed), **options).double()


# ---------------------------------------------------------------- the sampler
@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_on_model_a_matches_forty_digit_arithmetic(device):
    model, k = model_a(device), np.arange(20) + 1
    noise = t(0.5 * np.stack([np.cos(k), np.sin(k)], -1)[:, None, None], device)
    x, z0 = t(X, device), t([[[0.3, -0.7]]], device)
    score = lambda z: model.generator.score(x, z)
    check_close(short_run(score, z0, 0.15, 1, noise=noise[:1])[0, 0].cpu(), t([0.41364767294011, -0.560389676139408]), 1e-13)
    end = short_run(score, z0, 0.15, 20, noise=noise)
    check_close(end[0, 0].cpu(), t([0.62810717085598, 0.0568945298380632]), 1e-12)
    check_close(model.log_joint(x, end)[0].detach().cpu(), t([-4.24283972252434]), 1e-12)
    assert torch.equal(z0.cpu(), t([[[0.3, -0.7]]])), "the start was changed in place"
    short = short_run(lambda z: model.float().generator.score(x.float(), z), z0.float(), 0.15, 20, noise=noise.float())
    assert short.dtype == torch.float32
    check_close(short[0, 0].cpu(), t([0.62810717085598, 0.0568945298380632]), 1e-5)


def test_a_chain_on_toy_n_and_its_jacobian_match_forty_digit_arithmetic():
    noise = t(np.cos(np.arange(20) + 1.0)).reshape(20, 1, 1, 1)
    got = jacobian_bound(ToyN().at, t([[[0.4]]]), 0.2, 20, noise=noise)
    check_close(got.z.flatten(), t([1.23023189369834]), 1e-12)
    check_close(got.log_det.flatten(), t([-5.91392975039198]), 1e-12)


def test_the_kernel_is_a_step_of_short_run_and_of_the_shared_langevin_step():
    generator, x, z0, noise = small(), draws(B, D, seed=1), draws(S, B, 9, seed=2), draws(T, S, B, 9, seed=3)
    step = torch.linspace(0.05, 0.2, 9, **double)
    score = lambda z: generator.score(x, z)
    log_density = lambda z: generator.log_joint(x, z)
    state, other = ChainState(z0, 0), init(log_density, z0)
    for k in range(T):
        state, info = short_run_step(state, noise[k], score=score, step_size=step)
        assert info.score_norm.shape == info.reach.shape == (S, B)
        check_close(info.score_norm, other.gradient.norm(dim=-1), 1e-12)
        other, _ = langevin_step(other, noise[k], log_density=log_density, step_size=step)
    end = short_run(score, z0, step, T, noise=noise)
    assert state.step == T and torch.equal(state.z, end)
    check_close(end, other.z, 1e-12)


@pytest.mark.parametrize("make", [small, lambda: small("architectural"), small_conv], ids=["mlp", "architectural", "conv"])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_batch_do_not_know_each_other(make, device):
    generator = make().to(device)
    x, z0 = draws(B, generator.data_dim, seed=1, device=device), draws(S, B, 9, seed=2, device=device)
    noise = draws(T, S, B, 9, seed=3, device=device)
    whole = short_run(lambda z: generator.score(x, z), z0, 0.1, T, noise=noise)
    alone = [short_run(lambda z, i=i: generator.score(x[i:i + 1], z), z0[:, i:i + 1], 0.1, T, noise=noise[:, :, i:i + 1])
             for i in range(B)]
    check_close(whole.cpu(), torch.cat(alone, 1).cpu(), 1e-12)


def test_without_noise_the_chain_climbs_and_needs_no_randomness():
    generator, x, z0 = small(), draws(B, D, seed=1), draws(S, B, 9, seed=2)
    score = lambda z: generator.score(x, z)
    end = short_run(score, z0, 0.05, T, stochastic=False)
    assert torch.equal(end, short_run(score, z0, 0.05, T, stochastic=False))
    check_below(generator.log_joint(x, z0).detach(), generator.log_joint(x, end).detach(), what="gradient ascent")
    check_close(end, short_run(score, z0, 0.05, T, noise=torch.zeros(T, S, B, 9, **double)), 1e-15)


def test_a_generator_draws_the_noise_and_seeds_repeat():
    score, z0 = (lambda z: -z), torch.zeros(S, B, 2)
    one, two, three = (short_run(score, z0, 0.3, T, generator=torch.Generator().manual_seed(i)) for i in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_chains_that_blow_up_name_the_step():
    edge = 2 / LARGEST**0.5
    model, x = model_a(), t(X)
    score = lambda z: model.generator.score(x, z)
    z0, noise = draws(S, 1, 2), draws(400, S, 1, 2, seed=1)
    short_run(score, z0, 0.99 * edge, 400, noise=noise)
    with pytest.raises(FloatingPointError, match=r"step_size 0.437\d* blows up at step 2\d\d of 400.* 5 of 5 chains"):
        short_run(score, z0, 1.01 * edge, 400, noise=noise)
    with pytest.raises(FloatingPointError, match=r"blows up at step 2 of 10: \|z\| reaches 1e\+30"):
        short_run(lambda z: z * 1e15, torch.ones(2, 3), 2**0.5, 10, stochastic=False, limit=1e20)
    with pytest.raises(FloatingPointError, match=r"blows up at step 1 of 2: \|z\| reaches 1e\+08"):  # and comes back
        calls = iter((2e8, -2e8))
        short_run(lambda z: torch.full_like(z, next(calls)), torch.ones(2, 3), 1.0, 2, stochastic=False)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at step 3 of 9"):
        calls = iter(range(9))
        short_run(lambda z: z * torch.nan if next(calls) == 2 else -z, torch.ones(2, 3), 0.1, 9)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ({"num_steps": 2.5}, "num_steps must be an integer of at least 1, got 2.5"),
    ({"step_size": 0.0}, "step_size must be positive and finite"),
    ({"step_size": float("nan")}, "step_size must be positive and finite"),
    ({"step_size": torch.ones(3)}, r"step_size must be a number or \[2\]"),
    ({"noise": torch.zeros(2, 2)}, r"noise must have shape \[4, 5, 2\]"),
    ({"score": lambda z: z.sum(-1)}, r"score must map z \[5, 2\] to the same shape"),
])
def test_the_sampler_refuses_bad_arguments(change, message):
    arguments = {"score": lambda z: -z, "z0": torch.zeros(5, 2), "step_size": 0.1, "num_steps": 4} | change
    with pytest.raises(ValueError, match=message):
        short_run(arguments.pop("score"), arguments.pop("z0"), arguments.pop("step_size"), arguments.pop("num_steps"), **arguments)


# ---------------------------------------------------------------- the generator
def numpy_mlp(net, h):
    weights = [(W, b) for W, b in net]
    for W, b in weights[:-1]:
        h = anp.tanh(h @ W.T + b)
    return h @ weights[-1][0].T + weights[-1][1]


def numpy_log_joint(arrays, sizes, noise_var, hierarchy):
    """log p(x, noises) of a small tanh generator, from the formula: (x [B, D], e [B, K]) -> [B]."""
    ends = np.cumsum([0, *sizes])

    def log_joint(x, e):
        parts = [e[..., ends[i]:ends[i + 1]] for i in range(len(sizes))]
        h = parts[-1]
        if hierarchy == "architectural":
            h = anp.tanh(numpy_mlp(arrays["blocks"][-1], h))
        for i in reversed(range(len(sizes) - 1)):
            if hierarchy == "architectural":
                h = anp.tanh(numpy_mlp(arrays["blocks"][i], anp.concatenate([parts[i], h], -1)))
            else:
                loc, raw = anp.split(numpy_mlp(arrays["heads"][i], h), 2, -1)
                h = loc + (1e-3 + anp.log1p(anp.exp(raw))) * parts[i]
        mean = numpy_mlp(arrays["readout"], h)
        return (-0.5 * anp.sum((x - mean) ** 2, -1) / noise_var - 0.5 * x.shape[-1] * np.log(2 * np.pi * noise_var)
                - 0.5 * anp.sum(e**2, -1) - 0.5 * e.shape[-1] * np.log(2 * np.pi))
    return log_joint


@pytest.mark.parametrize("hierarchy", ["conditional", "architectural"])
def test_log_joint_and_score_match_numpy_and_finite_differences(hierarchy):
    generator, x, z = small(hierarchy), draws(B, D, seed=1), draws(S, B, 9, seed=2)
    reference = numpy_log_joint(generator.as_arrays(), (3, 2, 4), 0.3, hierarchy)
    check_close(generator.log_joint(x, z).detach(), np.stack([reference(x.numpy(), e) for e in z.numpy()]), 1e-11)
    gradient = autograd.grad(lambda e: anp.sum(reference(x.numpy(), e)))
    score = generator.score(x, z)
    check_close(score, np.stack([gradient(e) for e in z.numpy()]), 1e-11)
    f = lambda e: float(generator.log_joint(x, t(e)).detach().sum())
    check_close(score, oracles.finite_difference(f, z.numpy(), 1e-5), 1e-6)


@pytest.mark.parametrize("make", [small, lambda: small("architectural"), small_conv], ids=["mlp", "architectural", "conv"])
def test_states_and_noises_are_inverse_and_the_densities_differ_by_the_log_scales(make):
    generator = make()
    x, z = draws(B, generator.data_dim, seed=1), draws(S, B, 9, seed=2)
    states = generator.states(z)
    assert [s.shape for s in states] == [(S, B, 3), (S, B, 2), (S, B, 4)]
    assert torch.equal(states[2], z[..., 5:])
    check_close(generator.concat(generator.noises(states)).detach(), z, 1e-10)
    flat = generator.concat(states).detach()
    jacobian = torch.func.vmap(torch.func.vmap(torch.func.jacrev(
        lambda e: generator.concat(generator.states(e[None]))[0])))(z)
    log_volume = torch.linalg.slogdet(jacobian).logabsdet  # of the whole map, without its triangular form
    difference = generator.log_joint(x, z) - generator.log_joint(x, flat, coordinates="state")
    check_close(difference.detach(), log_volume.detach(), 1e-9)


def test_tuples_and_flat_arrays_are_the_same_latents():
    generator, x, z = small(), draws(B, D, seed=1), draws(S, B, 9, seed=2)
    assert torch.equal(generator.concat(generator.split(z)), z)
    check_close(generator.log_joint(x, generator.split(z)).detach(), generator.log_joint(x, z).detach(), 1e-15)
    with pytest.raises(ValueError, match=r"z must have the layer sizes \(3, 2, 4\)"):
        generator.split(torch.zeros(2, 8))


def test_a_masked_likelihood_is_that_of_the_observed_entries():
    generator, x, z = small(), draws(B, D, seed=1), draws(S, B, 9, seed=2)
    observed = torch.ones(B, D, dtype=torch.bool)
    check_close(generator.log_joint(x, z, observed=observed).detach(), generator.log_joint(x, z).detach(), 1e-12)
    observed = draws(B, D, seed=4) > 0
    hidden = torch.where(observed, x, torch.nan)
    mean = generator.mean(z)
    want = torch.distributions.Normal(mean, 0.3**0.5).log_prob(x).where(observed, t(0.0)).sum(-1)
    want = want + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    check_close(generator.log_joint(hidden, z, observed=observed).detach(), want.detach(), 1e-12)
    assert bool(generator.score(hidden, z, observed=observed).isfinite().all())


def test_scores_leave_no_gradient_in_the_weights():
    generator = small()
    generator.score(draws(B, D), draws(S, B, 9))
    assert all(p.grad is None for p in generator.parameters())


def test_samples_have_the_moments_of_the_model():
    generator = MultiLayerGenerator(2, (1, 1), ((), ()), noise_var=0.09).double()
    with torch.no_grad():  # z_2 ~ N(0, 1), z_1 = 0.9 z_2 + scale e_1, x = (1.5, -1) z_1 + noise
        generator.heads[0][0].weight.copy_(t([[0.9], [0.0]]))
        generator.heads[0][0].bias.copy_(t([0.0, np.log(np.expm1(0.2 - 1e-3))]))
        generator.readout[0].weight.copy_(t([[1.5], [-1.0]]))
        generator.readout[0].bias.zero_()
    x = generator.sample(20_000, generator=torch.Generator().manual_seed(0))
    column = t([[1.5], [-1.0]])
    want = column @ column.T * (0.81 + 0.04) + 0.09 * torch.eye(2)
    check_mc(x[:, :, None] * x[:, None], want, what="second moments")


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 2, 3), "data_dim must be a positive integer, got 0"),
    ((4, (2, 0), 3), "latent_dims must be one or more positive integers"),
    ((4, (2, 3), (5,)), "hidden_dims must have one entry per layer: 2 latent_dims, 1 hidden_dims"),
])
def test_the_generator_refuses_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiLayerGenerator(*arguments, noise_var=1.0)


@pytest.mark.parametrize(("options", "message"), [
    ({"noise_var": 0.0}, "noise_var must be a positive number"),
    ({"hierarchy": "deep"}, "hierarchy must be one of 'conditional', 'architectural', got 'deep'"),
    ({"output": "softmax"}, "output must be one of"),
    ({"decoder": nn.Linear(2, 5)}, "data_dim is 4, but decoder gives 5"),
    ({"decoder": nn.Linear(2, 4), "latent_dims": (2, 3)}, "decoder is a model with one layer"),
    ({"hierarchy": "architectural", "hidden_dims": ((), 3)}, "hidden_dims of an architectural hierarchy"),
])
def test_the_generator_refuses_bad_options(options, message):
    arguments = {"latent_dims": (2, 3) if "decoder" not in options else 2, "hidden_dims": 3, "noise_var": 1.0}
    with pytest.raises(ValueError, match=message):
        MultiLayerGenerator(4, **(arguments | options))


def test_the_convolutional_generator_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="image_shape must be square with an even side"):
        MultiLayerGenerator.convolutional((1, 8, 6), 2, noise_var=1.0)
    with pytest.raises(ValueError, match="sizes must start at 4 and each be the one before or half of it"):
        MultiLayerGenerator.convolutional((1, 8, 8), (2, 2), noise_var=1.0, sizes=(4, 1))
    with pytest.raises(ValueError, match="as_arrays is for generators made of MLPs"):
        small_conv().as_arrays()
    with pytest.raises(ValueError, match=r"x must have shape \[B, 64\]"):
        small_conv().log_joint(torch.zeros(2, 63), torch.zeros(1, 2, 9).double())


# ---------------------------------------------------------------- the law of the end point, linear decoders
def test_the_closed_law_matches_the_published_digits():
    law = law_a(0.15, 20)
    check_close(law.mean, t([[0.524636503879, 0.180003578009]]), 1e-12)
    check_close(law.covariance, t([[0.056047655422, -0.018912988081], [-0.018912988081, 0.188438571989]]), 1e-12)
    check_close(law.kl, t([0.0239052230408075]), 1e-13)
    check_close(law.jacobian_bound, t([4.77657703778621]), 1e-12)
    check_close(law.mutual_information, t(4.752671814745403), 1e-12)
    check_close(law_a(0.15, 20, stochastic=False).kl, t([3.71134997382374]), 1e-12)
    check_close(law_a(0.15, 0).kl, t([13.759731531023892]), 1e-12)
    check_close(law_a(t([0.1, 0.2]), 20).kl, t([0.058957464628]), 1e-11)
    masked = law_a(0.15, 20, observed=torch.tensor([True, False, True]))
    check_close(masked.kl, t([0.17333868881799]), 1e-13)
    check_close(masked.mean @ t(WEIGHT)[1] + BIAS[1], t([-0.4014766432798443]), 1e-12)


OPTIMA = [  # T: best s, KL there; best s by J, J there; without noise; averaged over the model's data
    (1, 0.309542901859, 0.901984631672, 0.275473032782, 1.93320864452, 0.279251264822, 0.855830950633, 0.313663574333,
     2.17940153124),
    (5, 0.265977813588, 0.117703812679, 0.167294407603, 1.35619141376, 0.171241239404, 0.447452987115, 0.298578214807,
     0.233785441157),
    (10, 0.220032682755, 0.0397080478529, 0.123975764445, 1.27201782416, 0.126708173296, 0.400533551729,
     0.252730676628, 0.0786788335717),
    (20, 0.17531070909, 0.0129389309928, 0.0898010204959, 1.22979203187, 0.0916696866045, 0.37832642098,
     0.205373967618, 0.0257939359277),
    (50, 0.125498049014, 0.00288314236347, 0.0576321094393, 1.20449532933, 0.0587802328597, 0.365452975819,
     0.149430751883, 0.00576043659795),
    (100, 0.0961424330515, 0.000922738067261, 0.0409523859503, 1.19607676238, 0.0417551000877, 0.361240606372,
     0.114887662776, 0.00182028136124)]


def typical_datum():
    """A datum for which the KL is its average over data from the model: E mu_i^2 = 1 - 1 / lambda_i."""
    lam, vectors = np.linalg.eigh(np.eye(2) + np.transpose(WEIGHT) @ WEIGHT / NOISE_VAR)
    mu = vectors @ np.sqrt(1 - 1 / lam)
    W = np.array(WEIGHT)  # W^T (x - b) / noise_var = Lambda mu, solved in the column space of W
    x = np.array(BIAS) + NOISE_VAR * W @ np.linalg.solve(W.T @ W, (vectors * lam) @ vectors.T @ mu)
    return torch.from_numpy(x)[None]


@pytest.mark.parametrize("row", OPTIMA, ids=lambda row: f"T={row[0]}")
def test_the_best_step_sizes_match_mpmath(row):
    num_steps, pairs = row[0], [row[i:i + 2] for i in (1, 3, 5, 7)]
    average = lambda s: law_of_endpoint(t(WEIGHT), t(BIAS), NOISE_VAR, typical_datum(), s, num_steps).kl
    values = [lambda s: law_a(s, num_steps).kl, lambda s: law_a(s, num_steps).jacobian_bound,
              lambda s: law_a(s, num_steps, stochastic=False).kl, average]
    for value, (best, want) in zip(values, pairs, strict=True):
        check_close(value(best), t([want]), 1e-10)
        f = lambda s, value=value: float(value(float(s)))
        check_close(oracles.finite_difference(f, np.array(best), 1e-5), 0.0, 2e-5)
        assert f(best) < min(f(0.99 * best), f(1.01 * best))


def test_averages_over_data_from_the_model():
    average = lambda s: law_of_endpoint(t(WEIGHT), t(BIAS), NOISE_VAR, typical_datum(), s, 20)
    check_close(average(0.15).kl, t([0.144709055431171]), 1e-12)
    chosen = average(0.0998964508068)  # the minimum of the averaged bound, and what the true divergence is there
    check_close(torch.cat([chosen.jacobian_bound, chosen.kl]), t([2.16923361019, 1.14589691864]), 1e-10)
    x = torch.cat([t(X), draws(20_000, 3, seed=3)])[1:]
    z = draws(20_000, 2, seed=4)
    x = z @ t(WEIGHT).mT + t(BIAS) + 0.5 * x
    kl = law_of_endpoint(t(WEIGHT), t(BIAS), NOISE_VAR, x, 0.15, 20).kl
    check_mc(kl, 0.144709055431171, what="KL averaged over 20,000 data")


@pytest.mark.parametrize("num_steps", [1, 7, 20])
def test_the_bound_is_above_the_divergence_and_equal_without_noise(num_steps):
    for s in (0.05, 0.15, 0.25, 0.33, 0.4):
        law, silent = law_a(s, num_steps), law_a(s, num_steps, stochastic=False)
        check_below(law.kl, law.jacobian_bound - 1e-6, what="the information is positive")
        check_close(silent.kl, silent.jacobian_bound, 1e-12)
        check_close(silent.mutual_information, t(0.0), 1e-12)
        lam, _, mu = scratch.spectrum(np.array(WEIGHT), np.array(BIAS), NOISE_VAR, np.array(X[0]))
        check_close(silent.kl, scratch.kl_of_endpoint(lam, mu, s, num_steps, stochastic=False)[None], rtol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 6, 21])
@pytest.mark.parametrize("step", [0.05, 0.2, 0.3, 0.37])  # 0.37: one direction overshoots, 1 - h lambda < 0
def test_the_closed_law_matches_the_recursion(step, num_steps):
    precision = np.eye(2) + np.transpose(WEIGHT) @ WEIGHT / NOISE_VAR
    mean, cov = oracles.linear_gaussian_posterior(X, WEIGHT, BIAS, NOISE_VAR)
    want_mean, want_cov = oracles.langevin_chain_law(mean[0], precision, step, num_steps, np.zeros(2), np.eye(2))
    law = law_a(step, num_steps)
    check_close(law.mean[0], want_mean, 1e-12)
    check_close(law.covariance, want_cov, 1e-12)
    check_close(law.kl[0], oracles.gaussian_kl(want_mean, want_cov, mean[0], cov), 1e-10)
    transition = np.eye(2) - step**2 / 2 * precision
    gap = 0.5 * np.linalg.slogdet(want_cov)[1] - num_steps * np.linalg.slogdet(transition)[1]
    check_close(law.mutual_information, gap, 1e-10)
    check_close(law.jacobian_bound - law.kl, t([gap]), 1e-10)


def test_simulated_chains_have_the_closed_law():
    model, law = model_a(), law_a(0.15, 20)
    z = model.infer(t(X), num_samples=20_000, generator=torch.Generator().manual_seed(0))[:, 0]
    check_mc(z, law.mean[0], what="mean of the end points")
    centred = z - law.mean[0]
    check_mc(centred[:, :, None] * centred[:, None], law.covariance, what="their covariance")


def test_derivatives_in_the_step_size_have_opposite_signs():
    s = t(0.15).requires_grad_()
    law = law_a(s, 20)
    check_close(torch.autograd.grad(law.kl.sum(), s, retain_graph=True)[0], t(-1.12488340643277), 1e-10)
    check_close(torch.autograd.grad(law.jacobian_bound.sum(), s)[0], t(101.542982680378), 1e-9)


def test_many_steps_leave_the_bias_of_the_discretisation():
    for s in (0.02, 0.2):
        u = s**2 / 4 * t([SMALLEST, LARGEST])
        check_close(law_a(s, 60_000).kl, (0.5 * (1 / (1 - u) - 1 + torch.log1p(-u))).sum()[None], 1e-9)


def test_two_layers_prefer_noise_coordinates():
    # z_2 ~ N(0, 1), z_1 = 0.9 z_2 + 0.2 e_1, x = 1.5 z_1 + 0.3 e, x = 1.2; layer 1 first.
    noise = lambda s, T=20: law_of_endpoint(t([[0.3, 1.35]]), t([0.0]), 0.09, t([[1.2]]), s, T).kl
    check_close(noise(0.1), t([0.08153862098727]), 1e-12)
    check_close(noise(0.137823), t([0.0038961738]), 1e-9)
    check_close(noise(t([0.3, 0.1])), t([0.29043623376357]), 1e-11)
    generator = MultiLayerGenerator(1, (1, 1), ((), ()), noise_var=0.09).double()
    with torch.no_grad():
        generator.heads[0][0].weight.copy_(t([[0.9], [0.0]]))
        generator.heads[0][0].bias.copy_(t([0.0, np.log(np.expm1(0.2 - 1e-3))]))
        generator.readout[0].weight.copy_(t([[1.5]]))
        generator.readout[0].bias.zero_()
    x, z = t([[1.2]]), draws(4, 1, 2)
    # The chain in states is linear too: its law from the precision of the states and the recursion.
    precision = np.array([[50.0, -22.5], [-22.5, 21.25]])
    mean = np.array([0.764044943820, 0.808988764045])
    want = -(z.numpy()[:, 0] - mean) @ precision
    check_close(generator.score(x, z, coordinates="state")[:, 0], want, 1e-9)
    start = np.array([[0.85, 0.9], [0.9, 1.0]])
    law = oracles.langevin_chain_law(mean, precision, 0.1, 20, np.zeros(2), start)
    check_close(oracles.gaussian_kl(*law, mean, np.linalg.inv(precision)), 1.40610643249915, 1e-8)


def test_rotating_the_latents_changes_nothing_for_a_shared_step():
    c, s = np.cos(0.7), np.sin(0.7)
    rotated = t(WEIGHT) @ t([[c, -s], [s, c]])
    law = lambda step: law_of_endpoint(rotated, t(BIAS), NOISE_VAR, t(X), step, 20).kl
    check_close(law(0.15), law_a(0.15, 20).kl, 1e-12)
    check_close(law(t([0.1, 0.2])), t([0.236690303448]), 1e-11)


def test_a_decoder_that_says_nothing_leaves_the_prior_but_for_the_discretisation():
    law = law_of_endpoint(torch.zeros(3, 2, **double), t(BIAS), 1.0, t(X), 0.4, 7)
    h = 0.08
    v = (1 - h) ** 14 + (1 - (1 - h) ** 14) / (1 - h / 2)
    check_close(law.mean, torch.zeros(1, 2, **double), 1e-15)
    check_close(law.kl, t([v - 1 - np.log(v)]), 1e-12)


def test_the_law_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight must be \[D, K\]"):
        law_of_endpoint(t(WEIGHT), t([0.0]), 1.0, t(X), 0.1, 3)
    with pytest.raises(ValueError, match="noise_var must be positive"):
        law_of_endpoint(t(WEIGHT), t(BIAS), 0.0, t(X), 0.1, 3)
    with pytest.raises(ValueError, match="num_steps must be an integer"):
        law_a(0.1, -1)


# ---------------------------------------------------------------- one latent on a grid
@pytest.mark.parametrize(("step", "num_steps", "kl"), [
    (0.05, 1, 1.418083156873), (0.05, 20, 0.662857948466), (0.10, 5, 0.659723924698), (0.15, 20, 0.008774638825),
    (0.20, 5, 0.106516571843), (0.20, 20, 0.008303734607), (0.40, 1, 0.436074523367), (0.40, 20, 0.255132935419)])
def test_propagation_on_a_grid_gives_the_reference_kl(step, num_steps, kl):
    law = propagate_on_grid(ToyN().at, step, num_steps, num_points=1601)
    check_close(law.kl, t([kl]), 1e-9)
    check_close(law.mass, t([1.0]), 1e-10)
    check_close(law.log_evidence, t([ToyN.log_px]), 1e-11)


def test_the_grid_matches_the_closed_law_for_several_data():
    weight, bias, x = t([[1.5], [-0.5]]), t([0.1, 0.2]), draws(B, 2)
    model = ShortRunModel(decoder=nn.Linear(1, 2, **double), noise_var=0.5)
    with torch.no_grad():
        model.generator.readout.weight.copy_(weight)
        model.generator.readout.bias.copy_(bias)
    grid = propagate_on_grid(lambda z: model.log_joint(x, z), 0.25, 6, num_points=801)
    check_close(grid.kl, law_of_endpoint(weight, bias, 0.5, x, 0.25, 6).kl, 1e-9)
    check_close(grid.log_evidence, oracles.linear_gaussian_evidence(*(v.numpy() for v in (x, weight, bias)), 0.5), 1e-9)
    with pytest.raises(ValueError, match="num_points must make the grid finer"):
        propagate_on_grid(ToyN().at, 0.01, 2, num_points=101)


def test_many_small_steps_reach_the_posterior_of_toy_n():
    law = propagate_on_grid(ToyN().at, 0.1, 1000, num_points=801, low=-5.0, high=5.0)
    check_below(law.kl, t([1e-3]), what="a thousand steps of 0.1")
    shorter = propagate_on_grid(ToyN().at, 0.1, 100, num_points=801, low=-5.0, high=5.0)
    check_below(law.kl, shorter.kl, what="more steps, less divergence")


# ---------------------------------------------------------------- bounds for any decoder
def test_the_jacobian_bound_by_simulation_matches_its_closed_form():
    model, x, g = model_a(), t(X), torch.Generator().manual_seed(0)
    z0 = draws(4000, 1, 2, seed=5)
    got = jacobian_bound(lambda z: model.log_joint(x, z), z0, 0.15, 20, generator=g)
    check_close(got.log_det, 20 * np.log(np.abs(1 - 0.15**2 / 2 * np.array([SMALLEST, LARGEST]))).sum(), 1e-10)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z0).sum(-1)
    samples = model.log_joint(x, got.z).detach() + got.log_det - log_prior
    check_close(got.value, samples.mean(0), 1e-12)
    check_mc(samples[:, 0], LOG_PX - 4.77657703778621, what="20 noisy steps")
    assert not bool(got.folds.any())


def test_without_noise_the_jacobian_bound_is_the_elbo_of_the_end_point():
    nodes = np.linspace(-9, 9, 4001)
    weights = np.exp(-nodes**2 / 2) * (nodes[1] - nodes[0]) / np.sqrt(2 * np.pi)
    for num_steps, step, kl in ((5, 0.15, 0.16772108855774), (1, 0.2, 0.66488856921414)):
        got = jacobian_bound(ToyN().at, t(nodes).reshape(-1, 1, 1), step, num_steps, stochastic=False)
        terms = (ToyN().at(got.z) + got.log_det)[:, 0].numpy() + nodes**2 / 2 + np.log(2 * np.pi) / 2
        check_close(ToyN.log_px - weights @ terms, kl, 1e-8)
        assert not bool(got.folds.any())


def test_a_step_that_folds_the_line_is_flagged():
    nodes = (np.arange(60_000) + 0.5) * 3e-4 - 9
    weights = np.exp(-nodes**2 / 2) * 3e-4 / np.sqrt(2 * np.pi)
    got = jacobian_bound(ToyN().at, t(nodes).reshape(-1, 1, 1), 0.45, 1, stochastic=False)
    terms = (ToyN().at(got.z) + got.log_det)[:, 0].numpy() + nodes**2 / 2 + np.log(2 * np.pi) / 2
    check_close(ToyN.log_px - weights @ terms, -0.04917, 2e-4)  # a KL cannot be negative; the true one is 0.670
    assert bool(got.folds.all())


def test_log_determinants_of_the_steps_add_up_to_that_of_the_whole_map():
    generator, x = small(), draws(1, D, seed=1)
    z0, noise = draws(S, 1, 9, seed=2), draws(6, S, 1, 9, seed=3)
    log_density = lambda z: generator.log_joint(x, z)
    got = jacobian_bound(log_density, z0, torch.linspace(0.05, 0.15, 9, **double), 6, noise=noise)
    sizes, score = torch.linspace(0.05, 0.15, 9, **double), score_of(log_density)

    def chain(start, e):
        z = start[None, None]
        for k in range(6):
            z = z + 0.5 * sizes**2 * score(z) + sizes * e[k]
        return z[0, 0]
    for i in range(S):
        whole = torch.autograd.functional.jacobian(lambda v, i=i: chain(v, noise[:, i]), z0[i, 0])
        check_close(got.log_det[i], torch.linalg.slogdet(whole).logabsdet.detach()[None], 1e-10)


def test_the_sandwich_holds_the_elbo_and_tightens():
    model, x = model_a(), t(X)
    at = lambda z: model.log_joint(x, z)
    bounds = [[], []]
    for repeat in range(12):
        for i, num in enumerate((10, 300)):
            got = semi_implicit_bounds(at, draws(num, 1, 2, seed=100 + repeat), 0.1753, 20,
                                       generator=torch.Generator().manual_seed(repeat))
            bounds[i].append(torch.cat([got.lower, got.upper]))
    few, many = (torch.stack(b) for b in bounds)
    elbo = LOG_PX - 0.0129389309928
    spread = lambda b: b.std(0) / len(b) ** 0.5
    check_below(many.mean(0)[:1] - 5 * spread(many)[:1], t([elbo]), what="lower")
    check_below(t([elbo]), many.mean(0)[1:] + 5 * spread(many)[1:], what="upper")
    check_below(few.mean(0)[:1], many.mean(0)[:1], what="the lower bound rises with the pool")
    with pytest.raises(ValueError, match="at least two chains"):
        semi_implicit_bounds(at, draws(1, 1, 2), 0.1, 3)


def test_the_largest_curvature_of_a_linear_decoder_is_its_largest_eigenvalue():
    model, x = model_a(), t(X).expand(B, 3)
    got = largest_curvature(lambda z: model.log_joint(x, z), draws(S, B, 2), num_iterations=100,
                            generator=torch.Generator().manual_seed(0))
    check_close(got, torch.full((S, B), LARGEST, **double), 1e-9)


# ---------------------------------------------------------------- choosing the step size
def test_exact_tuning_finds_the_best_size_of_the_grid():
    grid = [0.1, 0.16, 0.175, 0.19, 0.25]
    assert tune_step_size(model_a(), t(X), objective="exact", grid=grid).step_size == 0.175
    found = tune_step_size(ToyN(), t([[1.5]]), objective="exact", grid=grid)
    assert found.step_size == 0.175
    check_close(found.values[0], t(0.083230119270), 1e-9)


def test_the_papers_objective_picks_half_the_size():
    found = tune_step_size(model_a(), t(X), grid=[0.05, 0.07, 0.09, 0.12, 0.175], num_chains=400,
                           generator=torch.Generator().manual_seed(0))
    assert found.step_size == 0.09
    model = model_a()
    tuned = model.tune(t(X), objective="exact", grid=[0.1, 0.175])
    assert tuned.step_size == 0.175 and model.step_size.tolist() == [0.175, 0.175]
    semi = tune_step_size(model_a(), t(X), objective="semi_implicit", grid=[0.05, 0.09, 0.175, 0.3], num_chains=300,
                          generator=torch.Generator().manual_seed(0))
    assert semi.step_size == 0.175


def test_the_gradient_route_agrees_with_reverse_mode_and_differences_and_descends():
    torch.manual_seed(0)
    model = ShortRunModel(decoder=mlp([2, 6, 4], "tanh").double(), noise_var=0.2)
    x, z0, noise = draws(B, 4), draws(S, B, 2, seed=1), draws(T, S, B, 2, seed=2)
    options = {"num_steps": T, "z0": z0, "noise": noise}
    value = lambda s: float(tune_step_size(model, x, grid=[float(s)], **options).values[0])
    f = _objective(lambda z: model.log_joint(x, z), z0, noise, "jacobian")
    forward = _jvp(f, t(0.1), t(1.0))[1]
    s = t(0.1).requires_grad_()
    check_close(forward.detach(), torch.autograd.grad(f(s), s)[0], 1e-10)
    check_close(forward.detach(), oracles.finite_difference(value, np.array(0.1), 1e-5), 1e-6)
    found = tune_step_size(model, x, method="gradient", start=0.03, num_iterations=12, lr=0.2, **options)
    assert float(found.values.min()) < float(found.values[0]) - 0.01
    check_close(value(found.step_size), found.values.min(), 1e-12)
    each = tune_step_size(model, x, method="gradient", start=t([0.03, 0.05]), num_iterations=12, lr=0.2, **options)
    assert len(each.step_size) == 2
    check_below(each.values.min(), found.values.min() + 1e-3, what="a size for each latent is no worse")


def test_tuning_refuses_bad_arguments():
    x = t(X)
    with pytest.raises(ValueError, match="objective must be one of 'jacobian', 'semi_implicit', 'exact', got 'elbo'"):
        tune_step_size(model_a(), x, objective="elbo")
    with pytest.raises(ValueError, match="method must be one of"):
        tune_step_size(model_a(), x, method="random")
    with pytest.raises(ValueError, match="every one of the 2 tried blew up"):
        tune_step_size(model_a(), x, grid=[1e60, 1e80], num_chains=2, num_steps=20)
    with pytest.raises(ValueError, match="needs a linear decoder, or one latent"):
        tune_step_size(ShortRunModel(decoder=mlp([2, 3, 3]).double(), noise_var=1.0), x, objective="exact")
    with pytest.raises(ValueError, match="needs a stochastic chain"):
        tune_step_size(model_a(), x, objective="semi_implicit", stochastic=False)


# ---------------------------------------------------------------- the models
@pytest.mark.parametrize("options", [{}, {"stochastic": False}, {"kernel": "mala"}, {"kernel": "hmc", "num_leapfrog": 2},
                                     {"start": "encoder"}], ids=str)
def test_the_model_contract(options):
    torch.manual_seed(0)
    model = ShortRunModel(small(), num_steps=T, step_size=(0.1, 0.2, 0.15), **options).double()
    x, g = draws(B, D, seed=1), lambda: torch.Generator().manual_seed(3)
    assert model.step_size.tolist() == [0.1] * 3 + [0.2] * 2 + [0.15] * 4
    posterior = model.posterior(x)
    assert isinstance(posterior, ShortRunPosterior)
    parts = posterior.rsample((S,), generator=g())
    assert [p.shape for p in parts] == [(S, B, 3), (S, B, 2), (S, B, 4)] and not parts[0].requires_grad
    noise = step_noise(model.noise_spec(B, S), 0)
    assert torch.equal(model.infer(x, num_samples=S, noise=noise), model.infer(x, num_samples=S, noise=noise))
    check_close(model.reconstruct(x, num_samples=S, generator=g()),
                model.generator.mean(model.infer(x, num_samples=S, generator=g())).mean(0).detach(), 1e-14)
    assert model.sample(S, generator=g()).shape == (S, D)
    assert [p.shape for p in model.sample_latents(S, generator=g())] == [(S, 3), (S, 2), (S, 4)]
    assert reconstruction_error(model, x, generator=g()).shape == (B,)
    assert short_run_loss(model, x).shape == (B,)


def test_chains_of_the_model_are_short_run_with_its_noise():
    model, x = ShortRunModel(small(), num_steps=T, step_size=0.1), draws(B, D, seed=1)
    noise = step_noise(model.noise_spec(B, S), 0)
    want = short_run(lambda z: model.generator.score(x, z), noise["start"], 0.1, T, noise=noise["chain"])
    assert torch.equal(model.infer(x, num_samples=S, noise=noise), want)
    wrong = {**noise, "chain": noise["chain"][1:]}
    with pytest.raises(ValueError, match=r"noise must hold 'chain' of shape \(4, 5, 3, 9\)"):
        model.infer(x, num_samples=S, noise=wrong)


def test_the_loss_is_minus_log_joint_at_the_end_point_held_fixed():
    model, x = ShortRunModel(small(), num_steps=T, step_size=0.1), draws(B, D, seed=1)
    noise = step_noise(model.noise_spec(B, 1), 0)
    z = model.infer(x, noise=noise)
    loss = short_run_loss(model, x, noise)
    check_close(loss.detach(), -model.log_joint(x, z)[0].detach(), 1e-13)
    loss.sum().backward()
    by_hand = torch.autograd.grad(-model.log_joint(x, z).sum(), list(model.parameters()))
    for p, gradient in zip(model.parameters(), by_hand, strict=True):
        check_close(p.grad, gradient, 1e-12)


def test_fishers_identity_holds_for_exact_posterior_samples():
    # With many corrected steps the loss's gradient is that of the log-likelihood, here by differences of closed forms.
    model = model_a(kernel="mala", num_steps=120, step_size=0.3)
    x = t(X)
    z = model.infer(x, num_samples=4000, generator=torch.Generator().manual_seed(0))[:, 0]
    residual = x - model.generator.mean(z).detach()
    each = residual[:, :, None] * z[:, None] / NOISE_VAR
    evidence = lambda W: oracles.linear_gaussian_evidence(np.array(X), W, np.array(BIAS), NOISE_VAR)[0]
    check_mc(each, oracles.finite_difference(evidence, np.array(WEIGHT)), what="gradient in the weights")


def test_persistent_chains_go_on_where_they_ended_and_are_stored():
    torch.manual_seed(0)
    model = ShortRunModel(small(), num_steps=2, step_size=0.1, start="persistent", num_data=6).double()
    x, rows = draws(B, D, seed=1), torch.tensor([4, 0, 2])
    before, noise = model.chains.clone(), step_noise(model.noise_spec(B), 0)
    short_run_loss(model, (x, rows), noise)
    want = short_run(lambda z: model.generator.score(x, z), before[rows][None], 0.1, 2, noise=noise["chain"])
    assert torch.equal(model.chains[rows], want[0])
    assert torch.equal(model.chains[[1, 3, 5]], before[[1, 3, 5]]) and "chains" in model.state_dict()
    with pytest.raises(ValueError, match=r"batch must be \(x, rows\)"):
        short_run_loss(model, x)
    fit(model, (draws(6, D), torch.arange(6)), loss=short_run_loss, num_steps=4, batch_size=3, lr=1e-3, device="cpu")


def test_an_encoder_learns_by_the_elbo_and_the_generator_by_the_chain():
    torch.manual_seed(0)
    model = ShortRunModel(small(), num_steps=2, step_size=0.1, start="encoder",
                          encoder=BottomUpEncoder(D, (3, 2, 4), 6)).double()
    vae = LayeredVAE(model.generator, encoder=model.encoder)
    x = draws(B, D, seed=1)
    noise = step_noise(model.noise_spec(B), 0)
    loss = short_run_loss(model, x, noise)
    z = model.infer(x, noise=noise)
    q = model.encoder(x)
    start = (q.loc + (0.5 * q.log_var).exp() * noise["start"]).detach()
    check_close(z, short_run(lambda v: model.generator.score(x, v), start, 0.1, 2, noise=noise["chain"]), 1e-12)
    check_close(loss.detach(), -model.log_joint(x, z)[0].detach(), 1e-13)
    got = torch.autograd.grad(loss.sum(), [*model.generator.parameters(), *model.encoder.parameters()])
    theta = torch.autograd.grad(-model.log_joint(x, z).sum(), list(model.generator.parameters()))
    phi = torch.autograd.grad(-vae.bound(x, noise=noise["start"]).sum(), list(model.encoder.parameters()))
    for one, other in zip(got, [*theta, *phi], strict=True):
        check_close(one, other, 1e-11)


def test_the_layered_vae_bounds_the_exact_evidence():
    torch.manual_seed(0)
    model = LayeredVAE(decoder=model_a().generator.readout, noise_var=NOISE_VAR, freeze_decoder=True, hidden_dims=8)
    model = model.double()
    x = draws(B, 3, seed=1)
    exact = oracles.linear_gaussian_evidence(x.numpy(), np.array(WEIGHT), np.array(BIAS), NOISE_VAR)
    bound = model.bound(x, num_samples=500, generator=torch.Generator().manual_seed(0)).detach()
    check_below(bound, exact, what="the bound")
    found = model.log_likelihood(x, 4000, generator=torch.Generator().manual_seed(1))
    check_mc(found.value, exact, standard_error=found.standard_error.numpy() + 1e-9, what="importance sampling")
    # The closed KL against a plain average of log p(x, z) - log q(z).
    q = model.posterior(x)
    z = q.rsample((4000,), generator=torch.Generator().manual_seed(2))
    terms = (model.log_joint(x, z) - q.log_prob(z)).detach()
    check_mc(terms - bound, 0.0, what="bound", standard_error=None, z=8)


def test_annealed_sampling_of_the_model_matches_the_exact_evidence():
    model = model_a()
    found = model.log_likelihood(t(X), 200, generator=torch.Generator().manual_seed(0), num_steps=100)
    check_mc(found.value, np.array([LOG_PX]), standard_error=found.standard_error.numpy(), what="AIS with HMC")


@pytest.mark.parametrize("options", [{}, {"kernel": "mala"}, {"kernel": "hmc", "num_leapfrog": 3}], ids=str)
def test_many_small_steps_reach_the_exact_posterior_of_a_piecewise_affine_decoder(options):
    torch.manual_seed(1)
    decoder, x = mlp([2, 6, 5], "relu").double(), draws(B, 5, seed=1)
    truth = analytic_em.exact_posterior(decoder, x, 0.5)
    size, num = (0.1, 500) if not options else (0.5, 100)
    model = ShortRunModel(decoder=decoder, noise_var=0.5, num_steps=num, step_size=size, **options)
    z = model.infer(x, num_samples=4000, generator=torch.Generator().manual_seed(0))
    check_mc(z, truth.mean.detach(), what="posterior mean")
    centred = z - truth.mean.detach()
    # Unadjusted steps leave a bias of h lambda / 4 of the variance: 1 % at this size.
    check_mc(centred[..., :, None] * centred[..., None, :], truth.covariance.detach(), z=6, what="covariance")
    five = ShortRunModel(decoder=decoder, noise_var=0.5, num_steps=5, step_size=0.1)
    early = five.infer(x, num_samples=4000, generator=torch.Generator().manual_seed(0))
    distance = lambda z: float((z.mean(0) - truth.mean).detach().norm())
    assert distance(z) < 0.3 * distance(early)


def test_prior_chains_stay_in_the_wrong_folds_of_the_wave():
    # What more steps do not cure: the exact law of the chain, on a grid, keeps the mass that started in another fold.
    member = cast.load("wave")
    law = lambda num: propagate_on_grid(lambda z: member.log_joint(member.x[:1], z), 0.1, num, num_points=601, low=-6.0,
                                        high=6.0)
    check_close(law(1).log_evidence, member.log_evidence[:1], 1e-3)
    kl = {num: float(law(num).kl) for num in (5, 20, 100)}
    assert kl[5] > kl[20] > kl[100] > 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [small, small_conv], ids=["mlp", "conv"])
def test_learning_on_a_device_repeats_the_cpu(make, device):
    runs = []
    for where in ("cpu", device):
        model = ShortRunModel(make(), num_steps=T, step_size=0.05)
        fit(model, draws(6, model.data_dim, seed=1), loss=short_run_loss, num_steps=4, batch_size=3, lr=1e-3, device=where)
        runs.append([p.detach().cpu() for p in model.parameters()])
    for one, other in zip(*runs, strict=True):
        check_close(one, other, 1e-9)


# ---------------------------------------------------------------- inpainting
def test_inpainting_a_linear_model_matches_the_masked_law():
    model, observed = model_a(), torch.tensor([True, False, True])
    x = t(X)
    x[0, 1] = torch.nan
    got = inpaint(model, x, observed, num_chains=20_000, generator=torch.Generator().manual_seed(0))
    check_mc(got.chains[:, 0, 1], -0.4014766432798443, what="hidden entry")
    check_close(got.mean[0, [0, 2]], t([1.0, -0.75]), 1e-15)
    check_close(got.scale[0, [0, 2]], t([0.0, 0.0]), 1e-15)
    check_close(got.mean[0, 1], got.chains[:, 0, 1].mean(), 1e-12)
    check_close(got.scale[0, 1], got.chains[:, 0, 1].std(), 1e-12)
    law = law_a(0.15, 20, observed=observed)
    check_mc((got.chains[:, 0, 1] + 0.4014766432798443) ** 2, law.covariance[1, 1], what="its spread")


@pytest.mark.parametrize(("observed", "message"), [
    (torch.zeros(2, D, dtype=torch.bool), "observed hides everything in 2 of 2 rows, the first of them 0"),
    (torch.ones(2, D), "observed must be bool"),
    (torch.ones(D - 1, dtype=torch.bool), r"observed must be bool of shape \[2, 7\] or \[7\]"),
    (torch.ones(D, dtype=torch.bool), "x holds a value that is not finite where observed is True"),
])
def test_inpainting_refuses_bad_masks(observed, message):
    x = torch.full((2, D), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        inpaint(ShortRunModel(small()), x, observed)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ({"step_size": -0.1}, "step_size must be positive and finite"),
    ({"step_size": (0.1, 0.2)}, r"step_size must be a number, 3 of them \(one a layer\) or 9"),
    ({"kernel": "nuts"}, "kernel must be one of 'langevin', 'mala', 'hmc', got 'nuts'"),
    ({"start": "posterior"}, "start must be one of 'prior', 'persistent', 'encoder'"),
    ({"start": "persistent"}, "num_data, the number of training examples, belongs to start='persistent'"),
    ({"num_data": 5}, "num_data, the number of training examples, belongs to start='persistent'"),
    ({"kernel": "mala", "stochastic": False}, "stochastic=False belongs to kernel 'langevin'"),
    ({"encoder": nn.Linear(2, 2)}, "encoder belongs to start='encoder'"),
    ({"decoder": nn.Linear(2, 2)}, "give either a generator or a decoder"),
])
def test_the_model_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ShortRunModel(small(), **options)


def test_an_unknown_width_of_the_encoder_is_refused():
    with pytest.raises(ValueError, match="hidden_dims must have one entry per layer: 2 latent_dims"):
        BottomUpEncoder(D, (3, 2), (5,))


def test_the_encoder_limits_its_log_variance_softly():
    encoder = BottomUpEncoder(D, (3,), (5,)).double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
        encoder.heads[0].bias.copy_(t([0.1, 0.2, 0.3, 6.0, -60.0, 0.0]))
    q = encoder(draws(B, D))
    check_close(q.loc[0].detach(), t([0.1, 0.2, 0.3]), 1e-14)
    check_close(q.log_var[0].detach(), t([10 * np.tanh(0.6), 10 * np.tanh(-6.0), 0.0]), 1e-12)


def test_non_finite_weights_and_exploding_training_are_one_clear_error():
    model = ShortRunModel(small(), num_steps=T, step_size=0.1)
    with torch.no_grad():
        model.generator.readout[0].weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 1 of 4"):
        model.infer(draws(B, D))
    linear = model_a(step_size=3.0)
    with pytest.raises(FloatingPointError, match=r"step_size 3 blows up at step \d+ of 20"):
        fit(linear, draws(4, 3), loss=short_run_loss, num_steps=2, batch_size=2, lr=1e-3, device="cpu")


# ---------------------------------------------------------------- the NumPy of the chapter, number by number
def layered(generator):
    """A tanh generator's weights as the chapter's functions take them, and its log-joint (x, flat noises) -> [...]."""
    arrays = generator.as_arrays()
    log_joint = lambda w, x, e: scratch.log_joint_noise(w[0], w[1], x, e, generator.latent_dims, generator.noise_var)
    return (arrays["heads"], arrays["readout"]), log_joint


@pytest.mark.parametrize("stochastic", [True, False])
def test_whole_trajectories_are_those_of_numpy(stochastic):
    generator, x = small(), draws(B, D, seed=1)
    weights, log_joint = layered(generator)
    score = scratch.score_of(lambda e: log_joint(weights, x.numpy(), e))
    model = ShortRunModel(generator, num_steps=20, step_size=(0.1, 0.15, 0.2), stochastic=stochastic)
    noise = step_noise(model.noise_spec(B, S), 0)
    noise = noise if stochastic else {"start": noise}
    z = noise["start"]
    for k in (1, 2, 5, 10, 20):
        injected = noise["chain"].numpy() if stochastic else None
        want = scratch.short_run(score, z.numpy(), model.step_size.numpy(), k, noise=injected, stochastic=stochastic)
        short = ShortRunModel(generator, num_steps=k, step_size=(0.1, 0.15, 0.2), stochastic=stochastic)
        part = {"start": z, **({"chain": noise["chain"][:k]} if stochastic else {})}
        check_close(short.infer(x, num_samples=S, noise=part), want, 1e-9)


def test_ten_learning_steps_end_at_the_same_parameters_as_numpy():
    generator, x = small(), draws(6, D, seed=1)
    weights, log_joint = layered(generator)
    model = ShortRunModel(generator, num_steps=20, step_size=0.1)
    spec, memory = model.noise_spec(B), None
    fit(model, x, loss=short_run_loss, num_steps=10, batch_size=B, lr=0.01, seed=3, device="cpu")
    flat, rebuild = autograd.misc.flatten(weights)
    for step in range(10):
        noise = step_noise(spec, step, seed=3)
        rows = epoch_order(6, step // 2, seed=3)[step % 2 * B:][:B]
        batch, now = x[rows].numpy(), rebuild(flat)
        score = scratch.score_of(lambda e, batch=batch, now=now: log_joint(now, batch, e))
        z = scratch.short_run(score, noise["start"].numpy(), 0.1, 20, noise=noise["chain"].numpy())
        slope = autograd.grad(lambda w, batch=batch, z=z: -anp.mean(log_joint(rebuild(w), batch, z)))(flat)
        flat, memory = adam_step(flat, slope, memory, 0.01)
    check_close(autograd.misc.flatten(layered(generator)[0])[0], flat, 1e-9)


def test_corrected_chains_and_both_bounds_are_those_of_numpy():
    generator, x = small(), draws(1, D, seed=1)
    weights, log_joint = layered(generator)
    log_p = lambda e: log_joint(weights, x.numpy(), e)
    score = scratch.score_of(log_p)
    model = ShortRunModel(generator, num_steps=T, step_size=0.2, kernel="mala")
    noise = step_noise(model.noise_spec(1, S), 0)
    z = noise["start"].numpy()
    for k in range(T):
        z, _ = scratch.mala_step(log_p, score, z, 0.2, noise["chain"][k].numpy(), noise["accept"][k].numpy())
    check_close(model.infer(x, num_samples=S, noise=noise), z, 1e-9)
    at = lambda e: generator.log_joint(x, e)
    got = jacobian_bound(at, noise["start"], 0.1, T, noise=noise["chain"])
    terms, folds = scratch.jacobian_kl(score, log_p, noise["start"].numpy(), 0.1, T, noise=noise["chain"].numpy())
    check_close(-got.value, terms.mean(0), 1e-9)
    assert bool(got.folds[0]) == folds
    both = semi_implicit_bounds(at, noise["start"], 0.3, T, noise=noise["chain"])
    low, high = scratch.semi_implicit_bounds(score, log_p, noise["start"][:, 0].numpy(), 0.3, T,
                                             noise["chain"][:, :, 0].numpy())
    check_close(-both.upper, low.mean()[None], 1e-9)
    check_close(-both.lower, high.mean()[None], 1e-9)


def test_the_law_with_a_size_for_each_latent_is_that_of_numpy():
    sizes = np.array([0.1, 0.2])
    precision = np.eye(2) + np.transpose(WEIGHT) @ WEIGHT / NOISE_VAR
    mean, _ = oracles.linear_gaussian_posterior(X, WEIGHT, BIAS, NOISE_VAR)
    want_mean, want_cov = scratch.general_law(mean[0], precision, np.eye(2), sizes, 7)
    law = law_a(t(sizes), 7)
    check_close(law.mean[0], want_mean, 1e-12)
    check_close(law.covariance, want_cov, 1e-12)
