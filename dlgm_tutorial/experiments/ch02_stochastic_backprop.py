"""Chapter 2's experiments: the deep latent Gaussian model on real images, its families of q side by side."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dlgm_tutorial import cast, results
from dlgm_tutorial.evaluation import inference_gaps, knn_error, log_likelihood_ais, simulation_based_calibration
from dlgm_tutorial.exact_inference import fit_factor_analysis
from dlgm_tutorial.networks import mlp
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.stochastic_backprop import DLGM, impute, score_function_loss, wake_sleep_losses, widen
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
        if "state" not in best:
            raise ValueError("steps must cover at least one epoch: the model is chosen by its bound after each")
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


def annealed(model, x, num_steps=100, num_chains=8, seed=0):
    """Annealed estimate of log p(x), walking from the recognition Gaussian to the posterior: `Estimate`."""
    return log_likelihood_ais(model, x, num_chains, num_steps=num_steps, chunk=4000,
                              base=lambda rows: model._posterior(rows, flat=True),
                              generator=torch.Generator().manual_seed(2000 + seed))


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
                     "standard_error": spread, "annealed": mean("annealed"), "kl": mean("kl"),
                     "best_epoch": mean("best_epoch"),
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
    """Digits binarised once: train [1297, 64], valid [200, 64], test [300, 64]."""
    return tuple(tensor(run.load("digits", split, binarization="fixed").x) for split in ("train", "valid", "test"))


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
    train_x, valid, test = digit_parts(run)
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


def rows_of_calibration(runs):
    """One row a family: means over seeds; the largest of the worst."""
    rows = []
    for family in runs[0]["figures"]:
        cells = [run["figures"][family] for run in runs]
        values = [cell["outer"] for cell in cells]
        rows.append({"family": family, "seeds": len(runs), "outer": float(np.mean(values)),
                     "outer_se": float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
                     "worst": max(cell["worst"] for cell in cells),
                     "chi_square": max(cell["chi_square"] for cell in cells)})
    return rows


@experiment("02", "calibration", paper=PAPER, table="calibration of q", hours=0.1, steps=3000,
            rows=rows_of_calibration)
def calibration(run):
    """Ranks of the true latents under each family of q, trained on the digits, on data of the model itself."""
    train_x, valid, _ = digit_parts(run)
    figures = {}
    for name, recognition in (("diagonal", "diagonal"), ("rank-1", "rank1"), ("rank-2", "rank_r"), ("full", "full")):
        torch.manual_seed(run.seed)
        model = digit_model(recognition=recognition)
        train(run, name, model, train_x, valid, lr=3e-3)

        @torch.no_grad()
        def sample_joint(num, generator, model=model):
            z = model.sample_latents(num, generator=generator)
            return z, model.observation(z).sample(generator=generator)

        ranks = simulation_based_calibration(sample_joint, model.posterior, 10_000,
                                             generator=torch.Generator().manual_seed(run.seed))
        outer = (ranks.histogram(20)[[0, 19]].sum(0) / 10_000).tolist()
        figures[name] = {"outer": float(np.mean(outer)), "worst": max(outer),
                         "chi_square": float(ranks.chi_square(10)[0].max())}
    return figures


# ---------------------------------------------------------------- MNIST, the paper's table
def mnist_figures(run, data, valid, test, part, families, *, binarize=False, num_samples=5000, latent=(200,),
                  hidden=((200, 200),), anneal=False, **options):
    figures, values, walked, models = {}, {}, {}, {}
    for recognition in families:
        torch.manual_seed(run.seed)
        model = DLGM(data.shape[1], latent, hidden, recognition=recognition, recognition_dims=(200,), **options)
        figures[recognition] = train(run, recognition, model, data, valid, binarize=binarize)
        judged, values[recognition] = judge(model, test, part, num_samples, seed=run.seed)
        figures[recognition].update(judged)
        if anneal:
            estimate = annealed(model.requires_grad_(False), test[part], seed=run.seed)
            walked[recognition] = estimate.value
            figures[recognition].update(annealed=float(estimate.value.mean()),
                                        annealed_se=float(estimate.value.std() / len(part) ** 0.5),
                                        annealed_median_ess=float(estimate.ess.median()))
        models[recognition] = model
    if "rank1" in values and "diagonal" in values:
        figures["rank-1 minus diagonal"] = paired(values["rank1"], values["diagonal"])
        if anneal:
            figures["rank-1 minus diagonal, annealed"] = paired(walked["rank1"], walked["diagonal"])
    return figures, models


@experiment("02", "mnist", paper=PAPER, table="Table 1", hours=1.2, steps=50_000, rows=rows_by_model)
def mnist(run):
    """The paper's model (K = 200) on fixed-binarised MNIST, diagonal and rank-1; 5,000-sample likelihood."""
    data, valid = (tensor(run.load("binarized_mnist", split).x) for split in ("train", "valid"))
    test = run.load("binarized_mnist", "test")
    figures, models = mnist_figures(run, data, valid, tensor(test.x), balanced(test.y, 50), ("diagonal", "rank1"),
                                    anneal=True)
    return figures, pack(models["diagonal"])


@experiment("02", "mnist-two-layers", paper=PAPER, table="beyond Table 1", hours=0.3, steps=25_000, rows=rows_by_model)
def mnist_two_layers(run):
    """Two stochastic layers (200 and 50 latents) on fixed-binarised MNIST: the divergence of each layer."""
    data, valid = (tensor(run.load("binarized_mnist", split).x) for split in ("train", "valid"))
    test = run.load("binarized_mnist", "test")
    return mnist_figures(run, data, valid, tensor(test.x), balanced(test.y, 20), ("diagonal",), num_samples=1000,
                         latent=(200, 50), hidden=((200, 200), (100,)))[0]


# ---------------------------------------------------------------- the shipped MNIST model, looked at closely
def shipped():
    """The diagonal model of `02 mnist` (seed 0): its weights, in half precision, are part of the results."""
    model = DLGM(784, (200,), ((200, 200),), recognition_dims=(200,))
    with np.load(results.path("02-mnist.npz")) as arrays:
        model.load_state_dict({name.replace("/", "."): torch.from_numpy(arrays[name].astype(np.float32))
                               for name in arrays.files})
    return model.eval()


def rows_of_evidence(runs):
    """One row an instrument: mean over images, and the standard error of that mean over images."""
    return runs[0]["figures"]["rows"]


@experiment("02", "evidence-mnist", paper=PAPER, table="test log-likelihood", hours=0.1, steps=300,
            rows=rows_of_evidence)
def evidence_mnist(run):
    """log p(x) of 50 MNIST test images by importance sampling (q as it is, widened) and by annealing.

    --steps: the temperatures of the annealing from the prior; from q there are fewer.
    """
    test = run.load("binarized_mnist", "test")
    x = tensor(test.x)[balanced(test.y, 5)]
    model, rows, values = shipped(), [], {}

    def row(method, value, **facts):
        values[method] = value
        rows.append({"method": method, "log_likelihood": float(value.mean()),
                     "standard_error": float(value.std() / len(value) ** 0.5), **facts})

    generator = lambda: torch.Generator().manual_seed(run.seed)
    with torch.no_grad():
        row("bound", torch.stack([model.bound(x, num_samples=100, generator=generator())])[0].double())
    curves = {}
    for name, factor in (("q as it is", 1.0), ("covariance x 1.1", 1.1), ("covariance x 1.3", 1.3)):
        proposal = lambda rows, factor=factor: widen(model._posterior(rows, flat=True), factor)
        curves[name] = {}
        for size in (1, 10, 100, 1000, 20_000):
            estimate = model.log_likelihood(x, size, proposal=proposal, generator=generator())
            curves[name][str(size)] = float(estimate.value.mean())
        row(f"importance sampling, {name}", estimate.value, num_samples=size, median_ess=float(estimate.ess.median()))
    estimate = log_likelihood_ais(model.requires_grad_(False), x, 8, num_steps=run.steps, generator=generator())
    row("annealing from the prior", estimate.value, num_samples=8, num_steps=run.steps,
        median_ess=float(estimate.ess.median()))
    for num_steps in (run.steps // 10, run.steps // 3):
        estimate = annealed(model, x, num_steps, seed=run.seed)
        row("annealing from q", estimate.value, num_samples=8, num_steps=num_steps,
            median_ess=float(estimate.ess.median()))
    last = rows[-1]["method"]
    return {"num_images": len(x), "rows": rows, "curves": curves,
            "annealing minus importance sampling": paired(values[last], values["importance sampling, q as it is"]),
            "annealing from q minus from the prior": paired(values[last], values["annealing from the prior"])}


def draw_once(means, seed):
    """Binary images from grey ones, the same at every call."""
    return (torch.rand(means.shape, generator=torch.Generator().manual_seed(seed)) < means).float()


def dynamic(run, name, families):
    """Families of q on a set whose training images are drawn anew at each use; valid and test are drawn once."""
    data, valid, test = (run.load(name, split, binarization="dynamic") for split in ("train", "valid", "test"))
    part = (balanced(test.y, 50) if len(np.unique(test.y)) == 10
            else np.sort(np.random.default_rng(0).permutation(len(test.x))[:500]))
    return mnist_figures(run, tensor(data.x), draw_once(tensor(valid.x), 1), draw_once(tensor(test.x), 2), part,
                         families, binarize=True)[0]


@experiment("02", "mnist-dynamic", paper=PAPER, table="beyond Table 1", hours=1.2, steps=50_000, rows=rows_by_model)
def mnist_dynamic(run):
    """The same model on MNIST drawn anew at each use."""
    return dynamic(run, "mnist", ("diagonal", "rank1"))


@experiment("02", "omniglot", paper=PAPER, table="beyond Table 1", hours=0.5, steps=17_300, rows=rows_by_model)
def omniglot(run):
    """The same model on OMNIGLOT (28x28 by area averaging: another set than the one in most papers)."""
    return dynamic(run, "omniglot", ("diagonal", "rank1"))


def gaussian_figures(run, data, valid, test, latent, families):
    """Families of q with a Gaussian likelihood of learned variance; densities, in nats, of dequantised pixels."""
    noise = lambda x, seed: (255 * x + torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))) / 256
    data, valid, test = (noise(x, seed) for seed, x in enumerate((data, valid, test)))
    part = np.sort(np.random.default_rng(0).permutation(len(test))[:500])
    return mnist_figures(run, data, valid, test, part, families, latent=(latent,), likelihood="gaussian",
                         num_samples=1000)[0]


@experiment("02", "fashion-gaussian", paper=PAPER, table="beyond Table 1", hours=0.5, steps=25_000, rows=rows_by_model)
def fashion_gaussian(run):
    """Fashion-MNIST as grey images under a Gaussian likelihood: log-densities, not comparable with binary images."""
    data, valid, test = (tensor(run.load("fashion_mnist", split).x) for split in ("train", "valid", "test"))
    return gaussian_figures(run, data, valid, test, 50, ("diagonal", "rank1"))


@experiment("02", "cifar-patches", paper=PAPER, table="samples of 8x8 patches", hours=0.3, steps=25_000,
            rows=rows_by_model)
def cifar_patches(run):
    """8x8 colour patches of CIFAR-10 images (the 3,000 that ship), Gaussian likelihood, four families."""
    def patches(split, num, seed):
        images = tensor(run.load("cifar10_subset", split).x).reshape(-1, 3, 32, 32)
        rng = np.random.default_rng(seed)
        rows, top, left = rng.integers(len(images), size=num), rng.integers(25, size=num), rng.integers(25, size=num)
        windows = images.unfold(2, 8, 1).unfold(3, 8, 1)  # [N, 3, 25, 25, 8, 8]
        return windows[rows, :, top, left].reshape(num, -1)
    return gaussian_figures(run, patches("train", 50_000, 0), patches("valid", 2000, 1), patches("test", 2000, 2), 20,
                            ("diagonal", "rank1", "rank_r", "full"))


# ---------------------------------------------------------------- two latents
@experiment("02", "latent-map", paper=PAPER, table="two-dimensional embedding", hours=0.4, steps=15_000)
def latent_map(run):
    """MNIST with two latents and with fifty: likelihood, and the error of a nearest-neighbour rule on the latents."""
    data, valid, test = (run.load("binarized_mnist", split) for split in ("train", "valid", "test"))
    train_x, test_x, part = tensor(data.x), tensor(test.x), balanced(test.y, 30)
    some, rows = balanced(data.y, 1000), balanced(test.y, 200)
    labels = torch.as_tensor(np.asarray(data.y))[some], torch.as_tensor(np.asarray(test.y))[rows]
    error = lambda a, b: knn_error(a, labels[0], b, labels[1])
    figures, arrays = {"pixels": {"knn_error": error(train_x[some], test_x[rows])}}, None
    for name, latent in (("two", 2), ("many", 50)):
        torch.manual_seed(run.seed)
        model = DLGM(784, latent, ((200, 200),), recognition_dims=(200,))
        figures[name] = {"latents": latent, **train(run, name, model, train_x, tensor(valid.x))}
        figures[name].update(judge(model, test_x, part, 1000, seed=run.seed)[0])
        with torch.no_grad():
            q = [model.posterior(x) for x in (train_x[some], test_x[rows])]
            figures[name]["knn_error"] = error(q[0].mean, q[1].mean)
            generator = torch.Generator().manual_seed(run.seed)
            draws = [one.rsample(generator=generator) for one in q]
            figures[name]["knn_error_of_draws"] = error(*draws)
            if latent == 2:
                side = torch.special.ndtri(torch.linspace(0.025, 0.975, 14, dtype=torch.float64)).float()
                grid = torch.stack(torch.meshgrid(-side, side, indexing="ij"), -1).flip(-1).reshape(-1, 2)
                tiles = (255 * model.observation(grid).mean).round().to(torch.uint8)
                arrays = {"z": draws[1].half(), "y": labels[1].to(torch.uint8), "tiles": tiles}
    return figures, arrays


# ---------------------------------------------------------------- missing pixels
def masks(shape, side, rng):
    """Observed entries [N, side^2] for 60 % and 80 % missing at random, and for an occluded square of half the side."""
    hidden = np.zeros((side, side), bool)
    hidden[side // 4: side // 4 + side // 2, side // 4: side // 4 + side // 2] = True
    return {"60 % missing": rng.random(shape) >= 0.6, "80 % missing": rng.random(shape) >= 0.8,
            "square": np.broadcast_to(~hidden.ravel(), shape)}


def nearest(train_x, x, observed, num=10):
    """Mean pixel of the nearest training images in the observed pixels, with half an image of either kind added."""
    distance = (x * observed) @ (1 - train_x).T + ((1 - x) * observed) @ train_x.T
    rows = distance.topk(num, largest=False).indices
    return (train_x[rows].sum(1) + 0.5) / (num + 1)


def missing_scores(prediction, x, observed):
    """Log-loss in nats and share of wrong pixels, per missing pixel."""
    missing, p = ~observed, prediction.clamp(1e-3, 1 - 1e-3)
    loss = -(x * p.log() + (1 - x) * torch.log1p(-p))
    return {"log_loss": float(loss[missing].mean()), "error": float(((p > 0.5) != (x > 0.5))[missing].float().mean())}


@torch.no_grad()
def imputation_figures(models, train_x, test, side, num_sweeps, seed, num_latents):
    mean = ((train_x.sum(0) + 0.5) / (len(train_x) + 1)).expand_as(test)
    factors = fit_factor_analysis(train_x.double() + 0.0, num_latents, min_noise_var=1e-2).model
    figures = {}
    for name, observed in masks(test.shape, side, np.random.default_rng(seed)).items():
        observed = torch.as_tensor(np.array(observed))
        predictions = {"pixel mean": mean, "ten nearest neighbours": nearest(train_x, test, observed.float()),
                       "factor analysis": factors.impute(test.double(), observed)[0].float()}
        acceptance = {}
        for family, model in models.items():
            for method in ("gibbs", "metropolis"):
                result = impute(model, test, observed, num_sweeps=num_sweeps, method=method, num_chains=4,
                                generator=torch.Generator().manual_seed(seed))
                predictions[f"{family}, {method}"] = result.mean
                acceptance[f"{family}, {method}"] = float(result.acceptance.mean())
        figures[name] = {key: {**missing_scores(p, test, observed),
                               **({"acceptance": acceptance[key]} if key in acceptance else {})}
                         for key, p in predictions.items()}
    return figures


def rows_of_imputation(runs):
    """One row a method: log-loss and error under each mask, mean over seeds, and the log-loss's standard error."""
    first, rows = runs[0]["figures"]["masks"], []
    for method in next(iter(first.values())):
        row = {"method": method, "seeds": len(runs)}
        for mask in first:
            cells = [run["figures"]["masks"][mask][method] for run in runs]
            losses = [c["log_loss"] for c in cells]
            row[f"{mask}: log-loss"] = float(np.mean(losses))
            row[f"{mask}: error"] = float(np.mean([c["error"] for c in cells]))
            row[f"{mask}: se"] = float(np.std(losses, ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else None
            row["acceptance"] = cells[0].get("acceptance")
        rows.append(row)
    return rows


@experiment("02", "imputation", paper=PAPER, table="imputation", hours=0.1, steps=3000, rows=rows_of_imputation)
def imputation(run):
    """Missing pixels of the 8x8 digits under three masks: two chains against simple predictors."""
    train_x, valid, test = digit_parts(run)
    models = {}
    for name, recognition in (("diagonal", "diagonal"), ("rank-1", "rank1")):
        torch.manual_seed(run.seed)
        models[name] = digit_model(recognition=recognition)
        train(run, name, models[name], train_x, valid, lr=3e-3)
    return {"num_test": len(test), "num_sweeps": 200, "num_chains": 4,
            "masks": imputation_figures(models, train_x, test, 8, 200, run.seed, 5)}


@experiment("02", "imputation-mnist", paper=PAPER, table="imputation", hours=0.2, steps=50_000,
            rows=rows_of_imputation)
def imputation_mnist(run):
    """The same on 200 fixed-binarised MNIST test images, with the model that `02 mnist` trains (its checkpoint)."""
    data, test = run.load("binarized_mnist", "train"), run.load("binarized_mnist", "test")
    rows = balanced(test.y, 20)
    train_x, test_x = tensor(data.x), tensor(test.x)[rows]
    figures = imputation_figures({"diagonal": shipped()}, train_x, test_x, 28, 200, run.seed, 30)
    return {"num_test": len(test_x), "num_sweeps": 200, "num_chains": 4, "masks": figures}


# ---------------------------------------------------------------- how good are the samples?
def two_sample_error(a, b, seed):
    """Error of a classifier that tells rows of a from rows of b, on rows that it never saw: 0.5 means it cannot.

    A network with one hidden layer of 100 units is trained on half of either set, its epoch chosen on a quarter and
    its error taken on the last quarter (the classifier two-sample test of Lopez-Paz and Oquab, 2017).
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = (rows[torch.randperm(len(rows), generator=generator)] for rows in (a, b))
    size = min(len(a), len(b)) // 4
    part = lambda i, j: (torch.cat([a[i * size:j * size], b[i * size:j * size]]),
                         torch.cat([torch.zeros((j - i) * size), torch.ones((j - i) * size)]))
    (x, y), valid, test = part(0, 2), part(2, 3), part(3, 4)
    net = mlp([x.shape[1], 100, 1], generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-4)
    wrong = lambda rows, labels: float(((net(rows)[:, 0] > 0) != (labels > 0.5)).float().mean())
    best, answer = 1.0, 0.5
    for _ in range(20):
        for batch in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(net(x[batch])[:, 0], y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            if wrong(*valid) < best:
                best, answer = wrong(*valid), wrong(*test)
    return answer


def rows_of_samples(runs):
    """One row a source of images: mean over seeds, and its standard error."""
    rows = []
    for source in runs[0]["figures"]["sources"]:
        cells = [run["figures"]["sources"][source] for run in runs]
        row = {"source": source, "seeds": len(runs)}
        for key in cells[0]:
            values = [cell[key] for cell in cells if cell[key] is not None]
            row[key] = float(np.mean(values)) if values else None
            row[f"{key}_se"] = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        rows.append(row)
    return rows


@experiment("02", "samples", paper=PAPER, table="samples", hours=0.1, rows=rows_of_samples)
def samples(run):
    """Samples of the MNIST model against test images: a classifier that tells them apart, nearest neighbours."""
    train_x, test = (tensor(run.load("binarized_mnist", split).x) for split in ("train", "test"))
    num, generator = 5000, torch.Generator().manual_seed(run.seed)
    pick = lambda rows, num=num: rows[torch.randperm(len(rows), generator=generator)[:num]]
    bernoulli = lambda p: (torch.rand(p.shape, generator=generator) < p).float()
    real, other = pick(test, 2 * num).split(num)
    factors = fit_factor_analysis(train_x.double(), 50, min_noise_var=1e-2).model
    with torch.no_grad():
        z = torch.randn(num, 50, generator=generator, dtype=torch.float64)
        sources = {"other test images": other, "training images": pick(train_x),
                   "the model, K = 200": shipped().sample(num, generator=generator),
                   "factor analysis, K = 50, mean as probability": bernoulli(factors.decoder(z).clamp(0, 1).float()),
                   "independent pixels": bernoulli(train_x.mean(0).expand(num, -1))}
    # Distance to the nearest of 20,000 training images, in pixels: a model that copies its data lies below test images.
    reference = train_x[torch.randperm(len(train_x), generator=generator)[:20_000]]
    distance = lambda rows: torch.cat([(part @ (1 - reference).T + (1 - part) @ reference.T).amin(1)
                                       for part in rows.split(500)])
    figures = {name: {"two_sample_error": two_sample_error(rows, real, run.seed),
                      "nearest": None if name == "training images" else float(distance(rows).mean())}
               for name, rows in sources.items()}
    return {"num_images": num, "sources": figures}


# ---------------------------------------------------------------- the cast
@experiment("02", "portrait", paper=PAPER, table="true against approximate posterior", hours=0.05, steps=2000)
def portrait(run):
    """Recognition networks for the cast's fixed decoders, trained on data drawn from them: bounds and gaps."""
    figures, arrays = {}, {}
    for name in ("line", "wave", "digits2"):
        member = cast.load(name)
        size = member.num_latents
        torch.manual_seed(run.seed)
        model = DLGM(member.x.shape[1], size, 64, recognition="diagonal" if size == 1 else "full",
                     recognition_dims=(64, 64), decoder=member.decoder, noise_var=member.noise_var,
                     likelihood="gaussian", freeze_decoder=True).double()
        # The stranger is far from anything that the model draws: there the network extrapolates.
        data = model.sample(20_000, generator=torch.Generator().manual_seed(run.seed))
        settings = run.fit_options(name)
        fit(model, data, batch_size=200, lr=stepped_rate(settings["num_steps"], 2e-3), num_samples=4, **settings)
        gaps = inference_gaps(model, member.x, log_likelihood=member.log_evidence)
        figures[name] = {key: getattr(gaps, key).tolist() for key in ("bound", "approximation", "amortization")}
        arrays |= {f"{name}/{key}": p.half() for key, p in model.recognition.state_dict().items()}
    return figures, arrays
