"""Where K Langevin steps end, and which step size ends best (chapter 6); public names are in `short_run_mcmc`.

Everything here judges the law q_s(z | x) of the end point of `short_run` started at the prior N(0, I). A log_density
maps z [..., B, K] to log p(x, z) [..., B] in nats, x being held inside; scores and Hessians are taken from it, so the
values are differentiable in the step size, in forward and in reverse mode.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch

LOG_2PI = math.log(2 * math.pi)
OBJECTIVES = ("jacobian", "semi_implicit", "exact")


def check_steps(num_steps):
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}")


def as_step_size(step_size, like):
    """The step size as a tensor that broadcasts against z [..., K]; positive and finite, or ValueError."""
    s = torch.as_tensor(step_size, dtype=like.dtype, device=like.device)
    if s.ndim > 1 or s.ndim == 1 and s.shape[0] != like.shape[-1]:
        raise ValueError(f"step_size must be a number or [{like.shape[-1]}], one for each latent, got {list(s.shape)}")
    return s


def check_step_size(step_size):
    s = torch.as_tensor(step_size)
    if not bool(((s > 0) & s.isfinite()).all()):
        raise ValueError(f"step_size must be positive and finite, got {s.tolist()}")


def _draw(shape, like, generator):
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _chain_noise(z0, num_steps, stochastic, noise, generator):
    """The injected noise [T, ..., K]; zeros without it."""
    shape = (num_steps, *z0.shape)
    if not stochastic:
        return torch.zeros(num_steps, *[1] * z0.ndim, dtype=z0.dtype, device=z0.device)
    if noise is None:
        return _draw(shape, z0, generator)
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have shape {list(shape)}, one normal for each step and latent, "
                         f"got {list(noise.shape)}")
    return noise


@functools.cache
def _load_forward_mode():
    """At its first use torch scripts the rules of its forward mode, and warns that scripting is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def _jvp(f, z, tangent):
    """f(z) and its derivative along tangent, in forward mode: what it holds in memory does not grow with a chain."""
    _load_forward_mode()
    return torch.func.jvp(f, (z,), (tangent,))


def _score(log_density):
    return torch.func.grad(lambda z: log_density(z).sum())


# ---------------------------------------------------------------- linear decoders: everything in closed form
class EndpointLaw(NamedTuple):
    """The normal law of the end point for B data, and how far it is from the posterior, in nats.

    mean [B, K], covariance [K, K]; kl [B]: KL(q_s || posterior); jacobian_bound [B]: what the change of variables
    given the noise says in its place; mutual_information: their difference, I(end point; noise), the same for every
    datum (infinite bounds where a factor 1 - h lambda vanishes).
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    kl: torch.Tensor
    jacobian_bound: torch.Tensor
    mutual_information: torch.Tensor


def law_of_endpoint(weight, bias, noise_var, x, step_size, num_steps, *, stochastic=True, observed=None):
    """Compute the law of the end point of `short_run` for x = weight z + bias + noise, z ~ N(0, I) -> EndpointLaw.

    With Lambda = I + weight^T weight / noise_var and A = I - h Lambda, h = s^2 / 2, the chain is linear: mean
    (I - A^T) mu and covariance A^2T + s^2 sum_j A^2j after T steps (eq-sr-linear-law, eq-sr-linear-kl,
    eq-sr-linear-bound; eq-sr-general-law for a size for each latent), by the
    eigenvalues of S Lambda S, S = diag(s).
    weight [D, K], bias [D], noise_var a number or [D], x [B, D]; step_size: s, a number or [K]; num_steps: T (0 is the
    prior); stochastic: False leaves the injected noise out; observed: bool [D], the entries of x that count.
    Raises ValueError for shapes that do not fit. Source: brief derivation, exact for every T and s.

    >>> law = law_of_endpoint(torch.ones(1, 1), torch.zeros(1), 1.0, torch.ones(1, 1), 0.5, 40)
    >>> bool(law.kl < law.jacobian_bound)
    True
    """
    if weight.ndim != 2 or x.ndim != 2 or x.shape[-1] != weight.shape[0] or bias.shape != weight.shape[:1]:
        raise ValueError("weight must be [D, K], bias [D] and x [B, D], got "
                         f"{list(weight.shape)}, {list(bias.shape)} and {list(x.shape)}")
    if num_steps != 0:
        check_steps(num_steps)
    noise_var = torch.as_tensor(noise_var, dtype=weight.dtype, device=weight.device).expand_as(bias)
    if not bool((noise_var > 0).all()):
        raise ValueError(f"noise_var must be positive, got a minimum of {float(noise_var.min()):g}")
    keep = torch.ones_like(bias) if observed is None else observed.to(weight.dtype)
    scaled = weight * (keep / noise_var)[:, None]
    num_latents = weight.shape[1]
    eye = torch.eye(num_latents, dtype=weight.dtype, device=weight.device)
    precision = eye + weight.mT @ scaled
    factor = torch.linalg.cholesky(precision)
    residual = torch.where(keep > 0, x - bias, torch.zeros_like(x))
    mu = torch.cholesky_solve((residual @ scaled).mT, factor).mT  # [B, K]
    s = as_step_size(step_size, mu).expand(num_latents)
    # In w = z / s the chain is symmetric: w' = w - S Lambda S (w - w*) / 2 + noise.
    u, V = torch.linalg.eigh(s[:, None] * precision * s)
    a = 1 - 0.5 * u
    log_a = a.abs().log()
    power = torch.where((a < 0) & (num_steps % 2 == 1), -1.0, 1.0) * (num_steps * log_a).exp()
    shrink = s[:, None] * (V * power) @ V.mT / s  # A^T in z's coordinates
    near = (1 - a.square()).abs() < 1e-6
    geometric = torch.where(near, torch.full_like(a, float(num_steps)),
                            -torch.expm1(2 * num_steps * log_a) / torch.where(near, torch.ones_like(a), 1 - a.square()))
    covariance = shrink @ shrink.mT
    if stochastic:
        covariance = covariance + s[:, None] * (V * geometric) @ V.mT * s
    mean = mu - mu @ shrink.mT
    delta = (mu - mean) @ factor
    ratio = factor.mT @ covariance @ factor
    # Without noise the covariance is A^2T, whose smallest eigenvalue may be far below what its entries resolve.
    log_det = torch.linalg.slogdet(covariance).logabsdet if stochastic else 2 * num_steps * log_a.sum()
    common = torch.trace(ratio) + delta.square().sum(-1) - num_latents - 2 * factor.diagonal().log().sum()
    kl = 0.5 * (common - log_det)
    bound = 0.5 * common - num_steps * log_a.sum()
    return EndpointLaw(mean, covariance, kl, bound, 0.5 * log_det - num_steps * log_a.sum())


# ---------------------------------------------------------------- one latent: on a grid
class GridLaw(NamedTuple):
    """The law of the end point on a grid, for B data: points [N], density [N, B], posterior [N, B].

    kl [B] = KL(q_s || posterior) and log_evidence [B] in nats, mass [B] of the density (1 but for the grid's error).
    """

    points: torch.Tensor
    density: torch.Tensor
    posterior: torch.Tensor
    kl: torch.Tensor
    log_evidence: torch.Tensor
    mass: torch.Tensor


def propagate_on_grid(log_density, step_size, num_steps, *, low=-9.0, high=9.0, num_points=2001,
                      dtype=torch.float64, device=None):
    """Propagate the prior through num_steps noisy Langevin steps on a grid, for one latent -> GridLaw.

    eq-sr-law: q'(z') = integral of N(z'; z + s^2/2 score(z), s^2) q(z) dz, by the trapezoidal rule, a product with
    an N x N matrix
    for each datum and step: exact to rounding where the grid's spacing is well below s and the box from low to high
    holds everything. log_density: maps z [N, B or 1, 1] to [N, B]; step_size: a number s; num_points: N;
    dtype, device: of the grid. Raises ValueError for a grid coarser than s. It is O(N^2) a datum and step.
    """
    check_steps(num_steps)
    check_step_size(step_size)
    s = float(step_size)
    points = torch.linspace(low, high, num_points, dtype=dtype, device=device)
    width = (high - low) / (num_points - 1)
    if width > s / 2:
        raise ValueError(f"num_points must make the grid finer than half the step size {s:g}, "
                         f"got a spacing of {width:g}")
    z = points[:, None, None]
    num_data = log_density(z).shape[1]
    z = z.expand(num_points, num_data, 1)
    value = log_density(z).detach()
    drift = z + 0.5 * s**2 * _score(log_density)(z)
    weights = torch.full_like(points, width)
    weights[[0, -1]] /= 2
    log_evidence = (value + weights.log()[:, None]).logsumexp(0)
    log_posterior = value - log_evidence
    density = (-0.5 * (points**2 + LOG_2PI)).exp()[:, None].expand(-1, num_data).T  # [B, N]
    rows = max(1, 2**25 // num_points**2)  # kernels held at once: a quarter of a gigabyte
    parts = []
    for m, q in zip(drift[..., 0].T.split(rows), density.split(rows), strict=True):
        kernel = torch.exp(-0.5 * ((points[:, None] - m[:, None, :]) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for _ in range(num_steps):
            q = torch.einsum("bij,bj->bi", kernel, q * weights)
        parts.append(q)
    density = torch.cat(parts).T
    # Nothing below the smallest normal number is told from zero: 0 log 0 = 0.
    log_q = density.clamp_min(torch.finfo(dtype).tiny).log()
    kl = (weights[:, None] * density * (log_q - log_posterior)).sum(0)
    return GridLaw(points, density, log_posterior.exp(), kl, log_evidence, (weights[:, None] * density).sum(0))


# ---------------------------------------------------------------- any decoder: bounds
class JacobianBound(NamedTuple):
    """value [B]: estimate of a lower bound of log p(x), in nats; log_det [S, B] of the map from start to end;
    z [S, B, K]: the end points; folds [B]: whether a step was seen to fold the space (the value is then no bound)."""

    value: torch.Tensor
    log_det: torch.Tensor
    z: torch.Tensor
    folds: torch.Tensor


def _jacobian_terms(log_density, z, s, noise):
    """log p(x, z_T) + log |det| - log p(z_0) [S, B]; and (log_det, z_T, negative eigenvalues [T, S, B])."""
    score = _score(log_density)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)

    def along(z):  # the gradient [S, B, K] and, row by row, the Hessian [S, B, K, K]
        gradient, pull = torch.func.vjp(score, z)
        return gradient, torch.func.vmap(lambda e: pull(e.expand_as(z))[0], out_dims=-1)(eye)

    size = s.expand(z.shape[-1])
    total, negative = 0.5 * (z.square() + LOG_2PI).sum(-1), []  # - log p(z_0)
    log_det = torch.zeros_like(total)
    for e in noise:
        gradient, hessian = along(z)
        # I + diag(h) H has the determinant of the symmetric I + S H S / 2.
        eigenvalues = torch.linalg.eigvalsh(eye + 0.5 * size[:, None] * hessian * size)
        log_det = log_det + eigenvalues.abs().log().sum(-1)
        negative.append((eigenvalues < 0).sum(-1))
        z = z + 0.5 * s.square() * gradient + s * e
    return total + log_det + log_density(z), (log_det, z, torch.stack(negative))


def jacobian_bound(log_density, z0, step_size, num_steps, *, stochastic=True, noise=None, generator=None):
    """Bound log p(x) from below by the change of variables z_0 -> z_T at fixed noise -> JacobianBound.

    eq-sr-jacobian: E[log p(x, z_T) + sum_k log |det(I + h H(z_k))| - log p(z_0)], H the Hessian of log_density: the
    paper's objective
    for the step size. Without noise it is the ELBO of the end point; with noise it lies below that ELBO by the mutual
    information of end point and noise, which grows as the chain mixes. Where a step folds the space the formula is no
    bound. log_density: as above; z0 [S, B, K]: draws from N(0, I); step_size, num_steps, stochastic, noise
    [T, S, B, K], generator: as in `short_run`. A step costs one Hessian, K passes.
    """
    check_steps(num_steps)
    check_step_size(step_size)
    s = as_step_size(step_size, z0)
    noise = _chain_noise(z0, num_steps, stochastic, noise, generator)
    with torch.no_grad():
        terms, (log_det, z, negative) = _jacobian_terms(log_density, z0, s, noise)
        folds = (negative != negative[:, :1]).any(0).any(0)
    return JacobianBound(terms.mean(0), log_det, z, folds)


class SemiImplicitBounds(NamedTuple):
    """lower [B] and upper [B]: estimates that enclose the ELBO of the end point, log p(x) - KL(q_s || posterior)."""

    lower: torch.Tensor
    upper: torch.Tensor


def _semi_implicit_terms(log_density, z, s, noise):
    """Differentiable: log p(x, z_T) - log q with the chain's own last step in the pool, and without it: [S, B] each."""
    score = _score(log_density)
    for e in noise[:-1]:
        z = z + 0.5 * s.square() * score(z) + s * e
    centre = z + 0.5 * s.square() * score(z)
    end = centre + s * noise[-1]
    size = s.expand(z.shape[-1])
    squares = torch.cdist((end / size).transpose(0, 1), (centre / size).transpose(0, 1),
                          compute_mode="donot_use_mm_for_euclid_dist").square()  # [B, S, S]
    log_kernel = -0.5 * squares - size.log().sum() - 0.5 * LOG_2PI * z.shape[-1]
    num = len(z)
    own = torch.eye(num, dtype=torch.bool, device=z.device)
    mixed = log_kernel.logsumexp(-1) - math.log(num)
    others = log_kernel.masked_fill(own, -torch.inf).logsumexp(-1) - math.log(num - 1)
    log_joint = log_density(end)
    return log_joint - mixed.T, log_joint - others.T


def semi_implicit_bounds(log_density, z0, step_size, num_steps, *, noise=None, generator=None):
    """Enclose the ELBO of the end point between two estimates, from S chains a datum -> SemiImplicitBounds.

    eq-sr-sandwich: the last step is normal given the point before it, so q_s is estimated by a mixture over the S
    chains: with the
    chain's own point in the pool the ELBO comes out too low on average, without it too high. Both tighten with S, the
    slower the more latents: for a handful of them. log_density, z0 [S, B, K], step_size, num_steps, noise,
    generator: as in `jacobian_bound`; the chain must be stochastic. Raises ValueError for fewer than two chains.
    """
    check_steps(num_steps)
    check_step_size(step_size)
    if len(z0) < 2:
        raise ValueError(f"z0 must hold at least two chains a datum along its first axis, got {len(z0)}")
    noise = _chain_noise(z0, num_steps, True, noise, generator)
    with torch.no_grad():
        lower, upper = _semi_implicit_terms(log_density, z0, as_step_size(step_size, z0), noise)
    return SemiImplicitBounds(lower.mean(0), upper.mean(0))


def largest_curvature(log_density, z, *, num_iterations=30, generator=None):
    """Find the largest eigenvalue of minus the Hessian of log_density at z [..., B, K], by power iteration: [..., B].

    Langevin steps are stable where s < 2 / sqrt(lambda) (eq-sr-stable), one-to-one where s < sqrt(2 / lambda).
    log_density: as above;
    num_iterations: products with the Hessian; generator: of the start. The eigenvalue of largest modulus is what power
    iteration finds: with a unit prior that is a positive one wherever curvature matters.
    """
    score = _score(log_density)
    v = _draw(z.shape, z, generator)
    for _ in range(num_iterations):
        v = v / v.norm(dim=-1, keepdim=True)
        product = -_jvp(score, z, v)[1]
        value, v = (v * product).sum(-1), product
    return value.detach()


# ---------------------------------------------------------------- which step size
class StepSize(NamedTuple):
    """step_size: the best one found, a number (or a list, one for each entry of the start); grid: those tried, values:
    the objective at each, an estimate of the average KL(q_s || posterior) - log p(x) in nats (of the average KL itself
    for "exact"), infinite where a chain blew up or was seen to fold the space."""

    step_size: object
    grid: torch.Tensor
    values: torch.Tensor


def _objective(log_density, z0, noise, objective):
    """A function of s: minus the bound, averaged over chains and data, differentiable in s.

    A size at which the map is seen to fold gets infinity: there the change of variables bounds nothing.
    """
    if objective == "semi_implicit":
        return lambda s: -_semi_implicit_terms(log_density, z0, s, noise)[0].mean()

    def value(s):
        terms, (_, _, negative) = _jacobian_terms(log_density, z0, s, noise)
        return torch.where((negative != negative[:, :1]).any(), torch.inf, -terms.mean())
    return value


def _exact_objective(model, x, num_steps, stochastic, num_latents):
    readout = getattr(getattr(model, "generator", model), "readout", None)
    if isinstance(readout, torch.nn.Linear) and getattr(model, "num_layers", 1) == 1:
        return lambda s: law_of_endpoint(readout.weight.detach(), readout.bias.detach(), model.noise_var, x, s,
                                         num_steps, stochastic=stochastic).kl.mean()
    if num_latents != 1 or not stochastic:
        raise ValueError("objective 'exact' needs a linear decoder, or one latent and stochastic=True; "
                         f"this model has {num_latents} latents")
    return lambda s: propagate_on_grid(lambda z: model.log_joint(x, z), float(s), num_steps, dtype=x.dtype,
                                       device=x.device).kl.mean()


def tune_step_size(model, x, *, num_steps=20, objective="jacobian", method="grid", grid=None, start=0.1,
                   num_chains=16, num_iterations=60, lr=0.05, stochastic=True, z0=None, noise=None, generator=None):
    """Choose one step size for all of x [B, D], by an estimate of the average KL(q_s || posterior) -> StepSize.

    model: log_joint(x, z) -> [S, B] and num_latents; num_steps: T. objective: "jacobian" (the paper's,
    `jacobian_bound`: above the KL by the mutual information with the noise), "semi_implicit" (the side of
    `semi_implicit_bounds` on which the KL comes out too high), or "exact" (a linear decoder, or one latent on a grid).
    method: "grid" tries every number of grid
    (default 25 from 0.01 to 1, evenly in the logarithm) with the same draws; "gradient" follows the derivative in
    log s (eq-sr-step-gradient) from start, a number or [K], by Adam (num_iterations of rate lr), in forward mode
    through the chain, and
    keeps the best. num_chains: S a datum; z0 [S, B, K] and noise [T, S, B, K], or generator: common draws for all
    sizes; stochastic: as in `short_run`.
    Raises ValueError for unknown names, and when every size blew up.
    """
    check_steps(num_steps)
    for name, value, known in (("objective", objective, OBJECTIVES), ("method", method, ("grid", "gradient"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if objective == "semi_implicit" and not stochastic:
        raise ValueError("objective 'semi_implicit' needs a stochastic chain: its last step must have a density")
    x = x.detach()
    if objective == "exact":
        if method == "gradient":
            raise ValueError("objective 'exact' is for method 'grid'")
        value = _exact_objective(model, x, num_steps, stochastic, model.num_latents)
    else:
        if z0 is None:
            z0 = _draw((num_chains, len(x), model.num_latents), x, generator)
        noise = _chain_noise(z0, num_steps, stochastic, noise, generator)
        value = _objective(lambda z: model.log_joint(x, z), z0, noise, objective)
    with torch.no_grad():
        if method == "grid":
            grid = torch.logspace(-2, 0, 25, dtype=x.dtype, device=x.device) if grid is None else torch.as_tensor(
                grid, dtype=x.dtype, device=x.device)
            check_step_size(grid)
            values = torch.stack([value(s) for s in grid])
        else:
            check_step_size(start)
            grid, values = _descend(value, torch.as_tensor(start, dtype=x.dtype, device=x.device), num_iterations, lr)
    values = torch.where(values.isfinite(), values, torch.inf)
    if not bool(values.isfinite().any()):
        raise ValueError(f"step_size: every one of the {len(values)} tried blew up, down to {float(grid.min()):g}")
    return StepSize(grid[values.argmin()].tolist(), grid, values)


def _descend(value, start, num_iterations, lr):
    """Adam on log s; the derivative along each entry of s by one forward-mode pass. Returns all sizes and values."""
    log_s, first, second = start.log(), torch.zeros_like(start), torch.zeros_like(start)
    grid, values = [], []
    basis = torch.eye(start.numel(), dtype=start.dtype, device=start.device).reshape(-1, *start.shape)
    for step in range(1, num_iterations + 1):
        along = [_jvp(lambda t: value(t.exp()), log_s, e) for e in basis]
        grid.append(log_s.exp())
        values.append(along[0][0])
        gradient = torch.stack([slope for _, slope in along]).reshape(start.shape)
        if not bool(gradient.isfinite().all()):  # beyond a wall of the objective: back to the best, more slowly
            log_s = grid[int(torch.stack(values).nan_to_num(nan=torch.inf).argmin())].log() - lr
            first, second = torch.zeros_like(start), torch.zeros_like(start)
            continue
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square()
        rate = lr * (1 - (step - 1) / num_iterations)
        log_s = log_s - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-12)
    return torch.stack(grid), torch.stack(values)
