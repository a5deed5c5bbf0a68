"""Chapter 4's baselines whose inference goes on after the encoder's pass."""

from typing import NamedTuple

import torch
from torch import nn

from dlgm_tutorial._gaussian_vae import (
    AmortizedVAE,
    check_count,
    check_positive,
    draw_normal,
    held,
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

    bound(x) is the bound after num_steps steps, and its gradient goes through them (eq-gp-adjoint);
    `separate_objective` trains encoder and decoder without the adjoint. num_steps: T (0 is the plain autoencoder);
    step_size, momentum, precondition, clip_norm, adjoint: of `refine`; start: "encoder", or "prior" for steps from
    N(0, I) and no encoder at all; other arguments: of `AmortizedVAE`.
    Source: Kim, Wiseman, Miller, Sontag and Rush 2018.
    """

    def __init__(self, *args, num_steps=4, step_size=0.02, momentum=0.0, precondition=False, clip_norm=None,
                 adjoint="full", start="encoder", **options):
        require(start in ("encoder", "prior"), f"start must be 'encoder' or 'prior', got {start!r}")
        require(start == "encoder" or "encoder" not in options, "encoder: start='prior' has none")
        self.start = start
        super().__init__(*args, **options)
        _check_step(num_steps, step_size)
        require(isinstance(momentum, (int, float)) and 0 <= momentum < 1,
                f"momentum must lie in [0, 1), got {momentum!r}")
        require(adjoint in ("full", "first_order"), f"adjoint must be 'full' or 'first_order', got {adjoint!r}")
        self.num_steps, self.adjoint = num_steps, adjoint
        self.settings = {"step_size": step_size, "momentum": momentum, "precondition": precondition,
                         "clip_norm": clip_norm if clip_norm is None else check_positive(clip_norm, "clip_norm")}

    def _plain_encoder(self):
        return super()._plain_encoder() if self.start == "encoder" else nn.Identity()

    def encode(self, x):
        """Mean and log-variance from which the steps start: two [B, K]."""
        if self.start == "encoder":
            return super().encode(x)
        return tuple(x.new_zeros(2, len(self._checked(x)), self.latent_dim))

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

    def separate_objective(self, x, *, teach="bound", num_samples=1, noise=None, generator=None):
        """What training without the adjoint climbs: [B], in nats (eq-gp-separate). noise: as in `bound`.

        The decoder climbs the bound of the refined posterior q_T, taken as it is. The encoder climbs, with the decoder
        held, its own bound (teach="bound") or minus KL(q_0 || q_T), what it lacks of the refined posterior ("refined").
        """
        require(teach in ("bound", "refined"), f"teach must be 'bound' or 'refined', got {teach!r}")
        require(self.start == "encoder", "start='prior' has no encoder to teach")
        noise = self._noise(len(self._checked(x)), num_samples, noise, generator, x)
        mean, log_var = self.encode(x)
        found = self._steps(x, noise, "none")
        if teach == "bound":
            own = held(lambda *at: self._gaussian_bound(x, *at, noise["z"]), mean, log_var)
        else:
            ratio = log_var - found.log_var
            squares = (mean - found.mean).square() * torch.exp(-found.log_var)
            own = -0.5 * (torch.expm1(ratio) - ratio + squares).sum(-1)
        return own + self._gaussian_bound(x, found.mean, found.log_var, noise["z"])

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
