"""Chapter 2: stochastic backpropagation and the deep latent Gaussian model (Rezende, Mohamed and Wierstra, 2014).

A deep latent Gaussian model puts standard normal noise `z_l` into every layer of a network,

    h_L = G_L z_L,    h_l = T_l(h_{l+1}) + G_l z_l,    x ~ p(x | T_0(h_1)),

and a recognition network maps a datum to one Gaussian per layer. Both are trained on one bound, by gradients that pass
through the noise. Equations: eq-sb-bonnet, eq-sb-price, eq-sb-pathwise, eq-sb-score (estimators), eq-sb-ancestral,
eq-sb-joint-noise, eq-sb-joint-state, eq-sb-bound, eq-sb-kl (model), eq-sb-wake, eq-sb-sleep, eq-sb-metropolis.

Index 0 of every tuple is layer 1, nearest the data. Densities and bounds are per example, in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from . import evaluation
from .distributions import DiagonalNormal, FullNormal, LowRankPrecisionNormal, RankOnePrecisionNormal, _all_finite
from .likelihoods import Bernoulli, Gaussian
from .networks import mlp, weights_of

__all__ = ["DLGM", "DefensiveMixture", "DiagonalNormal", "FullNormal", "GaussianGradient", "Imputation",
           "LayeredPosterior", "LowRankPrecisionNormal", "RankOnePrecisionNormal", "bonnet_gradient", "impute",
           "minibatch_free_energy", "pathwise_gradient", "price_gradient", "score_function_gradient",
           "score_function_loss", "wake_sleep_losses", "widen"]

LOG_2PI = math.log(2 * math.pi)


# ---------------------------------------------------------------- the gradient of an expectation
class GaussianGradient(NamedTuple):
    """One estimate per draw: `loc` [S, K] of the gradient in the mean, `scale` [S, K, K] of the gradient in R."""

    loc: torch.Tensor
    scale: torch.Tensor


def _draws(f, loc, scale_tril, noise):
    if noise.ndim != 2 or noise.shape[-1] != loc.shape[-1]:
        raise ValueError(f"noise must have shape [S, K] with K = {loc.shape[-1]}, got {tuple(noise.shape)}")
    z = (loc + noise @ scale_tril.mT).detach().requires_grad_()
    with torch.enable_grad():
        value = f(z)
    if value.shape != z.shape[:1]:
        raise ValueError(f"f must map [S, K] to [S]; for {tuple(z.shape)} it returned {tuple(value.shape)}")
    return z, value


def _slope(f, loc, scale_tril, noise):
    z, value = _draws(f, loc, scale_tril, noise)
    return torch.autograd.grad(value.sum(), z)[0]


def bonnet_gradient(f, loc, scale_tril, noise):
    """Estimate the gradient of E f(z) in the mean of z ~ N(loc, R R^T), one estimate [S, K] per draw.

    Bonnet's theorem (eq-sb-bonnet): d E f / d loc = E f'(z). f: [S, K] -> [S], absolutely continuous along lines (a
    step function is not); loc: [K]; scale_tril: [K, K], any factor R; noise: [S, K]. Source: paper, equation 7.

    >>> bonnet_gradient(lambda z: (z ** 2).sum(-1), torch.ones(1), torch.eye(1), torch.zeros(1, 1))
    tensor([[2.]])
    """
    return _slope(f, loc, scale_tril, noise)


def price_gradient(f, loc, scale_tril, noise):
    """Estimate the gradient of E f(z) in the covariance, half the Hessian of f at each draw: [S, K, K].

    Price's theorem (eq-sb-price): d E f / d C_ij = E[d^2 f / dz_i dz_j] / 2 with C_ij and C_ji counted as separate
    coordinates; moving a symmetric pair together gives twice that off the diagonal. f must have a continuous first
    derivative: with a kink (ReLU, absolute value) the pointwise Hessian misses its mass and the estimate is biased.
    Arguments as in `bonnet_gradient`. Costs K passes backward. Source: paper, equation 8.
    """
    z, value = _draws(f, loc, scale_tril, noise)
    slope, = torch.autograd.grad(value.sum(), z, create_graph=True)
    num, size = z.shape
    if not slope.requires_grad:  # f is linear
        return torch.zeros(num, size, size, dtype=z.dtype, device=z.device)
    unit = torch.eye(size, dtype=z.dtype, device=z.device)[:, None].expand(size, num, size)
    rows, = torch.autograd.grad(slope, z, unit, is_grads_batched=True, materialize_grads=True)
    return 0.5 * rows.transpose(0, 1)


def pathwise_gradient(f, loc, scale_tril, noise):
    """Estimate the gradients of E f(loc + R noise) in loc and in R through the draw: `GaussianGradient`.

    eq-sb-pathwise: d / d R_ij = E[g_i noise_j] with g = f'(z): rows are coordinates of z, columns those of the noise
    (the transpose agrees only for a diagonal R). Arguments as in `bonnet_gradient`; R need not be triangular, and all
    its K^2 entries count as coordinates. Source: paper, equation 10, which prints the transpose.
    """
    slope = _slope(f, loc, scale_tril, noise)
    return GaussianGradient(slope, slope[:, :, None] * noise[:, None, :])


def score_function_gradient(f, loc, scale_tril, noise, baseline=None):
    """Estimate the gradients of E f(z) in loc and R from values of f alone: `GaussianGradient`.

    eq-sb-score: E[(f(z) - b) d log q(z) / d theta], with d log q / d loc = R^-T noise and
    d log q / d R = R^-T (noise noise^T - I). baseline: None (b = 0), a number, "mean" or "optimal"; the last two are
    estimated for each draw from the other S - 1 draws, which keeps the estimate unbiased ("optimal": E[f s^2] / E[s^2],
    coordinate by coordinate). Other arguments as in `bonnet_gradient`; f may be discontinuous.
    Raises ValueError for an unknown baseline, or an estimated one with fewer than two draws.
    """
    with torch.no_grad():
        value = f(loc + noise @ scale_tril.mT)
        unit = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        back = torch.linalg.solve(scale_tril, unit).mT  # R^-T, for any factor R
        score = noise @ back.mT
        score_scale = score[:, :, None] * noise[:, None, :] - back
        if baseline in ("mean", "optimal"):
            if len(noise) < 2:
                raise ValueError(f"baseline {baseline!r} is estimated from the other draws: noise needs S >= 2")
            others = lambda v: v.sum(0) - v
            def weigh(s):
                weight = torch.ones_like(s) if baseline == "mean" else s ** 2
                f_ = value.reshape(-1, *[1] * (s.ndim - 1))
                return (f_ - others(f_ * weight) / others(weight)) * s
            return GaussianGradient(weigh(score), weigh(score_scale))
        if isinstance(baseline, str):
            raise ValueError(f"baseline must be None, a number, 'mean' or 'optimal', got {baseline!r}")
        centred = value if baseline is None else value - baseline
        return GaussianGradient(centred[:, None] * score, centred[:, None, None] * score_scale)


# ---------------------------------------------------------------- posteriors over several layers
def _split(z, sizes):
    return tuple(z) if isinstance(z, (tuple, list)) else z.split(list(sizes), dim=-1)


class LayeredPosterior:
    """Independent Gaussians, one per stochastic layer: tuples in, tuples out, index 0 nearest the data.

    layers: distributions over [B, K_l]. `rsample` and `log_prob` also take what samplers use, one flat array
    [..., K_1 + ... + K_L]; with `flat=True` they return it too.
    """

    def __init__(self, layers, *, flat=False):
        self.layers, self.flat = tuple(layers), flat
        self.sizes = [layer.mean.shape[-1] for layer in self.layers]

    def _out(self, parts):
        if not self.flat:
            return tuple(parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @property
    def mean(self):
        return self._out([layer.mean for layer in self.layers])

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw a tuple of sample_shape + [B, K_l]; noise: such a tuple, or flat."""
        noise = [None] * len(self.layers) if noise is None else _split(noise, self.sizes)
        return self._out([layer.rsample(sample_shape, noise=e, generator=generator)
                          for layer, e in zip(self.layers, noise, strict=True)])

    def log_prob(self, z):
        """Sum of the layers' log-densities, in nats."""
        return sum(layer.log_prob(part) for layer, part in zip(self.layers, _split(z, self.sizes), strict=True))

    def kl_per_layer(self):
        """KL[q_l || N(0, I)] of each layer: a tuple of [B], in nats (eq-sb-kl)."""
        return tuple(layer.kl_to_standard() for layer in self.layers)

    def kl_to_standard(self):
        """Sum of `kl_per_layer`: [B]."""
        return sum(self.kl_per_layer())


def widen(posterior, factor):
    """The same posterior with its covariance multiplied by `factor`: a safer proposal for importance sampling.

    With weights bounded only by the likelihood, the variance of the estimate is finite only where 2 I - C^-1 is
    positive definite (eq-sb-finite-variance); a trained posterior is far narrower. Raises ValueError for factor <= 0.
    """
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    if isinstance(posterior, LayeredPosterior):
        return LayeredPosterior([widen(layer, factor) for layer in posterior.layers], flat=posterior.flat)
    log, root = math.log(factor), math.sqrt(factor)
    if isinstance(posterior, DiagonalNormal):
        return DiagonalNormal(posterior.loc, posterior.log_var + log)
    if isinstance(posterior, RankOnePrecisionNormal):
        return RankOnePrecisionNormal(posterior.loc, posterior.log_d - log, posterior.u / root)
    if isinstance(posterior, LowRankPrecisionNormal):
        return LowRankPrecisionNormal(posterior.loc, posterior.log_d - log, posterior.U / root)
    if isinstance(posterior, FullNormal):
        return FullNormal(posterior.loc, posterior.scale_tril * root)
    raise TypeError(f"posterior must be one of the Gaussians of this module, got {type(posterior).__name__}")


class DefensiveMixture:
    """The proposal `weight` N(0, I) + (1 - weight) q (eq-sb-defensive), whose weights a bounded likelihood bounds.

    For Bernoulli data p(x | z) <= 1, so no importance weight exceeds 1 / weight and the estimate's variance is finite.
    q: a distribution over [B, K] with `rsample` and `log_prob` (a `LayeredPosterior` is taken flat); weight in (0, 1).
    In hundreds of dimensions the prior never hits the posterior: use it for a handful of latents.
    """

    def __init__(self, q, weight):
        if not 0 < weight < 1:
            raise ValueError(f"weight must lie in (0, 1), got {weight}")
        self.q = LayeredPosterior(q.layers, flat=True) if isinstance(q, LayeredPosterior) else q
        self.weight, self.mean = weight, self.q.mean

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw sample_shape + [B, K]; noise: {"z": normals of that shape, "choice": uniforms without the last axis}."""
        shape = tuple(sample_shape) + tuple(self.mean.shape)
        z = _draw("normal", shape, self.mean, generator) if noise is None else noise["z"]
        u = _draw("uniform", shape[:-1], self.mean, generator) if noise is None else noise["choice"]
        return torch.where((u < self.weight)[..., None], z, self.q.rsample(sample_shape, noise=z))

    def log_prob(self, z):
        """log of the mixture's density: the shape of z without its last axis."""
        prior = -0.5 * (z ** 2 + LOG_2PI).sum(-1)
        return torch.logaddexp(prior + math.log(self.weight), self.q.log_prob(z) + math.log1p(-self.weight))


def _draw(kind, shape, like, generator):
    device = like.device if generator is None else generator.device
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


# ---------------------------------------------------------------- the model
RECOGNITION = ("diagonal", "rank1", "rank_r", "full")
NOISE_MATRIX = ("identity", "dense", "triangular", "diagonal")
LIKELIHOOD = ("bernoulli", "gaussian")


def _choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _check_decoder(decoder, size, data_dim):
    """One look at what a given decoder makes of zeros: a width that does not fit is named here, not in a product."""
    like = next(iter(decoder.parameters()), torch.empty(0))
    try:
        with torch.no_grad():
            shape = list(decoder(torch.zeros(2, size, dtype=like.dtype, device=like.device)).shape)
    except RuntimeError as error:
        raise ValueError(f"decoder must map [..., {size}] to [..., {data_dim}], but refuses [2, {size}]") from error
    if shape != [2, data_dim]:
        raise ValueError(f"decoder must map [..., {size}] to [..., {data_dim}], but makes {shape} of [2, {size}]")


def _soft_clip(raw, limit=10.0):
    """Between -limit and limit, near the identity for small arguments, and never without a gradient."""
    return limit * torch.tanh(raw / limit)


class _Recognition(nn.Module):
    """One layer's q(z_l | x): a network on the data and one fused linear map to all its parameters."""

    def __init__(self, data_dim, hidden, size, family, rank, activation):
        super().__init__()
        self.family, self.size, self.rank = family, size, rank
        extra = {"diagonal": 0, "rank1": size, "rank_r": size * rank, "full": size * (size - 1) // 2}[family]
        self.network = mlp([data_dim, *hidden, 2 * size + extra], activation)
        if family in ("rank1", "rank_r"):  # at u = 0 the gradient in u vanishes: start away from the saddle
            with torch.no_grad():
                self.network[-1].bias[2 * size:].normal_(std=0.1)

    def forward(self, x):
        out = self.network(x)
        loc, raw, rest = out.split([self.size, self.size, out.shape[-1] - 2 * self.size], -1)
        if self.family == "diagonal":
            return DiagonalNormal(loc, _soft_clip(raw))
        if self.family == "rank1":
            return RankOnePrecisionNormal(loc, _soft_clip(raw), rest)
        if self.family == "rank_r":
            return LowRankPrecisionNormal(loc, _soft_clip(raw), rest.unflatten(-1, (self.size, self.rank)))
        row, col = torch.tril_indices(self.size, self.size, -1, device=x.device)
        scale = torch.diag_embed(torch.exp(0.5 * _soft_clip(raw)))
        below = torch.zeros_like(scale)
        below[..., row, col] = rest
        return FullNormal(loc, scale + below)


class DLGM(nn.Module):
    """Deep latent Gaussian model with a recognition network (eq-sb-ancestral, eq-sb-bound).

    data_dim: D. latent_dims: (K_1, ..., K_L) or one integer. hidden_dims: for each layer l the hidden widths of the
    network T_{l-1} below it, an integer or a tuple ((200, 200),); one integer serves all layers. L = 1 is a plain VAE.
    recognition: the family of q(z_l | x): "diagonal", "rank1" (precision diag(exp(log_d)) + u u^T, O(K)), "rank_r"
    (`rank` columns) or "full". Every layer's q reads the data, so the layers are independent given x.
    noise_matrix: G_l "dense", "triangular" or "diagonal", started at the identity; "identity" leaves it out. Default:
    "identity" for L = 1, where the first weights of T_0 absorb G_1, and "dense" otherwise.
    likelihood: "bernoulli" (T_0 gives logits) or "gaussian" (T_0 gives the mean; the variance is learned per dimension,
    at least `min_noise_var`, unless `noise_var`, a number or [D], fixes it).
    recognition_dims: hidden widths of the recognition networks (default: those of T_0, reversed).
    decoder: a module [..., K] -> [..., D] used as it is in place of T_0 (L = 1); freeze_decoder: do not train it.
    input_flip: probability with which, in training mode, a binary pixel is flipped on its way into the recognition
    network (never in the likelihood, so the bound stays a bound).

    Raises ValueError for sizes that do not fit or unknown names.

    >>> model = DLGM(6, (3, 2), ((8,), (4,)), recognition="rank1")
    >>> model.bound(torch.zeros(5, 6)).shape
    torch.Size([5])
    """

    def __init__(self, data_dim, latent_dims, hidden_dims, *, recognition="diagonal", noise_matrix=None,
                 likelihood="bernoulli", rank=2, recognition_dims=None, activation="relu", decoder=None, noise_var=None,
                 min_noise_var=1e-4, freeze_decoder=False, input_flip=0.0):
        super().__init__()
        self.data_dim = data_dim
        self.latent_dims = (latent_dims,) if isinstance(latent_dims, int) else tuple(latent_dims)
        self.num_layers = len(self.latent_dims)
        hidden = (hidden_dims,) * self.num_layers if isinstance(hidden_dims, int) else tuple(hidden_dims)
        hidden = tuple((h,) if isinstance(h, int) else tuple(h) for h in hidden)
        if min(self.latent_dims, default=0) < 1 or data_dim < 1:
            raise ValueError(f"data_dim and latent_dims must be positive, got {data_dim} and {self.latent_dims}")
        if len(hidden) != self.num_layers:
            raise ValueError(f"hidden_dims must have one entry per layer: {self.num_layers} latent_dims, "
                             f"{len(hidden)} hidden_dims")
        _choice("recognition", recognition, RECOGNITION)
        self.likelihood = _choice("likelihood", likelihood, LIKELIHOOD)
        self.noise_matrix = _choice("noise_matrix", noise_matrix or ("identity" if self.num_layers == 1 else "dense"),
                                    NOISE_MATRIX)
        if not 0 <= input_flip < 0.5 or (input_flip and likelihood != "bernoulli"):
            raise ValueError("input_flip must lie in [0, 0.5) and needs binary data, "
                             f"got {input_flip} with {likelihood!r}")
        self.input_flip = input_flip
        if decoder is not None and self.num_layers > 1:
            raise ValueError("decoder replaces T_0 of a model with one stochastic layer; latent_dims has "
                             f"{self.num_layers}")
        below = (data_dim, *self.latent_dims)  # T_l maps h_{l+1} to h_l, T_0 to the data
        networks = [mlp([below[l + 1], *hidden[l], below[l]], activation) for l in range(self.num_layers)]
        if decoder is not None:
            _check_decoder(decoder, self.latent_dims[0], data_dim)
            networks = [decoder.requires_grad_(not freeze_decoder)]
        self.networks = nn.ModuleList(networks)
        start = torch.ones if self.noise_matrix == "diagonal" else torch.eye
        self.noise_matrices = nn.ParameterList(
            [] if self.noise_matrix == "identity" else [start(size) for size in self.latent_dims])
        if recognition_dims is None:
            recognition_dims = hidden[0][::-1]
        recognition_dims = (recognition_dims,) if isinstance(recognition_dims, int) else tuple(recognition_dims)
        self.recognition = nn.ModuleList(
            [_Recognition(data_dim, recognition_dims, size, recognition, rank, activation)
             for size in self.latent_dims])
        self.min_noise_var = min_noise_var
        if likelihood == "gaussian":
            if noise_var is None:
                self.log_noise_var = nn.Parameter(torch.zeros(data_dim))
            else:
                noise_var = torch.as_tensor(noise_var, dtype=torch.float64)  # the likelihood casts; nothing is rounded
                if noise_var.shape not in ((), (data_dim,)) or not bool((noise_var > 0).all()):
                    raise ValueError(f"noise_var must be positive, a number or [{data_dim}], got {noise_var}")
                self.register_buffer("fixed_noise_var", noise_var)
        elif noise_var is not None:
            raise ValueError("noise_var belongs to likelihood='gaussian'")

    # ---- generative model
    @property
    def noise_var(self):
        """Variance of the Gaussian likelihood: a number or [D]."""
        if hasattr(self, "log_noise_var"):
            return self.min_noise_var + self.log_noise_var.exp()
        return self.fixed_noise_var

    def generative_parameters(self):
        """Parameters theta of the generative model (the rest is the recognition model's phi)."""
        own = [*self.networks.parameters(), *self.noise_matrices.parameters()]
        return own + ([self.log_noise_var] if hasattr(self, "log_noise_var") else [])

    def split(self, z):
        """Flat latents [..., K_1 + ... + K_L] as a tuple, layer 1 first; a tuple stays one."""
        got = [part.shape[-1] for part in z] if isinstance(z, (tuple, list)) else z.shape[-1]
        if got not in (list(self.latent_dims), sum(self.latent_dims)):
            raise ValueError(f"z must have the layer sizes {self.latent_dims}, flat or as a tuple, got {got}")
        return _split(z, self.latent_dims)

    def concat(self, z):
        """A tuple of layers as one flat array, layer 1 first; a flat array stays one."""
        return torch.cat(tuple(z), -1) if isinstance(z, (tuple, list)) else z

    def _matrix(self, layer):
        matrix = self.noise_matrices[layer]
        return matrix.tril() if self.noise_matrix == "triangular" else matrix

    def _mix(self, layer, z):
        if self.noise_matrix == "identity":
            return z
        if self.noise_matrix == "diagonal":
            return z * self.noise_matrices[layer]
        return z @ self._matrix(layer).mT

    def states(self, z):
        """The activations h_l = T_l(h_{l+1}) + G_l z_l, a tuple, layer 1 first (eq-sb-ancestral)."""
        z = self.split(z)
        h = [self._mix(self.num_layers - 1, z[-1])]
        for layer in reversed(range(self.num_layers - 1)):
            h.insert(0, self.networks[layer + 1](h[0]) + self._mix(layer, z[layer]))
        return tuple(h)

    def noises(self, h):
        """The noise that gives the states h, z_l = G_l^-1 (h_l - T_l(h_{l+1})): the inverse of `states`."""
        h = self.split(h)
        z = []
        for layer in range(self.num_layers):
            rest = h[layer] if layer == self.num_layers - 1 else h[layer] - self.networks[layer + 1](h[layer + 1])
            if self.noise_matrix == "diagonal":
                rest = rest / self.noise_matrices[layer]
            elif self.noise_matrix == "triangular":
                rest = torch.linalg.solve_triangular(self._matrix(layer), rest[..., None], upper=False)[..., 0]
            elif self.noise_matrix == "dense":
                rest = torch.linalg.solve(self._matrix(layer), rest[..., None])[..., 0]
            z.append(rest)
        return tuple(z)

    def _log_volume(self):
        """sum_l log |det G_l|, in nats."""
        if self.noise_matrix == "identity":
            return 0.0
        if self.noise_matrix == "dense":
            return sum(torch.linalg.slogdet(g).logabsdet for g in self.noise_matrices)
        diagonal = (lambda g: g) if self.noise_matrix == "diagonal" else torch.diagonal
        return sum(diagonal(g).abs().log().sum() for g in self.noise_matrices)

    def observation(self, z):
        """p(x | z), a likelihood over [..., D], from the noise z (flat or a tuple)."""
        return self._observation_of_state(self.states(z)[0])

    def _observation_of_state(self, h):
        parameter = self.networks[0](h)
        return Bernoulli(parameter) if self.likelihood == "bernoulli" else Gaussian(parameter, self.noise_var)

    def log_joint(self, x, z, *, coordinates="noise"):
        """log p(x, z): [S, B], in nats, from x [B, D] and z [S, B, K] (flat or a tuple of layers).

        coordinates: "noise" (eq-sb-joint-noise: z holds the noises, no determinant anywhere) or "state"
        (eq-sb-joint-state: z holds the states h_l, with log |det G_l| taken off).
        """
        _choice("coordinates", coordinates, ("noise", "state"))
        volume = 0.0
        if coordinates == "state":
            z, volume = self.noises(z), self._log_volume()
        prior = sum(-0.5 * (part ** 2 + LOG_2PI).sum(-1) for part in self.split(z))
        return self.observation(z).log_prob(x) + prior - volume

    def as_arrays(self):
        """The parameters as `scratch` takes them: {"networks", "matrices", "recognition"}, lists of layers, in NumPy.

        A network is [(W [out, in], b [out]), ...]; every noise matrix is written out in full.
        """
        eyes = [torch.eye(size, dtype=next(self.parameters()).dtype) for size in self.latent_dims]
        matrices = [eye if self.noise_matrix == "identity" else
                    torch.diag(self.noise_matrices[i]) if self.noise_matrix == "diagonal" else self._matrix(i)
                    for i, eye in enumerate(eyes)]
        return {"networks": [weights_of(net) for net in self.networks],
                "matrices": [matrix.detach().cpu().numpy().copy() for matrix in matrices],
                "recognition": [weights_of(layer.network) for layer in self.recognition]}

    # ---- recognition model
    def _checked(self, x):
        if x.ndim < 1 or x.shape[-1] != self.data_dim:
            raise ValueError(f"x must have shape [B, {self.data_dim}], got {tuple(x.shape)}")
        return x

    def _posterior(self, x, flat=False):
        x = self._checked(x)
        if not _all_finite(x):
            raise ValueError("x must be finite, got NaN or infinity: `impute` is for missing entries")
        return LayeredPosterior([layer(x) for layer in self.recognition], flat=flat)

    def posterior(self, x):
        """q(z | x): one Gaussian for L = 1, a `LayeredPosterior` (tuples in and out) for more layers."""
        posterior = self._posterior(x)
        return posterior.layers[0] if self.num_layers == 1 else posterior

    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)} of the noise that `bound` takes."""
        spec = {"z": ("normal", (num_samples, batch_size, sum(self.latent_dims)), 1)}
        if self.input_flip and self.training:
            spec["flip"] = ("uniform", (batch_size, self.data_dim), 0)
        return spec

    def _noise(self, x, num_samples, noise, generator):
        if noise is not None and not isinstance(noise, dict):
            noise = {"z": noise}
        spec = self.noise_spec(len(x), num_samples)
        if noise is None:
            return {name: _draw(kind, shape, x, generator) for name, (kind, shape, _) in spec.items()}
        for name, (_, shape, _) in spec.items():
            if name not in noise or tuple(noise[name].shape[-2:]) != shape[-2:]:
                raise ValueError(f"noise must hold {name!r} of shape {shape}, got "
                                 f"{ {k: tuple(v.shape) for k, v in noise.items()} }")
        return noise

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """Evidence lower bound (minus the free energy) of each row of x: [B], in nats (eq-sb-bound).

        E_q log p(x | z), averaged over num_samples draws, minus the closed KL of every layer (eq-sb-kl), whose constant
        is -K_l / 2 for layer l. noise: [S, B, K] (flat), or {"z": ..., "flip": ...} as `noise_spec` says.
        """
        noise = self._noise(self._checked(x), num_samples, noise, generator)
        seen = x
        if "flip" in noise:
            seen = torch.where(noise["flip"] < self.input_flip, 1 - x, x)
        posterior = self._posterior(seen, flat=True)
        z = posterior.rsample(noise["z"].shape[:-2], noise=noise["z"])
        return self.observation(z).log_prob(x).mean(0) - posterior.kl_to_standard()

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None):
        """Importance-sampled log p(x), a lower bound in expectation: `Estimate` (eq-sb-importance).

        num_samples: draws per datum (default 1000). proposal: maps x to a distribution over flat latents, default
        q(z | x); see `widen` and `DefensiveMixture` for when q is too narrow. chunk: pairs of draw and datum in memory
        at once.
        """
        proposal = proposal or (lambda rows: self._posterior(rows, flat=True))
        return evaluation.log_likelihood_is(self, self._checked(x), num_samples or 1000, proposal=proposal,
                                            generator=generator, **({} if chunk is None else {"chunk": chunk}))

    # ---- uses
    def sample_latents(self, num, *, generator=None):
        """Draws of the noise from the prior: a tuple of [num, K_l], for L = 1 the array itself."""
        like = next(self.parameters())
        z = self.split(_draw("normal", (num, sum(self.latent_dims)), like, generator))
        return z[0] if self.num_layers == 1 else z

    def sample(self, num, *, generator=None):
        """Data drawn from the model: [num, D]."""
        with torch.no_grad():
            z = self.sample_latents(num, generator=generator)
            return self.observation(z).sample(generator=generator)

    def reconstruct(self, x, *, num_samples=1, generator=None):
        """The mean of p(x' | z), averaged over num_samples draws z ~ q(z | x): [B, D]."""
        with torch.no_grad():
            posterior = self._posterior(x, flat=True)
            noise = _draw("normal", (num_samples, *posterior.mean.shape), x, generator)
            return self.observation(posterior.rsample((num_samples,), noise=noise)).mean.mean(0)


# ---------------------------------------------------------------- objectives beside the bound
def minibatch_free_energy(model, x, num_data, *, weight_variance=None, num_samples=1, noise=None, generator=None):
    """Estimate, unbiased, the free energy of a data set of num_data examples from a batch x [B, D]: a scalar, in nats.

    eq-sb-minibatch: -(N / B) sum_b bound(x_b) + |theta|^2 / (2 weight_variance); the data term is scaled up, the
    Gaussian prior N(0, weight_variance I) on the generative parameters is counted once. num_samples, noise: as in
    `DLGM.bound`. Source: paper, equation 13.
    """
    data = -num_data / len(x) * model.bound(x, num_samples=num_samples, noise=noise, generator=generator).sum()
    if weight_variance is None:
        return data
    return data + sum((p ** 2).sum() for p in model.generative_parameters()) / (2 * weight_variance)


def score_function_loss(model, x, *, num_samples=5, noise=None, generator=None):
    """Minus the bound, [B], whose gradient in phi is the score-function estimate: the baseline that chapter 2 beats.

    The value is a plain Monte Carlo estimate; the gradient in phi is (f_s - b_s) d log q(z_s | x) / d phi, b_s being
    the mean of f = log p(x, z) - log q(z | x) over the other draws (eq-sb-score); the gradient in theta is as usual.
    Raises ValueError for num_samples < 2.
    """
    noise = model._noise(model._checked(x), num_samples, noise, generator)["z"]
    if len(noise) < 2:
        raise ValueError("num_samples must be at least 2: each draw's baseline is the mean of the others")
    posterior = model._posterior(x, flat=True)
    z = posterior.rsample(noise.shape[:-2], noise=noise).detach()
    log_q, log_p = posterior.log_prob(z), model.log_joint(x, z)
    value = (log_p - log_q).detach()
    centred = value - (value.sum(0) - value) / (len(value) - 1)
    surrogate = centred * log_q + log_p
    return -(value + surrogate - surrogate.detach()).mean(0)


def wake_sleep_losses(model, x, *, noise=None, generator=None):
    """Losses (wake [B], sleep [B]) of wake-sleep learning (Hinton, Dayan, Frey and Neal, 1995), in nats.

    Wake (eq-sb-wake): -log p(x, z) with z ~ q(z | x) held fixed: moves theta alone. Sleep (eq-sb-sleep):
    -log q(z' | x') on a fantasy (x', z') of the model, held fixed: moves phi alone, towards the posterior in the
    other direction of the KL divergence and on the model's own data. No single function goes down when both are
    followed.
    noise: {"z": [1, B, K], "fantasy_z": [B, K], "fantasy_x": [B, D]} (the last uniform for Bernoulli data).
    """
    x = model._checked(x)
    with torch.no_grad():
        posterior = model._posterior(x, flat=True)
        if noise is None:
            shape = tuple(posterior.mean.shape)
            noise = {"z": _draw("normal", (1, *shape), x, generator), "fantasy_z": _draw("normal", shape, x, generator),
                     "fantasy_x": _draw("uniform" if model.likelihood == "bernoulli" else "normal", tuple(x.shape), x,
                                        generator)}
        z = posterior.rsample((1,), noise=noise["z"])
        fantasy = model.observation(noise["fantasy_z"]).sample(noise=noise["fantasy_x"])
    wake = -model.log_joint(x, z)[0]
    return wake, -model._posterior(fantasy, flat=True).log_prob(noise["fantasy_z"])


# ---------------------------------------------------------------- filling in what is missing
class Imputation(NamedTuple):
    """`x` [C, B, D]: the chains' last states; `mean` [B, D]: the average of E[x | z] over the sweeps kept and the
    chains, observed entries as given; `acceptance` [C, B]: share of proposals accepted (1 for "gibbs"); `trace`
    [T, C, B, D]: all states, or None."""

    x: torch.Tensor
    mean: torch.Tensor
    acceptance: torch.Tensor
    trace: torch.Tensor | None


@torch.no_grad()
def impute(model, x, observed, *, num_sweeps, method="gibbs", num_chains=1, num_discard=None, num_plain=20,
           keep_trace=False, noise=None, generator=None):
    """Fill in the missing entries of x by a Markov chain: `Imputation`.

    A sweep draws z given the completed x, then the missing entries from p(x_m | z); observed entries never change.
    num_sweeps: T, num_chains: C an image, keep_trace: also return every sweep.
    method "gibbs": z ~ q(z | x), the paper's chain (eq-sb-gibbs), whose stationary law is p(x_m | x_o) only where q is
    the posterior. "metropolis": q proposes and a Metropolis test accepts (eq-sb-metropolis), exact for every q with
    full support (Mattei and Frellsen, 2018); the first `num_plain` sweeps are plain ones, a start that the test
    alone would take long to find. All chains and images move at once.

    x: [B, D], any value (NaN too) where missing; observed: bool [B, D] or [D]. num_discard: sweeps left out of `mean`
    (default: the first half). noise: {"start": [C, B, K], "start_x": [C, B, D], "z": [T, C, B, K], "x": [T, C, B, D],
    "accept": [T, C, B]}; "start_x" and "x" are uniform for Bernoulli data, "accept" always.
    With nothing missing x comes back; with nothing observed the chain samples the model itself.
    Raises ValueError for a mask of another shape or type, an unknown method, or a missing value marked as observed.
    """
    _choice("method", method, ("gibbs", "metropolis"))
    model._checked(x)
    if observed.dtype != torch.bool or observed.shape not in (x.shape, x.shape[-1:]):
        raise ValueError(f"observed must be bool of shape {tuple(x.shape)} or {tuple(x.shape[-1:])}, got "
                         f"{observed.dtype} of shape {tuple(observed.shape)}")
    if num_sweeps < 1:
        raise ValueError(f"num_sweeps must be at least 1, got {num_sweeps}")
    observed = observed.expand_as(x)
    if not bool(torch.isfinite(x[observed]).all()):
        raise ValueError("x holds a value that is not finite where observed is True")
    num_discard = num_sweeps // 2 if num_discard is None else num_discard
    if not 0 <= num_discard < num_sweeps:
        raise ValueError(f"num_discard must lie in [0, num_sweeps), got {num_discard} of {num_sweeps}")
    pixel = "uniform" if model.likelihood == "bernoulli" else "normal"
    kinds = {"start": ("normal", sum(model.latent_dims)), "start_x": (pixel, model.data_dim),
             "z": ("normal", sum(model.latent_dims)), "x": (pixel, model.data_dim)}
    chains = (num_chains, len(x))

    def draw(name, sweep=None):
        if noise is not None:
            return noise[name] if sweep is None else noise[name][sweep]
        if name == "accept":
            return _draw("uniform", chains, x, generator)
        kind, size = kinds[name]
        return _draw(kind, (*chains, size), x, generator)

    def fill(observation, values):
        return torch.where(observed, x, observation.sample(noise=values))

    flat = lambda v: v.reshape(-1, v.shape[-1])  # chains and images on one batch axis

    state = fill(model.observation(draw("start")), draw("start_x"))
    mean, accepted, z, trace = torch.zeros_like(x), torch.zeros(chains, dtype=x.dtype, device=x.device), None, []
    for sweep in range(num_sweeps):
        posterior = model._posterior(flat(state), flat=True)
        proposal = posterior.rsample((1,), noise=flat(draw("z", sweep))[None])
        if method == "gibbs" or z is None or sweep < num_plain:
            z, accept = proposal, torch.ones(chains, dtype=torch.bool, device=x.device)
        else:  # the current z is weighed again, at the current x
            both = torch.cat([proposal, z])
            log_w = model.log_joint(flat(state), both) - posterior.log_prob(both)
            accept = draw("accept", sweep).log() < (log_w[0] - log_w[1]).reshape(chains)
            z = torch.where(accept.reshape(1, -1, 1), proposal, z)
        observation = model.observation(z.reshape(*chains, -1))
        state = fill(observation, draw("x", sweep))
        accepted += accept
        if sweep >= num_discard:
            mean += torch.where(observed, x, observation.mean).mean(0) / (num_sweeps - num_discard)
        if keep_trace:
            trace.append(state)
    return Imputation(state, mean, accepted / num_sweeps, torch.stack(trace) if keep_trace else None)
