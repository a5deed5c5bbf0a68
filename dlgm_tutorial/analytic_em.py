"""Chapter 5: exact inference and EM for decoders with piecewise-affine units, by their regions.

A decoder of linear layers and (leaky) ReLU units is affine on each of finitely many regions of latent space. With a
standard normal prior and Gaussian noise, the evidence is a sum over regions of a normal density times a normal mass,
and the posterior a mixture of truncated normals (Balestriero, Paris and Baraniuk 2020). One latent dimension uses
intervals, two use polygons; both are exact to rounding and batched over (data x regions). Three and more go through
linear programmes, simplices and signed cones: slow, a reference.

A decoder is an nn.Sequential of Linear, ReLU, LeakyReLU, PReLU and Identity, or a list of (weight [out, in], bias
[out]) with `slope`, the units' slope left of zero. noise_var is a number, [D] (diagonal) or [D, D] (full); x is [B, D],
observed a mask of it, bool [B, D] or [D]. chunk is how many data are worked on at a time (chosen to bound memory), and
max_regions the number of regions above which a decoder is refused. Everything is computed in float64, whatever the
arguments' dtype, and given back in that dtype.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import nnls
from torch import nn

from dlgm_tutorial import _normal_integrals, _regions
from dlgm_tutorial._region_em import EMResult, Statistics, collect_statistics, fit_em, m_step_direction
from dlgm_tutorial._region_posterior import (
    BOX,
    BOX_GENERAL,
    LOG_2PI,
    MAX_REGIONS,
    _affine_maps,
    _check_noise,
    _chunk_rows,
    _cut,
    _expected_log_density,
    _integrals,
    _log_det,
    _patterns,
    _pieces,
    _prepare,
    _read,
    _reduce,
    _restrict,
    _solve,
    _unit_slopes,
    _whiten,
)
from dlgm_tutorial.evaluation import Estimate
from dlgm_tutorial.networks import mlp

__all__ = [
    "EMResult",
    "ExactPosterior",
    "PiecewiseAffineGaussian",
    "Regions",
    "Statistics",
    "collect_statistics",
    "e_step",
    "exact_elbo",
    "exact_log_likelihood",
    "exact_posterior",
    "fit_em",
    "impute",
    "m_step_direction",
    "marginal_moments",
    "num_parameters",
    "partition",
]


class Regions(NamedTuple):
    """A decoder's partition: on region r it is z -> A[r] z + b[r].

    num_regions; codes [R, H], whether each hidden unit is on; A [R, D, K], b [R, D]; cells: [R, 2] ends of the
    intervals
    (K = 1), [R, V, 2] vertices of the polygons, padded by repeating the last (K = 2), list of (normals, offsets) with
    normals z + offsets >= 0 (K >= 3); interior [R, K], a point of each cell.
    """

    num_regions: int
    codes: torch.Tensor
    A: torch.Tensor
    b: torch.Tensor
    cells: object
    interior: torch.Tensor


def partition(decoder, *, max_regions=MAX_REGIONS, slope=0.0, box=None):
    """Cut the latent space into the regions on which the decoder is affine: exact, Regions(num_regions, codes, A, b,
    cells).

    K = 1: the line at the units' roots, layer by layer; K = 2: the square |z_i| <= box (50) by polygon clipping;
    K >= 3: the cube (12) by linear programmes (slow). A and b by eq-ae-forward, differentiable in the decoder's
    weights; duplicate and dead units make no regions of their own. Raises ValueError for smooth units, and for more
    than max_regions regions, with the count, before memory is spent.

    >>> regions = partition([([[1.0], [1.0]], [0.0, -1.0]), ([[1.0, -1.0]], [0.0])])
    >>> regions.cells.tolist()
    [[-inf, 0.0], [0.0, 1.0], [1.0, inf]]
    """
    network = _read(decoder, slope)
    box = box or (BOX if network.num_latents < 3 else BOX_GENERAL)
    cells, point, codes = _cut(network, max_regions, box)
    A, b = _affine_maps(network.layers, _unit_slopes(network, codes))
    to = lambda t: t.to(network.dtype)
    cells = [tuple(map(to, cell)) for cell in cells] if isinstance(cells, list) else to(cells)
    return Regions(len(point), codes, to(A[-1]), to(b[-1]), cells, to(point))


# --- The public E-step


def e_step(decoder, x, noise_var, *, observed=None, top=None, chunk=None, slope=0.0, max_regions=MAX_REGIONS):
    """Exact posterior moments restricted to every region: (log_px [B], e0 [B, R], e1 [B, R, K], e2 [B, R, K, K]).

    e0 = P(z in region | x), e1 = E[z 1(z in region) | x], e2 likewise with z z^T: eq-ae-evidence, eq-ae-moments; the
    regions are in the order of `partition`. observed [B, D] or [D], bool: which coordinates count. top: keep only that
    many regions a datum, the best ones; log_px is then a lower bound whose gap is -log of the mass kept, eq-ae-top.
    Nats. Raises ValueError on shapes, NaN, noise that is not positive, smooth units, too many regions.

    >>> log_px, e0, e1, e2 = e_step([([[1.0]], [0.0])], torch.zeros(1, 1), 1.0)
    >>> round(float(log_px), 6), round(float(e2), 6)
    (-1.265512, 0.5)
    """
    network, x64, noise, mask = _prepare(decoder, x, noise_var, observed, slope)
    if top is not None and (int(top) != top or top < 1):
        raise ValueError(f"top must be a positive integer, got {top!r}")
    answer = _solve(network, x64, noise, mask, chunk, max_regions, top)
    return tuple(t.to(x.dtype) for t in (answer.log_px, answer.e0, answer.e1, answer.e2))


def exact_log_likelihood(decoder, x, noise_var, *, observed=None, chunk=None, slope=0.0, max_regions=MAX_REGIONS):
    """Evaluate log p(x) exactly, [B], in nats: the sum over regions of eq-ae-evidence.

    decoder: with piecewise-affine units; x [B, D]; noise_var: a number, [D] or [D, D]; observed: bool [B, D] or [D], a
    row with none observed has log p = 0; chunk: data at a time (chosen to bound memory). Differentiable once in the
    decoder's weights, noise_var and x, exactly, through the posterior moments (Fisher's identity, eq-ae-fisher).
    Errors: 1e-13 for K = 1 and 2; K >= 3 is slow, about 1e-9. Raises ValueError as `e_step`.

    >>> exact_log_likelihood([([[1.0]], [0.0])], torch.zeros(1, 1), 1.0)
    tensor([-1.2655])
    """
    network, x64, noise, mask = _prepare(decoder, x, noise_var, observed, slope)
    inputs = [t for layer in network.layers for t in layer] + [x64, noise]
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    answer = _solve(network, x64, noise, mask, chunk, max_regions, moments=wants)
    value = answer.log_px
    if wants:
        expected = _expected_log_density(network, x64, noise, mask, answer)
        value = value + (expected - expected.detach())
    return value.to(x.dtype)


# --- The posterior, and what follows from it


class ExactPosterior:
    """p(z | x) of B data: a mixture of truncated normals with disjoint supports, eq-ae-posterior.

    log_px [B]; region_weights [B, R]; mean [B, K]; covariance [B, K, K]; num_regions. Made by `exact_posterior`.
    """

    def __init__(self, network, x, noise, observed, answer, dtype):
        self._network, self._x, self._noise, self._observed, self._answer = network, x, noise, observed, answer
        self._dtype = dtype
        mean = answer.e1.sum(1)
        self.log_px, self.region_weights, self.mean = (t.to(dtype) for t in (answer.log_px, answer.e0, mean))
        self.covariance = (answer.e2.sum(1) - mean[:, :, None] * mean[:, None]).to(dtype)
        self.num_regions = answer.e0.shape[1]

    def log_prob(self, z):
        """log p(z | x), z [S, B, K] or [B, K] -> [S, B] or [B], in nats."""
        if z.shape[-2:] != self.mean.shape:
            raise ValueError(
                f"z must have shape [..., {self.mean.shape[0]}, {self.mean.shape[1]}], got {list(z.shape)}"
            )
        h = z.double()
        log_prior = -0.5 * (h**2 + LOG_2PI).sum(-1)
        for (W, b), leak in zip(self._network.layers, [*self._network.leaks, None], strict=True):
            h = h @ W.T + b
            h = h if leak is None else torch.where(h > 0, h, leak * h)
        residual = self._x - h
        total = log_prior - self._answer.log_px
        jobs = [(slice(None), slice(None))] if self._observed is None else _patterns(self._observed)
        for columns, rows in jobs:
            noise = self._noise
            if self._observed is not None:
                noise = _restrict(self._network, noise, columns)[1]
            part = residual[..., rows, :][..., columns]
            size = part.shape[-1]
            white = _whiten(noise, part.reshape(-1, size)).reshape(part.shape) if size else part
            constant = _log_det(noise, size) + size * LOG_2PI if size else 0.0
            total[..., rows] -= 0.5 * ((white**2).sum(-1) + constant)
        return total.to(self._dtype)

    def sample(self, num, *, generator=None):
        """Draw num independent samples of each posterior, [num, B, K]: exact, no chain.

        A region by its weight, then a truncated normal: K = 1 by inverting its distribution function, K >= 2 by
        rejection from a box around the whitened cell (K >= 3: one cell after another, slow).
        """
        shape = (num, *self.mean.shape[:1])
        uniform = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64, device=self._x.device)
        return self._draw(uniform(*shape), uniform)

    def rsample(self, sample_shape=(), *, noise=None):
        """Draw samples, [*sample_shape, B, K]: `sample` with the shape that torch's distributions take.

        noise: uniform numbers [*sample_shape, B, 2] that decide the draws, for K = 1 only (more latents reject, and
        cannot say beforehand how many they need). No gradient passes through a draw. Raises ValueError.
        """
        (B, K), sample_shape = self.mean.shape, tuple(sample_shape)
        num = math.prod(sample_shape)
        if noise is None:
            return self.sample(num).reshape(*sample_shape, B, K)
        if K != 1 or noise.shape != (*sample_shape, B, 2):
            raise ValueError(
                f"noise must have shape {[*sample_shape, B, 2]}, for one latent alone, got {list(noise.shape)} "
                f"and {K} latents"
            )
        noise = noise.reshape(num, B, 2).double()
        return self._draw(noise[..., 0], lambda *size: noise[..., 1]).reshape(*sample_shape, B, 1)

    def _draw(self, choice, uniform):
        """Samples [num, B, K] from uniform numbers that choose the region [num, B], and a function that gives more."""
        answer = self._answer
        bins = torch.cumsum(answer.e0, 1)
        region = torch.searchsorted(bins, (choice * bins[:, -1]).T.contiguous(), right=True).T
        region = region.clamp_max(self.num_regions - 1)
        pieces, centre = self._gaussians(region)
        C = pieces.C[region]
        if self._network.num_latents == 1:
            cells = answer.cells[region]
            low, high = (C[..., 0, 0] * cells[..., i] - centre[..., 0] for i in (0, 1))
            u = _truncated_normal(low, high, uniform(*region.shape))[..., None]
        elif self._network.num_latents == 2:
            u = _normal_in_polygons(answer.cells[region], C, centre, uniform)
        else:
            u = _normal_in_polytopes(answer.cells, region, C, centre, uniform)
        z = torch.linalg.solve_triangular(C.transpose(-1, -2), (u + centre)[..., None], upper=True)[..., 0]
        return z.to(self._dtype)

    def _gaussians(self, region):
        """Pieces, and the whitened posterior mean of the piece of each drawn region: [num, B, K]."""
        answer = self._answer
        if self._observed is not None and not bool((self._observed == self._observed[0]).all()):
            raise NotImplementedError("sample needs the same coordinates observed in all data")
        network, noise, x = self._network, self._noise, self._x
        if self._observed is not None:
            columns = self._observed[0]
            network, noise = _restrict(network, noise, columns)
            x = x[:, columns]
        problem = _reduce(network, x, noise)
        pieces = _pieces(network, problem, answer.cells, answer.codes)
        r = problem.y - pieces.b[region]
        projected = torch.einsum("sbd,sbdk->sbk", r, pieces.A[region])
        return pieces, torch.linalg.solve_triangular(pieces.C[region], projected[..., None], upper=False)[..., 0]


def _truncated_normal(low, high, u):
    """Quantile u of the standard normal on [low, high]: by the inverse survival function, in the tail by bisection."""
    flip = low + high < 0
    low, high, u = torch.where(flip, -high, low), torch.where(flip, -low, high), torch.where(flip, 1 - u, u)
    survival = lambda t: 0.5 * torch.special.erfc(t / math.sqrt(2.0))
    quantile = -torch.special.ndtri(survival(low) - u * (survival(low) - survival(high)))
    tail = low > 5
    if bool(tail.any()):
        a, b, v = low[tail], high[tail], u[tail]
        log_total = _normal_integrals.interval(a, b)[0]
        left, right = a, torch.minimum(b, a + 40 / a)
        for _ in range(60):
            middle = (left + right) / 2
            below = _normal_integrals.interval(a, middle)[0] - log_total < torch.log(v)
            left, right = torch.where(below, middle, left), torch.where(below, right, middle)
        quantile = quantile.masked_scatter(tail, (left + right) / 2)
    quantile = torch.minimum(torch.maximum(quantile, low), high)
    return torch.where(flip, -quantile, quantile)


def _normal_in_polygons(cells, C, centre, uniform):
    """Standard normal draws u = C^T z - centre within polygons [..., V, 2], by rejection from a box around each.

    The box's first axis points to the polygon's nearest point, so that a polygon in the tail is met where it is dense;
    along the longest edge, where the polygon holds the origin.
    """
    shape = centre.shape[:-1]
    vertices = (cells @ C - centre[..., None, :]).reshape(-1, *cells.shape[-2:])
    side = vertices.roll(-1, 1) - vertices
    squared = (side**2).sum(-1)
    share = (-(vertices * side).sum(-1) / squared.clamp_min(1e-300)).clamp(0, 1)
    point = vertices + share[..., None] * side
    row = torch.arange(len(vertices), device=vertices.device)
    outside = (vertices[..., 0] * side[..., 1] - vertices[..., 1] * side[..., 0] < 0).any(1)
    axis = torch.where(outside[:, None], point[row, (point**2).sum(-1).argmin(1)], side[row, squared.argmax(1)])
    axis = axis / axis.norm(dim=-1, keepdim=True)
    rotation = torch.stack([axis, torch.stack([-axis[:, 1], axis[:, 0]], -1)], -1)  # columns: the new axes
    turned = vertices @ rotation
    low, high = turned.amin(1), turned.amax(1)
    side = turned.roll(-1, 1) - turned
    draw, todo = torch.zeros_like(low), row
    for _ in range(10_000):
        u = _truncated_normal(low[todo], high[todo], uniform(len(todo), 2))
        away = u[:, None] - turned[todo]
        inside = (side[todo, :, 0] * away[..., 1] - side[todo, :, 1] * away[..., 0] >= 0).all(-1)
        draw[todo[inside]] = u[inside]
        todo = todo[~inside]
        if not len(todo):
            return (rotation @ draw[..., None])[..., 0].reshape(*shape, 2)
    raise RuntimeError(f"sample: {len(todo)} draws were not accepted in 10000 rounds")


def _normal_in_polytopes(cells, region, C, centre, uniform):
    """Standard normal draws u = C^T z - centre within polytopes of three and more dimensions, [num, B, K]."""
    u = torch.zeros_like(centre)
    for n in range(region.shape[1]):
        for r in region[:, n].unique().tolist():
            rows = (region[:, n] == r).nonzero()[:, 0]
            factor, shift = C[rows[0], n], centre[rows[0], n]
            normals, offsets = cells[r]
            corners = torch.as_tensor(_regions.vertices(normals, offsets)[1], device=u.device) @ factor - shift
            turned = torch.linalg.solve_triangular(factor, normals.T, upper=False).T  # normals C^-T
            u[rows, n] = _normal_in_polytope(turned, offsets + turned @ shift, corners, len(rows), uniform)
    return u


def _normal_in_polytope(normals, offsets, corners, num, uniform):
    """num standard normal draws with normals u + offsets >= 0, by rejection from a box turned to the nearest point."""
    K = normals.shape[1]
    # The nearest point, a least-distance problem, by non-negative least squares (Lawson and Hanson 1974, chapter 23).
    system = torch.cat([normals.T, -offsets[None]]).cpu().numpy()
    target = torch.eye(K + 1, dtype=torch.float64)[-1].numpy()
    rest = system @ nnls(system, target)[0] - target
    nearest = torch.as_tensor(-rest[:K] / rest[K], device=normals.device)
    identity = torch.eye(K, dtype=torch.float64, device=normals.device)
    axis = nearest if float(nearest.norm()) > 1e-9 else identity[0]
    rotation = torch.linalg.qr(torch.cat([axis[:, None], identity], 1))[0]  # columns: the new axes
    turned = corners @ rotation
    low, high = (end.expand(2 * num + 64, K) for end in (turned.amin(0), turned.amax(0)))
    kept, count = [], 0
    for _ in range(10_000):
        u = _truncated_normal(low, high, uniform(*low.shape)) @ rotation.T
        kept.append(u[(u @ normals.T + offsets >= 0).all(1)])
        count += len(kept[-1])
        if count >= num:
            return torch.cat(kept)[:num]
    raise RuntimeError(f"sample: {num - count} draws were not accepted in 10000 rounds")


def exact_posterior(decoder, x, noise_var, *, observed=None, chunk=None, slope=0.0, max_regions=MAX_REGIONS):
    """Return the exact posterior of each datum, an ExactPosterior: log_prob(z), mean [B, K], covariance,
    region_weights [B, R], sample(num).

    A mixture of truncated normals, one a region, eq-ae-posterior. Arguments and errors as in `exact_log_likelihood`.

    >>> posterior = exact_posterior([([[1.0]], [0.0])], torch.ones(1, 1), 1.0)
    >>> posterior.mean, posterior.covariance
    (tensor([[0.5000]]), tensor([[[0.5000]]]))
    """
    network, x64, noise, mask = _prepare(decoder, x, noise_var, observed, slope)
    network, x64, noise = network.plain(), x64.detach(), noise.detach()
    return ExactPosterior(network, x64, noise, mask, _solve(network, x64, noise, mask, chunk, max_regions), x.dtype)


def _region_moments(network, loc, cov, chunk, max_regions):
    """Moments of N(loc, cov) restricted to every region, [B, R], [B, R, K], [B, R, K, K], and the codes."""
    reach = float((loc.abs() + 10 * cov.diagonal(dim1=1, dim2=2).sqrt()).max())
    box = max(BOX if loc.shape[1] < 3 else BOX_GENERAL, reach)
    cells, _, codes = _cut(network, max_regions, box)
    # precision = C C^T with C upper or lower: from cov = S S^T, C = S^-T.
    S = torch.linalg.cholesky(cov)
    identity = torch.eye(loc.shape[1], dtype=loc.dtype, device=loc.device)
    C = torch.linalg.solve_triangular(S, identity, upper=False).transpose(1, 2)
    centre = torch.linalg.solve_triangular(S, loc[..., None], upper=False)[..., 0]
    R, parts = len(codes), []
    size = chunk or max(1, 1_000_000 // (R * loc.shape[1]))
    for rows in torch.arange(len(loc), device=loc.device).split(size):
        u0 = centre[rows, None].expand(-1, R, -1)
        log_scale, zero, first, second = _integrals(cells, C[rows, None], u0)
        t0 = torch.exp(log_scale) * zero
        scale = torch.exp(log_scale)[..., None]
        mean, factor = loc[rows, None], S[rows, None]
        shift = scale * (factor @ first[..., None])[..., 0]
        spread = scale[..., None] * (factor @ second @ factor.transpose(-1, -2))
        cross = mean[..., :, None] * shift[..., None, :]
        parts.append(
            (
                t0,
                t0[..., None] * mean + shift,
                t0[..., None, None] * mean[..., :, None] * mean[..., None, :]
                + cross
                + cross.transpose(-1, -2)
                + spread,
            )
        )
    return (*(torch.cat(p) for p in zip(*parts, strict=True)), codes)


def exact_elbo(decoder, x, noise_var, loc, cov, *, chunk=None, slope=0.0, max_regions=MAX_REGIONS):
    """Evaluate the ELBO of q(z | x) = N(loc, cov) without sampling, [B], in nats: eq-ae-elbo.

    loc [B, K], cov [B, K, K], or [B, K] for its diagonal. Its distance to `exact_log_likelihood` is KL(q || p(z | x)).
    Not differentiable. Raises ValueError on shapes, on a covariance that is not positive definite, and as `e_step`.
    """
    network, x64, noise, _ = _prepare(decoder, x, noise_var, None, slope)
    K = network.num_latents
    if loc.shape != (len(x), K) or cov.shape not in ((len(x), K), (len(x), K, K)):
        raise ValueError(
            f"loc and cov must have shapes [{len(x)}, {K}] and [{len(x)}, {K}, {K}], got {list(loc.shape)} "
            f"and {list(cov.shape)}"
        )
    network, x64, noise = network.plain(), x64.detach(), noise.detach()
    loc, cov = loc.detach().double(), cov.detach().double()
    cov = torch.diag_embed(cov) if cov.ndim == 2 else cov
    if bool(torch.linalg.cholesky_ex(cov).info.any()):
        raise ValueError("cov must be positive definite")
    t0, t1, t2, codes = _region_moments(network, loc, cov, chunk, max_regions)
    problem = _reduce(network, x64, noise)
    pieces = _pieces(network, problem, None, codes)
    elbo = problem.constant.clone()
    for rows in torch.arange(len(x), device=x.device).split(_chunk_rows(pieces._replace(cells=loc[:, None]), chunk)):
        r = problem.y[rows, None] - pieces.b
        square = (
            (r**2).sum(-1) * t0[rows]
            - 2 * torch.einsum("nrd,rdk,nrk->nr", r, pieces.A, t1[rows])
            + torch.einsum("rdk,rdl,nrkl->nr", pieces.A, pieces.A, t2[rows])
        )
        elbo[rows] -= 0.5 * square.sum(1)
    log_det = torch.logdet(cov)
    kl = 0.5 * (cov.diagonal(dim1=1, dim2=2).sum(1) + (loc**2).sum(1) - K - log_det)
    return (elbo - kl).to(x.dtype)


def marginal_moments(decoder, noise_var, *, slope=0.0, max_regions=MAX_REGIONS):
    """Return E[x] [D] and Cov[x] [D, D] of the model, exactly, from the regions' moments under the prior:
    eq-ae-marginal.

    >>> mean, covariance = marginal_moments([([[1.0]], [0.0]), ([[1.0]], [0.0])], 0.0 + 1.0)
    >>> round(float(mean), 6), round(float(covariance), 6)  # a rectified normal, plus noise
    (0.398942, 1.340845)
    """
    network = _read(decoder, slope)
    dtype, network = network.dtype, network.plain()
    size = len(network.layers[-1][1])
    noise = _check_noise(noise_var, size, network.layers[0][0]).detach()
    K = network.num_latents
    origin = torch.zeros(1, K, dtype=torch.float64, device=noise.device)
    t0, t1, t2, codes = _region_moments(
        network, origin, torch.eye(K, dtype=torch.float64, device=noise.device)[None], None, max_regions
    )
    mean, second = _output_moments(network, codes, t0, t1, t2)
    noise = noise if noise.ndim == 2 else torch.diag(noise.expand(size))
    return mean[0].to(dtype), (second[0] - mean[0][:, None] * mean[0] + noise).to(dtype)


def _output_mean(A, b, e0, e1):
    """E[g(z)] [B, D] from region moments of z: one product, no array over data, regions and coordinates."""
    return e1.flatten(1) @ A.transpose(1, 2).flatten(0, 1) + e0 @ b


def _output_moments(network, codes, e0, e1, e2):
    """E[g(z)] [B, D] and E[g(z) g(z)^T] [B, D, D] from region moments of z."""
    A, b = _affine_maps(network.layers, _unit_slopes(network, codes))
    A, b = A[-1], b[-1]
    mean = _output_mean(A, b, e0, e1)
    cross = torch.einsum("rdk,nrk,rc->ndc", A, e1, b)
    second = (
        torch.einsum("rdk,nrkl,rcl->ndc", A, e2, A)
        + cross
        + cross.transpose(1, 2)
        + torch.einsum("nr,rd,rc->ndc", e0, b, b)
    )
    return mean, second


def impute(decoder, x, noise_var, observed, *, covariance=False, chunk=None, slope=0.0, max_regions=MAX_REGIONS):
    """Fill in what was not observed by its exact posterior mean, [B, D]; with covariance=True also Cov, [B, D, D].

    observed: bool [B, D] or [D]; observed entries are returned as they are (with covariance zero). For full noise the
    missing noise is conditioned on the observed residual. eq-ae-impute.
    """
    network, x64, noise, mask = _prepare(decoder, x, noise_var, observed, slope)
    if mask is None:
        raise ValueError("observed must be given: a bool array of what is known")
    network, x64, noise = network.plain(), x64.detach(), noise.detach()
    answer = _solve(network, x64, noise, mask, chunk, max_regions)
    A, b = _affine_maps(network.layers, _unit_slopes(network, answer.codes))
    A, b = A[-1], b[-1]
    filled = torch.where(mask, x64, 0.0)
    spread = x64.new_zeros(len(x), x.shape[1], x.shape[1]) if covariance else None
    for columns, rows in _patterns(mask):
        missing = (~columns).nonzero()[:, 0]
        if not len(missing):
            continue
        # x_m = G (x_o) + (A_m - G A_o) z + (b_m - G b_o) + noise of covariance `rest`.
        gain, rest = _condition_noise(noise, columns)
        slope_m, offset_m = A[:, missing], b[:, missing]
        known = x64[rows][:, columns]
        if gain is not None:
            slope_m, offset_m = slope_m - gain @ A[:, columns], offset_m - b[:, columns] @ gain.T
        e0, e1 = answer.e0[rows], answer.e1[rows]
        mean = _output_mean(slope_m, offset_m, e0, e1)
        filled[rows[:, None], missing] = mean + (known @ gain.T if gain is not None else 0.0)
        if covariance:
            e2 = answer.e2[rows]
            cross = torch.einsum("rdk,nrk,rc->ndc", slope_m, e1, offset_m)
            second = (
                torch.einsum("rdk,nrkl,rcl->ndc", slope_m, e2, slope_m)
                + cross
                + cross.transpose(1, 2)
                + torch.einsum("nr,rd,rc->ndc", e0, offset_m, offset_m)
            )
            spread[rows[:, None, None], missing[:, None], missing] = second - mean[:, :, None] * mean[:, None] + rest
    return (filled.to(x.dtype), spread.to(x.dtype)) if covariance else filled.to(x.dtype)


def _condition_noise(noise, columns):
    """Regression of the missing noise on the observed one (None where they are independent), and what is left of it."""
    if noise.ndim < 2:
        return None, torch.diag(noise.expand(len(columns))[~columns])
    across = noise[~columns][:, columns]
    gain = torch.linalg.solve(noise[columns][:, columns], across.T).T if bool(columns.any()) else across
    return gain, noise[~columns][:, ~columns] - gain @ across.T


def num_parameters(decoder, noise="isotropic", *, slope=0.0):
    """Count free parameters for BIC: weights, biases and noise, less the gauges eq-ae-gauge (a scale a hidden unit,
    rotations of z)."""
    network = _read(decoder, slope)
    size, K = len(network.layers[-1][1]), network.num_latents
    noises = {"isotropic": 1, "diagonal": size, "full": size * (size + 1) // 2}
    if noise not in noises:
        raise ValueError(f"noise must be one of {sorted(noises)}, got {noise!r}")
    hidden = sum(len(leak) for leak in network.leaks)
    return sum(W.numel() + b.numel() for W, b in network.layers) + noises[noise] - hidden - K * (K - 1) // 2


# --- The model contract


class PiecewiseAffineGaussian(nn.Module):
    """A decoder with bends, a standard normal prior and Gaussian noise, in the contract of all models: all exact.

    From sizes (data_dim, latent_dim, hidden_dims; leaky ReLUs of this slope), or around a decoder, an nn.Sequential as
    everywhere in this module, used as it is, and not trained with freeze_decoder=True. noise_var: a number or [D].
    `bound` is log p(x) itself, so that `training.fit` maximises the exact likelihood; `fit_em` is the other way.
    With one or two latents; three and more are slow. Methods that take observed take a mask, [B, D] or [D].

    >>> model = PiecewiseAffineGaussian(decoder=nn.Linear(1, 1), noise_var=1.0)
    >>> model.log_likelihood(torch.zeros(1, 1)).standard_error
    tensor([0.])
    """

    def __init__(
        self,
        data_dim=None,
        latent_dim=None,
        hidden_dims=None,
        *,
        decoder=None,
        noise_var=1.0,
        slope=0.1,
        freeze_decoder=False,
        max_regions=MAX_REGIONS,
    ):
        super().__init__()
        if (decoder is None) == (data_dim is None or latent_dim is None or hidden_dims is None):
            raise ValueError("give either decoder, or all of data_dim, latent_dim and hidden_dims")
        if decoder is None:
            decoder = mlp([latent_dim, *hidden_dims, data_dim], lambda: nn.LeakyReLU(slope))
        if not isinstance(decoder, nn.Module):
            raise TypeError(f"decoder must be an nn.Module, got {type(decoder).__name__}")
        network = _read(decoder, slope)
        like = network.layers[-1][1]
        self.data_dim, self.latent_dim, self.max_regions = len(like), network.num_latents, max_regions
        noise = _check_noise(noise_var, self.data_dim, like).detach()
        if noise.ndim == 2:
            raise ValueError(f"noise_var must be a number or [{self.data_dim}], got {list(noise.shape)}")
        self.decoder = decoder.requires_grad_(not freeze_decoder)
        self.log_noise_var = nn.Parameter(noise.log().to(network.dtype), requires_grad=not freeze_decoder)

    @property
    def noise_var(self):
        """Variance of the noise, a number or [D]."""
        return self.log_noise_var.exp()

    def log_joint(self, x, z, *, coordinates="noise"):
        """Evaluate log p(x, z): x [B, D], z [S, B, K] -> [S, B], nats; both coordinates are the same, for one layer."""
        if coordinates not in ("noise", "state"):
            raise ValueError(f"coordinates must be 'noise' or 'state', got {coordinates!r}")
        if z.ndim != 3 or z.shape[1:] != (len(x), self.latent_dim):
            raise ValueError(f"z must have shape [S, {len(x)}, {self.latent_dim}], got {list(z.shape)}")
        noise_var = self.noise_var.expand(self.data_dim)
        square = ((x - self.decoder(z)) ** 2 / noise_var + torch.log(noise_var) + LOG_2PI).sum(-1)
        return -0.5 * (square + (z**2 + LOG_2PI).sum(-1))

    def posterior(self, x, observed=None):
        """Return p(z | x) as an `ExactPosterior`: x [B, D]."""
        return exact_posterior(self.decoder, x, self.noise_var, observed=observed, max_regions=self.max_regions)

    def noise_spec(self, batch_size, num_samples=1):
        """Return {}: the bound of this model needs no noise."""
        return {}

    def bound(self, x, *, num_samples=1, noise=None, generator=None, observed=None):
        """Evaluate what training maximises: log p(x) itself, eq-ae-evidence, with its exact gradient; [B, D] -> [B]."""
        options = {"observed": observed, "max_regions": self.max_regions}
        return exact_log_likelihood(self.decoder, x, self.noise_var, **options)

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None, observed=None):
        """Evaluate log p(x), exactly: x [B, D] -> Estimate of value [B], standard_error zero, ess one.

        num_samples, proposal and generator are there for the contract and change nothing; chunk: data at a time.
        """
        options = {"observed": observed, "chunk": chunk, "max_regions": self.max_regions}
        value = exact_log_likelihood(self.decoder, x, self.noise_var, **options)
        return Estimate(value, torch.zeros_like(value), torch.ones_like(value))

    def sample_latents(self, num, *, generator=None):
        """Draw z from the prior, [num, K]."""
        like = self.log_noise_var
        return torch.randn(num, self.latent_dim, generator=generator, dtype=like.dtype, device=like.device)

    def sample(self, num, *, generator=None):
        """Draw x from the model, noise included, [num, D]."""
        mean = self.decoder(self.sample_latents(num, generator=generator))
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.noise_var.sqrt() * noise

    def reconstruct(self, x, *, num_samples=1, generator=None, observed=None):
        """Return the mean of p(x' | z) over the exact posterior, [B, D], whatever num_samples is.

        Where a coordinate was not observed this is its conditional mean given those that were.
        """
        network, x64, noise, mask = _prepare(self.decoder, x, self.noise_var, observed, 0.0)
        answer = _solve(network, x64, noise, mask, None, self.max_regions)
        A, b = _affine_maps(network.plain().layers, _unit_slopes(network.plain(), answer.codes))
        return _output_mean(A[-1], b[-1], answer.e0, answer.e1).to(x.dtype)

    def impute(self, x, observed):
        """Fill in what was not observed by its exact posterior mean, [B, D]: see `impute`."""
        return impute(self.decoder, x, self.noise_var, observed, max_regions=self.max_regions)
