"""Chapter 3's experiments: mixture and Dirichlet-process latents on fixed-binarised MNIST, one command a row.

Each row of the paper's table is an experiment of its own, so that the rows can be run on different machines and days:
`mnist-gaussian`, `mnist-mixture-3`, `mnist-dp-17`, and the controls that the paper lacks.
"""

import copy
import json
import math

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from dlgm_tutorial.distributions import FullNormal
from dlgm_tutorial.mixture_latents import MixtureDLGM, StickBreakingVAE
from dlgm_tutorial.objectives import renyi
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.training import EVALUATION, fit, stream, write_atomically

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
        estimate = model.log_likelihood(batch, num_samples, generator=generator(run, 2 * part + 1))
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
    """How far the mixture weights of single images move.

    Mean entropy of the mean weights, its largest value, and a histogram of the largest weight (20 bins on [0, 1]).
    """
    with torch.no_grad():
        w = model.component_weights(x[:2000].to(run.device)).double()
    entropy = -(w * w.clamp(min=1e-300).log()).sum(-1)
    return {"weight_entropy": float(entropy.mean()), "weight_entropy_max": math.log(w.shape[1]),
            "mean_weights": w.mean(0).tolist(),
            "largest_weights": torch.histc(w.amax(-1).cpu(), 20, 0.0, 1.0).tolist()}


# --- The paper's Figure 3 on fixed-binarised MNIST

def mnist_cell(run, model, **options):
    """A cell on fixed-binarised MNIST, with the errors of neighbours in its latent space."""
    train, valid, test = (run.load("binarized_mnist", split) for split in ("train", "valid", "test"))
    figures = image_cell(run, model, *(tensor(part.x) for part in (train, valid, test)), **options)
    figures |= knn_errors(model, train, test, run)
    return figures


def image_cell(run, model, x_train, x_valid, x_test, *, part="", num_samples=1, lr=3e-4, binarize=False):
    """Train a model with the paper's Adam and batch; bound, log-likelihood and use of the weights on test images.

    binarize: x_train are grey values, drawn anew at each use.
    """
    x_valid = x_valid[:2000]

    def after_epoch(model, epoch):
        if (epoch + 1) % 5:
            return None
        with torch.no_grad():
            return {"valid_bound": float(model.bound(x_valid.to(run.device), generator=generator(run, epoch)).mean())}

    history = fit(model, x_train, batch_size=BATCH, lr=lr, num_samples=num_samples, after_epoch=after_epoch,
                  record_every=500, binarize=binarize, **run.fit_options(part))
    updates = history[-1]["step"]
    figures = {"N": len(x_train), "epochs": updates / (len(x_train) // BATCH), "updates": updates,
               "parameters": sum(p.numel() for p in model.parameters()), "learning_rate": lr,
               "training_seconds": history[-1]["seconds"], "train_bound": history[-1]["bound"],
               "valid_bounds": [round(r["valid_bound"], 3) for r in history if "valid_bound" in r]}
    figures |= evaluate(model, x_test, run, num_samples=NUM_SAMPLES)
    if isinstance(model, MixtureDLGM) and model.nums[0] > 1:
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


# Rows of the same budget and several seeds, where one run of 100 epochs cannot tell seeds from models.
def paired_rows(runs):
    """One row a model, as `digits_rows`, with the budget of the runs."""
    budget = ("N", "epochs", "updates")
    return [{**row, **{key: runs[0]["figures"][row["model"]][key] for key in budget}} for row in digits_rows(runs)]


@experiment("03", "mnist-draws", paper=PAPER, table="control", hours=0.5, steps=5000, rows=paired_rows)
def mnist_draws(run):
    """Components or draws? One Gaussian, the same with three draws a step, and three components; 2,000 test images."""
    x_train, x_valid, x_test = (tensor(run.load("binarized_mnist", split).x) for split in ("train", "valid", "test"))
    cells = {"one Gaussian": (mixture(1), 1), "one Gaussian, 3 draws": (mixture(1), 3),
             "C = 3, indicator": (mixture(3), 1), "C = 3, siw": (mixture(3, kind="siw", weights="softmax"), 1)}
    return {name: image_cell(run, model, x_train, x_valid, x_test[:2000], part=f"cell-{i}", num_samples=num)
            for i, (name, (model, num)) in enumerate(cells.items())}


# --- The model of the paper's pictures: five prior components in a line, and the control that the paper lacks

DIGITS_STEPS, LATENTS, SPREAD = 1500, 5, (-1.5, -0.75, 0.0, 0.75, 1.5)


def spread_means(num_components=5):
    return torch.tensor(SPREAD)[:, None].expand(num_components, LATENTS)


class MixturePriorVAE(MixtureDLGM):
    """The mixture prior with a single Gaussian posterior: what the prior alone does."""

    def __init__(self, data_dim, latent_dim, num_components, **options):
        super().__init__(data_dim, latent_dim, 1, **options)
        shift = torch.linspace(-1.5, 1.5, num_components)[:, None]
        self.register_buffer("means", shift.expand(num_components, latent_dim).contiguous())

    def _log_prior(self, z):
        square = (z[..., None, :] - self.means).square().sum(-1)
        constant = math.log(len(self.means)) + 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return torch.logsumexp(-0.5 * square, -1) - constant

    def log_joint(self, x, z, *, coordinates="state"):
        return self._log_px(x)(z) + self._log_prior(z)

    def bound(self, x, *, num_samples=1, noise=None, generator=None, kind=None):
        noise = self._noise(len(x), num_samples, noise, generator, self.prior_loc)["components"]
        loc, log_scale = self.recognise(x)[:2]
        z = (loc + log_scale.exp() * noise)[:, :, 0]
        return self.log_joint(x, z).mean(0) + (log_scale + 0.5 * math.log(2 * math.pi * math.e)).sum((-1, -2))


@experiment("03", "mnist-spread-gaussian", paper=PAPER, table="control", hours=0.3, steps=STEPS)
def mnist_spread_gaussian(run):
    """The prior of the paper's pictures (five components in a line, 5 latents), one Gaussian as posterior."""
    return mnist_cell(run, MixturePriorVAE(784, LATENTS, 5, hidden_dims=(500,)))


@experiment("03", "mnist-spread-mixture-5", paper=PAPER, table="Figure 2, DLGMM", hours=0.8, steps=STEPS)
def mnist_spread_mixture_5(run):
    """The same prior, five components in the posterior, trained by the indicator bound."""
    return mnist_cell(run, MixtureDLGM(784, LATENTS, 5, hidden_dims=(500,), prior_loc=spread_means()))


# --- OMNIGLOT: 28x28 by area averaging, another set than the one in most papers

OMNIGLOT_STEPS = EPOCHS * 173


def omniglot_cell(run, model):
    """Training images are drawn anew at each use, as in chapter 2; validation and test images are drawn once."""
    train, valid, test = (run.load("omniglot", part, binarization="dynamic").x for part in ("train", "valid", "test"))
    once = lambda x, seed: (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < x).float()
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:2000]
    return image_cell(run, model, tensor(train), once(tensor(valid), 1), once(tensor(test)[order], 2), binarize=True)


@experiment("03", "omniglot-gaussian", paper=PAPER, table="Figure 3, Gauss-VAE", hours=0.2, steps=OMNIGLOT_STEPS)
def omniglot_gaussian(run):
    """OMNIGLOT (28x28 by area averaging), one Gaussian."""
    return omniglot_cell(run, mixture(1))


@experiment("03", "omniglot-mixture-3", paper=PAPER, table="Figure 3, DLGMM", hours=0.3, steps=OMNIGLOT_STEPS)
def omniglot_mixture_3(run):
    """OMNIGLOT (28x28 by area averaging), three components."""
    return omniglot_cell(run, mixture(3))


@experiment("03", "omniglot-dp-17", paper=PAPER, table="Figure 3, DLDPMM", hours=0.8, steps=OMNIGLOT_STEPS)
def omniglot_dp_17(run):
    """OMNIGLOT (28x28 by area averaging), a Dirichlet process truncated at 17 components."""
    return omniglot_cell(run, mixture(17, prior="gem"))


# --- Digits: every bound, and the controls that the paper lacks


class FullCovarianceVAE(MixtureDLGM):
    """One Gaussian posterior with a full covariance."""

    def __init__(self, data_dim, latent_dim, **options):
        super().__init__(data_dim, latent_dim, 1, **options)
        self.off_diagonal = nn.Linear(self.encoder[0][-1].out_features, latent_dim**2)
        nn.init.zeros_(self.off_diagonal.weight)
        nn.init.zeros_(self.off_diagonal.bias)

    def posterior(self, x):
        h = self.encoder(x)
        loc, log_scale = (part[:, 0] for part in self.components(h))
        below = self.off_diagonal(h).unflatten(-1, (loc.shape[-1],) * 2).tril(-1)
        return FullNormal(loc, below + torch.diag_embed(log_scale.exp()))

    def bound(self, x, *, num_samples=1, noise=None, generator=None, kind=None):
        noise = self._noise(len(x), num_samples, noise, generator, self.prior_loc)["components"]
        q = self.posterior(x)
        z = q.rsample((num_samples,), noise=noise[:, :, 0])
        return self.log_joint(x, z).mean(0) + q.entropy()


class RenyiVAE(MixtureDLGM):
    """One Gaussian, trained by the Renyi bound of order 1/2."""

    def bound(self, x, *, num_samples=1, noise=None, generator=None, kind=None):
        noise = self._noise(len(x), num_samples, noise, generator, self.prior_loc)["components"]
        loc, log_scale = self.recognise(x)[:2]
        z = (loc + log_scale.exp() * noise)[:, :, 0]
        return renyi(self.log_joint(x, z) - self.posterior(x).log_prob(z), 0.5)


def digits_data(run):
    return [run.load("digits", split, binarization="threshold") for split in ("train", "valid", "test")]


def digits_cell(run, part, model, *, num_samples=1):
    """Train on the 8x8 digits, keep the parameters with the best validation bound, measure on the test images."""
    kept = run.checkpoint(part.replace(" ", "-").replace("/", "-"))
    if kept is not None and kept.with_suffix(".json").exists():
        figures = json.loads(kept.with_suffix(".json").read_text())
        if figures["updates"] == run.steps:
            return figures
    train, valid, test = digits_data(run)
    best = {"value": -math.inf}

    def after_epoch(model, epoch):
        if (epoch + 1) % 10:
            return
        with torch.no_grad():
            value = float(model.bound(valid.x.to(run.device), num_samples=20, generator=generator(run, epoch)).mean())
        if value > best["value"]:
            best.update(value=value, epoch=epoch + 1, state=copy.deepcopy(model.state_dict()))

    # No checkpoint of the training: a cell takes a minute. Its figures are kept, so a killed command goes on.
    options = {**run.fit_options(part), "checkpoint": None, "progress": None}
    history = fit(model, train.x, batch_size=100, lr=1e-3, num_samples=num_samples, after_epoch=after_epoch, **options)
    model.load_state_dict(best["state"])
    figures = {"seconds": history[-1]["seconds"], "best_epoch": best["epoch"],
               "parameters": sum(p.numel() for p in model.parameters()), "N": len(train.x), "updates": run.steps}
    figures |= evaluate(model, test.x, run, num_samples=1000)
    figures |= knn_errors(model, train, test, run, (5,))
    if model.nums[0] > 1:
        figures |= weights_used(model, test.x, run)
    if kept is not None:
        with write_atomically(kept.with_suffix(".json")) as file:
            file.write(json.dumps(figures).encode())
    return figures


def digits_rows(runs):
    """One row a model: means over the seeds, and standard errors between them.

    The gain is that in log-likelihood over the first model with the same seed: same images, same order of batches.
    """
    rows, first = [], next(iter(runs[0]["figures"]))
    error = lambda values: float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    for name in runs[0]["figures"]:
        cells = [run["figures"][name] for run in runs]
        mean = lambda key: float(np.mean([cell[key] for cell in cells])) if key in cells[0] else None  # noqa: B023
        gains = [run["figures"][first]["nll"] - run["figures"][name]["nll"] for run in runs]
        rows.append({"model": name, "seeds": len(cells), "bound": mean("bound"), "nll": mean("nll"),
                     "nll_error": error([cell["nll"] for cell in cells]),
                     "gain": None if name == first else float(np.mean(gains)),
                     "gain_error": None if name == first else error(gains),
                     "gap": -mean("nll") - mean("bound"), "knn_samples": mean("knn_samples_5"),
                     "knn_means": mean("knn_means_5"), "weight_entropy": mean("weight_entropy"),
                     "weight_entropy_max": mean("weight_entropy_max"), "seconds": mean("seconds")})
    return rows


def digits_model(num_components, **options):
    return MixtureDLGM(64, LATENTS, num_components, hidden_dims=(200,), **options)


@experiment("03", "digits-bounds", paper=PAPER, table="controls", hours=0.5, steps=DIGITS_STEPS, rows=digits_rows)
def digits_bounds(run):
    """The 8x8 digits: every bound, equal and spread prior components, and two controls."""
    spread = {"prior_loc": spread_means()}
    cells = {"one Gaussian": (digits_model(1), 1), "one Gaussian, 3 draws": (digits_model(1), 3)}
    for kind in ("paper", "indicator", "mixture", "collapsed", "siw"):
        weights = "softmax" if kind in ("collapsed", "siw") else "sticks"
        cells[f"C = 3, {kind}"] = (digits_model(3, kind=kind, weights=weights), 1)
    cells["DP, T = 10, indicator"] = (digits_model(10, prior="gem"), 1)
    cells["spread prior, one Gaussian"] = (MixturePriorVAE(64, LATENTS, 5, hidden_dims=(200,)), 1)
    for kind in ("paper", "indicator", "mixture", "collapsed", "siw"):
        weights = "softmax" if kind in ("collapsed", "siw") else "sticks"
        cells[f"spread prior, C = 5, {kind}"] = (digits_model(5, kind=kind, weights=weights, **spread), 1)
    return {name: digits_cell(run, name, model, num_samples=num) for name, (model, num) in cells.items()}


@experiment("03", "digits-equal-passes", paper=PAPER, table="control", hours=0.2, steps=DIGITS_STEPS, rows=digits_rows)
def digits_equal_passes(run):
    """The 8x8 digits at three decoder passes a step: posterior family against objective."""
    options = {"hidden_dims": (200,)}
    cells = {"Gaussian, ELBO": (digits_model(1), 3),
             "full covariance, ELBO": (FullCovarianceVAE(64, LATENTS, **options), 3),
             "Gaussian, IWAE": (digits_model(1, kind="siw"), 3),
             "Gaussian, Renyi 1/2": (RenyiVAE(64, LATENTS, 1, **options), 3),
             "mixture of 3, mixture": (digits_model(3, kind="mixture"), 1),
             "mixture of 3, siw": (digits_model(3, kind="siw", weights="softmax"), 1)}
    return {name: digits_cell(run, name, model, num_samples=num) for name, (model, num) in cells.items()}
