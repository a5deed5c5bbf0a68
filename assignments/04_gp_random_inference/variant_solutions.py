# Right answers by another road: the hidden tests must accept each with full marks. A cell's first line names its
# question.
import numpy as np
from scipy.optimize import minimize
from scipy.special import roots_hermitenorm
from scipy.stats import rankdata

# %% q1_bound: by quadrature
def bowl_bound(loc, log_var, x, noise_var):
    nodes, weights = roots_hermitenorm(6)
    weights = weights / weights.sum()
    z = loc[:, None] + np.exp(log_var / 2)[:, None] * nodes
    error = (x[:, :1] - z) ** 2 + (x[:, 1:] - z**2 / 2) ** 2
    fit = (-0.5 * error / noise_var - np.log(2 * np.pi * noise_var)) @ weights
    return fit - 0.5 * (loc**2 + np.expm1(log_var) - log_var)

# %% q2_optimum: datum by datum, with a quasi-Newton method
def best_gaussian(x, noise_var):
    def loss(p, datum):
        f, g = p
        v = np.exp(g)
        second, fourth = f**2 + v, f**4 + 6 * f**2 * v + 3 * v**2
        error = (datum[0] - f) ** 2 + v + datum[1] ** 2 - datum[1] * second + fourth / 4
        curve = (-1 + datum[1] - 1.5 * (f**2 + v)) / noise_var - 1
        slope = (datum[0] - f + datum[1] * f - 0.5 * (f**3 + 3 * f * v)) / noise_var - f
        return 0.5 * error / noise_var + 0.5 * (second - g), -np.array([slope, 0.5 * (1 + v * curve)])

    found = []
    for datum in x:
        tip = np.sqrt(2 * max(datum[1], 0.0))
        runs = [minimize(loss, [f, g], args=(datum,), jac=True, method="BFGS", options={"gtol": 1e-9})
                for f in (-tip, 0.0, tip, datum[0]) for g in (-2.0, -0.5)]
        found.append(min(runs, key=lambda run: run.fun).x)
    found = np.array(found)
    return found[:, 0], np.exp(found[:, 1])

# %% q3_linear: with a Cholesky factor
def linear_gaps(f, g, x, A, a, noise_var):
    L = np.linalg.cholesky(np.eye(A.shape[1]) + A.T @ A / noise_var)
    squares = np.sum(L**2, axis=1)
    best = np.linalg.solve(L.T, np.linalg.solve(L, A.T @ (x - a).T / noise_var)).T
    t = np.expm1(g + np.log(squares))
    amortisation = 0.5 * np.sum(((f - best) @ L) ** 2, axis=1) + 0.5 * np.sum(t - np.log1p(t), axis=1)
    return 0.5 * np.sum(np.log(squares)) - np.sum(np.log(np.diag(L))), amortisation

# %% q4_regression: by solving for the gain, and as least squares
def function_space(K, K_star, prior, y, noise):
    gain = np.linalg.solve(K + np.diag(noise), K_star)
    return gain.T @ y, prior - np.einsum("ns,ns->s", gain, K_star)


def weight_space(F, y, noise, prior_var):
    rows = np.vstack([F / np.sqrt(noise)[:, None], np.eye(F.shape[1]) / np.sqrt(prior_var)])
    Q, R = np.linalg.qr(rows)
    inverse = np.linalg.inv(R)
    return inverse @ (Q[: len(y)].T @ (y / np.sqrt(noise))), inverse @ inverse.T

# %% q5_average: latent by latent, on a grid of g
def average_kl(mean_f, mean_g, var_f, var_g):
    total = np.zeros(len(mean_f))
    for k in range(mean_f.shape[1]):
        lognormal = np.exp(mean_g[:, k]) * np.sqrt(np.exp(var_g[:, k]))
        total += 0.5 * (mean_f[:, k] ** 2 + var_f[:, k] + lognormal - 1 - mean_g[:, k])
    return total


def averaged_log_posterior(z, mean_f, mean_g, var_f, var_g):
    t = np.linspace(-8, 8, 401)
    log_weight = -0.5 * t**2 - np.log(np.sum(np.exp(-0.5 * t**2)))
    total = 0.0
    for k in range(mean_f.shape[1]):
        var = var_f[:, k, None] + np.exp(mean_g[:, k, None] + np.sqrt(var_g[:, k, None]) * t)
        terms = log_weight - 0.5 * ((z[..., k] - mean_f[:, k])[..., None] ** 2 / var + np.log(2 * np.pi * var))
        total = total + np.logaddexp.reduce(terms, axis=-1)
    return total

# %% q6_adjoint: forwards, with two tangents
def refined(loc, log_var, x, noise_var, rate, num_steps):
    f, g = loc, log_var
    one, zero = np.ones(len(x)), np.zeros(len(x))
    tangents = [(one, zero), (zero, one)]
    for step in range(num_steps + 1):
        v = np.exp(g)
        curve = (-1 + x[:, 1] - 1.5 * (f**2 + v)) / noise_var - 1
        slope = (x[:, 0] - f + x[:, 1] * f - 0.5 * (f**3 + 3 * f * v)) / noise_var - f, 0.5 * (1 + v * curve)
        if step == num_steps:
            break
        mixed, corner = -1.5 * v * f / noise_var, 0.5 * v * curve - 0.75 * v**2 / noise_var
        tangents = [(df + rate * (curve * df + mixed * dg), dg + rate * (mixed * df + corner * dg))
                    for df, dg in tangents]
        f, g = f + rate * slope[0], g + rate * slope[1]
    return f, g, *(slope[0] * df + slope[1] * dg for df, dg in tangents)

# %% q7_information: quadrature in z under each width
def mutual_information(mean_g, var_f, var_g):
    nodes, weights = roots_hermitenorm(80)
    weights = weights / weights.sum()
    u = np.linspace(-12, 12, 2001)
    normal = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi) * (u[1] - u[0])
    answers = []
    for mu, s_f, s_g in zip(mean_g, var_f, var_g, strict=True):
        var = s_f + np.exp(mu + np.sqrt(s_g) * nodes)
        entropy = 0.0
        for weight, own in zip(weights, var, strict=True):
            if weight > 1e-14:
                z = np.sqrt(own) * u
                density = np.exp(-0.5 * z[:, None] ** 2 / var) / np.sqrt(2 * np.pi * var) @ weights
                entropy -= weight * np.sum(normal * np.log(density))
        answers.append(entropy - 0.5 * (np.log(2 * np.pi) + 1 + mu))
    return np.array(answers)

# %% q8_weights: by eigenvalues
def weight_covariance(F, curvature, prior_var, beta):
    values, vectors = np.linalg.eigh(np.einsum("n,nm,nk->mk", curvature, F, F))
    spread = 1 / (1 / prior_var + values / beta)
    return (vectors * spread) @ vectors.T, 0.5 * np.sum(values * spread)

# %% q9_audit: with SciPy's ranks
def audit(score, gap, permutations):
    a, b = rankdata(score), rankdata(gap)
    value = np.corrcoef(a, b)[0, 1]
    chance = [np.corrcoef(a, b[order])[0, 1] for order in permutations]
    return value, (1 + sum(c >= value - 1e-9 for c in chance)) / (1 + len(chance))

# %% q10_scores: one logarithm of a sum at a time
def importance_scores(log_w, sizes):
    answers = []
    for k in sizes:
        starts = range(0, len(log_w) - k + 1, k)
        answers.append(np.mean([np.logaddexp.reduce(log_w[i : i + k], axis=0) - np.log(k) for i in starts]))
    return np.array(answers)
