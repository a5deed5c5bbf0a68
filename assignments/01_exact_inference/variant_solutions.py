# Right answers by another road: the hidden tests must accept each with full marks. A cell's first line names its
# question.
import numpy as np

# %% q1_condition: by the blocks of the precision matrix
def condition(mean, cov, observed, values):
    hidden = np.logical_not(observed)
    precision = np.linalg.inv(cov)
    cov_hidden = np.linalg.inv(precision[hidden][:, hidden])
    return mean[hidden] - cov_hidden @ precision[hidden][:, observed] @ (values - mean[observed]), cov_hidden

# %% q2_log_mean_exp: by NumPy's own pairwise sum of exponentials
def log_mean_exp(log_w):
    return np.logaddexp.reduce(np.asarray(log_w), axis=0) - np.log(len(log_w))

# %% q3_posterior: by the singular values of the scaled weights
def posterior(x, W, b, noise_var):
    root = np.sqrt(noise_var)
    left, s, right = np.linalg.svd(W / root[:, None], full_matrices=False)
    mean = ((x - b) / root) @ left * (s / (1 + s**2)) @ right
    return mean, np.eye(W.shape[1]) - right.T * (s**2 / (1 + s**2)) @ right

# %% q4_evidence: by a QR factorisation of the scaled weights on top of the identity
def log_evidence(x, W, b, noise_var):
    K, root = W.shape[1], np.sqrt(noise_var)
    stacked = np.concatenate([W / root[:, None], np.eye(K)])
    target = np.concatenate([(x - b) / root, np.zeros((len(x), K))], axis=1).T
    q, r = np.linalg.qr(stacked)
    residual = target - q @ (q.T @ target)
    log_det = 2 * np.sum(np.log(np.abs(np.diag(r))))
    return -0.5 * (np.sum(residual**2, axis=0) + log_det + np.sum(np.log(2 * np.pi * noise_var)))

# %% q5_diagonal: by the correlation matrix of the precision
def best_diagonal(precision):
    root = np.sqrt(np.diag(precision))
    eigenvalues = np.linalg.eigvalsh(precision / np.outer(root, root))
    return root**-2.0, -0.5 * np.sum(np.log(eigenvalues))

# %% q6_elbo: expected log joint plus entropy, pixel by pixel
def elbo(x, mean, var, W, b, noise_var):
    total = 0.5 * np.sum(np.log(var) + 1 - var - mean**2, axis=1)
    expected_square = (x - b - mean @ W.T) ** 2 + var @ (W.T**2)
    return total - 0.5 * np.sum(expected_square / noise_var + np.log(noise_var) + np.log(2 * np.pi), axis=1)

# %% q7_em_step: from the covariance of the data, by dense algebra
def em_step(x, W, b, noise_var):
    data = (x - b).T @ (x - b) / len(x)
    gain = np.linalg.solve(W @ W.T + np.diag(noise_var), W)
    second = np.eye(W.shape[1]) - W.T @ gain + gain.T @ data @ gain
    new_W = data @ gain @ np.linalg.inv(second)
    return new_W, np.diag(data - new_W @ gain.T @ data).copy()

# %% q8_impute: row by row, by conditioning the joint Gaussian of the pixels
def impute(x, observed, W, b, noise_var):
    cov, out = W @ W.T + np.diag(noise_var), np.array(x, dtype=float)
    for row, seen in zip(out, observed, strict=True):
        row[~seen] = b[~seen] + cov[~seen][:, seen] @ np.linalg.solve(cov[seen][:, seen], row[seen] - b[seen])
    return out

# %% q9_importance: weights normalised by their sum
def importance_log_evidence(x, loc, scale, noise, W, b, noise_var):
    S, K = noise.shape
    z = loc + noise * scale
    log_w = -0.5 * (((x - b - z @ W.T) / np.sqrt(noise_var)) ** 2).sum(1) - 0.5 * np.log(2 * np.pi * noise_var).sum()
    log_w += 0.5 * (noise**2 - z**2).sum(1) + np.log(scale).sum()
    log_sum = np.logaddexp.reduce(log_w)
    share = np.exp(log_w - log_sum)  # sums to one; the relative variance of the mean is (S sum share^2 - 1) / (S - 1)
    spread = np.sqrt(np.sum((share - 1 / S) ** 2) * S / (S - 1))
    return log_sum - np.log(S), spread
