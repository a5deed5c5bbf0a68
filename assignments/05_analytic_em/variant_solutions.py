# Right answers by another road: the hidden tests must accept each with full marks. A cell's first line names its
# question.
import numpy as np
from scipy.special import erfcx, log_ndtr, logsumexp, ndtr

# %% q1_partition: from the decoder's values at points of each interval
def partition(W1, v1, W2, v2, slope):
    def g(z):
        t = z[:, None] * W1 + v1
        return np.maximum(t, 0) @ W2.T + slope * np.minimum(t, 0) @ W2.T + v2

    knots = np.array(sorted({-v / w for w, v in zip(W1, v1, strict=True) if w != 0}))
    ends = np.concatenate([knots[:1] - 1, knots, knots[-1:] + 1]) if len(knots) else np.array([0.0, 1.0])
    z1, z2 = 0.75 * ends[:-1] + 0.25 * ends[1:], 0.25 * ends[:-1] + 0.75 * ends[1:]
    A = (g(z2) - g(z1)) / (z2 - z1)[:, None]
    return knots, A, g(z1) - A * z1[:, None]

# %% q2_region: in the direction of A and across it
def region_terms(x, A, b, noise_var):
    size = np.sum(A**2, axis=1)
    direction = A / np.sqrt(size)[:, None]
    residual = x[:, None] - b
    along = np.sum(residual * direction, axis=-1)
    across = np.sum((residual - along[..., None] * direction) ** 2, axis=-1)
    D, total = x.shape[1], size + noise_var
    log_kappa = -0.5 * (along**2 / total + across / noise_var + np.log(2 * np.pi * total)
                        + (D - 1) * np.log(2 * np.pi * noise_var))
    return log_kappa, along * np.sqrt(size) / total, noise_var / total

# %% q3_interval: with SciPy's logarithm of the distribution function
def cut_normal(a, b):
    with np.errstate(invalid="ignore"):
        right_side = a + b > 0
    far, near = np.where(right_side, -b, a), np.where(right_side, -a, b)
    log_mass = log_ndtr(near) + np.log1p(-np.exp(log_ndtr(far) - log_ndtr(near)))
    density = lambda end: np.exp(-0.5 * end**2 - log_mass) / np.sqrt(2 * np.pi)
    moment = lambda end: np.nan_to_num(end, posinf=0.0, neginf=0.0) * density(end)
    return log_mass, density(a) - density(b), 1 + moment(a) - moment(b)

# %% q4_evidence: masses by the scaled complementary error function
def exact_posterior(log_kappa, mu, variance, knots):
    s = np.sqrt(variance)
    left = (np.concatenate([[-np.inf], knots]) - mu) / s
    right = (np.concatenate([knots, [np.inf]]) - mu) / s
    log_mass = np.empty_like(mu)
    for index, (a, b) in enumerate(zip(left.ravel(), right.ravel(), strict=True)):
        if a < 0 < b:
            value = np.log(ndtr(b) - ndtr(a))
        else:
            near, far = (a, b) if a >= 0 else (-b, -a)
            fall = np.exp(0.5 * (near - far) * (near + far))
            value = -0.5 * near**2 + np.log(0.5 * (erfcx(near / 2**0.5) - fall * erfcx(far / 2**0.5)))
        log_mass.ravel()[index] = value
    joint = log_kappa + log_mass
    top = joint.max(1, keepdims=True)
    share = np.exp(joint - top)
    weights = share / share.sum(1, keepdims=True)
    log_density = lambda end: -0.5 * end**2 - 0.5 * np.log(2 * np.pi)
    pull = np.exp(log_density(left) - log_mass) - np.exp(log_density(right) - log_mass)
    return top[:, 0] + np.log(share.sum(1)), weights, (weights * (mu + pull * s)).sum(1)

# %% q5_score: example by example
def denoise(x, A, b, noise_var, e0, e1):
    clean = np.array([sum(first * a + mass * c for first, mass, a, c in zip(*row, A, b, strict=True))
                      for row in zip(e1, e0, strict=True)])
    return clean, -(x - clean) / noise_var

# %% q6_polygon: by slices, with a rule of many nodes between the corners
def polygon(vertices):
    corners = np.unique(vertices[:, 0])
    t, w = np.polynomial.legendre.leggauss(60)
    mass, first = 0.0, np.zeros(2)
    following = np.roll(vertices, -1, axis=0)
    for l, r in zip(corners[:-1], corners[1:], strict=True):
        pieces = max(1, int(np.ceil(2 * (r - l))))
        cuts = np.linspace(l, r, pieces + 1)
        x = ((cuts[1:] + cuts[:-1])[:, None] / 2 + np.diff(cuts)[:, None] / 2 * t).ravel()
        weight = (np.diff(cuts)[:, None] / 2 * w).ravel() * np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
        heights = [p[1] + (x - p[0]) * (q[1] - p[1]) / (q[0] - p[0]) for p, q in zip(vertices, following, strict=True)
                   if p[0] != q[0] and min(p[0], q[0]) <= l and max(p[0], q[0]) >= r]
        low, high = np.min(heights, axis=0), np.max(heights, axis=0)
        inner = ndtr(high) - ndtr(low)
        mass += weight @ inner
        first += [weight @ (x * inner), weight @ ((np.exp(-low**2 / 2) - np.exp(-high**2 / 2)) / np.sqrt(2 * np.pi))]
    return mass, first

# %% q7_last_layer: a regression on two points a region that have the posterior's moments
def last_layer(x, slopes, W1, v1, e0, e1, e2):
    mean = e1 / e0
    spread = np.sqrt(np.maximum(e2 / e0 - mean**2, 0))
    design, target = [], []
    for z in (mean - spread, mean + spread):
        h = slopes * (z[..., None] * W1 + v1)
        root = np.sqrt(e0 / 2)[..., None]
        design.append((root * np.concatenate([h, np.ones((*h.shape[:2], 1))], axis=2)).reshape(-1, len(W1) + 1))
        target.append((root * x[:, None]).reshape(-1, x.shape[1]))
    new = np.linalg.lstsq(np.concatenate(design), np.concatenate(target), rcond=None)[0]
    return new[:-1].T, new[-1]

# %% q8_hidden_gradient: example by example, region by region
def first_layer_gradient(x, A, b, slopes, W2, noise_var, e0, e1, e2):
    by_weight, by_bias = np.zeros(slopes.shape[1]), np.zeros(slopes.shape[1])
    for n in range(len(x)):
        for r in range(len(A)):
            jacobian = W2 * slopes[r]
            by_bias += (x[n] * e0[n, r] - A[r] * e1[n, r] - b[r] * e0[n, r]) @ jacobian
            by_weight += (x[n] * e1[n, r] - A[r] * e2[n, r] - b[r] * e1[n, r]) @ jacobian
    return by_weight / noise_var / len(x), by_bias / noise_var / len(x)

# %% q9_missing: by quadrature on every interval
def impute(x, observed, knots, A, b, noise_var):
    t, w = np.polynomial.legendre.leggauss(200)
    ends = np.concatenate([[-12.0], knots, [12.0]])
    log_w, means = [], []
    for r, (l, u) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        z = (l + u) / 2 + (u - l) / 2 * t
        g = z[:, None] * A[r] + b[r]
        squares = np.sum((x[observed] - g[:, observed]) ** 2, axis=1) / noise_var
        log_w.append(np.log((u - l) / 2 * w) - 0.5 * (z**2 + squares))
        means.append(g)
    share = np.exp(np.concatenate(log_w) - logsumexp(np.concatenate(log_w)))
    return np.where(observed, x, share @ np.concatenate(means))

# %% q10_top_k: by partitioning
def top_k(log_terms, k):
    R = log_terms.shape[1]
    order = np.argsort(log_terms, axis=1)
    best = np.take_along_axis(log_terms, order[:, R - k:], axis=1)
    rest = np.take_along_axis(log_terms, order[:, :R - k], axis=1)
    bound = np.logaddexp.reduce(best, axis=1)
    return bound, np.logaddexp(0.0, np.logaddexp.reduce(rest, axis=1) - bound) if k < R else 0.0 * bound
