"""The variational autoencoder that chapter 4's methods share: one layer of latents, a decoder, an encoder.

The methods differ in how they get from x to a posterior; likelihood, noise, samples and estimates are the same.
"""

import math

import torch
from torch import nn

from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.evaluation import log_likelihood_is
from dlgm_tutorial.likelihoods import Bernoulli, Gaussian
from dlgm_tutorial.networks import mlp
from dlgm_tutorial.objectives import iwae

LOG_2PI = math.log(2 * math.pi)


def require(ok, message):
    """Raise ValueError with the message unless ok."""
    if not ok:
        raise ValueError(message)


def check_count(value, name, least=1):
    """Return value, an integer of at least `least`, or raise ValueError naming it."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def check_positive(value, name):
    """Return value, a positive finite number, or raise ValueError naming it."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    require(ok, f"{name} must be positive and finite, got {value!r}")
    return float(value)


def draw_normal(shape, like, generator=None):
    """Standard normal noise of a shape, in the precision and on the device of `like`."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def held(function, *args):
    """function(*args), [...] from args [..., K], with its gradient in the arguments alone: its parameters are held.

    Each value may depend on its own row of the arguments only.
    """
    at = tuple(v.detach().requires_grad_() for v in args)
    with torch.enable_grad():
        value = function(*at)
        slopes = torch.autograd.grad(value.sum(), at)
    return value.detach() + sum((s * (v - v.detach())).sum(-1) for s, v in zip(slopes, args, strict=True))


def trunk(data_dim, hidden_dims, activation="relu"):
    """The encoder's body, x [..., D] -> h [..., H]: hidden layers, the last one followed by tanh."""
    return nn.Sequential(*mlp([data_dim, *hidden_dims], activation), nn.Tanh())


class AmortizedVAE(nn.Module):
    """The plain variational autoencoder with a diagonal Gaussian posterior: chapter 4's reference.

    It is `DLGM` with one layer, and a tanh on the encoder's last hidden layer, which all methods of the chapter share.

    data_dim: D; latent_dim: K; hidden_dims: hidden widths of the decoder; encoder_dims: of the encoder (default: the
    same, reversed); activation: of both. likelihood: "bernoulli" (the decoder gives logits) or "gaussian" (it gives the
    mean; noise_var: a number or [D]). decoder: a module [..., K] -> [..., D] used as it is; freeze_decoder: do not
    train it. encoder: a module [B, D] -> [B, 2 K] used as it is, the mean and then the log-variance.

    Raises ValueError for sizes, likelihoods or variances that do not fit.

    >>> AmortizedVAE(6, 2, (8,)).bound(torch.zeros(5, 6)).shape
    torch.Size([5])
    """

    def __init__(self, data_dim, latent_dim, hidden_dims=(200, 200), *, encoder_dims=None, likelihood="bernoulli",
                 noise_var=None, decoder=None, freeze_decoder=False, encoder=None, activation="relu"):
        super().__init__()
        self.data_dim, self.latent_dim = check_count(data_dim, "data_dim"), check_count(latent_dim, "latent_dim")
        hidden_dims = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        self.encoder_dims = hidden_dims[::-1] if encoder_dims is None else (
            (encoder_dims,) if isinstance(encoder_dims, int) else tuple(encoder_dims))
        self.activation = activation
        require(likelihood in ("bernoulli", "gaussian"),
                f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}")
        self.likelihood = likelihood
        self.decoder = mlp([latent_dim, *hidden_dims, data_dim], activation) if decoder is None else decoder
        if freeze_decoder:
            self.decoder.requires_grad_(False)
        require((noise_var is None) == (likelihood == "bernoulli"),
                f"noise_var must be given for, and only for, likelihood='gaussian', got {noise_var!r}")
        if noise_var is not None:
            noise_var = torch.as_tensor(noise_var, dtype=torch.float64)  # the likelihood casts; nothing is rounded
            require(noise_var.shape in ((), (data_dim,)) and bool(((noise_var > 0) & noise_var.isfinite()).all()),
                    f"noise_var must be positive and finite, a number or [{data_dim}], got {noise_var.tolist()}")
            self.register_buffer("noise_var", noise_var)
        self.encoder = encoder if encoder is not None else self._plain_encoder()

    def _plain_encoder(self):
        return nn.Sequential(trunk(self.data_dim, self.encoder_dims, self.activation),
                             mlp([self.encoder_dims[-1], 2 * self.latent_dim], self.activation))

    # ---- generative model
    def observation(self, z):
        """p(x | z), a likelihood over [..., D], from z [..., K]."""
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return Bernoulli(output, validate=False)
        return Gaussian(output, self.noise_var, validate=False)

    def log_joint(self, x, z, *, coordinates="noise"):
        """log p(x, z) in nats: x [B, D], z [S, B, K] -> [S, B]. With one layer, noise and state are the same."""
        return self.observation(z).log_prob(x) - 0.5 * (z.square() + LOG_2PI).sum(-1)

    def _checked(self, x):
        require(torch.is_tensor(x) and x.ndim == 2 and x.shape[1] == self.data_dim,
                f"x must have shape [B, {self.data_dim}], got {list(getattr(x, 'shape', []))}")
        if self.likelihood == "gaussian":
            require(bool(x.isfinite().all()), "x must be finite, got NaN or infinity")
        elif torch.count_nonzero(x * (x - 1)):
            raise ValueError("x must be 0 or 1 for a Bernoulli likelihood, got values from "
                             f"{x.min().item():g} to {x.max().item():g}: binarise the data")
        return x

    # ---- inference
    def encode(self, x):
        """Mean and log-variance of the encoder's Gaussian: two [B, K]."""
        return self.encoder(self._checked(x)).chunk(2, -1)

    def posterior(self, x):
        """q(z | x) = N(mean, diag(exp(log_var))): a `DiagonalNormal` over [B, K]."""
        return DiagonalNormal(*self.encode(x))

    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)} of the noise that `bound` takes."""
        return {"z": ("normal", (num_samples, batch_size, self.latent_dim), 1)}

    def _noise(self, batch_size, num_samples, noise, generator, like):
        """The noise as a dict of arrays; the number of samples is that of the arrays given."""
        spec = self.noise_spec(batch_size, num_samples)
        if noise is None:
            return {name: draw_normal(shape, like, generator) for name, (_, shape, _) in spec.items()}
        if torch.is_tensor(noise):
            require(len(spec) == 1, f"noise must be a dict with the arrays {sorted(spec)}, got one tensor")
            noise = {next(iter(spec)): noise}
        require(set(noise) >= set(spec), f"noise must hold {sorted(spec)}, got {sorted(noise)}")
        spec = self.noise_spec(batch_size, noise["z"].shape[0])
        for name, (_, shape, _) in spec.items():
            require(tuple(noise[name].shape) == tuple(shape),
                    f"noise[{name!r}] must have shape {list(shape)}, got {list(noise[name].shape)}")
        return noise

    def _gaussian_bound(self, x, mean, log_var, noise):
        """Bound of N(mean, exp(log_var)) with the closed divergence: noise [S, B, K] -> [B] (eq-gp-elbo)."""
        z = mean + torch.exp(0.5 * log_var) * noise
        divergence = 0.5 * (mean.square() + torch.expm1(log_var) - log_var).sum(-1)
        return self.observation(z).log_prob(x).mean(0) - divergence

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """Evidence lower bound of each row of x: [B], in nats (eq-gp-elbo). noise: [S, B, K]."""
        mean, log_var = self.encode(x)
        noise = self._noise(len(x), num_samples, noise, generator, mean)
        return self._gaussian_bound(x, mean, log_var, noise["z"])

    def importance_bound(self, x, *, num_samples=10, noise=None, generator=None):
        """Importance-weighted bound log mean_s p(x, z_s) / q(z_s | x), differentiable: [B], in nats.

        Maximising it is the importance-weighted autoencoder (Burda, Grosse and Salakhutdinov 2016); num_samples = 1 is
        the plain bound with a sampled divergence. noise: as for the posterior's rsample with S draws.
        """
        q = self.posterior(x)
        z = q.rsample((num_samples,), noise=noise, generator=generator)
        return iwae(self.log_joint(x, z) - q.log_prob(z))

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None):
        """Estimate log p(x) by importance sampling from the posterior -> Estimate, [B] each, in nats.

        num_samples: draws each (default 1000); proposal: maps x to a distribution (default: `posterior`); chunk: pairs
        of draw and datum in memory at once.
        """
        return log_likelihood_is(self, self._checked(x), num_samples or 1000, proposal=proposal, generator=generator,
                                 chunk=chunk)

    # ---- uses
    def sample_latents(self, num, *, generator=None):
        """Draws from the prior: [num, K]."""
        return draw_normal((num, self.latent_dim), next(self.parameters()), generator)

    @torch.no_grad()
    def sample(self, num, *, generator=None):
        """Data drawn from the model: [num, D]."""
        return self.observation(self.sample_latents(num, generator=generator)).sample(generator=generator)

    @torch.no_grad()
    def reconstruct(self, x, *, num_samples=1, generator=None):
        """The mean of p(x' | z), averaged over num_samples draws of the posterior: [B, D]."""
        z = self.posterior(x).rsample((num_samples,), generator=generator)
        return self.observation(z).mean.mean(0)
