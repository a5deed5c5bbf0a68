"""Chapter 3: the model M2 with a stick or a Gaussian as its code, on few labels (Nalisnick and Smyth 2017, Table 2)."""

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from dlgm_tutorial.mixture_latents import SemiSupervisedVAE
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.training import fit

__all__ = []

PAPER, MIXING = "Nalisnick and Smyth 2017", 0.375
CODES = {"sticks": "stick_breaking", "gaussian": "gaussian"}


def negative_objective(model, batch, noise):
    """What training minimises, [B]: the first draw of the noise is the labelled part's, the second the other's."""
    x, x_labelled, y = batch
    labelled = model.bound(x_labelled, y, noise=noise[:1])
    labelled = labelled + torch.gather(model.classify(x_labelled), 1, y[:, None])[:, 0]
    return -(MIXING * labelled + (1 - MIXING) * model.bound(x, noise=noise[1:]))


def labelled_rows(y, percent, seed):
    """Rows that keep their label: the same number of each class, at least one, drawn with the seed."""
    chance, y = np.random.default_rng(seed), np.asarray(y)
    num = max(1, round(len(y) * percent / 100 / 10))
    return np.sort(np.concatenate([chance.permutation(np.flatnonzero(y == c))[:num] for c in range(10)]))


def labels_cell(run, model, percent, train, test, *, lr, part=""):
    """Train with the labels of a few images; test error of the classifier, and of neighbours among the labelled."""
    x, y = torch.as_tensor(np.array(train.x, dtype=np.float32)), torch.as_tensor(np.array(train.y)).long()
    rows = labelled_rows(y, percent, run.seed)
    again = np.resize(rows, len(x))  # the labelled images fill an epoch by repetition; `fit` shuffles all rows
    history = fit(model, (x, x[again], y[again]), batch_size=100, lr=lr, loss=negative_objective, num_samples=2,
                  **run.fit_options(part))
    x_test, y_test = torch.as_tensor(np.array(test.x, dtype=np.float32)).to(run.device), np.asarray(test.y)
    with torch.no_grad():
        guess = torch.cat([model.classify(chunk).argmax(-1) for chunk in x_test.split(1000)]).cpu().numpy()
    near = KNeighborsClassifier(5).fit(x[rows].numpy(), y[rows].numpy())
    return {"N": len(x), "labels": len(rows), "epochs": history[-1]["step"] / (len(x) // 100),
            "updates": history[-1]["step"], "parameters": sum(p.numel() for p in model.parameters()),
            "error": 100 * float((guess != y_test).mean()),
            "knn_pixels_5": 100 * float((near.predict(np.array(test.x)) != y_test).mean()),
            "training_seconds": history[-1]["seconds"]}


def labels_rows(runs):
    """One row a cell: means over the seeds, and the standard error of the classifier's error."""
    error = lambda v: float(np.std(v, ddof=1) / len(v) ** 0.5) if len(v) > 1 else None
    rows = []
    for name in runs[0]["figures"]:
        cells = [run["figures"][name] for run in runs]
        rows.append({"model": name, "seeds": len(cells), **{key: cells[0][key] for key in ("N", "labels", "epochs")},
                     "error": float(np.mean([c["error"] for c in cells])),
                     "error_error": error([c["error"] for c in cells]),
                     "knn_pixels_5": float(np.mean([c["knn_pixels_5"] for c in cells]))})
    return rows


@experiment("03", "digits-labels", paper=PAPER, table="Table 2, on the 8x8 digits", hours=0.2, steps=1500,
            rows=labels_rows)
def digits_labels(run):
    """The 8x8 digits with few labels: a stick of 15 pieces against 15 Gaussians as the code of M2."""
    train, test = (run.load("digits", split, binarization="threshold") for split in ("train", "test"))
    figures = {}
    for percent in (10, 5, 1):
        for name, code in CODES.items():
            torch.manual_seed(run.seed)
            model = SemiSupervisedVAE(64, 15, 10, latent=code, hidden_dims=(200,), concentration=3.0)
            figures[f"{name}, {percent} %"] = labels_cell(run, model, percent, train, test, lr=1e-3,
                                                          part=f"{name}-{percent}")
    return figures


def mnist_labels(name, percent):
    """The cell of the paper's table with this code and so many per cent of the labels, as an experiment."""
    def cell(run):
        train, test = (run.load("binarized_mnist", split) for split in ("train", "test"))
        model = SemiSupervisedVAE(784, 50, 10, latent=CODES[name], hidden_dims=(500,), concentration=5.0)
        return labels_cell(run, model, percent, train, test, lr=3e-4)

    cell.__doc__ = f"M2 with {name}, 50 of them, on fixed-binarised MNIST with {percent} % of the labels."
    return experiment("03", f"mnist-labels-{name}-{percent}", paper=PAPER, table="Table 2", hours=0.6,
                      steps=50_000)(cell)


for _percent in (10, 5, 1):
    for _name in CODES:
        mnist_labels(_name, _percent)
