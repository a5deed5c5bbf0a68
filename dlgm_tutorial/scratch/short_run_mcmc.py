"""The from-scratch code of book/06_short_run_mcmc. Written by `make scratch`; edit the chapter."""

# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell 2b5e384d
import autograd.numpy as np
from autograd import grad


# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell a589217b
def valley(z):
    """The example's decoder, log cosh 2z, elementwise: z [..., 1] -> [..., 1]."""
    return np.logaddexp(2 * z, -2 * z) - np.log(2)


def log_joint(z, x, decoder, noise_var):
    """log p(x, z) in nats, [...]: z [..., K], x broadcasts against decoder(z) [..., D]."""
    D, K = np.shape(x)[-1], z.shape[-1]
    squares = np.sum((x - decoder(z)) ** 2, -1)
    return (-0.5 * np.sum(z ** 2, -1) - 0.5 * K * np.log(2 * np.pi)
            - 0.5 * squares / noise_var - 0.5 * D * np.log(2 * np.pi * noise_var))


# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell 7a1e714f
def score_of(log_density):
    """The score of every row at once: log_density maps [..., K] to [...]."""
    return grad(lambda z: np.sum(log_density(z)))


def score_by_hand(z, x, weight, bias, noise_var):
    """The score for a linear decoder W z + b, eq-sr-score: z [..., K], W [D, K] -> [..., K]."""
    return -z + np.dot(x - np.dot(z, weight.T) - bias, weight) / noise_var


# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell d4896ec1
def short_run(score, z0, step_size, num_steps, *, noise=None, stochastic=True):
    """z_T after num_steps Langevin steps from z0 [..., K], eq-sr-langevin; noise [T, ..., K].

    step_size: s, a number or [K]; stochastic=False leaves the noise out.
    """
    if stochastic and (noise is None or len(noise) < num_steps):
        raise ValueError("a stochastic chain needs noise [num_steps, ..., K]")
    z = z0
    for t in range(num_steps):
        z = z + 0.5 * step_size ** 2 * score(z)
        if stochastic:
            z = z + step_size * noise[t]
    return z


# --- book/06_short_run_mcmc/02_law_of_the_end_point.ipynb, cell fbd88b70
def propagate_on_grid(score, z, step_size, num_steps):
    """Densities [T + 1, N] of z_0, ..., z_T on the even grid z [N], eq-sr-law."""
    mean = z + 0.5 * step_size ** 2 * score(z[:, None])[:, 0]
    kernel = np.exp(-0.5 * ((z[:, None] - mean) / step_size) ** 2)             # [to, from]
    kernel = kernel * (z[1] - z[0]) / (step_size * np.sqrt(2 * np.pi))
    laws = [np.exp(-0.5 * z ** 2) / np.sqrt(2 * np.pi)]
    for _ in range(num_steps):
        laws.append(np.dot(kernel, laws[-1]))
    return np.stack(laws)


def kl_on_grid(q, log_p, dz):
    """KL(q || p) of densities on a grid of spacing dz: q [..., N], log_p [N] normalised."""
    log_q = np.log(np.where(q > 0, q, 1.0))
    return np.sum(np.where(q > 0, q * (log_q - log_p), 0.0), -1) * dz


# --- book/06_short_run_mcmc/02_law_of_the_end_point.ipynb, cell 1b16b1e5
def spectrum(weight, bias, noise_var, x):
    """Posterior precision: eigenvalues [K], eigenvectors; the mean in them [K]."""
    lam, U = np.linalg.eigh(np.eye(weight.shape[1]) + np.dot(weight.T, weight) / noise_var)
    return lam, U, np.dot(np.dot(x - bias, weight), U) / (noise_var * lam)


def law_of_endpoint(lam, mu, step_size, num_steps, stochastic=True):
    """Means and variances [..., K] along the eigenvectors, eq-sr-linear-law."""
    u = 0.5 * np.array(step_size)[..., None] ** 2 * lam
    kept = (1 - u) ** num_steps
    var = kept ** 2 + stochastic * (1 - kept ** 2) / (lam * (1 - 0.5 * u))
    return (1 - kept) * mu, var


def kl_of_endpoint(lam, mu, step_size, num_steps, stochastic=True):
    """KL of the end point's law from the posterior, eq-sr-linear-kl: [...]."""
    mean, var = law_of_endpoint(lam, mu, step_size, num_steps, stochastic)
    return 0.5 * np.sum(lam * var + lam * (mean - mu) ** 2 - 1 - np.log(lam * var), -1)


# --- book/06_short_run_mcmc/02_law_of_the_end_point.ipynb, cell 24c655ec
def run_with_log_det(score, z0, step_size, num_steps, *, noise=None, stochastic=True):
    """z_T, log |det dz_T/dz_0|, signs of the steps' determinants [T, N]; eq-sr-jacobian."""
    z, log_det, signs, K = z0, 0.0, [], z0.shape[-1]
    for t in range(num_steps):
        rows = [grad(lambda v, k=k: np.sum(score(v)[..., k]))(z) for k in range(K)]
        jacobian = np.eye(K) + 0.5 * step_size ** 2 * np.stack(rows, -2)
        sign, log_abs = np.linalg.slogdet(jacobian)
        log_det, signs = log_det + log_abs, signs + [sign]
        now = noise[t:t + 1] if stochastic else None
        z = short_run(score, z, step_size, 1, noise=now, stochastic=stochastic)
    return z, log_det, np.array(signs).reshape(num_steps, -1)


# --- book/06_short_run_mcmc/02_law_of_the_end_point.ipynb, cell d9239aee
def jacobian_kl(score, log_p, z0, step_size, num_steps, *, noise=None, stochastic=True):
    """log p(z_0) - log |det| - log_p(z_T) for each start [...]; whether the map folds."""
    z, log_det, signs = run_with_log_det(score, z0, step_size, num_steps, noise=noise,
                                         stochastic=stochastic)
    log_prior = -0.5 * np.sum(z0 ** 2 + np.log(2 * np.pi), -1)
    return log_prior - log_det - log_p(z), bool(np.any(signs != signs[:, :1]))
