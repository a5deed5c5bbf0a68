"""Integrals of a normal density over intervals, polygons and polytopes, with first and second moments.

Private to `analytic_em`. All functions work in whitened coordinates: the density is the standard normal one, and the
cell is moved. An integral comes as exp(log_scale) (zero, first, second) with zero = int phi, first = int u phi and
second = int u u^T phi, so that a cell forty standard deviations away does not underflow.
"""

import itertools
import math

import numpy as np
import torch

__all__ = ["interval", "owens_t", "polygon", "polygon_tail", "polytope"]

ROOT_2 = math.sqrt(2.0)
ROOT_2PI = math.sqrt(2 * math.pi)


def _phi(u):
    return torch.exp(-0.5 * u * u) / ROOT_2PI


def _cdf(u):
    return 0.5 * torch.special.erfc(-u / ROOT_2)


def _nodes(num, like):
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return (
        torch.as_tensor((nodes + 1) / 2, dtype=like.dtype, device=like.device),
        torch.as_tensor(weights / 2, dtype=like.dtype, device=like.device),
    )


def interval(a, b):
    """Integrate the standard normal over [a, b], any shape, ends possibly infinite: (log_mass, mean, mean square).

    Equations eq-ae-interval and eq-ae-erfcx: reflect so that a + b >= 0; add error functions where the interval
    holds 0;
    use erfcx beyond it; three Gauss-Legendre nodes where it is too narrow for differences.
    """
    flip = a + b < 0
    a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
    finite = torch.isfinite(b)
    width = b - a
    # Around zero: both terms are positive, nothing cancels.
    mass = 0.5 * (torch.erf(b / ROOT_2) - torch.erf(a / ROOT_2))
    density_a, density_b = _phi(a), _phi(b)
    safe_a, safe_b = torch.where(torch.isfinite(a), a, 0.0), torch.where(finite, b, 0.0)
    positive = mass.clamp_min(1e-300)
    near = (
        torch.log(positive),
        (density_a - density_b) / positive,
        1 + (safe_a * density_a - safe_b * density_b) / positive,
    )
    # Beyond zero, scaled by exp(a^2 / 2).
    start = safe_a.clamp_min(0.0)
    fall = torch.where(finite, torch.exp(0.5 * (start - b) * (start + b)), 0.0)
    scaled = (torch.special.erfcx(start / ROOT_2) - fall * torch.special.erfcx(safe_b / ROOT_2)).clamp_min(1e-300)
    rate = math.sqrt(2 / math.pi) / scaled
    far = (-0.5 * start**2 + torch.log(scaled / 2), rate * (1 - fall), 1 + rate * (start - fall * safe_b))
    # Narrow: the integrand is nearly constant, so a positive three-point rule is exact to rounding.
    h = torch.where(finite, width, 0.0)
    nodes, weights = _nodes(3, a)
    t = nodes * h[..., None]
    w = weights * torch.exp(-t * (safe_a[..., None] + 0.5 * t))
    total = w.sum(-1)
    point = safe_a[..., None] + t
    narrow = (
        -0.5 * safe_a**2 + torch.log(h * total / ROOT_2PI),
        (w * point).sum(-1) / total,
        (w * point**2).sum(-1) / total,
    )
    thin = finite & (width * (1 + safe_a.abs()) < 1e-3)
    log_mass, mean, square = (
        torch.where(thin, n, torch.where(a >= 0, f, c)) for n, f, c in zip(narrow, far, near, strict=True)
    )
    mean = torch.minimum(torch.maximum(mean, a), b)
    return log_mass, torch.where(flip, -mean, mean), square


def owens_t(h, a, num_nodes=16):
    """Owen's T(h, a) = int_0^a exp(-h^2 (1 + y^2) / 2) / (2 pi (1 + y^2)) dy, to 1e-16 absolutely, by Gauss-Legendre.

    For |a| > 1 by its complement T(a h, 1 / a); a may be infinite. eq-ae-owen.
    """
    h, slope = torch.broadcast_tensors(h.abs(), a.abs())
    steep = slope > 1
    product = torch.where(h == 0, 0.0, h * slope)
    x, y = torch.where(steep, product, h), torch.where(steep, 1 / slope, slope)
    nodes, weights = _nodes(num_nodes, h)
    half, total = -0.5 * x * x, torch.zeros_like(x)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        s = 1 + (node * y) ** 2
        total += weight * torch.exp(half * s) / s
    value = y * total / (2 * math.pi)
    # 1/2 [Phi(h) Q(ah) + Q(h) Phi(ah)] written without differences of numbers near one.
    upper_h, upper_ah = 0.5 * torch.special.erfc(h / ROOT_2), 0.5 * torch.special.erfc(product / ROOT_2)
    complement = 0.5 * ((1 - upper_h) * upper_ah + upper_h * (1 - upper_ah)) - value
    return torch.sign(a) * torch.where(steep, complement, value)


def _dot(a, b):
    """Inner product over a last axis of two: a sum over so short an axis is slow."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1]


def _edges(cells, factor, centre, original=None):
    """Edges of whitened polygons: tangents, outward normals, their distances h and end abscissae s1, s2; real [..,
    V]."""
    vertices = cells @ factor
    side = torch.roll(vertices, -1, -2) - vertices
    length = torch.linalg.vector_norm(side, dim=-1)
    # The last vertex is repeated as padding: the repeats, compared before any rounding, are no edges.
    original = cells if original is None else original
    real = (torch.roll(original, -1, -2) != original).any(-1) & (length > 0)
    tangent = torch.where(real[..., None], side / length.clamp_min(1e-300)[..., None], 0.0)
    normal = torch.stack([tangent[..., 1], -tangent[..., 0]], -1)
    h = _dot(normal, vertices) - _dot(normal, centre[..., None, :])
    s1 = _dot(tangent, vertices) - _dot(tangent, centre[..., None, :])
    return tangent, normal, h, s1, s1 + length, real


def polygon_distance(cells, factor, centre):
    """How far outside of whitened polygons the origin lies, at least: [N, R], the largest distance beyond an edge.

    Arguments as for `polygon`; zero for polygons that hold the origin.
    """
    _, _, h, _, _, real = _edges(cells, factor, centre)
    return torch.where(real, -h, 0.0).amax(-1).clamp_min(0.0)


def _moments_from_edges(zero, tangent, normal, h, mass, left, right):
    """First and second moments [.., 2], [.., 2, 2]: mass = phi(h)[Phi(s2) - Phi(s1)], left, right = phi(h) phi(s)."""
    first = -(normal * mass[..., None]).sum(-2)
    second = torch.einsum("...v,...vi,...vj->...ij", -h * mass, normal, normal)
    second = second - torch.einsum("...v,...vi,...vj->...ij", left - right, tangent, normal)
    identity = torch.eye(2, dtype=zero.dtype, device=zero.device)
    second = zero[..., None, None] * identity + 0.5 * (second + second.transpose(-1, -2))
    return first, second


def polygon(cells, factor, centre):
    """Integrate N(u; 0, I), u = factor^T z - centre, over convex polygons: (zero, first, second), absolute error 1e-16.

    cells [R, V, 2] counter-clockwise, padded by repeats; factor [.., R, 2, 2] with positive determinant; centre
    [N, R, 2]. eq-ae-polygon-mass by Owen's T along the edges, eq-ae-polygon-first and -second by the divergence
    theorem.
    """
    tangent, normal, h, s1, s2, real = _edges(cells, factor, centre)
    h = torch.where(real, torch.where(h == 0, 1e-300, h), 1.0)
    s1, s2 = torch.where(real, s1, 0.0), torch.where(real, s2, 0.0)
    # Whether the origin is inside, as the angles under which it sees the edges: they add up to one turn or none, and on
    # an edge or a corner to the right share of a turn, where an indicator would be wrong by that share.
    turn = (torch.atan(s2 / h) - torch.atan(s1 / h)) / (2 * math.pi)
    zero = (turn - (owens_t(h, s2 / h) - owens_t(h, s1 / h))).sum(-1)
    density = _phi(h) * real
    moments = _moments_from_edges(
        zero, tangent, normal, h, density * (_cdf(s2) - _cdf(s1)), density * _phi(s1), density * _phi(s2)
    )
    return zero.clamp_min(0.0), *moments


def polygon_tail(vertices, cells):
    """The same for whitened polygons [P, V, 2] that do not hold the origin, to a small relative error however far.

    cells: the polygons before whitening, which tell edges from padding.
    Returns (log_scale, zero, first, second), eq-ae-tail: with d the distance to the nearest point, the polygon
    lies beyond a line at distance d, and exp(-d^2 / 2) is taken out. Eight panels of 16 nodes an edge.
    """
    identity = torch.eye(2, dtype=vertices.dtype, device=vertices.device)
    tangent, normal, h, s1, s2, real = _edges(vertices, identity, torch.zeros_like(vertices[:, 0]), cells)
    nearest = torch.where(real, (-s1).clamp(min=torch.zeros_like(s1), max=s2 - s1), 0.0)
    point = vertices + nearest[..., None] * tangent
    squared = (point**2).sum(-1)
    best = squared.argmin(-1, keepdim=True)
    d2 = squared.gather(1, best)
    towards = point.gather(1, best[..., None].expand(-1, -1, 2))[:, 0]
    towards = towards / torch.linalg.vector_norm(towards, dim=-1, keepdim=True).clamp_min(1e-300)
    # Nodes only where exp(-(|u|^2 - d^2) / 2) is above exp(-40).
    reach = torch.sqrt((d2 + 81 - h * h).clamp_min(0.0))
    low, high = torch.maximum(s1, -reach), torch.minimum(s2, reach)
    step = torch.where(real, (high - low).clamp_min(0.0), 0.0) / 8
    nodes, weights = _nodes(16, h)
    fractions = (torch.arange(8, device=h.device)[:, None] + nodes).reshape(-1)
    s = low[..., None] + step[..., None] * fractions
    along = (normal * towards[:, None]).sum(-1)[..., None] * h[..., None] + (tangent * towards[:, None]).sum(-1)[
        ..., None
    ] * s
    along = along.clamp_min(0.0)  # edges out of reach have no length but may lie anywhere
    upward = towards[:, None, 0] * tangent[..., 1] - towards[:, None, 1] * tangent[..., 0]
    fall = torch.where(real, h * h - d2, 0.0)[..., None] + s * s
    integrand = 0.5 * torch.special.erfcx(along / ROOT_2) * torch.exp(-0.5 * fall)
    zero = -((integrand * weights.repeat(8)).sum(-1) * step * upward).sum(-1) / ROOT_2PI
    log_mass = torch.where(real, interval(torch.where(real, s1, 0.0), torch.where(real, s2, 1.0))[0], 0.0)
    scale = lambda log: torch.where(real, torch.exp(0.5 * (d2 - h * h) + log), 0.0) / ROOT_2PI
    normal_log = lambda s: -0.5 * s * s - math.log(ROOT_2PI)
    moments = _moments_from_edges(
        zero, tangent, normal, h, scale(log_mass), scale(normal_log(s1)), scale(normal_log(s2))
    )
    return -0.5 * d2[:, 0], zero.clamp_min(0.0), *moments


# --- Three dimensions and more: simplices, signed cones, orthants


def _orthant2(h, k, rho, root):
    """P(both >= 0) of two unit normals with means h, k and correlation rho, root = sqrt(1 - rho^2), by Owen's T."""
    h, k = (torch.where(v == 0, 1e-300, v) for v in (h, k))
    root = root.clamp_min(1e-300)
    delta = (h * k < 0).to(h)
    return (
        0.5 * (_cdf(h) + _cdf(k) - delta)
        - owens_t(h, (k - rho * h) / (h * root))
        - owens_t(k, (h - rho * k) / (k * root))
    )


def _tanh_sinh(num, like):
    """Nodes and weights on [0, 1], crowded at both ends, where a steep integrand may hide."""
    t = np.linspace(-3.2, 3.2, num)
    u = 0.5 * np.pi * np.sinh(t)
    x = 1 / (1 + np.exp(-2 * u))
    w = 0.5 * (t[1] - t[0]) * 0.5 * np.pi * np.cosh(t) / np.cosh(u) ** 2
    return (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (x, w / w.sum()))


def _orthant(mean, cov, num_nodes=400):
    """P(y >= 0) for y ~ N(mean [..., k], cov [..., k, k]): closed forms for k <= 2, above by conditioning on one
    entry."""
    k = mean.shape[-1]
    if k == 0:
        return torch.ones_like(cov.sum((-1, -2))) if cov.ndim > 2 else mean.new_ones(mean.shape[:-1])
    scale = torch.sqrt(cov.diagonal(dim1=-1, dim2=-2))
    h = mean / scale
    rho = cov / (scale[..., :, None] * scale[..., None, :])
    if k == 1:
        return _cdf(h[..., 0])
    if k == 2:
        root = torch.sqrt((cov[..., 0, 0] * cov[..., 1, 1] - cov[..., 0, 1] ** 2).clamp_min(0.0)) / (
            scale[..., 0] * scale[..., 1]
        )
        h0, h1, r, root = torch.broadcast_tensors(h[..., 0], h[..., 1], rho[..., 0, 1], root)
        return _orthant2(h0, h1, r, root)
    # Condition on the entry that is least correlated with the others.
    size = (rho.abs() - torch.eye(k, dtype=rho.dtype, device=rho.device)).amax(-1)
    order = torch.argsort(size, -1).expand(*h.shape)
    h = h.gather(-1, order)
    rho = rho.expand(*h.shape, k).gather(-2, order[..., None].expand(*h.shape, k))
    rho = rho.gather(-1, order[..., None, :].expand(*h.shape, k))
    first, rest = rho[..., 0, 1:], rho[..., 1:, 1:]
    conditional = rest - first[..., :, None] * first[..., None, :]
    low = (-h[..., :1]).clamp(-9.5, 9.5)
    steps = torch.where(first.abs() > 1e-12, -h[..., 1:] / first, 10.0).clamp(min=low, max=torch.full_like(low, 9.5))
    knots = torch.cat([low, steps.sort(-1).values, torch.full_like(low, 9.5)], -1)
    nodes, weights = _tanh_sinh(num_nodes, h)
    total = torch.zeros_like(h[..., 0])
    for panel in range(k):
        left, width = knots[..., panel, None], knots[..., panel + 1, None] - knots[..., panel, None]
        t = left + width * nodes
        inner = _orthant(h[..., None, 1:] + first[..., None, :] * t[..., None], conditional[..., None, :, :], 60)
        total = total + (weights * _phi(t) * inner).sum(-1) * width[..., 0]
    return total


def _cone(mean, cov):
    """P(y >= 0) with its gradient and Hessian in the mean, eq-ae-tallis: [...], [..., k], [..., k, k]."""
    k = mean.shape[-1]
    variance = cov.diagonal(dim1=-1, dim2=-2)
    gradient, mixed = [], torch.zeros_like(mean)[..., None].expand(*mean.shape, k).clone()
    for i in range(k):
        rest = [j for j in range(k) if j != i]
        ratio = cov[..., rest, i] / variance[..., i, None]
        conditional = cov[..., rest, :][..., rest] - ratio[..., :, None] * cov[..., None, i, rest]
        density = _phi(mean[..., i] / torch.sqrt(variance[..., i])) / torch.sqrt(variance[..., i])
        gradient.append(density * _orthant(mean[..., rest] - ratio * mean[..., i, None], conditional))
    for i, j in itertools.combinations(range(k), 2):
        rest = [m for m in range(k) if m not in (i, j)]
        pair = cov[..., [i, j], :][..., [i, j]]
        det = (pair[..., 0, 0] * pair[..., 1, 1] - pair[..., 0, 1] ** 2).clamp_min(1e-300)
        swapped = (
            torch.stack(
                [
                    torch.stack([pair[..., 1, 1], -pair[..., 0, 1]], -1),
                    torch.stack([-pair[..., 0, 1], pair[..., 0, 0]], -1),
                ],
                -2,
            )
            / det[..., None, None]
        )
        both = mean[..., [i, j]]
        density = torch.exp(-0.5 * torch.einsum("...i,...ij,...j->...", both, swapped, both)) / (
            2 * math.pi * torch.sqrt(det)
        )
        if rest:
            ratio = cov[..., rest, :][..., [i, j]] @ swapped
            shifted = mean[..., rest] - torch.einsum("...ri,...i->...r", ratio, both)
            conditional = cov[..., rest, :][..., rest] - ratio @ cov[..., [i, j], :][..., rest]
            density = density * _orthant(shifted, conditional)
        mixed[..., i, j] = mixed[..., j, i] = density
    gradient = torch.stack(gradient, -1)
    diagonal = -(mean * gradient + torch.einsum("...ij,...ij->...i", cov.expand(*mean.shape, k), mixed)) / variance
    return _orthant(mean, cov), gradient, mixed + torch.diag_embed(diagonal)


def polytope(cells, factor, centre):
    """Integrate N(u; 0, I), u = factor^T z - centre, over bounded polytopes of K >= 3 dimensions: (log_scale, zero,
    first, second).

    cells: R tuples (interior point [K], vertices [n, K], hull facets); factor [.., R, K, K], centre [N, R, K]. A fan of
    simplices from the interior point; each simplex is the signed sum of 2^(K+1) - 1 cones, eq-ae-signed; each cone
    an orthant
    probability. One region after another: a reference, not a tool. Absolute error about 1e-10 in a cube
    of half-width 12.
    """
    N, R, K = centre.shape
    zero, first = centre.new_zeros(N, R), torch.zeros_like(centre)
    second = centre.new_zeros(N, R, K, K)
    for r, (interior, vertices, facets) in enumerate(cells):
        simplices = np.concatenate([np.broadcast_to(interior, (len(facets), 1, K)), vertices[facets]], 1)
        volume = np.abs(np.linalg.det(simplices[:, 1:] - simplices[:, :1]))
        simplices = torch.as_tensor(simplices[volume > 1e-12 * volume.max()], dtype=centre.dtype, device=centre.device)
        for n in range(N):
            C = factor[..., r, :, :].expand(N, K, K)[n]
            corners = simplices @ C - centre[n, r]
            # Barycentric coordinates as K + 1 half-spaces: normals [T, K + 1, K], offsets [T, K + 1].
            affine = torch.linalg.inv(torch.cat([corners, torch.ones_like(corners[..., :1])], -1)).transpose(1, 2)
            norm = torch.linalg.vector_norm(affine[..., :K], dim=-1, keepdim=True)
            normals, offsets = affine[..., :K] / norm, affine[..., K] / norm[..., 0]
            identity = torch.eye(K, dtype=centre.dtype, device=centre.device)
            total = [(-1.0) ** K * len(simplices), torch.zeros_like(first[0, 0]), torch.zeros_like(identity)]
            for size in range(1, K + 1):
                chosen = torch.tensor(list(itertools.combinations(range(K + 1), size)), device=centre.device)
                a, c = normals[:, chosen], offsets[:, chosen]
                mass, gradient, hessian = _cone(c, a @ a.transpose(-1, -2))
                sign = (-1.0) ** (size + K)
                total[0] = total[0] + sign * mass.sum()
                total[1] = total[1] + sign * torch.einsum("tjik,tji->k", a, gradient)
                total[2] = total[2] + sign * torch.einsum("tjik,tjim,tjml->kl", a, hessian, a)
            # In whitened coordinates: int u phi = gradient, int u u^T phi = mass I + Hessian.
            zero[n, r], first[n, r], second[n, r] = total[0], total[1], total[0] * identity + total[2]
    return torch.zeros_like(zero), zero.clamp_min(0.0), first, second
