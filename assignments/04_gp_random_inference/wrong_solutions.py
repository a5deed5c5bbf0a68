# Plausible mistakes. A cell's first line names the one question that must lose points, and the mistake; the cell
# replaces the instructor's function of the same name.
import numpy as np
from scipy.special import logsumexp, roots_hermitenorm

# %% q1_bound: the fourth moment lacks its last term
def bowl_bound(loc, log_var, x, noise_var):
    v = np.exp(log_var)
    second, fourth = loc**2 + v, loc**4 + 6 * loc**2 * v
    error = (x[:, 0] - loc) ** 2 + v + x[:, 1] ** 2 - x[:, 1] * second + fourth / 4
    return -0.5 * error / noise_var - np.log(2 * np.pi * noise_var) - 0.5 * (second - 1 - log_var)

# %% q1_bound: the divergence without its one
def bowl_bound(loc, log_var, x, noise_var):
    v = np.exp(log_var)
    second, fourth = loc**2 + v, loc**4 + 6 * loc**2 * v + 3 * v**2
    error = (x[:, 0] - loc) ** 2 + v + x[:, 1] ** 2 - x[:, 1] * second + fourth / 4
    return -0.5 * error / noise_var - np.log(2 * np.pi * noise_var) - 0.5 * (second - log_var)

# %% q1_bound: a log standard deviation taken for a log-variance
def bowl_bound(loc, log_var, x, noise_var):
    v = np.exp(2 * log_var)
    second, fourth = loc**2 + v, loc**4 + 6 * loc**2 * v + 3 * v**2
    error = (x[:, 0] - loc) ** 2 + v + x[:, 1] ** 2 - x[:, 1] * second + fourth / 4
    return -0.5 * error / noise_var - np.log(2 * np.pi * noise_var) - 0.5 * (second - 1 - 2 * log_var)

# %% q1_bound: the decoder at the mean, its spread forgotten
def bowl_bound(loc, log_var, x, noise_var):
    error = (x[:, 0] - loc) ** 2 + (x[:, 1] - loc**2 / 2) ** 2
    return -0.5 * error / noise_var - np.log(2 * np.pi * noise_var) - 0.5 * (loc**2 + np.exp(log_var) - 1 - log_var)

# %% q2_optimum: the Laplace approximation
def best_gaussian(x, noise_var):
    z = np.where(np.abs(x[:, 0]) > 0.01, x[:, 0], 0.01) * 1.0
    for _ in range(200):
        slope = ((x[:, 0] - z) + (x[:, 1] - z**2 / 2) * z) / noise_var - z
        curve = (-1 + x[:, 1] - 1.5 * z**2) / noise_var - 1
        z = z + np.clip(slope / np.maximum(np.abs(curve), 1e-3), -0.3, 0.3)
    return z, 1 / np.maximum(-((-1 + x[:, 1] - 1.5 * z**2) / noise_var - 1), 1e-3)

# %% q2_optimum: one start, on the right
def best_gaussian(x, noise_var):
    f, g = np.sqrt(2 * np.maximum(x[:, 1], 0.0)) + 0.1, np.full(len(x), -2.5)

    def bound(f, g):
        v = np.exp(g)
        second, fourth = f**2 + v, f**4 + 6 * f**2 * v + 3 * v**2
        error = (x[:, 0] - f) ** 2 + v + x[:, 1] ** 2 - x[:, 1] * second + fourth / 4
        return -0.5 * error / noise_var - 0.5 * (second - g)

    damping = np.ones(len(x))
    for _ in range(150):
        v = np.exp(g)
        first = (x[:, 0] - f + x[:, 1] * f - 0.5 * (f**3 + 3 * f * v)) / noise_var - f
        curve = (-1 + x[:, 1] - 1.5 * (f**2 + v)) / noise_var - 1
        a, b = first, 0.5 * (1 + v * curve)
        aa, ab = curve - damping, -1.5 * v * f / noise_var
        bb = 0.5 * v * curve - 0.75 * v**2 / noise_var - damping
        det = aa * bb - ab**2
        hill = (aa < 0) & (det > 0)
        det = np.where(hill, det, 1.0)
        df, dg = (ab * b - bb * a) / det, (ab * a - aa * b) / det
        fine = hill & (np.abs(df) < 1) & (np.abs(dg) < 1)
        df, dg = np.where(fine, df, 0.0), np.where(fine, dg, 0.0)
        taken = fine & (bound(f + df, g + dg) >= bound(f, g))
        f, g = np.where(taken, f + df, f), np.where(taken, g + dg, g)
        damping = np.where(taken, 0.2 * damping, 4 * damping + 1e-9)
    return f, np.exp(g)

# %% q3_linear: no half in the approximation gap
def linear_gaps(f, g, x, A, a, noise_var):
    Lam = np.eye(A.shape[1]) + A.T @ A / noise_var
    best = np.linalg.solve(Lam, A.T @ (x - a).T / noise_var).T
    diagonal = np.diag(Lam)
    approximation = np.sum(np.log(diagonal)) - np.linalg.slogdet(Lam)[1]
    delta, log_ratio = f - best, g + np.log(diagonal)
    amortisation = 0.5 * np.sum((delta @ Lam) * delta, axis=1)
    return approximation, amortisation + 0.5 * np.sum(np.expm1(log_ratio) - log_ratio, axis=1)

# %% q3_linear: the mean's error weighted by the diagonal alone
def linear_gaps(f, g, x, A, a, noise_var):
    Lam = np.eye(A.shape[1]) + A.T @ A / noise_var
    best = np.linalg.solve(Lam, A.T @ (x - a).T / noise_var).T
    diagonal = np.diag(Lam)
    approximation = 0.5 * (np.sum(np.log(diagonal)) - np.linalg.slogdet(Lam)[1])
    log_ratio = g + np.log(diagonal)
    return approximation, 0.5 * np.sum(diagonal * (f - best) ** 2 + np.expm1(log_ratio) - log_ratio, axis=1)

# %% q3_linear: the covariance of the data, densely
def linear_gaps(f, g, x, A, a, noise_var):
    D, K = A.shape
    gain = np.linalg.solve(A @ A.T + noise_var * np.eye(D), A)
    best, Lam = (x - a) @ gain, np.linalg.inv(np.eye(K) - A.T @ gain)
    diagonal = np.diag(Lam)
    approximation = 0.5 * (np.sum(np.log(diagonal)) - np.linalg.slogdet(Lam)[1])
    delta, log_ratio = f - best, g + np.log(diagonal)
    amortisation = 0.5 * np.sum((delta @ Lam) * delta, axis=1)
    return approximation, amortisation + 0.5 * np.sum(np.expm1(log_ratio) - log_ratio, axis=1)

# %% q4_regression: one noise for all
def function_space(K, K_star, prior, y, noise):
    matrix = K + np.mean(noise) * np.eye(len(y))
    gain = np.linalg.solve(matrix, K_star)
    return gain.T @ y, prior - np.sum(gain * K_star, axis=0)

# %% q4_regression: standard deviations for variances in the prior
def weight_space(F, y, noise, prior_var):
    weighted = F.T / noise
    V = np.linalg.inv(np.eye(F.shape[1]) * prior_var + weighted @ F)
    return V @ (weighted @ y), V

# %% q4_regression: a diagonal matrix of size N
def weight_space(F, y, noise, prior_var):
    inverse = np.linalg.inv(np.diag(noise))
    V = np.linalg.inv(np.eye(F.shape[1]) / prior_var + F.T @ inverse @ F)
    return V @ (F.T @ inverse @ y), V

# %% q5_average: the mean of exp(g) is not exp of the mean
def average_kl(mean_f, mean_g, var_f, var_g):
    return 0.5 * np.sum(mean_f**2 + var_f + np.exp(mean_g) - 1 - mean_g, axis=1)

# %% q5_average: the variance of f forgotten
def averaged_log_posterior(z, mean_f, mean_g, var_f, var_g):
    nodes, weights = roots_hermitenorm(20)
    var = np.exp(mean_g[..., None] + np.sqrt(var_g)[..., None] * nodes)
    terms = -0.5 * ((z - mean_f)[..., None] ** 2 / var + np.log(2 * np.pi * var)) + np.log(weights / weights.sum())
    return logsumexp(terms, axis=-1).sum(-1)

# %% q5_average: a single Gaussian with the right variance
def averaged_log_posterior(z, mean_f, mean_g, var_f, var_g):
    var = var_f + np.exp(mean_g + 0.5 * var_g)
    return np.sum(-0.5 * ((z - mean_f) ** 2 / var + np.log(2 * np.pi * var)), axis=-1)

# %% q5_average: densities added, then the logarithm
def averaged_log_posterior(z, mean_f, mean_g, var_f, var_g):
    nodes, weights = roots_hermitenorm(20)
    var = var_f[..., None] + np.exp(mean_g[..., None] + np.sqrt(var_g)[..., None] * nodes)
    density = np.exp(-0.5 * (z - mean_f)[..., None] ** 2 / var) / np.sqrt(2 * np.pi * var)
    with np.errstate(divide="ignore"):
        return np.log(density @ (weights / weights.sum())).sum(-1)

# %% q6_adjoint: downhill
def refined(loc, log_var, x, noise_var, rate, num_steps):
    rate = -rate

    def derivatives(f, g):
        v = np.exp(g)
        first = (x[:, 0] - f + x[:, 1] * f - 0.5 * (f**3 + 3 * f * v)) / noise_var - f
        curve = (-1 + x[:, 1] - 1.5 * (f**2 + v)) / noise_var - 1
        return first, 0.5 * (1 + v * curve), curve, -1.5 * v * f / noise_var, 0.5 * v * curve - 0.75 * v**2 / noise_var

    path = [(loc, log_var)]
    for _ in range(num_steps):
        a, b = derivatives(*path[-1])[:2]
        path.append((path[-1][0] + rate * a, path[-1][1] + rate * b))
    a, b = derivatives(*path[-1])[:2]
    for f, g in reversed(path[:-1]):
        ff, fg, gg = derivatives(f, g)[2:]
        a, b = a + rate * (ff * a + fg * b), b + rate * (fg * a + gg * b)
    return *path[-1], a, b

# %% q6_adjoint: the first-order shortcut
def refined(loc, log_var, x, noise_var, rate, num_steps):
    def slope(f, g):
        v = np.exp(g)
        first = (x[:, 0] - f + x[:, 1] * f - 0.5 * (f**3 + 3 * f * v)) / noise_var - f
        return first, 0.5 * (1 + v * ((-1 + x[:, 1] - 1.5 * (f**2 + v)) / noise_var - 1))

    f, g = loc, log_var
    for _ in range(num_steps):
        a, b = slope(f, g)
        f, g = f + rate * a, g + rate * b
    return f, g, *slope(f, g)

# %% q6_adjoint: no mixed derivative
def refined(loc, log_var, x, noise_var, rate, num_steps):
    def derivatives(f, g):
        v = np.exp(g)
        first = (x[:, 0] - f + x[:, 1] * f - 0.5 * (f**3 + 3 * f * v)) / noise_var - f
        curve = (-1 + x[:, 1] - 1.5 * (f**2 + v)) / noise_var - 1
        return first, 0.5 * (1 + v * curve), curve, 0.5 * v * curve - 0.75 * v**2 / noise_var

    path = [(loc, log_var)]
    for _ in range(num_steps):
        a, b = derivatives(*path[-1])[:2]
        path.append((path[-1][0] + rate * a, path[-1][1] + rate * b))
    a, b = derivatives(*path[-1])[:2]
    for f, g in reversed(path[:-1]):
        ff, gg = derivatives(f, g)[2:]
        a, b = a + rate * ff * a, b + rate * gg * b
    return *path[-1], a, b

# %% q7_information: the entropy of the Gaussian with the same variance
def mutual_information(mean_g, var_f, var_g):
    return 0.5 * (np.log(var_f + np.exp(mean_g + 0.5 * var_g)) - mean_g)

# %% q7_information: no half
def mutual_information(mean_g, var_f, var_g):
    return np.log1p(var_f * np.exp(-mean_g)) + 0.25 * var_g

# %% q8_weights: beta on the prior
def weight_covariance(F, curvature, prior_var, beta):
    information = (F.T * curvature) @ F
    V = np.linalg.inv(beta * np.eye(F.shape[1]) / prior_var + information / beta)
    return V, 0.5 * np.sum(V * information)

# %% q8_weights: the price without its half
def weight_covariance(F, curvature, prior_var, beta):
    information = (F.T * curvature) @ F
    V = np.linalg.inv(np.eye(F.shape[1]) / prior_var + information / beta)
    return V, np.sum(V * information)

# %% q8_weights: a diagonal matrix of size N
def weight_covariance(F, curvature, prior_var, beta):
    information = F.T @ np.diag(curvature) @ F
    V = np.linalg.inv(np.eye(F.shape[1]) / prior_var + information / beta)
    return V, 0.5 * np.sum(V * information)

# %% q9_audit: Pearson's correlation of the values
def audit(score, gap, permutations):
    a, b = (score - score.mean()) / score.std(), (gap - gap.mean()) / gap.std()
    value = np.mean(a * b)
    chance = b[permutations] @ a / len(a)
    return value, (1 + np.sum(chance >= value - 1e-12)) / (1 + len(permutations))

# %% q9_audit: ties in the order in which they come
def audit(score, gap, permutations):
    def standard_ranks(values):
        ranks = np.argsort(np.argsort(values, kind="stable")) - (len(values) - 1) / 2
        return ranks / np.sqrt(np.mean(ranks**2))

    a, b = standard_ranks(score), standard_ranks(gap)
    value = np.mean(a * b)
    chance = b[permutations] @ a / len(a)
    return value, (1 + np.sum(chance >= value - 1e-12)) / (1 + len(permutations))

# %% q9_audit: the observed order is not counted
def audit(score, gap, permutations):
    def standard_ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ranks = ranks - ranks.mean()
        return ranks / np.sqrt(np.mean(ranks**2))

    a, b = standard_ranks(score), standard_ranks(gap)
    value = np.mean(a * b)
    chance = b[permutations] @ a / len(a)
    return value, np.mean(chance >= value - 1e-12)

# %% q10_scores: the mean of the log-weights
def importance_scores(log_w, sizes):
    return np.array([np.mean(log_w[: len(log_w) // k * k]) for k in sizes])

# %% q10_scores: the first k draws only
def importance_scores(log_w, sizes):
    return np.array([np.mean(logsumexp(log_w[:k], axis=0) - np.log(k)) for k in sizes])

# %% q10_scores: weights in floating point
def importance_scores(log_w, sizes):
    scores = []
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for k in sizes:
            parts = np.exp(log_w[: len(log_w) // k * k]).reshape(len(log_w) // k, k, -1)
            scores.append(np.mean(np.log(parts.mean(1))))
    return np.array(scores)
