# Plausible mistakes. A cell's first line names the one question that must lose points, and the mistake; the cell
# replaces the instructor's function of the same name.
import numpy as np

# %% q1_condition: the mean moves the wrong way
def condition(mean, cov, observed, values):
    cross = cov[np.ix_(~observed, observed)]
    gain = np.linalg.solve(cov[np.ix_(observed, observed)], cross.T).T
    return mean[~observed] - gain @ (values - mean[observed]), cov[np.ix_(~observed, ~observed)] - gain @ cross.T

# %% q1_condition: the observed part is not centred
def condition(mean, cov, observed, values):
    cross = cov[np.ix_(~observed, observed)]
    gain = np.linalg.solve(cov[np.ix_(observed, observed)], cross.T).T
    return mean[~observed] + gain @ values, cov[np.ix_(~observed, ~observed)] - gain @ cross.T

# %% q1_condition: the covariance before the observation
def condition(mean, cov, observed, values):
    cross = cov[np.ix_(~observed, observed)]
    gain = np.linalg.solve(cov[np.ix_(observed, observed)], cross.T).T
    return mean[~observed] + gain @ (values - mean[observed]), cov[np.ix_(~observed, ~observed)]

# %% q2_log_mean_exp: a sum
def log_mean_exp(log_w):
    return np.logaddexp.reduce(log_w, axis=0)

# %% q2_log_mean_exp: the mean of the logarithms
def log_mean_exp(log_w):
    return np.mean(log_w, axis=0)

# %% q2_log_mean_exp: as it is written, without care
def log_mean_exp(log_w):
    return np.log(np.mean(np.exp(log_w), axis=0))

# %% q2_log_mean_exp: one maximum for all columns
def log_mean_exp(log_w):
    return np.max(log_w) + np.log(np.mean(np.exp(log_w - np.max(log_w)), axis=0))

# %% q2_log_mean_exp: -inf minus -inf
def log_mean_exp(log_w):
    top = np.max(log_w, axis=0)
    return top + np.log(np.mean(np.exp(log_w - top), axis=0))

# %% q3_posterior: the bias is forgotten
def posterior(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    cov = np.linalg.inv(np.eye(W.shape[1]) + W.T @ scaled)
    return x @ scaled @ cov, cov

# %% q3_posterior: the prior is forgotten
def posterior(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    cov = np.linalg.inv(W.T @ scaled)
    return (x - b) @ scaled @ cov, cov

# %% q3_posterior: variances taken for standard deviations
def posterior(x, W, b, noise_var):
    scaled = W / noise_var[:, None] ** 2
    cov = np.linalg.inv(np.eye(W.shape[1]) + W.T @ scaled)
    return (x - b) @ scaled @ cov, cov

# %% q3_posterior: the precision in place of the covariance
def posterior(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    precision = np.eye(W.shape[1]) + W.T @ scaled
    return np.linalg.solve(precision, scaled.T @ (x - b).T).T, precision

# %% q3_posterior: dense linear algebra
def posterior(x, W, b, noise_var):
    cov = W @ W.T + np.diag(noise_var)
    gain = np.linalg.solve(cov, W)
    return (x - b) @ gain, np.eye(W.shape[1]) - W.T @ gain

# %% q4_evidence: the determinant of the noise alone
def log_evidence(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    mean = np.linalg.solve(np.eye(W.shape[1]) + W.T @ scaled, scaled.T @ (x - b).T).T
    squares = np.sum((x - b - mean @ W.T) ** 2 / noise_var, axis=1) + np.sum(mean**2, axis=1)
    return -0.5 * (squares + np.sum(np.log(2 * np.pi * noise_var)))

# %% q4_evidence: without the constant
def log_evidence(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    precision = np.eye(W.shape[1]) + W.T @ scaled
    mean = np.linalg.solve(precision, scaled.T @ (x - b).T).T
    squares = np.sum((x - b - mean @ W.T) ** 2 / noise_var, axis=1) + np.sum(mean**2, axis=1)
    return -0.5 * (squares + np.sum(np.log(noise_var)) + np.linalg.slogdet(precision)[1])

# %% q4_evidence: the likelihood at the posterior mean
def log_evidence(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    mean = np.linalg.solve(np.eye(W.shape[1]) + W.T @ scaled, scaled.T @ (x - b).T).T
    return -0.5 * np.sum((x - b - mean @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)

# %% q4_evidence: dense linear algebra
def log_evidence(x, W, b, noise_var):
    cov = W @ W.T + np.diag(noise_var)
    squares = np.sum((x - b) * np.linalg.solve(cov, (x - b).T).T, axis=1)
    return -0.5 * (squares + np.linalg.slogdet(cov)[1] + len(b) * np.log(2 * np.pi))

# %% q4_evidence: Woodbury's difference of large numbers
def log_evidence(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    precision = np.eye(W.shape[1]) + W.T @ scaled
    seen = (x - b) @ scaled
    squares = np.sum((x - b) ** 2 / noise_var, axis=1) - np.sum(seen * np.linalg.solve(precision, seen.T).T, axis=1)
    return -0.5 * (squares + np.sum(np.log(2 * np.pi * noise_var)) + np.linalg.slogdet(precision)[1])

# %% q5_diagonal: the marginal variances, closest in the other direction of the KL
def best_diagonal(precision):
    cov = np.linalg.inv(precision)
    return np.diag(cov), 0.5 * (np.sum(np.log(np.diag(cov))) - np.linalg.slogdet(cov)[1])

# %% q5_diagonal: the half is missing
def best_diagonal(precision):
    diagonal = np.diag(precision)
    return 1 / diagonal, np.sum(np.log(diagonal)) - np.linalg.slogdet(precision)[1]

# %% q5_diagonal: the sign
def best_diagonal(precision):
    diagonal = np.diag(precision)
    return 1 / diagonal, 0.5 * (np.linalg.slogdet(precision)[1] - np.sum(np.log(diagonal)))

# %% q5_diagonal: the determinant itself
def best_diagonal(precision):
    diagonal = np.diag(precision)
    return 1 / diagonal, 0.5 * np.log(np.prod(diagonal) / np.linalg.det(precision))

# %% q6_elbo: the likelihood at the mean of q only
def elbo(x, mean, var, W, b, noise_var):
    fit = -0.5 * np.sum((x - b - mean @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)
    return fit - 0.5 * np.sum(var + mean**2 - 1 - np.log(var), axis=1)

# %% q6_elbo: the entropy is forgotten
def elbo(x, mean, var, W, b, noise_var):
    spread = var @ (W**2 / noise_var[:, None]).sum(0)
    fit = -0.5 * (np.sum((x - b - mean @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1) + spread)
    return fit - 0.5 * np.sum(var + mean**2 + np.log(2 * np.pi), axis=1)

# %% q6_elbo: variances squared, as if they were standard deviations
def elbo(x, mean, var, W, b, noise_var):
    spread = var**2 @ (W**2 / noise_var[:, None]).sum(0)
    fit = -0.5 * (np.sum((x - b - mean @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1) + spread)
    return fit - 0.5 * np.sum(var**2 + mean**2 - 1 - 2 * np.log(var), axis=1)

# %% q6_elbo: the KL is added
def elbo(x, mean, var, W, b, noise_var):
    spread = var @ (W**2 / noise_var[:, None]).sum(0)
    fit = -0.5 * (np.sum((x - b - mean @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1) + spread)
    return fit + 0.5 * np.sum(var + mean**2 - 1 - np.log(var), axis=1)

# %% q6_elbo: dense matrices for the trace
def elbo(x, mean, var, W, b, noise_var):
    precision = np.diag(1 / noise_var)
    residual = x - b - mean @ W.T
    spread = np.array([np.trace(precision @ (W @ np.diag(v) @ W.T)) for v in var])
    squares = np.sum(residual @ precision * residual, axis=1)
    fit = -0.5 * (squares + np.sum(np.log(2 * np.pi * noise_var)) + spread)
    return fit - 0.5 * np.sum(var + mean**2 - 1 - np.log(var), axis=1)

# %% q7_em_step: the posterior is treated as a point
def em_step(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    mean = np.linalg.solve(np.eye(W.shape[1]) + W.T @ scaled, scaled.T @ (x - b).T).T
    new_W = np.linalg.lstsq(mean, x - b, rcond=None)[0].T
    return new_W, np.mean((x - b - mean @ new_W.T) ** 2, axis=0)

# %% q7_em_step: the posterior covariance counts once, not N times
def em_step(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    cov = np.linalg.inv(np.eye(W.shape[1]) + W.T @ scaled)
    mean = (x - b) @ scaled @ cov
    new_W = np.linalg.solve(cov + mean.T @ mean, mean.T @ (x - b)).T
    return new_W, np.mean((x - b) ** 2 - (x - b) * (mean @ new_W.T), axis=0)

# %% q7_em_step: the noise with the old W
def em_step(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    cov = np.linalg.inv(np.eye(W.shape[1]) + W.T @ scaled)
    mean = (x - b) @ scaled @ cov
    new_W = np.linalg.solve(len(x) * cov + mean.T @ mean, mean.T @ (x - b)).T
    return new_W, np.mean((x - b) ** 2 - (x - b) * (mean @ W.T), axis=0)

# %% q7_em_step: noise without the spread of the posterior
def em_step(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    cov = np.linalg.inv(np.eye(W.shape[1]) + W.T @ scaled)
    mean = (x - b) @ scaled @ cov
    new_W = np.linalg.solve(len(x) * cov + mean.T @ mean, mean.T @ (x - b)).T
    return new_W, np.mean((x - b - mean @ new_W.T) ** 2, axis=0)

# %% q7_em_step: divided by N - 1
def em_step(x, W, b, noise_var):
    scaled = W / noise_var[:, None]
    cov = np.linalg.inv(np.eye(W.shape[1]) + W.T @ scaled)
    mean = (x - b) @ scaled @ cov
    new_W = np.linalg.solve(len(x) * cov + mean.T @ mean, mean.T @ (x - b)).T
    return new_W, np.sum((x - b) ** 2 - (x - b) * (mean @ new_W.T), axis=0) / (len(x) - 1)

# %% q8_impute: the gap is filled with b and believed
def impute(x, observed, W, b, noise_var):
    filled = np.where(observed, x, b)
    scaled = W / noise_var[:, None]
    mean = np.linalg.solve(np.eye(W.shape[1]) + W.T @ scaled, scaled.T @ (filled - b).T).T
    return np.where(observed, x, b + mean @ W.T)

# %% q8_impute: observed pixels are smoothed too
def impute(x, observed, W, b, noise_var):
    weight = observed / noise_var
    precision = np.eye(W.shape[1]) + np.einsum("bd,dk,dl->bkl", weight, W, W)
    seen = (np.where(observed, x - b, 0.0) * weight) @ W
    return b + np.linalg.solve(precision, seen[..., None])[..., 0] @ W.T

# %% q8_impute: zero times nan
def impute(x, observed, W, b, noise_var):
    weight = observed / noise_var
    precision = np.eye(W.shape[1]) + np.einsum("bd,dk,dl->bkl", weight, W, W)
    seen = ((x - b) * weight) @ W
    return np.where(observed, x, b + np.linalg.solve(precision, seen[..., None])[..., 0] @ W.T)

# %% q9_importance: the proposal's density is forgotten
def importance_log_evidence(x, loc, scale, noise, W, b, noise_var):
    z = loc + scale * noise
    log_w = -0.5 * np.sum((x - b - z @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)
    log_w = log_w - 0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1)
    w = np.exp(log_w - np.max(log_w))
    return np.max(log_w) + np.log(np.mean(w)), np.std(w, ddof=1) / np.sqrt(len(w)) / np.mean(w)

# %% q9_importance: the scale of the proposal is forgotten
def importance_log_evidence(x, loc, scale, noise, W, b, noise_var):
    z = loc + scale * noise
    log_w = -0.5 * np.sum((x - b - z @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)
    log_w = log_w - 0.5 * np.sum(z**2 - noise**2, axis=1)
    w = np.exp(log_w - np.max(log_w))
    return np.max(log_w) + np.log(np.mean(w)), np.std(w, ddof=1) / np.sqrt(len(w)) / np.mean(w)

# %% q9_importance: the mean of the logarithms, which is the bound
def importance_log_evidence(x, loc, scale, noise, W, b, noise_var):
    z = loc + scale * noise
    log_w = -0.5 * np.sum((x - b - z @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)
    log_w = log_w - 0.5 * np.sum(z**2 - noise**2 - 2 * np.log(scale), axis=1)
    return np.mean(log_w), np.std(log_w, ddof=1) / np.sqrt(len(log_w))

# %% q9_importance: the root of S is missing
def importance_log_evidence(x, loc, scale, noise, W, b, noise_var):
    z = loc + scale * noise
    log_w = -0.5 * np.sum((x - b - z @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)
    log_w = log_w - 0.5 * np.sum(z**2 - noise**2 - 2 * np.log(scale), axis=1)
    w = np.exp(log_w - np.max(log_w))
    return np.max(log_w) + np.log(np.mean(w)), np.std(w, ddof=1) / np.mean(w)

# %% q9_importance: the weights themselves
def importance_log_evidence(x, loc, scale, noise, W, b, noise_var):
    z = loc + scale * noise
    log_w = -0.5 * np.sum((x - b - z @ W.T) ** 2 / noise_var + np.log(2 * np.pi * noise_var), axis=1)
    w = np.exp(log_w - 0.5 * np.sum(z**2 - noise**2 - 2 * np.log(scale), axis=1))
    return np.log(np.mean(w)), np.std(w, ddof=1) / np.sqrt(len(w)) / np.mean(w)
