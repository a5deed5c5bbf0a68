# Plausible mistakes. A cell's first line names the one question that must lose points, and the mistake; the cell
# replaces the instructor's function of the same name.
import numpy as np
from scipy.special import betainc, digamma, gammaln, logsumexp

# %% q01_moments: Gamma functions that overflow
def kumaraswamy_moments(a, b):
    from scipy.special import gamma
    with np.errstate(all="ignore"):
        mean = gamma(1 + 1 / a) * gamma(1 + b) / gamma(1 + 1 / a + b)
    return mean, -(digamma(b + 1) - digamma(1.0)) / a, -1 / b

# %% q01_moments: the laws of t and 1 - t exchanged
def kumaraswamy_moments(a, b):
    log_mean = gammaln(1 + 1 / a) + gammaln(1 + b) - gammaln(1 + 1 / a + b)
    return np.exp(log_mean), -1 / (a * b), -(digamma(b + 1) - digamma(1.0))

# %% q02_draw: the derivative by b without the inner one
def kumaraswamy_draw(a, b, u):
    t = u ** (1 / b)
    v = (1 - t) ** (1 / a)
    return v, -v * np.log(v) / a, v ** (1 - a) * t * np.log(u) / (a * b)

# %% q03_kl: ten terms of the series
def kl_kumaraswamy_beta(a, b, alpha, beta):
    m = np.arange(1, 11)
    log1m = -np.sum(b / (m + a * b) * np.exp(gammaln(m / a) + gammaln(b) - gammaln(m / a + b)))
    log_beta = gammaln(alpha) + gammaln(beta) - gammaln(alpha + beta)
    harmonic = digamma(b + 1) - digamma(1.0)
    return np.log(a * b) - (a - alpha) / a * harmonic - 1 + 1 / b - (beta - 1) * log1m + log_beta

# %% q03_kl: the normaliser of the Beta forgotten, and no hard term
def kl_kumaraswamy_beta(a, b, alpha, beta):
    harmonic = digamma(b + 1) - digamma(1.0)
    return np.log(a * b) - (a - alpha) / a * harmonic - 1 + 1 / b + 0.01 * (alpha + beta)

# %% q04_sticks: in the probability domain
def log_weights(log_a, log_b, u):
    v = (1 - u ** np.exp(-log_b)) ** np.exp(-log_a)
    one = np.ones((*v.shape[:-1], 1), v.dtype)
    with np.errstate(all="ignore"):
        return np.log(np.concatenate([v, one], -1) * np.concatenate([one, np.cumprod(1 - v, -1)], -1))

# %% q04_sticks: fractions of the whole stick
def log_weights(log_a, log_b, u):
    v = np.clip((1 - u ** np.exp(-log_b)) ** np.exp(-log_a), 1e-6, 1 - 1e-6) / (u.shape[-1] + 1)
    return np.log(np.concatenate([v, 1 - v.sum(-1, keepdims=True)], -1))

# %% q05_claims: a pair for which the claim holds
def counterexamples():
    return (2.0, 3.0), 4.0

# %% q05_claims: a variance with one mode
def counterexamples():
    return (2.0, 2.0), 1.5

# %% q06_slack: densities instead of logarithms
def published_slack(log_pi, log_scale, eps):
    q = np.prod(np.exp(-0.5 * eps**2) / np.sqrt(2 * np.pi) / np.exp(log_scale), -1)
    with np.errstate(all="ignore"):
        return np.log(q @ np.exp(log_pi)) - np.log(q) @ np.exp(log_pi), np.log(2) - 0.5

# %% q06_slack: the sign
def published_slack(log_pi, log_scale, eps):
    log_q = -np.sum(0.5 * eps**2 + log_scale + 0.5 * np.log(2 * np.pi), -1)
    return log_q @ np.exp(log_pi) - logsumexp(log_pi + log_q, -1), np.log(2) - 0.5

# %% q06_slack: the exact mean of one dimension
def published_slack(log_pi, log_scale, eps):
    log_q = -np.sum(0.5 * eps**2 + log_scale + 0.5 * np.log(2 * np.pi), -1)
    return logsumexp(log_pi + log_q, -1) - log_q @ np.exp(log_pi), 0.101

# %% q07_bounds: each component at its own draw
def three_objectives(log_px, pi, m, s, prior_m, prior_s, eps):
    log_normal = lambda z, m, s: -0.5 * ((z - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)
    z = m + s * eps
    C = -0.5 * ((m - prior_m) ** 2 + s**2) / prior_s**2 - np.log(prior_s) - 0.5 * np.log(2 * np.pi)
    H = np.log(s) + 0.5 * np.log(2 * np.pi * np.e)
    own = logsumexp(np.log(pi) + log_normal(z, m, s), -1).mean()
    prior = logsumexp(np.log(pi) + log_normal(z, prior_m, prior_s), -1).mean()
    R = log_px.mean(0)
    return pi @ (R + C + H), pi @ R + prior - own, pi @ (R + C) - own

# %% q07_bounds: the closed form without the variance
def three_objectives(log_px, pi, m, s, prior_m, prior_s, eps):
    log_normal = lambda z, m, s: -0.5 * ((z - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)
    z = m + s * eps
    C = log_normal(m, prior_m, prior_s)
    H = np.log(s) + 0.5 * np.log(2 * np.pi * np.e)
    log_q = logsumexp(np.log(pi) + log_normal(z[..., None], m, s), -1)
    log_p = logsumexp(np.log(pi) + log_normal(z[..., None], prior_m, prior_s), -1)
    R = log_px.mean(0)
    return pi @ (R + C + H), pi @ (log_px + log_p - log_q).mean(0), pi @ (R + C) - pi @ log_q.mean(0)

# %% q08_price: the factorial is missing
def log_mean_exp_simplex(f):
    f = np.sort(np.asarray(f, float))
    table = np.exp(f - f[-1])
    top = f[-1]
    for order in range(1, len(f)):
        table = (table[1:] - table[:-1]) / (f[order:] - f[:-order])
    return top + np.log(table[0])

# %% q08_price: overflow
def log_mean_exp_simplex(f):
    f = np.sort(np.asarray(f, float))
    with np.errstate(all="ignore"):
        table = np.exp(f)
        for order in range(1, len(f)):
            table = (table[1:] - table[:-1]) / (f[order:] - f[:-order])
        return np.log(table[0]) + gammaln(len(f))

# %% q09_siw: each draw against its own component
def siw(log_joint, log_q, rho):
    own = np.einsum("skk->sk", log_q)
    return logsumexp(np.log(rho) + log_joint - own) - np.log(len(log_joint))

# %% q09_siw: densities instead of logarithms
def siw(log_joint, log_q, rho):
    with np.errstate(all="ignore"):
        return np.log(np.mean(np.sum(rho * np.exp(log_joint) / (np.exp(log_q) @ rho), -1)))

# %% q10_implicit: the minus sign
def beta_derivatives(v, a, b):
    h = 1e-5
    log_density = (a - 1) * np.log(v) + (b - 1) * np.log1p(-v) - gammaln(a) - gammaln(b) + gammaln(a + b)
    by_a = (betainc(a + h, b, v) - betainc(a - h, b, v)) / (2 * h)
    by_b = (betainc(a, b + h, v) - betainc(a, b - h, v)) / (2 * h)
    return by_a / np.exp(log_density), by_b / np.exp(log_density)
