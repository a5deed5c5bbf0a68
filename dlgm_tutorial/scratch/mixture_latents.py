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


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell 68345ce9
def expected_log1m_series(a, b, num_terms=10):
    """E log(1 - v) by the first terms of the series; for comparison only."""
    m = np.arange(1, num_terms + 1)
    a, b = np.array(a)[..., None], np.array(b)[..., None]
    log_beta = gammaln(m / a) + gammaln(b) - gammaln(m / a + b)
    return -np.sum(b / (m + a * b) * np.exp(log_beta), -1)


# --- book/03_mixture_latents/02_kumaraswamy_and_sticks.ipynb, cell 718455a8
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
    a, b = np.array(a)[..., None], np.array(b)[..., None]
    log_t = log_s / b
    return np.sum((log1m_v_from(log_t, a) - log_t) * weights, -1) - 1 / b[..., 0]


def kl_kumaraswamy_beta(a, b, alpha, beta):
    """KL(Kumaraswamy(a, b) || Beta(alpha, beta)) in nats, elementwise."""
    log_beta = gammaln(alpha) + gammaln(beta) - gammaln(alpha + beta)
    return (np.log(a * b) - (a - alpha) / a * (psi(b + 1) + np.euler_gamma) - 1 + 1 / b
            - (beta - 1) * expected_log1m(a, b) + log_beta)


# --- book/03_mixture_latents/03_stick_breaking_vae.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/03_mixture_latents/03_stick_breaking_vae.ipynb, cell a13ef7f3
def stick_bound(log_px, log_a, log_b, concentration, u):
    """The bound [B]: log_px maps pi [S, B, C] to [S, B]; noise u [S, B, C-1]."""
    pi = np.exp(stick_breaking(*kumaraswamy_draw(log_a, log_b, u)))
    kl = kl_kumaraswamy_beta(np.exp(log_a), np.exp(log_b), 1.0, concentration)
    return np.mean(log_px(pi), 0) - np.sum(kl, -1)


# --- book/03_mixture_latents/03_stick_breaking_vae.ipynb, cell 8c3ada74
def forward(layers, h):
    """A perceptron with ReLU between its layers [(W [out, in], b [out]), ...]."""
    for W, b in layers[:-1]:
        h = np.maximum(h @ W.T + b, 0)
    return h @ layers[-1][0].T + layers[-1][1]


def bernoulli_log_px(x, logits):
    """log p(x) of binary pixels, summed over the last axis."""
    return -np.sum(np.logaddexp(0, (1 - 2 * x) * logits), -1)


def stick_vae_bound(parameters, x, concentration, u):
    """parameters: (encoder layers, decoder layers); x [B, D], u [S, B, C-1] -> [B]."""
    encoder, decoder = parameters
    log_a, log_b = np.split(forward(encoder, x), 2, -1)
    log_px = lambda pi: bernoulli_log_px(x, forward(decoder, pi))
    return stick_bound(log_px, log_a, log_b, concentration, u)


# --- book/03_mixture_latents/04_five_bounds.ipynb, cell 3abff063
def closed_forms(loc, log_scale, prior):
    """C_k and H_k, [B, C] each, of [B, C, K]; prior: (loc, log_scale, alpha, beta)."""
    prior_loc, prior_log_scale = prior[:2]
    square = (loc - prior_loc) ** 2 + np.exp(2 * log_scale)
    square = square * np.exp(-2 * prior_log_scale)
    cross = -np.sum(0.5 * square + prior_log_scale + 0.5 * np.log(2 * np.pi), -1)
    return cross, normal_entropy(log_scale)


def stick_kl(log_a, log_b, prior):
    """KL(q(pi) || p(pi)) [B], summed over the C - 1 fractions."""
    return np.sum(kl_kumaraswamy_beta(np.exp(log_a), np.exp(log_b), *prior[2:]), -1)


# --- book/03_mixture_latents/04_five_bounds.ipynb, cell e13254b3
def draw_log_weights(log_a, log_b, u):
    """log pi [S, B, C] from uniform noise [S, B, C-1]."""
    return stick_breaking(*kumaraswamy_draw(log_a, log_b, u))


def mixture_bound(kind, log_px, loc, log_scale, log_a, log_b, prior, u, eps):
    """Bounds per example, [B]; u [S, B, C-1] and eps [S, B, C, K] are the noise."""
    z = loc + np.exp(log_scale) * eps                  # one draw from every component
    cross, entropy = closed_forms(loc, log_scale, prior)
    mean = np.exp(stick_mean_log_weights(log_a, log_b))
    kl = stick_kl(log_a, log_b, prior)
    R = np.mean(log_px(z), 0)
    if kind == "indicator":
        return np.sum(mean * (R + cross + entropy), -1) - kl
    log_pi = draw_log_weights(log_a, log_b, u)
    if kind == "paper":
        own = logsumexp(log_pi + log_normal(z, loc, log_scale), -1)
        return np.sum(mean * (R + cross), -1) - np.mean(own, 0) - kl
    log_pi = log_pi[:, :, None]                        # outside and inside: one draw
    log_q = log_mixture(z, log_pi, loc[:, None], log_scale[:, None])       # [S, B, C]
    log_p = log_mixture(z, log_pi, prior[0], prior[1])
    inner = np.sum(np.exp(log_pi[:, :, 0]) * (log_p - log_q), -1)
    return np.sum(mean * R, -1) + np.mean(inner, 0) - kl


# --- book/03_mixture_latents/04_five_bounds.ipynb, cell 1bc04de3
def collapsed_bound(log_px, loc, log_scale, log_rho, prior, log_w, eps):
    """The bound with pi integrated out, [B]; log_rho [B, C], log_w [C]."""
    z = loc + np.exp(log_scale) * eps
    cross, entropy = closed_forms(loc, log_scale, prior)
    f = np.mean(log_px(z), 0) + cross + entropy
    return np.sum(np.exp(log_rho) * (f + log_w - log_rho), -1)


def siw_bound(log_px, loc, log_scale, log_rho, prior, log_w, eps):
    """Stratified importance weights, [B]: draws eps [S, B, C, K] of all components."""
    z = loc + np.exp(log_scale) * eps
    log_q = log_mixture(z, log_rho[:, None], loc[:, None], log_scale[:, None])
    log_p = log_mixture(z, log_w, prior[0], prior[1])
    log_weight = log_rho + log_px(z) + log_p - log_q   # [S, B, C]
    return logsumexp(logsumexp(log_weight, -1), 0) - np.log(len(eps))
