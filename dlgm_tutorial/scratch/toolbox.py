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
