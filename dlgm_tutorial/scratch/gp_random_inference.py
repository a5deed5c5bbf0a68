"""The from-scratch code of book/04_gp_random_inference. Written by `make scratch`; edit the chapter."""

# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell e9b0d8b6
import autograd.numpy as np
from autograd import elementwise_grad as egrad
from autograd.scipy.special import logsumexp


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell a80268f0
NOISE_VAR = 0.25


def bowl_log_joint(z, x):
    """log p(x, z) of the bowl for z [...] and x [..., 2], broadcast; def-gp-bowl."""
    error = (x[..., 0] - z) ** 2 + (x[..., 1] - 0.5 * z**2) ** 2
    return -0.5 * (
        error / NOISE_VAR + 2 * np.log(2 * np.pi * NOISE_VAR) + z**2 + np.log(2 * np.pi)
    )


def evidence_on_grid(x, num_points=4001):
    """log p(x) [B], the grid [G], and the posterior density there [B, G]."""
    grid = np.linspace(-8.0, 8.0, num_points)
    log_joint = bowl_log_joint(grid, x[:, None])
    log_px = logsumexp(log_joint, axis=1) + np.log(grid[1] - grid[0])
    return log_px, grid, np.exp(log_joint - log_px[:, None])


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 748e4e2f
def bowl_elbo(loc, log_var, x):
    """The exact bound [B] of N(loc, exp(log_var)) for x [B, 2], eq-gp-elbo."""
    v = np.exp(log_var)
    second, fourth = loc**2 + v, loc**4 + 6 * loc**2 * v + 3 * v**2
    error = (x[:, 0] - loc) ** 2 + v + x[:, 1] ** 2 - x[:, 1] * second + 0.25 * fourth
    return (
        -0.5 * error / NOISE_VAR
        - np.log(2 * np.pi * NOISE_VAR)
        - 0.5 * (second - 1 - log_var)
    )


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell d881e61c
def newton_step(elbo, loc, log_var, x, damping):
    """The damped Newton step of every datum's bound in (loc, log_var), [B] each."""
    d_loc, d_log_var = egrad(elbo, 0), egrad(elbo, 1)
    a, b = d_loc(loc, log_var, x), d_log_var(loc, log_var, x)
    aa = egrad(d_loc, 0)(loc, log_var, x) - damping
    bb = egrad(d_log_var, 1)(loc, log_var, x) - damping
    ab = egrad(d_loc, 1)(loc, log_var, x)
    det = aa * bb - ab ** 2
    det = np.where((aa < 0) & (det > 0), det, np.inf)      # not a hill: no step
    return (ab * b - bb * a) / det, (ab * a - aa * b) / det


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 46851a4a
def per_instance_optimum(elbo, x, loc, log_var, num_steps=60):
    """The best Gaussian of every datum near a start: (loc, log_var), [B] each."""
    damping = np.ones(len(x))
    for _ in range(num_steps):
        d_loc, d_log_var = newton_step(elbo, loc, log_var, x, damping)
        far = np.abs(d_loc) + np.abs(d_log_var) > 2.0
        moved = np.where(far, 0.0, d_loc), np.where(far, 0.0, d_log_var)
        better = elbo(loc + moved[0], log_var + moved[1], x) >= elbo(loc, log_var, x)
        taken = better & ~far & ((d_loc != 0) | (d_log_var != 0))
        loc = np.where(taken, loc + moved[0], loc)
        log_var = np.where(taken, log_var + moved[1], log_var)
        damping = np.where(taken, 0.2 * damping, 5 * damping + 1e-9)
    return loc, log_var


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 929116de
def gaps_1d(x, loc, log_var):
    """(log p(x), approximation gap, amortisation gap), [B] each, for the bowl."""
    log_px = evidence_on_grid(x)[0]
    starts = [
        (loc, log_var),
        (np.zeros(len(x)), np.zeros(len(x))),
        (x[:, 0], -1 + 0 * loc),
    ]
    found = [per_instance_optimum(bowl_elbo, x, *start) for start in starts]
    best = np.max(np.stack([bowl_elbo(*start, x) for start in found]), axis=0)
    return log_px, log_px - best, best - bowl_elbo(loc, log_var, x)


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 2a8bc812
def linear_gaps(f, g, x, A, a, noise_var):
    """(log p(x), approximation, amortisation gap) of a linear decoder, eq-gp-linear."""
    D, K = A.shape
    Lam = np.eye(K) + A.T @ A / noise_var
    f_star = np.linalg.solve(Lam, A.T @ (x - a).T / noise_var).T  # [B, K]
    rest = x - a - f_star @ A.T
    log_px = -0.5 * (
        np.sum(rest**2, 1) / noise_var
        + np.sum(f_star**2, 1)
        + D * np.log(2 * np.pi * noise_var)
        + np.linalg.slogdet(Lam)[1]
    )
    approximation = 0.5 * (np.sum(np.log(np.diag(Lam))) - np.linalg.slogdet(Lam)[1])
    delta = f - f_star
    v = np.exp(g) * np.diag(Lam)
    amortisation = 0.5 * (
        np.sum((delta @ Lam) * delta, 1) + np.sum(v - 1 - np.log(v), 1)
    )
    return log_px, approximation, amortisation
