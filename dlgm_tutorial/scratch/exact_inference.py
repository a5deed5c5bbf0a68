"""The from-scratch code of book/01_exact_inference. Written by `make scratch`; edit the chapter."""

# --- book/01_exact_inference/01_the_question.ipynb, cell 518e57e7
import autograd.numpy as np
from autograd.scipy.special import logsumexp


# --- book/01_exact_inference/01_the_question.ipynb, cell e7fb1840
def log_normal(x, mean, var):
    """log N(x | mean, diag(var)) in nats over the last axis: [..., D] -> [...]."""
    return -0.5 * np.sum((x - mean) ** 2 / var + np.log(2 * np.pi * var), axis=-1)


def log_joint(x, z, decoder, noise_var):
    """log p(z) + log p(x | z) (def-ei-model): x [D], z [..., K] -> [...]."""
    return log_normal(z, 0.0, np.ones(z.shape[-1])) + log_normal(x, decoder(z),
                                                                 noise_var)


# --- book/01_exact_inference/01_the_question.ipynb, cell 0f6722af
def grid_inference(log_joint_on_grid, step):
    """Log-evidence and posterior density [N] on an even grid (eq-ei-grid)."""
    log_evidence = logsumexp(log_joint_on_grid) + np.log(step)
    return log_evidence, np.exp(log_joint_on_grid - log_evidence)


# --- book/01_exact_inference/02_factor_analysis.ipynb, cell 86527514
import autograd.numpy as np

from dlgm_tutorial.scratch.exact_inference import log_joint, log_normal


# --- book/01_exact_inference/02_factor_analysis.ipynb, cell a92ca941
def posterior(x, weight, bias, noise_var):
    """Posterior mean [B, K] and precision [K, K] (eq-ei-posterior).

    x [B, D], weight [D, K], bias [D], noise_var [D].
    """
    scaled = weight / noise_var[:, None]  # Psi^-1 W, [D, K]
    precision = np.eye(weight.shape[1]) + weight.T @ scaled
    mean = np.linalg.solve(precision, scaled.T @ (x - bias).T).T
    return mean, precision


# --- book/01_exact_inference/02_factor_analysis.ipynb, cell 40b96477
def log_evidence(x, weight, bias, noise_var):
    """log p(x) in nats, [B], by the joint at the posterior mean (eq-ei-evidence)."""
    mean, precision = posterior(x, weight, bias, noise_var)
    log_det = 2 * np.sum(np.log(np.diag(np.linalg.cholesky(precision))))
    at_mean = log_joint(x, mean, lambda z: z @ weight.T + bias, noise_var)
    return at_mean + 0.5 * len(precision) * np.log(2 * np.pi) - 0.5 * log_det


# --- book/01_exact_inference/02_factor_analysis.ipynb, cell ff1ced0d
def posterior_missing(x, observed, weight, bias, noise_var):
    """Posterior mean [B, K], precision [B, K, K] from visible pixels (eq-ei-missing).

    observed: [B, D], true where x was seen; x may hold anything elsewhere.
    """
    num_latents = weight.shape[1]
    scaled = weight / noise_var[:, None]
    outer = (weight[:, :, None] * scaled[:, None, :]).reshape(len(weight),
                                                              -1)  # [D, K K]
    precision = (observed @ outer).reshape(-1, num_latents, num_latents)
    precision = np.eye(num_latents) + precision
    evidence = np.where(observed, x - bias, 0.0) @ scaled
    return np.linalg.solve(precision, evidence[..., None])[..., 0], precision


# --- book/01_exact_inference/03_learning.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/01_exact_inference/03_learning.ipynb, cell 84dee204
def average_evidence(weight, noise_var, data_cov):
    """Mean of log p(x), data covariance [D, D], bias at the mean (eq-ei-average)."""
    cov_x = weight @ weight.T + np.diag(noise_var)
    log_det = np.linalg.slogdet(2 * np.pi * cov_x)[1]
    return -0.5 * (log_det + np.trace(np.linalg.solve(cov_x, data_cov)))


# --- book/01_exact_inference/03_learning.ipynb, cell 2d2368bd
def gradient_by_hand(weight, noise_var, data_cov):
    """Gradient of average_evidence in weight [D, K], noise_var [D] (eq-ei-gradient)."""
    cov_x = weight @ weight.T + np.diag(noise_var)
    ratio = np.linalg.solve(cov_x, data_cov).T  # data_cov cov_x^-1
    G = np.linalg.solve(cov_x, np.eye(len(data_cov)) - ratio)
    return -G @ weight, -0.5 * np.diag(G)


# --- book/01_exact_inference/03_learning.ipynb, cell 667349f2
def posterior_moments(weight, noise_var, data_cov):
    """Means of (x - b) z^T [D, K] and z z^T [K, K] (eq-ei-moments)."""
    scaled = weight / noise_var[:, None]
    precision = np.eye(weight.shape[1]) + weight.T @ scaled
    cov = np.linalg.solve(precision, np.eye(len(precision)))
    cross = data_cov @ scaled @ cov
    return cross, cov + cov @ scaled.T @ cross


def gradient_by_posterior(weight, noise_var, data_cov):
    """The same by Fisher's identity (eq-ei-fisher): moments of the posterior alone."""
    cross, second = posterior_moments(weight, noise_var, data_cov)
    by_weight = (cross - weight @ second) / noise_var[:, None]
    squares = np.diag(data_cov) + np.sum(weight * (weight @ second - 2 * cross), 1)
    return by_weight, 0.5 * (squares / noise_var**2 - 1 / noise_var)


# --- book/01_exact_inference/03_learning.ipynb, cell c1ea0fba
def em_step(weight, noise_var, data_cov):
    """One EM step (eq-ei-em-weight, eq-ei-em-noise): new weight and noise_var."""
    cross, second = posterior_moments(weight, noise_var, data_cov)
    weight = np.linalg.solve(second, cross.T).T
    return weight, np.diag(data_cov) - np.sum(weight * cross, 1)


# --- book/01_exact_inference/03_learning.ipynb, cell f8396b6b
def ppca(data_cov, num_latents):
    """Maximum-likelihood weight [D, K] and noise variance of PPCA (eq-ei-ppca)."""
    values, vectors = np.linalg.eigh(data_cov)
    values, vectors = values[::-1], vectors[:, ::-1]
    noise_var = np.mean(values[num_latents:])
    lengths = np.sqrt(values[:num_latents] - noise_var)
    return vectors[:, :num_latents] * lengths, noise_var


# --- book/01_exact_inference/04_real_images.ipynb, cell 99f936c9
import autograd.numpy as np
from autograd.scipy.stats import norm


# --- book/01_exact_inference/04_real_images.ipynb, cell 844644dd
def dequantise(x, levels, noise):
    """Whole pixels in [0, levels) plus uniform noise, scaled to [0, 1): all [B, D]."""
    return (x + noise) / levels


def cell_mass(x, mean, var):
    """Log-probability of whole pixels x [B, D] under independent Gaussians, [B]."""
    low, high = (x - mean) / np.sqrt(var), (x + 1 - mean) / np.sqrt(var)
    return np.sum(np.log(norm.cdf(high) - norm.cdf(low)), 1)


# --- book/01_exact_inference/05_estimating.ipynb, cell 699ee1b7
def prior_second_moment(x, weight, bias, noise_var):
    """log of E p(x | z)^2 / p(x)^2 under the prior, [B] (eq-ei-prior-variance)."""
    halved = log_evidence(x, weight, bias, noise_var / 2)
    constant = -0.5 * np.sum(np.log(4 * np.pi * noise_var))
    return halved - 2 * log_evidence(x, weight, bias, noise_var) + constant


# --- book/01_exact_inference/05_estimating.ipynb, cell 7d73f820
def log_mean_weight(log_w):
    """Log of the mean of weights [S], its error, the ESS (eq-ei-error-bar)."""
    num = len(log_w)
    value = logsumexp(log_w) - np.log(num)
    ess = np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w))
    return value, np.sqrt((num / ess - 1) / (num - 1)), ess


# --- book/01_exact_inference/05_estimating.ipynb, cell c359ed7f
def proposal_second_moment(s, num_latents):
    """E_q w^2 / p(x)^2, proposal s times too wide (eq-ei-importance-variance)."""
    inside = np.maximum(2 * s**2 - 1, 0.0)
    with np.errstate(divide="ignore"):
        return (s**2 / np.sqrt(inside)) ** num_latents


# --- book/01_exact_inference/05_estimating.ipynb, cell 1b3c46ae
def elbo(x, loc, cov, weight, bias, noise_var):
    """ELBO of q = N(loc [K], cov [K, K]) for one picture x [D] (eq-ei-elbo-closed)."""
    precision = np.eye(len(loc)) + weight.T @ (weight / noise_var[:, None])
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * cov)[1]
    at_loc = log_joint(x, loc, lambda z: z @ weight.T + bias, noise_var)
    return at_loc - 0.5 * np.trace(precision @ cov) + entropy


# --- book/01_exact_inference/05_estimating.ipynb, cell 7e9c7077
def mean_field_gap(precision):
    """Gap of the best diagonal Gaussian, in nats (eq-ei-mean-field-gap)."""
    return 0.5 * (np.sum(np.log(np.diag(precision))) - np.linalg.slogdet(precision)[1])


# --- book/01_exact_inference/06_a_bend.ipynb, cell 8c6c3b19
U, V = np.array([0.8, 1.5]), np.array([-0.8, 1.5])


def tanh_decoder(z):
    """A decoder that saturates (def-ei-bent): z [..., 1] -> [..., 2]."""
    return np.concatenate([2 * np.tanh(z), 0.25 * z], axis=-1)


def v_decoder(z):
    """A decoder with a kink at zero (def-ei-bent): z [..., 1] -> [..., 2]."""
    return U * np.maximum(z, 0) + V * np.maximum(-z, 0)


# --- book/01_exact_inference/06_a_bend.ipynb, cell 46ef60e7
def v_log_evidence(x, noise_var):
    """log p(x) of the V-shaped decoder, [B], exactly (eq-ei-two-pieces): x [B, 2]."""
    total = 0.0
    for slope, sign in ((U, 1.0), (-V, -1.0)):
        weight, bias = slope[:, None], np.zeros(2)
        mean, precision = posterior(x, weight, bias, noise_var)
        mass = norm.cdf(sign * mean[:, 0] * np.sqrt(precision[0, 0]))
        total = total + np.exp(log_evidence(x, weight, bias, noise_var)) * mass
    return np.log(total)
