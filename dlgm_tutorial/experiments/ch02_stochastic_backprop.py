"""Chapter 2's experiments: the deep latent Gaussian model on real images, its families of q side by side."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.stochastic_backprop import DLGM, score_function_loss, wake_sleep_losses
from dlgm_tutorial.training import fit, write_atomically

__all__ = []

PAPER = "Rezende, Mohamed and Wierstra 2014"


# ---------------------------------------------------------------- shared steps
def tensor(array):
    return torch.from_numpy(np.array(array, dtype=np.float32))


def balanced(labels, per_class, seed=0):
    """Rows of a class-balanced part of a set, in a fixed random order (the test file of MNIST is sorted by digit)."""
    order = np.random.default_rng(seed).permutation(len(labels))
    labels = np.asarray(labels)[order]
    return np.sort(np.concatenate([order[labels == c][:per_class] for c in np.unique(labels)]))


def stepped_rate(num_steps, lr=1e-3):
    """Learning rate that falls to 0.3 and to 0.1 of lr after 60 % and 85 % of the steps."""
    def rate(step):
        return lr * (1.0 if step < 0.6 * num_steps else 0.3 if step < 0.85 * num_steps else 0.1)
    return rate


def keep_best(valid, path=None, seed=0):
    """(after_epoch, restore): remember the parameters with the best validation bound, on disc where path is given."""
    best = {"valid_bound": -np.inf, "epoch": 0}

    def after_epoch(model, epoch):
        if epoch and path is not None and not best["epoch"] and path.exists():  # resumed
            best.update(json.loads(path.with_suffix(".json").read_text()))
        with torch.no_grad():
            value = float(model.bound(valid, generator=torch.Generator().manual_seed(seed)).mean())
        if value > best["valid_bound"]:
            best.update(valid_bound=value, epoch=epoch + 1)
            best["state"] = {k: v.clone() for k, v in model.state_dict().items()}
            if path is not None:
                with write_atomically(path) as file:
                    torch.save(best["state"], file)
                path.with_suffix(".json").write_text(json.dumps({k: best[k] for k in ("valid_bound", "epoch")}))
        return {"valid_bound": value}

    def restore(model):
        if path is not None and path.exists():
            best.update(json.loads(path.with_suffix(".json").read_text()), state=torch.load(path, weights_only=True))
        model.load_state_dict(best["state"])
        return best["epoch"], best["valid_bound"]
    return after_epoch, restore


def train(run, part, model, data, valid, *, batch_size=100, lr=1e-3, **options):
    """Fit with a stepped rate and keep the best epoch; figures of the training, and the learning curve."""
    checkpoint = run.checkpoint(part)
    after_epoch, restore = keep_best(valid, checkpoint and Path(checkpoint).with_suffix(".best.pt"), run.seed)
    settings = run.fit_options(part)
    rate = stepped_rate(settings["num_steps"], lr)
    history = fit(model, data, batch_size=batch_size, lr=rate, after_epoch=after_epoch,
                  **{"record_every": 10 * (len(data) // batch_size), **settings, **options})
    epoch, value = restore(model)
    per_epoch = len(data) // batch_size
    curve = {"epoch": [r["step"] / per_epoch for r in history if "valid_bound" in r],
             "train": [round(r["bound"], 4) for r in history if "valid_bound" in r],
             "valid": [round(r["valid_bound"], 4) for r in history if "valid_bound" in r]}
    return {"N": len(data), "batch_size": batch_size, "epochs": round(history[-1]["step"] / per_epoch, 1),
            "updates": history[-1]["step"], "best_epoch": epoch, "valid_bound": value,
            "train_bound": history[-1]["bound"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_per_epoch": history[-1]["seconds"] / history[-1]["step"] * per_epoch, "curve": curve}


@torch.no_grad()
def judge(model, test, part, num_samples=5000, chunk=20_000, seed=0):
    """Bound on all test rows, KL per layer, and importance-sampled log-likelihood on the rows `part` for rising S."""
    model.eval()
    generator = lambda: torch.Generator().manual_seed(1000 + seed)
    bound = torch.cat([model.bound(rows, num_samples=4, generator=generator()) for rows in test.split(1000)])
    kl = torch.cat([torch.stack(model._posterior(rows).kl_per_layer(), 1) for rows in test.split(1000)]).mean(0)
    figures = {"test_bound": float(bound.mean()), "test_bound_se": float(bound.std() / len(bound) ** 0.5),
               "num_test": len(test), "kl_per_layer": kl.tolist(), "kl": float(kl.sum())}
    if part is None:
        return figures, None
    figures["num_evaluated"], figures["evaluated_bound"] = len(part), float(bound[part].mean())
    curve, value = {}, None
    for size in sorted({s for s in (50, 500) if s < num_samples} | {num_samples}):
        estimates = [model.log_likelihood(rows, size, generator=generator(), chunk=chunk)
                     for rows in test[part].split(500)]
        value = torch.cat([e.value for e in estimates])
        curve[str(size)] = float(value.mean())
    ess = torch.cat([e.ess for e in estimates])
    figures.update(log_likelihood=float(value.mean()), log_likelihood_se=float(value.std() / len(value) ** 0.5),
                   num_samples=num_samples, by_num_samples=curve, median_ess=float(ess.median()))
    return figures, value


def paired(a, b):
    """Mean and standard error over images of a - b."""
    difference = a - b
    return {"mean": float(difference.mean()), "standard_error": float(difference.std() / len(difference) ** 0.5)}


def rows_by_model(runs):
    """One row a model: means over seeds, with the standard error of the log-likelihood over seeds."""
    rows = []
    for name in [k for k, v in runs[0]["figures"].items() if isinstance(v, dict) and "test_bound" in v]:
        parts = [run["figures"][name] for run in runs if name in run["figures"]]
        mean = lambda key, parts=parts: float(np.mean([p[key] for p in parts])) if key in parts[0] else None
        values = [p["log_likelihood"] for p in parts if "log_likelihood" in p]
        spread = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        rows.append({"model": name, "N": parts[0].get("N"), "epochs": parts[0].get("epochs"),
                     "updates": parts[0].get("updates"), "parameters": parts[0].get("parameters"), "seeds": len(parts),
                     "bound": mean("test_bound"), "log_likelihood": mean("log_likelihood"),
                     "standard_error": spread, "kl": mean("kl"), "best_epoch": mean("best_epoch"),
                     "num_evaluated": parts[0].get("num_evaluated"), "num_samples": parts[0].get("num_samples"),
                     "kl_per_layer": " + ".join(f"{np.mean([p['kl_per_layer'][i] for p in parts]):.2f}"
                                                for i in range(len(parts[0]["kl_per_layer"]))),
                     "seconds_per_epoch": mean("seconds_per_epoch")})
    return rows


def pack(model, dtype=np.float16):
    """Parameters as small arrays for the results' .npz."""
    return {name.replace(".", "/"): p.detach().cpu().numpy().astype(dtype) for name, p in model.state_dict().items()}


# ---------------------------------------------------------------- 8x8 digits: the brief's comparison
def digit_parts(run):
    """Digits binarised once: train [1297, 64], valid [200, 64], test [300, 64], and their labels.

    The cut of the book's small comparison: permutation, then uniforms, both from RandomState(0).
    """
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    rng = np.random.RandomState(0)
    order = rng.permutation(len(x))
    binary = (rng.rand(*x.shape) < (x / 16)[order]).astype(np.float32)
    return (*torch.from_numpy(binary).split([1297, 200, 300]), y[order])


def independent_pixels(train, test):
    """log p of a product of Bernoullis with add-one-half smoothing, per test row."""
    p = (train.sum(0, dtype=torch.float64) + 0.5) / (len(train) + 1)
    return test.double() @ p.log() + (1 - test.double()) @ torch.log1p(-p)


DIGIT_MODELS = {
    "logistic factor analysis, diagonal": {"decoder": "linear"},
    "logistic factor analysis, rank-1": {"decoder": "linear", "recognition": "rank1"},
    "wake-sleep, diagonal": {"loss": "wake-sleep"},
    "score function, diagonal": {"loss": "score"},
    "L = 1, diagonal (plain VAE)": {},
    "L = 1, rank-1": {"recognition": "rank1"},
    "L = 1, rank-2": {"recognition": "rank_r"},
    "L = 1, full": {"recognition": "full"},
    "L = 2, diagonal": {"layers": 2},
    "L = 2, rank-1": {"layers": 2, "recognition": "rank1"},
    "L = 1, diagonal, 5 % flips": {"input_flip": 0.05},
}


def wake_sleep(model, batch, noise):
    """Both losses of wake-sleep, added: their gradients touch different parameters."""
    return sum(wake_sleep_losses(model, batch))


def score_function(model, batch, noise):
    """The score-function loss with five draws."""
    return score_function_loss(model, batch)


def digit_model(decoder=None, loss=None, layers=1, **options):
    decoder = nn.Linear(5, 64) if decoder == "linear" else None
    return DLGM(64, (5,) * layers, 100, decoder=decoder, noise_matrix="identity" if decoder is not None else "dense",
                recognition_dims=100, **options)


@experiment("02", "digits", paper=PAPER, table="the families of q, small", hours=0.2, steps=3000, rows=rows_by_model)
def digits(run):
    """Families of q, layers and learning rules on 8x8 binarised digits."""
    train_x, valid, test, _ = digit_parts(run)
    figures, values = {}, {}
    independent = independent_pixels(train_x, test)
    figures["independent pixels"] = {"log_likelihood": float(independent.mean()),
                                     "standard_error": float(independent.std() / len(independent) ** 0.5)}
    losses = {None: None, "wake-sleep": wake_sleep, "score": score_function}
    for name, options in DIGIT_MODELS.items():
        torch.manual_seed(run.seed)
        model = digit_model(**options)
        part = "".join(c if c.isalnum() else "-" for c in name)
        figures[name] = train(run, part, model, train_x, valid, lr=3e-3, loss=losses[options.get("loss")])
        judged, values[name] = judge(model, test, np.arange(len(test)), num_samples=1000, seed=run.seed)
        figures[name].update(judged)
    reference = values["L = 1, diagonal (plain VAE)"]
    figures["difference from the plain VAE"] = {name: paired(value, reference) for name, value in values.items()
                                                if value is not reference}
    return figures


# ---------------------------------------------------------------- MNIST, the paper's table
def mnist_figures(run, data, valid, test, part, families, *, binarize=False, num_samples=5000, latent=200, **options):
    figures, values, models = {}, {}, {}
    for recognition in families:
        torch.manual_seed(run.seed)
        model = DLGM(data.shape[1], (latent,), ((200, 200),), recognition=recognition, recognition_dims=(200,),
                     **options)
        figures[recognition] = train(run, recognition, model, data, valid, binarize=binarize)
        judged, values[recognition] = judge(model, test, part, num_samples, seed=run.seed)
        figures[recognition].update(judged)
        models[recognition] = model
    if "rank1" in values and "diagonal" in values:
        figures["rank-1 minus diagonal"] = paired(values["rank1"], values["diagonal"])
    return figures, models


@experiment("02", "mnist", paper=PAPER, table="Table 1", hours=1.2, steps=50_000, rows=rows_by_model)
def mnist(run):
    """The paper's model (K = 200) on fixed-binarised MNIST, diagonal and rank-1; 5,000-sample likelihood."""
    data, valid = (tensor(run.load("binarized_mnist", split).x) for split in ("train", "valid"))
    test = run.load("binarized_mnist", "test")
    figures, models = mnist_figures(run, data, valid, tensor(test.x), balanced(test.y, 100), ("diagonal", "rank1"))
    return figures, pack(models["diagonal"])


@experiment("02", "mnist-dynamic", paper=PAPER, table="beyond Table 1", hours=1.2, steps=50_000, rows=rows_by_model)
def mnist_dynamic(run):
    """The same on MNIST drawn anew at each use; the test images are drawn once, with a fixed seed."""
    data = tensor(run.load("mnist", "train", binarization="dynamic").x)
    test = run.load("mnist", "test", binarization="dynamic")
    once = lambda p, seed: (torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < p).float()
    return mnist_figures(run, data[:50_000], once(data[50_000:], 1), once(tensor(test.x), 2), balanced(test.y, 100),
                         ("diagonal", "rank1"), binarize=True)[0]
