"""The from-scratch code of book/04_gp_random_inference. Written by `make scratch`; edit the chapter."""

# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell e9b0d8b6
import autograd.numpy as np
from autograd import elementwise_grad as egrad
from autograd.scipy.special import logsumexp


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell a80268f0
NOISE_VAR = 0.25


def bowl_log_joint(z, x):
    """log p(x, z) of the bowl for z [...] and x [..., 2], broadcast; def-gp-bowl."""
    error = (x[..., 0] - z) ** 2 + (x[..., 1] - 0.5 * z**2) ** 2
    return -0.5 * (
        error / NOISE_VAR + 2 * np.log(2 * np.pi * NOISE_VAR) + z**2 + np.log(2 * np.pi)
    )


def evidence_on_grid(x, num_points=4001):
    """log p(x) [B], the grid [G], and the posterior density there [B, G]."""
    grid = np.linspace(-8.0, 8.0, num_points)
    log_joint = bowl_log_joint(grid, x[:, None])
    log_px = logsumexp(log_joint, axis=1) + np.log(grid[1] - grid[0])
    return log_px, grid, np.exp(log_joint - log_px[:, None])


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 748e4e2f
def bowl_elbo(loc, log_var, x):
    """The exact bound [B] of N(loc, exp(log_var)) for x [B, 2], eq-gp-elbo."""
    v = np.exp(log_var)
    second, fourth = loc**2 + v, loc**4 + 6 * loc**2 * v + 3 * v**2
    error = (x[:, 0] - loc) ** 2 + v + x[:, 1] ** 2 - x[:, 1] * second + 0.25 * fourth
    return (
        -0.5 * error / NOISE_VAR
        - np.log(2 * np.pi * NOISE_VAR)
        - 0.5 * (second - 1 - log_var)
    )


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell d881e61c
def newton_step(elbo, loc, log_var, x, damping):
    """The damped Newton step of every datum's bound in (loc, log_var), [B] each."""
    d_loc, d_log_var = egrad(elbo, 0), egrad(elbo, 1)
    a, b = d_loc(loc, log_var, x), d_log_var(loc, log_var, x)
    aa = egrad(d_loc, 0)(loc, log_var, x) - damping
    bb = egrad(d_log_var, 1)(loc, log_var, x) - damping
    ab = egrad(d_loc, 1)(loc, log_var, x)
    det = aa * bb - ab ** 2
    det = np.where((aa < 0) & (det > 0), det, np.inf)      # not a hill: no step
    return (ab * b - bb * a) / det, (ab * a - aa * b) / det


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 46851a4a
def per_instance_optimum(elbo, x, loc, log_var, num_steps=60):
    """The best Gaussian of every datum near a start: (loc, log_var), [B] each."""
    damping = np.ones(len(x))
    for _ in range(num_steps):
        d_loc, d_log_var = newton_step(elbo, loc, log_var, x, damping)
        far = np.abs(d_loc) + np.abs(d_log_var) > 2.0
        moved = np.where(far, 0.0, d_loc), np.where(far, 0.0, d_log_var)
        better = elbo(loc + moved[0], log_var + moved[1], x) >= elbo(loc, log_var, x)
        taken = better & ~far & ((d_loc != 0) | (d_log_var != 0))
        loc = np.where(taken, loc + moved[0], loc)
        log_var = np.where(taken, log_var + moved[1], log_var)
        damping = np.where(taken, 0.2 * damping, 5 * damping + 1e-9)
    return loc, log_var


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 6cbd489c
def best_gaussian(x, loc, log_var):
    """The best of the optima found from three starts: (loc, log_var), [2, B]."""
    zero = np.zeros(len(x))
    starts = [(loc, log_var), (zero, zero), (x[:, 0], zero - 1.0)]
    found = [per_instance_optimum(bowl_elbo, x, *start) for start in starts]
    winner = np.argmax(np.stack([bowl_elbo(*one, x) for one in found]), axis=0)
    return np.stack(found)[winner, :, np.arange(len(x))].T


def gaps_1d(x, loc, log_var):
    """(log p(x), approximation gap, amortisation gap), [B] each, for the bowl."""
    log_px = evidence_on_grid(x)[0]
    best = bowl_elbo(*best_gaussian(x, loc, log_var), x)
    return log_px, log_px - best, best - bowl_elbo(loc, log_var, x)


# --- book/04_gp_random_inference/01_two_gaps.ipynb, cell 2a8bc812
def linear_gaps(f, g, x, A, a, noise_var):
    """(log p(x), approximation, amortisation gap) of a linear decoder, eq-gp-linear."""
    D, K = A.shape
    Lam = np.eye(K) + A.T @ A / noise_var
    f_star = np.linalg.solve(Lam, A.T @ (x - a).T / noise_var).T  # [B, K]
    rest = x - a - f_star @ A.T
    log_px = -0.5 * (
        np.sum(rest**2, 1) / noise_var
        + np.sum(f_star**2, 1)
        + D * np.log(2 * np.pi * noise_var)
        + np.linalg.slogdet(Lam)[1]
    )
    approximation = 0.5 * (np.sum(np.log(np.diag(Lam))) - np.linalg.slogdet(Lam)[1])
    delta = f - f_star
    v = np.exp(g) * np.diag(Lam)
    amortisation = 0.5 * (
        np.sum((delta @ Lam) * delta, 1) + np.sum(v - 1 - np.log(v), 1)
    )
    return log_px, approximation, amortisation


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 2b5e384d
import autograd.numpy as np
from autograd import grad


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 07993bc2
def refine(slope, start, rate, num_steps):
    """The path [T + 1] under eq-gp-svi; slope(lam, t): the gradient of the bound."""
    path = [start]
    for t in range(num_steps):
        path.append(path[-1] + rate * slope(path[-1], t))
    return path


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 323a24d2
def bowl_slope(lam, x, noise_var=0.25):
    """Gradient [2, B] of the bowl's bound in lam = (f, g), [2, B]; eq-gp-stationary."""
    f, v = lam[0], np.exp(lam[1])
    first = (x[:, 0] - f + x[:, 1] * f - 0.5 * (f ** 3 + 3 * f * v)) / noise_var - f
    second = (-1 + x[:, 1] - 1.5 * (f ** 2 + v)) / noise_var - 1
    return np.stack([first, 0.5 * (1 + v * second)])


def bowl_hessian_product(lam, a, x, noise_var=0.25):
    """The bound's Hessian in lambda times a [2, B], datum by datum, eq-gp-curvature."""
    f, v = lam[0], np.exp(lam[1])
    second = (-1 + x[:, 1] - 1.5 * (f ** 2 + v)) / noise_var - 1
    third, fourth = -3 * f / noise_var, -3 / noise_var
    mixed = 0.5 * v * third
    corner = 0.5 * v * second + 0.25 * v ** 2 * fourth
    return np.stack([second * a[0] + mixed * a[1], mixed * a[0] + corner * a[1]])


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 1bd6ece9
def semi_amortized_adjoint(path, slope_at_end, products, rate):
    """(a_0, sum over the steps for theta) of eq-gp-adjoint.

    products(lam, a, t) -> (Hessian in lambda times a, mixed one in theta times a).
    """
    a, theta_bar = slope_at_end, 0.0
    for t in reversed(range(len(path) - 1)):
        in_lam, in_theta = products(path[t], a, t)
        a, theta_bar = a + rate * in_lam, theta_bar + rate * in_theta
    return a, theta_bar


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 72a8384e
def drawn_elbo(lam, theta, x, noise, noise_var=0.3):
    """One-draw bound, summed: lam [2, B, K], theta [(W, b), (W, b)], noise [B, K]."""
    f, g = lam[0], lam[1]
    z = f + np.exp(0.5 * g) * noise
    (W1, b1), (W2, b2) = theta
    error = x - np.tanh(z @ W1.T + b1) @ W2.T - b2
    log_lik = -0.5 * np.sum(error ** 2 / noise_var + np.log(2 * np.pi * noise_var))
    return log_lik - 0.5 * np.sum(f ** 2 + np.exp(g) - 1 - g)


def elbo_products(elbo):
    """Derivatives of a . grad_lambda elbo in lambda and in theta: two functions."""
    inner = lambda lam, theta, a, *rest: np.sum(a * grad(elbo)(lam, theta, *rest))
    return grad(inner, 0), grad(inner, 1)


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell e40dafe5
def refine_with_momentum(slope, start, rate, num_steps, momentum):
    """The path of lambda with heavy-ball momentum, eq-gp-momentum."""
    path, velocity = [start], 0.0 * start
    for t in range(num_steps):
        velocity = momentum * velocity + slope(path[-1], t)
        path.append(path[-1] + rate * velocity)
    return path


def momentum_adjoint(path, slope_at_end, products, rate, momentum):
    """As `semi_amortized_adjoint`, for steps with momentum."""
    a, alpha, theta_bar = slope_at_end, 0.0, 0.0
    for t in reversed(range(len(path) - 1)):
        alpha = alpha + rate * a
        in_lam, in_theta = products(path[t], alpha, t)
        a, theta_bar = a + in_lam, theta_bar + in_theta
        alpha = momentum * alpha
    return a, theta_bar


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 398d48ae
def kl_of_answers(lam, target):
    """KL between the diagonal normals of lam and target, [2, B, K] each: [B]."""
    ratio = lam[1] - target[1]
    squares = (lam[0] - target[0]) ** 2 * np.exp(-target[1])
    return 0.5 * np.sum(np.exp(ratio) - 1 - ratio + squares, -1)


# --- book/04_gp_random_inference/02_semi_amortised.ipynb, cell 261690c8
def laplace_step(loc, x, decode, jacobian, noise_var):
    """One full step of eq-gp-laplace: (new mean [K], precision [K, K])."""
    J = jacobian(loc)
    precision = np.eye(len(loc)) + J.T @ J / noise_var
    return np.linalg.solve(precision,
                           J.T @ (x - decode(loc) + J @ loc) / noise_var), precision


# --- book/04_gp_random_inference/03_error_is_a_function.ipynb, cell d8eec26d
import autograd.numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize


# --- book/04_gp_random_inference/03_error_is_a_function.ipynb, cell 40949abe
def bowl_data(num, rng):
    """Draw num data [num, 2] from the bowl."""
    z = rng.normal(size=num)
    return np.stack([z, 0.5 * z ** 2], 1) + 0.5 * rng.normal(size=(num, 2))


def affine_encoder(p, x):
    """(b, c) [2, B] at x [B, 2]: affine in x, from six numbers p."""
    return np.stack([p[0] + x @ p[1:3], p[3] + x @ p[4:6]])


def fit_affine_encoder(x):
    """The six numbers that maximise the exact bound of the bowl, by `bowl_slope`."""
    columns = np.column_stack([np.ones(len(x)), x])

    def loss(p):
        lam = affine_encoder(p, x)
        slope = bowl_slope(lam, x) @ columns / len(x)
        return -np.mean(bowl_elbo(lam[0], lam[1], x)), -slope.ravel()

    start = np.array([0.0, 0.6, 0.3, -1.2, 0.0, 0.0])
    return minimize(loss, start, jac=True, method="BFGS").x


# --- book/04_gp_random_inference/03_error_is_a_function.ipynb, cell 4b68135d
def rbf(a, b, scale=1.0, length=1.0):
    """The kernel scale^2 exp(-|a - b|^2 / (2 length^2)), [N, M]."""
    squares = np.sum((a[:, None] - b[None]) ** 2, axis=2)
    return scale ** 2 * np.exp(-0.5 * squares / length ** 2)


def gp_function_space(x, y, noise_var, x_new, kernel):
    """(mean, variance [M], log evidence) from y [N], x [N, D]; eq-gp-function-space."""
    L = np.linalg.cholesky(kernel(x, x) + np.diag(noise_var))
    half = solve_triangular(L, kernel(x, x_new), lower=True)              # [N, M]
    white = solve_triangular(L, y, lower=True)
    prior = np.diag(kernel(x_new, x_new))
    log_det = 2 * np.sum(np.log(np.diag(L)))
    log_evidence = -0.5 * (white @ white + log_det + len(y) * np.log(2 * np.pi))
    return half.T @ white, prior - np.sum(half ** 2, 0), log_evidence


# --- book/04_gp_random_inference/03_error_is_a_function.ipynb, cell 29e0f005
def gp_weight_space(F, y, noise_var, prior_var=1.0):
    """(m [M], V [M, M], log evidence) from y [N] and F [N, M]; eq-gp-weight-space."""
    N, M = F.shape
    weighted = F.T / noise_var
    L = np.linalg.cholesky(weighted @ F + np.eye(M) / prior_var)
    V = cho_solve((L, True), np.eye(M))
    m = cho_solve((L, True), weighted @ y)
    squares = np.sum((y - F @ m) ** 2 / noise_var) + m @ m / prior_var
    log_det = 2 * np.sum(np.log(np.diag(L))) + M * np.log(prior_var)
    return m, V, -0.5 * (squares + log_det + np.sum(np.log(2 * np.pi * noise_var)))


# --- book/04_gp_random_inference/03_error_is_a_function.ipynb, cell 98c33035
def targets(x, p):
    """(f*, g*, noise of f*, noise of g*), [N] each, for the bowl; eq-gp-targets."""
    f, g = best_gaussian(x, *affine_encoder(p, x))
    v = np.exp(g)
    return f, g, v, 1 / (0.5 + 3 * v ** 2)


def exact_gp_encoder(x, p, x_new, kernel):
    """(mean_f, mean_g, var_f, var_g) at x_new: processes around the affine encoder."""
    f, g, noise_f, noise_g = targets(x, p)
    (b, c), (b_new, c_new) = affine_encoder(p, x), affine_encoder(p, x_new)
    mean_f, var_f, _ = gp_function_space(x, f - b, noise_f, x_new, kernel)
    mean_g, var_g, _ = gp_function_space(x, g - c, noise_g, x_new, kernel)
    return b_new + mean_f, c_new + mean_g, var_f, var_g


# --- book/04_gp_random_inference/03_error_is_a_function.ipynb, cell 932b9ad5
def tanh_features(x, num_features=20, seed=0):
    """psi(x) [N, M]: fixed random tanh units, scaled so that |psi| is of order one."""
    rng = np.random.default_rng(seed)
    P, c0 = rng.normal(size=(num_features, x.shape[1])), rng.normal(size=num_features)
    return 3 * np.tanh(x @ P.T + c0) / np.sqrt(num_features)


def feature_kernel(a, b):
    """The kernel of `tanh_features` with unit prior variance."""
    return tanh_features(a) @ tanh_features(b).T


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell dfc5af71
import autograd.numpy as np
from autograd.scipy.special import logsumexp
from scipy.special import roots_hermitenorm


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell 2651d1ad
def random_functions(b, c, psi, mean_w, tril_w, mean_u, tril_u):
    """(mean_f, mean_g, var_f, var_g), [N, K] each, eq-gp-random-encoder.

    b, c [N, K], psi [N, M]; means [K, M]; tril [K, M, M] with covariance tril tril^T.
    """
    spread = lambda tril: np.sum(np.einsum("nm,kmj->nkj", psi, tril) ** 2, axis=2)
    return b + psi @ mean_w.T, c + psi @ mean_u.T, spread(tril_w), spread(tril_u)


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell ddda2359
def weight_kl(mean, tril, prior_var=1.0):
    """KL of K normals (means, factors) from N(0, prior_var I), eq-gp-weight-kl."""
    log_det = 2 * np.sum(np.log(np.abs(np.diagonal(tril, axis1=-1, axis2=-2))))
    squares = np.sum(tril ** 2) + np.sum(mean ** 2)
    return 0.5 * (squares / prior_var + mean.size * (np.log(prior_var) - 1) - log_det)


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell d1f8b811
def average_kl(mean_f, mean_g, var_f, var_g):
    """Divergence from the prior averaged over encoders, [N], eq-gp-average-kl."""
    return 0.5 * np.sum(mean_f ** 2 + var_f + np.exp(mean_g + 0.5 * var_g) - 1 - mean_g,
                        1)


def bowl_average_bound(mean_f, mean_g, var_f, var_g, x, noise_var=0.25):
    """J_n [N] of eq-gp-average-bound for the bowl; one latent, arguments [N]."""
    lognormal = np.exp(mean_g + 0.5 * var_g)
    tau = var_f + lognormal
    tau_squared = var_f ** 2 + 2 * var_f * lognormal + np.exp(2 * mean_g + 2 * var_g)
    second = mean_f ** 2 + tau
    fourth = mean_f ** 4 + 6 * mean_f ** 2 * tau + 3 * tau_squared
    error = ((x[:, 0] - mean_f) ** 2 + tau
             + x[:, 1] ** 2 - x[:, 1] * second + 0.25 * fourth)
    log_lik = -0.5 * error / noise_var - np.log(2 * np.pi * noise_var)
    return log_lik - 0.5 * (second - 1 - mean_g)


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell 0a4cc769
def natural_step(average, state, b, c, psi, x, rate, prior_var=1.0, beta=1.0):
    """A damped sweep of eq-gp-fixed-point, one latent; state: (m, V) of w and of u."""
    (m_w, V_w), (m_u, V_u) = state
    quadratic = lambda V: np.sum((psi @ V) * psi, 1)
    at = (b + psi @ m_w, c + psi @ m_u, quadratic(V_w), quadratic(V_u))
    new = []
    for i, (m, V) in enumerate(state):
        curvature = np.maximum(-2 * egrad(average, 2 + i)(*at, x), 0.0)
        slope = egrad(average, i)(*at, x)
        target = np.eye(len(m)) / prior_var + (psi.T * curvature) @ psi / beta
        V_new = np.linalg.inv((1 - rate) * np.linalg.inv(V) + rate * target)
        new.append((m + rate * V_new @ (psi.T @ slope / beta - m / prior_var), V_new))
    return new


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell df3f4e42
def objective(average, state, b, c, psi, x, prior_var=1.0, beta=1.0):
    """J of eq-gp-objective for one latent and the closed-form average bound."""
    (m_w, V_w), (m_u, V_u) = state
    quadratic = lambda V: np.sum((psi @ V) * psi, 1)
    J_n = average(b + psi @ m_w, c + psi @ m_u, quadratic(V_w), quadratic(V_u), x)
    kl = sum(weight_kl(m[None], np.linalg.cholesky(V)[None], prior_var) for m,
             V in state)
    return np.sum(J_n) - beta * kl


def fit_random_encoder(average, b, c, psi, x, num_sweeps=40, prior_var=1.0, beta=1.0):
    """(state, path of J): sweeps of `natural_step`, halved until J does not fall."""
    M = psi.shape[1]
    state = [(np.zeros(M), 0.1 * np.eye(M)) for _ in range(2)]
    path = [objective(average, state, b, c, psi, x, prior_var, beta)]
    for _ in range(num_sweeps):
        for rate in 0.5 ** np.arange(8):
            new = natural_step(average, state, b, c, psi, x, rate, prior_var, beta)
            value = objective(average, new, b, c, psi, x, prior_var, beta)
            if value >= path[-1]:
                state, path = new, path + [value]
                break
    return state, path


# --- book/04_gp_random_inference/04_random_encoder.ipynb, cell a3aaf109
def averaged_log_posterior(z, mean_f, mean_g, var_f, var_g, num_nodes=20):
    """log of the averaged posterior at z [..., N, K], eq-gp-averaged-posterior."""
    nodes, weights = roots_hermitenorm(num_nodes)
    g = mean_g[..., None] + np.sqrt(var_g)[..., None] * nodes            # [N, K, H]
    var = var_f[..., None] + np.exp(g)
    squares = (z - mean_f)[..., None] ** 2 / var
    log_weights = np.log(weights / np.sum(weights))
    terms = log_weights - 0.5 * (squares + np.log(2 * np.pi * var))
    return np.sum(logsumexp(terms, axis=-1), axis=-1)


# --- book/04_gp_random_inference/05_how_uncertain.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/04_gp_random_inference/05_how_uncertain.ipynb, cell 14d063fb
def effective_parameters(F, precision, prior_var=1.0):
    """sum of lambda / (1 + lambda) over eigenvalues of prior_var precision F^T F."""
    eigenvalues = np.linalg.eigvalsh(prior_var * precision * F.T @ F)
    return np.sum(eigenvalues / (1 + eigenvalues))


# --- book/04_gp_random_inference/05_how_uncertain.ipynb, cell ad357ba3
def bowl_random_encoder(x, num_sweeps=25, beta=1.0):
    """(p, state, path) of an affine base and random weights, fitted to x."""
    p = fit_affine_encoder(x)
    b, c = affine_encoder(p, x)
    features = tanh_features(x)
    return p, *fit_random_encoder(bowl_average_bound, b, c, features, x, num_sweeps,
                                  beta=beta)


def bowl_functions(p, state, x):
    """(mean_f, mean_g, var_f, var_g), [N] each, at x."""
    (b, c), psi = affine_encoder(p, x), tanh_features(x)
    (m_w, V_w), (m_u, V_u) = state
    quadratic = lambda V: np.sum((psi @ V) * psi, 1)
    return b + psi @ m_w, c + psi @ m_u, quadratic(V_w), quadratic(V_u)


# --- book/04_gp_random_inference/05_how_uncertain.ipynb, cell d4c97415
def uncertainty(mean_f, mean_g, var_f, var_g):
    """The reported uncertainty, in nats, of functions [N, K]; eq-gp-uncertainty."""
    return np.sum(0.5 * var_f * np.exp(-mean_g) + 0.25 * var_g, axis=-1)


# --- book/04_gp_random_inference/06_richer_posteriors.ipynb, cell 6a892daa
import autograd.numpy as np
from autograd import grad, jacobian
from autograd.scipy.special import logsumexp


# --- book/04_gp_random_inference/06_richer_posteriors.ipynb, cell 517d5abc
def diagonal_log_prob(z, loc, log_var):
    """Log-density of diagonal normals, [..., K] -> [...]."""
    squares = (z - loc) ** 2 * np.exp(-log_var)
    return -0.5 * np.sum(squares + log_var + np.log(2 * np.pi), -1)


def mixture_log_prob(z, loc, log_var, weights):
    """log sum_c weight_c N(z; loc_c, exp(log_var_c)): z [..., B, K], loc [C, B, K]."""
    parts = diagonal_log_prob(z[..., None, :, :], loc, log_var)
    return logsumexp(parts + np.log(weights)[:, None], axis=-2)


def stage_objective(c, loc, log_var, weights, noise, log_joint):
    """eq-gp-stage [B] for component c, with noise [S, C, B, K]: it sees 0, ..., c."""
    z = loc[c] + np.exp(0.5 * log_var[c]) * noise[:, c]
    seen = weights[:c + 1] / np.sum(weights[:c + 1])
    log_q = mixture_log_prob(z, loc[:c + 1], log_var[:c + 1], seen)
    return np.mean(log_joint(z) - log_q, 0)


def mixture_bound(loc, log_var, weights, noise, log_joint):
    """The bound [B] of the mixture, with S draws of each component."""
    z = loc + np.exp(0.5 * log_var) * noise
    log_w = log_joint(z) - mixture_log_prob(z, loc, log_var, weights)
    return np.sum(weights[:, None] * np.mean(log_w, 0), 0)


# --- book/04_gp_random_inference/06_richer_posteriors.ipynb, cell ad88dc9e
def autoregressive_masks(num_latents, num_hidden):
    """The cuts of eq-gp-masks: zeros and ones, [H, K] and [K, H]."""
    degree, index = np.arange(num_hidden) % num_latents, np.arange(num_latents)
    return 1.0 * (index < degree[:, None]), 1.0 * (degree <= index[:, None])


def shift_and_scale(z, h, step):
    """m and log s of eq-gp-iaf at z [..., B, K], context h [B, L]: two [..., B, K]."""
    enter, weight, offset, leave, bias = step
    first, second = autoregressive_masks(z.shape[-1], len(enter))
    hidden = np.maximum(z @ (first * enter).T + h @ weight.T + offset, 0)
    out = hidden @ (np.concatenate([second, second]) * leave).T + bias
    half = z.shape[-1]
    return out[..., :half], -np.logaddexp(0, -out[..., half:])


# --- book/04_gp_random_inference/06_richer_posteriors.ipynb, cell 9af9ae35
def flow_draw(loc, log_var, noise, h, steps):
    """Draws [S, B, K] of the bent Gaussian from noise, and their log-densities [S, B]."""
    z = loc + np.exp(0.5 * log_var) * noise
    log_q = diagonal_log_prob(z, loc, log_var)
    for number, one in enumerate(steps):
        z = z[..., ::-1] if number else z
        shift, log_scale = shift_and_scale(z, h, one)
        z = np.exp(log_scale) * z + (1 - np.exp(log_scale)) * shift
        log_q = log_q - np.sum(log_scale, -1)
    return z, log_q


def flow_log_prob(z, loc, log_var, h, steps):
    """The log-density [..., B] of any z [..., B, K], by undoing the steps."""
    log_det = 0.0
    for number, one in reversed(list(enumerate(steps))):
        found = np.zeros(z.shape)
        for j in range(z.shape[-1]):     # pass j settles latent j
            shift, log_scale = shift_and_scale(found, h, one)
            value = (z - (1 - np.exp(log_scale)) * shift) * np.exp(-log_scale)
            found = np.concatenate([found[..., :j], value[..., j:j + 1],
                                    found[..., j + 1:]], -1)
        log_det = log_det + np.sum(shift_and_scale(found, h, one)[1], -1)
        z = found[..., ::-1] if number else found
    return diagonal_log_prob(z, loc, log_var) - log_det
