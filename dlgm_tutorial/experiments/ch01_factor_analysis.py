"""Chapter 1: factor analysis on real images, and what its published 106.00 nats can and cannot be compared with."""

import math
import time

import torch
from torch import nn

from dlgm_tutorial.distributions import DiagonalNormal, FullNormal
from dlgm_tutorial.evaluation import estimate, log_likelihood_is
from dlgm_tutorial.exact_inference import fit_factor_analysis, fit_ppca
from dlgm_tutorial.likelihoods import Bernoulli
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.training import fit

__all__ = []

NUM_EM_STEPS = 300
NUM_LATENTS = 50  # of the models of binary pixels


class LogisticFactorAnalysis(nn.Module):
    """Factor analysis of binary pixels: z ~ N(0, I), pixel d is one with probability sigmoid(w_d z + b_d).

    Its posterior has no closed form; a network guesses a diagonal one. data_dim: D; num_latents: K; means: [D], the
    share of ones of each pixel, for the start of the bias.
    """

    def __init__(self, data_dim, num_latents, means, num_hidden=200):
        super().__init__()
        self.decoder = nn.Linear(num_latents, data_dim)
        self.encoder = nn.Sequential(nn.Linear(data_dim, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 2 * num_latents))
        nn.init.normal_(self.decoder.weight, std=0.1)
        self.decoder.bias.data.copy_(torch.logit(means))

    def noise_spec(self, batch_size, num_samples=1):
        return {"z": ("normal", (num_samples, batch_size, self.decoder.in_features), 1)}

    def posterior(self, x):
        return DiagonalNormal(*self.encoder(x).chunk(2, -1))

    def log_joint(self, x, z):
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return prior + Bernoulli(self.decoder(z)).log_prob(x)

    def bound(self, x, *, num_samples=1, noise=None):
        q = self.posterior(x)
        z = q.rsample((num_samples,), noise=noise)
        return Bernoulli(self.decoder(z)).log_prob(x).mean(0) - q.kl_to_standard()


def probit_mass(model, x, num_samples, generator, *, widen=1.0):
    """Estimate the probability that real-valued pixels of the model round to binary x [B, D], by sampling.

    Pixel d is one where the model's real value is above 1/2: given z the pixels are independent, so the mass is
    E prod_d Phi(+-(w_d z + b_d - 1/2) / sigma_d). Proposal: the exact posterior for x as real values, its standard
    deviations multiplied by widen; without that it is too narrow, and the estimate a lower bound at best.
    """
    p = model.posterior(x)
    q = FullNormal(p.loc, widen * p.scale_tril)
    z = q.rsample((num_samples,), noise=torch.randn(num_samples, *q.loc.shape, generator=generator, dtype=x.dtype))
    margin = (model.decoder(z) - 0.5) / model.noise_var.sqrt() * (2 * x - 1)
    prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    return estimate(prior + torch.special.log_ndtr(margin).sum(-1) - q.log_prob(z))


def mean_and_error(values):
    """Mean over images and its standard error."""
    return {"nats": values.mean().item(), "standard_error": (values.std() / math.sqrt(len(values))).item()}


def half_error(model, test):
    """Root mean square error of the lower half of the images, given the upper: model's, and that of the mean pixel."""
    upper = torch.arange(test.shape[1], device=test.device) < test.shape[1] // 2
    filled, _ = model.impute(test, upper)
    error = lambda guess: (guess - test)[:, ~upper].square().mean().sqrt().item()
    return error(filled), error(model.bias.expand(test.shape))


def grey(run, name, levels, candidates):
    """Densities of dequantised grey images, as bounds on the mass of the pictures; and half pictures filled in.

    Returns rows, and pictures [8, D]: real, their lower halves as the largest model of each kind fills them, its draws.
    """
    generator = torch.Generator().manual_seed(run.seed)
    sets = {}
    for split in ("train", "test"):
        whole = (run.load(name, split).x.double() * (levels - 1)).round()
        uniform = torch.rand(whole.shape, generator=generator, dtype=torch.float64)
        sets[split] = ((whole + uniform) / levels).to(run.device)
    cells = sets["train"].shape[1] * math.log(levels)
    rows, pictures = [], {"test": sets["test"][:8].float()}
    upper = torch.arange(sets["test"].shape[1], device=run.device) < sets["test"].shape[1] // 2
    for kind, fitter in (("factor analysis", fit_factor_analysis), ("PPCA", fit_ppca)):
        for num_latents in candidates:
            started = time.perf_counter()
            options = {"num_steps": NUM_EM_STEPS, "tol": 1e-6} if fitter is fit_factor_analysis else {}
            result = fitter(sets["train"], num_latents, min_noise_var=1e-9, **options)
            seconds = time.perf_counter() - started
            density = result.model.log_likelihood(sets["test"]).value
            half, mean_pixel = half_error(result.model, sets["test"])
            rows.append({"model": kind, "num_latents": num_latents, **mean_and_error(density - cells),
                         "density": density.mean().item(), "train": result.log_likelihoods[-1].item() - cells,
                         "bits_per_pixel": (cells - density.mean().item()) / math.log(2) / sets["test"].shape[1],
                         "half_error": half, "mean_pixel_error": mean_pixel,
                         "em_steps": len(result.log_likelihoods) - 1, "seconds": round(seconds, 2)})
        pictures[f"filled {kind}"] = result.model.impute(sets["test"][:8], upper)[0].float()
        draws = torch.Generator(run.device).manual_seed(run.seed)
        pictures[f"drawn {kind}"] = result.model.sample(8, generator=draws).float()
    return rows, pictures


def binary(run):
    """Binary pixels: a density that depends on a floor, honest masses, and a model that is made for them."""
    train, test = (run.load("mnist", split, binarization="fixed").x.to(run.device) for split in ("train", "test"))
    generator = torch.Generator().manual_seed(run.seed)
    rows = []
    for floor in (1e-2, 1e-4, 1e-6):
        model = fit_factor_analysis(train.double(), NUM_LATENTS, min_noise_var=floor, num_steps=100, tol=1e-6).model
        density = model.log_likelihood(test.double()).value
        rows.append({"what": "Gaussian density", "floor": floor, **mean_and_error(density)})
    floor, few = 1e-2, test[::20].double()
    model = fit_factor_analysis(train.double(), NUM_LATENTS, min_noise_var=floor, num_steps=100, tol=1e-6).model
    parts = [probit_mass(model, part, 500, generator) for part in few.split(20)]
    value, ess = torch.cat([p.value for p in parts]), torch.cat([p.ess for p in parts])
    rows.append({"what": "mass of the cell", "floor": floor, "samples": 500, "images": len(few),
                 "ess": ess.median().item(), **mean_and_error(value)})
    uniform = lambda x: (x.double() + torch.rand(x.shape, generator=generator, dtype=torch.float64)) / 2
    model = fit_factor_analysis(uniform(train), NUM_LATENTS, min_noise_var=1e-9, num_steps=100, tol=1e-6).model
    value = model.log_likelihood(uniform(test)).value - train.shape[1] * math.log(2)
    rows.append({"what": "bound on the mass, uniform noise", **mean_and_error(value)})
    ones = (train.double().sum(0) + 1) / (len(train) + 2)
    independent = Bernoulli(torch.logit(ones)).log_prob(test.double())
    rows.append({"what": "independent pixels", **mean_and_error(independent)})
    model = LogisticFactorAnalysis(train.shape[1], NUM_LATENTS, ones.to(train.dtype)).to(run.device)
    decay = lambda step: 3e-3 * 0.03 ** (step / run.steps)
    fit(model, train, batch_size=200, lr=decay, **run.fit_options("logistic"))
    with torch.no_grad():
        few = test[::10]
        found = log_likelihood_is(model, few, 5000, generator=generator)
        bound = model.bound(few, num_samples=50, noise=torch.randn(50, len(few), NUM_LATENTS, generator=generator))
    rows.append({"what": "logistic factor analysis", "samples": 5000, "images": len(few), "bound": bound.mean().item(),
                 "ess": found.ess.median().item(), "epochs": run.steps * 200 / len(train),
                 **mean_and_error(found.value)})
    return rows


@experiment("01", "factor-analysis", paper="Rezende, Mohamed and Wierstra 2014", table="Table 1, factor analysis",
            hours=0.4, steps=15_000, rows=lambda runs: runs[0]["figures"]["mnist_binary"])
def factor_analysis(run):
    """Factor analysis and PPCA on digits and MNIST: held-out evidence, half pictures, and the 106 nats."""
    with torch.no_grad():
        digits, _ = grey(run, "digits", 17, [0, 1, 2, 5, 10, 15, 20, 30, 40])
        mnist, pictures = grey(run, "mnist", 256, [0, 10, 20, 50, 100, 200])
    return {"digits": digits, "mnist": mnist, "mnist_binary": binary(run)}, pictures
