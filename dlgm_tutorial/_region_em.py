"""Chapter 5's learning: sufficient statistics, closed-form steps a layer, EM, generalised EM, the exact gradient.

Private file of `analytic_em`, which gives out its public names.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn

from dlgm_tutorial._region_posterior import (
    MAX_REGIONS,
    _affine_maps,
    _check_data,
    _check_noise,
    _check_observed,
    _Decoder,
    _expected_log_density,
    _prepare,
    _read,
    _solve,
    _unit_slopes,
)

__all__ = ["EMResult", "Statistics", "collect_statistics", "fit_em", "m_step_direction"]


@dataclass
class Statistics:
    """What every layer's update needs, summed over the data, with the regions they were computed on.

    e0 [R, d], e1 [R, d, K], e2 [R, d, K, K] with d = 1, or D where values are missing (a coordinate sums over the data
    that have it); xe0 [R, D], xe1 [R, D, K]; xx [D, D], or [D] for isotropic and diagonal noise; count [d]; log_px [B].
    """

    network: _Decoder
    noise: torch.Tensor
    codes: torch.Tensor
    e0: torch.Tensor
    e1: torch.Tensor
    e2: torch.Tensor
    xe0: torch.Tensor
    xe1: torch.Tensor
    xx: torch.Tensor
    count: torch.Tensor
    log_px: torch.Tensor


def collect_statistics(decoder, x, noise_var, *, observed=None, chunk=None, slope=0.0, max_regions=MAX_REGIONS):
    """Run the E-step and sum it over the data: the Statistics from which every layer is updated.

    decoder, x [B, D], noise_var, observed, chunk, slope, max_regions: as for `analytic_em.e_step`. Raises ValueError as
    it does, and for full noise with missing values.
    """
    network, x64, noise, mask = _prepare(decoder, x, noise_var, observed, slope)
    if mask is not None and noise.ndim == 2:
        raise ValueError("noise_var must be a number or [D] where values are missing")
    return _collect(network.plain(), x64.detach(), noise.detach(), mask, chunk, max_regions)


class _Sums:
    """Sums over the data of seen^T (e0, e1, e2) and x^T (e0, e1), chunk by chunk: [R, d, ...]."""

    def __init__(self, seen, data):
        self.seen, self.data, self.totals = seen, data, [0.0] * 5

    def __call__(self, rows, e0, e1, e2):
        over = lambda weight, moment: torch.tensordot(weight[rows], moment, ([0], [0])).transpose(0, 1)
        new = [over(self.seen, e) for e in (e0, e1, e2)] + [over(self.data, e) for e in (e0, e1)]
        self.totals = [total + part for total, part in zip(self.totals, new, strict=True)]


def _collect(network, x, noise, mask, chunk, max_regions):
    seen = torch.ones_like(x[:, :1]) if mask is None else mask.double()
    data = x if mask is None else torch.where(mask, x, 0.0)
    xx = data.T @ data if noise.ndim == 2 else (data**2).sum(0)
    sums = lambda: _Sums(seen, data)
    answer = _solve(network, x, noise, mask, chunk, max_regions, moments=False, collector=sums)
    return Statistics(network, noise, answer.codes, *answer.collected.totals, xx, seen.sum(0), answer.log_px)


def _input_moments(stats, layer):
    """Moments of the layer's input with a one appended, [h; 1]: of the data x [R, D, p + 1], and second [R, d, p+1,
    p+1]."""
    A, b = _affine_maps(stats.network.layers, _unit_slopes(stats.network, stats.codes))
    if layer == 0:
        K = stats.e1.shape[-1]
        G = torch.eye(K, dtype=stats.e1.dtype, device=stats.e1.device).expand(len(stats.codes), K, K)
        c = torch.zeros_like(G[..., 0])
    else:
        q = _unit_slopes(stats.network, stats.codes)[layer - 1]
        G, c = q[..., None] * A[layer - 1], q * b[layer - 1]
    with_x = torch.cat([stats.xe1 @ G.transpose(1, 2) + stats.xe0[..., None] * c[:, None], stats.xe0[..., None]], -1)
    first = stats.e1 @ G.transpose(1, 2) + stats.e0[..., None] * c[:, None]
    cross = (stats.e1 @ G.transpose(1, 2))[..., :, None] * c[:, None, None, :]
    second = (
        G[:, None] @ stats.e2 @ G[:, None].transpose(2, 3)
        + cross
        + cross.transpose(2, 3)
        + stats.e0[..., None, None] * (c[:, :, None] * c[:, None, :])[:, None]
    )
    top = torch.cat([second, first[..., None]], -1)
    bottom = torch.cat([first, stats.e0[..., None]], -1)[..., None, :]
    return with_x, torch.cat([top, bottom], -2)


def _backward_maps(network, codes):
    """F_l [R, D, H_l], from a layer's pre-activation to the output, eq-ae-backward."""
    slopes, R = _unit_slopes(network, codes), len(codes)
    size = len(network.layers[-1][1])
    F = [torch.eye(size, dtype=torch.float64, device=codes.device).expand(R, size, size)]
    for (W, _), q in zip(network.layers[:0:-1], slopes[::-1], strict=True):
        # The last layer's own map is the identity: no [D, D] product.
        F.insert(0, (W if len(F) == 1 else F[0] @ W) * q[:, None])
    return F


def m_step_direction(layer, stats, *, ridge=1e-10):
    """Solve for the weights of one layer that maximise the surrogate with every region's code held fixed: (W, b).

    layer: number of the Linear layer, 0 nearest the latent, -1 nearest the data; stats: of `collect_statistics`.
    eq-ae-normal. For the last layer it is an exact M-step. For the others the regions move with the weights, and the
    step may lower the likelihood (eq-ae-counter): it is an ascent direction only. ridge, relative to the mean
    eigenvalue, keeps the old weights where no data speaks (dead units).
    """
    network = stats.network
    num_layers = len(network.layers)
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"layer must be a number of the decoder's {num_layers} layers, got {layer}")
    layer %= num_layers
    with_x, second = _input_moments(stats, layer)
    W, b = network.layers[layer]
    old = torch.cat([W, b[:, None]], 1)
    if layer == num_layers - 1:
        # Every output row is a least-squares problem of its own; the noise cancels.
        gram, target = second.sum(0), with_x.sum(0)
        ridges = (
            ridge
            * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        )
        new = torch.linalg.solve(
            gram + ridges,
            (target[..., None] + ridges @ old[..., None]) if len(gram) > 1 else (target.T + ridges[0] @ old.T)[None],
        )
        new = new[..., 0] if len(gram) > 1 else new[0].T
        return new[:, :-1], new[:, -1]
    F = _backward_maps(network, stats.codes)
    shapes = [F[j].shape[-1] for j in range(num_layers)]
    offset = network.layers[-1][1].expand(len(stats.codes), -1)
    for j in range(layer + 1, num_layers - 1):
        offset = offset + F[j] @ network.layers[j][1]
    F = F[layer]
    ones = second[..., -1, :]  # sums of [h; 1], [R, d, p + 1]
    if stats.noise.ndim == 2:
        white = torch.cholesky_solve(F.transpose(0, 1).reshape(F.shape[1], -1), torch.linalg.cholesky(stats.noise))
        white = white.reshape(F.shape[1], len(F), -1).transpose(0, 1)
    else:
        white = F / stats.noise.expand(F.shape[1])[:, None]
    B = torch.einsum("rds,rdk->sk", white, with_x - offset[..., None] * ones)
    if second.shape[1] == 1:
        gram = torch.einsum("rst,rkl->sktl", white.transpose(1, 2) @ F, second[:, 0])
    else:
        pairs = torch.einsum("rds,rdt->rdst", white, F).flatten(0, 1).flatten(1)
        gram = (pairs.T @ second.flatten(0, 1).flatten(1)).reshape(shapes[layer], shapes[layer], *second.shape[2:])
        gram = gram.permute(0, 2, 1, 3)
    size = old.numel()
    gram = gram.reshape(size, size)
    ridges = ridge * gram.diagonal().mean().clamp_min(1e-300)
    gram = gram + ridges * torch.eye(size, dtype=gram.dtype, device=gram.device)
    # Proximal: where the data say nothing the old weights stay.
    new = torch.linalg.solve(gram, (B + ridges * old).reshape(-1)).reshape(old.shape)
    return new[:, :-1], new[:, -1]


def _noise_update(stats, kind):
    """Noise variance that maximises the surrogate, eq-ae-noise: never lowers the likelihood."""
    A, b = _affine_maps(stats.network.layers, _unit_slopes(stats.network, stats.codes))
    A, b = A[-1], b[-1]
    if kind == "full":
        linear = torch.einsum("rdk,rck->dc", stats.xe1, A) + stats.xe0.T @ b
        e0, e1, e2 = stats.e0[:, 0], stats.e1[:, 0], stats.e2[:, 0]
        cross = torch.einsum("rdk,rk,rc->dc", A, e1, b)
        square = torch.einsum("rdk,rkl,rcl->dc", A, e2, A) + cross + cross.T + torch.einsum("r,rd,rc->dc", e0, b, b)
        xx = stats.xx
        return (xx - linear - linear.T + square) / stats.count
    linear = (stats.xe1 * A).sum((0, 2)) + (stats.xe0 * b).sum(0)
    square = torch.einsum("rdk,rdkl,rdl->d", A, stats.e2.expand(-1, A.shape[1], -1, -1), A) + (
        (2 * (A * stats.e1).sum(2) + b * stats.e0) * b
    ).sum(0)
    xx = stats.xx.diagonal() if stats.xx.ndim == 2 else stats.xx
    total = xx - 2 * linear + square
    count = stats.count.expand(len(total))
    return (total / count.clamp_min(1.0)) if kind == "diagonal" else total.sum() / count.sum()


class EMResult(NamedTuple):
    """decoder (of the kind that was given), noise_var, log_likelihoods [T + 1]: mean log p(x) before and after each
    iteration."""

    decoder: object
    noise_var: torch.Tensor
    log_likelihoods: torch.Tensor


def _write(decoder, network):
    """The decoder in the form in which it came, with the network's weights."""
    if not isinstance(decoder, nn.Module):
        return [(W.to(network.dtype), b.to(network.dtype)) for W, b in network.layers]
    new = copy.deepcopy(decoder)
    linear = [m for m in new.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for module, (W, b) in zip(linear, network.layers, strict=True):
            module.weight.copy_(W)
            if module.bias is not None:
                module.bias.copy_(b)
    return new


def fit_em(
    decoder,
    x,
    *,
    noise_var=None,
    method="gem",
    noise="isotropic",
    num_iterations=50,
    damping=1.0,
    observed=None,
    tolerance=0.0,
    noise_floor=1e-6,
    noise_from=0,
    callback=None,
    chunk=None,
    slope=0.0,
    max_regions=MAX_REGIONS,
):
    """Maximise the exact log-likelihood of a decoder and its noise: EMResult(decoder, noise_var, log_likelihoods).

    method: "gem", closed-form step in the last layer and the noise, and in hidden layers the closed-form direction with
    backtracking on the exact likelihood, which never falls; "em", the same without backtracking, hidden layers moved by
    `damping` of the way, which may fall; "gradient", L-BFGS on the exact gradient (eq-ae-fisher); num_iterations each.
    noise: "isotropic", "diagonal" or "full", held above noise_floor times the variance of x; noise_var: where to start
    (half that variance); updated from iteration noise_from on. tolerance: stop when an iteration gains less. observed:
    bool [B, D], not with full noise. chunk, slope, max_regions: as for `analytic_em.e_step`.
    callback(iteration, decoder, noise_var, log_likelihood). The decoder given is not changed.
    """
    if method not in ("em", "gem", "gradient"):
        raise ValueError(f"method must be 'em', 'gem' or 'gradient', got {method!r}")
    if noise not in ("isotropic", "diagonal", "full"):
        raise ValueError(f"noise must be 'isotropic', 'diagonal' or 'full', got {noise!r}")
    if not 0 < damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {damping}")
    network = _read(decoder, slope)
    x64 = _check_data(x, network).detach()
    if len(x64) == 0:
        raise ValueError("x must hold at least one datum, got 0")
    mask = _check_observed(observed, x64)
    if mask is not None and noise == "full":
        raise ValueError("noise must be 'isotropic' or 'diagonal' where values are missing")
    if isinstance(decoder, nn.Module) and any(isinstance(m, nn.Linear) and m.bias is None for m in decoder.modules()):
        raise ValueError("decoder must have a bias in every Linear layer to be fitted")
    network, size = network.plain(), x.shape[1]
    values = x64 if mask is None else torch.where(mask, x64, 0.0)
    count = torch.tensor(float(len(x64)), dtype=torch.float64) if mask is None else mask.sum(0).clamp_min(1)
    centre = values.sum(0) / count
    variance = ((values - centre) ** 2 if mask is None else torch.where(mask, (x64 - centre) ** 2, 0.0)).sum(0) / count
    floor = noise_floor * float(variance.mean()) + 1e-30
    current = _check_noise(variance.mean() / 2 + floor if noise_var is None else noise_var, size, x64).detach()
    if noise != "isotropic" and current.ndim == 0:
        current = current.expand(size).clone()
    if noise == "full" and current.ndim == 1:
        current = torch.diag(current)
    if (noise == "isotropic" and current.ndim) or (noise == "diagonal" and current.ndim == 2):
        raise ValueError(f"noise_var has shape {list(current.shape)}, which is not of noise={noise!r}")
    learner = _fit_gradient if method == "gradient" else _fit_steps
    network, current, history = learner(
        network,
        x64,
        current,
        mask,
        noise,
        num_iterations,
        floor,
        noise_from,
        chunk,
        max_regions,
        damping if method == "em" else None,
        tolerance,
        callback and (lambda t, n, v, l: callback(t, _write(decoder, n), v, l)),
    )
    return EMResult(_write(decoder, network), current.to(x.dtype), torch.tensor(history, dtype=torch.float64))


def _floored(noise, floor):
    if noise.ndim < 2:
        return noise.clamp_min(floor)
    values, vectors = torch.linalg.eigh(0.5 * (noise + noise.T))
    return (vectors * values.clamp_min(floor)) @ vectors.T


def _fit_steps(
    network,
    x,
    noise_var,
    mask,
    kind,
    num_iterations,
    floor,
    noise_from,
    chunk,
    max_regions,
    damping,
    tolerance,
    callback,
):
    """EM and generalised EM: damping None means backtracking."""

    def likelihood(candidate, variance):
        return float(_solve(candidate, x, variance, mask, chunk, max_regions, moments=False).log_px.mean())

    stats = _collect(network, x, noise_var, mask, chunk, max_regions)
    history = [float(stats.log_px.mean())]
    for iteration in range(num_iterations):
        for layer in reversed(range(len(network.layers))):
            if stats is None:
                stats = _collect(network, x, noise_var, mask, chunk, max_regions)
            now, old = float(stats.log_px.mean()), network.layers[layer]
            new = m_step_direction(layer, stats)
            last = layer == len(network.layers) - 1
            step = 1.0 if last or damping is None else damping
            while True:
                moved = [(1 - step) * o + step * n for o, n in zip(old, new, strict=True)]
                trial = network._replace(layers=[*network.layers[:layer], tuple(moved), *network.layers[layer + 1 :]])
                if last or damping is not None or likelihood(trial, noise_var) >= now:
                    network, stats = trial, None
                    break
                step *= 0.3
                if step < 1e-4:  # as good as stationary in this layer
                    break
        if stats is None:
            stats = _collect(network, x, noise_var, mask, chunk, max_regions)
        if iteration >= noise_from:
            noise_var = _floored(_noise_update(stats, kind), floor)
            stats = _collect(network, x, noise_var, mask, chunk, max_regions)
        history.append(float(stats.log_px.mean()))
        if callback:
            callback(iteration + 1, network, noise_var, history[-1])
        if (
            not math.isfinite(history[-1])
            or history[-1] - history[-2] < tolerance
            and damping is None
            and tolerance > 0
        ):
            break
    return network, noise_var, history


def _fit_gradient(
    network,
    x,
    noise_var,
    mask,
    kind,
    num_iterations,
    floor,
    noise_from,
    chunk,
    max_regions,
    damping,
    tolerance,
    callback,
):
    """L-BFGS on weights and log-noise; the full noise through its Cholesky factor with a log-diagonal."""
    shapes = [t.shape for layer in network.layers for t in layer]
    start = torch.log(noise_var) if noise_var.ndim < 2 else torch.linalg.cholesky(noise_var)
    if noise_var.ndim == 2:
        start = start.tril(-1) + torch.diag(torch.log(start.diagonal()))
    sizes = [math.prod(s) for s in [*shapes, start.shape]]

    def unpack(vector):
        parts = [p.reshape(s) for p, s in zip(vector.split(sizes), [*shapes, start.shape], strict=True)]
        layers = list(zip(parts[:-1:2], parts[1:-1:2], strict=True))
        raw = parts[-1]
        if raw.ndim < 2:
            return network._replace(layers=layers), torch.exp(raw) + floor
        factor = raw.tril(-1) + torch.diag(torch.exp(raw.diagonal()))
        return network._replace(layers=layers), factor @ factor.T + floor * torch.eye(
            len(raw), dtype=raw.dtype, device=raw.device
        )

    def negative(array):
        vector = torch.tensor(array, dtype=x.dtype, device=x.device, requires_grad=True)
        candidate, variance = unpack(vector)
        try:
            answer = _solve(candidate, x, variance, mask, chunk, max_regions)
        except ValueError:  # a step of the line search so long that the regions cannot be listed
            return 1e30, np.zeros_like(array)
        value = -float(answer.log_px.mean())
        (gradient,) = torch.autograd.grad(-_expected_log_density(candidate, x, variance, mask, answer).mean(), vector)
        return (value, gradient.cpu().numpy()) if math.isfinite(value) else (1e30, np.zeros_like(array))

    vector = torch.cat([t.reshape(-1) for layer in network.layers for t in layer] + [start.reshape(-1)])
    array = vector.detach().cpu().numpy()
    history = [-negative(array)[0]]

    def record(intermediate_result):
        history.append(-float(intermediate_result.fun))
        if callback:
            candidate, variance = unpack(torch.as_tensor(intermediate_result.x, device=x.device))
            callback(len(history) - 1, candidate, variance, history[-1])

    found = minimize(
        negative,
        array,
        jac=True,
        method="L-BFGS-B",
        callback=record,
        options={
            "maxiter": num_iterations,
            "maxfun": 20 * num_iterations,
            "maxcor": 20,
            "ftol": max(tolerance, 1e-14),
            "gtol": 1e-9,
        },
    )
    network, noise_var = unpack(torch.as_tensor(found.x, device=x.device))
    return network, noise_var, history
