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

from dlgm_tutorial import _normal_integrals
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

__all__ = [
    "EMResult",
    "ExactPosterior",
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

        A region by its weight, then a truncated normal: K = 1 by inverting its distribution function,
        K = 2 by rejection
        from the box around the whitened polygon. Raises NotImplementedError for K >= 3.
        """
        if self._network.num_latents > 2:
            raise NotImplementedError("sample is for decoders with one or two latents; use mcmc for more")
        answer, device = self._answer, self._x.device
        uniform = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64, device=device)
        region = torch.multinomial(answer.e0, num, replacement=True, generator=generator).T  # [num, B]
        pieces, centre = self._gaussians(region)
        C = pieces.C[region]
        cells = answer.cells[region]
        if self._network.num_latents == 1:
            low, high = (C[..., 0, 0] * cells[..., i] - centre[..., 0] for i in (0, 1))
            u = _truncated_normal(low, high, uniform(*region.shape))[..., None]
        else:
            u = _normal_in_polygons(cells, C, centre, uniform)
        return torch.linalg.solve_triangular(C.transpose(-1, -2), (u + centre)[..., None], upper=True)[..., 0].to(
            self._dtype
        )

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
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
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


def _output_moments(network, codes, e0, e1, e2):
    """E[g(z)] [B, D] and E[g(z) g(z)^T] [B, D, D] from region moments of z."""
    A, b = _affine_maps(network.layers, _unit_slopes(network, codes))
    A, b = A[-1], b[-1]
    mean = torch.einsum("rdk,nrk->nd", A, e1) + e0 @ b
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
        mean = torch.einsum("rdk,nrk->nd", slope_m, e1) + e0 @ offset_m
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
