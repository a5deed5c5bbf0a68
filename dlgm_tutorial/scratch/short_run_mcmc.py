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
