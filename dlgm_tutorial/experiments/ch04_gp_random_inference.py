"""Chapter 4's experiments: the random encoder against its controls and against inference that goes on at test time."""

import time
from pathlib import Path

import numpy as np
import torch

from dlgm_tutorial import cast
from dlgm_tutorial.analytic_em import exact_log_likelihood
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.evaluation import (
    fit_posterior,
    inference_gaps,
    log_likelihood_ais,
    log_likelihood_is,
    rank_correlation,
    reconstruction_error,
)
from dlgm_tutorial.experiments.ch02_stochastic_backprop import (
    balanced,
    digit_parts,
    draw_once,
    keep_best,
    paired,
    stepped_rate,
    tensor,
)
from dlgm_tutorial.gp_random_inference import (
    AmortizedVAE,
    AutoregressiveFlowVAE,
    AveragedPosterior,
    ExactGPEncoder,
    FlowNormal,
    HouseholderVAE,
    IterativeInferenceVAE,
    RandomInferenceVAE,
    RecursiveMixtureVAE,
    SemiAmortizedVAE,
    VariationalLaplaceVAE,
    instance_optimum,
    rbf_kernel,
)
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.training import fit

__all__ = []

PAPER = "Kim and Pavlovic 2021 (reconstruction)"


# ---------------------------------------------------------------- the methods, in one notation
def importance_weighted(model, batch, noise):
    """Minus the importance-weighted bound; the noise [S, B, K] gives the number of draws."""
    return -model.importance_bound(batch, num_samples=len(noise), noise=noise)


def stage_by_stage(model, batch, noise):
    """Minus the objective of a mixture's stages."""
    return -model.stagewise_objective(batch, noise=noise)


def own_bound(model, batch, noise):
    """Semi-amortised without the adjoint: the encoder climbs its own bound."""
    return -model.separate_objective(batch, teach="bound", noise=noise)


def distilled(model, batch, noise):
    """Semi-amortised without the adjoint: the encoder is taught the refined posterior."""
    return -model.separate_objective(batch, teach="refined", noise=noise)


METHODS = {  # title, constructor (num_data is for the random encoder alone), options of fit
    "vae": ("VAE", lambda *a, num_data, **k: AmortizedVAE(*a, **k), {}),
    "iwae": ("VAE, importance-weighted bound (10 draws)", lambda *a, num_data, **k: AmortizedVAE(*a, **k),
             {"loss": importance_weighted, "num_samples": 10}),
    "heads": ("VAE with deterministic heads", lambda *a, **k: RandomInferenceVAE(*a, covariance="none", **k), {}),
    "random": ("random encoder", lambda *a, **k: RandomInferenceVAE(*a, **k), {}),
    "random-30": ("random encoder, beta = 30", lambda *a, **k: RandomInferenceVAE(*a, beta=30.0, **k), {}),
    "semi": ("semi-amortised, 4 steps", lambda *a, num_data, **k: SemiAmortizedVAE(*a, **k), {}),
    "semi-own": ("semi-amortised, encoder by its own bound", lambda *a, num_data, **k: SemiAmortizedVAE(*a, **k),
                 {"loss": own_bound}),
    "semi-distilled": ("semi-amortised, encoder by distillation", lambda *a, num_data, **k: SemiAmortizedVAE(*a, **k),
                       {"loss": distilled}),
    "semi-prior": ("20 steps of 0.03 from the prior, no encoder", lambda *a, num_data, **k: SemiAmortizedVAE(
        *a, start="prior", num_steps=20, step_size=0.03, adjoint="first_order", **k), {}),
    "iterative": ("iterative amortised, 4 steps", lambda *a, num_data, **k: IterativeInferenceVAE(*a, **k), {}),
    "laplace": ("variational Laplace, 4 steps", lambda *a, num_data, **k: VariationalLaplaceVAE(*a, **k), {}),
    "mixture": ("mixture of 2 encoders", lambda *a, num_data, **k: RecursiveMixtureVAE(*a, **k), {}),
    "recursive": ("mixture of 2 encoders, stage by stage", lambda *a, num_data, **k: RecursiveMixtureVAE(*a, **k),
                  {"loss": stage_by_stage}),
    "householder": ("Householder flow, 4 reflections", lambda *a, num_data, **k: HouseholderVAE(*a, **k), {}),
    "flow": ("autoregressive flow, 2 steps", lambda *a, num_data, **k: AutoregressiveFlowVAE(*a, **k), {}),
}


def generator(seed):
    return torch.Generator().manual_seed(1000 + seed)


def train(run, part, method, model, data, valid, *, batch_size, lr=1e-3, binarize=False):
    """Fit with a stepped rate, keep the epoch with the best validation bound; figures of the training."""
    checkpoint = run.checkpoint(part)
    after_epoch, restore = keep_best(valid, checkpoint and Path(checkpoint).with_suffix(".best.pt"), run.seed)
    settings = run.fit_options(part)
    rate = stepped_rate(settings["num_steps"], lr)
    groups = model.parameter_groups(rate) if hasattr(model, "parameter_groups") else None
    history = fit(model, data, batch_size=batch_size, lr=rate, after_epoch=after_epoch, parameter_groups=groups,
                  record_every=10 * (len(data) // batch_size), binarize=binarize, **settings, **METHODS[method][2])
    epoch, value = restore(model)
    shares = {}
    if method == "recursive":
        shares = {"shares": model.fit_shares(torch.as_tensor(data)[:500], generator=generator(run.seed))}
    per_epoch = len(data) // batch_size
    return {**shares, "N": len(data), "batch_size": batch_size, "epochs": round(history[-1]["step"] / per_epoch, 1),
            "updates": history[-1]["step"], "best_epoch": epoch, "valid_bound": value,
            "train_bound": history[-1]["bound"], "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_per_epoch": history[-1]["seconds"] / history[-1]["step"] * per_epoch}


# ---------------------------------------------------------------- judging them all alike
def is_normal(q):
    return hasattr(q, "loc") and hasattr(q, "kl_to_standard")


class Judged:
    """A model seen through what it answers at test time: for the refined ones, with the steps' noise fixed."""

    def __init__(self, model, seed):
        self.model, self.seed = model, seed
        self.drawn = isinstance(model, (SemiAmortizedVAE, IterativeInferenceVAE))

    def posterior(self, x):
        return self.model.posterior(x, generator=generator(self.seed)) if self.drawn else self.model.posterior(x)

    def normal(self, x):
        """The posterior, and for the random encoder the one of its mean encoder: what a gap is measured from."""
        q = self.posterior(x)
        return q.plug_in() if isinstance(q, AveragedPosterior) else q

    def log_joint(self, x, z):
        return self.model.log_joint(x, z)

    def reconstruct(self, x, **options):
        """The decoder's mean at the posterior's mean: [B, D]."""
        return self.model.observation(self.posterior(x).mean).mean

    @torch.no_grad()
    def bounds(self, x, num_samples=8, chunk=500):
        """Bounds by name, [B] each: "bound" is that of the posterior used; for random encoders also its two others."""
        found = {}
        for rows in x.split(chunk):
            q, g = self.posterior(rows), generator(self.seed + 1)
            z = q.rsample((num_samples,), generator=g)
            parts = {"bound": (self.log_joint(rows, z) - q.log_prob(z)).mean(0)}
            if isinstance(q, AveragedPosterior):
                parts["mean_bound"] = self.model.mean_bound(rows, num_samples=num_samples, generator=g)
                parts["average_bound"] = self.model.average_bound(rows, num_samples=num_samples, generator=g)
            for name, value in parts.items():
                found.setdefault(name, []).append(value)
        return {name: torch.cat(value) for name, value in found.items()}

    def proposals(self):
        """Proposals for importance sampling, by name: its own, and for normals the same one a fifth wider."""
        wider = lambda x: DiagonalNormal(self.normal(x).loc, self.normal(x).log_var + np.log(1.2))
        named = {"own": self.posterior}
        with torch.no_grad():
            q = self.posterior(torch.zeros(2, self.model.data_dim).to(next(self.model.parameters())))
        if isinstance(q, AveragedPosterior):
            named |= {"mean encoder": self.normal, "wider": wider}
        elif isinstance(q, DiagonalNormal):
            named["wider"] = wider
        return named


def summary(values, name):
    """Mean and standard error over images."""
    return {name: float(values.mean()), f"{name}_se": float(values.std() / len(values) ** 0.5)}


def latency(judged, x, rounds=15):
    """Median processor seconds of inference on one batch: the posterior, and for a flow one draw with its density."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        q = judged.posterior(x)
        if isinstance(q, FlowNormal):
            q.rsample_with_log_prob()
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def annealed(model, x, importance, *, seed, num_steps, num_chains=16):
    """Evidence of images x by annealing from the prior, which no proposal favours, beside importance sampling's [B]."""
    found = log_likelihood_ais(model, x, num_chains, num_steps=num_steps, num_latents=model.latent_dim,
                               generator=generator(seed))
    return {"num_ais": len(x), "ais_chains": num_chains, "ais_temperatures": num_steps, **summary(found.value, "ais"),
            "iw_same": float(importance.mean()), **summary(found.value - importance, "ais_minus_iw")}


def judge(model, test, rows, gap_rows, *, seed, train_x=None, sizes=(100, 2000), num_steps=150, num_ais=50,
          num_temperatures=200):
    """All figures of one trained model on test rows, and per-image arrays on gap_rows; num_ais of rows are annealed."""
    model.eval()
    judged = Judged(model, seed)
    bounds = judged.bounds(test)
    figures = {"num_test": len(test), "num_evaluated": len(rows), "num_gaps": len(gap_rows)}
    for name, value in bounds.items():
        figures |= summary(value, f"test_{name}")
    if train_x is not None:
        figures |= {f"train_{name}": float(value.mean()) for name, value in judged.bounds(train_x).items()}
    figures["importance"] = {}
    for name, proposal in judged.proposals().items():
        for size in sizes:
            found = log_likelihood_is(judged, test[rows], size, proposal=proposal, generator=generator(seed))
            figures["importance"][f"{name}, {size}"] = summary(found.value, "log_likelihood") | {
                "median_ess": float(found.ess.median())}
            if name == "own":
                figures[f"iw_{size}"] = float(found.value.mean())
                evidence, error = found.value, found.standard_error
    some = slice(None, None, max(1, len(rows) // num_ais))
    figures |= annealed(model, test[rows[some]][:num_ais], evidence[some][:num_ais], seed=seed,
                        num_steps=num_temperatures)
    where = torch.from_numpy(np.searchsorted(rows, gap_rows))
    x, evidence = test[gap_rows], evidence[where]
    figures["evidence_error"] = float(error[where].mean())
    arrays = {"row": gap_rows, "log_likelihood": evidence, "bound": bounds["bound"][gap_rows]}
    arrays["total_gap"] = evidence - arrays["bound"]
    with torch.no_grad():
        q = judged.normal(x[:2])
    if is_normal(q):
        gaps = inference_gaps(judged, x, log_likelihood=evidence, posterior=judged.normal,
                              num_samples=32 if model.latent_dim <= 15 else 128, num_steps=num_steps, num_judged=256,
                              chunk=100, seed=seed)
        arrays |= {"amortization": gaps.amortization, "approximation": gaps.approximation,
                   "normal_gap": gaps.kl_to_posterior}
        figures |= summary(gaps.amortization, "amortization") | summary(gaps.approximation, "approximation")
    figures |= summary(arrays["total_gap"], "total_gap")
    figures["seconds_per_batch"] = latency(judged, test[:128])
    figures["rank_correlation"] = correlations(model, judged, x, arrays, test)
    return figures, arrays


def signals(model, judged, x, centre):
    """What could tell a hard image from an easy one without looking at its gap: [B] each, higher is harder."""
    with torch.no_grad():
        found = {"minus bound": -judged.bounds(x)["bound"],
                 "reconstruction error": reconstruction_error(judged, x),
                 "distance to the mean": (x - centre).norm(dim=-1), "norm": x.norm(dim=-1)}
        if isinstance(model, RandomInferenceVAE) and model.encoder.covariance != "none":
            found |= {f"uncertainty, {kind}": model.uncertainty(x, kind) for kind in ("nats", "variance", "entropy")}
    return found


def correlations(model, judged, x, arrays, test):
    """Rank correlation of every signal with the gap, with its standard error over images."""
    target = arrays.get("amortization", arrays["total_gap"])
    found = {}
    for name, value in signals(model, judged, x, test.mean(0)).items():
        for what, gap in (("amortization gap", target), ("total gap", arrays["total_gap"])):
            got = rank_correlation(value, gap)
            found.setdefault(name, {})[what] = {"value": got.value, "standard_error": got.standard_error}
    return found


def sorted_images(model, x, num=16):
    """The images with the lowest and the highest uncertainty and bound, as bytes, for the page."""
    order = model.uncertainty(x).argsort()
    with torch.no_grad():
        by_bound = model.mean_bound(x, num_samples=8, generator=generator(0)).argsort(descending=True)
    to_bytes = lambda rows: (255 * x[rows]).round().to(torch.uint8)
    return {"easy": to_bytes(order[:num]), "hard": to_bytes(order[-num:]),
            "high_bound": to_bytes(by_bound[:num]), "low_bound": to_bytes(by_bound[-num:])}


def rows_by_method(runs):
    """One row a method: means over seeds, standard errors over seeds."""
    rows = []
    for name in [k for k, v in runs[0]["figures"].items() if isinstance(v, dict) and "test_bound" in v]:
        parts = [run["figures"][name] for run in runs if name in run["figures"]]
        row = {"method": name, "seeds": len(parts)}
        for key in ("N", "epochs", "updates", "parameters", "num_test", "num_evaluated", "num_gaps", "num_ais"):
            row[key] = parts[0].get(key)
        for key in ("train_bound", "test_bound", "test_mean_bound", "test_average_bound", "iw_100", "iw_2000",
                    "total_gap", "amortization", "approximation", "seconds_per_batch", "seconds_per_epoch",
                    "evidence_error", "ais", "iw_same", "ais_minus_iw"):
            values = [p[key] for p in parts if key in p]
            row[key] = float(np.mean(values)) if values else None
            row[f"{key}_se"] = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        for key in ("amortization", "ais_minus_iw"):
            row[f"{key}_image_se"] = parts[0].get(f"{key}_se")
        for signal in ("minus bound", "reconstruction error", "distance to the mean", "uncertainty, nats",
                       "uncertainty, variance", "uncertainty, entropy"):
            ranks = [p["rank_correlation"] for p in parts if signal in p["rank_correlation"]]
            values = [rank[signal]["amortization gap"] for rank in ranks]
            row[signal] = float(np.mean([v["value"] for v in values])) if values else None
            row[f"{signal}_se"] = float(np.mean([v["standard_error"] for v in values])) if values else None
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the digits: all methods
@experiment("04", "digits", paper=PAPER, table="all methods, small", hours=0.3, steps=2000, rows=rows_by_method)
def digits(run):
    """All methods on 8x8 binarised digits: same decoder and trunk, same updates; bounds, gaps, ranks."""
    data, valid, test = digit_parts(run)
    rows, figures, values, gaps = np.arange(len(test)), {}, {}, {}
    for method, (title, make, _) in METHODS.items():
        torch.manual_seed(run.seed)
        model = make(64, 5, (100, 100), num_data=len(data))
        figures[title] = train(run, method, method, model, data, valid, batch_size=100, lr=2e-3)
        judged, arrays = judge(model, test, rows, rows[::2], seed=run.seed, train_x=data, num_steps=100)
        figures[title] |= judged
        values[method], gaps[method] = arrays["log_likelihood"], arrays["total_gap"]
        if method == "random":
            pictures = sorted_images(model, test)
    figures["differences"] = {f"{METHODS[a][0]} minus {METHODS[b][0]}": {
        "log_likelihood": paired(values[a], values[b]), "total_gap": paired(gaps[a], gaps[b])}
        for a, b in (("random", "heads"), ("random", "vae"), ("heads", "vae"), ("semi", "vae"))}
    return figures, pictures


STEP_SIZES = {"4 steps of 0.02": {}, "4 steps of 0.1": {"step_size": 0.1}, "4 steps of 0.3": {"step_size": 0.3},
              "4 preconditioned steps of 0.3": {"step_size": 0.3, "precondition": True},
              "12 steps of 0.1": {"num_steps": 12, "step_size": 0.1}}


@experiment("04", "digits-steps", paper="Kim, Wiseman, Miller, Sontag and Rush 2018", table="step size", hours=0.1,
            steps=2000, rows=rows_by_method)
def digits_steps(run):
    """Semi-amortised inference on the digits with five ways to step: the step size decides what is gained."""
    data, valid, test = digit_parts(run)
    rows, figures = np.arange(len(test)), {}
    for number, (title, options) in enumerate(STEP_SIZES.items()):
        torch.manual_seed(run.seed)
        model = SemiAmortizedVAE(64, 5, (100, 100), **options)
        try:
            figures[title] = train(run, f"steps{number}", "semi", model, data, valid, batch_size=100, lr=2e-3)
        except ValueError as error:
            if "diverges" not in str(error):
                raise
            figures[title] = {"diverged": str(error)}
            continue
        figures[title] |= judge(model, test, rows, rows[::2], seed=run.seed, train_x=data, num_steps=100)[0]
        lost = model.refine(test, generator=generator(run.seed)).diverged
        figures[title]["share_made_worse"] = float(lost.double().mean())
    return figures


def rows_of_steps(runs):
    """One row a way to step: the rise of the bound over the encoder's, and the share of images made worse."""
    rows = []
    for name, first in runs[0]["figures"].items():
        values = [run["figures"][name]["rise"] for run in runs]
        rows.append({**{key: first[key] for key in ("steps", "step_size", "draws")}, "seeds": len(runs),
                     "rise": float(np.mean(values)),
                     "rise_se": float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
                     "worse": float(np.mean([run["figures"][name]["worse"] for run in runs]))})
    return rows


@experiment("04", "digits-refine", paper="Kim, Wiseman, Miller, Sontag and Rush 2018", table="draws a step", hours=0.02,
            steps=2000, rows=rows_of_steps)
def digits_refine(run):
    """A plain VAE's encoder refined on the test digits: steps, step size and draws a step, judged on fresh noise."""
    data, valid, test = digit_parts(run)
    torch.manual_seed(run.seed)
    plain = AmortizedVAE(64, 5, (100, 100))
    train(run, "plain", "vae", plain, data, valid, batch_size=100, lr=2e-3)
    fresh = torch.randn(256, len(test), 5, generator=generator(run.seed))
    with torch.no_grad():
        before, figures = plain.bound(test, noise=fresh), {}
    for num_steps in (4, 20):
        for size in (0.02, 0.1, 0.3):
            for draws in (1, 16):
                model = SemiAmortizedVAE(64, 5, (100, 100), num_steps=num_steps, step_size=size)
                model.load_state_dict(plain.state_dict())
                q = model.posterior(test, num_samples=draws, generator=generator(run.seed + 1))
                with torch.no_grad():
                    z = q.rsample((len(fresh),), noise=fresh)
                    after = plain.observation(z).log_prob(test).mean(0) - q.kl_to_standard()
                figures[f"{num_steps} steps of {size}, {draws} draws"] = {
                    "steps": num_steps, "step_size": size, "draws": draws, **summary(after - before, "rise"),
                    "worse": float((after < before).double().mean())}
    return figures


SWAPPED = ("vae", "heads", "random", "random-30", "semi", "mixture", "recursive", "householder", "flow", "laplace")


@experiment("04", "digits-swap", paper=PAPER, table="proposals swapped on one decoder", hours=0.3, steps=2000,
            rows=rows_by_method)
def digits_swap(run):
    """One decoder, trained by the plain VAE, then frozen; every method's inference trained for it: only q differs."""
    data, valid, test = digit_parts(run)
    torch.manual_seed(run.seed)
    first = AmortizedVAE(64, 5, (100, 100))
    train(run, "decoder", "vae", first, data, valid, batch_size=100, lr=2e-3)
    rows, figures = np.arange(len(test)), {}
    for method in SWAPPED:
        torch.manual_seed(run.seed + 1)
        title, make, _ = METHODS[method]
        model = make(64, 5, (100, 100), num_data=len(data), decoder=first.decoder, freeze_decoder=True)
        figures[title] = train(run, method, method, model, data, valid, batch_size=100, lr=2e-3)
        figures[title] |= judge(model, test, rows, rows[::2], seed=run.seed, train_x=data, num_steps=100,
                                sizes=(1, 10, 100, 2000))[0]
    return figures


# ---------------------------------------------------------------- real images: one cell a method
EPOCHS, BATCH = 30, 128


def image_parts(run, name):
    """train, valid, test as tensors, labels of the test rows (or None), and options of the model."""
    if name == "mnist":
        parts = [run.load("binarized_mnist", split) for split in ("train", "valid", "test")]
        return [tensor(p.x) for p in parts], parts[2].y, {}
    if name == "cifar10":
        parts = [run.load("cifar10_subset", split) for split in ("train", "valid", "test")]
        noise = lambda x, seed: (255 * x + torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))) / 256
        return ([noise(tensor(p.x), seed) for seed, p in enumerate(parts)], parts[2].y,
                {"likelihood": "gaussian", "noise_var": 0.02})
    stored = {"omniglot": "omniglot", "fashion": "fashion_mnist"}[name]
    parts = [run.load(stored, split, binarization="dynamic") for split in ("train", "valid", "test")]
    return [draw_once(tensor(p.x), seed) for seed, p in enumerate(parts)], parts[2].y, {}


def image_cell(name, latent, method):
    """The function of one cell: train a method on a set of images, judge it on its test set."""
    title, make, _ = METHODS[method]

    def cell(run):
        (data, valid, test), labels, options = image_parts(run, name)
        classes = 0 if labels is None else len(np.unique(labels))
        some = lambda num: (balanced(labels, num // classes) if 1 < classes <= 10
                            else np.sort(np.random.default_rng(0).permutation(len(test))[:num]))
        torch.manual_seed(run.seed)
        model = make(data.shape[1], latent, (200, 200), num_data=len(data), **options)
        figures = train(run, method, method, model, data, valid[:2000], batch_size=BATCH)
        rows = some(min(500, len(test)))
        figures |= judge(model, test, rows, rows[:: max(1, len(rows) // 250)], seed=run.seed, train_x=data[:2000])[0]
        arrays = sorted_images(model, test[:2000]) if method == "random" else None
        return {title: figures}, arrays
    cell.__doc__ = f"{title} on {name} with {latent} latents."
    cell.__name__ = f"{name}_{latent}_{method}".replace("-", "_")
    return cell


STEPS = {"mnist": 390 * EPOCHS, "omniglot": 135 * EPOCHS, "fashion": 429 * EPOCHS, "cifar10": 3000}
CELLS = [(name, latent, method) for name in STEPS for latent in (10, 50)
         for method in ("vae", "heads", "random", "semi")]
CELLS += [("mnist", 10, method) for method in ("iwae", "iterative", "mixture", "householder", "recursive", "flow")]
for _name, _latent, _method in CELLS:
    _hours = {"semi": 0.2, "iterative": 0.15, "iwae": 0.2}.get(_method, 0.06)
    experiment("04", f"{_name}-{_latent}-{_method}", paper=PAPER, table="test likelihood, protocol of chapter 4",
               hours=_hours, steps=STEPS[_name], rows=rows_by_method)(image_cell(_name, _latent, _method))


# ---------------------------------------------------------------- exact gaps: two latents
def rows_of_ranks(runs):
    """One row a signal: its rank correlation with the exact amortisation gap, over seeds."""
    rows = []
    for num in runs[0]["figures"]:
        for place in ("model", "digits"):
            first = runs[0]["figures"][num][place]["rank_correlation"]
            for signal in first:
                values = [run["figures"][num][place]["rank_correlation"][signal]["value"] for run in runs]
                spread = (float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1
                          else first[signal]["standard_error"])
                rows.append({"N": runs[0]["figures"][num]["N"], "test data": place, "signal": signal,
                             "seeds": len(values), "rank_correlation": float(np.mean(values)),
                             "standard_error": spread})
    return rows


@experiment("04", "difficulty", paper=PAPER, table="uncertainty against the exact gap", hours=0.2, steps=2000,
            rows=rows_of_ranks)
def difficulty(run):
    """The cast's digits2 decoder, frozen: does the uncertainty rank the data by their exact gap? Two training sizes."""
    member = cast.digits2()
    figures, arrays = {}, {}
    images = run.load("digits", "test")
    real = torch.as_tensor(images.x).double()[:200]
    for num in (200, 2000):
        torch.manual_seed(run.seed)
        model = RandomInferenceVAE(64, 2, (64, 64), num_data=num, decoder=member.decoder, noise_var=member.noise_var,
                                   likelihood="gaussian", freeze_decoder=True).double()
        data = model.sample(num, generator=torch.Generator().manual_seed(run.seed))
        fresh = model.sample(200, generator=torch.Generator().manual_seed(100 + run.seed))
        settings = run.fit_options(f"n{num}")
        rate = stepped_rate(settings["num_steps"], 2e-3)
        fit(model, data, batch_size=100, lr=rate, parameter_groups=model.parameter_groups(rate), num_samples=4,
            **settings)
        few = data[:300]
        with torch.no_grad():
            base = lambda x, encoder=model.encoder: encoder.base_and_features(x)[0].detach()
            start = DiagonalNormal(*base(few).chunk(2, -1))
        optimum = instance_optimum(lambda z, m=model, x=few: m.log_joint(x, z), start, num_samples=64, num_steps=200)
        spread = float(torch.pdist(few).median())
        exact = ExactGPEncoder(base, few, optimum, kernel=rbf_kernel(1.0, spread / 2))
        with torch.no_grad():
            figures[f"N = {num}"] = {"N": num, "train_bound": float(model.mean_bound(data, num_samples=16).mean())}
        for place, x in (("model", fresh), ("digits", real)):
            evidence = exact_log_likelihood(member.decoder, x, member.noise_var)
            judged = Judged(model, run.seed)
            gaps = inference_gaps(judged, x, log_likelihood=evidence, posterior=judged.normal, num_samples=64,
                                  num_steps=150, chunk=100, seed=run.seed,
                                  starts=lambda rows: [DiagonalNormal(torch.zeros(len(rows), 2).double(),
                                                                      torch.full((len(rows), 2), -2.0).double())])
            found = signals(model, judged, x, data.mean(0)) | {
                "uncertainty, local kernel": exact.uncertainty(x, "variance")}
            ranks = {name: rank_correlation(value, gaps.amortization)._asdict() for name, value in found.items()}
            figures[f"N = {num}"][place] = {
                **summary(gaps.amortization, "amortization"), **summary(gaps.approximation, "approximation"),
                **summary(found["uncertainty, nats"], "uncertainty"), "rank_correlation": ranks,
                "median_amortization": float(gaps.amortization.median()), "num_test": len(x)}
            arrays |= {f"{place}/{num}/{name}": value.float() for name, value in (
                ("gap", gaps.amortization), ("uncertainty", found["uncertainty, nats"]),
                ("local", found["uncertainty, local kernel"]), ("distance", found["distance to the mean"]))}
    return figures, arrays


# ---------------------------------------------------------------- the cast
@experiment("04", "portrait", paper=PAPER, table="the cast under a random encoder", hours=0.05, steps=2000)
def portrait(run):
    """Random encoders for the cast's fixed decoders: log-evidence, bound of the averaged posterior, gaps."""
    figures, arrays = {}, {}
    for name in ("line", "wave", "digits2"):
        member = cast.load(name)
        size = member.num_latents
        torch.manual_seed(run.seed)
        model = RandomInferenceVAE(member.x.shape[1], size, (64, 64), num_data=20_000, decoder=member.decoder,
                                   noise_var=member.noise_var, likelihood="gaussian", freeze_decoder=True).double()
        data = model.sample(20_000, generator=torch.Generator().manual_seed(run.seed))
        settings = run.fit_options(name)
        rate = stepped_rate(settings["num_steps"], 2e-3)
        fit(model, data, batch_size=200, lr=rate, parameter_groups=model.parameter_groups(rate), num_samples=4,
            **settings)
        log_joint = lambda z, model=model, member=member: model.log_joint(member.x, z)
        with torch.no_grad():
            posterior = model.posterior(member.x)
            bound = model.averaged_bound(member.x, num_samples=20_000, generator=generator(run.seed))
            law = model.encoder(member.x)
        _, best = fit_posterior(log_joint, posterior.plug_in(), num_samples=512)
        gaps = {"bound": bound, "approximation": member.log_evidence - best, "amortization": best - bound}
        figures[name] = {key: value.tolist() for key, value in gaps.items()}
        figures[name]["uncertainty"] = model.uncertainty(member.x).tolist()
        arrays |= {f"{name}/{key}": value for key, value in law._asdict().items()}
    return figures, arrays
