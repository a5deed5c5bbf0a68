"""Chapter 5's E-step: a decoder read into layers, its regions, the reduced problem, and one posterior piece a region.

Private to `analytic_em`, which says what is computed; here is how, in float64 and in bounded memory.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from dlgm_tutorial import _normal_integrals, _regions

__all__ = []

LOG_2PI = math.log(2 * math.pi)
MAX_REGIONS = 20_000
# Half-width of the square that stands for the plane, and of the cube; enlarged where the data ask for it. A larger one
# costs digits: the cube's simplices, above all, are integrated by cancelling cones.
BOX, BOX_GENERAL = 50.0, 12.0


# --- Reading a decoder


class _Decoder(NamedTuple):
    layers: list  # (W, b) in float64, gradients kept
    leaks: list  # slopes [H] left of zero of each hidden layer
    dtype: torch.dtype

    @property
    def num_latents(self):
        return self.layers[0][0].shape[1]

    def plain(self):
        """The same without gradients."""
        return self._replace(
            layers=[(W.detach(), b.detach()) for W, b in self.layers], leaks=[leak.detach() for leak in self.leaks]
        )


def _flatten(module):
    children = [c for c in module] if isinstance(module, nn.Sequential) else [module]
    return [leaf for c in children for leaf in (_flatten(c) if isinstance(c, nn.Sequential) else [c])]


def _leak(module, width, like):
    if isinstance(module, nn.ReLU):
        value = torch.zeros(())
    elif isinstance(module, nn.LeakyReLU):
        value = torch.tensor(module.negative_slope, dtype=torch.float64)
    elif isinstance(module, nn.PReLU):
        value = module.weight
    else:
        raise ValueError(
            f"decoder must have piecewise-affine units with one kink at zero (ReLU, LeakyReLU, PReLU, "
            f"Identity), got {type(module).__name__}: a smooth unit has no regions on which it is affine, "
            "so no exact answer exists here; judge it on a grid"
        )
    return value.to(like).expand(width)


def _read(decoder, slope):
    """A decoder in either form as a _Decoder; ValueError or TypeError says what is wrong with it."""
    if isinstance(decoder, nn.Module):
        layers, leaks, pending = [], [], None
        for module in _flatten(decoder):
            if isinstance(module, nn.Identity):
                continue
            if isinstance(module, nn.Linear):
                W = module.weight.double()
                b = W.new_zeros(W.shape[0]) if module.bias is None else module.bias.double()
                if layers:
                    leaks.append(W.new_ones(W.shape[1]) if pending is None else pending)
                layers.append((W, b))
                pending = None
            else:
                like = layers[-1][1] if layers else torch.zeros(1, dtype=torch.float64)
                leak = _leak(module, len(like), like)
                if not layers or pending is not None:
                    raise ValueError(f"decoder must alternate Linear layers and units, got {decoder}")
                pending = leak
        if not layers:
            raise ValueError(f"decoder must have at least one Linear layer, got {decoder}")
        if pending is not None:  # units on the output: one more layer, which copies them
            W, b = layers[-1]
            leaks.append(pending)
            layers.append((torch.eye(len(b), dtype=W.dtype, device=W.device), torch.zeros_like(b)))
        dtype = next(decoder.parameters()).dtype
    else:
        try:
            pairs = [(torch.as_tensor(W), torch.as_tensor(b)) for W, b in decoder]
        except (TypeError, ValueError) as error:
            raise TypeError(
                "decoder must be an nn.Sequential or a list of (weight [out, in], bias [out]), got "
                f"{type(decoder).__name__}"
            ) from error
        if not pairs:
            raise ValueError("decoder must have at least one layer, got an empty list")
        dtype = pairs[0][0].dtype
        layers = [(W.double(), b.double()) for W, b in pairs]
        leaks = [torch.as_tensor(slope, dtype=torch.float64).to(b).expand(len(b)) for _, b in layers[:-1]]
    width = layers[0][0].shape[1] if layers[0][0].ndim == 2 else 0
    for number, (W, b) in enumerate(layers):
        if W.ndim != 2 or b.shape != W.shape[:1] or W.shape[1] != width:
            raise ValueError(
                f"decoder layer {number} must have weight [out, {width}] and bias [out], got "
                f"{list(W.shape)} and {list(b.shape)}"
            )
        if not bool(torch.isfinite(W).all() and torch.isfinite(b).all()):
            raise ValueError(f"decoder layer {number} must be finite, got NaN or infinity")
        width = len(b)
    return _Decoder(layers, leaks, dtype)


def _affine_maps(layers, slopes):
    """Pre-activations of every layer on every region, eq-ae-forward: A_l [R, H_l, K] and b_l [R, H_l], as two lists."""
    (W, b), R = layers[0], (len(slopes[0]) if slopes else 1)
    A, c = [W.expand(R, *W.shape)], [b.expand(R, *b.shape)]
    for (W, b), q in zip(layers[1:], slopes, strict=True):
        A.append(W @ (q[..., None] * A[-1]))
        c.append((q * c[-1]) @ W.T + b)
    return A, c


def _unit_slopes(network, codes):
    """Slopes [R, H_l] of every hidden layer's units from codes [R, H]."""
    parts = torch.split(codes, [len(leak) for leak in network.leaks], 1) if network.leaks else []
    return [torch.where(part, 1.0, leak) for part, leak in zip(parts, network.leaks, strict=True)]


def _cut(network, max_regions, box):
    """cells, interior points and codes [R, H] of a network, without gradients."""
    plain = network.plain()
    hidden, device = plain.layers[:-1], plain.layers[0][0].device
    if network.num_latents == 1:
        cells, point, codes = _regions.intervals(hidden, plain.leaks, max_regions)
        cells, point = cells.to(device), point.to(device)
    elif network.num_latents == 2:
        cells, point, codes = _regions.polygons(hidden, plain.leaks, max_regions, box, device)
    else:
        cells, point, codes = _regions.polytopes(hidden, plain.leaks, max_regions, box, network.num_latents)
        cells = [(torch.as_tensor(n, device=device), torch.as_tensor(o, device=device)) for n, o in cells]
        point, codes = point.to(device), [c.to(device) for c in codes]
    codes = torch.cat(codes, 1) if codes else torch.zeros(len(point), 0, dtype=torch.bool, device=device)
    return cells, point, codes


# --- Noise and data


def _check_data(x, network):
    if not torch.is_tensor(x) or not x.is_floating_point():
        raise TypeError(f"x must be a tensor of floats, got {x.dtype if torch.is_tensor(x) else type(x).__name__}")
    size = len(network.layers[-1][1])
    if x.ndim != 2 or x.shape[1] != size:
        raise ValueError(f"x must have shape [B, {size}], as the decoder's output, got {list(x.shape)}")
    return x.double()


def _check_noise(noise_var, size, like):
    """noise_var as a float64 tensor: a scalar, [D] or [D, D], positive (definite)."""
    noise = torch.as_tensor(noise_var, dtype=torch.float64, device=like.device)
    if noise.shape not in ((), (size,), (size, size)):
        raise ValueError(f"noise_var must be a number, [{size}] or [{size}, {size}], got {list(noise.shape)}")
    plain = noise.detach()
    if not bool(torch.isfinite(plain).all()):
        raise ValueError("noise_var must be finite, got NaN or infinity")
    if noise.ndim == 2:
        symmetric = bool((plain - plain.T).abs().max() <= 1e-10 * plain.abs().max())
        if not symmetric or int(torch.linalg.cholesky_ex(plain).info):
            raise ValueError("noise_var [D, D] must be symmetric and positive definite")
    elif not bool((plain > 0).all()):
        raise ValueError(
            f"noise_var must be positive, got {float(plain.min()):g}: without noise the evidence is no "
            "density (chapter 5, the limit of small noise)"
        )
    if float(plain.diagonal().min() if noise.ndim == 2 else plain.min()) < 1e-200:
        raise ValueError(f"noise_var must be at least 1e-200 for float64, got {float(plain.min()):g}")
    return noise


def _check_observed(observed, x):
    """observed [D] or [B, D] as bool [B, D], or None."""
    if observed is None:
        if not bool(torch.isfinite(x.detach()).all()):
            raise ValueError("x must be finite, got NaN or infinity: mark missing values with observed=")
        return None
    observed = torch.as_tensor(observed, device=x.device)
    if observed.dtype != torch.bool or observed.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"observed must be bool of shape {list(x.shape)} or {list(x.shape[1:])}, got "
            f"{observed.dtype} {list(observed.shape)}"
        )
    observed = observed.expand(x.shape)
    if not bool(torch.isfinite(x.detach()[observed]).all()):
        raise ValueError("x must be finite where observed is True, got NaN or infinity")
    return observed


class _Problem(NamedTuple):
    """Data and last layer in coordinates in which the noise is white and as few as the last hidden layer is wide."""

    y: torch.Tensor  # [B, D']
    W: torch.Tensor  # [D', H]
    v: torch.Tensor  # [D']
    constant: torch.Tensor  # [B], log-density of what was split off


def _whiten(noise, value):
    """Divide the columns of value [..., D] by the noise's standard deviation (its Cholesky factor where it is full)."""
    if noise.ndim < 2:
        return value / torch.sqrt(noise)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(noise), value.T, upper=False).T


def _log_det(noise, size):
    if noise.ndim == 2:
        return 2 * torch.log(torch.linalg.cholesky(noise).diagonal()).sum()
    return torch.log(noise).expand(size).sum()


def _reduce(network, x, noise):
    """Whiten, then rotate onto the last layer's columns, eq-ae-qr: the E-step never sees more than H output
    dimensions."""
    W, v = network.layers[-1]
    y, W, v = _whiten(noise, x), _whiten(noise, W.T).T, _whiten(noise, v[None])[0]
    constant = (
        -0.5 * (_log_det(noise, x.shape[1]) + x.shape[1] * LOG_2PI) * torch.ones_like(y[:, 0])
        if x.shape[1]
        else x.new_zeros(len(x))
    )
    if W.shape[0] > W.shape[1]:
        Q, T = torch.linalg.qr(W)
        centred = y - v
        y = centred @ Q
        constant = constant - 0.5 * ((centred - y @ Q.T) ** 2).sum(1)
        W, v = T, torch.zeros_like(T[:, 0])
    return _Problem(y, W, v, constant)


# --- One datum against every region


class _Pieces(NamedTuple):
    """Everything of the E-step that does not depend on the data."""

    A: torch.Tensor  # [R, D', K] of the reduced problem
    b: torch.Tensor
    C: torch.Tensor  # [R, K, K], Cholesky factor of the posterior precision I + A^T A
    cells: object


def _pieces(network, problem, cells, codes):
    A, b = _affine_maps([*network.layers[:-1], (problem.W, problem.v)], _unit_slopes(network, codes))
    A, b = A[-1].detach(), b[-1].detach()
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return _Pieces(A, b, torch.linalg.cholesky(identity + A.transpose(1, 2) @ A), cells)


def _integrals(cells, C, centre):
    """(log_scale, zero, first, second) of N(u; 0, I), u = C^T z - centre, over every cell: [N, R, ...]."""
    if isinstance(cells, list):
        return _normal_integrals.polytope([_regions.vertices(*cell) for cell in cells], C, centre)
    if cells.shape[1:] == (2,):
        low, high = (C[..., 0, 0] * cells[:, i] - centre[..., 0] for i in (0, 1))
        log_mass, mean, square = _normal_integrals.interval(low, high)
        return log_mass, torch.ones_like(mean), mean[..., None], square[..., None, None]
    zero, first, second = _normal_integrals.polygon(cells, C, centre)
    return torch.zeros_like(zero), zero, first, second


def _chunk_rows(pieces, chunk):
    """How many data at a time: the largest temporaries stay near 64 MB."""
    if chunk is not None:
        if int(chunk) != chunk or chunk < 1:
            raise ValueError(f"chunk must be a positive integer, got {chunk!r}")
        return int(chunk)
    R, D, K = pieces.A.shape
    width = pieces.cells.shape[1] * 4 if K == 2 else 8
    return max(1, 8_000_000 // (R * max(D, width, K * K)))


def _far_pairs(pieces, centre, n, r, log_kappa, outside, log_px, parts):
    """Redo, in place, the pairs in which rounding of a polygon's mass could be seen in the evidence, by eq-ae-tail.

    n, r [P]: the datum and the region of each pair; outside [N, R]: how far out the origin lies (where it is not, the
    tail's formula does not hold, and is not needed); log_px: a function that adds up the pairs' evidence again.
    """
    done = outside[n, r] < 1e-3
    for _ in range(20):
        # An error of 1e-16 kappa must stay below 1e-14 of the evidence.
        todo = ((log_kappa[n, r] - log_px()[n] > 4) & ~done).nonzero()[:, 0]
        if not len(todo):
            break
        for some in todo.split(20_000):
            cells, C = pieces.cells[r[some]], pieces.C[r[some]]
            vertices = cells @ C - centre[n[some], r[some]][:, None]
            values = _normal_integrals.polygon_tail(vertices, cells)
            for target, value in zip(parts, values, strict=True):
                target[some] = value
        done[todo] = True


def _polygon_pairs(pieces, centre, log_kappa):
    """Integrals of eq-ae-polygon-mass, -first and -second, over the polygons that can matter to a datum.

    A polygon beyond one of its edges' lines at distance d has a mass below exp(-d^2 / 2). Where this bound puts the
    pair fifty nats under the datum's evidence, it is left out: among R regions that changes the evidence by less than
    R exp(-50). Returns n, r [P] and the parts (log_scale, zero, first, second) of each pair, [P, ...].
    """
    outside = _normal_integrals.polygon_distance(pieces.cells, pieces.C, centre)
    reach = log_kappa - 0.5 * outside**2
    # First the best by this bound, for a lower bound of the evidence; then all that this does not rule out.
    wanted = reach >= reach.amax(1, keepdim=True) - 3
    n = r = torch.zeros(0, dtype=torch.long, device=centre.device)
    parts = (reach.new_zeros(0), reach.new_zeros(0), reach.new_zeros(0, 2), reach.new_zeros(0, 2, 2))
    for _ in range(2):
        new_n, new_r = wanted.nonzero().T
        zero, first, second = _normal_integrals.polygon(
            pieces.cells[new_r], pieces.C[new_r], centre[new_n, new_r]
        )
        n, r = torch.cat([n, new_n]), torch.cat([r, new_r])
        new = (torch.zeros_like(zero), zero, first, second)
        parts = tuple(torch.cat(both) for both in zip(parts, new, strict=True))

        def log_px(n=n, r=r, parts=parts):
            weight = torch.full_like(log_kappa, -torch.inf)
            weight[n, r] = log_kappa[n, r] + parts[0] + torch.log(parts[1])
            return torch.logsumexp(weight, 1)

        _far_pairs(pieces, centre, n, r, log_kappa, outside, log_px, parts)
        seen = torch.zeros_like(wanted)
        seen[n, r] = True
        wanted = (reach > log_px()[:, None] - 50) & ~seen
        if not bool(wanted.any()):
            break
    return n, r, parts


def _spread(n, r, like, values):
    """Values [P, ...] of the pairs (n, r), in an array [N, R, ...] of zeros."""
    full = values.new_zeros(*like.shape[:2], *values.shape[1:])
    full[n, r] = values
    return full


def _posterior_of(pieces, y, top=None):
    """E-step of some rows: (log_px, e0, e1, e2), eq-ae-evidence and eq-ae-moments."""
    r = y[:, None] - pieces.b
    identity = torch.eye(pieces.C.shape[-1], dtype=y.dtype, device=y.device)
    inverse = torch.linalg.solve_triangular(pieces.C, identity.expand_as(pieces.C), upper=False)
    centre = torch.einsum("nrd,rkd->nrk", r, inverse @ pieces.A.transpose(1, 2))
    # Back to z: mu = C^-T centre.
    mean = torch.einsum("nrk,rkl->nrl", centre, inverse)
    residual = r - torch.einsum("rdk,nrk->nrd", pieces.A, mean)
    log_kappa = -0.5 * ((residual**2).sum(-1) + (mean**2).sum(-1)) - torch.log(pieces.C.diagonal(dim1=1, dim2=2)).sum(1)
    planar = not isinstance(pieces.cells, list) and pieces.A.shape[-1] == 2
    if planar:
        where, which, parts = _polygon_pairs(pieces, centre, log_kappa)
        log_scale, zero, first, second = parts
        log_weight = torch.full_like(log_kappa, -torch.inf)
        log_weight[where, which] = log_kappa[where, which] + log_scale + torch.log(zero)
    else:
        log_scale, zero, first, second = _integrals(pieces.cells, pieces.C, centre)
        log_weight = log_kappa + log_scale + torch.log(zero)
    if top is not None and top < log_weight.shape[1]:  # keep the best regions alone
        weakest = log_weight.topk(top, dim=1).values[:, -1:]
        log_weight = torch.where(log_weight >= weakest, log_weight, -torch.inf)
    log_px = torch.logsumexp(log_weight, 1)
    kept = torch.isfinite(log_weight)
    if planar:
        kept, mean, inverse = kept[where, which], mean[where, which], inverse[which]
        log_alpha = log_kappa[where, which] + log_scale - log_px[where]
    else:
        log_alpha = log_kappa + log_scale - log_px[:, None]
    alpha = torch.where(kept, torch.exp(log_alpha), 0.0)
    e0 = alpha * zero
    shift = alpha[..., None] * (first[..., None, :] @ inverse)[..., 0, :]
    spread = alpha[..., None, None] * (inverse.transpose(-1, -2) @ second @ inverse)
    e1 = e0[..., None] * mean + shift
    cross = mean[..., :, None] * shift[..., None, :]
    e2 = e0[..., None, None] * mean[..., :, None] * mean[..., None, :] + cross + cross.transpose(-1, -2) + spread
    if planar:
        e0, e1, e2 = (_spread(where, which, log_weight, e) for e in (e0, e1, e2))
    return log_px, e0, e1, e2


def _box_for(deficit):
    """Half-width of a box beyond which the neglected mass cannot be seen in float64.

    What lies outside adds at most exp(-box^2 / 2) times the density of a perfect fit to the evidence; deficit: by how
    many nats the evidence, found so far, is below that density.
    """
    return math.sqrt(2 * (deficit + 40))


@dataclass
class _Answer:
    """What one E-step over all data found; moments of the posterior restricted to each region, without gradients."""

    log_px: torch.Tensor
    e0: torch.Tensor
    e1: torch.Tensor
    e2: torch.Tensor
    cells: object
    point: torch.Tensor
    codes: torch.Tensor
    collected: object = None


def _patterns(observed):
    """Rows with the same coordinates observed: [(columns [D] bool, rows [n])]."""
    patterns, which = torch.unique(observed, dim=0, return_inverse=True)
    return [(p, (which == i).nonzero()[:, 0]) for i, p in enumerate(patterns)]


def _restrict(network, noise, columns):
    """The model of the observed coordinates: the same decoder with some of its output rows."""
    W, v = network.layers[-1]
    noise = noise[columns][:, columns] if noise.ndim == 2 else noise[columns] if noise.ndim == 1 else noise
    return network._replace(layers=[*network.layers[:-1], (W[columns], v[columns])]), noise


def _solve(network, x, noise, observed, chunk, max_regions, top=None, moments=True, collector=None):
    """E-step over all data in bounded memory, in as large a box as they need.

    moments: keep e0, e1, e2 of all data, [B, R, ...]. collector: a function without arguments that returns a function
    (rows, e0, e1, e2), called for each chunk in turn, so that sums over the data need no array over all of them (a
    larger box starts again, with a new one); the last one is given back as `collected`.
    """
    network, x, noise = network.plain(), x.detach(), noise.detach()
    box = BOX if network.num_latents < 3 else BOX_GENERAL
    while True:
        cells, point, codes = _cut(network, max_regions, box)
        if observed is None:
            jobs = [(network, noise, x, None)]
        else:
            jobs = [
                (*_restrict(network, noise, columns), x[rows][:, columns], rows)
                for columns, rows in _patterns(observed)
            ]
        R, K = len(point), network.num_latents
        log_px, worst = x.new_zeros(len(x)), 0.0
        sizes = [(R,), (R, K), (R, K, K)] if moments else []
        found = [x.new_zeros(len(x), *size) for size in sizes]
        collected = collector() if collector else None
        for part, part_noise, data, rows in jobs:
            problem = _reduce(part, data, part_noise)
            pieces = _pieces(part, problem, cells, codes)
            step = _chunk_rows(pieces, chunk)
            for start in range(0, len(data), step):
                here = slice(start, start + step) if rows is None else rows[start : start + step]
                answer = _posterior_of(pieces, problem.y[start : start + step], top)
                log_px[here] = answer[0] + problem.constant[start : start + step]
                worst = min(worst, float(answer[0].min()))
                for target, value in zip(found, answer[1:], strict=False):
                    target[here] = value
                if collected:
                    collected(here, *answer[1:])
        larger = _box_for(-worst) if K > 1 else 0.0
        if larger <= box:
            return _Answer(log_px, *(found or [None] * 3), cells, point, codes, collected)
        if not math.isfinite(larger):
            raise ValueError(
                "x or noise_var is out of reach: the log-likelihood of some row is below what float64 can hold"
            )
        box = larger


def _prepare(decoder, x, noise_var, observed, slope):
    network = _read(decoder, slope)
    x64 = _check_data(x, network)
    noise = _check_noise(noise_var, x.shape[1], x64)
    return network, x64, noise, _check_observed(observed, x64)


def _expected_log_density(network, x, noise, observed, answer):
    """E[log p(x, .) | x] with the posterior moments held fixed: [B], whose gradient is that of log p(x),
    eq-ae-fisher."""
    A, b = _affine_maps(network.layers, _unit_slopes(network, answer.codes))
    A, b = A[-1], b[-1]
    if observed is None:
        jobs = [(torch.ones_like(x[0], dtype=torch.bool), slice(None))]
    else:
        jobs = _patterns(observed)
    total = torch.zeros_like(x[:, 0])
    for columns, rows in jobs:
        part = noise[columns][:, columns] if noise.ndim == 2 else noise[columns] if noise.ndim == 1 else noise
        size = int(columns.sum())
        if size == 0:
            continue
        y = _whiten(part, x[rows][:, columns])
        slope = _whiten(part, A[:, columns].transpose(1, 2).reshape(-1, size)).reshape(len(A), -1, size)  # [R, K, d]
        offset = _whiten(part, b[:, columns])
        e0, e1, e2 = answer.e0[rows], answer.e1[rows], answer.e2[rows]
        linear = e1.flatten(1) @ slope.flatten(0, 1) + e0 @ offset
        gram = slope @ slope.transpose(1, 2)
        square = (
            (y**2).sum(1)
            - 2 * (y * linear).sum(1)
            + torch.einsum("nrkl,rkl->n", e2, gram)
            # The regions first: three factors at once would go through an array [n, r, d].
            + 2 * torch.einsum("nrk,rk->n", e1, torch.einsum("rkd,rd->rk", slope, offset))
            + e0 @ (offset**2).sum(1)
        )
        total = total.index_put(
            (torch.arange(len(x), device=x.device)[rows],), -0.5 * (square + _log_det(part, size) + size * LOG_2PI)
        )
    return total
