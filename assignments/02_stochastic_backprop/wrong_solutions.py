# Plausible mistakes. A cell's first line names the one question that must lose points, and the mistake; the cell
# replaces the instructor's function of the same name.
import numpy as np

# %% q1_bonnet_price: the exponential of the mean
def exponential_gradients(a, mu, C):
    value = np.exp(a @ mu)
    return value, value * a, 0.5 * value * np.outer(a, a)

# %% q1_bonnet_price: the half of Price's theorem is missing
def exponential_gradients(a, mu, C):
    value = np.exp(a @ mu + 0.5 * a @ C @ a)
    return value, value * a, value * np.outer(a, a)

# %% q1_bonnet_price: off-diagonal entries tied in pairs
def exponential_gradients(a, mu, C):
    value = np.exp(a @ mu + 0.5 * a @ C @ a)
    return value, value * a, value * np.outer(a, a) * (1 - 0.5 * np.eye(len(a)))

# %% q2_factor_gradient: the transpose
def factor_gradient(noise, g):
    return noise.T @ g / len(noise)

# %% q2_factor_gradient: the half of Price's theorem
def factor_gradient(noise, g):
    return 0.5 * g.T @ noise / len(noise)

# %% q2_factor_gradient: a sum
def factor_gradient(noise, g):
    return g.T @ noise

# %% q3_baseline: the mean of f
def best_baseline(c, mu, sigma):
    return 0.5 * c * (mu**2 + sigma**2), c**2 * (2 * mu**2 + 2.5 * sigma**2)

# %% q3_baseline: the second moment in place of the variance
def best_baseline(c, mu, sigma):
    return 0.5 * c * (mu**2 + 3 * sigma**2), c**2 * (3 * mu**2 + 1.5 * sigma**2)

# %% q4_rank_one: the other root's sign
def rank_one_sample(mu, d, u, noise):
    s = d**-0.5
    w = s * u
    return mu + s * (noise + (noise @ w)[:, None] * w / (1 + w @ w + np.sqrt(1 + w @ w)))

# %% q4_rank_one: the covariance factor where the precision factor belongs
def rank_one_sample(mu, d, u, noise):
    s = d**-0.5
    w = s * u
    return mu + s * (noise - (noise @ w)[:, None] * w / (1 + w @ w))

# %% q4_rank_one: the formula as printed
def rank_one_sample(mu, d, u, noise):
    s = d**-0.5
    w = s * u
    t = w @ w
    gamma = (1 - np.sqrt(1 / (1 + t))) / t
    return mu + s * (noise - gamma * (noise @ w)[:, None] * w)

# %% q4_rank_one: dense linear algebra for the sample
def rank_one_sample(mu, d, u, noise):
    return mu + noise @ np.linalg.cholesky(np.linalg.inv(np.diag(d) + np.outer(u, u))).T

# %% q4_rank_one: the log-determinant of the diagonal alone
def rank_one_kl(mu, d, u):
    trace = np.sum(1 / d) - np.sum((u / d) ** 2) / (1 + np.sum(u**2 / d))
    return 0.5 * (mu @ mu + trace + np.sum(np.log(d)) - len(mu))

# %% q4_rank_one: minus one where minus K belongs
def rank_one_kl(mu, d, u):
    t = np.sum(u**2 / d)
    trace = np.sum(1 / d) - np.sum((u / d) ** 2) / (1 + t)
    return 0.5 * (mu @ mu + trace + np.sum(np.log(d)) + np.log1p(t) - 1)

# %% q5_backward: the derivative of tanh is forgotten
def two_layer_gradients(v, xi1, xi2, G1, G2, A, a, B, b):
    logits = B @ (np.tanh(A @ (G2 @ xi2) + a) + G1 @ xi1) + b
    delta1 = B.T @ (v - 0.5 * (1 + np.tanh(0.5 * logits)))
    delta2 = A.T @ delta1
    value = v @ logits - np.sum(np.logaddexp(0, logits))
    return value, G1.T @ delta1, G2.T @ delta2, np.outer(delta1, xi1), np.outer(delta2, xi2)

# %% q5_backward: the noise of the layer passes through tanh too
def two_layer_gradients(v, xi1, xi2, G1, G2, A, a, B, b):
    bent = np.tanh(A @ (G2 @ xi2) + a)
    logits = B @ (bent + G1 @ xi1) + b
    value = v @ logits - np.sum(np.logaddexp(0, logits))
    delta1 = (1 - bent**2) * (B.T @ (v - 0.5 * (1 + np.tanh(0.5 * logits))))
    delta2 = A.T @ delta1
    return value, G1.T @ delta1, G2.T @ delta2, np.outer(delta1, xi1), np.outer(delta2, xi2)

# %% q5_backward: gradient of the likelihood by the probabilities
def two_layer_gradients(v, xi1, xi2, G1, G2, A, a, B, b):
    bent = np.tanh(A @ (G2 @ xi2) + a)
    logits = B @ (bent + G1 @ xi1) + b
    p = 0.5 * (1 + np.tanh(0.5 * logits))
    delta1 = B.T @ (v / p - (1 - v) / (1 - p))
    delta2 = A.T @ ((1 - bent**2) * delta1)
    value = v @ logits - np.sum(np.logaddexp(0, logits))
    return value, G1.T @ delta1, G2.T @ delta2, np.outer(delta1, xi1), np.outer(delta2, xi2)

# %% q5_backward: log(1 + exp) overflows
def two_layer_gradients(v, xi1, xi2, G1, G2, A, a, B, b):
    bent = np.tanh(A @ (G2 @ xi2) + a)
    logits = B @ (bent + G1 @ xi1) + b
    value = v @ logits - np.sum(np.log(1 + np.exp(logits)))
    delta1 = B.T @ (v - 1 / (1 + np.exp(-logits)))
    delta2 = A.T @ ((1 - bent**2) * delta1)
    return value, G1.T @ delta1, G2.T @ delta2, np.outer(delta1, xi1), np.outer(delta2, xi2)

# %% q6_free_energy: the printed half
def free_energy_gradient(noise, g, R):
    return R - np.linalg.inv(R).T - 0.5 * g.T @ noise / len(noise)

# %% q6_free_energy: the inverse is not transposed
def free_energy_gradient(noise, g, R):
    return R - np.linalg.inv(R) - g.T @ noise / len(noise)

# %% q6_free_energy: the gradient of the bound, not of the free energy
def free_energy_gradient(noise, g, R):
    return g.T @ noise / len(noise) - R + np.linalg.inv(R).T

# %% q7_weights: the one is not subtracted
def relative_variance(m, tau, m_q, s):
    width = 2 * s**2 - tau**2
    return np.inf if width <= 0 else s**2 / (tau * np.sqrt(width)) * np.exp((m - m_q) ** 2 / width)

# %% q7_weights: posterior and proposal exchanged
def relative_variance(m, tau, m_q, s):
    width = 2 * tau**2 - s**2
    return np.inf if width <= 0 else tau**2 / (s * np.sqrt(width)) * np.exp((m - m_q) ** 2 / width) - 1

# %% q7_weights: nan where the integral diverges
def relative_variance(m, tau, m_q, s):
    width = 2 * s**2 - tau**2
    return s**2 / (tau * np.sqrt(width)) * np.exp((m - m_q) ** 2 / width) - 1

# %% q7_weights: a mixture of the logarithms
def defensive_log_weights(log_likelihood, log_prior, log_q, alpha):
    return log_likelihood + log_prior - (alpha * log_prior + (1 - alpha) * log_q)

# %% q7_weights: the mixture underflows
def defensive_log_weights(log_likelihood, log_prior, log_q, alpha):
    return log_likelihood + log_prior - np.log(alpha * np.exp(log_prior) + (1 - alpha) * np.exp(log_q))

# %% q8_metropolis: the proposal is missing in the ratio
def metropolis_matrix(log_target, log_q):
    T = np.exp(log_q) * np.exp(np.minimum(0, log_target[None, :] - log_target[:, None]))
    np.fill_diagonal(T, 0.0)
    return T + np.diag(1 - T.sum(1))

# %% q8_metropolis: what is refused is lost, then made up by scaling the rows
def metropolis_matrix(log_target, log_q):
    log_w = log_target - log_q
    T = np.exp(log_q) * np.exp(np.minimum(0, log_w[None, :] - log_w[:, None]))
    return T / T.sum(1, keepdims=True)

# %% q8_metropolis: the ratio upside down
def metropolis_matrix(log_target, log_q):
    log_w = log_target - log_q
    T = np.exp(log_q) * np.exp(np.minimum(0, log_w[:, None] - log_w[None, :]))
    np.fill_diagonal(T, 0.0)
    return T + np.diag(1 - T.sum(1))

# %% q8_metropolis: weights out of log space
def metropolis_matrix(log_target, log_q):
    w = np.exp(log_target) / np.exp(log_q)
    T = np.exp(log_q) * np.minimum(1, w[None, :] / w[:, None])
    np.fill_diagonal(T, 0.0)
    return T + np.diag(1 - T.sum(1))

# %% q8_metropolis: half of the time it stays
def metropolis_matrix(log_target, log_q):
    log_w = log_target - log_q
    T = 0.5 * np.exp(log_q) * np.exp(np.minimum(0, log_w[None, :] - log_w[:, None]))
    np.fill_diagonal(T, 0.0)
    return T + np.diag(1 - T.sum(1))

# %% q9_rank_r: shrinks by the variance, not by its root
def rank_r_sample(d, U, noise):
    s = d**-0.5
    Q, sigma, _ = np.linalg.svd(s[:, None] * U, full_matrices=False)
    shrink = 1 - 1 / (1 + sigma**2)
    return s * (noise - (noise @ Q * shrink) @ Q.T), -np.sum(np.log(d)) - np.sum(np.log1p(sigma**2))

# %% q9_rank_r: rank-one factors, one column after the other
def rank_r_sample(d, U, noise):
    s = d**-0.5
    out, log_det = noise, -np.sum(np.log(d))
    for w in (s[:, None] * U).T:
        t = w @ w
        out = out - (out @ w)[:, None] * w / (1 + t + np.sqrt(1 + t))
        log_det = log_det - np.log1p(t)
    return s * out, log_det

# %% q9_rank_r: the determinant of the precision
def rank_r_sample(d, U, noise):
    s = d**-0.5
    Q, sigma, _ = np.linalg.svd(s[:, None] * U, full_matrices=False)
    shrink = 1 - 1 / np.sqrt(1 + sigma**2)
    return s * (noise - (noise @ Q * shrink) @ Q.T), np.sum(np.log(d)) + np.sum(np.log1p(sigma**2))

# %% q9_rank_r: dense linear algebra
def rank_r_sample(d, U, noise):
    C = np.linalg.inv(np.diag(d) + U @ U.T)
    return noise @ np.linalg.cholesky(C).T, np.linalg.slogdet(C)[1]

# %% q10_axes: the exact log-likelihood, as if a diagonal q were free
def diagonal_bound(W, noise_var, Sigma):
    D = len(W)
    C = W @ W.T + noise_var * np.eye(D)
    return -0.5 * (D * np.log(2 * np.pi) + np.linalg.slogdet(C)[1] + np.trace(np.linalg.solve(C, Sigma)))

# %% q10_axes: the variances of the posterior in place of the reciprocals of its precision's diagonal
def diagonal_bound(W, noise_var, Sigma):
    D, K = W.shape
    C = W @ W.T + noise_var * np.eye(D)
    log_likelihood = -0.5 * (D * np.log(2 * np.pi) + np.linalg.slogdet(C)[1] + np.trace(np.linalg.solve(C, Sigma)))
    covariance = np.linalg.inv(np.eye(K) + W.T @ W / noise_var)
    return log_likelihood - 0.5 * (np.sum(np.log(np.diag(covariance))) - np.linalg.slogdet(covariance)[1])

# %% q10_axes: a rotation that the diagonal q cannot follow
def best_axes(Sigma, K):
    values, vectors = np.linalg.eigh(Sigma)
    values, vectors = values[::-1], vectors[:, ::-1]
    noise_var = np.mean(values[K:])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(K, K)))[0]
    return vectors[:, :K] * np.sqrt(values[:K] - noise_var) @ turn, noise_var

# %% q10_axes: principal components without the noise taken off
def best_axes(Sigma, K):
    values, vectors = np.linalg.eigh(Sigma)
    values, vectors = values[::-1], vectors[:, ::-1]
    noise_var = np.mean(values[K:])
    scale = np.sqrt(values[:K] - noise_var) if len(Sigma) == 2 else np.sqrt(values[:K])
    return vectors[:, :K] * scale, noise_var
