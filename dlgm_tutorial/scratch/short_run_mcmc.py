"""The from-scratch code of book/06_short_run_mcmc. Written by `make scratch`; edit the chapter."""

# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell 2b5e384d
import autograd.numpy as np
from autograd import grad


# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell 6d963d2f
def valley(z):
    """The example's decoder, log cosh 2z, elementwise: z [..., 1] -> [..., 1]."""
    return np.logaddexp(2 * z, -2 * z) - np.log(2)


def log_joint(z, x, decoder, noise_var):
    """log p(x, z) in nats, [...]: z [..., K], x broadcasts with decoder(z) [..., D]."""
    D, K = np.shape(x)[-1], z.shape[-1]
    squares = np.sum((x - decoder(z)) ** 2, -1)
    return (-0.5 * np.sum(z ** 2, -1) - 0.5 * K * np.log(2 * np.pi)
            - 0.5 * squares / noise_var - 0.5 * D * np.log(2 * np.pi * noise_var))


# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell 75620c7b
def score_of(log_density):
    """The score of every row at once: log_density maps [..., K] to [...]."""
    return grad(lambda z: np.sum(log_density(z)))


def score_by_hand(z, x, weight, bias, noise_var):
    """The score for a linear decoder W z + b, eq-sr-score: z [..., K], W [D, K]."""
    return -z + np.dot(x - np.dot(z, weight.T) - bias, weight) / noise_var


# --- book/06_short_run_mcmc/01_twenty_steps.ipynb, cell c6c3ed71
def short_run(score, z0, step_size, num_steps, *, noise=None, stochastic=True):
    """z_T after num_steps Langevin steps from z0 [..., K], eq-sr-langevin.

    step_size: s, a number or [K]; noise [T, ..., K]; stochastic=False leaves it out.
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


# --- book/06_short_run_mcmc/03_which_step_size.ipynb, cell 35dcd10a
import autograd.numpy as np
from autograd import grad
from autograd.scipy.special import logsumexp


# --- book/06_short_run_mcmc/03_which_step_size.ipynb, cell 4df6022d
def bound_of_endpoint(lam, mu, step_size, num_steps):
    """The objective J for a linear decoder, eq-sr-linear-bound: [...]."""
    mean, var = law_of_endpoint(lam, mu, step_size, num_steps)
    contraction = 1 - 0.5 * np.array(step_size)[..., None] ** 2 * lam
    fit = lam * var + lam * (mean - mu) ** 2 - 1 - np.log(lam)
    return np.sum(0.5 * fit - num_steps * np.log(np.abs(contraction)), -1)


# --- book/06_short_run_mcmc/03_which_step_size.ipynb, cell 9a40443a
def semi_implicit_bounds(score, log_p, z0, step_size, num_steps, noise):
    """Terms [S] whose means enclose KL(q_s || p), eq-sr-sandwich; z0 [S, K]."""
    S, K = z0.shape
    before = short_run(score, z0, step_size, num_steps - 1, noise=noise)
    centre = before + 0.5 * step_size ** 2 * score(before)
    end = centre + step_size * noise[num_steps - 1]
    squares = np.sum((end[:, None] - centre[None]) ** 2, -1)
    var = step_size ** 2
    log_kernel = -0.5 * squares / var - 0.5 * K * np.log(2 * np.pi * var)
    others = np.where(np.eye(S) > 0, -np.inf, log_kernel)
    lower = logsumexp(others, axis=1) - np.log(S - 1)
    return lower - log_p(end), logsumexp(log_kernel, axis=1) - np.log(S) - log_p(end)


# --- book/06_short_run_mcmc/03_which_step_size.ipynb, cell 1b05e0de
def run_with_tangent(score, z0, step_size, num_steps, noise):
    """z_T and its derivative by the step size, both [..., K], eq-sr-step-gradient."""
    z, u = z0, np.zeros_like(z0)
    for t in range(num_steps):
        drift = score(z)
        along = grad(lambda v, u=u: np.sum(score(v) * u))(z)           # the Hessian times u
        u = u + 0.5 * step_size ** 2 * along + step_size * drift + noise[t]
        z = z + 0.5 * step_size ** 2 * drift + step_size * noise[t]
    return z, u


# --- book/06_short_run_mcmc/03_which_step_size.ipynb, cell c9bd1e1a
def decode(layers, z):
    """A ReLU decoder [(W [out, in], b [out]), ...] at z [..., K] -> [..., D]."""
    for W, b in layers[:-1]:
        z = np.maximum(np.dot(z, W.T) + b, 0.0)
    return np.dot(z, layers[-1][0].T) + layers[-1][1]


# --- book/06_short_run_mcmc/04_learning.ipynb, cell 163459d9
def end_point_regression(weight, noise_var, step_size, num_steps):
    """B [K, D] and S [K, K] of z_T = B x + noise for a linear decoder without bias."""
    lam, U = np.linalg.eigh(np.eye(weight.shape[1]) + np.dot(weight.T, weight) / noise_var)
    kept = (1 - 0.5 * step_size ** 2 * lam) ** num_steps
    var = kept ** 2 + (1 - kept ** 2) / (lam * (1 - 0.25 * step_size ** 2 * lam))
    B = np.dot(U * ((1 - kept) / lam), np.dot(U.T, weight.T)) / noise_var
    return B, np.dot(U * var, U.T)


def short_run_em(weight, noise_var, data_cov, step_size, num_steps):
    """One EM step with the end point's law in the posterior's place, eq-sr-em: [D, K]."""
    B, S = end_point_regression(weight, noise_var, step_size, num_steps)
    second_moment = S + np.dot(np.dot(B, data_cov), B.T)
    return np.linalg.solve(second_moment, np.dot(B, data_cov)).T


# --- book/06_short_run_mcmc/04_learning.ipynb, cell 1786fe54
def scalar_em(w, c, noise_var, step_size, num_steps):
    """eq-sr-em for one latent and one pixel: w, step_size broadcast."""
    lam = 1 + w ** 2 / noise_var
    mean, var = law_of_endpoint_1d(lam, step_size, num_steps)
    B = mean * w / (noise_var * lam)
    return c * B / (var + B ** 2 * c)


def law_of_endpoint_1d(lam, step_size, num_steps):
    """Share of the mean that is inferred, and the variance, elementwise."""
    u = 0.5 * step_size ** 2 * lam
    kept = (1 - u) ** num_steps
    return 1 - kept, kept ** 2 + (1 - kept ** 2) / (lam * (1 - 0.5 * u))


# --- book/06_short_run_mcmc/04_learning.ipynb, cell b060db3b
def short_run_loss(layers, x, z, noise_var):
    """The loss of the recipe at fixed end points z [B, K]: minus the mean of log p(x, z)."""
    return -np.mean(log_joint(z, x, lambda v: decode(layers, v), noise_var))


def learning_step(layers, x, z0, noise, step_size, noise_var):
    """End points at the present weights, and the gradient of the loss there."""
    score = score_of(lambda z: log_joint(z, x, lambda v: decode(layers, v), noise_var))
    ends = short_run(score, z0, step_size, len(noise), noise=noise)
    return ends, grad(short_run_loss)(layers, x, ends, noise_var)


# --- book/06_short_run_mcmc/05_several_layers.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/06_short_run_mcmc/05_several_layers.ipynb, cell b8f8e195
def tanh_network(layers, h):
    """A tanh network [(W [out, in], b [out]), ...] on h [..., in]."""
    for W, b in layers[:-1]:
        h = np.tanh(np.dot(h, W.T) + b)
    return np.dot(h, layers[-1][0].T) + layers[-1][1]


def conditional(head, above):
    """Location and scale of a layer given the state above; softplus + 0.001."""
    both = tanh_network(head, above)
    K = both.shape[-1] // 2
    return both[..., :K], 1e-3 + np.logaddexp(0.0, both[..., K:])


# --- book/06_short_run_mcmc/05_several_layers.ipynb, cell 70506242
def states_of(heads, xi):
    """States and log-scales, lists from layer 1 up, of the noises xi; def-sr-layers."""
    z, log_scales = [xi[-1]], []
    for head, noise in zip(heads[::-1], xi[-2::-1]):
        loc, scale = conditional(head, z[0])
        z, log_scales = [loc + scale * noise] + z, [np.log(scale)] + log_scales
    return z, log_scales


def log_normal(u):
    """log N(u; 0, I), summed over the last axis."""
    return -0.5 * np.sum(u ** 2 + np.log(2 * np.pi), -1)


# --- book/06_short_run_mcmc/05_several_layers.ipynb, cell 4cdfb04e
def split(flat, dims):
    """Flat latents [..., K] as a list of layers, layer 1 first."""
    ends = np.cumsum(np.array((0,) + tuple(dims)))
    return [flat[..., a:b] for a, b in zip(ends[:-1], ends[1:])]


def log_joint_noise(heads, decoder, x, flat, dims, noise_var):
    """log p(x, xi) [...], eq-sr-noise-joint: flat [..., K], x broadcasts with [..., D]."""
    mean = tanh_network(decoder, states_of(heads, split(flat, dims))[0][0])
    return log_normal(flat) + log_normal((x - mean) / np.sqrt(noise_var)) \
        - 0.5 * mean.shape[-1] * np.log(noise_var)


def log_joint_state(heads, decoder, x, flat, dims, noise_var):
    """log p(x, z) [...] of states z, eq-sr-state-joint; arguments as in log_joint_noise."""
    z = split(flat, dims)
    total = log_normal(z[-1])
    for head, here, above in zip(heads, z[:-1], z[1:]):
        loc, scale = conditional(head, above)
        total = total + log_normal((here - loc) / scale) - np.sum(np.log(scale), -1)
    mean = tanh_network(decoder, z[0])
    return total + log_normal((x - mean) / np.sqrt(noise_var)) \
        - 0.5 * mean.shape[-1] * np.log(noise_var)


# --- book/06_short_run_mcmc/05_several_layers.ipynb, cell d83b85f3
def general_law(mu, precision, start_cov, step_size, num_steps):
    """Mean and covariance of z_T, steps s [K], from N(0, start_cov); eq-sr-general-law."""
    s = step_size * np.ones(len(mu))
    u, V = np.linalg.eigh(s[:, None] * precision * s)
    a = 1 - 0.5 * u
    M = s[:, None] * np.dot(V * a ** num_steps, V.T) / s
    spread = np.dot(V * ((1 - a ** (2 * num_steps)) / (1 - a ** 2)), V.T)
    return mu - np.dot(M, mu), np.dot(M, np.dot(start_cov, M.T)) + s[:, None] * spread * s


# --- book/06_short_run_mcmc/05_several_layers.ipynb, cell 2f44f8cd
def variance_by_layer(mean, xi, fresh, dims):
    """Terms [S, L] whose means are the V_l, eq-sr-resample; xi, fresh [S, K] drawn apart."""
    ends, out = np.cumsum(np.array((0,) + tuple(dims))), []
    for a, b in zip(ends[:-1], ends[1:]):
        other = np.concatenate([xi[:, :a], fresh[:, a:b], xi[:, b:]], -1)
        out.append(0.5 * np.sum((mean(xi) - mean(other)) ** 2, -1))
    return np.stack(out, -1)


# --- book/06_short_run_mcmc/06_filling_in_and_limits.ipynb, cell 86ec20b8
def masked_log_joint(z, x, observed, decoder, noise_var):
    """log p(x_o, z) [...]: observed [..., D] of 0 and 1, hidden entries of x ignored."""
    squares = np.sum(np.where(observed > 0, x - decoder(z), 0.0) ** 2, -1)
    num = np.sum(observed * np.ones(np.shape(x)), -1)
    return (-0.5 * np.sum(z ** 2 + np.log(2 * np.pi), -1) - 0.5 * squares / noise_var
            - 0.5 * num * np.log(2 * np.pi * noise_var))


# --- book/06_short_run_mcmc/06_filling_in_and_limits.ipynb, cell b9275f0a
def mala_step(log_p, score, z, step_size, noise, uniform):
    """One Metropolis-adjusted Langevin step, eq-sr-mala: (z [..., K], accepted [...])."""
    drift = lambda v: v + 0.5 * step_size ** 2 * score(v)
    new = drift(z) + step_size * noise
    back = np.sum((z - drift(new)) ** 2 - (new - drift(z)) ** 2, -1) / (2 * step_size ** 2)
    accepted = np.log(uniform) < log_p(new) - log_p(z) - back
    return np.where(accepted[..., None], new, z), accepted
