"""Chapter 6's experiments: short-run inference on images, against networks that infer, at equal updates and time.

Pixels lie in [0, 1], the likelihood is Gaussian with a fixed variance, means leave through a sigmoid. Errors are
squares per pixel. The quality of samples is judged by a classifier trained here on the same training images: the
Frechet distance between its hidden features of samples and of test images. That is not the FID of the literature, whose
network and data are others, and the two must not be compared.
"""

import time

import numpy as np
import torch
from sklearn.datasets import make_moons
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

from dlgm_tutorial import cast
from dlgm_tutorial.evaluation import knn_error
from dlgm_tutorial.networks import mlp
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.short_run_mcmc import (
    BottomUpEncoder,
    LayeredVAE,
    MultiLayerGenerator,
    ShortRunModel,
    inpaint,
    jacobian_bound,
    largest_curvature,
    propagate_on_grid,
    semi_implicit_bounds,
    short_run_loss,
    tune_step_size,
)
from dlgm_tutorial.training import fit

__all__ = []

PAPER = "Nijkamp, Pang, Han, Zhou, Zhu and Wu 2020"


def draws(seed):
    return torch.Generator().manual_seed(1000 + seed)


def some_rows(x, num, seed=0):
    """A fixed random choice of num rows."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(x))[:num]))


# ---------------------------------------------------------------- the judge of samples
def train_judge(x, y, seed, num_steps=800):
    """A classifier D-256-64-C; its 64 hidden units are the features of the distance. None where there are no labels."""
    if y is None:
        return None
    torch.manual_seed(seed)
    net = nn.Sequential(*mlp([x.shape[1], 256, 64]), nn.ReLU(), nn.Linear(64, int(y.max()) + 1))
    loss = lambda model, batch, noise: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    fit(net, (x, y), loss=loss, num_steps=num_steps, batch_size=min(100, len(x)), lr=1e-3, seed=seed, device="cpu")
    return net.requires_grad_(False)


def frechet(a, b):
    """Squared Frechet distance between normals with the moments of the features a [N, H] and b [M, H]."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.mT), torch.cov(b.mT)
    eigenvalues, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + torch.trace(cov_a) + torch.trace(cov_b) - 2 * cross)


@torch.no_grad()
def sample_quality(judge, images, test):
    """Distance of the images' features from the test images', and what the classifier says of them."""
    if judge is None:
        return {}
    probability = judge(images).softmax(-1)
    mean = probability.mean(0)
    return {"feature_distance": frechet(judge[:-1](images), judge[:-1](test)),
            "confidence": float(probability.amax(-1).mean()),
            "class_entropy": float(-(mean * mean.clamp_min(1e-12).log()).sum())}


# ---------------------------------------------------------------- what each layer does
@torch.no_grad()
def layer_roles(model, train_x, train_y, test_x, test_y, judge, seed, *, num=400, num_samples=8):
    """For each layer: how much of x its redrawing changes, and what its latents know of the class.

    alone: variance of E[x | z] from this layer given none of the others (first-order index); total: expected variance
    left when all others are held; both as shares. knn_error: of the class from the layer's own noises (mean of several
    end points). label_changes: share of test images whose class, to the classifier, changes when this layer is redrawn.
    """
    generator, g = model.generator, draws(seed)
    one, other = (generator.split(generator.sample_latents(num, generator=g)) for _ in range(2))
    x = generator.mean(one)
    variance = x.var(0).sum()
    if judge is not None:
        features = [generator.split(model.infer(rows, num_samples=num_samples, generator=g).mean(0))
                    for rows in (train_x, test_x)]
        z = generator.split(model.infer(test_x, generator=g)[0])
        before = judge(generator.mean(z)).argmax(-1)
    fresh = generator.split(generator.sample_latents(len(test_x), generator=g))
    roles = []
    for layer in range(model.num_layers):
        put = lambda base, new, layer=layer: tuple(n if i == layer else b for i, (b, n) in
                                                   enumerate(zip(base, new, strict=True)))
        only, rest = generator.mean(put(other, one)), generator.mean(put(one, other))
        roles.append({"latents": model.latent_dims[layer],
                      "alone": float(((x - x.mean(0)) * (only - only.mean(0))).mean(0).sum() / variance),
                      "total": float(0.5 * (x - rest).square().mean(0).sum() / variance)})
        if judge is not None:
            after = judge(generator.mean(put(z, fresh))).argmax(-1)
            roles[-1].update(knn_error=knn_error(features[0][layer], train_y, features[1][layer], test_y),
                             label_changes=float((after != before).float().mean()))
    return roles


# ---------------------------------------------------------------- occlusions, anomalies
@torch.no_grad()
def occlusion_figures(model, x, image_shape, seed, num_chains=8):
    """Squared error per hidden pixel: a hidden square of half the side, and half of all pixels at random."""
    _, height, width = image_shape
    planes = x.shape[1] // (height * width)
    square = torch.ones(height, width, dtype=torch.bool)
    square[height // 4: height // 4 + height // 2, width // 4: width // 4 + width // 2] = False
    masks = {"square": square.flatten().repeat(planes).expand_as(x),
             "half at random": torch.rand(x.shape, generator=draws(seed)) < 0.5}
    figures = {}
    for name, observed in masks.items():
        found = inpaint(model, x, observed, num_chains=num_chains, generator=draws(seed))
        error = lambda guess, observed=observed: float((guess - x)[~observed].square().mean())
        figures[name] = {"mean_of_chains": error(found.mean), "one_chain": error(found.chains[0]),
                         "pixel_mean": error(x.mean(0).expand_as(x)), "scale": float(found.scale[~observed].mean())}
    return figures


# ---------------------------------------------------------------- training and judging
@torch.no_grad()
def curvature_at_ends(model, x, seed):
    """The 0.9 quantile, over images x, of the largest curvature of the log posterior at the chains' end points."""
    z = model.infer(x, generator=draws(seed))
    return float(largest_curvature(lambda z: model.log_joint(x, z), z, num_iterations=15,
                                   generator=draws(seed)).quantile(0.9))


def stepped_rate(num_steps, lr):
    """Learning rate that falls to 0.3 and to 0.1 of lr after 60 % and 85 % of the steps."""
    return lambda step: lr * (1.0 if step < 0.6 * num_steps else 0.3 if step < 0.85 * num_steps else 0.1)


def train(run, part, model, data, held_out, *, batch_size, lr=1e-3, cap=None, num_steps=None, eval_every=1,
          num_curvature=0):
    """Fit, following the squared error on held_out images along the way: figures with the curve against time.

    cap: after each epoch the step size becomes min(cap, sqrt(2 / lambda)), where single steps stop folding space, by
    `curvature_at_ends`; None leaves it as it is. num_curvature: images on which the curvature is followed.
    """
    settings = run.fit_options(part)
    num_steps = settings["num_steps"] = num_steps or settings["num_steps"]
    per_epoch = len(data) // batch_size

    def after_epoch(model, epoch):
        figures, now = {}, (epoch + 1) % eval_every == 0
        if cap or now and num_curvature:
            figures["curvature"] = curvature_at_ends(model, data[:num_curvature or 100], run.seed)
        if cap:
            model.set_step_size(min(cap, (2 / figures["curvature"]) ** 0.5))
            figures["step_size"] = float(model.step_size[0])
        if now:
            again = model.reconstruct(held_out, generator=draws(run.seed))
            figures["error"] = float((held_out - again).square().mean())
        return figures

    persistent = getattr(model, "start", None) == "persistent"
    loss = short_run_loss if isinstance(model, ShortRunModel) else None
    started = time.process_time()
    history = fit(model, (data, torch.arange(len(data))) if persistent else data, batch_size=batch_size,
                  lr=stepped_rate(num_steps, lr), loss=loss, after_epoch=after_epoch,
                  record_every=max(1, min(5 * per_epoch, num_steps)), **settings)
    marks = [r for r in history if "error" in r]
    figures = {"N": len(data), "batch_size": batch_size, "updates": history[-1]["step"],
               "epochs": round(history[-1]["step"] / per_epoch, 2), "train_objective": history[-1]["bound"],
               "parameters": sum(p.numel() for p in model.parameters()),
               "generator_parameters": sum(p.numel() for p in model.generator.parameters()),
               "seconds": history[-1]["seconds"], "processor_seconds": time.process_time() - started,
               "curve": {"updates": [r["step"] for r in marks], "seconds": [round(r["seconds"], 2) for r in marks],
                         "error": [round(r["error"], 6) for r in marks]}}
    for name in ("step_size", "curvature"):
        if marks and name in marks[0]:
            figures["curve"][name] = [round(r[name], 5) for r in marks]
    if isinstance(model, ShortRunModel):
        figures["final_step_size"] = float(model.step_size[0])
    return figures


@torch.no_grad()
def judged(model, test, judge, seed, *, num_samples=1000, num_ais=20, ais_steps=150):
    """Reconstruction of test images, quality of samples, and log p(x) by annealing for a few of them."""
    g = draws(seed)
    figures = {"test_error": float((test - model.reconstruct(test, generator=g)).square().mean()),
               "test_error_8": float((test - model.reconstruct(test, num_samples=8, generator=g)).square().mean()),
               "num_test": len(test)}
    images = model.generator.mean(model.generator.sample_latents(num_samples, generator=g))
    figures.update(sample_quality(judge, images, test))
    if num_ais:
        few = test[:num_ais]
        start = time.process_time()
        found = ShortRunModel(model.generator).log_likelihood(few, 8, num_steps=ais_steps, generator=g)
        figures.update(log_likelihood=float(found.value.mean()),
                       log_likelihood_se=float(found.value.std() / num_ais**0.5),
                       ais_error=float(found.standard_error.mean()), num_ais=num_ais,
                       ais_seconds=time.process_time() - start)
    return figures


def pictures(model, test, image_shape, seed, num=8):
    """Small stacks of images, uint8: test, reconstructions, samples, occluded and completed, one layer redrawn."""
    g, byte = draws(seed), lambda v: (255 * v.clamp(0, 1)).round().to(torch.uint8)
    generator = model.generator
    x = test[:num]
    arrays = {"test": byte(x), "reconstructed": byte(model.reconstruct(x, generator=g))}
    with torch.no_grad():
        arrays["samples"] = byte(generator.mean(generator.sample_latents(40, generator=g)))
        z = generator.split(model.infer(x, generator=g)[0])
        for layer in range(model.num_layers):
            rows = []
            for _ in range(6):
                fresh = generator.split(generator.sample_latents(num, generator=g))
                rows.append(generator.mean(tuple(fresh[i] if i == layer else z[i] for i in range(model.num_layers))))
            arrays[f"layer{layer + 1}"] = byte(torch.stack(rows))
    if isinstance(model, ShortRunModel):
        _, height, width = image_shape
        hidden = torch.zeros(height, width, dtype=torch.bool)
        hidden[height // 4: height // 4 + height // 2, width // 4: width // 4 + width // 2] = True
        observed = (~hidden).flatten().repeat(x.shape[1] // hidden.numel())
        found = inpaint(model, x, observed, num_chains=8, generator=g)
        arrays |= {"occluded": byte(torch.where(observed, x, torch.zeros_like(x))), "completed": byte(found.mean),
                   "completed_scale": byte(found.scale)}
    return arrays


def rows_by_method(runs):
    """One row a method: means over the seeds, with the standard error of the test error between them."""
    rows = []
    for name, first in runs[0]["figures"].items():
        if not isinstance(first, dict) or "test_error" not in first:
            continue
        parts = [run["figures"][name] for run in runs if name in run["figures"]]
        mean = lambda key, parts=parts: float(np.mean([p[key] for p in parts])) if key in parts[0] else None
        errors = [p["test_error"] for p in parts]
        rows.append({"method": name,
                     **{key: first.get(key) for key in ("N", "epochs", "updates", "generator_parameters")},
                     "seeds": len(parts), **{key: mean(key) for key in (
                         "seconds", "test_error", "test_error_8", "feature_distance", "log_likelihood",
                         "final_step_size")},
                     "standard_error": float(np.std(errors, ddof=1) / len(errors) ** 0.5) if len(errors) > 1 else None})
    return rows


# ---------------------------------------------------------------- MNIST and its like, one and three layers
WIDTHS = {1: ((30,), ((128, 128),)), 3: ((30, 20, 10), ((128, 128), (48,), (48,)))}
NOISE_VAR = 0.09


def grey_generator(num_layers, data_dim=784):
    dims, hidden = WIDTHS[num_layers]
    return MultiLayerGenerator(data_dim, dims, hidden, noise_var=NOISE_VAR, output="sigmoid")


def image_figures(run, name, make, models, *, num_train=None, batch_size=250, cap=None, lr=2e-3, arrays=False,
                  eval_every=2, light=False):
    """Train models {name: (wrap a generator, share of the run's steps)} on one data set, and judge each."""
    train_set, test_set = run.load(name, "train+valid"), run.load(name, "test")
    part = lambda y, rows: None if y is None else y[rows]  # the small photographs have no labels
    data, labels = train_set.x[:num_train], part(train_set.y, slice(num_train))
    rows = some_rows(test_set.x, 1000)
    test, test_y = test_set.x[rows], part(test_set.y, rows)
    judge = train_judge(train_set.x[:20_000], part(train_set.y, slice(20_000)), run.seed)
    figures = {"judge": {"training_images": sample_quality(judge, data[:1000], test)}}
    if judge is not None:
        with torch.no_grad():
            figures["judge"]["accuracy"] = float((judge(test).argmax(-1) == test_y).float().mean())
    kept = None
    for title, (wrap, share) in models.items():
        if share is None:
            share = time_ratio(make, wrap, data, batch_size)
        torch.manual_seed(run.seed)
        model = wrap(make(), len(data))
        word = "".join(c if c.isalnum() else "-" for c in title)
        chain = isinstance(model, ShortRunModel)
        figures[title] = train(run, word, model, data, test[:300], batch_size=batch_size, lr=lr, eval_every=eval_every,
                               cap=cap if chain else None, num_steps=max(1, round(share * run.steps)),
                               num_curvature=100 if chain and not light else 0)
        size, num = ((8, 50), 500) if light else ((20, 100), 1000)
        figures[title].update(judged(model, test[:num], judge, run.seed, num_ais=size[0], ais_steps=size[1]))
        figures[title]["layers"] = layer_roles(model, data[:num], part(labels, slice(num)), test[:500],
                                               part(test_y, slice(500)), judge, run.seed, num_samples=2 if light else 4)
        if chain:
            figures[title]["occlusion"] = occlusion_figures(model, test[:100 if light else 200],
                                                            test_set.image_shape, run.seed)
        if arrays and kept is None:
            kept = pictures(model, test, test_set.image_shape, run.seed)
            kept |= {name.replace(".", "/"): p.half() for name, p in model.generator.state_dict().items()}
    return figures, kept


def langevin(**options):
    def make(generator, num):
        num_data = num if options.get("start") == "persistent" else None
        return ShortRunModel(generator, num_data=num_data, **{"num_steps": 20, "step_size": 0.1, **options})
    return make


def vae(**options):
    return lambda generator, num: LayeredVAE(generator, **options)


def time_ratio(make, wrap, data, batch_size, num=40):
    """How many updates of another model take the processor time of one update by twenty steps from the prior."""
    seconds = []
    for model, loss in ((langevin()(make(), len(data)), short_run_loss), (wrap(make(), len(data)), None)):
        for steps in (5, num):  # the first five warm up
            start = time.process_time()
            fit(model, data, loss=loss, num_steps=steps, batch_size=batch_size, lr=1e-4, seed=0, device="cpu")
            seconds.append(time.process_time() - start)
    return max(1.0, seconds[1] / seconds[3])


SHORT_RUN = {"short run, 20 steps": (langevin(), 1.0)}
EQUAL_UPDATES, EQUAL_TIME = {"VAE, equal updates": (vae(), 1.0)}, {"VAE, equal time": (vae(), None)}
FROM_ENCODER = {"short run from an encoder, 5 steps": (langevin(start="encoder", num_steps=5), 1.0)}


@experiment("06", "mnist-one", paper=PAPER, table="reconstruction and synthesis", hours=0.3, steps=4800,
            rows=rows_by_method)
def mnist_one(run):
    """One latent layer, all of MNIST, 20 steps, 20 epochs; the step size kept below where steps fold."""
    return image_figures(run, "mnist", lambda: grey_generator(1), SHORT_RUN, arrays=True, cap=0.1)


@experiment("06", "mnist-three", paper=PAPER, table="reconstruction and synthesis", hours=0.3, steps=4800,
            rows=rows_by_method)
def mnist_three(run):
    """Three latent layers, all of MNIST, 20 steps, 20 epochs; the step size kept below where steps fold."""
    return image_figures(run, "mnist", lambda: grey_generator(3), SHORT_RUN, arrays=True, cap=0.1)


@experiment("06", "mnist-one-fixed", paper=PAPER, table="reconstruction and synthesis", hours=0.3, steps=4800,
            rows=rows_by_method)
def mnist_one_fixed(run):
    """One latent layer, all of MNIST, 20 steps of a fixed size, 20 epochs."""
    return image_figures(run, "mnist", lambda: grey_generator(1), SHORT_RUN, arrays=True)


@experiment("06", "mnist-three-fixed", paper=PAPER, table="reconstruction and synthesis", hours=0.3, steps=4800,
            rows=rows_by_method)
def mnist_three_fixed(run):
    """Three latent layers, all of MNIST, 20 steps of a fixed size, 20 epochs."""
    return image_figures(run, "mnist", lambda: grey_generator(3), SHORT_RUN, arrays=True)


@experiment("06", "mnist-one-vae", paper=PAPER, table="against a VAE", hours=0.05, steps=4800, rows=rows_by_method)
def mnist_one_vae(run):
    """The plain VAE on the one-layer generator, at equal updates."""
    return image_figures(run, "mnist", lambda: grey_generator(1), EQUAL_UPDATES)


@experiment("06", "mnist-three-vae", paper=PAPER, table="against a VAE", hours=0.05, steps=4800, rows=rows_by_method)
def mnist_three_vae(run):
    """A VAE whose encoder climbs from layer to layer, on the three-layer generator, at equal updates."""
    return image_figures(run, "mnist", lambda: grey_generator(3), EQUAL_UPDATES)


@experiment("06", "mnist-one-opponents", paper=PAPER, table="against a VAE", hours=0.4, steps=4800,
            rows=rows_by_method)
def mnist_one_opponents(run):
    """One layer: a chain that starts at an encoder, and the VAE given the time of the chain from the prior."""
    return image_figures(run, "mnist", lambda: grey_generator(1), FROM_ENCODER | EQUAL_TIME, eval_every=5)


@experiment("06", "mnist-three-opponents", paper=PAPER, table="against a ladder", hours=0.4, steps=4800,
            rows=rows_by_method)
def mnist_three_opponents(run):
    """The same on the three-layer generator; the encoders climb from layer to layer."""
    return image_figures(run, "mnist", lambda: grey_generator(3), FROM_ENCODER | EQUAL_TIME, eval_every=5)


def conv_generator(image_shape, channels=8):
    side = image_shape[1] // 2
    sizes = (side, *[side // 2] * 4)
    return MultiLayerGenerator.convolutional(image_shape, (16, 12, 10, 8, 8), channels, noise_var=NOISE_VAR,
                                             sizes=sizes)


@experiment("06", "mnist-conv", paper=PAPER, table="five layers", hours=0.4, steps=2000, rows=rows_by_method)
def mnist_conv(run):
    """A convolutional generator with five latent layers on 10,000 MNIST images, 20 steps, 20 epochs."""
    return image_figures(run, "mnist", lambda: conv_generator((1, 28, 28)), SHORT_RUN, num_train=10_000,
                         batch_size=100, arrays=True, light=True, eval_every=4)


@experiment("06", "mnist-conv-vae", paper=PAPER, table="five layers, against a ladder", hours=0.4, steps=2000,
            rows=rows_by_method)
def mnist_conv_vae(run):
    """The VAE whose encoder climbs on the same convolutional generator, at equal updates and at equal time."""
    return image_figures(run, "mnist", lambda: conv_generator((1, 28, 28)), EQUAL_UPDATES | EQUAL_TIME,
                         num_train=10_000, batch_size=100, light=True, eval_every=20)


@experiment("06", "fashion", paper=PAPER, table="reconstruction and synthesis", hours=0.5, steps=4800,
            rows=rows_by_method)
def fashion(run):
    """The three-layer generator on Fashion-MNIST, short run and VAE at equal updates and at equal time."""
    return image_figures(run, "fashion_mnist", lambda: grey_generator(3), SHORT_RUN | EQUAL_UPDATES | EQUAL_TIME,
                         arrays=True, eval_every=4)


@experiment("06", "cifar", paper=PAPER, table="reconstruction and synthesis", hours=0.5, steps=1000,
            rows=rows_by_method)
def cifar(run):
    """The five-layer convolutional generator on the CIFAR-10 subset (32 x 32 x 3), short run and VAE."""
    return image_figures(run, "cifar10_subset", lambda: conv_generator((3, 32, 32), 12),
                         SHORT_RUN | EQUAL_UPDATES | EQUAL_TIME, batch_size=50, light=True, arrays=True, eval_every=4)


# ---------------------------------------------------------------- an outsider
@experiment("06", "anomaly", paper=PAPER, table="anomaly detection", hours=0.3, steps=1500)
def anomaly(run):
    """One MNIST digit held out of 10,000 training images, scored by log p(x, z_T); short run and VAE."""
    train_set, test_set = run.load("mnist", "train"), run.load("mnist", "test")
    rows = some_rows(test_set.x, 2000)
    test, outside = test_set.x[rows], test_set.y[rows]
    figures = {}
    for digit in (1, 4, 9):
        data = train_set.x[train_set.y != digit][:10_000]
        truth = (outside == digit).numpy()
        for name, wrap in (("short run", langevin()), ("VAE", vae())):
            torch.manual_seed(run.seed)
            model = wrap(grey_generator(1), len(data))
            fitted = train(run, f"{name.replace(' ', '-')}-{digit}", model, data, test[:100], batch_size=100,
                           eval_every=5)
            with torch.no_grad():
                z = model.infer(test, num_samples=8, generator=draws(run.seed))
                scores = {"log_joint": -model.log_joint(test, z).mean(0),
                          "error": (test - model.generator.mean(z)).square().mean(-1).mean(0)}
            figures[f"{name}, without {digit}"] = {
                **{key: {"AUROC": float(roc_auc_score(truth, s)), "AUPRC": float(average_precision_score(truth, s))}
                   for key, s in scores.items()},
                "share": float(truth.mean()), "N": fitted["N"], "updates": fitted["updates"]}
    return figures


# ---------------------------------------------------------------- the digits
def digits_generator(num_layers):
    dims = {1: (10,), 2: (8, 4), 3: (8, 4, 2), 5: (8, 4, 4, 2, 2)}[num_layers]
    return MultiLayerGenerator(64, dims, ((64,),) + ((24,),) * (num_layers - 1), noise_var=0.04, output="sigmoid")


def small_vae():
    return lambda generator, num: LayeredVAE(generator, hidden_dims=64)


def small_encoder(**options):
    def make(generator, num):
        return ShortRunModel(generator, start="encoder", encoder=BottomUpEncoder(64, generator.latent_dims, 64),
                             step_size=0.1, **options)
    return make


DIGITS = {**{f"L = {n}, short run": (n, langevin(), 1.0) for n in (1, 2, 3, 5)},
          **{f"L = {n}, VAE, equal updates": (n, small_vae(), 1.0) for n in (1, 3)},
          **{f"L = {n}, VAE, equal time": (n, small_vae(), None) for n in (1, 3)},
          "L = 3, from an encoder, 5 steps": (3, small_encoder(num_steps=5), 1.0),
          "L = 3, persistent, 5 steps": (3, langevin(start="persistent", num_steps=5), 1.0),
          "L = 3, without noise": (3, langevin(stochastic=False), 1.0),
          "L = 3, accept or reject": (3, langevin(kernel="mala"), 1.0),
          "L = 3, HMC, 4 x 5": (3, langevin(kernel="hmc", num_steps=4, num_leapfrog=5), 1.0)}
SWEEP = [(5, 0.1), (50, 0.1), (20, 0.03), (20, 0.05), (20, 0.15)]


def digit_data(run):
    train_set, test_set = run.load("digits", "train"), run.load("digits", "test")
    return train_set.x, train_set.y, test_set.x, test_set.y


def digit_model(run, part, make, num_layers, data, test, judge, num_steps):
    torch.manual_seed(run.seed)
    model = make(digits_generator(num_layers), len(data))
    figures = train(run, "".join(c if c.isalnum() else "-" for c in part), model, data, test, batch_size=100, lr=3e-3,
                    num_steps=num_steps, eval_every=max(1, num_steps // 120))
    figures.update(judged(model, test, judge, run.seed, num_ais=40, ais_steps=100))
    return model, figures


@experiment("06", "digits", paper=PAPER, table="layers and inference, small", hours=0.2, steps=1200,
            rows=rows_by_method)
def digits(run):
    """Layers, kernels, starts and opponents on the 8x8 digits, at equal updates and at equal time."""
    data, labels, test, test_y = digit_data(run)
    judge = train_judge(data, labels, run.seed, 600)
    figures = {"judge": {"training_images": sample_quality(judge, data, test)}}
    kept = None
    for name, (num_layers, make, share) in DIGITS.items():
        steps = run.steps
        if share is None:  # as many updates as the chain's time allows
            chain, other = (figures[f"L = {num_layers}, {what}"] for what in ("short run", "VAE, equal updates"))
            ratio = (chain["processor_seconds"] / chain["updates"]) / (other["processor_seconds"] / other["updates"])
            steps = round(run.steps * max(1.0, ratio))
        model, figures[name] = digit_model(run, name, make, num_layers, data, test, judge, steps)
        figures[name]["layers"] = layer_roles(model, data, labels, test, test_y, judge, run.seed)
        if isinstance(model, ShortRunModel):
            figures[name]["occlusion"] = occlusion_figures(model, test[:200], (1, 8, 8), run.seed)
        if name == "L = 3, short run":
            kept = pictures(model, test, (1, 8, 8), run.seed)
            kept |= {key.replace(".", "/"): p.half() for key, p in model.generator.state_dict().items()}
    return figures, kept


def tuned(model, x, **options):
    """The step size that `tune_step_size` picks, None where every candidate folds the space or blows up."""
    try:
        return tune_step_size(model, x, **options).step_size
    except ValueError as error:
        if "every one of" not in str(error):
            raise
        return None


@experiment("06", "digits-steps", paper=PAPER, table="influence of K and s", hours=0.1, steps=1200, rows=rows_by_method)
def digits_steps(run):
    """Number and size of the steps on the 8x8 digits, three layers; the paper's objective tunes the last one."""
    data, labels, test, _ = digit_data(run)
    judge = train_judge(data, labels, run.seed, 600)
    figures = {}
    for num, size in SWEEP:
        name = f"T = {num}, s = {size}"
        _, figures[name] = digit_model(run, name, langevin(num_steps=num, step_size=size), 3, data, test, judge,
                                       run.steps)
        figures[name].update(num_steps=num, step_size=size)
    torch.manual_seed(run.seed)
    model = ShortRunModel(digits_generator(3), num_steps=20, step_size=0.1)
    chosen = []
    grid = torch.tensor([0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16])
    settings = run.fit_options("tuned")
    rounds = 6
    total = 0.0
    for k in range(1, rounds + 1):  # the paper re-tunes every few epochs
        settings |= {"num_steps": round(run.steps * k / rounds), "checkpoint": None}
        part = {**settings, "num_steps": round(run.steps / rounds), "seed": run.seed + 100 * k}
        history = fit(model, data, batch_size=100, lr=3e-3 if k < 5 else 1e-3, loss=short_run_loss, **part)
        total += history[-1]["seconds"]
        values = {}
        for objective in ("jacobian", "semi_implicit"):
            values[objective] = tuned(model, data[:16], num_steps=20, objective=objective, grid=grid, num_chains=16,
                                      generator=draws(k))
        if values["jacobian"] is not None:  # else the old one stays
            model.set_step_size(values["jacobian"])
        chosen.append(values)
    figures["T = 20, s tuned by the paper's objective"] = {
        "N": len(data), "updates": run.steps, "epochs": round(run.steps / (len(data) // 100), 2), "seconds": total,
        "generator_parameters": sum(p.numel() for p in model.generator.parameters()),
        "chosen": {key: [c[key] for c in chosen] for key in chosen[0]}, "final_step_size": float(model.step_size[0]),
        **judged(model, test, judge, run.seed, num_ais=40, ais_steps=100)}
    return figures


# ---------------------------------------------------------------- the step size while a model learns
ROUNDS, FIXED = 6, (0.01, 0.03, 0.05, 0.07, 0.09)


@experiment("06", "tuning", paper=PAPER, table="choice of the step size", hours=0.2, steps=900)
def tuning(run):
    """The paper's objective on the 8x8 digits, two layers: s tuned by grid and by gradient; its value at fixed s."""
    data, _, test, _ = digit_data(run)
    rows, figures = data[:6], {}
    lr = lambda k: 3e-3 if k < 0.75 * ROUNDS else 1e-3
    for name in ("grid", "gradient", *FIXED):
        torch.manual_seed(run.seed)
        model = ShortRunModel(digits_generator(2), num_steps=20, step_size=0.07 if isinstance(name, str) else name)
        chosen, values, folds, lost = [], [], [], []
        for k in range(ROUNDS + 1):
            if k:
                fit(model, data, batch_size=100, lr=lr(k), loss=short_run_loss, num_steps=round(run.steps / ROUNDS),
                    seed=run.seed + 100 * k, device="cpu")
            log_density = lambda z, model=model: model.log_joint(rows, z)
            if isinstance(name, str):
                how = {"grid": np.geomspace(0.01, 0.16, 9).tolist()} if name == "grid" else {
                    "method": "gradient", "start": float(model.step_size[0]), "num_iterations": 6, "lr": 0.15}
                found = tuned(model, rows, num_chains=8, generator=draws(run.seed), **how)
                lost.append(found is None)
                model.set_step_size(found or float(model.step_size[0]))
            z0 = torch.randn(8, len(rows), model.num_latents, generator=draws(run.seed))
            found = jacobian_bound(log_density, z0, float(model.step_size[0]), 20, generator=draws(run.seed + 1))
            chosen.append(float(model.step_size[0]))
            values.append(-float(found.value.mean()))
            folds.append(float(found.folds.float().mean()))
        again = model.reconstruct(test, generator=draws(run.seed))
        title = f"s by {name}" if isinstance(name, str) else f"s = {name}"
        figures[title] = {"updates": [round(run.steps * k / ROUNDS) for k in range(ROUNDS + 1)], "step_size": chosen,
                          "objective": values, "folds": folds, "lost": lost,
                          "test_error": float((test - again).square().mean())}
    return figures


# ---------------------------------------------------------------- two moons: a learned decoder, judged exactly
def moons(seed, noise=0.1):
    """2,000 training and 2,000 test points of two interleaved half circles, with mean 0 and variance 1 on average."""
    x, _ = make_moons(4000, noise=noise, random_state=seed)
    x = torch.tensor((x - [0.5, 0.25]) / [0.87, 0.5], dtype=torch.float32)
    return x[:2000], x[2000:]


@torch.no_grad()
def log_likelihood_on_plane(generator, x, num=241, reach=5.0):
    """Exact log p(x) [B] for two latents, by a sum over the grid of num x num points on [-reach, reach]^2."""
    line = torch.linspace(-reach, reach, num, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    mean = generator.mean(z.to(x.dtype)).double()
    log_prior = -0.5 * (z.square() + np.log(2 * np.pi)).sum(-1) + 2 * float((line[1] - line[0]).log())
    at_grid = log_prior - 0.5 * mean.square().sum(-1) / generator.noise_var
    parts = [torch.logsumexp(rows @ mean.mT / generator.noise_var + at_grid, -1) for rows in x.double().split(100)]
    own = x.double().square().sum(-1) / generator.noise_var + x.shape[1] * np.log(2 * np.pi * generator.noise_var)
    return torch.cat(parts) - 0.5 * own


def moons_encoder(generator):
    return BottomUpEncoder(2, generator.latent_dims, ((48, 48),), "tanh")


def moons_vae(generator, num):
    return LayeredVAE(generator, encoder=moons_encoder(generator))


def moons_from_encoder(num_steps):
    return lambda generator, num: ShortRunModel(generator, start="encoder", encoder=moons_encoder(generator),
                                                kernel="mala", num_steps=num_steps, step_size=0.1)


MOONS = {"VAE": moons_vae, "short run, T = 5, s = 0.10": langevin(num_steps=5),
         **{f"short run, T = 20, s = {s:.2f}": langevin(step_size=s) for s in (0.03, 0.05, 0.1, 0.15)},
         "short run, T = 100, s = 0.10": langevin(num_steps=100),
         "short run, T = 20, s = 0.10, without noise": langevin(stochastic=False),
         "short run, T = 20, s = 0.10, accept or reject": langevin(kernel="mala"),
         "persistent, T = 5, s = 0.10": langevin(start="persistent", num_steps=5),
         "persistent, T = 20, s = 0.10": langevin(start="persistent"),
         "from an encoder, accept or reject, T = 5": moons_from_encoder(5),
         "from an encoder, accept or reject, T = 20": moons_from_encoder(20)}
BLURRED = {"VAE": moons_vae, **{f"short run, T = 20, s = {s:.1f}": langevin(step_size=s) for s in (0.1, 0.2, 0.3)},
           "persistent, T = 5, s = 0.1": langevin(start="persistent", num_steps=5)}


def moons_rows(runs):
    """One row a method: exact test log-likelihood, its standard deviation over the seeds, processor seconds."""
    rows = []
    for name in (key for key, f in runs[0]["figures"].items() if isinstance(f, dict)):
        parts = [run["figures"][name] for run in runs if name in run["figures"]]
        values = [p["test_log_likelihood"] for p in parts]
        rows.append({"method": name, "seeds": len(parts), "test_log_likelihood": float(np.mean(values)),
                     "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                     **{key: float(np.mean([p[key] for p in parts])) for key in (
                         "train_log_likelihood", "processor_seconds")}, "updates": parts[0]["updates"]})
    return rows


def moons_figures(run, methods, noise_std, data_noise):
    x, test = moons(run.seed, data_noise)
    figures, arrays = {}, {"test": test[:800]}
    for name, make in methods.items():
        torch.manual_seed(run.seed)
        model = make(MultiLayerGenerator(decoder=mlp([2, 48, 48, 2], "tanh"), noise_var=noise_std**2), len(x))
        chains = isinstance(model, ShortRunModel)
        settings = run.fit_options("".join(c if c.isalnum() else "-" for c in name))
        start = time.process_time()
        fit(model, (x, torch.arange(len(x))) if chains and model.start == "persistent" else x, batch_size=128,
            lr=lambda step: 3e-3 * 0.5 * (1 + np.cos(np.pi * step / run.steps)),
            loss=short_run_loss if chains else None, record_every=1000, **settings)
        figures[name] = {"updates": run.steps, "processor_seconds": time.process_time() - start,
                         "test_log_likelihood": float(log_likelihood_on_plane(model.generator, test).mean()),
                         "train_log_likelihood": float(log_likelihood_on_plane(model.generator, x[:200]).mean())}
        arrays[name.replace("/", " ")] = model.sample(800, generator=draws(run.seed))
    return figures, arrays


@experiment("06", "two-moons", paper=PAPER, table="learned decoder, exact likelihood", hours=0.5, steps=6000,
            rows=moons_rows)
def two_moons(run):
    """Two latents, two pixels, sigma = 0.15: the likelihood that each way of inferring learns, by quadrature."""
    return moons_figures(run, MOONS, 0.15, 0.1)


@experiment("06", "two-moons-blurred", paper=PAPER, table="learned decoder, exact likelihood", hours=0.2, steps=4000,
            rows=moons_rows)
def two_moons_blurred(run):
    """The same with points blurred by 0.3 and sigma = 0.4: a posterior not much narrower than the prior."""
    return moons_figures(run, BLURRED, 0.4, 0.3)


# ---------------------------------------------------------------- the cast
@experiment("06", "portrait", paper=PAPER, table="true against approximate posterior", hours=0.05)
def portrait(run):
    """Short runs on the cast's fixed decoders: the law of the end point, exact or enclosed, at the best step size."""
    figures, arrays = {}, {}
    for name in ("line", "wave"):
        member = cast.load(name)
        log_density = lambda z, member=member: member.log_joint(member.x, z)
        law = lambda s, num=20, log_density=log_density: propagate_on_grid(log_density, s, num, low=-7.0, high=7.0,
                                                                          num_points=1001)
        sizes = [0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.28, 0.36, 0.46]
        laws = [law(s) for s in sizes]
        # Where mass has left the grid, the chain is unstable: no divergence to speak of.
        kl = torch.stack([torch.where((one.mass - 1).abs() < 0.01, one.kl, 1e6) for one in laws])  # [sizes, 4]
        shared = int(kl.mean(1).argmin())
        own = kl.amin(0)
        figures[name] = {"sizes": sizes, "kl": kl.tolist(), "step_size": sizes[shared], "num_steps": 20,
                         "bound": (member.log_evidence - kl[shared]).tolist(), "approximation": own.tolist(),
                         "amortization": (kl[shared] - own).tolist(),
                         "kl_at_100_steps": law(sizes[shared], 100).kl.tolist()}
        best = laws[shared]
        arrays |= {f"{name}/points": best.points.float(), f"{name}/density": best.density.float()}
    member = cast.load("digits2")
    model = ShortRunModel(decoder=member.decoder, noise_var=member.noise_var, freeze_decoder=True, num_steps=20)
    sizes, bounds = [0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.28], []
    for s in sizes:
        z0 = torch.randn(600, 4, 2, generator=draws(run.seed), dtype=torch.float64)
        found = semi_implicit_bounds(lambda z: model.log_joint(member.x, z), z0, s, 20, generator=draws(run.seed + 1))
        bounds.append(torch.stack([found.lower, found.upper]))
    bounds = torch.stack(bounds)  # [sizes, 2, 4]: a sandwich of each ELBO
    shared = int(bounds[:, 0].mean(1).argmax())
    model.set_step_size(sizes[shared])
    z = model.infer(member.x, num_samples=500, generator=draws(run.seed))
    figures["digits2"] = {"sizes": sizes, "lower": bounds[:, 0].tolist(), "upper": bounds[:, 1].tolist(),
                          "step_size": sizes[shared], "num_steps": 20, "bound": bounds[shared, 0].tolist(),
                          "bound_upper": bounds[shared, 1].tolist(),
                          "approximation": (member.log_evidence - bounds[:, 0].amax(0)).tolist(),
                          "amortization": (bounds[:, 0].amax(0) - bounds[shared, 0]).tolist()}
    arrays["digits2/samples"] = z.float()
    return figures, arrays
