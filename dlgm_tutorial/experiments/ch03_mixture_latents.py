"""Chapter 3's experiments: mixture and Dirichlet-process latents on fixed-binarised MNIST, one command a row.

Each row of the paper's table is an experiment of its own, so that the rows can be run on different machines and days:
`mnist-gaussian`, `mnist-mixture-3`, `mnist-dp-17`, and the controls that the paper lacks.
"""

import math

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from dlgm_tutorial.mixture_latents import MixtureDLGM, StickBreakingVAE
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.training import EVALUATION, fit, stream

__all__ = []

PAPER = "Nalisnick, Hertel and Smyth 2016"
EPOCHS, BATCH, NUM_SAMPLES = 100, 100, 500
STEPS = EPOCHS * 500


# --- Shared steps

def tensor(array):
    return torch.from_numpy(np.array(array, dtype=np.float32))


def generator(run, counter):
    """A torch generator that depends on the seed and a counter alone."""
    return torch.Generator(run.device).manual_seed(int(stream(run.seed, EVALUATION, counter).integers(2**31)))


def evaluate(model, x, run, *, num_samples, rows=500):
    """Mean bound and log-likelihood of x of x in nats, with the standard error over the data."""
    bounds, values, ess = [], [], []
    for part in range(0, len(x), rows):
        batch = x[part:part + rows].to(run.device)
        with torch.no_grad():
            bounds.append(model.bound(batch, num_samples=10, generator=generator(run, 2 * part)))
        estimate = model.log_likelihood(batch, num_samples, generator=generator(run, 2 * part + 1), chunk=20)
        values.append(estimate.value)
        ess.append(estimate.ess)
    bounds, values, ess = torch.cat(bounds), torch.cat(values), torch.cat(ess)
    error = lambda v: float(v.std() / math.sqrt(len(v)))
    return {"bound": float(bounds.mean()), "nll": float(-values.mean()), "nll_standard_error": error(values),
            "importance_samples": num_samples, "median_ess": float(ess.median())}


def latents(model, x, run, draw):
    """Posterior means [N, K], or one draw each, 1,000 rows at a time."""
    parts = []
    with torch.no_grad():
        for part in range(0, len(x), 1000):
            q = model.posterior(x[part:part + 1000].to(run.device))
            z = q.rsample((1,), generator=generator(run, 10**6 + part))[0] if draw else q.mean
            parts.append((model.weights(z) if draw and isinstance(model, StickBreakingVAE) else z).cpu())
    return torch.cat(parts).numpy()


def knn_errors(model, train, test, run, neighbours=(3, 5, 10)):
    """Test errors in per cent of k nearest neighbours in the latent space, on draws and on means."""
    figures = {}
    for name, draw in (("samples", True), ("means", False)):
        z, z_test = latents(model, tensor(train.x), run, draw), latents(model, tensor(test.x), run, draw)
        for k in neighbours:
            fitted = KNeighborsClassifier(k).fit(z, np.asarray(train.y))
            figures[f"knn_{name}_{k}"] = 100 * float((fitted.predict(z_test) != np.asarray(test.y)).mean())
    return figures


def weights_used(model, x, run):
    """How far the mixture weights of single images move: mean entropy of the mean weights, and its largest value."""
    with torch.no_grad():
        w = model.component_weights(x[:2000].to(run.device)).double()
    entropy = -(w * w.clamp(min=1e-300).log()).sum(-1)
    return {"weight_entropy": float(entropy.mean()), "weight_entropy_max": math.log(w.shape[1]),
            "mean_weights": w.mean(0).tolist()}


# --- The paper's Figure 3 on fixed-binarised MNIST

def mnist_cell(run, model, *, part="", num_samples=1, lr=3e-4):
    """Train 500d-...x25s with the paper's Adam and batch, and measure what its table reports."""
    train, valid, test = (run.load("binarized_mnist", split) for split in ("train", "valid", "test"))
    x_valid = tensor(valid.x)[:2000]

    def after_epoch(model, epoch):
        if (epoch + 1) % 5:
            return None
        with torch.no_grad():
            return {"valid_bound": float(model.bound(x_valid.to(run.device), generator=generator(run, epoch)).mean())}

    history = fit(model, tensor(train.x), batch_size=BATCH, lr=lr, num_samples=num_samples, after_epoch=after_epoch,
                  record_every=500, **run.fit_options(part))
    x_test = tensor(test.x)
    updates = history[-1]["step"]
    figures = {"N": len(train.x), "epochs": updates / (len(train.x) // BATCH), "updates": updates,
               "parameters": sum(p.numel() for p in model.parameters()), "learning_rate": lr,
               "training_seconds": history[-1]["seconds"], "train_bound": history[-1]["bound"],
               "valid_bounds": [round(r["valid_bound"], 3) for r in history if "valid_bound" in r]}
    figures |= evaluate(model, x_test, run, num_samples=NUM_SAMPLES)
    figures |= knn_errors(model, train, test, run)
    if isinstance(model, MixtureDLGM):
        figures |= weights_used(model, x_test, run)
    return figures


def mixture(num_components, **options):
    return MixtureDLGM(784, 25, num_components, hidden_dims=(500,), **options)


@experiment("03", "mnist-gaussian", paper=PAPER, table="Figure 3, Gauss-VAE", hours=0.4, steps=STEPS)
def mnist_gaussian(run):
    """One Gaussian, 500 units, 25 latents: the plain VAE."""
    return mnist_cell(run, mixture(1))


@experiment("03", "mnist-mixture-3", paper=PAPER, table="Figure 3, DLGMM", hours=0.8, steps=STEPS)
def mnist_mixture_3(run):
    """Three components, Dirichlet(1) weights, trained by the indicator bound."""
    return mnist_cell(run, mixture(3))


@experiment("03", "mnist-mixture-3-paper", paper=PAPER, table="Figure 3, DLGMM", hours=0.8, steps=STEPS)
def mnist_mixture_3_paper(run):
    """Three components, trained by equation 1 as printed."""
    return mnist_cell(run, mixture(3, kind="paper"))


@experiment("03", "mnist-dp-17", paper=PAPER, table="Figure 3, DLDPMM", hours=2.5, steps=STEPS)
def mnist_dp_17(run):
    """A Dirichlet process of concentration 1, truncated at 17 components."""
    return mnist_cell(run, mixture(17, prior="gem"))


@experiment("03", "mnist-equal-compute", paper=PAPER, table="control", hours=0.8, steps=STEPS)
def mnist_equal_compute(run):
    """One Gaussian with three draws a step: the decoder passes of the three components."""
    return mnist_cell(run, mixture(1), num_samples=3)


@experiment("03", "mnist-stick-breaking", paper="Nalisnick and Smyth 2017", table="Table 1, Kumaraswamy", hours=0.5,
            steps=STEPS)
def mnist_stick_breaking(run):
    """The stick-breaking VAE, 50 weights, concentration 5, on the fixed binarisation."""
    return mnist_cell(run, StickBreakingVAE(784, 50, hidden_dims=(500,), concentration=5.0))
