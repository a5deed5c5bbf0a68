# Right answers by another road: the hidden tests must accept each with full marks. A cell's first line names its
# question.
import numpy as np

# %% q1_chain: matrices of the linear recursion
def short_run(z0, noise, weight, bias, noise_var, x, step_size, stochastic=True):
    K = weight.shape[1]
    s = np.broadcast_to(step_size, (K,))
    precision = np.eye(K) + weight.T @ weight / noise_var
    push = weight.T @ (x - bias) / noise_var
    z = np.array(z0)
    for e in noise:
        z = z @ (np.eye(K) - precision * s**2 / 2) + s**2 / 2 * push + stochastic * s * e
    return z, z0

# %% q2_law: doubling the recursion's sum
def end_point(lam, mu, step_size, num_steps, stochastic=True):
    h = 0.5 * step_size**2
    share, noise, kept = np.zeros(len(lam)), np.zeros(len(lam)), np.ones(len(lam))
    a = 1 - h * lam
    for _ in range(num_steps):                       # 1 - a^(t+1) = (1 - a^t) a + h lam: no cancellation
        share, noise, kept = share * a + h * lam, noise * a**2 + step_size**2, kept * a
    var = kept**2 + (noise if stochastic else 0.0)
    gap = ((1 - share) * mu) ** 2
    return share * mu, var, 0.5 * np.sum(lam * var + lam * gap - 1 - np.log(lam * var))

# %% q3_silent: Newton's way to the contraction
def best_silent_step(lam, mu, num_steps):
    want = -0.5 * np.log(lam * (1 + mu**2)) / num_steps          # log(1 - h lam)
    u = -want * (1 + want / 2)
    for _ in range(60):
        u = u + (np.log1p(-u) - want) * (1 - u)
    return np.sqrt(2 * u / lam), 0.5 * np.log1p(mu * mu)

# %% q4_grid: with SciPy's densities, the posterior in log space
def grid_law(z, x, noise_var, step_size, num_steps):
    from scipy.special import logsumexp, rel_entr
    from scipy.stats import norm
    dz = z[1] - z[0]
    mean = 2 * np.abs(z) + np.log1p(np.exp(-4 * np.abs(z))) - np.log(2)
    log_p = norm.logpdf(z) + norm.logpdf(x, mean, np.sqrt(noise_var))
    log_p = log_p - logsumexp(log_p) - np.log(dz)
    centre = z + step_size**2 / 2 * ((x - mean) * 2 * np.tanh(2 * z) / noise_var - z)
    laws, kernel = [norm.pdf(z)], norm.pdf(z[:, None], centre, step_size)
    for _ in range(num_steps):
        laws.append(kernel @ laws[-1] * dz)
    laws = np.array(laws)
    floor = np.maximum(laws, 1e-320)
    return laws, (rel_entr(laws, laws) + laws * (np.log(floor) - log_p)).sum(1) * dz

# %% q5_bound: the slope of one step by the product rule on the doubled angle
def jacobian_terms(z0, noise, step_size, x, noise_var):
    h, z, logs, flags = step_size**2 / 2, np.array(z0), [], []
    gap = lambda v: x - 2 * np.abs(v) - np.log1p(np.exp(-4 * np.abs(v))) + np.log(2)
    for e in noise:
        t = np.tanh(2 * z)
        sech2 = 4 * np.exp(-4 * np.abs(z)) / (1 + np.exp(-4 * np.abs(z))) ** 2
        slope = 1 - h - h * (2 * t) ** 2 / noise_var + h * gap(z) * 4 * sech2 / noise_var
        logs.append(np.log(np.abs(slope)))
        flags.append((slope < 0).any() and (slope > 0).any())
        z = (1 - h) * z + h * gap(z) * 2 * t / noise_var + step_size * e
    fit = 0.5 * gap(z) ** 2 / noise_var + 0.5 * np.log(2 * np.pi * noise_var)
    return 0.5 * (z**2 - z0**2) + fit - np.sum(np.reshape(logs, (-1, len(z0))), 0), bool(np.any(flags))

# %% q6_tangent: dual numbers
def tangent(z0, noise, step_size, x, noise_var):
    z, u = np.array(z0), np.zeros(len(z0))
    for e in noise:
        t, dt = np.tanh(2 * z), 2 * (1 - np.tanh(2 * z) ** 2) * u
        g, dg = 2 * np.abs(z) + np.log1p(np.exp(-4 * np.abs(z))) - np.log(2), 2 * t * u
        score, dscore = -z + (x - g) * 2 * t / noise_var, -u + 2 * (-dg * t + (x - g) * dt) / noise_var
        z, u = z + step_size**2 / 2 * score + step_size * e, \
            u + step_size * score + step_size**2 / 2 * dscore + e
    return z, u

# %% q7_sandwich: chain by chain with SciPy
def sandwich(ends, centres, step_size, log_p):
    from scipy.special import logsumexp
    S, K = ends.shape
    low, high = [], []
    for i in range(S):
        row = -0.5 * ((ends[i] - centres) ** 2).sum(1) / step_size**2 - K * np.log(step_size * np.sqrt(2 * np.pi))
        low.append(logsumexp(np.delete(row, i)) - np.log(S - 1) - log_p[i])
        high.append(logsumexp(row) - np.log(S) - log_p[i])
    return np.mean(low), np.mean(high)

# %% q8_learning: recursions for mean and variance
def learning_path(w, c, noise_var, step_size, num_steps, num_iterations):
    path = np.full(num_iterations + 1, float(w))
    h = step_size**2 / 2
    for i in range(num_iterations):
        a = 1 - h * (1 + path[i] ** 2 / noise_var)
        kept = a**num_steps
        slope = h * path[i] / noise_var * (num_steps if a == 1 else (1 - kept) / (1 - a))
        var = kept**2 + step_size**2 * (1 - kept**2) / (1 - a**2)
        path[i + 1] = c * slope / (var + c * slope**2)
    return path

# %% q9_layers: by the map between the coordinates
def two_coordinates(a, t, w, noise_var, x):
    to_states = np.array([[t, a], [0.0, 1.0]])
    design = np.array([[w, 0.0]]) @ to_states
    precision = np.eye(2) + design.T @ design / noise_var
    mean = np.linalg.solve(precision, design[0] * x / noise_var)
    back = np.linalg.inv(to_states)
    return mean, precision, to_states @ mean, back.T @ precision @ back

# %% q10_annealing: one chain at a time, by its proposal densities
def annealed_log_weights(z0, noise, uniform, betas, weight, bias, noise_var, x, step_size):
    precision, push = weight.T @ weight / noise_var, weight.T @ (x - bias) / noise_var
    constant = -0.5 * ((x - bias) ** 2).sum() / noise_var - 0.5 * len(bias) * np.log(2 * np.pi * noise_var)
    fit = lambda z: constant + z @ push - 0.5 * np.einsum("sk,kl,sl->s", z, precision, z)
    z, log_w = np.array(z0), np.zeros(len(z0))
    for before, beta, e, u in zip(betas[:-1], betas[1:], noise, uniform, strict=True):
        log_w += (beta - before) * fit(z)
        score = lambda v, beta=beta: beta * (push - v @ precision) - v
        new = z + step_size**2 / 2 * score(z) + step_size * e
        reverse = (z - new - step_size**2 / 2 * score(new)) / step_size
        change = beta * (fit(new) - fit(z)) - 0.5 * (new**2 - z**2).sum(1) + 0.5 * (e**2 - reverse**2).sum(1)
        stay = u >= np.exp(np.minimum(change, 0.0))
        z = np.where(stay[:, None], z, new)
    return log_w
