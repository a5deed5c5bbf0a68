"""Geometry of chapter 5 alone: how a piecewise-affine decoder cuts its latent space, in one, two or more dimensions.

Private to `analytic_em`, and apart from it because it knows nothing of probability: intervals are cut at roots,
polygons
are clipped by lines, polytopes are split by linear programmes. All in float64, without gradients.
"""

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, HalfspaceIntersection

__all__ = ["intervals", "polygons", "polytopes", "vertices"]


def _too_many(count, max_regions, layer):
    raise ValueError(
        f"max_regions is {max_regions}, but the decoder has at least {count} regions (reached in hidden "
        f"layer {layer + 1}): choose fewer latents or hidden units, or raise max_regions"
    )


def _activate(slope, offset, point, leak):
    """Codes [R, H] at interior points [R, K], and the affine map of the layer's output on each cell."""
    code = torch.einsum("rhk,rk->rh", slope, point) + offset > 0
    q = torch.where(code, 1.0, leak)
    return code, q[..., None] * slope, q * offset


def intervals(layers, leaks, max_regions):
    """Cut the line at every unit's roots, layer by layer.

    layers: [(W, b)] of the hidden layers; leaks: [H] slopes left of zero. Returns cells [R, 2] (the outer ends
    infinite,
    in order), interior points [R, 1], and codes, one [R, H] bool a layer.
    """
    like = layers[0][0] if layers else torch.zeros(1, dtype=torch.float64)
    infinity = torch.full((1,), torch.inf, dtype=like.dtype, device=like.device)
    knots = torch.cat([-infinity, infinity])
    slope, offset = torch.ones_like(knots[:1])[:, None, None], torch.zeros_like(knots[:1])[:, None]
    point, codes = torch.zeros_like(knots[:1])[:, None], []
    for number, ((W, b), leak) in enumerate(zip(layers, leaks, strict=True)):
        slope, offset = W @ slope, offset @ W.T + b
        root = -offset / slope[..., 0] + 0.0  # infinite or NaN for a constant unit: no comparison holds
        inside = (root > knots[:-1, None]) & (root < knots[1:, None]) & ((leak != 1) & (slope[..., 0] != 0))
        new = torch.unique(torch.cat([knots, root[inside]]))
        if len(new) - 1 > max_regions:
            _too_many(len(new) - 1, max_regions, number)
        left, right = new[:-1], new[1:]
        point = torch.where(torch.isinf(left), right - 1, torch.where(torch.isinf(right), left + 1, (left + right) / 2))
        point = torch.nan_to_num(point, nan=0.0, posinf=0.0, neginf=0.0)[:, None]
        parent = torch.searchsorted(knots, left.contiguous(), right=True) - 1
        code, slope, offset = _activate(slope[parent], offset[parent], point, leak)
        codes, knots = [c[parent] for c in codes] + [code], new
    return torch.stack([knots[:-1], knots[1:]], -1), point, codes


def _clip(vertices, count, side):
    """Keep of each convex polygon [R, V, 2] the part with side >= 0, side [R, V]: a vectorised Sutherland-Hodgman
    pass."""
    R, V, _ = vertices.shape
    j = torch.arange(V, device=vertices.device)
    valid = j < count[:, None]
    following = torch.where(j + 1 < count[:, None], j + 1, 0)
    next_side = side.gather(1, following)
    next_vertex = vertices.gather(1, following[..., None].expand(-1, -1, 2))
    crossing = valid & (side * next_side < 0)
    t = torch.where(crossing, side / torch.where(crossing, side - next_side, 1.0), 0.0)
    cut = vertices + t[..., None] * (next_vertex - vertices)
    points = torch.stack([vertices, cut], 2).reshape(R, 2 * V, 2)
    keep = torch.stack([valid & (side >= 0), crossing], 2).reshape(R, 2 * V)
    return _compact(points, keep)


def _compact(points, keep):
    """Move the kept vertices to the front, in order, and repeat the last one as padding: [R, V', 2] and counts [R]."""
    count = keep.sum(1)
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)
    j = torch.arange(int(count.max()), device=points.device).expand(len(points), -1)
    order = order.gather(1, torch.minimum(j, count[:, None] - 1))
    return points.gather(1, order[..., None].expand(-1, -1, 2)), count


def _pad(vertices, width):
    return torch.cat([vertices, vertices[:, -1:].expand(-1, width - vertices.shape[1], -1)], 1)


def _centre(vertices, count):
    valid = torch.arange(vertices.shape[1], device=vertices.device) < count[:, None]
    return (vertices * valid[..., None]).sum(1) / count[:, None]


def polygons(layers, leaks, max_regions, box, device):
    """Cut the square |z_i| <= box by every unit's line, layer by layer, all cells at once.

    Returns cells [R, V, 2] (counter-clockwise vertices, padded by repeating the last), interior points [R, 2], codes.
    """
    square = box * torch.tensor([[[-1.0, -1], [1, -1], [1, 1], [-1, 1]]], dtype=torch.float64, device=device)
    vertices, count = square, torch.full((1,), 4, device=device)
    slope, offset = torch.eye(2, dtype=torch.float64, device=device)[None], torch.zeros_like(square[:, 0])
    codes = []
    for number, ((W, b), leak) in enumerate(zip(layers, leaks, strict=True)):
        slope, offset = W @ slope, offset @ W.T + b
        parent = torch.arange(len(vertices), device=device)
        for unit in range(len(b)):
            if leak[unit] == 1:
                continue
            side = torch.einsum("rvk,rk->rv", vertices, slope[parent, unit]) + offset[parent, unit, None]
            # A vertex on the line to rounding belongs to both sides.
            side = torch.where(side.abs() <= 1e-12 * side.abs().amax(1, keepdim=True).clamp_min(1.0), 0.0, side)
            cut = (side > 0).any(1) & (side < 0).any(1)
            num_cut = int(cut.sum())
            if num_cut == 0:
                continue
            if len(vertices) + num_cut > max_regions:
                _too_many(len(vertices) + num_cut, max_regions, number)
            parts = [
                (vertices[~cut], count[~cut]),
                _clip(vertices[cut], count[cut], side[cut]),
                _clip(vertices[cut], count[cut], -side[cut]),
            ]
            width = max(p.shape[1] for p, _ in parts)
            vertices = torch.cat([_pad(p, width) if len(p) else p.new_zeros(0, width, 2) for p, _ in parts])
            count = torch.cat([n for _, n in parts])
            parent = torch.cat([parent[~cut], parent[cut], parent[cut]])
        code, slope, offset = _activate(slope[parent], offset[parent], _centre(vertices, count), leak)
        codes = [c[parent] for c in codes] + [code]
    return vertices, _centre(vertices, count), codes


def _chebyshev(normals, offsets):
    """Centre and radius of the largest ball in {z : normals z + offsets >= 0}, by a linear programme."""
    size = normals.shape[1]
    rows = np.hstack([-normals, np.linalg.norm(normals, axis=1)[:, None]])
    answer = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=rows,
        b_ub=offsets,
        bounds=[(None, None)] * size + [(None, 1e6)],
        method="highs",
    )
    return (answer.x[:-1], answer.x[-1]) if answer.status == 0 else (None, -1.0)


def polytopes(layers, leaks, max_regions, box, num_latents):
    """Split the cube |z_i| <= box by every unit's plane, one linear programme a side: the general, slow route.

    Returns cells, a list of (normals [m, K], offsets [m]) with normals z + offsets >= 0; interior points [R, K]; codes.
    """
    identity = np.eye(num_latents)
    cube = (np.vstack([identity, -identity]), np.full(2 * num_latents, float(box)))
    cells = [(*cube, np.zeros(num_latents), identity, np.zeros(num_latents), [])]
    for number, ((W, b), leak) in enumerate(zip(layers, leaks, strict=True)):
        W, b, leak = W.cpu().numpy(), b.cpu().numpy(), leak.cpu().numpy()
        for unit in range(len(b)):
            split = []
            for normals, offsets, point, slope, offset, code in cells:
                a, c = W[unit] @ slope, W[unit] @ offset + b[unit]
                sides = []
                if leak[unit] != 1 and np.linalg.norm(a) > 1e-14:
                    for sign in (1.0, -1.0):
                        half = np.vstack([normals, sign * a]), np.append(offsets, sign * c)
                        centre, radius = _chebyshev(*half)
                        if radius > 1e-9:
                            sides.append((*half, centre, slope, offset, code))
                split += sides if len(sides) == 2 else [(normals, offsets, point, slope, offset, code)]
            cells = split
            if len(cells) > max_regions:
                _too_many(len(cells), max_regions, number)
        after = []
        for normals, offsets, point, slope, offset, code in cells:
            a, c = W @ slope, W @ offset + b
            on = a @ point + c > 0
            q = np.where(on, 1.0, leak)
            after.append((normals, offsets, point, q[:, None] * a, q * c, [*code, on]))
        cells = after
    codes = [torch.as_tensor(np.array([cell[5][i] for cell in cells])) for i in range(len(layers))]
    return [cell[:2] for cell in cells], torch.as_tensor(np.array([cell[2] for cell in cells])), codes


def vertices(normals, offsets):
    """The vertices of a bounded polytope {z : normals z + offsets >= 0}, and the facets of its hull by their
    numbers."""
    normals, offsets = normals.cpu().numpy().astype(float), offsets.cpu().numpy().astype(float)
    centre, _ = _chebyshev(normals, offsets)
    points = HalfspaceIntersection(np.hstack([-normals, -offsets[:, None]]), centre).intersections
    points = np.unique(points[np.isfinite(points).all(1)], axis=0)
    return centre, points, ConvexHull(points).simplices
