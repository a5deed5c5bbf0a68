"""The figures of the home page: one bent decoder, its exact posterior, and six answers to it.

`python tools/home_figure.py` writes book/_static/home/*.svg. Every curve is computed: the decoder is a ReLU network with
one latent and two outputs, so that the truth can be had on a grid, and each answer is the chapter's method at its smallest.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize
from scipy.special import log_ndtr, logsumexp
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dlgm_tutorial.plotting import COLORS, use_style

OUT = Path(__file__).resolve().parent.parent / "book" / "_static" / "home"
NOISE_VAR = 0.36**2
X = np.array([0.85, -0.02])                       # the datum that everybody is asked about
KNOTS = np.array([-1.3, -0.45, 0.45, 1.2])        # where the decoder bends
SLOPES = np.array([[-1.1, -0.25], [-1.3, 0.75], [0.1, 1.9], [1.2, 0.55], [1.0, -0.35]])  # between the bends
Z = np.linspace(-4.5, 4.5, 1801)
DZ = Z[1] - Z[0]


def decoder(z):
    """f(z) [..., 2]: the ReLU network b + W_1 z + sum_j (change of slope)_j relu(z - knot_j)."""
    z = np.asarray(z, float)[..., None]
    offset = np.array([-0.75, 0.1])
    bends = np.maximum(z - KNOTS, 0.0) @ np.diff(SLOPES, axis=0)
    # Bends left of zero have moved f(0); take that back, so that f(0) is the offset.
    return offset + z * SLOPES[0] + bends - np.maximum(-KNOTS, 0.0) @ np.diff(SLOPES, axis=0)


def log_joint(z, x=X):
    return norm.logpdf(z) + norm.logpdf(x, decoder(z), np.sqrt(NOISE_VAR)).sum(-1)


def exact(x=X):
    """The posterior density on the grid and the log-evidence."""
    log_j = log_joint(Z, x)
    log_evidence = logsumexp(log_j) + np.log(DZ)
    return np.exp(log_j - log_evidence), log_evidence


def kl(q, p):
    inside = q > 1e-300
    return np.sum(q[inside] * (np.log(q[inside]) - np.log(p[inside]))) * DZ


def linear():
    """Chapter 1: the straight line closest to the decoder under the prior, and its exact posterior."""
    weight = norm.pdf(Z) * DZ
    slope = (weight * Z) @ decoder(Z)
    offset = weight @ decoder(Z)
    noise = NOISE_VAR + weight @ (decoder(Z) - offset - Z[:, None] * slope) ** 2
    precision = 1 + np.sum(slope**2 / noise)
    return norm.pdf(Z, np.sum(slope * (X - offset) / noise) / precision, precision**-0.5)


def best_gaussian(p, start):
    """Chapter 2: the Gaussian of smallest KL(q || p), what a perfect encoder would answer."""
    log_p = np.log(np.maximum(p, 1e-300))

    def objective(v):
        log_q = norm.logpdf(Z, v[0], np.exp(v[1]))
        return np.exp(log_q) @ (log_q - log_p) * DZ

    return minimize(objective, [start, np.log(0.3)]).x


def best_mixture(p):
    """Chapter 3: two Gaussians and a weight, by the same objective."""
    log_p = np.log(np.maximum(p, 1e-300))

    def density(v):
        weight = 1 / (1 + np.exp(-v[4]))
        return weight * norm.pdf(Z, v[0], np.exp(v[1])) + (1 - weight) * norm.pdf(Z, v[2], np.exp(v[3]))

    def objective(v):
        q = np.maximum(density(v), 1e-300)
        return q @ (np.log(q) - log_p) * DZ

    return density(minimize(objective, [-1.2, -1.0, 1.2, -1.0, 0.0]).x)


def uncertain_encoder(num_data=40, num_draws=12, seed=3):
    """Chapter 4: a Gaussian process learns the map from data to the best Gaussian's mean; draws of its prediction at X."""
    rng = np.random.default_rng(seed)
    data = decoder(rng.standard_normal(num_data)) + np.sqrt(NOISE_VAR) * rng.standard_normal((num_data, 2))
    targets = []
    for x in data:
        p, _ = exact(x)
        fits = [best_gaussian(p, start) for start in (-1.0, 1.0)]
        targets.append(min(fits, key=lambda v: kl(norm.pdf(Z, v[0], np.exp(v[1])), p)))
    mean, log_scale = np.array(targets).T
    typical = log_scale.mean()

    def kernel(a, b):
        return np.exp(-0.5 * np.sum((a[:, None] - b) ** 2, -1) / 0.6**2)

    gram, cross = kernel(data, data) + 0.05 * np.eye(num_data), kernel(X[None], data)[0]
    predicted = cross @ np.linalg.solve(gram, mean)
    spread = np.sqrt(1 - cross @ np.linalg.solve(gram, cross))
    means = predicted + spread * norm.ppf((np.arange(num_draws) + 0.5) / num_draws)   # evenly spread draws
    return norm.pdf(Z, means[:, None], np.exp(typical + cross @ np.linalg.solve(gram, log_scale - typical)))


def pieces(x=X):
    """Chapter 5: on each straight piece prior times likelihood is a Gaussian, cut at the piece's ends.

    Returns a list of (low, high, mean, sd, log mass); the masses add up to the evidence.
    """
    edges, found = np.concatenate([[-np.inf], KNOTS, [np.inf]]), []
    for low, high, slope in zip(edges[:-1], edges[1:], SLOPES, strict=True):
        inner = np.clip(0.0, low, high)           # any point of the piece fixes its offset
        offset = decoder(inner) - slope * inner
        var = 1 / (1 + slope @ slope / NOISE_VAR)
        mean = var * slope @ (x - offset) / NOISE_VAR
        log_whole = norm.logpdf(x, offset + slope * mean, np.sqrt(NOISE_VAR)).sum() + norm.logpdf(mean) + 0.5 * np.log(2 * np.pi * var)
        a, b = (low - mean) / np.sqrt(var), (high - mean) / np.sqrt(var)
        if a > 0:
            a, b = -b, -a                         # in the left tail the difference keeps its digits
        log_mass = log_ndtr(b) + np.log1p(-np.exp(log_ndtr(a) - log_ndtr(b)))
        found.append((low, high, mean, np.sqrt(var), log_whole + log_mass))
    return found


def short_run(num_steps=20, step=0.2):
    """Chapter 6: the law of a Langevin chain of twenty steps from the prior, propagated on the grid without sampling."""
    score = np.gradient(log_joint(Z), Z)
    centre = Z + 0.5 * step**2 * score
    kernel = norm.pdf(Z[:, None], centre, step)   # from column to row
    kernel /= kernel.sum(0) * DZ
    q = norm.pdf(Z)
    for _ in range(num_steps):
        q = kernel @ q * DZ
    return q


def write_gap(ax, nats):
    ax.text(0.02, 0.98, f"{nats:.2f} nats", transform=ax.transAxes, va="top", fontsize=12, color="#A34700")


def panel(p, q=None):
    fig, ax = plt.subplots(figsize=(3.6, 2.2))
    ax.fill_between(Z[::4], p[::4], color="#d5d5d5", lw=0)
    ax.plot(Z[::4], p[::4], color=COLORS["exact"], lw=1)
    if q is not None:
        ax.plot(Z[::4], q[::4], color=COLORS["approximation"], lw=2.6)
        write_gap(ax, kl(q, p))
    ax.set(xlim=(-2.9, 2.9), ylim=(0, 1.4), yticks=[], xticks=[-2, 0, 2])
    ax.spines["left"].set_visible(False)
    ax.tick_params(labelsize=11)
    ax.set_xlabel("latent z", fontsize=12, labelpad=1)
    return fig, ax


def save(fig, name):
    fig.savefig(OUT / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)


def draw_decoder():
    fig, ax = plt.subplots(figsize=(3.6, 2.6))
    rng = np.random.default_rng(0)
    cloud = decoder(rng.standard_normal(500)) + np.sqrt(NOISE_VAR) * rng.standard_normal((500, 2))
    ax.scatter(*cloud.T, s=5, color="#bbbbbb", lw=0)
    z = np.linspace(-2.4, 2.4, 200)
    curve = decoder(z)
    colours = plt.get_cmap("cividis")(np.linspace(0, 1, len(z) - 1))
    for i, colour in enumerate(colours):
        ax.plot(*curve[i:i + 2].T, color=colour, lw=4, solid_capstyle="round")
    for value in (-2, -1, 0, 1, 2):
        outward = decoder(value) - np.array([0.4, -0.05])
        ax.annotate(f"{value}".replace("-", "\N{MINUS SIGN}"), decoder(value), xytext=12 * outward / np.linalg.norm(outward),
                    textcoords="offset points", fontsize=11, ha="center", va="center", color="#111111",
                    bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8})
    ax.plot(*X, marker="*", ms=17, color=COLORS["approximation"], mec="white", mew=1)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.set_xlabel("data, first entry", fontsize=12)
    ax.set_ylabel("second entry", fontsize=12)
    save(fig, "decoder")


def draw_posterior(p):
    fig, ax = panel(p)
    fig.set_size_inches(3.6, 2.6)
    ax.plot(Z[::4], norm.pdf(Z[::4]), color="#555555", lw=1.5, ls="--")
    ax.text(0.0, 0.44, "prior", ha="center", fontsize=11, color="#333333")
    edge = np.linspace(-2.9, 2.9, 200)
    ax.imshow(edge[None], extent=(-2.9, 2.9, 0, 0.05), aspect="auto", cmap="cividis", vmin=-2.4, vmax=2.4, zorder=3)
    save(fig, "posterior")


def main():
    use_style()
    plt.rcParams["svg.fonttype"] = "path"
    OUT.mkdir(parents=True, exist_ok=True)
    p, log_evidence = exact()
    draw_decoder()
    draw_posterior(p)
    save(panel(p, linear())[0], "1")
    fits = [best_gaussian(p, start) for start in (-1.0, 1.0)]
    gaussians = [norm.pdf(Z, m, np.exp(s)) for m, s in fits]
    save(panel(p, min(gaussians, key=lambda q: kl(q, p)))[0], "2")
    save(panel(p, best_mixture(p))[0], "3")
    draws = uncertain_encoder()
    fig, ax = panel(p, draws.mean(0))
    ax.plot(Z[::4], draws[:, ::4].T, color=COLORS["warm"], lw=0.9, zorder=1)
    save(fig, "4")
    fig, ax = panel(p)
    total = logsumexp([piece[-1] for piece in pieces()])
    q = np.zeros_like(Z)
    for i, (low, high, mean, sd, _) in enumerate(pieces()):
        inside = (Z >= low) & (Z <= high)
        height = log_joint(np.clip(0.0, low, high)) - norm.logpdf(np.clip(0.0, low, high), mean, sd)
        density = np.exp(height - total) * norm.pdf(Z[inside], mean, sd)
        q[inside] = density
        ax.plot(Z[inside], density, color=COLORS["approximation"] if i % 2 == 0 else COLORS["second"], lw=2.6)
        if np.isfinite(high):
            ax.axvline(high, 0, 0.1, color="#555555", lw=1)
    write_gap(ax, abs(kl(q, p)))
    save(fig, "5")
    save(panel(p, short_run())[0], "6")


if __name__ == "__main__":
    main()
