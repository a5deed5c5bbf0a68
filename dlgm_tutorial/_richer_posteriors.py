"""Chapter 4's baselines whose posterior is richer than one diagonal normal: a mixture, reflections, a flow."""

import torch
from torch import nn

from dlgm_tutorial._gaussian_vae import LOG_2PI, AmortizedVAE, check_count, draw_normal, held, require, trunk
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.networks import mlp


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
        parts = _normal_log_prob(z[..., None, :, :], self.loc, self.log_var)
        return torch.logsumexp(parts + self.weights.log()[:, None], -2)


def _normal_log_prob(z, loc, log_var):
    """Log-density of diagonal normals, summed over latents: [..., K] -> [...]."""
    return -0.5 * ((z - loc).square() * torch.exp(-log_var) + log_var + LOG_2PI).sum(-1)


class RecursiveMixtureVAE(AmortizedVAE):
    """A posterior that is a mixture of encoders, grown one by one: Q_c = (1 - a_c) Q_(c-1) + a_c q_c.

    bound(x) is the bound of the mixture, with draws of every component in their proportions. Maximising it trains all
    encoders together; `stagewise_objective` trains each against the mixture of those before it, and `fit_shares`
    then finds the shares. One pass of every encoder at test time.
    num_components: C; share: a_c of each new component (default 1 / c: equal weights).
    Source: the model of Kim and Pavlovic 2020, after its abstract; the objective of a stage is derived on page 4.6.
    """

    def __init__(self, *args, num_components=2, share=None, **options):
        require("encoder" not in options, "encoder: this model has num_components of its own")
        self._num_components = check_count(num_components, "num_components")
        require(share is None or 0 < share < 1, f"share must lie in (0, 1), got {share!r}")
        super().__init__(*args, **options)
        self.register_buffer("weights", torch.ones(num_components))
        self.set_shares([1 / c if share is None else share for c in range(2, num_components + 1)])

    def _plain_encoder(self):
        return nn.ModuleList([AmortizedVAE._plain_encoder(self) for _ in range(self._num_components)])

    @torch.no_grad()
    def set_shares(self, shares):
        """Set the weights from the shares of components 2 to C: each new one takes its share from all before it."""
        require(len(shares) == self._num_components - 1 and all(0 <= a < 1 for a in shares),
                f"shares must be {self._num_components - 1} numbers in [0, 1), got {list(shares)!r}")
        self.weights[0] = 1
        for c, a in enumerate(shares, start=1):
            self.weights[:c] *= 1 - a
            self.weights[c] = a

    def posterior(self, x):
        """The mixture of all encoders' normals: `EncoderMixture`."""
        x = self._checked(x)
        loc, log_var = torch.stack([encoder(x) for encoder in self.encoder]).chunk(2, -1)
        return EncoderMixture(loc, log_var, self.weights)

    def noise_spec(self, batch_size, num_samples=1):
        """{"z": normals [S, B, C K]}: num_samples draws of each component."""
        return {"z": ("normal", (num_samples, batch_size, self._num_components * self.latent_dim), 1)}

    def _draws(self, x, num_samples, noise, generator):
        """The mixture, and draws of each component, [S, C, B, K]."""
        q = self.posterior(x)
        noise = self._noise(len(x), num_samples, noise, generator, q.loc)["z"]
        parts = noise.unflatten(-1, (self._num_components, self.latent_dim)).movedim(-2, 1)
        return q, q.loc + torch.exp(0.5 * q.log_var) * parts

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """sum_c weight_c E_(q_c) [log p(x, z) - log Q(z | x)]: [B], in nats. noise: [S, B, C K]."""
        q, z = self._draws(x, num_samples, noise, generator)
        log_w = self.log_joint(x, z) - q.log_prob(z)  # [S, C, B]
        return torch.einsum("c,scb->sb", self.weights, log_w).mean(0)

    def stagewise_objective(self, x, *, num_samples=1, noise=None, generator=None):
        """What one step of training stage by stage climbs: [B], in nats (eq-gp-stage). noise: [S, B, C K].

        sum_c E_(q_c) [log p(x, z) - log Q_c(z)] + bound(x), where Q_c is the mixture of the first c components: encoder
        c climbs its own term, with the encoders before it and the decoder held, and the decoder climbs the bound.
        """
        q, z = self._draws(x, num_samples, noise, generator)
        value = held(lambda z: self.log_joint(x, z), z).sum(1)  # [S, B]
        for c in range(self._num_components):
            before = slice(0, c)
            loc = torch.cat([q.loc[before].detach(), q.loc[c:c + 1]])
            log_var = torch.cat([q.log_var[before].detach(), q.log_var[c:c + 1]])
            stage = EncoderMixture(loc, log_var, self.weights[:c + 1] / self.weights[:c + 1].sum())
            value = value - stage.log_prob(z[:, c])
        z, all_held = z.detach(), EncoderMixture(q.loc.detach(), q.log_var.detach(), q.weights)
        log_w = self.log_joint(x, z) - all_held.log_prob(z)
        return (value + torch.einsum("c,scb->sb", self.weights, log_w)).mean(0)

    @torch.no_grad()
    def fit_shares(self, x, *, num_samples=16, noise=None, generator=None):
        """Set each component's share, in order, to the best on rows x [B, D]; return the shares [C - 1].

        The bound of (1 - a) Q + a q_c is concave in a: each share is the best of 0, 0.01, ..., 0.99, on the same draws.
        noise: [S, B, C K].
        """
        q, z = self._draws(x, num_samples, noise, generator)
        log_joint, shares = self.log_joint(x, z), []
        log_q = torch.stack([_normal_log_prob(z, q.loc[c], q.log_var[c]) for c in range(self._num_components)])
        weights = log_joint.new_ones(1)
        for c in range(1, self._num_components):
            mixture = torch.logsumexp(log_q[:c, :, :c + 1] + weights.log()[:, None, None, None], 0)  # [S, c + 1, B]
            a = torch.arange(0, 1, 0.01, dtype=z.dtype, device=z.device)[:, None, None, None]
            log_mixed = torch.logaddexp((1 - a).log() + mixture, a.log() + log_q[c, :, :c + 1])
            each = (log_joint[:, :c + 1] - log_mixed).mean((1, 3))  # [100, c + 1]
            a = a[:, 0, 0]
            value = (torch.cat([(1 - a) * weights, a], -1) * each).sum(-1)
            share = float(a[value.argmax(), 0])
            weights = torch.cat([(1 - share) * weights, weights.new_tensor([share])])
            shares.append(share)
        self.set_shares(shares)
        return shares


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


def autoregressive_masks(latent_dim, hidden_dim):
    """Masks of a network whose output j sees inputs before j alone: ([H, K], [K, H]) of zeros and ones (eq-gp-masks).

    Hidden unit h has degree h mod K. It sees inputs below its degree (counted from 0), and output j sees the units of
    degrees up to j: a path leads from input i to output j if and only if i < j. latent_dim: K; hidden_dim: H >= K.

    >>> [mask.tolist() for mask in autoregressive_masks(2, 2)]
    [[[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]]
    """
    check_count(latent_dim, "latent_dim")
    check_count(hidden_dim, "hidden_dim", latent_dim)
    degree, index = torch.arange(hidden_dim) % latent_dim, torch.arange(latent_dim)
    return (index < degree[:, None]).float(), (degree <= index[:, None]).float()


class AutoregressiveStep(nn.Module):
    """One step of an inverse autoregressive flow, z' = s z + (1 - s) m (eq-gp-iaf), s in (0, 1).

    m and the logits of s, [..., K] each, come from z and a context [B, H] through one masked hidden layer of hidden_dim
    units: output j sees the latents before j alone, so the Jacobian is triangular with s on its diagonal.
    """

    def __init__(self, latent_dim, context_dim, hidden_dim):
        super().__init__()
        first, second = autoregressive_masks(latent_dim, hidden_dim)
        self.context = nn.Linear(context_dim, hidden_dim)
        self.enter = nn.Parameter(torch.randn(hidden_dim, latent_dim) / latent_dim**0.5)
        self.leave = nn.Parameter(0.1 * torch.randn(2 * latent_dim, hidden_dim) / hidden_dim**0.5)
        # Starts near the identity: s close to one.
        self.bias = nn.Parameter(torch.cat([torch.zeros(latent_dim), torch.full((latent_dim,), 2.0)]))
        self.register_buffer("first", first)
        self.register_buffer("second", second.repeat(2, 1))

    def shift_and_scale(self, z, context):
        """m and log s at z [..., B, K] and context [B, H]: two [..., B, K]."""
        h = torch.relu(z @ (self.first * self.enter).mT + self.context(context))
        shift, logit = (h @ (self.second * self.leave).mT + self.bias).chunk(2, -1)
        return shift, nn.functional.logsigmoid(logit)

    def forward(self, z, context):
        """z' [..., B, K], and the logarithm of the Jacobian's determinant [..., B]."""
        shift, log_scale = self.shift_and_scale(z, context)
        scale = log_scale.exp()
        return scale * z + (1 - scale) * shift, log_scale.sum(-1)

    def inverse(self, z, context):
        """z [..., B, K] from z', latent after latent, and the logarithm of the forward determinant [..., B]."""
        z = z.expand(torch.broadcast_shapes(z.shape, (*context.shape[:-1], z.shape[-1])))
        found = torch.zeros_like(z)
        for j in range(z.shape[-1]):  # what latent j needs is known after j passes
            shift, log_scale = self.shift_and_scale(found, context)
            scale = log_scale[..., j].exp()
            value = (z[..., j] - (1 - scale) * shift[..., j]) / scale
            found = torch.cat([found[..., :j], value[..., None], found[..., j + 1:]], -1)
        return found, self.shift_and_scale(found, context)[1].sum(-1)


class FlowNormal:
    """A diagonal normal sent through autoregressive steps, the order of the latents reversed between them.

    loc, log_var [B, K]: of the start; context [B, H]: what the steps read; steps: the `AutoregressiveStep`s.
    """

    def __init__(self, loc, log_var, context, steps):
        self.start, self.context, self.steps = DiagonalNormal(loc, log_var), context, steps

    def transform(self, z):
        """Send z [..., B, K] through the steps: (z' [..., B, K], log-determinant [..., B])."""
        total = 0.0
        for number, step in enumerate(self.steps):
            z = z.flip(-1) if number else z
            z, log_det = step(z, self.context)
            total = total + log_det
        return z, total

    @property
    def mean(self):
        """Where the start's mean ends, [B, K]: not the mean of the flow's draws, which has no closed form."""
        return self.transform(self.start.loc)[0]

    def rsample_with_log_prob(self, sample_shape=(), *, noise=None, generator=None):
        """Draws sample_shape + [B, K], and their log-densities from the same pass; noise: of the draws' shape."""
        z = self.start.rsample(sample_shape, noise=noise, generator=generator)
        drawn, log_det = self.transform(z)
        return drawn, self.start.log_prob(z) - log_det

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw sample_shape + [B, K]; noise: standard normal, of that shape."""
        return self.rsample_with_log_prob(sample_shape, noise=noise, generator=generator)[0]

    def log_prob(self, z):
        """Log-density in nats of any z [..., B, K]: [..., B], by the inverse, K passes of each step."""
        total = 0.0
        for number, step in reversed(list(enumerate(self.steps))):
            z, log_det = step.inverse(z, self.context)
            total = total + log_det
            z = z.flip(-1) if number else z
        return self.start.log_prob(z) - total


class AutoregressiveFlowVAE(AmortizedVAE):
    """A posterior bent by inverse autoregressive steps: no longer a normal, drawn in one pass (eq-gp-iaf).

    num_flows: T steps, flow_dim: hidden units of each (at least K). A draw and its density cost T passes; the density
    of any other z costs T K. Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016.
    """

    def __init__(self, *args, num_flows=2, flow_dim=64, **options):
        require("encoder" not in options, "encoder: this model has its own, which gives the flow's context too")
        super().__init__(*args, **options)
        check_count(num_flows, "num_flows")
        self.flows = nn.ModuleList(AutoregressiveStep(self.latent_dim, self.encoder_dims[-1], flow_dim)
                                   for _ in range(num_flows))

    def posterior(self, x):
        """The flow's distribution for each datum: `FlowNormal`."""
        body, head = self.encoder
        h = body(self._checked(x))
        return FlowNormal(*head(h).chunk(2, -1), h, self.flows)

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """E_q [log p(x, z) - log q(z | x)] by draws and their own densities: [B], in nats. noise: [S, B, K]."""
        q = self.posterior(x)
        noise = self._noise(len(x), num_samples, noise, generator, q.start.loc)["z"]
        z, log_prob = q.rsample_with_log_prob(noise.shape[:1], noise=noise)
        return (self.log_joint(x, z) - log_prob).mean(0)
