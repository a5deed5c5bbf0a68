"""Chapter 5: exact learning against a VAE on toys and images; anomalies, imputation, choice of size, Gaussian gaps."""

import math
import sys
import time

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from dlgm_tutorial import cast, datasets
from dlgm_tutorial.analytic_em import (
    exact_elbo,
    exact_log_likelihood,
    exact_posterior,
    fit_em,
    impute,
    num_parameters,
    partition,
)
from dlgm_tutorial.exact_inference import fit_factor_analysis, fit_ppca
from dlgm_tutorial.networks import initialise, mlp
from dlgm_tutorial.reproduce import experiment

PAPER = "Balestriero, Paris and Baraniuk 2020"
LEAK = 0.1


def decoder_for(sizes, seed, bias=1.0):
    """A leaky-ReLU decoder in float64, Glorot weights and normal biases, as the authors' code starts."""
    generator = torch.Generator().manual_seed(seed)
    return initialise(mlp(sizes, lambda: nn.LeakyReLU(LEAK), dtype=torch.float64), bias=bias, generator=generator)


def fit_vae(decoder, x, *, noise_var, lr, num_steps, batch_size=50, warm_up=0, seed=0):
    """A plain VAE around a copy of the decoder's shape: (decoder, noise_var, bound) after Adam; encoder D-32-32-2K."""
    generator = torch.Generator().manual_seed(seed)
    K, D = decoder[0].in_features, decoder[-1].out_features
    encoder = initialise(mlp([D, 32, 32, 2 * K], lambda: nn.LeakyReLU(LEAK), dtype=x.dtype), generator=generator)
    log_var = nn.Parameter(torch.tensor(math.log(noise_var), dtype=x.dtype))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), log_var], lr=lr)

    def bound(batch, weight=1.0):
        loc, log_scale = encoder(batch).chunk(2, -1)
        z = loc + torch.exp(log_scale) * torch.randn(loc.shape, generator=generator, dtype=x.dtype)
        square = ((batch - decoder(z)) ** 2).sum(1)
        fit = -0.5 * (square * torch.exp(-log_var) + D * (log_var + math.log(2 * math.pi)))
        kl = 0.5 * (torch.exp(2 * log_scale) + loc**2 - 1 - 2 * log_scale).sum(1)
        return fit - weight * kl

    for step in range(num_steps):
        batch = x[torch.randint(len(x), (batch_size,), generator=generator)]
        loss = -bound(batch, min(1.0, (step + 1) / warm_up) if warm_up else 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        loc, log_scale = encoder(x).chunk(2, -1)
        elbo = exact_elbo(decoder, x, log_var.exp(), loc, torch.exp(2 * log_scale)).mean()
    return decoder.requires_grad_(False), log_var.detach().exp(), float(elbo)


def nll(decoder, x, noise_var):
    """Mean exact negative log-likelihood, nats per datum."""
    with torch.no_grad():
        return -float(exact_log_likelihood(decoder, x, noise_var).mean())


def spread_rows(runs):
    """A row a method: mean and spread over the seeds of train and test NLL, with N and the settings."""
    rows = []
    for method in runs[0]["figures"]["methods"]:
        values = [run["figures"]["methods"][method] for run in runs if method in run["figures"]["methods"]]
        row = {"method": method, "seeds": len(values)}
        for key in values[0]:
            numbers = [v[key] for v in values if v[key] is not None]
            row[key] = float(np.mean(numbers)) if numbers else None
            if key in ("train", "test"):
                row[f"{key}_min"], row[f"{key}_max"] = (float(f(numbers)) for f in (np.min, np.max))
        rows.append(row)
    return rows


VAES = {
    "VAE, first noise 1, rate 0.005": {"noise_var": 1.0, "lr": 5e-3},
    "VAE, first noise 0.3": {"noise_var": 0.3, "lr": 5e-3},
    "VAE, first noise 0.05": {"noise_var": 0.05, "lr": 5e-3},
    "VAE, first noise 0.05, warm-up": {"noise_var": 0.05, "lr": 5e-3, "warm_up": 1000},
    "VAE, first noise 0.05, rate 0.001": {"noise_var": 0.05, "lr": 1e-3},
}


def toy(run, make):
    """Fit a 1-8-2 decoder to 500 points in every way; test on 2000."""
    x = make(500, generator=torch.Generator().manual_seed(100 + run.seed), dtype=torch.float64)
    test = make(2000, generator=torch.Generator().manual_seed(999), dtype=torch.float64)
    x, test = (d.x if hasattr(d, "x") else d for d in (x, test))
    sizes, methods = [1, 8, 2], {}
    for name, settings in {
        "generalised EM, line search": {"method": "gem", "num_iterations": 50},
        "EM, undamped": {"method": "em", "num_iterations": 50},
        "EM, damping 0.05": {"method": "em", "num_iterations": 150, "damping": 0.05},
        "exact gradient, L-BFGS": {"method": "gradient", "num_iterations": 250},
    }.items():
        found = fit_em(decoder_for(sizes, run.seed), x, noise_var=0.3, **settings)
        fall = float((-found.log_likelihoods.diff()).clamp_min(0).max())
        methods[name] = {
            "train": nll(found.decoder, x, found.noise_var),
            "test": nll(found.decoder, test, found.noise_var),
            "largest_fall": fall,
            "bound_gap": None,
        }
    for name, settings in VAES.items():
        decoder, noise_var, elbo = fit_vae(
            decoder_for(sizes, run.seed), x, num_steps=run.steps, seed=run.seed, **settings
        )
        train = nll(decoder, x, noise_var)
        methods[name] = {
            "train": train,
            "test": nll(decoder, test, noise_var),
            "largest_fall": None,
            "bound_gap": -elbo - train,
        }
    return {"methods": methods, "num_data": 500, "num_test": 2000, "parameters": num_parameters(decoder_for(sizes, 0))}


@experiment("05", "circle", paper=PAPER, hours=0.2, steps=3000, rows=spread_rows)
def circle(run):
    """Circle, 1-8-2 decoder: EM, exact gradient and VAEs by exact train and test likelihood."""
    return toy(run, datasets.circle)


@experiment("05", "wave", paper=PAPER, hours=0.2, steps=3000, rows=spread_rows)
def wave(run):
    """Wave, 1-8-2 decoder: EM, exact gradient and VAEs by exact train and test likelihood."""
    return toy(run, datasets.wave)


def auroc(inside, outside):
    """Probability that an outsider's score is above an insider's."""
    ranks = rankdata(np.concatenate([inside, outside]))
    return float((ranks[len(inside) :].sum() - len(outside) * (len(outside) + 1) / 2) / (len(inside) * len(outside)))


def auprc(inside, outside):
    """Average precision of detecting outsiders by a high score."""
    scores = np.concatenate([inside, outside])
    truth = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(truth) / np.arange(1, len(truth) + 1)
    return float((precision * truth).sum() / truth.sum())


def digit_of(data, digit, num=None):
    """The first images of one class, float64 in [0, 1]."""
    return data.x[data.y == digit][:num].double()


def upper_half(x):
    """Mask [D] of the upper half of an image: what imputation is given."""
    return torch.arange(x.shape[1]) < x.shape[1] // 2


def scores(log_likelihood, filled, x, test, other):
    """Train and test NLL, detection of outsiders, and the lower half given the upper: one judge for every model.

    log_likelihood(x, observed=None) -> [B], exact; filled [B, D]: test with the lower half imputed.
    """
    upper = upper_half(x)
    inside, outside = (-log_likelihood(part).detach().numpy() for part in (test, other))
    conditional = log_likelihood(test, observed=upper).detach().numpy() + inside
    return {
        "train": -float(log_likelihood(x).detach().mean()),
        "test": float(inside.mean()),
        "auroc": auroc(inside, outside),
        "auprc": auprc(inside, outside),
        "imputation_mse": float(((filled - test)[:, ~upper] ** 2).mean()),
        "conditional_nll": float(conditional.mean()),
        "bound_gap": None,
    }


@torch.no_grad()
def judge(decoder, noise_var, x, test, other):
    """The scores of a decoder with bends, by its regions."""
    log_likelihood = lambda data, observed=None: exact_log_likelihood(decoder, data, noise_var, observed=observed)
    filled = impute(decoder, test, noise_var, upper_half(x))
    found = scores(log_likelihood, filled, x, test, other)
    return {**found, "noise_var": float(torch.as_tensor(noise_var).mean())}


@torch.no_grad()
def judge_linear(model, x, test, other):
    """The scores of a LinearGaussian, with any number of latents."""
    log_likelihood = lambda data, observed=None: model.log_likelihood(data, observed=observed).value
    found = scores(log_likelihood, model.impute(test, upper_half(x))[0].detach(), x, test, other)
    return {**found, "noise_var": float(model.noise_var.detach().mean())}


def one_digit(run):
    """(x, test, other): 1,000 MNIST images of the digit 4 and all its test images; the 9s are the outsiders."""
    train, test = (run.load("mnist", split) for split in ("train", "test"))
    return digit_of(train, 4, 1000), digit_of(test, 4), digit_of(test, 9)


def all_digits(run):
    """(x, test, other): the first 2,000 MNIST images and 1,000 for the test; 1,000 of Fashion-MNIST as outsiders."""
    loaded = (run.load("mnist", "train"), run.load("mnist", "test"), run.load("fashion_mnist", "test"))
    return tuple(data.x[:num].double() for data, num in zip(loaded, (2000, 1000, 1000), strict=True))


def small_digits(run):
    """(x, test, other): scikit-learn's 8x8 digits from 0 to 8; no 9 is learnt from, so all of them are outsiders."""
    train, test = (run.load("digits", split) for split in ("train", "test"))
    nines = torch.cat([digit_of(train, 9), digit_of(test, 9)])
    return train.x[train.y < 9].double(), test.x[test.y < 9].double(), nines


PIXEL_FLOOR = 0.01  # least noise variance of a pixel, where each has its own: many never change


def images(run, hidden, gem, gradient, sets):
    """All methods on one architecture, judged alike; below them linear models, and all with a variance a pixel.

    hidden: the decoder's sizes but the last, [K, H1, ...]; sets: (x, test, other), each [N, D].
    """
    x, test, other = sets
    sizes, methods, seconds = [*hidden, x.shape[1]], {}, {}

    def record(name, make):
        start = time.perf_counter()
        methods[name] = make()
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{run.file} seed {run.seed}: {name}, test NLL {methods[name]['test']:.2f}", file=sys.stderr, flush=True)

    def learnt(start, noise_var, **settings):
        found = fit_em(start, x, noise_var=noise_var, **settings)
        fitted.append(found)
        return judge(found.decoder, found.noise_var, x, test, other)

    def vae(settings):
        decoder, noise_var, elbo = fit_vae(
            decoder_for(sizes, run.seed), x, num_steps=run.steps, seed=run.seed, **settings
        )
        found = judge(decoder, noise_var, x, test, other)
        return {**found, "bound_gap": -elbo - found["train"]}

    fitted, start = [], lambda: decoder_for(sizes, run.seed)
    record("generalised EM, line search", lambda: learnt(start(), 0.1, num_iterations=gem))
    record(
        "generalised EM, then L-BFGS",
        lambda: learnt(fitted[0].decoder, fitted[0].noise_var, method="gradient", num_iterations=gradient),
    )
    best = fitted[1]
    record("exact gradient, L-BFGS", lambda: learnt(start(), 0.1, method="gradient", num_iterations=gradient))
    for name, settings in IMAGE_VAES.items():
        record(name, lambda settings=settings: vae(settings))
    for latents in (hidden[0], 10):
        linear = fit_ppca(x, latents).model
        record(f"probabilistic PCA, K = {latents}", lambda m=linear: judge_linear(m, x, test, other))
    floor = PIXEL_FLOOR / float(x.var(0, correction=0).mean())
    first = torch.full((x.shape[1],), 0.1, dtype=x.dtype)
    record(
        "a variance a pixel: generalised EM",
        lambda: learnt(start(), first, num_iterations=gem, noise="diagonal", noise_floor=floor),
    )
    for latents in (hidden[0], 10):
        record(
            f"a variance a pixel: factor analysis, K = {latents}",
            lambda k=latents: judge_linear(
                fit_factor_analysis(x, k, min_noise_var=PIXEL_FLOOR, num_steps=200, tol=1e-3).model, x, test, other
            ),
        )
    return {
        "methods": methods,
        "seconds": seconds,
        "num_data": len(x),
        "num_test": len(test),
        "num_outside": len(other),
        "decoder": "-".join(map(str, sizes)),
        "parameters": num_parameters(start()),
        "gem_iterations": gem,
        "gradient_iterations": gradient,
        "vae_updates": run.steps,
        "regions": partition(best.decoder).num_regions,
    }, {f"p{i}": p.detach().float().numpy() for i, p in enumerate(best.decoder.parameters())} | {
        "noise_var": best.noise_var.numpy()
    }


IMAGE_VAES = {
    "VAE, first noise 1": {"noise_var": 1.0, "lr": 1e-3},
    "VAE, first noise 0.1": {"noise_var": 0.1, "lr": 1e-3},
    "VAE, first noise 0.1, rate 0.005": {"noise_var": 0.1, "lr": 5e-3},
}
GEM, GRADIENT = 30, 100  # iterations
HIDDEN = {1: [1, 16, 16], 2: [2, 8, 8]}


@experiment("05", "mnist-one-latent", paper=PAPER, hours=0.3, steps=6000, rows=spread_rows)
def mnist_one_latent(run):
    """1,000 images of the digit 4, decoder 1-16-16-784: likelihood, anomalies, imputation."""
    return images(run, HIDDEN[1], GEM, GRADIENT, one_digit(run))


@experiment("05", "mnist-two-latents", paper=PAPER, hours=0.5, steps=6000, rows=spread_rows)
def mnist_two_latents(run):
    """1,000 images of the digit 4, decoder 2-8-8-784: likelihood, anomalies, imputation."""
    return images(run, HIDDEN[2], GEM, GRADIENT, one_digit(run))


@experiment("05", "mnist-all-one-latent", paper=PAPER, hours=0.5, steps=6000, rows=spread_rows)
def mnist_all_one_latent(run):
    """2,000 images of all digits, decoder 1-16-16-784; Fashion-MNIST as the outsiders."""
    return images(run, HIDDEN[1], 20, 40, all_digits(run))


@experiment("05", "mnist-all-two-latents", paper=PAPER, hours=1.0, steps=6000, rows=spread_rows)
def mnist_all_two_latents(run):
    """2,000 images of all digits, decoder 2-8-8-784; Fashion-MNIST as the outsiders."""
    return images(run, HIDDEN[2], 20, 40, all_digits(run))


@experiment("05", "digits-one-latent", paper=PAPER, hours=0.3, steps=6000, rows=spread_rows)
def digits_one_latent(run):
    """8x8 digits from 0 to 8, decoder 1-16-16-64, the 9s held out: likelihood, anomalies, imputation."""
    return images(run, HIDDEN[1], GEM, GRADIENT, small_digits(run))


@experiment("05", "digits-two-latents", paper=PAPER, hours=0.5, steps=6000, rows=spread_rows)
def digits_two_latents(run):
    """8x8 digits from 0 to 8, decoder 2-8-8-64, the 9s held out: likelihood, anomalies, imputation."""
    return images(run, HIDDEN[2], GEM, GRADIENT, small_digits(run))


def choice_rows(runs):
    """A row a size: mean held-out NLL and BIC per datum."""
    return [
        {
            "size": size,
            "parameters": values["parameters"],
            **{
                key: float(np.mean([run["figures"]["sizes"][size][key] for run in runs]))
                for key in ("train", "test", "bic")
            },
        }
        for size, values in runs[0]["figures"]["sizes"].items()
    ]


@experiment("05", "model-choice", hours=0.3, steps=80, rows=choice_rows)
def model_choice(run):
    """Width and latent dimension of a decoder of 8x8 digits (class 3), by exact held-out likelihood and BIC."""
    data = run.load("digits", "train")
    x = digit_of(data, 3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed))
    x, held = x[order[: len(x) * 3 // 4]], x[order[len(x) * 3 // 4 :]]
    sizes = {}
    for hidden in ([1], [1, 2], [1, 4], [1, 8], [1, 4, 4], [2], [2, 4], [2, 8]):
        shape = [*hidden, x.shape[1]]
        found = fit_em(decoder_for(shape, run.seed), x, method="gradient", num_iterations=run.steps, noise_var=0.1)
        parameters = num_parameters(found.decoder)
        train = nll(found.decoder, x, found.noise_var)
        sizes["-".join(map(str, shape))] = {
            "parameters": parameters,
            "train": train,
            "test": nll(found.decoder, held, found.noise_var),
            "bic": train + 0.5 * parameters * math.log(len(x)) / len(x),
        }
    return {"sizes": sizes, "num_data": len(x), "num_test": len(held)}


def best_gaussian(decoder, x, noise_var, start, kind, num_steps=300):
    """Loc and covariance [B, K, K] of the best diagonal or full Gaussian, by Adam on a fixed sample of the bound."""
    mean, covariance = start
    K = mean.shape[1]
    loc = mean.clone().requires_grad_()
    root = torch.linalg.cholesky(covariance)
    raw = (torch.diag_embed(torch.log(root.diagonal(dim1=1, dim2=2))) + root.tril(-1)).requires_grad_()
    nodes = (
        torch.special.ndtri((torch.arange(400, dtype=x.dtype) + 0.5) / 400)[:, None]
        if K == 1
        else torch.special.ndtri(
            torch.quasirandom.SobolEngine(2, True, 0).draw(1024, dtype=x.dtype).clamp(1e-6, 1 - 1e-6)
        )
    )
    optimizer = torch.optim.Adam([loc, raw], lr=0.02)
    for _ in range(num_steps):
        factor = torch.diag_embed(torch.exp(raw.diagonal(dim1=1, dim2=2))) + (raw.tril(-1) if kind == "full" else 0.0)
        z = loc + (factor @ nodes[:, None, :, None])[..., 0]
        square = ((x - decoder(z)) ** 2).sum(-1).mean(0) / noise_var
        kl = 0.5 * ((factor**2).sum((1, 2)) + (loc**2).sum(1)) - raw.diagonal(dim1=1, dim2=2).sum(1)
        loss = (0.5 * square + kl).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    factor = torch.diag_embed(torch.exp(raw.diagonal(dim1=1, dim2=2))) + (raw.tril(-1) if kind == "full" else 0.0)
    return loc.detach(), (factor @ factor.transpose(1, 2)).detach()


@experiment("05", "gaussian-gaps", hours=0.1)
def gaussian_gaps(run):
    """Circle decoder fitted exactly: KL to the exact posterior of Gaussian families, per datum."""
    data = datasets.circle(400, generator=torch.Generator().manual_seed(run.seed), dtype=torch.float64)
    x = data.x if hasattr(data, "x") else data
    found = fit_em(decoder_for([1, 8, 8, 2], run.seed), x, noise_var=0.3, num_iterations=40)
    decoder, noise_var = found.decoder.requires_grad_(False), found.noise_var
    posterior = exact_posterior(decoder, x, noise_var)
    gap = lambda loc, cov: posterior.log_px - exact_elbo(decoder, x, noise_var, loc, cov)
    matched = gap(posterior.mean, posterior.covariance)
    # Two components: a Gaussian on either side of the posterior's best cut, by quadrature of the exact density.
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    log_p = posterior.log_prob(z[:, None, None].expand(-1, len(x), 1)).T
    p = torch.exp(log_p) * (z[1] - z[0])
    mode = z[log_p.argmax(1)][:, None]
    starts = [(posterior.mean, posterior.covariance), (mode, torch.full((len(x), 1, 1), 0.01, dtype=x.dtype))]
    best = torch.stack(
        [matched] + [gap(*best_gaussian(decoder, x, noise_var, start, "full")) for start in starts]
    ).amin(0)
    two = torch.full_like(matched, torch.inf)
    for cut in range(100, 3901, 25):
        left = z <= z[cut]
        q = torch.zeros_like(p)
        for side in (left, ~left):
            weight = p[:, side].sum(1).clamp_min(1e-12)
            mean = (p[:, side] @ z[side]) / weight
            var = ((p[:, side] * (z[side] - mean[:, None]) ** 2).sum(1) / weight).clamp_min(1e-5)
            q += (
                weight[:, None]
                * torch.exp(-0.5 * (z - mean[:, None]) ** 2 / var[:, None])
                / torch.sqrt(2 * math.pi * var)[:, None]
            )
        q = q.clamp_min(1e-300)
        two = torch.minimum(two, (q * (torch.log(q) - log_p)).sum(1) * (z[1] - z[0]))
    two = torch.minimum(two, best)  # a mixture of two holds the single Gaussian
    quantiles = lambda v: {"mean": float(v.mean()), "median": float(v.median()), "largest": float(v.max())}
    angle = torch.atan2(x[:, 1], x[:, 0])
    figures = {
        "moment_matched": quantiles(matched),
        "best_gaussian": quantiles(best),
        "two_components": quantiles(two),
        "num_data": len(x),
        "nll": -float(posterior.log_px.mean()),
    }
    return figures, {
        "angle": angle.float().numpy(),
        "matched": matched.float().numpy(),
        "best": best.float().numpy(),
        "two": two.float().numpy(),
    }


def _factor(raw, kind):
    """Cholesky factors [..., K, K] from free parameters; diagonal ones for kind 'diagonal'."""
    diagonal = torch.diag_embed(torch.exp(raw.diagonal(dim1=-2, dim2=-1)))
    return diagonal if kind == "diagonal" else diagonal + raw.tril(-1)


def mixture_log_prob(z, weight, loc, factor):
    """log q(z) [S, B] of Gaussian mixtures: z [S, B, K], weight [B, C], loc [B, C, K], factor [B, C, K, K]."""
    away = torch.linalg.solve_triangular(factor, (z[:, :, None] - loc)[..., None], upper=False)[..., 0]
    log_det = torch.log(factor.diagonal(dim1=-2, dim2=-1)).sum(-1)
    each = -0.5 * (away**2 + math.log(2 * math.pi)).sum(-1) - log_det
    return torch.logsumexp(torch.log(weight) + each, -1)


def fit_mixture(decoder, x, noise_var, loc, factor, kind, num_steps, num_nodes=128):
    """Maximise the bound of a mixture of C Gaussians for each datum, by Adam on fixed nodes: (weight, loc, factor).

    loc [B, C, K] and factor [B, C, K, K]: where to start, with equal weights; kind: "diagonal" or "full".
    """
    K = loc.shape[-1]
    sobol = torch.quasirandom.SobolEngine(K, True, 0).draw(num_nodes, dtype=x.dtype)
    nodes = torch.special.ndtri(sobol.clamp(1e-6, 1 - 1e-6))
    raw = factor.tril(-1) + torch.diag_embed(torch.log(factor.diagonal(dim1=-2, dim2=-1)))
    parts = [t.clone().requires_grad_() for t in (torch.zeros_like(loc[..., 0]), loc, raw)]
    optimizer = torch.optim.Adam(parts, lr=0.03)
    for _ in range(num_steps):
        weight, factor = torch.softmax(parts[0], -1), _factor(parts[2], kind)
        bound = 0.0
        for c in range(loc.shape[1]):  # nodes of one component after another
            z = parts[1][:, c] + torch.einsum("bkl,sl->sbk", factor[:, c], nodes)
            log_joint = -0.5 * ((x - decoder(z)) ** 2).sum(-1) / noise_var - 0.5 * (z**2).sum(-1)
            bound = bound + weight[:, c] * (log_joint - mixture_log_prob(z, weight, parts[1], factor)).mean(0)
        optimizer.zero_grad()
        (-bound.sum()).backward()
        optimizer.step()
    return torch.softmax(parts[0], -1).detach(), parts[1].detach(), _factor(parts[2], kind).detach()


def mixture_gap(decoder, x, noise_var, log_px, weight, loc, factor):
    """KL(q || p(z | x)) [B] of Gaussian mixtures: energy by the regions, exactly; entropy by Gauss-Hermite."""
    K, energy, entropy = loc.shape[-1], 0.0, 0.0
    node, mass = np.polynomial.hermite_e.hermegauss(48)
    nodes = torch.cartesian_prod(*[torch.as_tensor(node)] * K).reshape(-1, K)
    mass = torch.cartesian_prod(*[torch.as_tensor(mass / mass.sum())] * K).reshape(-1, K).prod(1)
    for c in range(loc.shape[1]):
        own = torch.log(factor[:, c].diagonal(dim1=1, dim2=2)).sum(1) + 0.5 * K * (1 + math.log(2 * math.pi))
        cov = factor[:, c] @ factor[:, c].transpose(1, 2)
        energy = energy + weight[:, c] * (exact_elbo(decoder, x, noise_var, loc[:, c], cov) - own)
        z = loc[:, c] + torch.einsum("bkl,sl->sbk", factor[:, c], nodes)
        entropy = entropy - weight[:, c] * (mass @ mixture_log_prob(z, weight, loc, factor))
    return log_px - energy - entropy


FAMILIES = ("the posterior's own moments", "diagonal Gaussian", "full Gaussian", "two Gaussians")


def halves_of(draws, half):
    """Mean [B, K] and Cholesky factor of the covariance of the draws [S, B, K] that are in the half [S, B]."""
    weight = half.to(draws) / half.sum(0).clamp_min(1)
    mean = torch.einsum("sb,sbk->bk", weight, draws)
    cov = torch.einsum("sb,sbk,sbl->bkl", weight, draws - mean, draws - mean)
    return mean, torch.linalg.cholesky(cov + 1e-4 * torch.eye(cov.shape[-1], dtype=cov.dtype))


def gaps_of(member, x, num_steps):
    """KL to the exact posterior of the best member of each Gaussian family that was found, {family: [B]}."""
    decoder, noise_var = member.decoder.requires_grad_(False), member.noise_var
    posterior = exact_posterior(decoder, x, noise_var)
    mean, root = posterior.mean, torch.linalg.cholesky(posterior.covariance)
    gap = lambda q: mixture_gap(decoder, x, noise_var, posterior.log_px, *q)
    one = torch.ones(len(x), 1, dtype=x.dtype)
    found = {FAMILIES[0]: gap((one, mean[:, None], root[:, None]))}
    # A narrow start at the best of a few exact draws finds the mode that a wide one would average away.
    draws = posterior.sample(64, generator=torch.Generator().manual_seed(0))
    best = draws.gather(0, posterior.log_prob(draws).argmax(0)[None, :, None].expand(1, *mean.shape))[0]
    narrow = 0.3 * root
    for family, kind in zip(FAMILIES[1:3], ("diagonal", "full"), strict=True):
        starts = ((mean, root), (best, narrow))
        each = [gap(fit_mixture(decoder, x, noise_var, l[:, None], f[:, None], kind, num_steps)) for l, f in starts]
        found[family] = torch.stack(each).amin(0)
    # Two: at the best draw and the one furthest from it; and on either side of the mean, along the widest direction.
    far = torch.linalg.solve_triangular(root, (draws - best)[..., None], upper=False).square().sum((-1, -2)).argmax(0)
    other = draws.gather(0, far[None, :, None].expand(1, *mean.shape))[0]
    starts = [(torch.stack([best, other], 1), torch.stack([narrow, narrow], 1))]
    widest = torch.linalg.eigh(posterior.covariance).eigenvectors[..., -1]
    side = ((draws - mean) * widest).sum(-1) > 0  # [64, B]
    halves = [halves_of(draws, half) for half in (side, ~side)]
    starts.append(tuple(torch.stack(part, 1) for part in zip(*halves, strict=True)))
    two = [gap(fit_mixture(decoder, x, noise_var, loc, factor, "full", num_steps)) for loc, factor in starts]
    # Each family holds the ones before it.
    found[FAMILIES[2]] = torch.minimum(found[FAMILIES[2]], torch.minimum(found[FAMILIES[0]], found[FAMILIES[1]]))
    found[FAMILIES[3]] = torch.stack([*two, found[FAMILIES[2]]]).amin(0)
    return found


def family_rows(runs):
    """A row a member of the cast and family."""
    rows = []
    for name in ("wave", "digits2"):
        for family in FAMILIES:
            values = [run["figures"][name][family] for run in runs]
            mean = {key: float(np.mean([v[key] for v in values])) for key in values[0]}
            rows.append({"decoder": name, "family": family, **mean})
    return rows


@experiment("05", "gaussian-families", hours=0.1, steps=250, rows=family_rows)
def gaussian_families(run):
    """Decoders of the cast, one and two latents: exact KL of Gaussian families to the posterior, per datum."""
    figures, arrays = {"num_data": 80}, {}
    for member in (cast.wave(), cast.digits2()):
        generator = torch.Generator().manual_seed(run.seed)
        z = torch.randn(80, member.num_latents, generator=generator, dtype=torch.float64)
        clean = member.decoder(z).detach()
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        x = torch.cat([member.x, clean + member.noise_var**0.5 * noise])
        found = gaps_of(member, x, run.steps)
        torn = list(member.points).index("torn")
        figures[member.name] = {
            family: {
                "mean": float(value[4:].mean()),
                "median": float(value[4:].median()),
                "largest": float(value[4:].max()),
                "torn": float(value[torn]),
            }
            for family, value in found.items()
        }
        arrays |= {f"{member.name}_{i}": found[family].float().numpy() for i, family in enumerate(FAMILIES)}
    return figures, arrays
