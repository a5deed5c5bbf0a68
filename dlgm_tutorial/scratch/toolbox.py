"""The from-scratch code of book/00_toolbox. Written by `make scratch`; edit the chapter."""

# --- book/00_toolbox/01_conditioning.ipynb, cell f4874eef
import autograd.numpy as np
from autograd.scipy.linalg import solve_triangular


# --- book/00_toolbox/01_conditioning.ipynb, cell a10c9c63
def condition(loc_z, loc_x, cov_zz, cov_zx, cov_xx, x):
    """Mean [K] and covariance [K, K] of z [K] given x [D] (eq-tb-conditional)."""
    tril = np.linalg.cholesky(cov_xx)
    half = solve_triangular(tril, cov_zx.T, lower=True)  # L^-1 Sigma_xz, [D, K]
    surprise = solve_triangular(tril, x - loc_x, lower=True)  # L^-1 (x - m_x), [D]
    return loc_z + half.T @ surprise, cov_zz - half.T @ half


# --- book/00_toolbox/01_conditioning.ipynb, cell 8ba4ff23
def linear_posterior(weight, bias, noise_var, x):
    """Mean [K] and covariance [K, K] of z given x [D], linear model (eq-tb-posterior).

    weight: [D, K]; bias: [D]; noise_var: [D], the diagonal of Psi.
    """
    scaled = weight / noise_var[:, None]  # Psi^-1 W, [D, K]
    precision = np.eye(weight.shape[1]) + weight.T @ scaled
    tril = np.linalg.cholesky(precision)
    half = solve_triangular(tril, np.eye(len(precision)), lower=True)
    cov = half.T @ half
    return cov @ (scaled.T @ (x - bias)), cov


# --- book/00_toolbox/02_kl.ipynb, cell 6cfa8c95
def kl_normal(loc_q, tril_q, loc_p, tril_p):
    """KL(q || p) in nats; loc [K], Cholesky factors tril [K, K] (eq-tb-kl-normal)."""
    ratio = solve_triangular(tril_p, tril_q, lower=True)  # L_p^-1 L_q
    shift = solve_triangular(tril_p, loc_q - loc_p, lower=True)  # L_p^-1 (m - mu)
    log_det = np.sum(np.log(np.diag(tril_p)) - np.log(np.diag(tril_q)))
    return 0.5 * (np.sum(ratio**2) + np.sum(shift**2) - len(loc_q)) + log_det


# --- book/00_toolbox/02_kl.ipynb, cell 2725f2c9
def kl_to_standard(loc, log_var):
    """KL from N(0, I), in nats; loc and log_var [..., K] (eq-tb-kl-standard)."""
    return 0.5 * np.sum(loc**2 + np.exp(log_var) - log_var - 1.0, -1)


# --- book/00_toolbox/03_matrices.ipynb, cell d4996ba0
def normal_log_prob(x, loc, cov):
    """log N(x | loc, cov) in nats; x [B, D], cov [D, D] -> [B] (eq-tb-cholesky)."""
    tril = np.linalg.cholesky(cov)
    white = solve_triangular(tril, (x - loc).T, lower=True)  # L^-1 (x - m), D first
    log_det = 2.0 * np.sum(np.log(np.diag(tril)))
    return -0.5 * (np.sum(white**2, 0) + log_det + len(loc) * np.log(2 * np.pi))


# --- book/00_toolbox/03_matrices.ipynb, cell d957a360
def low_rank_log_prob(x, loc, weight, noise_var):
    """log N(x | loc, diag(noise_var) + W W^T); [B, D] -> [B] (eq-tb-low-rank)."""
    residual = x - loc
    scaled = weight / noise_var[:, None]  # Psi^-1 W, [D, K]
    tril = np.linalg.cholesky(np.eye(weight.shape[1]) + weight.T @ scaled)
    explained = solve_triangular(tril, (residual @ scaled).T, lower=True)
    quadratic = np.sum(residual**2 / noise_var, 1) - np.sum(explained**2, 0)
    log_det = np.sum(np.log(noise_var)) + 2.0 * np.sum(np.log(np.diag(tril)))
    return -0.5 * (quadratic + log_det + len(loc) * np.log(2 * np.pi))


# --- book/00_toolbox/04_logsumexp.ipynb, cell ed9df7ef
import autograd.numpy as np
from scipy.special import erfc, erfcx


# --- book/00_toolbox/04_logsumexp.ipynb, cell 09b35f65
def logsumexp(a, axis=0):
    """log of the sum of exp(a) along one axis (eq-tb-lse); -inf for no mass at all."""
    top = np.max(a, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)  # all entries -inf: avoid inf - inf
    return np.log(np.sum(np.exp(a - top), axis=axis)) + np.squeeze(top, axis)


def log_mean_exp(a, axis=0):
    """log of the mean of exp(a) along one axis."""
    return logsumexp(a, axis) - np.log(a.shape[axis])


# --- book/00_toolbox/04_logsumexp.ipynb, cell e2d8c35b
def softplus(a):
    """log(1 + exp(a)), for any a (eq-tb-softplus)."""
    return np.maximum(a, 0.0) + np.log1p(np.exp(-np.abs(a)))


def bernoulli_log_prob(x, logits):
    """log p(x | logits) in nats, summed over the last axis (eq-tb-bernoulli)."""
    return np.sum(x * logits - softplus(logits), -1)


# --- book/00_toolbox/04_logsumexp.ipynb, cell 8292cf5b
def log1mexp(d):
    """log(1 - exp(-d)) for d > 0 (eq-tb-log1mexp)."""
    small = np.minimum(d, np.log(2.0))  # each branch sees only numbers it can take
    large = np.maximum(d, np.log(2.0))
    near = np.log(-np.expm1(-small))
    return np.where(d > np.log(2.0), np.log1p(-np.exp(-large)), near)


# --- book/00_toolbox/04_logsumexp.ipynb, cell da3b0faf
def log_ndtr(a):
    """log of the standard normal distribution function, for any a (eq-tb-log-ndtr)."""
    low, high = np.minimum(a, 0.0), np.maximum(a, 0.0)
    left_tail = np.log(0.5 * erfcx(-low / np.sqrt(2))) - 0.5 * low**2
    return np.where(a <= 0, left_tail, np.log1p(-0.5 * erfc(high / np.sqrt(2))))


def log_interval(a, b):
    """log(Phi(b) - Phi(a)) for a < b, however far out (eq-tb-log-interval)."""
    mirror = a > 0
    low, high = np.where(mirror, -b, a), np.where(mirror, -a, b)
    log_high = log_ndtr(high)
    return log_high + log1mexp(log_high - log_ndtr(low))


# --- book/00_toolbox/05_montecarlo.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/00_toolbox/05_montecarlo.ipynb, cell abca818b
def mean_and_error(values):
    """Mean of independent draws [S, ...] and its standard error (eq-tb-mc-variance)."""
    return np.mean(values, 0), np.std(values, 0, ddof=1) / np.sqrt(len(values))


# --- book/00_toolbox/05_montecarlo.ipynb, cell 6a5a3b60
def log_ess(log_w, axis=0):
    """log of the effective sample size of log weights (eq-tb-ess)."""
    top = np.max(log_w, axis=axis, keepdims=True)  # it cancels in the ratio
    w = np.exp(log_w - top)
    return 2 * np.log(np.sum(w, axis=axis)) - np.log(np.sum(w**2, axis=axis))


def second_moment(loc, scale, loc_q, scale_q):
    """1 + rho for posterior N(loc, scale^2) and its proposal (eq-tb-ess-normal)."""
    spare = 2 * scale_q**2 - scale**2
    if spare <= 0:
        return np.inf
    return scale_q**2 / (scale * np.sqrt(spare)) * np.exp((loc - loc_q) ** 2 / spare)


# --- book/00_toolbox/06_autograd.ipynb, cell 0c92ab7b
import autograd.numpy as np
from autograd import grad, make_vjp, value_and_grad


# --- book/00_toolbox/06_autograd.ipynb, cell 63b31a14
def directional_difference(f, v, direction, step=1e-5):
    """Derivative of f at v along a direction, by differences (eq-tb-difference)."""
    return (f(v + step * direction) - f(v - step * direction)) / (2 * step)


# --- book/00_toolbox/06_autograd.ipynb, cell 1cb832b0
def gradient_descent(objective, params, step_size, num_steps):
    """Follow minus the gradient of objective(params), params a list of arrays."""
    step = value_and_grad(objective)
    for _ in range(num_steps):
        _, gradient = step(params)
        params = [p - step_size * g for p, g in zip(params, gradient, strict=True)]
    return params
