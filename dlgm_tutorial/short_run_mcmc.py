"""Chapter 6: short-run MCMC inference for generators with several layers of latents (Nijkamp, Pang, Han et al., 2020).

No inference network: for each datum draw a start from the prior, take a small fixed number of Langevin steps

    z' = z + s^2/2 grad log p(x, z) + s noise,

and use the end point both as an approximate posterior sample and to move the generator's weights. The law of the end
point has one parameter, the step size s. Here are the sampler (`short_run`), the models around it (`ShortRunModel`;
`LayeredVAE` for comparison), and the laws and bounds by which s is judged and chosen (`law_of_endpoint`,
`propagate_on_grid`, `jacobian_bound`, `semi_implicit_bounds`, `tune_step_size`).

Latents are the noises of a `MultiLayerGenerator`, standard normal a priori in every layer; index 0 of every tuple is
layer 1, nearest the data, and samplers see the layers side by side, [..., K]. Densities are per example, in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from dlgm_tutorial import evaluation
from dlgm_tutorial._endpoint import (
    EndpointLaw,
    GridLaw,
    JacobianBound,
    SemiImplicitBounds,
    StepSize,
    _chain_noise,
    as_step_size,
    check_step_size,
    check_steps,
    jacobian_bound,
    largest_curvature,
    law_of_endpoint,
    propagate_on_grid,
    semi_implicit_bounds,
    tune_step_size,
)
from dlgm_tutorial._top_down import MultiLayerGenerator, choice
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.mcmc import hmc_step, init, mala_step
from dlgm_tutorial.networks import mlp

__all__ = ["BottomUpEncoder", "ChainInfo", "ChainState", "EndpointLaw", "GridLaw", "Inpainting", "JacobianBound",
           "LayeredVAE", "MultiLayerGenerator", "SemiImplicitBounds", "ShortRunModel", "ShortRunPosterior", "StepSize",
           "inpaint", "jacobian_bound", "largest_curvature", "law_of_endpoint", "propagate_on_grid",
           "semi_implicit_bounds", "short_run", "short_run_loss", "short_run_step", "tune_step_size"]

STARTS = ("prior", "persistent", "encoder")
KERNELS = ("langevin", "mala", "hmc")
LIMIT = 1e4  # no posterior over standard normal noises reaches there


# ---------------------------------------------------------------- the sampler
class ChainState(NamedTuple):
    """Where the chains are, z [..., K], and after how many steps."""

    z: torch.Tensor
    step: int


class ChainInfo(NamedTuple):
    """What a step met: the norm of the score at its start [...], and how far out it ended, max |z_i| [...]."""

    score_norm: torch.Tensor
    reach: torch.Tensor


def short_run_step(state, noise, *, score, step_size):
    """Take one Langevin step of all chains: z' = z + s^2/2 score(z) + s noise -> (ChainState, ChainInfo).

    state: z [..., K] and the count of steps; noise: standard normal [..., K], or None for a step without noise; score:
    maps [..., K] to the gradient of log p(x, z) there; step_size: s, a number or [K] (one for each latent: a
    preconditioned step with the same target). Pure: nothing is changed in place, no randomness inside. One evaluation
    of the score, where `mcmc.langevin_step`, which carries gradients along, pays one more a chain.
    """
    s = as_step_size(step_size, state.z)
    gradient = score(state.z)
    z = state.z + 0.5 * s.square() * gradient
    if noise is not None:
        z = z + s * noise
    return ChainState(z, state.step + 1), ChainInfo(gradient.norm(dim=-1), z.abs().amax(-1))


def short_run(score, z0, step_size, num_steps, *, stochastic=True, noise=None, generator=None, limit=LIMIT):
    """Run num_steps Langevin steps from z0, all chains at once, and return where they end: z_T [..., K].

    score: maps [..., K] to [..., K], the gradient of log p(x, z) in z; z0 [..., K], usually draws from the prior;
    step_size: s, a number or [K]; noise [T, ..., K]: the injected standard normals, drawn from generator where absent;
    stochastic: False leaves them out (the paper's first version). z0 is not changed, and no graph is kept unless score
    keeps one (eq-sr-langevin). Source: paper, section 3; convention of the released program, drift s^2/2 and noise s.
    Raises ValueError for num_steps < 1, a step size that is not positive and finite, or shapes that do not fit;
    FloatingPointError, with the step at which it happened, where a chain is no longer finite or leaves the box
    |z_i| <= limit.

    >>> short_run(lambda z: -z, torch.ones(3, 2), 0.5, 20, stochastic=False)[0, 0] < 0.1
    tensor(True)
    """
    check_steps(num_steps)
    check_step_size(step_size)
    s = as_step_size(step_size, z0)
    noise = _chain_noise(z0, num_steps, True, noise, generator) if stochastic else [None] * num_steps
    half = 0.5 * s.square()
    z, norms, reaches = z0, [], []
    for k in range(num_steps):
        gradient = score(z)
        if k == 0 and gradient.shape != z.shape:
            raise ValueError(f"score must map z {list(z.shape)} to the same shape, got {list(gradient.shape)}")
        z = z + half * gradient
        if noise[k] is not None:
            z = z + s * noise[k]
        norms.append(gradient.detach().abs().amax())
        reaches.append(z.detach().abs().amax())
    if not bool(reaches[-1] <= limit) or not bool(torch.stack(reaches).amax() <= limit):
        _report(torch.stack(norms), torch.stack(reaches), z, s, limit)
    return z


def _report(norms, reaches, z, s, limit):
    """Raise the error that names the first bad step (amax hands a NaN on)."""
    step = int((~(reaches <= limit)).nonzero()[0])
    lost = int((~(z.detach().abs().amax(-1) <= limit)).sum())
    size = f"{float(s.max()):g}"
    if not bool(norms[step].isfinite()):
        raise FloatingPointError(f"score: the gradient is not finite at step {step + 1} of {len(reaches)}, from points "
                                 f"that were: check the decoder's weights and the data (step_size {size})")
    raise FloatingPointError(f"step_size {size} blows up at step {step + 1} of {len(reaches)}: |z| reaches "
                             f"{float(reaches[step]):.3g}, beyond {limit:g}, and {lost} of {z[..., 0].numel()} chains "
                             "end there; Langevin steps are stable below 2 / sqrt(largest curvature)")


# ---------------------------------------------------------------- encoders
class BottomUpEncoder(nn.Module):
    """q(e | x) = product over layers of N(e_l; loc_l(d_l), exp(log_var_l(d_l))), d_l = net_l(d_{l-1}), d_0 = x.

    A deterministic path climbs from the data, and each layer's noise is read from its own height. For one layer it is
    the encoder of a plain VAE. data_dim: D; latent_dims (K_1, ..., K_L); hidden_dims: widths of the path below each
    layer, ((200, 200), (100,)), or one integer for all; activation: of `networks`. Forward: x [B, D] ->
    DiagonalNormal over [B, K], layers side by side.
    """

    def __init__(self, data_dim, latent_dims, hidden_dims=200, activation="leaky_relu"):
        super().__init__()
        hidden = (hidden_dims,) * len(latent_dims) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        hidden = [(h,) if isinstance(h, int) else tuple(h) for h in hidden]
        if len(hidden) != len(latent_dims) or any(not h for h in hidden):
            raise ValueError(f"hidden_dims must have one entry per layer: {len(latent_dims)} latent_dims, "
                             f"got {hidden_dims}")
        below = [data_dim, *(h[-1] for h in hidden)]
        act = mlp([1, 1, 1], activation)[1]
        self.path = nn.ModuleList([nn.Sequential(mlp([size, *h], activation), type(act)())
                                   for size, h in zip(below[:-1], hidden, strict=True)])
        self.heads = nn.ModuleList([nn.Linear(h[-1], 2 * k) for h, k in zip(hidden, latent_dims, strict=True)])

    def forward(self, x):
        parts = []
        for net, head in zip(self.path, self.heads, strict=True):
            x = net(x)
            parts.append(head(x).chunk(2, -1))
        loc, log_var = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return DiagonalNormal(loc, 10 * torch.tanh(log_var / 10))


# ---------------------------------------------------------------- models around a generator
class _AroundGenerator(nn.Module):
    """What a model has from its generator alone."""

    def __init__(self, generator, decoder, noise_var, latent_dims, freeze_decoder):
        super().__init__()
        if (generator is None) == (decoder is None):
            raise ValueError("give either a generator or a decoder with its noise_var, not both and not neither")
        if decoder is not None:
            generator = MultiLayerGenerator(decoder=decoder, noise_var=noise_var, latent_dims=latent_dims,
                                            freeze_decoder=freeze_decoder)
        self.generator = generator
        self.data_dim, self.latent_dims = generator.data_dim, generator.latent_dims
        self.num_layers, self.num_latents = generator.num_layers, generator.num_latents

    @property
    def noise_var(self):
        """Variance of the likelihood, a number."""
        return self.generator.noise_var

    def split(self, z):
        """Flat latents [..., K] as a tuple, layer 1 first; a tuple stays one."""
        return self.generator.split(z)

    def concat(self, z):
        """A tuple of layers as one flat array [..., K]; a flat array stays one."""
        return self.generator.concat(z)

    def log_joint(self, x, z, *, coordinates="noise", observed=None):
        """log p(x, z) [S, B] in nats, as in `MultiLayerGenerator.log_joint`."""
        return self.generator.log_joint(x, z, coordinates=coordinates, observed=observed)

    def generative_parameters(self):
        """Parameters of the generator (the rest is an encoder's)."""
        return list(self.generator.parameters())

    def _layered(self, z):
        return z if self.num_layers == 1 else self.split(z)

    def sample_latents(self, num, *, generator=None):
        """Draws of the noises from the prior: a tuple of [num, K_l], for one layer the array itself."""
        return self._layered(self.generator.sample_latents(num, generator=generator))

    def sample(self, num, *, generator=None):
        """Data drawn from the model: [num, D]."""
        return self.generator.sample(num, generator=generator)

    def _frozen_elbo(self, x, z, kl):
        """ELBO whose gradient reaches the encoder alone: the generator's weights enter as constants."""
        weights = {name: p.detach() for name, p in self.generator.named_parameters()}
        mean = functional_call(self.generator, weights, (z,))
        return self.generator.log_likelihood_given(x, mean).mean(0) - kl


class ShortRunPosterior:
    """The law of the end point of short chains, which can be drawn from and has no density: made by `posterior`."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Run chains and return their end points: sample_shape + [B, K], a tuple of layers where there are several.

        noise: a dict as `noise_spec` says, for sample_shape (S,). No gradient passes through the chain.
        """
        shape = tuple(sample_shape)
        num = math.prod(shape)
        z = self.model.infer(self.x, num_samples=num, noise=noise, generator=generator)
        return self.model._layered(z.reshape(*shape, *z.shape[1:]))

    sample = rsample


class ShortRunModel(_AroundGenerator):
    """A generator whose latents are inferred by a short run of MCMC, at training and at test alike.

    generator: a `MultiLayerGenerator`, or decoder (a module [..., K] -> [..., D]) with noise_var, latent_dims and
    freeze_decoder as there. num_steps: T; step_size: s, a number, a tuple of one for each layer (layer 1 first), or
    [K]; stochastic: False leaves the injected noise out. kernel: "langevin", "mala" (each step accepted or rejected,
    eq-sr-mala)
    or "hmc" (num_leapfrog steps of size s a proposal). start: "prior" (fresh noise, the paper's), "persistent"
    (each training example's chain goes on from where it ended when last visited; num_data of them, kept in the model's
    state; new data start at the prior), or "encoder" (a network's draw, trained by the ELBO beside; encoder:
    a module x [B, D] -> DiagonalNormal over [B, K], default a `BottomUpEncoder` of width 200).
    Train it by `training.fit(model, x, loss=short_run_loss, ...)`, persistent chains with data (x, torch.arange(N)).
    There is no `bound`: the law of the end point has no tractable density (see `jacobian_bound`).

    >>> model = ShortRunModel(MultiLayerGenerator(6, (3, 2), 8, noise_var=0.1), num_steps=5)
    >>> [part.shape for part in model.posterior(torch.zeros(4, 6)).rsample((7,))]
    [torch.Size([7, 4, 3]), torch.Size([7, 4, 2])]
    """

    def __init__(self, generator=None, *, decoder=None, noise_var=None, latent_dims=None, freeze_decoder=False,
                 num_steps=20, step_size=0.1, stochastic=True, kernel="langevin", num_leapfrog=5, start="prior",
                 num_data=None, encoder=None):
        super().__init__(generator, decoder, noise_var, latent_dims, freeze_decoder)
        check_steps(num_steps)
        self.num_steps, self.stochastic, self.num_leapfrog = num_steps, stochastic, num_leapfrog
        self.kernel, self.start = choice("kernel", kernel, KERNELS), choice("start", start, STARTS)
        if kernel != "langevin" and not stochastic:
            raise ValueError(f"stochastic=False belongs to kernel 'langevin', got {kernel!r}")
        self.register_buffer("step_size", torch.zeros(self.num_latents, dtype=torch.float64))
        self.set_step_size(step_size)
        if (start == "persistent") != (num_data is not None):
            raise ValueError("num_data, the number of training examples, belongs to start='persistent', "
                             f"got start={start!r} with num_data={num_data!r}")
        if start == "persistent":
            self.register_buffer("chains", self.generator.sample_latents(num_data))
        if encoder is not None and start != "encoder":
            raise ValueError(f"encoder belongs to start='encoder', got start={start!r}")
        if start == "encoder":
            self.encoder = BottomUpEncoder(self.data_dim, self.latent_dims) if encoder is None else encoder

    def set_step_size(self, step_size):
        """Set s: a number, one for each layer (layer 1 first), or [K]."""
        s = torch.as_tensor(step_size, dtype=torch.float64)
        check_step_size(s)
        if s.ndim == 1 and len(s) == self.num_layers and self.num_layers != self.num_latents:
            s = torch.cat([one.expand(k) for one, k in zip(s, self.latent_dims, strict=True)])
        if s.shape not in ((), (self.num_latents,)):
            raise ValueError(f"step_size must be a number, {self.num_layers} of them (one a layer) or "
                             f"{self.num_latents} (one a latent), got shape {list(s.shape)}")
        with torch.no_grad():
            self.step_size.copy_(s.expand(self.num_latents))

    def tune(self, x, **options):
        """Choose the step size by `tune_step_size` on x [B, D] with these options, set it, and return the StepSize."""
        found = tune_step_size(self, x, **{"num_steps": self.num_steps, "stochastic": self.stochastic, **options})
        self.set_step_size(found.step_size)
        return found

    # ---- inference
    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)} of what a run of the chains takes."""
        shape = (num_samples, batch_size, self.num_latents)
        spec = {"start": ("normal", shape, 1)}
        if self.stochastic:
            spec["chain"] = ("normal", (self.num_steps, *shape), 2)
        if self.kernel != "langevin":
            spec["accept"] = ("uniform", (self.num_steps, *shape[:-1]), 2)
        return spec

    def _noise(self, x, num_samples, noise, generator):
        spec = self.noise_spec(len(x), num_samples)
        if noise is None:
            device = x.device if generator is None else generator.device
            make = {"normal": torch.randn, "uniform": torch.rand}
            return {name: make[kind](shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
                    for name, (kind, shape, _) in spec.items()}
        noise = noise if isinstance(noise, dict) else {"start": noise}
        for name, (_, shape, _) in spec.items():
            if name not in noise or tuple(noise[name].shape) != shape:
                raise ValueError(f"noise must hold {name!r} of shape {shape}, got "
                                 f"{ {k: tuple(v.shape) for k, v in noise.items()} }")
        return noise

    def _start(self, x, noise, rows=None):
        """Where the chains start: [S, B, K]."""
        if self.start == "encoder":
            return self.encoder(x).rsample(noise.shape[:1], noise=noise).detach()
        if self.start == "persistent" and rows is not None:
            return self.chains[rows].expand_as(noise)
        return noise

    def run(self, x, z0, noise, *, observed=None):
        """Run the chains of x [B, D] from z0 [S, B, K] with noise as `noise_spec` says: the end points [S, B, K].

        observed: bool [B, D], the entries of x that count (default all).
        """
        if self.kernel == "langevin":
            return short_run(lambda z: self.generator.score(x, z, observed=observed), z0, self.step_size,
                             self.num_steps, stochastic=self.stochastic, noise=noise.get("chain"))
        log_density = lambda z: self.log_joint(x, z, observed=observed)
        step = mala_step if self.kernel == "mala" else hmc_step
        more = {"num_leapfrog": self.num_leapfrog} if self.kernel == "hmc" else {}
        state = init(log_density, z0)
        for normal, uniform in zip(noise["chain"], noise["accept"], strict=True):
            state, _ = step(state, {"normal": normal, "uniform": uniform}, log_density=log_density,
                            step_size=self.step_size.to(z0), **more)
        return state.z

    def infer(self, x, *, num_samples=1, noise=None, generator=None, observed=None):
        """Draw num_samples end points for each row of x [B, D]: [S, B, K], flat, without gradients.

        noise: a dict as `noise_spec` says; observed: as in `run`.
        """
        x = self.generator._check_x(x)
        with torch.no_grad():
            noise = self._noise(x, num_samples, noise, generator)
            return self.run(x, self._start(x, noise["start"]), noise, observed=observed)

    def posterior(self, x):
        """The law of the end point given x [B, D]: a `ShortRunPosterior`, a sampler without density."""
        return ShortRunPosterior(self, self.generator._check_x(x))

    def reconstruct(self, x, *, num_samples=1, generator=None):
        """The mean of p(x' | z), averaged over num_samples end points: [B, D]."""
        with torch.no_grad():
            return self.generator.mean(self.infer(x, num_samples=num_samples, generator=generator)).mean(0)

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None, **options):
        """log p(x) by annealed importance sampling with num_samples (16) chains: `Estimate`, low on average.

        proposal: where the annealing starts, x -> distribution over flat latents (default the prior); chunk: pairs of
        chain and example at once; options: of `evaluation.log_likelihood_ais`.
        """
        return evaluation.log_likelihood_ais(
            self, self.generator._check_x(x), num_samples or 16, generator=generator, num_latents=self.num_latents,
            base=proposal, **({} if chunk is None else {"chunk": chunk}), **options)


def short_run_loss(model, batch, noise=None):
    """Minus log p(x, z_T), averaged over the chains' end points, which are held fixed: the loss [B] for `training.fit`.

    Its gradient is the short-run estimate of that of -log p(x) (Fisher's identity, eq-sr-fisher and
    eq-sr-layered-fisher, holds where z_T is
    a posterior
    sample). batch: x [B, D], or (x, rows [B]) for persistent chains, whose stored points move; noise: as
    `model.noise_spec` says. An encoder's negative ELBO is added with value 0 and its own gradient. Source: paper,
    algorithm 1.
    """
    x, rows = batch if isinstance(batch, (tuple, list)) else (batch, None)
    if model.start == "persistent" and rows is None:
        raise ValueError("batch must be (x, rows) for start='persistent': fit on data (x, torch.arange(len(x)))")
    noise = model._noise(x, 1, noise, None)
    with torch.no_grad():
        z = model.run(x, model._start(x, noise["start"], rows), noise)
        if model.start == "persistent":
            model.chains[rows] = z[-1]
    loss = -model.log_joint(x, z).mean(0)
    if model.start == "encoder":
        q = model.encoder(x)
        elbo = model._frozen_elbo(x, q.rsample(noise["start"].shape[:1], noise=noise["start"]), q.kl_to_standard())
        loss = loss + (elbo.detach() - elbo)
    return loss


class LayeredVAE(_AroundGenerator):
    """A variational autoencoder on a `MultiLayerGenerator`: the opponent with an inference network.

    q(e | x) is normal and diagonal over the noises of all layers: encoder, a module x [B, D] -> DiagonalNormal over
    [B, K] (default a `BottomUpEncoder` with hidden_dims). For one layer it is the plain VAE. generator, decoder,
    noise_var, latent_dims, freeze_decoder: as in `ShortRunModel`.
    """

    def __init__(self, generator=None, *, decoder=None, noise_var=None, latent_dims=None, freeze_decoder=False,
                 encoder=None, hidden_dims=200):
        super().__init__(generator, decoder, noise_var, latent_dims, freeze_decoder)
        self.encoder = BottomUpEncoder(self.data_dim, self.latent_dims, hidden_dims) if encoder is None else encoder

    def posterior(self, x):
        """q(e | x), a DiagonalNormal over [B, K], layers side by side."""
        return self.encoder(self.generator._check_x(x))

    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)} of the noise that `bound` takes."""
        return {"z": ("normal", (num_samples, batch_size, self.num_latents), 1)}

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """Evidence lower bound [B] in nats: E_q log p(x | z) over num_samples draws minus KL(q || N(0, I)), closed."""
        q = self.posterior(x)
        noise = noise["z"] if isinstance(noise, dict) else noise
        z = q.rsample((num_samples,), noise=noise, generator=generator)
        return self.generator.log_likelihood_given(x, self.generator.mean(z)).mean(0) - q.kl_to_standard()

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None):
        """Importance-sampled log p(x) with num_samples (1,000) draws of the proposal (default q): `Estimate`."""
        return evaluation.log_likelihood_is(self, self.generator._check_x(x), num_samples or 1000, proposal=proposal,
                                            generator=generator, **({} if chunk is None else {"chunk": chunk}))

    def infer(self, x, *, num_samples=1, generator=None):
        """Draw num_samples of q for each row of x [B, D]: [S, B, K], without gradients."""
        with torch.no_grad():
            return self.posterior(x).rsample((num_samples,), generator=generator)

    def reconstruct(self, x, *, num_samples=1, generator=None):
        """The mean of p(x' | z), averaged over num_samples draws z ~ q(z | x): [B, D]."""
        with torch.no_grad():
            return self.generator.mean(self.infer(x, num_samples=num_samples, generator=generator)).mean(0)


# ---------------------------------------------------------------- what is hidden
class Inpainting(NamedTuple):
    """mean [B, D]: the chains' average of E[x | z], observed entries as given; scale [B, D]: standard deviation of
    E[x | z] between chains, 0 where observed; chains [C, B, D]: E[x | z] of each."""

    mean: torch.Tensor
    scale: torch.Tensor
    chains: torch.Tensor


@torch.no_grad()
def inpaint(model, x, observed, *, num_chains=8, noise=None, generator=None):
    """Fill in the hidden entries of x by short chains that see the observed ones alone -> Inpainting.

    The residual is masked (eq-sr-masked), the chain is the same: it targets p(z | x_observed). model: a
    `ShortRunModel` (an encoder's
    start sees zeros where x is hidden); x [B, D], any value (NaN too) where hidden; observed: bool [B, D] or [D];
    num_chains: C; noise: as `noise_spec(B, C)` says. Raises ValueError for a mask of another type or shape, a row with
    nothing observed, or an observed entry that is not finite. Source: paper, section 4 (inpainting).
    """
    model.generator._check_x(x)
    if observed.dtype != torch.bool or observed.shape not in (x.shape, x.shape[-1:]):
        raise ValueError(f"observed must be bool of shape {list(x.shape)} or {list(x.shape[-1:])}, got "
                         f"{observed.dtype} of shape {list(observed.shape)}")
    observed = observed.expand_as(x)
    empty = (~observed.any(-1)).nonzero()
    if len(empty):
        raise ValueError(f"observed hides everything in {len(empty)} of {len(x)} rows, the first of them "
                         f"{int(empty[0])}: there is nothing to infer from (use sample)")
    if not bool(x[observed].isfinite().all()):
        raise ValueError("x holds a value that is not finite where observed is True")
    z = model.infer(torch.where(observed, x, torch.zeros_like(x)), num_samples=num_chains, noise=noise,
                    generator=generator, observed=observed)
    chains = model.generator.mean(z)
    scale = chains.std(0) if num_chains > 1 else torch.zeros_like(x)
    return Inpainting(torch.where(observed, x, chains.mean(0)), torch.where(observed, torch.zeros_like(scale), scale),
                      chains)
