"""Chapter 4's baselines: inference that goes on after the encoder's pass, and posteriors richer than one normal."""

from typing import NamedTuple

import torch
from torch import nn

from dlgm_tutorial._gaussian_vae import (
    LOG_2PI,
    AmortizedVAE,
    check_count,
    check_positive,
    draw_normal,
    require,
    trunk,
)
from dlgm_tutorial.distributions import DiagonalNormal, FullNormal
from dlgm_tutorial.networks import mlp


class Refined(NamedTuple):
    """Mean and log-variance [B, K] after the steps, the bound before each step [T, B], and which rows diverged [B].

    diverged: not finite, or a bound lower than at the start, judged with the noise of the first step.
    """

    mean: torch.Tensor
    log_var: torch.Tensor
    bounds: torch.Tensor
    diverged: torch.Tensor | None


def refine(bound, mean, log_var, noise, *, step_size, momentum=0.0, precondition=False, clip_norm=None,
           adjoint="full", check=False):
    """Climb the bound from (mean, log_var), datum by datum: `Refined` (eq-gp-svi).

    lambda_(k+1) = lambda_k + step_size grad bound(lambda_k; noise_k), lambda = (mean, log_var): plain gradient ascent,
    stable only for step_size < 2 / (largest curvature). bound: maps (mean, log_var, noise [S, B, K]) to [B]; mean,
    log_var [B, K]; noise [T, S, B, K], one part a step. momentum: of heavy balls (eq-gp-momentum). precondition:
    multiply the mean's step by exp(log_var) (eq-gp-preconditioned), which makes the stable step size independent of
    how sharp the posterior is. clip_norm: largest norm of a datum's gradient. adjoint: "full" keeps the graph of the
    steps, so that what follows differentiates through them (eq-gp-adjoint); "first_order" takes the steps as
    constants; "none" has no graph.
    check: also find the rows that diverged, for one more bound.
    Raises ValueError where a step is not finite, naming step_size.
    """
    require(adjoint in ("full", "first_order", "none"),
            f"adjoint must be 'full', 'first_order' or 'none', got {adjoint!r}")
    full = adjoint == "full" and torch.is_grad_enabled()
    if adjoint == "none":
        mean, log_var = mean.detach(), log_var.detach()
    first, speed, bounds = (mean.detach(), log_var.detach()), (0.0, 0.0), []
    for step, part in enumerate(noise):
        with torch.enable_grad():
            if full:
                at = tuple(v if v.requires_grad else v.detach().requires_grad_() for v in (mean, log_var))
            else:
                at = tuple(v.detach().requires_grad_() for v in (mean, log_var))
            value = bound(*at, part)
            slope = torch.autograd.grad(value.sum(), at, create_graph=full)  # a sum: steps ignore the batch's size
        if full:
            mean, log_var = at
        if precondition:
            slope = (slope[0] * torch.exp(log_var if full else log_var.detach()), slope[1])
        if clip_norm is not None:  # the factor is a constant for the adjoint
            norm = torch.cat([s.detach() for s in slope], -1).norm(dim=-1, keepdim=True)
            slope = tuple(s * (clip_norm / norm.clamp(min=clip_norm)) for s in slope)
        speed = tuple(momentum * v + s for v, s in zip(speed, slope, strict=True))
        mean, log_var = (v + step_size * s for v, s in zip((mean, log_var), speed, strict=True))
        bounds.append(value.detach())
        bad = ~(torch.isfinite(mean) & torch.isfinite(log_var)).all(-1)
        if bool(bad.any()):
            raise ValueError(f"step_size={step_size:g} diverges: after step {step + 1} of {len(noise)} the posterior "
                             f"of {int(bad.sum())} of {len(bad)} rows is not finite; take a smaller step_size, "
                             "precondition or clip_norm")
    diverged = None
    if check and len(noise):
        with torch.no_grad():
            before, after = bound(*first, noise[0]), bound(mean, log_var, noise[0])
            diverged = ~(after >= before - 1e-9 * before.abs())
    bounds = torch.stack(bounds) if bounds else mean.new_zeros(0, len(mean))
    return Refined(mean, log_var, bounds, diverged)


def _check_step(num_steps, step_size):
    check_count(num_steps, "num_steps", 0)
    check_positive(step_size, "step_size")


class SemiAmortizedVAE(AmortizedVAE):
    """The semi-amortised autoencoder: the encoder starts, gradient steps on each datum's own bound finish.

    bound(x) is the bound after num_steps steps, and its gradient goes through them (eq-gp-adjoint).
    num_steps: T (0 is the plain autoencoder); step_size, momentum, precondition, clip_norm, adjoint: of `refine`;
    other arguments: of `AmortizedVAE`. Source: Kim, Wiseman, Miller, Sontag and Rush 2018.
    """

    def __init__(self, *args, num_steps=4, step_size=0.02, momentum=0.0, precondition=False, clip_norm=None,
                 adjoint="full", **options):
        super().__init__(*args, **options)
        _check_step(num_steps, step_size)
        require(isinstance(momentum, (int, float)) and 0 <= momentum < 1,
                f"momentum must lie in [0, 1), got {momentum!r}")
        require(adjoint in ("full", "first_order"), f"adjoint must be 'full' or 'first_order', got {adjoint!r}")
        self.num_steps, self.adjoint = num_steps, adjoint
        self.settings = {"step_size": step_size, "momentum": momentum, "precondition": precondition,
                         "clip_norm": clip_norm if clip_norm is None else check_positive(clip_norm, "clip_norm")}

    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)}: "z" for the bound, "steps" [T, S, B, K] for the steps before it."""
        spec = super().noise_spec(batch_size, num_samples)
        if self.num_steps:
            spec["steps"] = ("normal", (self.num_steps, num_samples, batch_size, self.latent_dim), 2)
        return spec

    def _steps(self, x, noise, adjoint, check=False):
        mean, log_var = self.encode(x)
        steps = noise["steps"] if self.num_steps else mean.new_zeros(0, 1, *mean.shape)
        return refine(lambda *at: self._gaussian_bound(x, *at), mean, log_var, steps, adjoint=adjoint, check=check,
                      **self.settings)

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """The bound after the steps: [B], in nats. noise: {"z": [S, B, K], "steps": [T, S, B, K]}."""
        noise = self._noise(len(self._checked(x)), num_samples, noise, generator, x)
        found = self._steps(x, noise, self.adjoint)
        return self._gaussian_bound(x, found.mean, found.log_var, noise["z"])

    def refine(self, x, *, num_samples=1, noise=None, generator=None):
        """The steps alone, without a graph: `Refined`, with the rows of x [B, D] that diverged."""
        noise = self._noise(len(self._checked(x)), num_samples, noise, generator, x)
        return self._steps(x, noise, "none", check=True)

    def posterior(self, x, *, num_samples=1, noise=None, generator=None):
        """q after the steps, a `DiagonalNormal` without a graph; noise and generator: of the steps, as in `bound`."""
        noise = self._noise(len(self._checked(x)), num_samples, noise, generator, x)
        found = self._steps(x, noise, "none")
        return DiagonalNormal(found.mean, found.log_var)

    def importance_bound(self, x, *, num_samples=10, noise=None, generator=None):
        """As `AmortizedVAE.importance_bound`, from the refined posterior without its graph."""
        return super().importance_bound(x, num_samples=num_samples, noise=noise, generator=generator)


class IterativeInferenceVAE(AmortizedVAE):
    """Iterative amortised inference: a network that reads the bound's gradient and proposes the next posterior.

    lambda_(k+1) = lambda_k + gate (proposal - lambda_k), gate and proposal from (lambda_k, gradient, trunk(x)): one
    network for all steps (def-gp-iterative). Gradients enter as constants, on a signed logarithmic scale, so
    that no second derivative is needed. bound(x) is the average of the bounds after each step, which training
    maximises; `final_bound` is that of the last. num_steps: T; update_dims: hidden widths of the update.
    Source: Marino, Yue and Mandt 2018.
    """

    def __init__(self, *args, num_steps=4, update_dims=(200,), **options):
        self.num_steps, self._update_dims = check_count(num_steps, "num_steps"), tuple(update_dims)
        require("encoder" not in options, "encoder: this model's encoder is its update")
        super().__init__(*args, **options)

    def _plain_encoder(self):
        size = self.latent_dim
        update = mlp([4 * size + self.encoder_dims[-1], *self._update_dims, 4 * size], self.activation)
        parts = {"trunk": trunk(self.data_dim, self.encoder_dims, self.activation), "proposal": update}
        return nn.ModuleDict(parts)

    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)}: "z" for the last bound, "steps" [T, S, B, K] for the others."""
        shape = (num_samples, batch_size, self.latent_dim)
        return {"z": ("normal", shape, 1), "steps": ("normal", (self.num_steps, *shape), 2)}

    def _iterate(self, x, noise, graph):
        """All posteriors after the first, [(mean, log_var), ...], and the bounds of all but the last."""
        h, bounds, found = self.encoder["trunk"](x), [], []
        mean = log_var = h.new_zeros(len(x), self.latent_dim)
        for part in noise:
            with torch.enable_grad():
                at = tuple(v if graph and v.requires_grad else v.detach().requires_grad_() for v in (mean, log_var))
                value = self._gaussian_bound(x, *at, part)
                slope = torch.autograd.grad(value.sum(), at, retain_graph=graph)
            bounds.append(value)
            slope = torch.cat(slope, -1).detach()
            old = torch.cat(at if graph else (mean, log_var), -1)
            read = torch.cat([old, slope.sign() * slope.abs().log1p(), h], -1)
            proposal, gate = self.encoder["proposal"](read).chunk(2, -1)
            mean, log_var = (old + torch.sigmoid(gate) * (proposal - old)).chunk(2, -1)
            found.append((mean, log_var))
        return found, bounds[1:]

    def encode(self, x, *, noise=None, generator=None):
        """Mean and log-variance after the last step: two [B, K]. noise: [T, S, B, K]."""
        x = self._checked(x)
        if noise is None:
            noise = draw_normal((self.num_steps, 1, len(x), self.latent_dim), x, generator)
        return self._iterate(x, noise, graph=False)[0][-1]

    def posterior(self, x, *, noise=None, generator=None):
        """q after the last step, a `DiagonalNormal`; it depends on the steps' noise [T, S, B, K]."""
        with torch.no_grad():
            return DiagonalNormal(*self.encode(x, noise=noise, generator=generator))

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """Average of the bounds after each step: [B], in nats. noise: {"z": [S, B, K], "steps": [T, S, B, K]}."""
        noise = self._noise(len(self._checked(x)), num_samples, noise, generator, x)
        found, bounds = self._iterate(x, noise["steps"], graph=torch.is_grad_enabled())
        return torch.stack([*bounds, self._gaussian_bound(x, *found[-1], noise["z"])]).mean(0)

    def final_bound(self, x, *, num_samples=1, noise=None, generator=None):
        """The bound after the last step: [B], in nats; arguments as in `bound`."""
        noise = self._noise(len(self._checked(x)), num_samples, noise, generator, x)
        with torch.no_grad():
            found, _ = self._iterate(x, noise["steps"], graph=False)
            return self._gaussian_bound(x, *found[-1], noise["z"])


def _jacobian(decoder, mean):
    """decoder(mean) [B, D] and its Jacobian's columns [K, B, D], all from one decode of K copies of the batch.

    The product v -> J^T v that a backward pass computes is linear in v, and its derivative in v gives the columns.
    """
    graph, size = torch.is_grad_enabled(), mean.shape[-1]
    with torch.enable_grad():
        z = mean.expand(size, *mean.shape)
        z = z if z.requires_grad else z.detach().requires_grad_()
        output = decoder(z)
        v = torch.zeros_like(output, requires_grad=True)
        back, = torch.autograd.grad(output, z, v, create_graph=True)
        unit = torch.eye(size, dtype=mean.dtype, device=mean.device)[:, None].expand_as(back)
        columns, = torch.autograd.grad(back, v, unit, create_graph=graph)
    return (output[0], columns) if graph else (output[0].detach(), columns)


class VariationalLaplaceVAE(AmortizedVAE):
    """The variational Laplace autoencoder: damped Newton steps to the posterior's mode, and the curvature found there.

    With the decoder's Jacobian J at mu and the data's precision P (1 / noise_var, or p (1 - p) for pixels):
    Lambda = I + J^T P J, mu <- mu + rate_t Lambda^-1 (J^T (residual, times P for a normal) - mu), num_steps times, and
    q = N(mu, Lambda^-1) with a full covariance (eq-gp-laplace). rate_t = rate / (t + 1), or `rate` with
    decay=False: one full step is exact for a linear decoder with normal noise. The encoder gives the start alone.
    Source: Park, Kim and Kim 2019.
    """

    def __init__(self, *args, num_steps=4, rate=0.5, decay=True, **options):
        super().__init__(*args, **options)
        _check_step(num_steps, rate)
        self.num_steps, self.rate, self.decay = num_steps, rate, decay

    def _plain_encoder(self):
        return nn.Sequential(trunk(self.data_dim, self.encoder_dims, self.activation),
                             mlp([self.encoder_dims[-1], self.latent_dim], self.activation))

    def _curvature(self, x, mean):
        """Gradient [B, K] of the log-joint at the mean, and the factor of Lambda [B, K, K]."""
        output, columns = _jacobian(self.decoder, mean)
        if self.likelihood == "bernoulli":
            p = torch.sigmoid(output)
            residual, precision = x - p, p * (1 - p)
        else:
            precision = (1 / self.noise_var).to(output).expand_as(output)
            residual = precision * (x - output)
        gradient = torch.einsum("kbd,bd->bk", columns, residual) - mean
        rows = columns.permute(1, 0, 2)  # [B, K, D]
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        curvature = (rows * precision[:, None]) @ rows.mT + eye
        return gradient, torch.linalg.cholesky(curvature)

    def posterior(self, x):
        """q = N(mu, Lambda^-1) after the steps: a `FullNormal` over [B, K]."""
        mean = self.encoder(self._checked(x))
        for step in range(self.num_steps):
            gradient, factor = self._curvature(x, mean)
            rate = self.rate / (step + 1) if self.decay else self.rate
            mean = mean + rate * torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        _, factor = self._curvature(x, mean)
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        # Lambda = U U^T with U upper triangular, by a Cholesky factor in reversed order: U^-T is lower triangular.
        upper = torch.linalg.cholesky((factor @ factor.mT).flip((-2, -1))).flip((-2, -1))
        scale = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True).mT
        return FullNormal(mean, scale.tril())

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """Bound of the Laplace posterior, differentiated through the steps: [B], in nats. noise: [S, B, K]."""
        posterior = self.posterior(x)
        noise = self._noise(len(x), num_samples, noise, generator, posterior.mean)["z"]
        z = posterior.rsample(noise.shape[:1], noise=noise)
        return self.observation(z).log_prob(x).mean(0) - posterior.kl_to_standard()


class EncoderMixture:
    """A mixture of diagonal normals for each datum: loc, log_var [C, B, K], weights [C] of sum 1."""

    def __init__(self, loc, log_var, weights):
        self.loc, self.log_var, self.weights = loc, log_var, weights

    @property
    def mean(self):
        return torch.einsum("c,cbk->bk", self.weights, self.loc)

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw sample_shape + [B, K]; noise: {"choice": uniforms sample_shape + [B], "z": normals}. No gradient of the
        weights."""
        shape = (*sample_shape, *self.loc.shape[1:])
        if noise is None:
            device = self.loc.device if generator is None else generator.device
            uniform = torch.rand(shape[:-1], generator=generator, dtype=self.loc.dtype, device=device)
            noise = {"choice": uniform.to(self.loc.device), "z": draw_normal(shape, self.loc, generator)}
        which = (noise["choice"][..., None] > self.weights.cumsum(0)).sum(-1).clamp(max=len(self.weights) - 1)
        rows = torch.arange(self.loc.shape[1], device=which.device).expand_as(which)
        return self.loc[which, rows] + torch.exp(0.5 * self.log_var[which, rows]) * noise["z"]

    def log_prob(self, z):
        """Log-density in nats, [..., B, K] -> [..., B]."""
        squares = (z[..., None, :, :] - self.loc).square() * torch.exp(-self.log_var)
        parts = -0.5 * (squares + self.log_var + LOG_2PI).sum(-1)
        return torch.logsumexp(parts + self.weights.log()[:, None], -2)


class RecursiveMixtureVAE(AmortizedVAE):
    """A posterior that is a mixture of encoders, grown one by one: Q_c = (1 - a_c) Q_(c-1) + a_c q_c.

    bound(x) is the bound of the mixture, with draws of every component in their proportions, all encoders trained
    together; `mixture_gain` is the derivative along which a new component is worth adding. One pass of
    every encoder at test time. num_components: C; share: a_c of each new component (default 1 / c: equal weights).
    Source: the model of Kim and Pavlovic 2020, after its abstract; their training, component by component, is not this.
    """

    def __init__(self, *args, num_components=2, share=None, **options):
        require("encoder" not in options, "encoder: this model has num_components of its own")
        self._num_components = check_count(num_components, "num_components")
        require(share is None or 0 < share < 1, f"share must lie in (0, 1), got {share!r}")
        super().__init__(*args, **options)
        weights = torch.ones(1)
        for c in range(2, num_components + 1):
            a = 1 / c if share is None else share
            weights = torch.cat([(1 - a) * weights, torch.tensor([a])])
        self.register_buffer("weights", weights)

    def _plain_encoder(self):
        return nn.ModuleList([AmortizedVAE._plain_encoder(self) for _ in range(self._num_components)])

    def posterior(self, x):
        """The mixture of all encoders' normals: `EncoderMixture`."""
        x = self._checked(x)
        loc, log_var = torch.stack([encoder(x) for encoder in self.encoder]).chunk(2, -1)
        return EncoderMixture(loc, log_var, self.weights)

    def noise_spec(self, batch_size, num_samples=1):
        """{"z": normals [S, B, C K]}: num_samples draws of each component."""
        return {"z": ("normal", (num_samples, batch_size, self._num_components * self.latent_dim), 1)}

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """sum_c weight_c E_(q_c) [log p(x, z) - log Q(z | x)]: [B], in nats. noise: [S, B, C K]."""
        q = self.posterior(x)
        noise = self._noise(len(x), num_samples, noise, generator, q.loc)["z"]
        parts = noise.unflatten(-1, (self._num_components, self.latent_dim)).movedim(-2, 1)  # [S, C, B, K]
        z = q.loc + torch.exp(0.5 * q.log_var) * parts
        log_w = self.log_joint(x, z) - q.log_prob(z)  # [S, C, B]
        return torch.einsum("c,scb->sb", self.weights, log_w).mean(0)


def mixture_gain(log_joint, mixture, new, *, num_samples=256, noise=None, generator=None):
    """Rise of the bound per share of a new component at share 0: [B], in nats.

    E_new [log p(x, z) - log Q(z)] - bound(Q) = bound(new) + KL(new || Q) - bound(Q): a component is worth adding where
    its own bound is good and it differs from the mixture Q. log_joint: maps z [S, B, K] to [S, B]; mixture, new:
    distributions over [B, K]; num_samples: draws of each; noise: {"mixture": ..., "new": ...} for their rsample.
    """
    noise = noise or {"mixture": None, "new": None}
    draws = {name: q.rsample((num_samples,), noise=noise[name], generator=generator)
             for name, q in (("mixture", mixture), ("new", new))}
    value = {name: (log_joint(z) - mixture.log_prob(z)).mean(0) for name, z in draws.items()}
    return value["new"] - value["mixture"]


class RotatedNormal:
    """A diagonal normal turned by Householder reflections: z = H_T ... H_1 z_0; loc, log_var [B, K], v [B, T, K]."""

    def __init__(self, loc, log_var, v):
        self.start, self.v = DiagonalNormal(loc, log_var), v

    def _turn(self, z, order):
        for t in order:
            v = self.v[:, t]
            z = z - 2 * v * ((z * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True))
        return z

    @property
    def mean(self):
        return self._turn(self.start.loc, range(self.v.shape[1]))

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw sample_shape + [B, K]; noise: standard normal, of that shape."""
        z = self.start.rsample(sample_shape, noise=noise, generator=generator)
        return self._turn(z, range(self.v.shape[1]))

    def log_prob(self, z):
        """Log-density in nats: reflections are their own inverses and keep volumes."""
        return self.start.log_prob(self._turn(z, reversed(range(self.v.shape[1]))))

    def kl_to_standard(self):
        """KL to N(0, I), which no rotation changes: [B]."""
        return self.start.kl_to_standard()


class HouseholderVAE(AmortizedVAE):
    """A posterior whose normal is turned by reflections that the encoder chooses: the Householder flow.

    num_reflections: T; log-determinant 0, so the density is that of the start. It can reach
    any full covariance with enough reflections, and stays a normal. Source: Tomczak and Welling 2016.
    """

    def __init__(self, *args, num_reflections=4, **options):
        require("encoder" not in options, "encoder: this model has its own, which gives the reflections too")
        self.num_reflections = check_count(num_reflections, "num_reflections")
        super().__init__(*args, **options)

    def _plain_encoder(self):
        size = (2 + self.num_reflections) * self.latent_dim
        head = mlp([self.encoder_dims[-1], size], self.activation)
        with torch.no_grad():
            head[-1].bias[2 * self.latent_dim:].normal_()  # no direction is defined at 0: start away from it
        return nn.Sequential(trunk(self.data_dim, self.encoder_dims, self.activation), head)

    def posterior(self, x):
        """The turned normal of each datum: `RotatedNormal`."""
        loc, log_var, v = self.encoder(self._checked(x)).split(
            [self.latent_dim, self.latent_dim, self.num_reflections * self.latent_dim], -1)
        v = v.unflatten(-1, (self.num_reflections, self.latent_dim))
        return RotatedNormal(loc, log_var, v)

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """Bound with the closed divergence, which no rotation changes: [B], in nats. noise: [S, B, K]."""
        q = self.posterior(x)
        noise = self._noise(len(x), num_samples, noise, generator, q.start.loc)["z"]
        z = q.rsample(noise.shape[:1], noise=noise)
        return self.observation(z).log_prob(x).mean(0) - q.kl_to_standard()
