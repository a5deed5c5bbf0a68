"""The from-scratch code of book/05_analytic_em. Written by `make scratch`; edit the chapter."""

# --- book/05_analytic_em/01_regions.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/05_analytic_em/01_regions.ipynb, cell 34c8210e
def decode(layers, z, slope):
    """Output [N, D] of the decoder [(W [out, in], v [out]), ...] at z [N, K]."""
    h = z
    for W, v in layers[:-1]:
        u = np.dot(h, W.T) + v
        h = np.where(u > 0, u, slope * u)
    return np.dot(h, layers[-1][0].T) + layers[-1][1]


def small_decoder():
    """One latent, three hidden units, two outputs: small enough to follow by hand."""
    return [(np.array([[1.0], [-0.8], [0.5]]), np.array([0.3, -0.4, -0.6])),
            (np.array([[1.0, -0.5, 0.7], [0.2, 0.9, -1.1]]), np.array([0.1, -0.2]))]


# --- book/05_analytic_em/01_regions.ipynb, cell be5f7765
def affine_maps(layers, codes, slope):
    """A [R, D, K] and b [R, D] for codes, a list of [R, H_l] booleans,
    one a hidden layer."""
    W, v = layers[0]
    A = np.repeat(W[None], len(codes[0]), axis=0)
    b = np.repeat(v[None], len(codes[0]), axis=0)
    for (W, v), code in zip(layers[1:], codes, strict=False):
        q = np.where(code, 1.0, slope)
        A = np.einsum("oh,rhk->rok", W, q[:, :, None] * A)
        b = np.dot(q * b, W.T) + v
    return A, b


# --- book/05_analytic_em/01_regions.ipynb, cell 91a9d883
def partition_1d(layers, slope):
    """Knots [R + 1] from -inf to inf, and codes, a list of [R, H_l],
    of a decoder with one latent."""
    knots = np.array([-np.inf, np.inf])
    A, b = np.ones((1, 1)), np.zeros((1, 1))            # h = A z + b on each interval
    codes = []
    for W, v in layers[:-1]:
        A, b = np.dot(A, W.T), np.dot(b, W.T) + v
        root = -b / np.where(A == 0, np.nan, A)
        inside = (root > knots[:-1, None]) & (root < knots[1:, None])
        new = np.unique(np.concatenate([knots, root[inside]]))
        left, right = new[:-1], new[1:]
        middle = np.where(np.isinf(left), right - 1, np.where(np.isinf(right), left + 1,
                          (np.maximum(left, -1e9) + np.minimum(right, 1e9)) / 2))
        middle = np.where(np.isinf(middle), 0.0, middle)[:, None]
        parent = np.searchsorted(knots, left, side="right") - 1
        code = A[parent] * middle + b[parent] > 0
        q = np.where(code, 1.0, slope)
        A, b, knots = q * A[parent], q * b[parent], new
        codes = [c[parent] for c in codes] + [code]
    return knots, codes


# --- book/05_analytic_em/02_one_region.ipynb, cell 915c1a78
import autograd.numpy as np
from scipy.special import erf, erfcx


# --- book/05_analytic_em/02_one_region.ipynb, cell 9aceabf6
def piece(x, A, b, noise_var):
    """One region without its ends, isotropic noise: mu [N, K], Sigma [K, K]
    and log kappa [N]."""
    D, K = A.shape
    scale = np.sqrt(noise_var)
    r, A = (x - b) / scale, A / scale
    precision = np.eye(K) + np.dot(A.T, A)
    mu = np.linalg.solve(precision, np.dot(A.T, r.T)).T
    fit = np.sum((r - np.dot(mu, A.T)) ** 2, 1) + np.sum(mu ** 2, 1)
    log_det = np.log(np.linalg.det(precision)) + D * np.log(2 * np.pi * noise_var)
    return mu, np.linalg.inv(precision), -0.5 * (log_det + fit)


# --- book/05_analytic_em/02_one_region.ipynb, cell 44f8b480
def density(t):
    """Standard normal density."""
    return np.exp(-0.5 * t ** 2) / np.sqrt(2 * np.pi)


def around_zero(a, b):
    """log mass, mean, mean square on an interval that holds zero: erf adds."""
    a0, b0 = np.where(np.isinf(a), 0.0, a), np.where(np.isinf(b), 0.0, b)
    Z = np.maximum(0.5 * (erf(b / np.sqrt(2)) - erf(a / np.sqrt(2))), 1e-300)
    return (np.log(Z), (density(a) - density(b)) / Z,
            1 + (a0 * density(a) - b0 * density(b)) / Z)


def beyond_zero(a, b):
    """The same for 0 <= a < b: scaled by erfcx."""
    a, b0 = np.maximum(a, 0.0), np.where(np.isinf(b), 0.0, b)
    fall = np.where(np.isinf(b), 0.0,
                    np.exp(np.minimum(0.5 * (a - b0) * (a + b0), 0.0)))
    E = np.maximum(erfcx(a / np.sqrt(2)) - fall * erfcx(b0 / np.sqrt(2)), 1e-300)
    rate = np.sqrt(2 / np.pi) / E
    return -0.5 * a ** 2 + np.log(E / 2), rate * (1 - fall), 1 + rate * (a - fall * b0)


# --- book/05_analytic_em/02_one_region.ipynb, cell e9611385
def thin_slice(a, width):
    """The same for a finite a and a small width: three Gauss-Legendre nodes."""
    node = 0.5 + np.sqrt(0.15) * np.array([-1.0, 0.0, 1.0])
    t = width[..., None] * node
    w = np.array([5, 8, 5]) / 18 * np.exp(-t * (a[..., None] + 0.5 * t))
    total, point = np.sum(w, -1), a[..., None] + t
    mass = np.maximum(width, 1e-300) * total / np.sqrt(2 * np.pi)
    log_Z = -0.5 * a ** 2 + np.log(mass)
    return log_Z, np.sum(w * point, -1) / total, np.sum(w * point ** 2, -1) / total


def truncated(a, b):
    """log mass, mean and mean square of the standard normal on [a, b];
    ends may be infinite."""
    flip = a + b < 0
    a, b = np.where(flip, -b, a), np.where(flip, -a, b)
    finite = np.isfinite(a) & np.isfinite(b)
    a0 = np.where(finite, a, 0.0)
    width = np.where(finite, b, 1.0) - a0
    thin = finite & (width * (1 + np.abs(a0)) < 1e-3)
    cases = zip(thin_slice(a0, np.where(thin, width, 0.0)), beyond_zero(a, b),
                around_zero(a, b), strict=True)
    log_Z, mean, square = (np.where(thin, x, np.where(a >= 0, y, z))
                           for x, y, z in cases)
    return log_Z, np.where(flip, -mean, mean), square


# --- book/05_analytic_em/03_exact_posterior.ipynb, cell f3d6e67a
import autograd.numpy as np
from autograd.scipy.special import logsumexp
from autograd.scipy.stats import norm


# --- book/05_analytic_em/03_exact_posterior.ipynb, cell c906ff28
def e_step(layers, x, noise_var, slope):
    """log p(x) [N] and the posterior moments on every region, e0, e1, e2 [N, R];
    one latent."""
    knots, codes = partition_1d(layers, slope)
    A, b = affine_maps(layers, codes, slope)
    parts = [piece(x, A[r], b[r], noise_var) for r in range(len(A))]
    mu = np.stack([p[0][:, 0] for p in parts], 1)
    s = np.sqrt(np.stack([p[1][0, 0] for p in parts]))
    log_kappa = np.stack([p[2] for p in parts], 1)
    log_mass, mean, square = truncated((knots[:-1] - mu) / s, (knots[1:] - mu) / s)
    log_px = logsumexp(log_kappa + log_mass, axis=1)
    e0 = np.exp(log_kappa + log_mass - log_px[:, None])
    e1 = e0 * (mu + s * mean)
    e2 = e0 * (mu ** 2 + 2 * mu * s * mean + s ** 2 * square)
    return log_px, e0, e1, e2


# --- book/05_analytic_em/03_exact_posterior.ipynb, cell 02f19ad9
def log_likelihood(layers, x, noise_var, slope, knots, codes):
    """Mean log p(x), differentiable by autograd with knots and codes held fixed;
    one latent."""
    A, b = affine_maps(layers, codes, slope)
    A = A[:, :, 0] / np.sqrt(noise_var)                                   # [R, D]
    r = (x[:, None] - b) / np.sqrt(noise_var)                             # [N, R, D]
    s = 1 / np.sqrt(1 + np.sum(A ** 2, 1))
    mu = s ** 2 * np.sum(r * A, 2)
    log_kappa = (np.log(s) - 0.5 * x.shape[1] * np.log(2 * np.pi * noise_var)
                 - 0.5 * np.sum((r - mu[:, :, None] * A) ** 2, 2) - 0.5 * mu ** 2)
    mass = norm.cdf((knots[1:] - mu) / s) - norm.cdf((knots[:-1] - mu) / s)
    return np.mean(logsumexp(log_kappa + np.log(mass), axis=1))


# --- book/05_analytic_em/04_em.ipynb, cell cd1a0996
def input_map(layers, codes, slope, layer):
    """h = G z + c, the input of a layer on every region, one latent:
    G [R, p], c [R, p]."""
    if layer == 0:
        R = len(codes[0])
        return np.ones((R, 1)), np.zeros((R, 1))
    A, b = affine_maps(layers[:layer], codes, slope)
    q = np.where(codes[layer - 1], 1.0, slope)
    return q * A[:, :, 0], q * b


def output_maps(layers, codes, slope):
    """F of every layer, a list of [R, D, H_l]:
    from its pre-activation to the output."""
    D, R = len(layers[-1][1]), len(codes[0])
    F = [np.repeat(np.eye(D)[None], R, axis=0)]
    for (W, _), code in zip(layers[:0:-1], codes[::-1], strict=True):
        F.insert(0, np.einsum("rdo,oh->rdh", F[0], W)
                 * np.where(code, 1.0, slope)[:, None])
    return F


# --- book/05_analytic_em/04_em.ipynb, cell 3a267fda
def outer(a, b):
    """Outer products of rows: [R, p], [R, q] -> [R, p, q]."""
    return a[:, :, None] * b[:, None, :]


# --- book/05_analytic_em/04_em.ipynb, cell c64c7189
def direction(layers, x, noise_var, slope, layer):
    """[W v] of one layer that maximises the surrogate, isotropic noise, one latent."""
    codes = partition_1d(layers, slope)[1]
    _, e0, e1, e2 = e_step(layers, x, noise_var, slope)
    G, c = input_map(layers, codes, slope, layer)
    G = np.concatenate([G, np.zeros((len(G), 1))], 1)
    c = np.concatenate([c, np.ones((len(c), 1))], 1)
    s0, s1, s2 = (np.sum(e, 0)[:, None, None] for e in (e0, e1, e2))
    H = s2 * outer(G, G) + s1 * (outer(G, c) + outer(c, G)) + s0 * outer(c, c)
    with_x = outer(np.dot(e1.T, x), G) + outer(np.dot(e0.T, x), c)
    F = output_maps(layers, codes, slope)
    r = sum((np.dot(F[j], layers[j][1]) for j in range(layer + 1, len(layers))),
            np.zeros((len(G), x.shape[1])))
    first = s1[:, :, 0] * G + s0[:, :, 0] * c
    B = np.einsum("rds,rdk->sk", F[layer], with_x - outer(r, first))
    U = np.einsum("rds,rdt->rst", F[layer], F[layer])
    K = np.einsum("rst,rkl->sktl", U, H).reshape(B.size, B.size)
    ridge = 1e-10 * np.mean(np.diag(K)) * np.eye(B.size)   # keeps weights without data
    old = np.concatenate([layers[layer][0], layers[layer][1][:, None]], 1)
    new = np.linalg.solve(K + ridge, B.ravel() + np.dot(ridge, old.ravel()))
    return new.reshape(B.shape)


# --- book/05_analytic_em/04_em.ipynb, cell ae4c10c1
def noise_update(layers, x, noise_var, slope):
    """The isotropic noise variance that maximises the surrogate, one latent."""
    codes = partition_1d(layers, slope)[1]
    _, e0, e1, e2 = e_step(layers, x, noise_var, slope)
    A, b = affine_maps(layers, codes, slope)
    r = x[:, None] - b
    square = np.sum(r ** 2, 2) * e0 - 2 * np.sum(r * A[:, :, 0], 2) * e1 \
        + np.sum(A[:, :, 0] ** 2, 1) * e2
    return np.sum(square) / x.size


# --- book/05_analytic_em/04_em.ipynb, cell ac779d76
def gem_iteration(layers, x, noise_var, slope):
    """One round of generalised EM over all layers and the noise:
    never lowers the likelihood."""
    value = lambda net, v: np.mean(e_step(net, x, v, slope)[0])
    layers = list(layers)
    for layer in reversed(range(len(layers))):
        old = np.concatenate([layers[layer][0], layers[layer][1][:, None]], 1)
        new = direction(layers, x, noise_var, slope, layer)
        now, step = value(layers, noise_var), 1.0
        while step > 1e-4:
            W = (1 - step) * old + step * new
            trial = layers[:layer] + [(W[:, :-1], W[:, -1])] + layers[layer + 1:]
            if value(trial, noise_var) >= now:
                layers = trial
                break
            step *= 0.3
    return layers, noise_update(layers, x, noise_var, slope)


# --- book/05_analytic_em/05_two_latents.ipynb, cell 9b43a344
import autograd.numpy as np
from scipy.special import erfcx, ndtr, owens_t


# --- book/05_analytic_em/05_two_latents.ipynb, cell bef9aa24
def clip(polygon, a, c):
    """The part of a convex polygon [V, 2] where a.z + c >= 0."""
    side, corners = np.dot(polygon, a) + c, []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        if side[i] >= 0:
            corners.append(polygon[i])
        if side[i] * side[j] < 0:
            share = side[i] / (side[i] - side[j])
            corners.append(polygon[i] + share * (polygon[j] - polygon[i]))
    return np.array(corners)


# --- book/05_analytic_em/05_two_latents.ipynb, cell 7f35c703
def partition_2d(layers, slope, box=50.0):
    """Polygons [V, 2], and A [D, 2], b [D] of each, for a decoder with two latents."""
    square = box * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    cells = [(square, np.eye(2), np.zeros(2))]
    for W, v in layers[:-1]:
        after = []
        for polygon, A, b in cells:
            A, b, parts = np.dot(W, A), np.dot(W, b) + v, [polygon]
            for a, c in zip(A, b, strict=True):
                halves = [clip(p, s * a, s * c) for p in parts for s in (1.0, -1.0)]
                parts = [p for p in halves if len(p) > 2]
            for part in parts:
                q = np.where(np.dot(A, np.mean(part, 0)) + b > 0, 1.0, slope)
                after.append((part, q[:, None] * A, q * b))
        cells = after
    W, v = layers[-1]
    return [(p, np.dot(W, A), np.dot(W, b) + v) for p, A, b in cells]


# --- book/05_analytic_em/05_two_latents.ipynb, cell fa74fd5d
def polygon_moments(u):
    """Integrals of 1, u and u u^T under the standard normal over a polygon [V, 2]."""
    side = np.roll(u, -1, axis=0) - u
    length = np.sqrt(np.sum(side ** 2, 1))
    tangent = side / length[:, None]
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], 1)
    h, s1 = np.sum(normal * u, 1), np.sum(tangent * u, 1)
    s2 = s1 + length
    phi = lambda x: np.exp(-0.5 * x ** 2) / np.sqrt(2 * np.pi)
    zero = 1.0 * np.all(h > 0) - np.sum(owens_t(h, s2 / h) - owens_t(h, s1 / h))
    mass = phi(h) * (ndtr(s2) - ndtr(s1))
    first = -np.sum(normal * mass[:, None], 0)
    second = zero * np.eye(2) - np.einsum("v,vi,vj->ij", h * mass, normal, normal) \
        - np.einsum("v,vi,vj->ij", phi(h) * (phi(s1) - phi(s2)), tangent, normal)
    return zero, first, 0.5 * (second + second.T)


# --- book/05_analytic_em/05_two_latents.ipynb, cell af587dfd
def e_step_2d(layers, x, noise_var, slope):
    """log p(x), E[z | x] and E[z z^T | x] of one datum [D]; two latents,
    no tail formula."""
    terms = []
    for polygon, A, b in partition_2d(layers, slope):
        precision = np.eye(2) + np.dot(A.T, A) / noise_var
        C = np.linalg.cholesky(precision)
        mu = np.linalg.solve(precision, np.dot(A.T, x - b)) / noise_var
        fit = np.sum((x - b - np.dot(A, mu)) ** 2) / noise_var + np.sum(mu ** 2)
        log_kappa = -0.5 * (fit + len(x) * np.log(2 * np.pi * noise_var)) \
            - np.sum(np.log(np.diag(C)))
        zero, first, second = polygon_moments(np.dot(polygon - mu, C))
        back = np.linalg.inv(C).T                       # z = mu + back u
        shift = np.dot(back, first)
        terms.append((np.exp(log_kappa) * np.array([zero]),
                      np.exp(log_kappa) * (mu * zero + shift),
                      np.exp(log_kappa) * (zero * np.outer(mu, mu) + np.outer(mu, shift)
                                           + np.outer(shift, mu)
                                           + back @ second @ back.T)))
    mass, mean, square = (sum(term) for term in zip(*terms, strict=True))
    return np.log(mass[0]), mean / mass[0], square / mass[0]
