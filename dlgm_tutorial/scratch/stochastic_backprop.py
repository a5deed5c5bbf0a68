"""The from-scratch code of book/02_stochastic_backprop. Written by `make scratch`; edit the chapter."""

# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell 2b5e384d
import autograd.numpy as np
from autograd import grad


# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell 105a6a44
def slope(f, z):
    """f'(z) for each row of z [S, K], f mapping [S, K] to [S]."""
    return grad(lambda z: np.sum(f(z)))(z)


def bonnet_gradient(f, loc, scale, noise):
    """One estimate [S, K] per draw of the gradient of E f in the mean, eq-sb-bonnet."""
    return slope(f, loc + noise @ scale.T)


# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell 219c7809
def curvature(f, z):
    """The Hessian of f at each row of z: [S, K, K]."""
    rows = [grad(lambda z, k=k: np.sum(slope(f, z)[:,
                                                   k]))(z) for k in range(z.shape[1])]
    return np.stack(rows, axis=1)


def price_gradient(f, loc, scale, noise):
    """One estimate [S, K, K] per draw of the gradient in C (untied entries), eq-sb-price."""
    return 0.5 * curvature(f, loc + noise @ scale.T)


# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell af880e37
def pathwise_gradient(f, loc, scale, noise):
    """Estimates per draw in the mean [S, K] and in R [S, K, K], eq-sb-pathwise."""
    g = slope(f, loc + noise @ scale.T)
    return g, g[:, :, None] * noise[:, None, :]


# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell 59d885a2
def score_function_gradient(f, loc, scale, noise, baseline=0.0):
    """Estimates per draw in the mean, [S, K], from values of f alone, eq-sb-score."""
    score = np.linalg.solve(scale.T, noise.T).T
    return (f(loc + noise @ scale.T) - baseline)[:, None] * score


def optimal_baseline(f, loc, scale, noise):
    """E[f s^2] / E[s^2] for each coordinate of the mean, estimated from draws, eq-sb-baseline."""
    score2 = np.linalg.solve(scale.T, noise.T).T ** 2
    return np.mean(f(loc + noise @ scale.T)[:, None] * score2, 0) / np.mean(score2, 0)


# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell c90dd508
from scipy.special import digamma, gammaln


def gamma_shape_gradient(z, shape, num_terms=200):
    """dz / d shape at fixed u = F(z) for z ~ Gamma(shape, 1), eq-sb-gamma. z: [S]."""
    a = shape + np.arange(num_terms)
    log_z = np.log(z)[..., None]
    terms = np.exp(a * log_z - z[..., None] - gammaln(a + 1))
    log_p = (shape - 1) * np.log(z) - z - gammaln(shape)
    return -np.sum(terms * (log_z - digamma(a + 1)), -1) * np.exp(-log_p)


# --- book/02_stochastic_backprop/01_gradient_of_an_expectation.ipynb, cell 99e79f55
def newton_step(loc, mean_slope, mean_curvature):
    """One Newton step on a full Gaussian q, eq-sb-fixed-point: new mean and precision."""
    precision = np.eye(len(loc)) - mean_curvature
    return loc + np.linalg.solve(precision, mean_slope - loc), precision


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 49530f04
import autograd.numpy as np


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 4ab0e3b8
def network(layers, h, activation=np.tanh):
    """Apply [(W, b), ...] to the rows of h; the last layer has no activation."""
    for W, b in layers[:-1]:
        h = activation(h @ W.T + b)
    W, b = layers[-1]
    return h @ W.T + b


def states(networks, matrices, z, activation=np.tanh):
    """The states (h_1, ..., h_L) from the noises z = (z_1, ..., z_L), eq-sb-ancestral."""
    h = [z[-1] @ matrices[-1].T]
    for layer in reversed(range(len(z) - 1)):
        h.insert(0, network(networks[layer + 1], h[0],
                            activation) + z[layer] @ matrices[layer].T)
    return h


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 910f47d9
def log_bernoulli(x, logits):
    """log p(x | logits) summed over the last axis."""
    return np.sum(x * logits - np.logaddexp(0.0, logits), axis=-1)


def log_normal(z):
    """log N(z | 0, I) over the last axis."""
    return -0.5 * np.sum(z ** 2 + np.log(2 * np.pi), axis=-1)


def log_joint_noise(networks, matrices, x, z):
    """log p(x, z_1, ..., z_L), eq-sb-joint-noise."""
    logits = network(networks[0], states(networks, matrices, z)[0])
    return log_bernoulli(x, logits) + sum(log_normal(part) for part in z)


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 0ecb3310
def log_joint_state(networks, matrices, x, h):
    """log p(x, h_1, ..., h_L), eq-sb-joint-state."""
    value = log_bernoulli(x, network(networks[0], h[0]))
    for layer, G in enumerate(matrices):
        rest = h[layer]
        if layer < len(h) - 1:
            rest = rest - network(networks[layer + 1], h[layer + 1])
        value = value + log_normal(np.linalg.solve(G,
                                                   rest.T).T) - np.linalg.slogdet(G)[1]
    return value


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 6153d81d
def kl_diagonal(loc, log_var):
    """KL[N(loc, diag exp log_var) || N(0, I)] over the last axis, eq-sb-kl."""
    # expm1(v) - v keeps the digits of a tiny divergence, exp(v) - v - 1 loses them
    return 0.5 * np.sum(loc ** 2 + np.expm1(log_var) - log_var, axis=-1)


def bound_diagonal(networks, matrices, x, loc, log_var, noise):
    """The bound per example, eq-sb-bound, with diagonal q: tuples of layers, noise [S, B, K_l]."""
    z = [m + np.exp(0.5 * v) * e for m, v, e in zip(loc, log_var, noise, strict=True)]
    logits = network(networks[0], states(networks, matrices, z)[0])
    kl = sum(kl_diagonal(m, v) for m, v in zip(loc, log_var, strict=True))
    return np.mean(log_bernoulli(x, logits), axis=0) - kl


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell dfc7cd5f
def independence_gap(precision, blocks):
    """Nats lost by the best Gaussian q that is independent between blocks, eq-sb-blocks."""
    log_det = lambda block: np.linalg.slogdet(precision[np.ix_(block, block)])[1]
    return 0.5 * (sum(log_det(block) for block in blocks) - np.linalg.slogdet(precision)[1])


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 5c09a289
def forward(layers, h):
    """A tanh network's output, and the input of each of its layers, kept for the way back."""
    inputs = [h]
    for W, b in layers[:-1]:
        inputs.append(np.tanh(inputs[-1] @ W.T + b))
    W, b = layers[-1]
    return inputs[-1] @ W.T + b, inputs


def backward(layers, inputs, delta):
    """Slopes [(dW, db), ...] summed over all rows, and J^T delta for the network's input."""
    slopes = []
    for number in reversed(range(len(layers))):
        h, W = inputs[number], layers[number][0]
        rows = delta.reshape(-1, len(W))
        slopes.insert(0, (rows.T @ h.reshape(-1, h.shape[-1]), np.sum(rows, 0)))
        delta = delta @ W
        if number > 0:
            delta = delta * (1 - h ** 2)
    return slopes, delta


# --- book/02_stochastic_backprop/02_deep_latent_gaussian_model.ipynb, cell 32351270
def free_energy_by_hand(T0, T1, G1, G2, x, loc, sd, noise, weights):
    """F and its slopes, two layers, diagonal q: eq-sb-backward, eq-sb-gradient.

    x [B, D]; loc, sd: pairs of [B, K_l]; noise: pair of [S, B, K_l];
    weights: of the draws, [S, 1, 1], their sum 1.
    """
    z1, z2 = (m + s * e for m, s, e in zip(loc, sd, noise, strict=True))
    h2 = z2 @ G2.T
    middle, inputs1 = forward(T1, h2)
    logits, inputs0 = forward(T0, middle + z1 @ G1.T)
    kl = sum(kl_diagonal(m, 2 * np.log(s)) for m, s in zip(loc, sd, strict=True))
    value = np.sum(kl) - np.sum(weights[..., 0] * log_bernoulli(x, logits))
    dT0, delta1 = backward(T0, inputs0, -weights * (x - 1 / (1 + np.exp(-logits))))
    dT1, delta2 = backward(T1, inputs1, delta1)
    dz = delta1 @ G1, delta2 @ G2
    dG = [np.einsum("sbi,sbj->ij", d, z) for d,
          z in zip((delta1, delta2), (z1, z2), strict=True)]
    dloc = [np.sum(d, 0) + m for d, m in zip(dz, loc, strict=True)]
    dsd = [np.sum(d * e, 0) + s - 1 / s for d, e, s in zip(dz, noise, sd, strict=True)]
    return value, {"T0": dT0, "T1": dT1, "G": dG, "loc": dloc, "sd": dsd}


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell b47f6563
def rank1_terms(log_d, u):
    """s, w and t of a rank-one precision, eq-sb-rank1-covariance."""
    s = np.exp(-0.5 * log_d)
    w = s * u
    return s, w, np.sum(w ** 2, axis=-1, keepdims=True)


def rank1_sample(loc, log_d, u, noise):
    """Draw loc + R noise in O(K), eq-sb-factor; noise [..., K]."""
    s, w, t = rank1_terms(log_d, u)
    c = 1 / (1 + t + np.sqrt(1 + t))
    return loc + s * (noise - c * np.sum(w * noise, axis=-1, keepdims=True) * w)


def rank1_log_prob(loc, log_d, u, z):
    """log q(z) in O(K), eq-sb-rank1-density."""
    delta, t = z - loc, rank1_terms(log_d, u)[2][..., 0]
    quadratic = np.sum(np.exp(log_d) * delta ** 2, -1) + np.sum(u * delta, -1) ** 2
    log_det = np.sum(log_d - np.log(2 * np.pi), -1) + np.log1p(t)
    return 0.5 * (log_det - quadratic)


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell d5a1a403
def rank1_kl(loc, log_d, u):
    """KL[q || N(0, I)] in O(K), eq-sb-rank1-kl."""
    s, w, t = rank1_terms(log_d, u)
    diagonal = np.sum(loc ** 2 + np.expm1(-log_d) + log_d, -1)
    return 0.5 * (diagonal - np.sum((s * w) ** 2,
                                    -1) / (1 + t[..., 0]) + np.log1p(t[..., 0]))


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell 2b065e4b
def rank1_backward(log_d, u, noise, g):
    """Slopes in loc, log_d and u from the slope g in the draw, eq-sb-rank1-backward."""
    s, w, t = rank1_terms(log_d, u)
    dot = lambda a, b: np.sum(a * b, axis=-1, keepdims=True)
    root = np.sqrt(1 + t)
    c = 1 / (1 + t + root)
    a, y_bar = dot(w, noise), s * g
    y, b = noise - c * a * w, dot(w, y_bar)
    dc_dt = -c ** 2 * (1 + 0.5 / root)
    w_bar = -c * a * y_bar - c * b * noise - 2 * a * b * dc_dt * w
    return g, -0.5 * s * (y * g + u * w_bar), s * w_bar


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell 46c07d5b
def rank_r_terms(log_d, U):
    """s [..., K], W [..., K, r], L [..., r, r] with L L^T = I + W^T W, eq-sb-rank-r."""
    s = np.exp(-0.5 * log_d)
    W = s[..., None] * U
    return s, W, np.linalg.cholesky(np.eye(U.shape[-1]) + np.swapaxes(W, -1, -2) @ W)


def rank_r_sample(loc, log_d, U, noise):
    """Draw loc + R noise in O(K r^2 + r^3), eq-sb-rank-r; noise [..., K]."""
    s, W, L = rank_r_terms(log_d, U)
    eye = np.eye(U.shape[-1]) + 0 * L
    A = np.linalg.solve(np.swapaxes(L, -1, -2), np.linalg.solve(eye + L, eye))
    along = np.sum(W * noise[..., None], -2)                    # W^T noise, [..., r]
    along = np.sum(A * along[..., None, :], -1)
    return loc + s * (noise - np.sum(W * along[..., None, :], -1))


def rank_r_kl(loc, log_d, U):
    """KL[q || N(0, I)] of the same: eq-sb-kl with the log-determinant of eq-sb-rank-r."""
    s, W, L = rank_r_terms(log_d, U)
    removed = np.linalg.solve(L, np.swapaxes(s[..., None] * W, -1, -2))
    log_det = -np.sum(log_d,
                      -1) - 2 * np.sum(np.log(np.diagonal(L, axis1=-1, axis2=-2)), -1)
    trace_less_size = np.sum(np.expm1(-log_d), -1) - np.sum(removed ** 2, axis=(-1, -2))
    return 0.5 * (np.sum(loc ** 2, -1) + trace_less_size - log_det)


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell 3d110970
def gaussian_layer(output, noise, family):
    """Draw z [S, B, K] and KL [B] of one layer from the network's output [B, ...]."""
    K = noise.shape[-1]
    loc, log, rest = output[:, :K], 10 * np.tanh(output[:,
                                                        K:2 * K] / 10), output[:, 2 * K:]
    if family == "diagonal":
        return loc + np.exp(0.5 * log) * noise, kl_diagonal(loc, log)
    if family == "rank1":
        return rank1_sample(loc, log, rest, noise), rank1_kl(loc, log, rest)
    if family == "rank_r":
        U = rest.reshape(len(rest), K, -1)
        return rank_r_sample(loc, log, U, noise), rank_r_kl(loc, log, U)
    below = np.einsum("bn,nij->bij", rest, below_diagonal(K))
    z = loc + np.exp(0.5 * log) * noise + np.einsum("bij,sbj->sbi", below, noise)
    return z, kl_diagonal(loc, log) + 0.5 * np.sum(below ** 2, axis=(1, 2))


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell 134bedac
def below_diagonal(K):
    """[K (K - 1) / 2, K, K]: one matrix for each entry below the diagonal, row by row."""
    row, col = np.tril_indices(K, -1)
    place = np.zeros((len(row), K, K))
    place[np.arange(len(row)), row, col] = 1.0
    return place


def bound(parameters, x, noise, family="diagonal", activation=np.tanh):
    """The bound per example [B], eq-sb-bound. noise: per layer [S, B, K_l]."""
    z, kl = [], 0.0
    for layers, eps in zip(parameters["recognition"], noise, strict=True):
        draw, divergence = gaussian_layer(network(layers, x, activation), eps, family)
        z.append(draw)
        kl = kl + divergence
    h = states(parameters["networks"], parameters["matrices"], z, activation)
    return np.mean(log_bernoulli(x, network(parameters["networks"][0], h[0],
                                            activation)), axis=0) - kl


# --- book/02_stochastic_backprop/03_pancakes_and_cigars.ipynb, cell 15f22417
def adam_step(values, slopes, memory, lr, betas=(0.9, 0.999), eps=1e-8):
    """One step of Adam on flat arrays; memory: (step, mean, mean square), None at first."""
    step, mean, square = memory or (0, 0.0, 0.0)
    step = step + 1
    mean = betas[0] * mean + (1 - betas[0]) * slopes
    square = betas[1] * square + (1 - betas[1]) * slopes ** 2
    scale = np.sqrt(square / (1 - betas[1] ** step)) + eps
    return values - lr * mean / (1 - betas[0] ** step) / scale, (step, mean, square)


# --- book/02_stochastic_backprop/05_how_good_is_it.ipynb, cell 57ebe9ea
def log_likelihood_is(log_w):
    """From log-weights [S]: log p(x), its error, effective sample size, eq-sb-importance."""
    S = len(log_w)
    top = np.max(log_w)
    w = np.exp(log_w - top)
    mean = np.mean(w)
    rho = np.mean((w - mean) ** 2) / mean ** 2
    return top + np.log(mean), np.sqrt(rho / S), S / (1 + rho)


# --- book/02_stochastic_backprop/05_how_good_is_it.ipynb, cell 18a0b697
def weight_variance(loc, var, proposal_loc, proposal_var):
    """rho of eq-sb-rho for one latent, posterior and proposal Gaussian."""
    spare = 2 * proposal_var - var
    safe = np.where(spare > 0, spare, 1.0)
    value = proposal_var / np.sqrt(var * safe) * np.exp((loc - proposal_loc) ** 2 / safe) - 1
    return np.where(spare > 0, value, np.inf)


# --- book/02_stochastic_backprop/05_how_good_is_it.ipynb, cell 0fc3df5b
def hmc_step(z, log_f, slope, step_size, num_leapfrog, rng):
    """One HMC step of all chains z [S, K] on the density exp(log_f); slope(z) is its gradient."""
    momentum = rng.standard_normal(z.shape)
    start, new, p = log_f(z) - 0.5 * np.sum(momentum ** 2, 1), z, momentum
    for _ in range(num_leapfrog):
        p = p + 0.5 * step_size * slope(new)
        new = new + step_size * p
        p = p + 0.5 * step_size * slope(new)
    accept = np.log(rng.random(len(z))) < log_f(new) - 0.5 * np.sum(p ** 2, 1) - start
    return np.where(accept[:, None], new, z)


def log_likelihood_ais(log_likelihood, slope, num_chains, num_latents, num_steps,
                       step_size, rng):
    """Log-weights [S] of annealed importance sampling from the prior, eq-sb-ais."""
    betas = np.linspace(0, 1, num_steps + 1)
    z, log_w = rng.standard_normal((num_chains, num_latents)), np.zeros(num_chains)
    for before, beta in zip(betas[:-1], betas[1:], strict=True):
        log_w = log_w + (beta - before) * log_likelihood(z)
        log_f = lambda z, beta=beta: beta * log_likelihood(z) - 0.5 * np.sum(z ** 2, 1)
        slope_f = lambda z, beta=beta: beta * slope(z) - z
        z = hmc_step(z, log_f, slope_f, step_size, 5, rng)
    return log_w


# --- book/02_stochastic_backprop/06_filling_in.ipynb, cell 75b16ea1
def stationary(kernel):
    """The distribution that a kernel [from, to] leaves alone."""
    size = len(kernel)
    equations = np.concatenate([kernel.T - np.eye(size), np.ones((1, size))])
    return np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]


def dobrushin(kernel):
    """Largest total-variation distance between two rows of a kernel."""
    return max(0.5 * np.sum(np.abs(a - b)) for a in kernel for b in kernel)


# --- book/02_stochastic_backprop/06_filling_in.ipynb, cell 43e9eda4
def metropolis_kernel(target, proposal):
    """Kernel [from, to] on a finite set with `target` as its law, eq-sb-metropolis."""
    weight = target / proposal
    move = proposal[None, :] * np.minimum(1.0, weight[None, :] / weight[:, None])
    return move + np.diag(1 - np.sum(move, 1))
