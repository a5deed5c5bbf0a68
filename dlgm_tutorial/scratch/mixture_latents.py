"""The from-scratch code of book/03_mixture_latents. Written by `make scratch`; edit the chapter."""

# --- book/03_mixture_latents/01_one_gaussian_is_not_enough.ipynb, cell 518e57e7
import autograd.numpy as np
from autograd.scipy.special import logsumexp


# --- book/03_mixture_latents/01_one_gaussian_is_not_enough.ipynb, cell 4f5781c5
def log_normal(z, loc, log_scale):
    """log N(z; loc, exp(log_scale)^2), summed over the last axis: [..., K] -> [...]."""
    square = ((z - loc) * np.exp(-log_scale)) ** 2
    return -np.sum(0.5 * square + log_scale + 0.5 * np.log(2 * np.pi), -1)


# --- book/03_mixture_latents/01_one_gaussian_is_not_enough.ipynb, cell 90c36ca3
def log_mixture(z, log_weights, loc, log_scale):
    """log sum_k w_k N(z; loc_k, scale_k^2): z [..., K], components [C, K] -> [...]."""
    return logsumexp(log_weights + log_normal(z[..., None, :], loc, log_scale), -1)


# --- book/03_mixture_latents/01_one_gaussian_is_not_enough.ipynb, cell b5cf96b9
def normal_entropy(log_scale):
    """Entropy of N(., exp(log_scale)^2), summed over the last axis: [..., K] -> [...]."""
    return np.sum(log_scale + 0.5 * np.log(2 * np.pi * np.e), -1)


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell b9709ceb
import autograd.numpy as np
from autograd.scipy.special import gammaln, psi
from scipy.special import roots_legendre


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell 6b4e6742
def stick_breaking(log_v, log1m_v):
    """log pi [..., C] from log v and log(1 - v) [..., C-1]."""
    zero = np.zeros((*np.shape(log_v)[:-1], 1))
    rest = np.concatenate([zero, np.cumsum(log1m_v, -1)], -1)
    return np.concatenate([log_v, zero], -1) + rest


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell 4748bc40
def stick_prior(kind, concentration, num_components):
    """(alpha, beta) [C-1] of the fractions' Beta laws; kind: "dirichlet" or "gem"."""
    if kind == "gem":
        return np.ones(num_components - 1), concentration * np.ones(num_components - 1)
    after = np.arange(num_components - 1, 0, -1)
    return concentration * np.ones_like(after, float), concentration * after


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell e8579368
def log1mexp(y):
    """log(1 - exp(y)) for y < 0, accurate at both ends."""
    near = y > -np.log(2)
    return np.where(near, np.log(-np.expm1(np.where(near, y, -1.0))),
                    np.log1p(-np.exp(np.where(near, -1.0, y))))


def log1m_v_from(log_t, a):
    """log(1 - v) of v = (1 - t)^(1/a); where t underflows, 1 - v is t / a."""
    tiny = log_t < -300
    log_v = log1mexp(np.where(tiny, -1.0, log_t)) / a
    return np.where(tiny, log_t - np.log(a), log1mexp(log_v))


def kumaraswamy_draw(log_a, log_b, u):
    """(log v, log(1 - v)) of a Kumaraswamy variable from uniform noise, elementwise."""
    log_t = np.log(u) / np.exp(log_b)
    return log1mexp(log_t) / np.exp(log_a), log1m_v_from(log_t, np.exp(log_a))


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell 7355ac92
def kumaraswamy_log_mean(a, b):
    """log E v = log(b B(1 + 1/a, b)), elementwise."""
    return gammaln(1 + 1 / a) + gammaln(1 + b) - gammaln(1 + 1 / a + b)


def kumaraswamy_entropy(a, b):
    """Entropy of a Kumaraswamy variable in nats, elementwise."""
    return -np.log(a * b) + (1 - 1 / a) * (psi(b + 1) + np.euler_gamma) + 1 - 1 / b


def stick_mean_log_weights(log_a, log_b):
    """log E pi [..., C]: the mean of a product of independent fractions."""
    log_mean = kumaraswamy_log_mean(np.exp(log_a), np.exp(log_b))
    return stick_breaking(log_mean, log1mexp(log_mean))


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell cf091e02
def expected_log1m_series(a, b, num_terms=10):
    """E log(1 - v) by the first terms of the series; for comparison only."""
    m = np.arange(1, num_terms + 1)
    a, b = np.asarray(a)[..., None], np.asarray(b)[..., None]
    log_beta = gammaln(m / a) + gammaln(b) - gammaln(m / a + b)
    return -np.sum(b / (m + a * b) * np.exp(log_beta), -1)


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell 7812bcc7
def smooth_step_rule(num_nodes=32):
    """log s and weights on (0, 1): Gauss-Legendre in r, s = r^3 (10 - 15 r + 6 r^2)."""
    r, w = roots_legendre(num_nodes)
    r, w = (r + 1) / 2, w / 2
    step = lambda r: r**3 * (10 - 15 * r + 6 * r**2)
    log_s = np.where(r < 0.5, np.log(step(r)), np.log1p(-step(1 - r)))
    return log_s, w * 30 * (r * (1 - r)) ** 2


def expected_log1m(a, b):
    """E log(1 - v) by the subtracted quadrature; a in [0.1, 20], b in [0.1, 30]."""
    log_s, weights = smooth_step_rule()
    a, b = np.asarray(a)[..., None], np.asarray(b)[..., None]
    log_t = log_s / b
    return np.sum((log1m_v_from(log_t, a) - log_t) * weights, -1) - 1 / b[..., 0]


def kl_kumaraswamy_beta(a, b, alpha, beta):
    """KL(Kumaraswamy(a, b) || Beta(alpha, beta)) in nats, elementwise."""
    log_beta = gammaln(alpha) + gammaln(beta) - gammaln(alpha + beta)
    return (np.log(a * b) - (a - alpha) / a * (psi(b + 1) + np.euler_gamma) - 1 + 1 / b
            - (beta - 1) * expected_log1m(a, b) + log_beta)
