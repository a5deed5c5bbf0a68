"""Chapter 5: exact learning against a VAE on toys and images; anomalies, imputation, choice of size, Gaussian gaps."""

import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from dlgm_tutorial import datasets
from dlgm_tutorial.analytic_em import (
    exact_elbo,
    exact_log_likelihood,
    exact_posterior,
    fit_em,
    impute,
    num_parameters,
    partition,
)
from dlgm_tutorial.exact_inference import fit_ppca
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


def judge(decoder, noise_var, x, test, other):
    """Exact NLL, anomaly detection of another class, and the lower half imputed from the upper."""
    upper = torch.arange(x.shape[1]) < x.shape[1] // 2
    scores = [-exact_log_likelihood(decoder, part, noise_var).detach().numpy() for part in (test, other)]
    filled = impute(decoder, test, noise_var, upper)
    known = exact_log_likelihood(decoder, test, noise_var, observed=upper).detach()
    conditional = float((known - exact_log_likelihood(decoder, test, noise_var).detach()).mean())
    return {
        "train": nll(decoder, x, noise_var),
        "test": float(scores[0].mean()),
        "auroc": auroc(*scores),
        "auprc": auprc(*scores),
        "imputation_mse": float(((filled - test)[:, ~upper] ** 2).mean()),
        "conditional_nll": conditional,
        "noise_var": float(torch.as_tensor(noise_var).mean()),
        "bound_gap": None,
    }


def images(run, sizes, gem, gradient, vae_steps, vaes):
    """One digit (4) of MNIST, 1,000 images: all methods on one architecture; 9 is the class held out."""
    train, test = (run.load("mnist", split) for split in ("train", "test"))
    x, inside, outside = digit_of(train, 4, 1000), digit_of(test, 4), digit_of(test, 9)
    methods, K = {}, sizes[0]
    model = fit_ppca(x, K).model
    affine = [(model.weight.detach(), model.bias.detach())]
    methods["probabilistic PCA"] = judge(affine, model.noise_var.detach().reshape(-1)[0], x, inside, outside)
    for name, settings in {
        "generalised EM, line search": {"method": "gem", "num_iterations": gem},
        "exact gradient, L-BFGS": {"method": "gradient", "num_iterations": gradient},
    }.items():
        found = fit_em(decoder_for(sizes, run.seed), x, noise_var=0.1, **settings)
        methods[name] = judge(found.decoder, found.noise_var, x, inside, outside)
    for name, settings in vaes.items():
        decoder, noise_var, elbo = fit_vae(
            decoder_for(sizes, run.seed), x, num_steps=vae_steps, seed=run.seed, **settings
        )
        methods[name] = judge(decoder, noise_var, x, inside, outside)
        methods[name]["bound_gap"] = -elbo - methods[name]["train"]
    return {
        "methods": methods,
        "num_data": len(x),
        "num_test": len(inside),
        "num_outside": len(outside),
        "decoder": "-".join(map(str, sizes)),
        "parameters": num_parameters(decoder_for(sizes, 0)),
        "gem_iterations": gem,
        "gradient_iterations": gradient,
        "vae_updates": vae_steps,
        "regions": partition(found.decoder).num_regions,
    }, {f"p{i}": p.detach().float().numpy() for i, p in enumerate(found.decoder.parameters())} | {
        "noise_var": found.noise_var.numpy()
    }


IMAGE_VAES = {
    "VAE, first noise 1": {"noise_var": 1.0, "lr": 1e-3},
    "VAE, first noise 0.1": {"noise_var": 0.1, "lr": 1e-3},
    "VAE, first noise 0.1, rate 0.005": {"noise_var": 0.1, "lr": 5e-3},
}


@experiment("05", "mnist-one-latent", paper=PAPER, hours=0.5, steps=3000, rows=spread_rows)
def mnist_one_latent(run):
    """1,000 images of the digit 4, decoder 1-16-16-784: likelihood, anomalies, imputation."""
    return images(run, [1, 16, 16, 784], 20, 120, run.steps, IMAGE_VAES)


@experiment("05", "mnist-two-latents", paper=PAPER, hours=0.5, steps=3000, rows=spread_rows)
def mnist_two_latents(run):
    """1,000 images of the digit 4, decoder 2-8-8-784: likelihood, anomalies, imputation."""
    return images(run, [2, 8, 8, 784], 6, 40, run.steps, IMAGE_VAES)


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
