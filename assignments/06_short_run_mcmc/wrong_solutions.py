# Plausible mistakes. A cell's first line names the one question that must lose points, and the mistake; the cell
# replaces the instructor's function of the same name.
import numpy as np

# %% q1_chain: the drift is s^2, without the half
def short_run(z0, noise, weight, bias, noise_var, x, step_size, stochastic=True):
    z = z0
    for e in noise:
        score = -z + (x - z @ weight.T - bias) @ weight / noise_var
        z = z + step_size**2 * score
        if stochastic:
            z = z + step_size * e
    return z, z0

# %% q1_chain: the gradient of the mean over the chains
def short_run(z0, noise, weight, bias, noise_var, x, step_size, stochastic=True):
    z = z0
    for e in noise:
        score = -z + (x - z @ weight.T - bias) @ weight / noise_var
        z = z + 0.5 * step_size**2 * score / len(z0)
        if stochastic:
            z = z + step_size * e
    return z, z0

# %% q1_chain: without noise nothing happens but noise
def short_run(z0, noise, weight, bias, noise_var, x, step_size, stochastic=True):
    z = z0
    for e in noise:
        score = -z + (x - z @ weight.T - bias) @ weight / noise_var
        z = z + 0.5 * step_size**2 * score + step_size * e
    return z, z0

# %% q1_chain: the caller's start is overwritten
def short_run(z0, noise, weight, bias, noise_var, x, step_size, stochastic=True):
    for e in noise:
        score = -z0 + (x - z0 @ weight.T - bias) @ weight / noise_var
        z0 += 0.5 * step_size**2 * score
        if stochastic:
            z0 += step_size * e
    return z0, z0

# %% q2_law: the variance of the noise is s^2/2
def end_point(lam, mu, step_size, num_steps, stochastic=True):
    h = 0.5 * step_size**2
    log_kept = num_steps * np.log1p(-h * lam)
    var = np.exp(2 * log_kept)
    if stochastic:
        var = var - 0.5 * np.expm1(2 * log_kept) / (lam * (1 - 0.5 * h * lam))
    gap = np.exp(2 * log_kept) * mu**2
    return -np.expm1(log_kept) * mu, var, 0.5 * np.sum(lam * var + lam * gap - 1 - np.log(lam * var))

# %% q2_law: the divergence forgets the mean
def end_point(lam, mu, step_size, num_steps, stochastic=True):
    h = 0.5 * step_size**2
    log_kept = num_steps * np.log1p(-h * lam)
    var = np.exp(2 * log_kept)
    if stochastic:
        var = var - np.expm1(2 * log_kept) / (lam * (1 - 0.5 * h * lam))
    return -np.expm1(log_kept) * mu, var, 0.5 * np.sum(lam * var - 1 - np.log(lam * var))

# %% q2_law: the noise stays when it should go
def end_point(lam, mu, step_size, num_steps, stochastic=True):
    h = 0.5 * step_size**2
    log_kept = num_steps * np.log1p(-h * lam)
    var = np.exp(2 * log_kept) - np.expm1(2 * log_kept) / (lam * (1 - 0.5 * h * lam))
    gap = np.exp(2 * log_kept) * mu**2
    return -np.expm1(log_kept) * mu, var, 0.5 * np.sum(lam * var + lam * gap - 1 - np.log(lam * var))

# %% q2_law: one minus a power, digits lost
def end_point(lam, mu, step_size, num_steps, stochastic=True):
    h = 0.5 * step_size**2
    kept = (1 - h * lam) ** num_steps
    var = kept**2
    if stochastic:
        var = var + (1 - kept**2) / (lam * (1 - 0.5 * h * lam))
    return (1 - kept) * mu, var, 0.5 * np.sum(lam * var + lam * kept**2 * mu**2 - 1 - np.log(lam * var))

# %% q3_silent: the variance alone is matched
def best_silent_step(lam, mu, num_steps):
    h = -np.expm1(-np.log(lam) / (2 * num_steps)) / lam
    return np.sqrt(2 * h), 0.5 * np.log1p(mu**2)

# %% q3_silent: without the half in the divergence
def best_silent_step(lam, mu, num_steps):
    h = -np.expm1(-np.log(lam * (1 + mu**2)) / (2 * num_steps)) / lam
    return np.sqrt(2 * h), np.log1p(mu**2)

# %% q3_silent: a power near one, digits lost
def best_silent_step(lam, mu, num_steps):
    h = (1 - (lam * (1 + mu**2)) ** (-0.5 / num_steps)) / lam
    return np.sqrt(2 * h), 0.5 * np.log1p(mu**2)

# %% q4_grid: the kernel the wrong way round
def grid_law(z, x, noise_var, step_size, num_steps):
    dz = z[1] - z[0]
    mean = np.logaddexp(2 * z, -2 * z) - np.log(2)
    log_p = -0.5 * z**2 - 0.5 * (x - mean) ** 2 / noise_var
    log_p = log_p - log_p.max()
    log_p = log_p - np.log(np.exp(log_p).sum() * dz)
    centre = z + 0.5 * step_size**2 * (-z + (x - mean) * 2 * np.tanh(2 * z) / noise_var)
    kernel = np.exp(-0.5 * ((z[:, None] - centre) / step_size) ** 2) * dz / (step_size * np.sqrt(2 * np.pi))
    laws = [np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)]
    for _ in range(num_steps):
        laws.append(laws[-1] @ kernel)
    laws = np.array(laws)
    safe = np.where(laws > 0, laws, 1.0)
    return laws, np.sum(np.where(laws > 0, laws * (np.log(safe) - log_p), 0.0), 1) * dz

# %% q4_grid: the divergence the other way round
def grid_law(z, x, noise_var, step_size, num_steps):
    dz = z[1] - z[0]
    mean = np.logaddexp(2 * z, -2 * z) - np.log(2)
    log_p = -0.5 * z**2 - 0.5 * (x - mean) ** 2 / noise_var
    log_p = log_p - log_p.max()
    log_p = log_p - np.log(np.exp(log_p).sum() * dz)
    centre = z + 0.5 * step_size**2 * (-z + (x - mean) * 2 * np.tanh(2 * z) / noise_var)
    kernel = np.exp(-0.5 * ((z[:, None] - centre) / step_size) ** 2) * dz / (step_size * np.sqrt(2 * np.pi))
    laws = [np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)]
    for _ in range(num_steps):
        laws.append(kernel @ laws[-1])
    laws = np.array(laws)
    return laws, np.sum(np.exp(log_p) * (log_p - np.log(np.maximum(laws, 1e-300))), 1) * dz

# %% q4_grid: log of cosh, and 0 log 0
def grid_law(z, x, noise_var, step_size, num_steps):
    with np.errstate(all="ignore"):
        dz = z[1] - z[0]
        mean = np.log(np.cosh(2 * z))
        log_p = -0.5 * z**2 - 0.5 * (x - mean) ** 2 / noise_var
        log_p = log_p - np.log(np.exp(log_p).sum() * dz)
        centre = z + 0.5 * step_size**2 * (-z + (x - mean) * 2 * np.tanh(2 * z) / noise_var)
        kernel = np.exp(-0.5 * ((z[:, None] - centre) / step_size) ** 2) * dz / (step_size * np.sqrt(2 * np.pi))
        laws = [np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)]
        for _ in range(num_steps):
            laws.append(kernel @ laws[-1])
        laws = np.array(laws)
        return laws, np.sum(laws * (np.log(laws) - log_p), 1) * dz

# %% q5_bound: Gauss-Newton in the place of the second derivative
def jacobian_terms(z0, noise, step_size, x, noise_var):
    h, z, log_det, folds = 0.5 * step_size**2, z0, np.zeros(len(z0)), False
    for e in noise:
        tanh, mean = np.tanh(2 * z), np.logaddexp(2 * z, -2 * z) - np.log(2)
        slope = 1 + h * (-1 - 4 * tanh**2 / noise_var)
        log_det = log_det + np.log(np.abs(slope))
        folds = folds or bool(np.any(np.sign(slope) != np.sign(slope[0])))
        z = z + h * (-z + (x - mean) * 2 * tanh / noise_var) + step_size * e
    mean = np.logaddexp(2 * z, -2 * z) - np.log(2)
    log_joint = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - 0.5 * (x - mean) ** 2 / noise_var
                 - 0.5 * np.log(2 * np.pi * noise_var))
    return -0.5 * z0**2 - 0.5 * np.log(2 * np.pi) - log_det - log_joint, folds

# %% q5_bound: a negative slope is taken for a fold
def jacobian_terms(z0, noise, step_size, x, noise_var):
    h, z, log_det, folds = 0.5 * step_size**2, z0, np.zeros(len(z0)), False
    for e in noise:
        tanh, mean = np.tanh(2 * z), np.logaddexp(2 * z, -2 * z) - np.log(2)
        curvature = -1 - (4 * tanh**2 - (x - mean) * 4 * (1 - tanh**2)) / noise_var
        slope = 1 + h * curvature
        log_det = log_det + np.log(np.abs(slope))
        folds = folds or bool(np.any(slope < 0))
        z = z + h * (-z + (x - mean) * 2 * tanh / noise_var) + step_size * e
    mean = np.logaddexp(2 * z, -2 * z) - np.log(2)
    log_joint = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - 0.5 * (x - mean) ** 2 / noise_var
                 - 0.5 * np.log(2 * np.pi * noise_var))
    return -0.5 * z0**2 - 0.5 * np.log(2 * np.pi) - log_det - log_joint, folds

# %% q5_bound: the logarithm of a product
def jacobian_terms(z0, noise, step_size, x, noise_var):
    h, z, slope_all, folds = 0.5 * step_size**2, z0, np.ones(len(z0)), False
    for e in noise:
        tanh, mean = np.tanh(2 * z), np.logaddexp(2 * z, -2 * z) - np.log(2)
        curvature = -1 - (4 * tanh**2 - (x - mean) * 4 * (1 - tanh**2)) / noise_var
        slope = 1 + h * curvature
        slope_all = slope_all * slope
        folds = folds or bool(np.any(np.sign(slope) != np.sign(slope[0])))
        z = z + h * (-z + (x - mean) * 2 * tanh / noise_var) + step_size * e
    mean = np.logaddexp(2 * z, -2 * z) - np.log(2)
    log_joint = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - 0.5 * (x - mean) ** 2 / noise_var
                 - 0.5 * np.log(2 * np.pi * noise_var))
    with np.errstate(divide="ignore"):
        log_det = np.log(np.abs(slope_all))
    return -0.5 * z0**2 - 0.5 * np.log(2 * np.pi) - log_det - log_joint, folds

# %% q6_tangent: the tangent is not stretched by the step
def tangent(z0, noise, step_size, x, noise_var):
    h, z, u = 0.5 * step_size**2, z0, np.zeros(len(z0))
    for e in noise:
        score = -z + (x - np.logaddexp(2 * z, -2 * z) + np.log(2)) * 2 * np.tanh(2 * z) / noise_var
        z, u = z + h * score + step_size * e, u + step_size * score + e
    return z, u

# %% q6_tangent: the tangent uses the point after the step
def tangent(z0, noise, step_size, x, noise_var):
    h, z, u = 0.5 * step_size**2, z0, np.zeros(len(z0))
    for e in noise:
        tanh, mean = np.tanh(2 * z), np.logaddexp(2 * z, -2 * z) - np.log(2)
        z = z + h * (-z + (x - mean) * 2 * tanh / noise_var) + step_size * e
        tanh, mean = np.tanh(2 * z), np.logaddexp(2 * z, -2 * z) - np.log(2)
        score = -z + (x - mean) * 2 * tanh / noise_var
        curvature = -1 - (4 * tanh**2 - (x - mean) * 4 * (1 - tanh**2)) / noise_var
        u = (1 + h * curvature) * u + step_size * score + e
    return z, u

# %% q6_tangent: log of cosh overflows
def tangent(z0, noise, step_size, x, noise_var):
    h, z, u = 0.5 * step_size**2, z0, np.zeros(len(z0))
    with np.errstate(all="ignore"):
        for e in noise:
            tanh, mean = np.tanh(2 * z), np.log(np.cosh(2 * z))
            score = -z + (x - mean) * 2 * tanh / noise_var
            curvature = -1 - (4 * tanh**2 - (x - mean) * 4 * (1 - tanh**2)) / noise_var
            z, u = z + h * score + step_size * e, (1 + h * curvature) * u + step_size * score + e
    return z, u

# %% q7_sandwich: the own centre is in both pools
def sandwich(ends, centres, step_size, log_p):
    S, K = ends.shape
    squares = ((ends[:, None] - centres[None]) ** 2).sum(-1)
    log_kernel = -0.5 * squares / step_size**2 - 0.5 * K * np.log(2 * np.pi * step_size**2)
    top = log_kernel.max(1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(log_kernel - top).sum(1))
    return np.mean(log_sum - np.log(S + 1) - log_p), np.mean(log_sum - np.log(S) - log_p)

# %% q7_sandwich: the average of logarithms
def sandwich(ends, centres, step_size, log_p):
    S, K = ends.shape
    squares = ((ends[:, None] - centres[None]) ** 2).sum(-1)
    log_kernel = -0.5 * squares / step_size**2 - 0.5 * K * np.log(2 * np.pi * step_size**2)
    others = log_kernel[~np.eye(S, dtype=bool)].reshape(S, S - 1)
    return np.mean(others.mean(1) - log_p), np.mean(log_kernel.mean(1) - log_p)

# %% q7_sandwich: densities instead of their logarithms
def sandwich(ends, centres, step_size, log_p):
    S, K = ends.shape
    squares = ((ends[:, None] - centres[None]) ** 2).sum(-1)
    kernel = np.exp(-0.5 * squares / step_size**2) / (2 * np.pi * step_size**2) ** (K / 2)
    others = np.where(np.eye(S, dtype=bool), 0.0, kernel)
    with np.errstate(divide="ignore"):
        return np.mean(np.log(others.sum(1) / (S - 1)) - log_p), np.mean(np.log(kernel.mean(1)) - log_p)

# %% q8_learning: the exact posterior in the chain's place
def learning_path(w, c, noise_var, step_size, num_steps, num_iterations):
    path = [w]
    for _ in range(num_iterations):
        lam = 1 + w**2 / noise_var
        slope = w / (noise_var * lam)
        w = c * slope / (1 / lam + slope**2 * c)
        path.append(w)
    return np.array(path)

# %% q8_learning: the step of stationarity, the start forgotten
def learning_path(w, c, noise_var, step_size, num_steps, num_iterations):
    path = [w]
    for _ in range(num_iterations):
        lam = 1 + w**2 / noise_var
        u = 0.5 * step_size**2 * lam
        slope = (1 - (1 - u) ** num_steps) * w / (noise_var * lam)
        w = c * slope / (1 / (lam * (1 - 0.5 * u)) + slope**2 * c)
        path.append(w)
    return np.array(path)

# %% q9_layers: the prior is forgotten
def two_coordinates(a, t, w, noise_var, x):
    row = w * np.array([t, a])
    noise_precision = np.outer(row, row) / noise_var + np.diag([1.0, 0.0])
    noise_mean = row * x / (noise_var + row @ row)
    state_precision = np.array([[1 / t**2 + w**2 / noise_var, -a / t**2], [-a / t**2, 1 + a**2 / t**2]])
    state_mean = np.array([a * noise_mean[1] + t * noise_mean[0], noise_mean[1]])
    return noise_mean, noise_precision, state_mean, state_precision

# %% q9_layers: layers in the other order
def two_coordinates(a, t, w, noise_var, x):
    row = w * np.array([a, t])
    noise_precision = np.eye(2) + np.outer(row, row) / noise_var
    noise_mean = row * x / (noise_var + row @ row)
    state_precision = np.array([[1 + a**2 / t**2, -a / t**2], [-a / t**2, 1 / t**2 + w**2 / noise_var]])
    state_mean = np.array([noise_mean[0], a * noise_mean[0] + t * noise_mean[1]])
    return noise_mean, noise_precision, state_mean, state_precision

# %% q10_annealing: every proposal is accepted
def annealed_log_weights(z0, noise, uniform, betas, weight, bias, noise_var, x, step_size):
    z, log_w, h = z0, np.zeros(len(z0)), 0.5 * step_size**2
    for k in range(1, len(betas)):
        fit = (-0.5 * ((x - z @ weight.T - bias) ** 2).sum(-1) / noise_var
               - 0.5 * len(bias) * np.log(2 * np.pi * noise_var))
        log_w = log_w + (betas[k] - betas[k - 1]) * fit
        score = betas[k] * (x - z @ weight.T - bias) @ weight / noise_var - z
        z = z + h * score + step_size * noise[k - 1]
    return log_w

# %% q10_annealing: the weight is updated after the move
def annealed_log_weights(z0, noise, uniform, betas, weight, bias, noise_var, x, step_size):
    D, h = len(bias), 0.5 * step_size**2
    constant = -0.5 * D * np.log(2 * np.pi * noise_var)
    fit = lambda z: constant - 0.5 * ((x - z @ weight.T - bias) ** 2).sum(-1) / noise_var
    pull = lambda z: (x - z @ weight.T - bias) @ weight / noise_var
    z, log_w = z0, np.zeros(len(z0))
    for k in range(1, len(betas)):
        beta = betas[k]
        log_f = lambda v, beta=beta: beta * fit(v) - 0.5 * (v**2).sum(-1)
        centre = lambda v, beta=beta: v + h * (beta * pull(v) - v)
        new = centre(z) + step_size * noise[k - 1]
        back = ((z - centre(new)) ** 2).sum(-1) - ((new - centre(z)) ** 2).sum(-1)
        accept = np.log(uniform[k - 1]) < log_f(new) - log_f(z) - back / (2 * step_size**2)
        z = np.where(accept[:, None], new, z)
        log_w = log_w + (beta - betas[k - 1]) * fit(z)
    return log_w

# %% q10_annealing: the likelihood without its constant
def annealed_log_weights(z0, noise, uniform, betas, weight, bias, noise_var, x, step_size):
    h = 0.5 * step_size**2
    fit = lambda z: -0.5 * ((x - z @ weight.T - bias) ** 2).sum(-1) / noise_var
    pull = lambda z: (x - z @ weight.T - bias) @ weight / noise_var
    z, log_w = z0, np.zeros(len(z0))
    for k in range(1, len(betas)):
        beta = betas[k]
        log_w = log_w + (beta - betas[k - 1]) * fit(z)
        log_f = lambda v, beta=beta: beta * fit(v) - 0.5 * (v**2).sum(-1)
        centre = lambda v, beta=beta: v + h * (beta * pull(v) - v)
        new = centre(z) + step_size * noise[k - 1]
        back = ((z - centre(new)) ** 2).sum(-1) - ((new - centre(z)) ** 2).sum(-1)
        accept = np.log(uniform[k - 1]) < log_f(new) - log_f(z) - back / (2 * step_size**2)
        z = np.where(accept[:, None], new, z)
    return log_w
