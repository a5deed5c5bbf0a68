# Plausible mistakes. A cell's first line names the one question that must lose points, and the mistake; the cell
# replaces the instructor's function of the same name.
import numpy as np
from scipy.special import erfcx, log_ndtr, logsumexp, ndtr, owens_t

# %% q1_partition: knots in the order of the units
def partition(W1, v1, W2, v2, slope):
    bends = W1 != 0
    knots = -v1[bends] / W1[bends]
    ends = np.array([-1.0, 1.0])
    if len(knots):
        ends = np.concatenate([[knots.min() - 2], np.sort(knots), [knots.max() + 2]])
    inside = (ends[1:] + ends[:-1]) / 2
    slopes = np.where(inside[:, None] * W1 + v1 > 0, 1.0, slope)
    return knots, (slopes * W1) @ W2.T, (slopes * v1) @ W2.T + v2

# %% q1_partition: the slope reaches the weights but not the biases
def partition(W1, v1, W2, v2, slope):
    bends = W1 != 0
    knots = np.unique(-v1[bends] / W1[bends])
    ends = np.concatenate([knots[:1] - 2, knots, knots[-1:] + 2]) if len(knots) else np.array([-1.0, 1.0])
    inside = (ends[1:] + ends[:-1]) / 2
    slopes = np.where(inside[:, None] * W1 + v1 > 0, 1.0, slope)
    return knots, (slopes * W1) @ W2.T, v1 @ W2.T + v2 + 0 * inside[:, None]

# %% q1_partition: units that never bend divide by zero
def partition(W1, v1, W2, v2, slope):
    knots = np.sort(-v1 / W1)
    ends = np.concatenate([knots[:1] - 2, knots, knots[-1:] + 2])
    inside = (ends[1:] + ends[:-1]) / 2
    slopes = np.where(inside[:, None] * W1 + v1 > 0, 1.0, slope)
    return knots, (slopes * W1) @ W2.T, (slopes * v1) @ W2.T + v2

# %% q2_region: the prior is forgotten
def region_terms(x, A, b, noise_var):
    precision = np.sum(A**2, axis=1) / noise_var
    residual = x[:, None] - b
    mu = np.sum(residual * A, axis=-1) / noise_var / precision
    squares = np.sum((residual - A * mu[..., None]) ** 2, axis=-1) / noise_var + mu**2
    return -0.5 * (squares + np.log(precision) + x.shape[1] * np.log(2 * np.pi * noise_var)), mu, 1 / precision

# %% q2_region: the likelihood at mu in place of the marginal
def region_terms(x, A, b, noise_var):
    precision = 1 + np.sum(A**2, axis=1) / noise_var
    residual = x[:, None] - b
    mu = np.sum(residual * A, axis=-1) / noise_var / precision
    squares = np.sum((residual - A * mu[..., None]) ** 2, axis=-1) / noise_var
    return -0.5 * (squares + x.shape[1] * np.log(2 * np.pi * noise_var)), mu, 1 / precision

# %% q2_region: Woodbury's difference of large numbers
def region_terms(x, A, b, noise_var):
    precision = 1 + np.sum(A**2, axis=1) / noise_var
    residual = x[:, None] - b
    inner = np.sum(residual * A, axis=-1) / noise_var
    squares = np.sum(residual**2, axis=-1) / noise_var - inner**2 / precision
    log_kappa = -0.5 * (squares + np.log(precision) + x.shape[1] * np.log(2 * np.pi * noise_var))
    return log_kappa, inner / precision, 1 / precision

# %% q2_region: dense covariances
def region_terms(x, A, b, noise_var):
    covs = [np.outer(a, a) + noise_var * np.eye(x.shape[1]) for a in A]
    gains = np.array([np.linalg.solve(cov, a) for cov, a in zip(covs, A, strict=True)])
    residual = x[:, None] - b
    squares = np.stack([np.sum(residual[:, r] * np.linalg.solve(cov, residual[:, r].T).T, 1)
                        for r, cov in enumerate(covs)], 1)
    log_kappa = -0.5 * (squares + np.array([np.linalg.slogdet(2 * np.pi * cov)[1] for cov in covs]))
    return log_kappa, np.sum(residual * gains, -1), 1 - np.sum(A * gains, 1)

# %% q3_interval: a difference of distribution functions
def cut_normal(a, b):
    mass = ndtr(b) - ndtr(a)
    left, right = (np.exp(-0.5 * end**2) / np.sqrt(2 * np.pi) / mass for end in (a, b))
    finite = lambda end: np.where(np.isfinite(end), end, 0.0)
    return np.log(mass), left - right, 1 + finite(a) * left - finite(b) * right

# %% q3_interval: the reflection does not turn the mean round
def cut_normal(a, b):
    with np.errstate(invalid="ignore", divide="ignore"):
        flip = a + b < 0
        low, high = np.where(flip, -b, a), np.where(flip, -a, b)
        start = np.maximum(low, 0.0)
        fall = np.exp(0.5 * (start - high) * (start + high))
        tail = -0.5 * start**2 + np.log(0.5 * (erfcx(start / np.sqrt(2)) - fall * erfcx(high / np.sqrt(2))))
        log_mass = np.where(low < 0, np.log(ndtr(high) - ndtr(low)), tail)
    left, right = (np.exp(-0.5 * end**2 - log_mass) / np.sqrt(2 * np.pi) for end in (low, high))
    finite = lambda end: np.where(np.isfinite(end), end, 0.0)
    return log_mass, left - right, 1 + finite(low) * left - finite(high) * right

# %% q3_interval: the variance in place of the mean square
def cut_normal(a, b):
    log_mass = log_ndtr(np.where(a + b > 0, -a, b)) + np.log1p(
        -np.exp(log_ndtr(np.where(a + b > 0, -b, a)) - log_ndtr(np.where(a + b > 0, -a, b))))
    left, right = (np.exp(-0.5 * end**2 - log_mass) / np.sqrt(2 * np.pi) for end in (a, b))
    finite = lambda end: np.where(np.isfinite(end), end, 0.0)
    return log_mass, left - right, 1 + finite(a) * left - finite(b) * right - (left - right) ** 2

# %% q3_interval: infinity times zero
def cut_normal(a, b):
    log_mass = log_ndtr(np.where(a + b > 0, -a, b)) + np.log1p(
        -np.exp(log_ndtr(np.where(a + b > 0, -b, a)) - log_ndtr(np.where(a + b > 0, -a, b))))
    left, right = (np.exp(-0.5 * end**2 - log_mass) / np.sqrt(2 * np.pi) for end in (a, b))
    return log_mass, left - right, 1 + a * left - b * right

# %% q4_evidence: a floor under every mass
def exact_posterior(log_kappa, mu, variance, knots):
    s, ends = np.sqrt(variance), np.concatenate([[-np.inf], knots, [np.inf]])
    a, b = (ends[:-1] - mu) / s, (ends[1:] - mu) / s
    log_mass = np.log(ndtr(b) - ndtr(a) + 1e-42)
    log_joint = log_kappa + log_mass
    log_px = logsumexp(log_joint, axis=1)
    weights = np.exp(log_joint - log_px[:, None])
    shift = (np.exp(-0.5 * a**2 - log_mass) - np.exp(-0.5 * b**2 - log_mass)) / np.sqrt(2 * np.pi)
    return log_px, weights, np.sum(weights * (mu + s * shift), axis=1)

# %% q4_evidence: every region believed to be the whole line
def exact_posterior(log_kappa, mu, variance, knots):
    log_px = logsumexp(log_kappa, axis=1)
    weights = np.exp(log_kappa - log_px[:, None])
    return log_px, weights, np.sum(weights * mu, axis=1)

# %% q4_evidence: the mean of a region is its mu
def exact_posterior(log_kappa, mu, variance, knots):
    s, ends = np.sqrt(variance), np.concatenate([[-np.inf], knots, [np.inf]])
    a, b = (ends[:-1] - mu) / s, (ends[1:] - mu) / s
    with np.errstate(invalid="ignore"):
        flip = a + b > 0
    low, high = np.where(flip, -b, a), np.where(flip, -a, b)
    log_joint = log_kappa + log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))
    log_px = logsumexp(log_joint, axis=1)
    weights = np.exp(log_joint - log_px[:, None])
    return log_px, weights, np.sum(weights * mu, axis=1)

# %% q5_score: the sign
def denoise(x, A, b, noise_var, e0, e1):
    clean = e1 @ A + e0 @ b
    return clean, (x - clean) / noise_var

# %% q5_score: the standard deviation for the variance
def denoise(x, A, b, noise_var, e0, e1):
    clean = e1 @ A + e0 @ b
    return clean, (clean - x) / np.sqrt(noise_var)

# %% q5_score: the decoder at the posterior mean, in the likeliest region
def denoise(x, A, b, noise_var, e0, e1):
    best = e0.argmax(1)
    clean = A[best] * e1.sum(1)[:, None] + b[best]
    return clean, (clean - x) / noise_var

# %% q6_polygon: the indicator is forgotten
def polygon(vertices):
    edge = np.roll(vertices, -1, axis=0) - vertices
    length = np.linalg.norm(edge, axis=1)
    t = edge / length[:, None]
    n = np.stack([t[:, 1], -t[:, 0]], axis=1)
    h, s1 = np.sum(n * vertices, axis=1), np.sum(t * vertices, axis=1)
    mass = 1 - np.sum(owens_t(h, (s1 + length) / h) - owens_t(h, s1 / h))
    density = np.exp(-0.5 * h**2) / np.sqrt(2 * np.pi)
    return mass, -np.sum(n * (density * (ndtr(s1 + length) - ndtr(s1)))[:, None], axis=0)

# %% q6_polygon: the inward normal
def polygon(vertices):
    edge = np.roll(vertices, -1, axis=0) - vertices
    length = np.linalg.norm(edge, axis=1)
    t = edge / length[:, None]
    n = np.stack([t[:, 1], -t[:, 0]], axis=1)
    h, s1 = np.sum(n * vertices, axis=1), np.sum(t * vertices, axis=1)
    mass = float(np.all(h > 0)) - np.sum(owens_t(h, (s1 + length) / h) - owens_t(h, s1 / h))
    density = np.exp(-0.5 * h**2) / np.sqrt(2 * np.pi)
    return mass, np.sum(n * (density * (ndtr(s1 + length) - ndtr(s1)))[:, None], axis=0)

# %% q7_last_layer: the latent is taken for its mean in each region
def last_layer(x, slopes, W1, v1, e0, e1, e2):
    ones = np.ones((len(slopes), 1))
    U, V = np.concatenate([slopes * W1, 0 * ones], axis=1), np.concatenate([slopes * v1, ones], axis=1)
    square = np.sum(e1**2 / e0, axis=0)
    second = U.T * square @ U + U.T * e1.sum(0) @ V + V.T * e1.sum(0) @ U + V.T * e0.sum(0) @ V
    new = np.linalg.solve(second, (x.T @ (e1 @ U + e0 @ V)).T).T
    return new[:, :-1], new[:, -1]

# %% q7_last_layer: the slopes are forgotten
def last_layer(x, slopes, W1, v1, e0, e1, e2):
    ones = np.ones((len(slopes), 1))
    U = np.concatenate([ones * W1, 0 * ones], axis=1)
    V = np.concatenate([ones * v1, ones], axis=1)
    second = U.T * e2.sum(0) @ U + U.T * e1.sum(0) @ V + V.T * e1.sum(0) @ U + V.T * e0.sum(0) @ V
    new = np.linalg.lstsq(second, (x.T @ (e1 @ U + e0 @ V)).T, rcond=None)[0].T
    return new[:, :-1], new[:, -1]

# %% q8_hidden_gradient: the sum over examples, not the mean
def first_layer_gradient(x, A, b, slopes, W2, noise_var, e0, e1, e2):
    residual = e0.T @ x - e1.sum(0)[:, None] * A - e0.sum(0)[:, None] * b
    residual_z = e1.T @ x - e2.sum(0)[:, None] * A - e1.sum(0)[:, None] * b
    return np.sum(slopes * (residual_z @ W2), axis=0) / noise_var, np.sum(slopes * (residual @ W2), axis=0) / noise_var

# %% q8_hidden_gradient: the slopes of the units are forgotten
def first_layer_gradient(x, A, b, slopes, W2, noise_var, e0, e1, e2):
    scale = len(x) * noise_var
    residual = e0.T @ x - e1.sum(0)[:, None] * A - e0.sum(0)[:, None] * b
    residual_z = e1.T @ x - e2.sum(0)[:, None] * A - e1.sum(0)[:, None] * b
    return np.sum(residual_z @ W2, axis=0) / scale, np.sum(residual @ W2, axis=0) / scale

# %% q9_missing: what is missing is taken for the bias
def impute(x, observed, knots, A, b, noise_var):
    e = np.concatenate([[-9.0], knots, [9.0]])
    z = np.linspace(-9, 9, 20001)
    g = A[np.searchsorted(knots, z)] * z[:, None] + b[np.searchsorted(knots, z)]
    filled = np.where(observed, x, b[len(e) // 2 - 1])
    log_w = -0.5 * (z**2 + np.sum((filled - g) ** 2, axis=1) / noise_var)
    w = np.exp(log_w - log_w.max())
    return np.where(observed, x, w @ g / w.sum())

# %% q9_missing: the likeliest region alone
def impute(x, observed, knots, A, b, noise_var):
    z = np.linspace(-9, 9, 20001)
    region = np.searchsorted(knots, z)
    g = A[region] * z[:, None] + b[region]
    log_w = -0.5 * (z**2 + np.sum(np.where(observed, x - g, 0.0) ** 2, axis=1) / noise_var)
    w = np.exp(log_w - log_w.max())
    w = w * (region == np.bincount(region, w).argmax())
    return np.where(observed, x, w @ g / w.sum())

# %% q10_top_k: the first k, not the largest
def top_k(log_terms, k):
    bound = logsumexp(log_terms[:, :k], axis=1)
    return bound, logsumexp(log_terms, axis=1) - bound

# %% q10_top_k: a difference of logarithms
def top_k(log_terms, k):
    bound = logsumexp(np.sort(log_terms, axis=1)[:, ::-1][:, :k], axis=1)
    return bound, logsumexp(log_terms, axis=1) - bound
