"""Answers by routes that share no code with the methods: dense algebra, quadrature, closed forms.

Plain and slow on purpose: each function is a few lines that can be checked by eye. It imports nothing of this package.
Arrays are NumPy, float64. What one chapter alone needs stands at the end, under the chapter's name.
"""

import itertools

import mpmath
import numpy as np
from scipy import optimize, special

__all__ = ["averaged_normal_log_density", "best_gaussian_1d", "beta_kl", "condition_gaussian", "finite_difference",
           "gauss_hermite", "gauss_hermite_nodes", "gaussian_bound_1d", "gaussian_kl", "gaussian_log_density",
           "gaussian_path_density", "grid_posterior", "kumaraswamy_beta_kl",
           "kumaraswamy_log_density", "kumaraswamy_nodes", "langevin_chain_law", "linear_gaussian_bound",
           "linear_gaussian_evidence", "linear_gaussian_posterior", "log_mean_exp", "log_normal", "mixture_bounds_1d",
           "quadratic_log_joint", "relu_marginal", "relu_network"]


def gaussian_log_density(x, mean, cov):
    """Evaluate log N(x; mean, cov) in nats: x [N, D] or [D], mean [D], cov [D, D] -> [N] or a number."""
    x, cov = np.asarray(x, float), np.atleast_2d(cov)
    delta = np.atleast_2d(x) - mean
    sign, log_det = np.linalg.slogdet(2 * np.pi * cov)
    assert sign > 0, "cov is not positive definite"
    value = -0.5 * (log_det + np.einsum("nd,nd->n", delta, np.linalg.solve(cov, delta.T).T))
    return value if x.ndim == 2 else value[0]


def gaussian_kl(mean_q, cov_q, mean_p, cov_p):
    """KL(N(mean_q, cov_q) || N(mean_p, cov_p)) in nats by dense algebra: means [K], covariances [K, K]."""
    ratio, delta = np.linalg.solve(cov_p, cov_q), np.asarray(mean_q, float) - mean_p
    return 0.5 * (np.trace(ratio) - len(delta) - np.linalg.slogdet(ratio)[1] + delta @ np.linalg.solve(cov_p, delta))


def condition_gaussian(mean, cov, observed, values):
    """Condition a joint normal on some of its coordinates.

    mean [D], cov [D, D]; observed: indices [M], values [M]. Returns (mean, cov) of the others, in their order.
    """
    mean, cov = np.asarray(mean, float), np.asarray(cov, float)
    rest = np.setdiff1d(np.arange(len(mean)), observed)
    across = cov[np.ix_(observed, rest)]
    gain = np.linalg.solve(cov[np.ix_(observed, observed)], across).T
    return mean[rest] + gain @ (np.asarray(values) - mean[observed]), cov[np.ix_(rest, rest)] - gain @ across


def _noise_covariance(noise_var, num):
    noise_var = np.asarray(noise_var, float)
    return noise_var if noise_var.ndim == 2 else np.diag(np.broadcast_to(noise_var, num))


def linear_gaussian_evidence(x, weight, bias, noise_var):
    """log p(x) for z ~ N(0, I), x = weight z + bias + noise, as the density of N(bias, weight weight^T + noise).

    x [N, D], weight [D, K], bias [D], noise_var: a number, [D] or [D, D] -> [N], in nats.
    """
    return gaussian_log_density(x, bias, weight @ np.transpose(weight) + _noise_covariance(noise_var, len(bias)))


def linear_gaussian_posterior(x, weight, bias, noise_var):
    """Posterior mean [N, K] and covariance [K, K] of the same model, by conditioning the joint normal of (z, x).

    x, weight, bias, noise_var: as in `linear_gaussian_evidence`.
    """
    weight = np.asarray(weight, float)
    num_data, num_latents = weight.shape
    joint = np.block([[np.eye(num_latents), weight.T],
                      [weight, weight @ weight.T + _noise_covariance(noise_var, num_data)]])
    mean = np.concatenate([np.zeros(num_latents), bias])
    observed = np.arange(num_latents, num_latents + num_data)
    answers = [condition_gaussian(mean, joint, observed, row) for row in np.atleast_2d(x)]
    return np.stack([m for m, _ in answers]), answers[0][1]


def gauss_hermite(f, mean, cov, num_nodes=40):
    """E f(z) for z ~ N(mean, cov) by a product Gauss-Hermite rule: f maps [N, K] to [N] or [N, ...], K at most 3 or so.

    Exact for polynomials of degree 2 num_nodes - 1; poor for functions with kinks.
    """
    mean = np.atleast_1d(np.asarray(mean, float))
    nodes, weights = special.roots_hermitenorm(num_nodes)
    weights = weights / weights.sum()
    z = np.array(list(itertools.product(nodes, repeat=len(mean))))
    w = np.prod(list(itertools.product(weights, repeat=len(mean))), axis=1)
    return np.tensordot(w, f(mean + z @ np.linalg.cholesky(np.atleast_2d(cov)).T), axes=1)


def grid_posterior(log_joint, low, high, num_points):
    """Integrate exp(log_joint) over the box from low to high (each [K], K = 1 or 2) by the trapezoidal rule.

    log_joint maps [N, K] to [N]. Returns (log_evidence, mean [K], cov [K, K]) of the normalised density. The error
    falls exponentially with num_points for smooth functions that vanish at the edge, like 1 / num_points^2 with kinks.
    """
    axes = [np.linspace(a, b, num_points) for a, b in zip(np.atleast_1d(low), np.atleast_1d(high), strict=True)]
    z = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], -1)
    ends = np.ones(num_points)
    ends[[0, -1]] = 0.5
    log_weight = np.log(np.prod(list(itertools.product(ends, repeat=len(axes))), axis=1))
    log_weight += np.log(np.prod([axis[1] - axis[0] for axis in axes]))
    log_mass = log_joint(z) + log_weight
    log_evidence = special.logsumexp(log_mass)
    mass = np.exp(log_mass - log_evidence)
    mean = mass @ z
    return log_evidence, mean, (mass[:, None] * (z - mean)).T @ (z - mean)


def log_mean_exp(values, axis=0):
    """log of the mean of exp(values) over an axis, of an array of any shape."""
    return special.logsumexp(values, axis=axis) - np.log(np.shape(values)[axis])


def finite_difference(f, x, step=1e-6):
    """Gradient of a scalar function f at an array x [...], by central differences of half-width step: [...]."""
    x = np.asarray(x, float)
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[i] = step
        gradient[i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


def kumaraswamy_log_density(v, a, b, digits=50):
    """Log-density of one Kumaraswamy(a, b) variable at v, in arithmetic of that many digits; v may be of mpmath."""
    with mpmath.workdps(digits):
        v, a, b = mpmath.mpf(v), mpmath.mpf(a), mpmath.mpf(b)
        return float(mpmath.log(a) + mpmath.log(b) + (a - 1) * mpmath.log(v) + (b - 1) * mpmath.log(1 - v**a))


def kumaraswamy_beta_kl(a, b, alpha, beta, digits=30):
    """KL(Kumaraswamy(a, b) || Beta(alpha, beta)) in nats, for numbers, by quadrature of the quantile function.

    With s uniform and v = (1 - s^(1/b))^(1/a), the KL is the integral over s of the log-ratio of the densities at v;
    digits: of the arithmetic.
    """
    with mpmath.workdps(digits):
        a, b, alpha, beta = (mpmath.mpf(float(n)) for n in (a, b, alpha, beta))

        def log1mexp(y):
            return mpmath.log(-mpmath.expm1(y)) if y > -1 else mpmath.log1p(-mpmath.exp(y))

        def log_ratio(log_s):
            log_t = log_s / b  # t = 1 - v^a
            log_v = log1mexp(log_t) / a
            log_q = mpmath.log(a * b) + (a - 1) * log_v + (b - 1) * log_t
            return log_q - (alpha - 1) * log_v - (beta - 1) * log1mexp(log_v)

        # The ends are singular like log(s) and log(1 - s); tanh-sinh quadrature copes, in pieces, from each end.
        pieces = [0, mpmath.mpf(10) ** -6, mpmath.mpf(1) / 10, mpmath.mpf(1) / 2]
        lower = mpmath.quad(lambda s: log_ratio(mpmath.log(s)), pieces)
        upper = mpmath.quad(lambda r: log_ratio(mpmath.log1p(-r)), pieces)
        return float(lower + upper + mpmath.log(mpmath.beta(alpha, beta)))


def beta_kl(a, b, alpha, beta):
    """KL(Beta(a, b) || Beta(alpha, beta)) in nats, closed form, elementwise over arrays of one shape."""
    psi = special.digamma
    return (special.betaln(alpha, beta) - special.betaln(a, b) + (a - alpha) * psi(a) + (b - beta) * psi(b)
            + (alpha - a + beta - b) * psi(a + b))


def relu_decoder(weights, z):
    """Decode z [..., K] by a ReLU network, weights = [(W [out, in], b [out]), ...], the last layer affine: [..., D]."""
    for W, b in weights[:-1]:
        z = np.maximum(z @ W.T + b, 0)
    W, b = weights[-1]
    return z @ W.T + b


def relu_knots(weights, start, direction, low, high):
    """Find where a ReLU network bends on the line start + t direction, low < t < high: the sorted t.

    start, direction: [K]; weights as in `relu_decoder`. Between the bends of the layers before, the input of a unit is
    affine in t, so its zero is found exactly from its values at two points.
    """
    knots = np.array([low, high], float)
    for layer in range(1, len(weights)):
        values = relu_decoder(weights[:layer], np.asarray(start) + knots[:, None] * np.asarray(direction))
        left, right = values[:-1], values[1:]
        piece, unit = np.nonzero(left * right < 0)
        share = left[piece, unit] / (left[piece, unit] - right[piece, unit])
        knots = np.unique(np.concatenate([knots, knots[piece] + share * (knots[piece + 1] - knots[piece])]))
    return knots[1:-1]


def _pieces(low, high, knots, num_cells, num_nodes):
    """Nodes and weights of Gauss-Legendre rules between breakpoints: equal cells from low to high, and the knots."""
    inside = np.asarray(knots)[(knots > low) & (knots < high)]
    edges = np.unique(np.concatenate([np.linspace(low, high, num_cells + 1), inside]))
    nodes, weights = special.roots_legendre(num_nodes)
    half = np.diff(edges)[:, None] / 2
    return ((edges[:-1, None] + half) + half * nodes).ravel(), (half * weights).ravel()


def relu_posterior(weights, x, noise_var, low, high, num_cells=60, num_nodes=10):
    """Evidence and posterior moments of a ReLU decoder with one or two latents, by quadrature between its bends.

    Model: z ~ N(0, I), x = decoder(z) + N(0, noise_var I); weights as in `relu_decoder`, x [D], noise_var a number;
    low, high [K]: a box that holds the posterior. Returns (log_evidence in nats, mean [K], cov [K, K], third central
    moments [K]). Between bends the integrand is smooth, so the Gauss-Legendre rules of num_nodes in num_cells converge
    fast. With two latents (one hidden layer) the outer integral is cut where two bending lines cross or a line leaves
    the box, the inner one where it crosses a line.
    """
    low, high, x = np.atleast_1d(low), np.atleast_1d(high), np.asarray(x, float)

    def log_joint(z):
        squares = np.sum((x - relu_decoder(weights, z)) ** 2, -1)
        return -0.5 * (squares / noise_var + len(x) * np.log(2 * np.pi * noise_var)
                       + np.sum(z**2, -1) + z.shape[-1] * np.log(2 * np.pi))

    if len(low) == 1:
        t, w = _pieces(low[0], high[0], relu_knots(weights, [0.0], [1.0], low[0], high[0]), num_cells, num_nodes)
        z = t[:, None]
    else:
        assert len(weights) == 2, "two latents: one hidden layer"
        (W, b), crossings = weights[0], []
        for i, j in itertools.combinations(range(len(b)), 2):
            if abs(np.linalg.det(W[[i, j]])) > 1e-12:
                crossings.append(np.linalg.solve(W[[i, j]], -b[[i, j]])[0])
        with np.errstate(divide="ignore"):
            crossings += [*((-b - W[:, 1] * low[1]) / W[:, 0]), *((-b - W[:, 1] * high[1]) / W[:, 0])]
        outer, outer_w = _pieces(low[0], high[0], np.array(crossings), num_cells, num_nodes)
        z, w = [], []
        for t, t_w in zip(outer, outer_w, strict=True):
            knots = relu_knots(weights, [t, 0.0], [0.0, 1.0], low[1], high[1])
            inner, inner_w = _pieces(low[1], high[1], knots, num_cells, num_nodes)
            z.append(np.stack([np.full_like(inner, t), inner], -1))
            w.append(t_w * inner_w)
        z, w = np.concatenate(z), np.concatenate(w)
    values = np.concatenate([log_joint(part) for part in np.array_split(z, 1 + len(z) // 100_000)])
    log_evidence = special.logsumexp(values, b=w)
    mass = w * np.exp(values - log_evidence)
    mean = mass @ z
    return log_evidence, mean, (mass[:, None] * (z - mean)).T @ (z - mean), mass @ (z - mean) ** 3


def langevin_chain_law(mean, precision, step_size, num_steps, start_mean, start_cov):
    """Law of an unadjusted Langevin chain on N(mean, precision^-1): mean [K] and covariance [K, K] after num_steps.

    The step z' = z - h precision (z - mean) + sqrt(2 h) noise, h = step_size^2 / 2, is linear, so the law stays normal.
    mean [K], precision [K, K]; it starts as N(start_mean [K], start_cov [K, K]).
    """
    h = 0.5 * np.square(step_size)
    transition = np.eye(len(mean)) - h * np.asarray(precision)
    m, cov = np.asarray(start_mean, float), np.asarray(start_cov, float)
    for _ in range(num_steps):
        m = mean + transition @ (m - mean)
        cov = transition @ cov @ transition.T + 2 * h * np.eye(len(mean))
    return m, cov


# --- Chapter 3: mixture latents

def log_normal(z, mean, scale):
    """log N(z; mean, scale^2) of numbers or arrays [...] that broadcast."""
    return -0.5 * ((z - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def kumaraswamy_nodes(a, b, num_nodes=400):
    """Nodes v and weights [num_nodes] of a rule for E f(v), v Kumaraswamy(a, b): Gauss-Legendre on the quantile."""
    r, w = special.roots_legendre(num_nodes)
    r, w = (r + 1) / 2, w / 2
    s = r**3 * (10 - 15 * r + 6 * r**2)
    return (1 - s ** (1 / b)) ** (1 / a), 30 * (r * (1 - r)) ** 2 * w


def mixture_bounds_1d(x, prior_loc, prior_scale, slope, intercept, noise_scale, loc, scale, a, b, alpha, beta,
                      rho=None):
    """All bounds of a two-component model with one latent and a linear decoder, by quadrature: a dict.

    x a number; prior_loc, prior_scale, loc, scale, rho: pairs [2]; x | z ~ N(slope z + intercept, noise_scale^2);
    q(pi_1) is Kumaraswamy(a, b), p(pi_1) Beta(alpha, beta). Keys: log_px, kl, mean_weights, R, C, H, entropy, cross,
    diagonal, paper, indicator, mixture, hybrid; with rho also collapsed, collapsed_mixture, siw (one draw a component).
    """
    loc, scale, prior_loc, prior_scale = (np.asarray(n, float) for n in (loc, scale, prior_loc, prior_scale))
    v, w = kumaraswamy_nodes(a, b)
    mean = np.array([w @ v, w @ (1 - v)])
    z, h = np.linspace(-12.0, 12.0, 6001, retstep=True)
    q = np.exp(log_normal(z[:, None], loc, scale))  # [Z, 2]
    p = np.exp(log_normal(z[:, None], prior_loc, prior_scale))
    log_px_z = log_normal(x, slope * z + intercept, noise_scale)
    R, C, H = (h * (q * f).sum(0) for f in (log_px_z[:, None], log_normal(z[:, None], prior_loc, prior_scale),
                                          -log_normal(z[:, None], loc, scale)))
    prior_mean = alpha / (alpha + beta)
    log_px = np.log(h * (np.exp(log_px_z) * (p @ [prior_mean, 1 - prior_mean])).sum())
    pi = np.stack([v, 1 - v])  # [2, N]
    q_mix, p_mix = q @ pi, p @ pi  # [Z, N]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = w @ np.nan_to_num(-q_mix * np.log(q_mix)).sum(0) * h
        cross = w @ np.nan_to_num(q_mix * np.log(p_mix)).sum(0) * h
    nodes, weights = special.roots_hermitenorm(80)
    weights = weights / weights.sum()
    own = np.exp(-0.5 * nodes**2)[:, None] / (np.sqrt(2 * np.pi) * scale)  # each component at its own draw
    diagonal = sum(wn * weights @ -np.log(n * own[:, :1] + (1 - n) * own[:, 1]) @ weights
                   for n, wn in zip(v, w, strict=True))
    kl = kumaraswamy_beta_kl(a, b, alpha, beta)
    base = mean @ (R + C) - kl
    found = dict(log_px=log_px, kl=kl, mean_weights=mean, R=R, C=C, H=H, entropy=entropy, cross=cross,
                 diagonal=diagonal, paper=base + diagonal, indicator=base + mean @ H,
                 mixture=mean @ R + cross + entropy - kl, hybrid=base + entropy)
    if rho is not None:
        rho, prior_w = np.asarray(rho), np.array([prior_mean, 1 - prior_mean])
        found["collapsed"] = rho @ (R + C + H + np.log(prior_w) - np.log(rho))
        log_q = lambda z: np.log(np.exp(log_normal(z[..., None], loc, scale)) @ rho)
        log_w = lambda z: (log_normal(x, slope * z + intercept, noise_scale)
                           + np.log(np.exp(log_normal(z[..., None], prior_loc, prior_scale)) @ prior_w) - log_q(z))
        z = loc + scale * nodes[:, None]
        log_weight = log_w(z)  # [nodes, 2]
        found["collapsed_mixture"] = weights @ (log_weight @ rho)
        both = np.log(rho[0] * np.exp(log_weight[:, None, 0]) + rho[1] * np.exp(log_weight[None, :, 1]))
        found["siw"] = weights @ both @ weights
    return found


def gaussian_path_density(x, paths):
    """log sum_p w_p N(x; mean_p, cov_p): x [D], paths a list of (weight, mean [D], cov [D, D])."""
    return special.logsumexp([np.log(w) + gaussian_log_density(x, mean, cov) for w, mean, cov in paths])


# --- Chapter 2: stochastic backpropagation

def gauss_hermite_nodes(mean, cov, num_nodes=40):
    """Nodes [num_nodes^K, K] and weights [num_nodes^K], of sum 1, of the rule behind `gauss_hermite`.

    mean: [K], cov: [K, K] of the normal law; the rule is exact for polynomials of degree 2 num_nodes - 1.
    """
    mean = np.atleast_1d(np.asarray(mean, float))
    nodes, weights = special.roots_hermitenorm(num_nodes)
    z = np.array(list(itertools.product(nodes, repeat=len(mean))))
    w = np.prod(list(itertools.product(weights / weights.sum(), repeat=len(mean))), axis=1)
    return mean + z @ np.linalg.cholesky(np.atleast_2d(cov)).T, w


# --- Chapter 5: piecewise-affine decoders by quadrature

def relu_network(layers, z, slope=0.0):
    """Run a leaky-ReLU network at z [N, K]: (output [N, D], list of hidden pre-activations [N, H]).

    layers: [(W [out, in], b [out]), ...]; slope: of the units left of zero.
    """
    hidden, h = [], np.asarray(z, float)
    for W, b in layers[:-1]:
        hidden.append(h @ np.transpose(W) + b)
        h = np.where(hidden[-1] > 0, hidden[-1], slope * hidden[-1])
    return h @ np.transpose(layers[-1][0]) + layers[-1][1], hidden


def _kinks(layers, slope, low, high):
    """Where a network of one input bends on [low, high]: between known kinks a unit is linear, so interpolation is
    exact."""
    knots = np.array([low, high], float)
    for number in range(len(layers) - 1):
        u = relu_network(layers, knots[:, None], slope)[1][number]
        gap, unit = np.nonzero(u[:-1] * u[1:] < 0)
        share = u[gap, unit] / (u[gap, unit] - u[gap + 1, unit])
        knots = np.unique(np.append(knots, knots[gap] + share * (knots[gap + 1] - knots[gap])))
    return knots


def relu_marginal(layers, x, noise_var, slope=0.0, panels=20, reach=9.0, outer=(150, 8)):
    """log p(x), E[z | x] [K] and E[z z^T | x] [K, K] of one datum x [D], by Gauss-Legendre quadrature over the prior.

    layers, slope: as in `relu_network`; noise_var: a number, [D] or [D, D]; the prior is cut at +-reach.
    The last latent is integrated between the network's kinks along it (`panels` of 10 nodes each), exactly but for
    rounding; the others, one inside the next, on outer = (panels, nodes) a latent, which do not see the kinks.
    """
    noise = _noise_covariance(noise_var, len(x))
    nodes, weights = np.polynomial.legendre.leggauss(10)

    def composite(edges, t, w):
        half = np.diff(edges)[:, None] / 2
        return (edges[:-1, None] + half * (t + 1)).ravel(), (half * w).ravel()

    def integrate(net, fixed):
        """Sums of (1, z, z z^T) times the joint density, with the first latents held at `fixed`, in log scale."""
        (W, b), *rest = net
        if W.shape[1] == 1:
            knots = _kinks(net, slope, -reach, reach)
            edges = np.unique(np.concatenate([np.linspace(low, high, panels + 1)
                                              for low, high in zip(knots[:-1], knots[1:], strict=True)]))
            z, w = composite(edges, nodes, weights)
            log_joint = gaussian_log_density(relu_network(net, z[:, None], slope)[0], x, noise)
            top = log_joint.max()
            w = w * np.exp(log_joint - top - z * z / 2) / np.sqrt(2 * np.pi)
            full = np.column_stack([np.tile(fixed, (len(z), 1)), z])
            return top, w.sum(), w @ full, (w[:, None] * full).T @ full
        points, w = composite(np.linspace(-reach, reach, outer[0] + 1), *np.polynomial.legendre.leggauss(outer[1]))
        w = w * np.exp(-points**2 / 2) / np.sqrt(2 * np.pi)
        parts = [integrate([(W[:, 1:], b + W[:, 0] * p), *rest], [*fixed, p]) for p in points]
        top = max(part[0] for part in parts)
        scale = w * np.exp([part[0] - top for part in parts])
        return top, *(np.tensordot(scale, np.array([part[i] for part in parts]), 1) for i in (1, 2, 3))

    net = [(np.asarray(W, float), np.asarray(b, float)) for W, b in layers]
    top, mass, first, second = integrate(net, [])
    return top + np.log(mass), first / mass, second / mass


# --- Chapter 4: the two gaps, and posteriors averaged over encoders

def quadratic_log_joint(x, z, noise_var=0.25):
    """log p(x, z) for z ~ N(0, 1) and x = (z, z^2 / 2) + N(0, noise_var I): x [2], z [...] -> [...]."""
    squares = (x[0] - z) ** 2 + (x[1] - 0.5 * z**2) ** 2
    return -0.5 * (squares / noise_var + 2 * np.log(2 * np.pi * noise_var) + z**2 + np.log(2 * np.pi))


def gaussian_bound_1d(log_joint, mean, var, num_nodes=60):
    """E_q log_joint(z) + entropy of q = N(mean, var), by Gauss-Hermite with num_nodes nodes.

    log_joint maps z [N] to [N] (one latent); mean, var: numbers.
    """
    nodes, weights = special.roots_hermitenorm(num_nodes)
    expected = weights @ log_joint(mean + np.sqrt(var) * nodes) / weights.sum()
    return expected + 0.5 * np.log(2 * np.pi * np.e * var)


def best_gaussian_1d(log_joint, mean=0.0, log_var=0.0):
    """The normal of the highest bound: (mean, var, bound), by the simplex method of Nelder and Mead.

    log_joint maps z [N] to [N] (one latent); mean, log_var: numbers, where the search starts.
    """
    f = lambda v: -gaussian_bound_1d(log_joint, v[0], np.exp(v[1]))
    v = optimize.minimize(f, [mean, log_var], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}).x
    return v[0], np.exp(v[1]), -f(v)


def averaged_normal_log_density(z, mean_f, mean_g, var_f, var_g):
    """log E N(z; mean_f, var_f + exp(g)), g ~ N(mean_g, var_g), by tanh-sinh quadrature in mpmath.

    All arguments are numbers; arrays [...] are not taken.
    """
    with mpmath.workdps(25):
        def integrand(t):
            var = var_f + mpmath.exp(mean_g + mpmath.sqrt(var_g) * t)
            return mpmath.npdf(z, mean_f, mpmath.sqrt(var)) * mpmath.npdf(t)
        return float(mpmath.log(mpmath.quad(integrand, [-12, -4, 0, 4, 12])))


def linear_gaussian_bound(x, weight, bias, noise_var, mean, cov):
    """The bound of N(mean, cov) at x [D] as log p(x) minus the dense divergence to the exact posterior, in nats.

    weight [D, K], bias [D], noise_var a number, mean [K], cov [K, K].
    """
    posterior_mean, posterior_cov = linear_gaussian_posterior(x, weight, bias, noise_var)
    evidence = linear_gaussian_evidence(np.atleast_2d(x), weight, bias, noise_var)[0]
    return evidence - gaussian_kl(mean, cov, posterior_mean[0], posterior_cov)
