# Right answers by another road: the hidden tests must accept each with full marks. A cell's first line names its
# question.
import numpy as np
from scipy.special import digamma, gammaln

# %% q01_moments: by the Beta function
def kumaraswamy_moments(a, b):
    from scipy.special import betaln
    return np.exp(np.log(b) + betaln(1 + 1 / a, b)), (digamma(1) - digamma(b + 1)) / a, -1.0 / b

# %% q02_draw: through the logarithms
def kumaraswamy_draw(a, b, u):
    log_t = np.log(u) / b
    log_v = np.log(-np.expm1(log_t)) / a
    v = np.exp(log_v)
    return v, -v * log_v / a, np.exp((1 - a) * log_v + log_t) * log_t / (a * b)

# %% q03_kl: adaptive quadrature in place of fixed nodes
def kl_kumaraswamy_beta(a, b, alpha, beta):
    from scipy.integrate import quad

    def g(s):
        t = s ** (1 / b)
        if t < 1e-9:
            return -np.log(a) + 0.5 * t * (1 - 1 / a)
        return np.log(-np.expm1(np.log1p(-t) / a) / t) if t < 1 else 0.0

    parts = [quad(g, *ends, epsabs=1e-11, epsrel=1e-11, limit=400)[0] for ends in [(0, 0.1), (0.1, 0.9), (0.9, 1)]]
    log1m = sum(parts) - 1 / b
    log_beta = gammaln(alpha) + gammaln(beta) - gammaln(alpha + beta)
    harmonic = digamma(b + 1) + np.euler_gamma
    return np.log(a * b) - (a - alpha) / a * harmonic - 1 + 1 / b - (beta - 1) * log1m + log_beta

# %% q04_sticks: in double precision, cast at the end
def log_weights(log_a, log_b, u):
    dtype = np.asarray(log_a).dtype
    a, b, u = (np.asarray(n, float) for n in (np.exp(log_a), np.exp(log_b), u))
    log_t = np.log(u) / b
    loglog = np.where(log_t < -30, log_t, np.log(-np.log(-np.expm1(np.maximum(log_t, -30))))) - np.log(a)
    log_v = -np.exp(loglog)
    log1m = np.where(loglog < -30, loglog, np.log(-np.expm1(np.minimum(log_v, -1e-30))))
    zero = np.zeros((*log_v.shape[:-1], 1))
    rest = np.concatenate([zero, np.cumsum(log1m, -1)], -1)
    return (np.concatenate([log_v, zero], -1) + rest).astype(dtype)

# %% q05_claims: others
def counterexamples():
    return np.array([5.0, 5.0]), 9

# %% q06_slack: term by term
def published_slack(log_pi, log_scale, eps):
    log_q = -0.5 * (eps**2).sum(-1) - log_scale.sum(-1) - 0.5 * eps.shape[-1] * np.log(2 * np.pi)
    top = log_q.max(-1, keepdims=True)
    pi = np.exp(log_pi)
    return np.log(np.exp(log_q - top) @ pi) + top[:, 0] - (pi * log_q).sum(-1), np.log(2 / np.sqrt(np.e))

# %% q07_bounds: by loops
def three_objectives(log_px, pi, m, s, prior_m, prior_s, eps):
    density = lambda z, m, s: np.exp(-0.5 * ((z - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    indicator = mixture = hybrid = 0.0
    for k in range(len(pi)):
        square = (m[k] - prior_m[k]) ** 2 + s[k] ** 2
        cross = -np.log(prior_s[k] * np.sqrt(2 * np.pi)) - square / (2 * prior_s[k] ** 2)
        indicator += pi[k] * (log_px[:, k].mean() + cross + 0.5 + np.log(s[k] * np.sqrt(2 * np.pi)))
        for i in range(len(eps)):
            z = m[k] + s[k] * eps[i, k]
            log_q, log_p = np.log(pi @ density(z, m, s)), np.log(pi @ density(z, prior_m, prior_s))
            mixture += pi[k] * (log_px[i, k] + log_p - log_q) / len(eps)
            hybrid += pi[k] * (log_px[i, k] + cross - log_q) / len(eps)
    return indicator, mixture, hybrid

# %% q08_price: the closed form of divided differences
def log_mean_exp_simplex(f):
    f = np.asarray(f, float)
    difference = f[:, None] - f + np.eye(len(f))
    return f.max() + np.log(np.sum(np.exp(f - f.max()) / np.prod(difference, 1))) + gammaln(len(f))

# %% q09_siw: in the probability domain, the largest taken out first
def siw(log_joint, log_q, rho):
    ratio = log_joint - np.log(np.exp(log_q - log_q.max(-1, keepdims=True)) @ rho) - log_q.max(-1)
    top = ratio.max()
    return top + np.log(np.mean(np.exp(ratio - top) @ rho))

# %% q10_implicit: by the quantile itself
def beta_derivatives(v, a, b):
    from scipy.special import betainc, betaincinv
    u, h = betainc(a, b, v), 1e-5
    difference = lambda da, db: (betaincinv(a + da, b + db, u) - betaincinv(a - da, b - db, u)) / (2 * h)
    return difference(h, 0.0), difference(0.0, h)
