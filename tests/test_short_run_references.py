"""Chapter 6's reference numbers that are not in `test_short_run_mcmc`: optima, calibration, learning, corrected chains."""

import numpy as np
import pytest
import torch
from scipy import optimize, signal
from test_short_run_mcmc import (
    BIAS,
    LARGEST,
    LOG_PX,
    NOISE_VAR,
    SMALLEST,
    WEIGHT,
    ToyN,
    X,
    double,
    draws,
    law_a,
    model_a,
    score_of,
    small_conv,
    t,
)
from torch import nn

from dlgm_tutorial import evaluation, oracles
from dlgm_tutorial._endpoint import _jacobian_terms, _jvp
from dlgm_tutorial.checks import check_below, check_close, check_mc
from dlgm_tutorial.mcmc import init, mala_step
from dlgm_tutorial.networks import mlp
from dlgm_tutorial.scratch import short_run_mcmc as scratch
from dlgm_tutorial.short_run_mcmc import (
    MultiLayerGenerator,
    ShortRunModel,
    jacobian_bound,
    law_of_endpoint,
    propagate_on_grid,
    semi_implicit_bounds,
    short_run,
    short_run_loss,
    tune_step_size,
)
from dlgm_tutorial.training import fit

LAM = np.array([SMALLEST, LARGEST])
VECTORS = np.linalg.eigh(np.eye(2) + np.transpose(WEIGHT) @ WEIGHT / NOISE_VAR)[1]


def joint_a(num, generator):
    """num pairs (z [num, 2], x [num, 3]) of model A."""
    z = torch.randn(num, 2, generator=generator, **double)
    return z, z @ t(WEIGHT).mT + t(BIAS) + NOISE_VAR**0.5 * torch.randn(num, 3, generator=generator, **double)


# ---------------------------------------------------------------- chains
def test_batch_normalisation_is_refused_in_training_and_harmless_in_evaluation():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
    generator = MultiLayerGenerator(decoder=decoder, noise_var=0.3)
    x, z = draws(3, 4, seed=1), draws(1, 3, 2, seed=2)
    generator.eval()
    alone = torch.cat([generator.score(x[i:i + 1], z[:, i:i + 1]) for i in range(3)], 1)
    check_close(generator.score(x, z), alone, 1e-12)
    generator.train()
    with pytest.raises(ValueError, match="batch normalisation in training mode, which couples the chains"):
        generator.score(x, z)
    # Why: in training the gradient of the sum is not the scores of the rows.
    v = z[0].clone().requires_grad_()
    mixed = torch.autograd.grad(generator.log_joint(x, v[None]).sum(), v)[0]
    assert float((mixed - alone[0]).abs().max()) > 0.1


def test_a_variance_taken_for_the_step_size_does_not_pass():
    # R1 again, with h = s^2 / 2 in the place of s.
    k = np.arange(20) + 1
    noise = t(0.5 * np.stack([np.cos(k), np.sin(k)], -1)[:, None, None])
    model = model_a()
    score = lambda z: model.generator.score(t(X), z)
    wrong = short_run(score, t([[[0.3, -0.7]]]), 0.15**2 / 2, 20, noise=noise)
    assert float((wrong[0, 0] - t([0.62810717085598, 0.0568945298380632])).abs().max()) > 0.1


def test_the_spread_of_end_points_over_data_falls_short_of_the_prior():
    z, x = joint_a(40_000, torch.Generator().manual_seed(0))
    ends = model_a().infer(x, generator=torch.Generator().manual_seed(1))[0]
    along, truth = (v @ torch.from_numpy(VECTORS) for v in (ends, z))
    check_mc(along.square(), np.array([0.72555745475, 0.998420619295]), what="aggregated variance")
    check_mc(along * truth, np.array([0.674488320657, 0.94900639119]), what="covariance with the truth")
    residual = (x - ends @ t(WEIGHT).mT - t(BIAS)).square().sum(-1)
    check_mc(residual, 0.9858233533, what="squared residual, short run")


def test_from_the_posterior_langevin_inflates_the_variance_and_mala_does_not():
    x, num = t(X), 20_000
    mean, cov = oracles.linear_gaussian_posterior(X, WEIGHT, BIAS, NOISE_VAR)
    start = torch.from_numpy(mean[0]) + draws(num, 2) @ torch.linalg.cholesky(torch.from_numpy(cov)).mT
    ratio = lambda z: ((z - torch.from_numpy(mean[0])) @ torch.from_numpy(VECTORS)).square() * torch.from_numpy(LAM)
    model = model_a(num_steps=10, step_size=0.25)
    z = model.run(x, start[:, None], {"chain": draws(10, num, 1, 2, seed=1)})[:, 0]
    check_mc(ratio(z), np.array([1.116264, 1.498131]), what="unadjusted steps of 0.25")
    log_density = lambda z: model.log_joint(x, z)
    for size, rate in ((0.15, 0.9726), (0.25, 0.8746)):
        state, accepted = init(log_density, start[:, None]), 0.0
        for k in range(10):
            noise = {"normal": draws(num, 1, 2, seed=10 + k), "uniform": torch.rand(
                num, 1, generator=torch.Generator().manual_seed(k), **double)}
            state, info = mala_step(state, noise, log_density=log_density, step_size=size)
            accepted += float(info.accepted.double().mean()) / 10
        check_mc(ratio(state.z[:, 0]), np.ones(2), what=f"MALA, steps of {size}")
        check_close(accepted, rate, 0.004)


# ---------------------------------------------------------------- the convolutional generator, by loops
def silu(h):
    return h / (1 + np.exp(-h))


def convolve(h, layer):
    """A 3 x 3 convolution with a margin of zeros, [C, s, s] -> [O, s, s]."""
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    return np.stack([bias[o] + sum(signal.correlate2d(h[c], weight[o, c], "same") for c in range(len(h)))
                     for o in range(len(weight))])


def affine(h, layer):
    return layer.weight.detach().numpy() @ h + layer.bias.detach().numpy()


def convolutional_mean(generator, noises):
    """E[x | noises] of one example, by the definition: latents projected to maps, added to those from above."""
    features = None
    for layer in reversed(range(generator.num_layers)):
        block, z = generator.blocks[layer], noises[layer]
        if features is not None:
            first, last = generator.heads[layer][1], generator.heads[layer][5]
            h = silu(convolve(silu(features), first))
            h = h.reshape(len(h), h.shape[1] // 2, 2, h.shape[2] // 2, 2).mean((2, 4))
            loc, raw = np.split(affine(h.ravel(), last), 2)
            z = loc + (1e-3 + np.log1p(np.exp(raw))) * z
        linear, _, _, conv = block.project
        h = convolve(silu(affine(z, linear)).reshape(4, block.size, block.size), conv)
        if features is not None:
            h = h + (features if features.shape[-1] == block.size else features.repeat(2, 1).repeat(2, 2))
        features = h + convolve(silu(convolve(silu(h), block.residual[1])), block.residual[3])
    up = generator.readout[1]
    weight, maps = up.weight.detach().numpy(), silu(features)
    side = 2 * maps.shape[-1]
    out = np.zeros((weight.shape[1], side + 2, side + 2))
    for (c, y, x), value in np.ndenumerate(maps):
        out[:, 2 * y:2 * y + 4, 2 * x:2 * x + 4] += value * weight[c]
    out = out[:, 1:-1, 1:-1] + up.bias.detach().numpy()[:, None, None]
    return 1 / (1 + np.exp(-out.ravel()))


def test_the_convolutional_generator_is_its_definition():
    generator = small_conv()
    with torch.no_grad():
        for p in generator.parameters():  # fresh biases are zero: give every term something to do
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    z = draws(2, 9, seed=3)
    want = [convolutional_mean(generator, [part.numpy() for part in generator.split(row)]) for row in z]
    check_close(generator.mean(z).detach(), np.stack(want), 1e-11)


def test_the_initial_weights_are_those_of_the_generator_given():
    one, two, other = small_conv(), small_conv(), small_conv(seed=1)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------- one latent
R3 = {0.05: (1.418083156873, 1.208210682408, 0.662857948466), 0.10: (1.255018011006, 0.659723924698, 0.083230119270),
      0.15: (1.017340032666, 0.262177557138, 0.008774638825), 0.20: (0.753209089515, 0.106516571843, 0.008303734607),
      0.30: (0.381890307483, 0.066261485539, 0.051690672510), 0.40: (0.436074523367, 0.256461162440, 0.255132935419)}


@pytest.mark.parametrize("step", R3)
def test_the_whole_table_of_toy_n_and_more_steps_end_nearer(step):
    kl = [float(propagate_on_grid(ToyN().at, step, num, num_points=1201).kl) for num in (1, 5, 20)]
    check_close(kl, R3[step], 1e-9)
    assert kl[0] > kl[1] > kl[2]


@pytest.mark.parametrize(("num_steps", "best", "kl"), [(1, 0.3391812, 0.346823760), (5, 0.2666618, 0.056161418),
                                                       (20, 0.1723732, 0.006116936865)])
def test_the_best_steps_of_toy_n(num_steps, best, kl):
    f = lambda s: float(propagate_on_grid(ToyN().at, float(s), num_steps, num_points=901).kl)
    check_close(f(best), kl, 1e-8)
    check_close(oracles.finite_difference(f, np.array(best), 1e-4), 0.0, 1e-4)


def test_five_thousand_small_steps_reach_the_posterior_of_toy_n():
    law = propagate_on_grid(ToyN().at, 0.05, 5000, num_points=551, low=-6.0, high=6.0)
    check_close(law.kl, t([2.526e-5]), 2e-8)


def noise_free_kl(step, num_steps, num=2001):
    nodes = np.linspace(-9, 9, num)
    weights = np.exp(-nodes**2 / 2) / np.exp(-nodes**2 / 2).sum()
    got = jacobian_bound(ToyN().at, t(nodes).reshape(-1, 1, 1), step, num_steps, stochastic=False)
    terms = (ToyN().at(got.z) + got.log_det)[:, 0].numpy() + nodes**2 / 2 + np.log(2 * np.pi) / 2
    return ToyN.log_px - weights @ terms, weights @ np.exp(terms - ToyN.log_px), bool(got.folds.any())


@pytest.mark.parametrize(("num_steps", "best", "kl"), [(1, 0.29023554, 0.2893578677), (5, 0.16536503, 0.1386647398),
                                                       (20, 0.08616847, 0.1119804422)])
def test_the_best_silent_steps_of_toy_n(num_steps, best, kl):
    check_close(noise_free_kl(best, num_steps)[0], kl, 1e-8)
    f = lambda s: noise_free_kl(float(s), num_steps, 501)[0]
    check_close(oracles.finite_difference(f, np.array(best), 1e-4), 0.0, 1e-3)


def test_importance_weights_by_the_change_of_variables_are_unbiased_without_folds():
    for num_steps, step in ((1, 0.1), (1, 0.3), (5, 0.15)):
        check_close(noise_free_kl(step, num_steps, 2001)[1], 1.0, 1e-8)
    for step, ratio, naive in ((0.40, 2.17, 0.20407), (0.45, 2.44, -0.04917)):
        kl, mean_weight, folds = noise_free_kl(step, 1, 10_001)
        check_close(mean_weight, ratio, 0.01)
        check_close(kl, naive, 5e-3)
        assert folds


@pytest.mark.parametrize(("step", "turn"), [(0.45, 0.66175), (0.40, 0.76163)])
def test_a_fold_lies_where_the_derivative_of_a_step_vanishes(step, turn):
    slope = lambda z: float(_jvp(lambda v: v + 0.5 * step**2 * score_of(ToyN().at)(v), t([[[z]]]), t([[[1.0]]]))[1])
    check_close(abs(optimize.brentq(slope, 0.5, 1.2)), turn, 1e-5)
    assert slope(turn - 0.05) * slope(turn + 0.05) < 0


@pytest.mark.parametrize(("precision", "mu", "num_steps", "size", "kl"), [
    (5.0, 0.8, 10, 0.19986151425822, 0.24734812091805), (25.0, 0.3, 20, 0.079651685880867, 0.043088848120526)])
def test_without_noise_the_best_divergence_is_that_of_the_mean_alone(precision, mu, num_steps, size, kl):
    # x = w z + e with w^2 + 1 = precision and x such that the posterior mean is mu.
    w = (precision - 1) ** 0.5
    value = lambda s, num: law_of_endpoint(t([[w]]), t([0.0]), 1.0, t([[mu * precision / w]]), s, num,
                                           stochastic=False).kl
    best = (2 * (1 - (precision * (1 + mu**2)) ** (-0.5 / num_steps)) / precision) ** 0.5
    check_close(best, size, 1e-12)
    check_close(value(best, num_steps), t([kl]), 1e-12)
    check_close(kl, 0.5 * np.log1p(mu**2), 1e-12)  # whatever the number of steps
    longer = optimize.minimize_scalar(lambda s: float(value(float(s), 60)), bounds=(0.3 * size, size), method="bounded",
                                      options={"xatol": 1e-10})
    check_close(longer.fun, kl, 1e-9)


def test_without_noise_the_average_divergence_stays_too():
    w, mu = 2.0, (1 - 1 / 5) ** 0.5
    kl = lambda s: law_of_endpoint(t([[w]]), t([0.0]), 1.0, t([[mu * 5 / w]]), s, 10, stochastic=False).kl
    check_close(kl(0.204001509954), t([0.293893332451]), 1e-11)
    check_close(0.5 * np.log(2 - 1 / 5), 0.293893332451, 1e-12)
    assert float(kl(0.204001509954)) < min(float(kl(0.202)), float(kl(0.206)))


# ---------------------------------------------------------------- bounds
def test_the_slope_of_the_jacobian_bound_by_simulation():
    model, x = model_a(), t(X)
    z0, noise = draws(2000, 1, 2, seed=5), draws(20, 2000, 1, 2, seed=6)
    terms = lambda s: -_jacobian_terms(lambda z: model.log_joint(x, z), z0, s.expand(2), noise)[0]
    check_mc(_jvp(terms, t(0.15), t(1.0))[1][:, 0].detach(), 101.542982680378, what="dJ/ds")


def test_log_determinants_in_single_precision_keep_four_digits():
    torch.manual_seed(0)
    decoder = mlp([8, 10, 6], "tanh").double()
    z0, noise, x = draws(5, 1, 8), draws(20, 5, 1, 8, seed=1), draws(1, 6, seed=2)
    parts = []
    for dtype in (torch.float64, torch.float32):
        generator = MultiLayerGenerator(decoder=decoder.to(dtype), noise_var=0.5)
        got = jacobian_bound(lambda z, g=generator, d=dtype: g.log_joint(x.to(d), z), z0.to(dtype), 0.1, 20,
                             noise=noise.to(dtype))
        parts.append(got.log_det)
    assert parts[1].dtype == torch.float32
    check_close(parts[1].double(), parts[0], 1e-4)


def test_the_sandwich_holds_the_divergence_of_toy_n_and_closes():
    widths = []
    for num, repeats in ((10, 60), (100, 12), (1000, 3)):
        got = [semi_implicit_bounds(ToyN().at, draws(num, 1, 1, seed=r), 0.17237, 20,
                                    generator=torch.Generator().manual_seed(100 + r)) for r in range(repeats)]
        lower, upper = (torch.cat([getattr(b, side) for b in got]) for side in ("lower", "upper"))
        widths.append(float((upper - lower).mean()))
    assert widths[0] > widths[1] > widths[2]
    check_below(widths[2], 0.01, what="a thousand chains: a hundredth of a nat")
    elbo = ToyN.log_px - 0.006116936865
    assert float(lower.mean()) - 0.01 < elbo < float(upper.mean()) + 0.01


def test_the_derivative_along_the_chain_is_the_recursion():
    at = score_of(ToyN().at)
    z0, noise = draws(6, 1, 1), draws(8, 6, 1, 1, seed=1)
    ends, slope = _jvp(lambda s: short_run(at, z0, s, 8, noise=noise), t(0.2), t(1.0))
    log_p = lambda z: scratch.log_joint(z, np.array([1.5]), scratch.valley, 0.25)
    want = scratch.run_with_tangent(scratch.score_of(log_p), z0[:, 0].numpy(), 0.2, 8, noise[:, :, 0].numpy())
    check_close(ends[:, 0], want[0], 1e-11)
    check_close(slope[:, 0], want[1], 1e-10)


def test_each_objective_of_the_tuner_is_the_estimate_it_names():
    model, x, z0, noise = model_a(), t(X), draws(30, 1, 2), draws(5, 30, 1, 2, seed=1)
    at = lambda z: model.log_joint(x, z)
    options = {"num_steps": 5, "grid": [0.2], "z0": z0, "noise": noise}
    both = semi_implicit_bounds(at, z0, 0.2, 5, noise=noise)
    check_close(tune_step_size(model, x, objective="semi_implicit", **options).values, -both.lower, 1e-12)
    bound = jacobian_bound(at, z0, 0.2, 5, noise=noise)
    check_close(tune_step_size(model, x, objective="jacobian", **options).values, -bound.value, 1e-12)
    silent = tune_step_size(model, x, objective="exact", grid=[0.09], num_steps=20, stochastic=False)
    check_close(silent.values, law_a(0.09, 20, stochastic=False).kl, 1e-12)


def test_a_size_at_which_the_map_folds_is_never_chosen():
    found = tune_step_size(ToyN(), t([[1.5]]), num_steps=1, stochastic=False, grid=[0.3, 0.45],
                           z0=torch.linspace(-3, 3, 41, **double).reshape(-1, 1, 1))
    assert found.values.isfinite().tolist() == [True, False] and found.step_size == 0.3


def test_a_size_at_which_chains_blow_up_is_never_chosen():
    class Quartic:
        num_latents = 2

        def log_joint(self, x, z):  # steps of 3 run away, and end as infinity minus infinity
            return -(z**4).sum(-1) - (x - z).square().sum(-1)

    found = tune_step_size(Quartic(), torch.zeros(3, 2, **double), grid=[0.1, 0.2, 3.0], objective="semi_implicit",
                           generator=torch.Generator().manual_seed(0))
    assert found.values.tolist()[2] == np.inf and found.step_size == 0.2


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_decoder_gets_no_gradient(freeze):
    decoder = mlp([2, 4, 3], dtype=torch.float64)
    generator = MultiLayerGenerator(decoder=decoder, noise_var=0.5, freeze_decoder=freeze)
    assert all(p.requires_grad is not freeze for p in generator.parameters())


# ---------------------------------------------------------------- two layers
def test_the_best_sizes_of_two_layers_in_both_coordinates():
    prior = np.array([[1.0, 0.9], [0.9, 0.85]])  # of the states, top first
    design = {"noise": (np.eye(2), np.array([[1.35, 0.3]])), "state": (prior, np.array([[0.0, 1.5]]))}

    def kl(name, s):
        start, row = design[name]
        precision = np.linalg.inv(start) + row.T @ row / 0.09
        mean = np.linalg.solve(precision, row[0] * 1.2 / 0.09)
        law = scratch.general_law(mean, precision, start, np.array(s), 20)
        return oracles.gaussian_kl(*law, mean, np.linalg.inv(precision))
    check_close(kl("noise", 0.1), 0.08153862098727, 1e-10)
    check_close(kl("state", 0.1), 1.40610643249915, 1e-10)
    for name, shared, value, each, better in (
            ("noise", 0.137823, 0.0038961738, (0.137824, 0.137818), 0.0038961738),
            ("state", 0.161135, 0.124187970, (0.197091, 0.132054), 0.0844976)):
        one = optimize.minimize_scalar(lambda s, name=name: kl(name, s), bounds=(0.05, 0.22), method="bounded",
                                       options={"xatol": 1e-9})
        check_close(one.x, shared, 2e-6)
        check_close(one.fun, value, 1e-9)
        check_close(kl(name, each), better, 1e-7)
        two = optimize.minimize(lambda s, name=name: kl(name, np.exp(s)), np.log(each), method="Nelder-Mead",
                                options={"xatol": 1e-7, "fatol": 1e-12})
        check_close(two.fun, better, 1e-7)


# ---------------------------------------------------------------- calibration
@pytest.mark.parametrize(("how", "options"), [
    ("chain at the bound's optimum", {"step_size": 0.0898}), ("one silent step", {"num_steps": 1, "step_size": 1e-4}),
    ("MALA", {"kernel": "mala", "num_steps": 30, "step_size": 0.35})])
def test_ranks_of_the_latents_cannot_see_what_ranks_of_the_fit_see(how, options):
    model = model_a(**options)

    class Flat:
        def __init__(self, x):
            self.x = x

        def rsample(self, shape, generator=None):
            return model.infer(self.x, num_samples=shape[0], generator=generator)

    def statistic(z, x):
        fit = -(x - z @ t(WEIGHT).mT - t(BIAS)).square().sum(-1, keepdim=True)
        return torch.cat([z @ torch.from_numpy(VECTORS).expand(2, 2), fit], -1)
    found = evaluation.simulation_based_calibration(joint_a, Flat, 1200, num_draws=31, statistic=statistic,
                                                    generator=torch.Generator().manual_seed(0))
    slow, fast, of_fit = found.chi_square(8)[0].tolist()
    assert max(slow, fast) < 26.0, how  # 1 in 2,000 for seven degrees of freedom
    if how == "MALA":
        assert of_fit < 26.0
    else:
        assert of_fit > 200.0


def test_ranks_of_the_latents_see_the_bias_of_large_steps():
    model = model_a(step_size=0.25)
    posterior = lambda x: type("Flat", (), {"rsample": lambda self, shape, generator=None: model.infer(
        x, num_samples=shape[0], generator=generator)})()
    found = evaluation.simulation_based_calibration(
        joint_a, posterior, 2000, num_draws=31, statistic=lambda z, x: z @ torch.from_numpy(VECTORS),
        generator=torch.Generator().manual_seed(0))
    slow, fast = found.chi_square(8)[0].tolist()
    assert fast > 60.0, slow


# ---------------------------------------------------------------- learning, linear decoders
C, VAR = 2.0, 0.25
MLE = (C - VAR) ** 0.5


def settle(w, s, num_steps, num=20_000):
    for _ in range(num):
        w = scratch.scalar_em(w, C, VAR, s, num_steps)
    return w


@pytest.mark.parametrize(("start", "s", "num_steps", "end"), [
    (0.5, 0.05, 20, 0.0), (1.4, 0.1, 20, 0.0), (1.6, 0.1, 20, 1.88500719878), (0.3, 0.1, 50, 1.596262815777),
    (1.0, 0.2, 20, 1.362876519884), (1.0, 0.3, 20, 1.203971128112), (MLE, 0.2, 10, 1.5966909933), (MLE, 0.2, 5, 0.0),
    (1.4, 0.2, 5, 1.76847499292)])
def test_where_learning_comes_to_rest(start, s, num_steps, end):
    check_close(settle(start, s, num_steps), end, 1e-9)


def test_unstable_points_and_thresholds():
    excess = lambda w, s, num: scratch.scalar_em(w, C, VAR, s, num) - w
    check_close(optimize.brentq(lambda w: excess(w, 0.1, 20), 1.45, 1.6, xtol=1e-14), 1.527116473007, 1e-10)
    check_close(optimize.brentq(lambda w: excess(w, 0.2, 5), 1.3, 1.36, xtol=1e-14), 1.342958384253, 1e-10)
    growth = lambda s: scratch.scalar_em(1e-6, C, VAR, s, 20) / 1e-6
    for s, num, rho in ((0.05, 20, 0.198), (0.1, 20, 0.763), (0.1, 50, 1.77), (0.2, 20, 2.64)):
        check_close(scratch.scalar_em(1e-6, C, VAR, s, num) / 1e-6, rho, 5e-3)
    check_close(optimize.brentq(lambda s: growth(s) - 1, 0.05, 0.2), 0.1154113626231, 1e-9)
    # The saddle-node: the largest s at which no w is held.
    held = lambda s: -optimize.minimize_scalar(lambda w: -excess(w, s, 20), bounds=(1.5, 2.0), method="bounded",
                                               options={"xatol": 1e-10}).fun
    saddle = optimize.brentq(held, 0.095, 0.105, xtol=1e-12)
    check_close(saddle, 0.098737682, 1e-8)
    top = optimize.minimize_scalar(lambda w: -excess(w, saddle, 20), bounds=(1.5, 2.0), method="bounded")
    check_close(top.x, 1.75217, 1e-4)


def test_long_chains_learn_the_closed_form_of_their_bias():
    for s in (0.1, 0.3):
        want = (C / (1 + C * s**2 / 4 / VAR) - VAR) ** 0.5
        check_close(settle(1.0, s, 2000), want, 1e-9)
    check_close((C / (1 + C * 0.09 / 4 / VAR) - VAR) ** 0.5, 1.2020462779, 1e-10)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    covariance, W = (rotation * [3.0, 1.5, 0.25]) @ rotation.T, np.random.default_rng(1).normal(size=(3, 2))
    for _ in range(3000):
        W = scratch.short_run_em(W, VAR, covariance, 0.2, 200)
    check_close(np.linalg.eigvalsh(W.T @ W), [1.16509434, 2.42857143], 1e-8)


def test_exact_em_climbs_and_short_run_em_need_not():
    log_likelihood = lambda w: -0.5 * np.log(2 * np.pi * (w**2 + VAR)) - 0.5 * C / (w**2 + VAR)
    check_close(log_likelihood(MLE), -1.7655121235, 1e-9)
    path = [0.3]
    for _ in range(30):
        lam = 1 + path[-1] ** 2 / VAR
        gain = path[-1] / (VAR * lam)
        path.append(C * gain / (1 / lam + gain**2 * C))
    check_below([log_likelihood(w) for w in path[:-1]], [log_likelihood(w) for w in path[1:]], what="exact EM",
                slack=1e-15)
    for num, loss in ((10, 0.02534950), (5, 2.46027923)):
        check_close(log_likelihood(MLE) - log_likelihood(settle(MLE, 0.2, num)), loss, 1e-7)


@pytest.mark.parametrize(("s", "rest", "top"), [(0.2, 1.36288, 1.34905), (0.3, 1.20397, 1.29101)])
def test_where_learning_rests_is_no_maximum_of_the_bound(s, rest, top):
    def elbo(w):
        B, S = scratch.end_point_regression(np.array([[w]]), VAR, s, 20)
        b, v = B[0, 0], S[0, 0]
        return -oracles.gaussian_kl(np.zeros(2), np.array([[C, b * C], [b * C, v + b**2 * C]]), np.zeros(2),
                                    np.array([[w**2 + VAR, w], [w, 1.0]]))
    best = optimize.minimize_scalar(lambda w: -elbo(w), bounds=(1.0, 1.6), method="bounded", options={"xatol": 1e-9})
    check_close([settle(1.0, s, 20), best.x], [rest, top], 1e-5)


def test_the_module_comes_to_rest_where_the_closed_form_says():
    # The average gradient of the loss over data and chains is zero at the point of rest, and not at the maximum.
    def slopes(w, num=20_000):
        model = ShortRunModel(decoder=nn.Linear(1, 1, **double), noise_var=VAR, num_steps=20, step_size=0.3)
        with torch.no_grad():
            model.generator.readout.weight.fill_(w)
            model.generator.readout.bias.zero_()
        x = C**0.5 * draws(num, 1, seed=1)
        z = model.infer(x, generator=torch.Generator().manual_seed(2))[0]
        return ((x - w * z) * z / VAR)[:, 0]
    check_mc(slopes(1.203971128112), 0.0, what="at rest")
    at_top = slopes(MLE)
    assert float(at_top.mean()) < -5 * float(at_top.std()) / len(at_top) ** 0.5


def test_fit_moves_to_the_point_of_rest():
    # Data whose covariance is C exactly; the mean of the weights' path over the last updates.
    torch.manual_seed(0)
    model = ShortRunModel(decoder=nn.Linear(1, 1, **double), noise_var=VAR, num_steps=20, step_size=0.3)
    with torch.no_grad():
        model.generator.readout.weight.fill_(MLE)
        model.generator.readout.bias.zero_()
    model.generator.readout.bias.requires_grad_(False)
    x = draws(4000, 1, seed=1)
    x = (x - x.mean()) * C**0.5 / (x - x.mean()).square().mean().sqrt()
    fit(model, x, loss=short_run_loss, num_steps=120, batch_size=4000, lr=lambda k: 0.02 / (1 + k / 20), device="cpu")
    check_close(model.generator.readout.weight.detach().flatten(), t([1.203971128112]), 0.02)


# ---------------------------------------------------------------- likelihoods
def test_annealing_tightens_with_its_steps_and_needs_the_correction():
    model, means = model_a(), []
    for num in (3, 10, 60):
        found = model.log_likelihood(t(X).expand(40, 3), 1, num_steps=num, kernel="mala", step_size=0.2,
                                     generator=torch.Generator().manual_seed(0))
        means.append(float(found.value.mean()))  # one chain each: the mean of the log-weights
    assert means[0] < means[1] < means[2] < LOG_PX + 0.15
    check_below(means[0], LOG_PX - 1.0, what="three temperatures are too few")


def test_masks_at_both_ends():
    everything, nothing = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    check_close(law_a(0.15, 20, observed=everything).kl, t([0.0239052230408075]), 1e-12)
    h = 0.15**2 / 2
    v = (1 - h) ** 40 + (1 - (1 - h) ** 40) / (1 - h / 2)
    check_close(law_a(0.15, 20, observed=nothing).kl, t([v - 1 - np.log(v)]), 1e-12)
    masked = law_a(0.15, 20, observed=torch.tensor([True, False, True]))
    exact = oracles.linear_gaussian_posterior(np.array(X)[:, [0, 2]], np.array(WEIGHT)[[0, 2]],
                                              np.array(BIAS)[[0, 2]], NOISE_VAR)[0][0]
    check_close(exact, [0.5898305084745763, -0.49322033898305084], 1e-12)
    check_close(exact @ WEIGHT[1] + BIAS[1], -0.6932203389830509, 1e-12)
    check_close(masked.mean @ t(WEIGHT)[1] + BIAS[1], t([-0.4014766432798443]), 1e-12)
