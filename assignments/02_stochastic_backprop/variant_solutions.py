# Right answers by another road: the hidden tests must accept each with full marks. A cell's first line names its
# question.
import numpy as np

# %% q1_bonnet_price: by the moments of a log-normal number
def exponential_gradients(a, mu, C):
    mean, variance = np.sum(a * mu), np.einsum("i,ij,j", a, C, a)
    value = np.exp(mean) * np.sqrt(np.exp(variance))
    gradient = a * value
    return value, gradient, gradient[:, None] * a[None, :] / 2

# %% q2_factor_gradient: sample by sample
def factor_gradient(noise, g):
    return np.mean([np.outer(one_g, one_noise) for one_noise, one_g in zip(noise, g, strict=True)], axis=0)

# %% q3_baseline: by the moments of a normal number
def best_baseline(c, mu, sigma):
    second, fourth, sixth = 1.0, 3.0, 15.0
    beta = 0.5 * c * (mu**2 * second + sigma**2 * fourth)
    # (f - beta) eps / sigma is p0 eps + p1 eps^2 + p2 eps^3
    p0, p1, p2 = (0.5 * c * mu**2 - beta) / sigma, c * mu, 0.5 * c * sigma
    return beta, p0**2 * second + p1**2 * fourth + p2**2 * sixth + 2 * p0 * p2 * fourth - (p1 * second) ** 2

# %% q4_rank_one: by the length and the direction of w
def rank_one_sample(mu, d, u, noise):
    s = 1 / np.sqrt(d)
    w = s * u
    root = np.hypot(1, np.sqrt(w @ w))  # along w the standard deviation is 1 / root, across it 1
    along = noise @ w
    return mu + s * (noise - np.outer(along / (root + root**2), w))


def rank_one_kl(mu, d, u):
    eta = 1 / (1 + np.sum(u * u / d))
    variances = 1 / d - eta * (u / d) ** 2
    return 0.5 * np.sum(mu**2 + variances - 1 + np.log(d)) - 0.5 * np.log(eta)

# %% q5_backward: with Jacobians
def two_layer_gradients(v, xi1, xi2, G1, G2, A, a, B, b):
    t = np.tanh(A @ G2 @ xi2 + a)
    o = B @ t + B @ G1 @ xi1 + b
    sign = 2 * v - 1
    value = -np.sum(np.logaddexp(0, -sign * o))
    by_logit = sign * np.exp(-np.logaddexp(0, sign * o))
    h1_by_h2 = np.diag(1 / np.cosh(A @ G2 @ xi2 + a) ** 2) @ A
    by_h1 = by_logit @ B
    by_h2 = by_h1 @ h1_by_h2
    return value, by_h1 @ G1, by_h2 @ G2, by_h1[:, None] * xi1, by_h2[:, None] * xi2

# %% q6_free_energy: the likelihood part sample by sample, the inverse by solving
def free_energy_gradient(noise, g, R):
    likelihood = np.einsum("si,sj->ij", g, noise) / noise.shape[0]
    return R - np.linalg.solve(R.T, np.eye(len(R))) - likelihood

# %% q7_weights: by the Gaussian that p^2 / q is proportional to; the mixture by its larger part
def relative_variance(m, tau, m_q, s):
    precision = 2 / tau**2 - 1 / s**2
    if precision <= 0:
        return float("inf")
    centre = (2 * m / tau**2 - m_q / s**2) / precision
    exponent = -0.5 * (2 * m**2 / tau**2 - m_q**2 / s**2 - precision * centre**2)
    return s / (tau**2 * np.sqrt(precision)) * np.exp(exponent) - 1


def defensive_log_weights(log_likelihood, log_prior, log_q, alpha):
    top = np.maximum(log_prior, log_q)
    mixture = top + np.log(alpha * np.exp(log_prior - top) + (1 - alpha) * np.exp(log_q - top))
    return log_likelihood + (log_prior - mixture)

# %% q8_metropolis: place by place
def metropolis_matrix(log_target, log_q):
    J = len(log_q)
    T = np.zeros((J, J))
    for i in range(J):
        for j in range(J):
            if i != j:
                ratio = log_target[j] + log_q[i] - log_target[i] - log_q[j]
                T[i, j] = np.exp(log_q[j] + min(0.0, ratio))
        T[i, i] = 1 - T[i].sum()
    return T

# %% q9_rank_r: by the eigenvectors of the small matrix
def rank_r_sample(d, U, noise):
    W = U / np.sqrt(d)[:, None]
    values, vectors = np.linalg.eigh(W.T @ W)
    values = np.maximum(values, 0.0)
    root = np.sqrt(1 + values)
    core = vectors / (root * (1 + root)) @ vectors.T  # (1 - (1 + v)^-1/2) / v, safe at v = 0
    sample = (noise - noise @ W @ core @ W.T) / np.sqrt(d)
    return sample, -np.sum(np.log(d)) - np.sum(np.log(1 + values))

# %% q10_axes: the bound term by term, the axes by a singular value decomposition
def diagonal_bound(W, noise_var, Sigma):
    D, K = W.shape
    precision = np.eye(K) + W.T @ W / noise_var
    V = np.linalg.solve(precision, W.T) / noise_var
    variances = 1 / np.diag(precision)
    rest = np.eye(D) - W @ V
    squares = np.trace(rest @ Sigma @ rest.T) + np.sum(W**2 * variances)
    fit = -0.5 * squares / noise_var - 0.5 * D * np.log(2 * np.pi * noise_var)
    return fit - 0.5 * (np.trace(V @ Sigma @ V.T) + np.sum(variances - np.log(variances) - 1))


def best_axes(Sigma, K):
    left, values, _ = np.linalg.svd(Sigma)
    noise_var = values[K:].sum() / (len(Sigma) - K)
    return -left[:, :K] @ np.diag((values[:K] - noise_var) ** 0.5), noise_var
