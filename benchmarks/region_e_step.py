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


def decoder_as_torch(*sizes):
    return [tuple(map(torch.as_tensor, layer)) for layer in decoder(*sizes)]


def on_triangles(cells, num_nodes):
    """Gauss-Legendre nodes [R, M, 2] and weights [R, M] on a fan of triangles of each polygon, the square folded."""
    node, weight = np.polynomial.legendre.leggauss(num_nodes)
    node, weight = (node + 1) / 2, weight / 2
    p, q = (axis[..., None] for axis in np.meshgrid(node, node, indexing="ij"))
    a, b, c = cells[:, :1], cells[:, 1:-1], cells[:, 2:]  # [R, 1 or T, 2]; the padding's triangles have no area
    area = (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]
    a, b, c = (corner[:, :, None, None] for corner in (a, b, c))
    z = a + p * ((b - a) + q * (c - b))
    weights = area[..., None, None] * np.outer(weight, weight) * p[..., 0]
    return z.reshape(len(cells), -1, 2), weights.reshape(len(cells), -1)


def by_plane_quadrature(x, A, b, z, weights):
    """log p(x) [B] and first moments [B, R, 2] on nodes of every region, two latents, datum after datum."""
    log_weight = np.log(np.maximum(weights, 1e-300)) - 0.5 * (z**2).sum(-1) - np.log(2 * np.pi)
    mean = np.einsum("rdk,rmk->rmd", A, z) + b[:, None]
    log_px, first = np.empty(len(x)), np.empty((len(x), len(A), 2))
    for n, row in enumerate(x):
        log_joint = log_weight - 0.5 * ((row - mean)**2).sum(-1) / NOISE_VAR
        top = log_joint.max()
        joint = np.exp(log_joint - top)
        log_px[n] = np.log(joint.sum()) + top - 0.5 * DIM * np.log(2 * np.pi * NOISE_VAR)
        first[n] = np.einsum("rm,rmk->rk", joint, z) / joint.sum()
    return log_px, first


def in_the_plane(rounds, notes):
    """Two latents, 2-8-DIM, against quadrature on triangles, as fine as it must be for 1e-10."""
    layers, x = decoder_as_torch(2, 8, DIM), sample(decoder(2, 8, DIM), 100, 2)
    regions = partition(layers, box=9.0)  # the nodes need an end; beyond nine deviations there is no mass
    A, b, cells = (np.asarray(part) for part in (regions.A, regions.b, regions.cells))
    log_px, _, e1, _ = (part.numpy() for part in e_step(layers, torch.as_tensor(x), NOISE_VAR))
    for num_nodes in (8, 16, 24, 32, 48, 64, 96, 128):
        nodes = on_triangles(cells, num_nodes)
        found = by_plane_quadrature(x[:5], A, b, *nodes)
        if np.abs(found[0] - log_px[:5]).max() < 1e-10:
            break
    assert np.abs(found[1].sum(1) - e1[:5].sum(1)).max() < 1e-8
    notes.append(f"2-8-{DIM}: {num_nodes} x {num_nodes} nodes a triangle")
    return harness.compare(
        {"e_step": partial(e_step, layers, torch.as_tensor(x), NOISE_VAR),
         "quadrature to 1e-10": partial(by_plane_quadrature, x[:5], A, b, *nodes)},
        reference="e_step", rounds=rounds, work={"e_step": 100 * len(A), "quadrature to 1e-10": 5 * len(A)})


def growth():
    """Seconds of one E-step as regions, data and latents grow: [{varied, latents, hidden, regions, data, seconds}]."""
    cases = [("regions", 1, h, 200) for h in (4, 8, 16, 32, 64, 128)]
    cases += [("regions", 2, h, 200) for h in (4, 8, 16, 32)]
    cases += [("regions", 3, h, 1) for h in (2, 3, 4)]
    cases += [("data", 1, 16, n) for n in (100, 1000, 10_000)] + [("data", 2, 16, n) for n in (30, 300, 3000)]
    rows = []
    for varied, num_latents, hidden, num_data in cases:
        layers = decoder_as_torch(num_latents, hidden, DIM)
        x = torch.as_tensor(sample(decoder(num_latents, hidden, DIM), num_data, num_latents))
        seconds = []
        for _ in range(3 if num_latents < 3 else 1):
            start = harness.clock()
            e_step(layers, x, NOISE_VAR)
            seconds.append(harness.clock() - start)
        rows.append({"varied": varied, "latents": num_latents, "hidden": hidden, "data": num_data,
                     "regions": partition(layers).num_regions, "seconds": min(seconds)})
    return rows


def main():
    options = harness.arguments(rounds=9)
    reports, notes, larger, pairs = {}, [], {}, {}
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
        larger[f"{name}, {len(A)} regions"], pairs[f"{name}, {len(A)} regions"] = ours, NUM_DATA * len(A)
    net = decoder(2, 8, 8, DIM)
    layers, data = [tuple(map(torch.as_tensor, layer)) for layer in net], torch.as_tensor(sample(net, 200, 2))
    name = f"2-8-8-{DIM}, {partition(layers).num_regions} regions"
    larger[name], pairs[name] = partial(e_step, layers, data, NOISE_VAR), 200 * partition(layers).num_regions
    reports["e_step of larger decoders, per pair"] = harness.compare(larger, reference=next(iter(larger)),
                                                                     rounds=options.rounds, work=pairs)
    reports[f"2-8-{DIM}, {partition(decoder_as_torch(2, 8, DIM)).num_regions} regions, per pair"] = in_the_plane(
        max(3, options.rounds // 3), notes)
    harness.write("region_e_step", "Exact E-step, per pair of datum and region", "at least 100 times the double loop",
                  reports, num_data=NUM_DATA, growth=growth(),
                  note=f"Quadrature needs, for 1e-10 in log p(x), {'; '.join(notes)}.")


if __name__ == "__main__":
    main()
