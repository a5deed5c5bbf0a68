"""The exact E-step of a piecewise-affine decoder, per pair of datum and region.

Against the scheme of the method's public code, written again here: a double loop over data and regions, a D x D
inverse and a handful of scalar SciPy calls for each pair. And against quadrature, as fine as it must be to agree with
us to 1e-10 in log p(x). Seconds are per pair; the loop is given fewer data.
"""

from functools import partial

import numpy as np
import torch
from scipy.stats import norm

from benchmarks import harness
from dlgm_tutorial.analytic_em import e_step, partition

NUM_DATA, NUM_LOOPED, NOISE_VAR, DIM = 1000, 10, 0.04, 2


def decoder(*sizes):
    """A random network with biases, so that its knots lie where the prior has its mass."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((o, i)) * np.sqrt(2 / i), 0.5 * rng.standard_normal(o))
            for i, o in zip(sizes, sizes[1:], strict=False)]


def sample(net, num, num_latents):
    h = np.random.default_rng(1).standard_normal((num, num_latents))
    for layer, (weight, bias) in enumerate(net):
        h = h @ weight.T + bias
        h = h if layer == len(net) - 1 else np.maximum(h, 0)
    return h + np.sqrt(NOISE_VAR) * np.random.default_rng(2).standard_normal(h.shape)


def by_double_loop(x, A, b, cells):
    """(log p(x) [B], masses, first and second moments [B, R]) by scalar calls, one latent."""
    log_px, moments = np.empty(len(x)), np.empty((3, len(x), len(A)))
    for n in range(len(x)):
        for r in range(len(A)):
            covariance = NOISE_VAR * np.eye(DIM) + A[r] @ A[r].T
            residual = x[n] - b[r]
            evidence = np.exp(-0.5 * residual @ np.linalg.inv(covariance) @ residual) / np.sqrt(
                np.linalg.det(2 * np.pi * covariance))
            variance = np.linalg.inv(np.eye(1) + A[r].T @ A[r] / NOISE_VAR)
            mean, scale = float((variance @ A[r].T @ residual / NOISE_VAR)[0]), float(np.sqrt(variance[0, 0]))
            low, high = (cells[r] - mean) / scale
            mass = norm.cdf(high) - norm.cdf(low)
            at_low, at_high = norm.pdf(low), norm.pdf(high)
            first = mean * mass + scale * (at_low - at_high)
            edges = (low * at_low if np.isfinite(low) else 0.0) - (high * at_high if np.isfinite(high) else 0.0)
            second = mean**2 * mass + 2 * mean * scale * (at_low - at_high) + scale**2 * (mass + edges)
            moments[:, n, r] = evidence * mass, evidence * first, evidence * second
        log_px[n] = np.log(moments[0, n].sum())
        moments[:, n] /= moments[0, n].sum()
    return log_px, moments


def by_quadrature(x, A, b, cells, num_nodes):
    """log p(x) [B] and the three moments by Gauss-Legendre on each region, one latent, cut off at 9."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    low, high = np.clip(cells, -9, 9).T
    z = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * nodes
    log_weight = np.log(np.maximum((high - low)[:, None] / 2 * weights, 1e-300)) - 0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    mean = A[:, None, :, 0] * z[..., None] + b[:, None]
    squares = ((x[:, None, None] - mean)**2).sum(-1) / NOISE_VAR
    log_joint = log_weight - 0.5 * squares - 0.5 * DIM * np.log(2 * np.pi * NOISE_VAR)
    top = log_joint.max((1, 2), keepdims=True)
    joint = np.exp(log_joint - top)
    total = joint.sum((1, 2))
    moments = [(joint * z**power).sum(-1) / total[:, None] for power in range(3)]
    return np.log(total) + top[:, 0, 0], moments


def main():
    options = harness.arguments(rounds=9)
    reports, notes, growth, pairs = {}, [], {}, {}
    for sizes in ((1, 8, 8, DIM), (1, 16, 16, DIM), (1, 32, 32, DIM)):
        net, name = decoder(*sizes), "-".join(map(str, sizes))
        x = sample(net, NUM_DATA, 1)
        layers, data = [tuple(map(torch.as_tensor, layer)) for layer in net], torch.as_tensor(x)
        regions = partition(layers)
        A, b, cells = (np.asarray(part) for part in (regions.A, regions.b, regions.cells))
        log_px, *moments = (part.numpy() for part in e_step(layers, data, NOISE_VAR))
        looped, looped_moments = by_double_loop(x[:NUM_LOOPED], A, b, cells)
        assert np.abs(looped - log_px[:NUM_LOOPED]).max() < 1e-9  # all three compute the same
        assert np.abs(looped_moments[1] - moments[1][:NUM_LOOPED, :, 0]).max() < 1e-9
        num_nodes = next(n for n in (8, 16, 32, 64, 128, 256, 512)
                         if np.abs(by_quadrature(x, A, b, cells, n)[0] - log_px).max() < 1e-10)
        ours = partial(e_step, layers, data, NOISE_VAR)
        candidates = {
            "e_step": ours,
            "double loop of scalar calls": partial(by_double_loop, x[:NUM_LOOPED], A, b, cells),
            "quadrature to 1e-10": partial(by_quadrature, x, A, b, cells, num_nodes)}
        work = {"e_step": NUM_DATA * len(A), "double loop of scalar calls": NUM_LOOPED * len(A),
                "quadrature to 1e-10": NUM_DATA * len(A)}
        title = f"{name}, {len(A)} regions, per pair"
        reports[title] = harness.compare(candidates, reference="e_step", rounds=options.rounds, work=work)
        notes.append(f"{name}: {num_nodes} nodes a region")
        growth[f"{name}, {len(A)} regions"], pairs[f"{name}, {len(A)} regions"] = ours, NUM_DATA * len(A)
    net = decoder(2, 8, 8, DIM)
    layers, data = [tuple(map(torch.as_tensor, layer)) for layer in net], torch.as_tensor(sample(net, 200, 2))
    name = f"2-8-8-{DIM}, {partition(layers).num_regions} regions"
    growth[name], pairs[name] = partial(e_step, layers, data, NOISE_VAR), 200 * partition(layers).num_regions
    reports["e_step of larger decoders, per pair"] = harness.compare(growth, reference=next(iter(growth)),
                                                                     rounds=options.rounds, work=pairs)
    harness.write("region_e_step", "Exact E-step, per pair of datum and region", "at least 100 times the double loop",
                  reports, num_data=NUM_DATA, note=f"Quadrature needs, for 1e-10 in log p(x), {'; '.join(notes)}.")


if __name__ == "__main__":
    main()
