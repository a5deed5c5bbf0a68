"""Chapter 4: Gaussian-process random inference (Kim and Pavlovic, 2021; Kim, 2022), rebuilt from the abstracts.

An encoder misses the best posterior of each datum, and the miss is a function of x. Here the encoder's mean and
log-variance are random functions of x,

    f(x) = b(x) + W psi(x),    g(x) = c(x) + U psi(x),    q(z | x, W, U) = N(f(x), diag(exp(g(x)))),

Gaussian processes centred at an ordinary encoder (b, c) with the kernel prior_var psi(x) . psi(x'). A normal posterior
over the weights (W, U) is learned with the model, on a lower bound of the log-likelihood of the whole data set; one
pass gives a posterior averaged over the encoders, and how uncertain the encoder is.

The papers' own text was not at hand: the model is derived from what their abstracts fix, and its scores are ours.
Everything is per example, in nats; g is a log-*variance* everywhere.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from dlgm_tutorial._gaussian_process import (
    GPPrediction,
    WeightPosterior,
    gp_function_space,
    gp_weight_space,
    linear_kernel,
    rbf_kernel,
)
from dlgm_tutorial._gaussian_vae import (
    LOG_2PI,
    AmortizedVAE,
    check_count,
    check_positive,
    draw_normal,
    require,
    trunk,
)
from dlgm_tutorial._refined_inference import (
    IterativeInferenceVAE,
    Refined,
    SemiAmortizedVAE,
    VariationalLaplaceVAE,
    refine,
)
from dlgm_tutorial._richer_posteriors import (
    AutoregressiveFlowVAE,
    AutoregressiveStep,
    EncoderMixture,
    FlowNormal,
    HouseholderVAE,
    RecursiveMixtureVAE,
    RotatedNormal,
    autoregressive_masks,
    mixture_gain,
)
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.evaluation import fit_posterior, quasi_normal
from dlgm_tutorial.networks import mlp

__all__ = ["AmortizedVAE", "AutoregressiveFlowVAE", "AutoregressiveStep", "AveragedPosterior", "EncoderMixture",
           "ExactGPEncoder", "FlowNormal", "GPPrediction", "HouseholderVAE", "Inference", "InstanceOptimum",
           "IterativeInferenceVAE", "RandomEncoder", "RandomFunctions", "RandomInferenceVAE", "RecursiveMixtureVAE",
           "Refined", "RotatedNormal", "SemiAmortizedVAE", "VariationalLaplaceVAE", "WeightPosterior",
           "autoregressive_masks", "average_kl", "averaged_log_posterior", "gp_function_space", "gp_weight_space",
           "instance_optimum", "linear_average_bound", "linear_kernel", "mixture_gain", "rbf_kernel", "refine",
           "weight_kl"]

COVARIANCE = ("diagonal", "full", "none")
UNCERTAINTY = ("nats", "variance", "entropy")


# ---------------------------------------------------------------- random functions at the data, and what follows
class RandomFunctions(NamedTuple):
    """Normal laws of f(x) and g(x) at a batch of data, independent over latents: means and variances, [B, K] each."""

    mean_f: torch.Tensor
    mean_g: torch.Tensor
    var_f: torch.Tensor
    var_g: torch.Tensor


def _check_functions(mean_f, mean_g, var_f, var_g):
    if mean_f.shape == mean_g.shape == var_f.shape == var_g.shape and mean_f.numel():
        total = mean_f.sum() + mean_g.sum() + var_f.sum() + var_g.sum()
        if bool(torch.isfinite(total) & (torch.minimum(var_f.min(), var_g.min()) >= 0)):
            return  # the usual case, in few operations: this runs at each inference
    for name, value in (("mean_g", mean_g), ("var_f", var_f), ("var_g", var_g)):
        require(value.shape == mean_f.shape,
                f"{name} must have the shape of mean_f, {list(mean_f.shape)}, got {list(value.shape)}")
    for name, value in (("mean_f", mean_f), ("mean_g", mean_g), ("var_f", var_f), ("var_g", var_g)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity in "
                             f"{int((~torch.isfinite(value)).any(-1).sum())} of {value.shape[:-1].numel()} rows")
    for name, value in (("var_f", var_f), ("var_g", var_g)):
        require(bool((value >= 0).all()), f"{name} must not be negative, got a minimum of {value.min().item():g}")


def average_kl(functions):
    """E KL(N(f, exp(g)) || N(0, I)) over the random functions, in closed form: [B], in nats (eq-gp-average-kl).

    1/2 sum_j (mean_f^2 + var_f + exp(mean_g + var_g / 2) - 1 - mean_g), by E f^2 and the mean of a log-normal.
    functions: `RandomFunctions`, [B, K] each.
    """
    mean_f, mean_g, var_f, var_g = functions
    return 0.5 * (mean_f.square() + var_f + torch.expm1(mean_g + 0.5 * var_g) - mean_g).sum(-1)


def linear_average_bound(x, functions, weight, bias, noise_var):
    """The average bound E L(x; f, g) for a decoder weight z + bias with noise N(0, noise_var I): [B], in nats.

    The exactly solvable case (eq-gp-linear, eq-gp-linear-average): with Lambda = I + weight^T weight / noise_var, a
    random mean costs Lambda_jj var_f / 2 a latent, and a random log-variance, at its best mean, var_g / 4.
    x [B, D], functions: `RandomFunctions`, weight [D, K], bias [D], noise_var: a positive number.
    """
    check_positive(noise_var, "noise_var")
    mean_f, mean_g, var_f, var_g = functions
    rest = (x - bias - mean_f @ weight.mT).square().sum(-1)
    spread = (var_f + torch.exp(mean_g + 0.5 * var_g)) @ weight.square().sum(0)
    expected = -0.5 * ((rest + spread) / noise_var + x.shape[-1] * (LOG_2PI + math.log(noise_var)))
    return expected - average_kl(functions)


def _hermite(num_nodes, like):
    """Nodes and log-weights [H] of the Gauss-Hermite rule for a standard normal."""
    check_count(num_nodes, "num_nodes")
    matrix = torch.diag_embed(torch.arange(1, num_nodes, dtype=torch.float64).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(matrix + matrix.mT)  # Golub and Welsch
    return nodes.to(like), vectors[0].square().log().to(like)


def averaged_log_posterior(z, mean_f, mean_g, var_f, var_g, *, num_nodes=20):
    """log of the posterior averaged over the random encoders, at z [..., B, K]: [..., B], in nats.

    For each latent E_g N(z_j; mean_f, var_f + exp(g)), g ~ N(mean_g, var_g) (eq-gp-averaged-posterior): f is
    integrated out exactly, g by num_nodes Gauss-Hermite nodes, summed on the log scale; where var_g = 0 it is exact.
    mean_f, mean_g, var_f, var_g: [B, K]. Raises ValueError for shapes that differ, or values not finite or negative.

    >>> one = torch.ones(1, 1)
    >>> averaged_log_posterior(one, one, 0 * one, 0 * one, 0 * one)  # log N(1; 1, 1)
    tensor([-0.9189])
    """
    _check_functions(mean_f, mean_g, var_f, var_g)
    nodes, log_weight = _hermite(num_nodes, mean_f)
    var = var_f + torch.exp(mean_g + var_g.sqrt() * nodes[:, None, None])  # [H, B, K]
    squares = (z - mean_f).square()[..., None, :, :] / var
    terms = log_weight[:, None, None] - 0.5 * (squares + var.log() + LOG_2PI)
    return torch.logsumexp(terms, -3).sum(-1)


class AveragedPosterior:
    """q averaged over the random encoders: a scale mixture of normals, independent over latents (test-time posterior).

    mean_f, mean_g, var_f, var_g: [B, K]; num_nodes: of the quadrature over g. Its mean is mean_f, its variance
    var_f + exp(mean_g + var_g / 2); with var_g > 0 its tails are heavier than a normal's
    (eq-gp-averaged-moments).
    """

    def __init__(self, mean_f, mean_g, var_f, var_g, *, num_nodes=20):
        _check_functions(mean_f, mean_g, var_f, var_g)
        self.functions, self.num_nodes = RandomFunctions(mean_f, mean_g, var_f, var_g), num_nodes

    @property
    def mean(self):
        return self.functions.mean_f

    @property
    def variance(self):
        """Variance of each latent, [B, K]."""
        _, mean_g, var_f, var_g = self.functions
        return var_f + torch.exp(mean_g + 0.5 * var_g)

    def fourth_moment(self):
        """Fourth central moment of each latent, 3 E (var_f + exp(g))^2: [B, K]."""
        _, mean_g, var_f, var_g = self.functions
        return 3 * (var_f.square() + 2 * var_f * torch.exp(mean_g + 0.5 * var_g) + torch.exp(2 * (mean_g + var_g)))

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw sample_shape + [B, K]; noise: {"g": ..., "z": ...}, standard normal arrays of that shape."""
        mean_f, mean_g, var_f, var_g = self.functions
        shape = tuple(sample_shape) + tuple(mean_f.shape)
        if noise is None:
            noise = {name: draw_normal(shape, mean_f, generator) for name in ("g", "z")}
        for name in ("g", "z"):
            require(name in noise and tuple(noise[name].shape) == shape, f"noise must hold 'g' and 'z' of shape "
                    f"{list(shape)}, got { {key: list(value.shape) for key, value in noise.items()} }")
        g = mean_g + var_g.sqrt() * noise["g"]
        return mean_f + (var_f + g.exp()).sqrt() * noise["z"]

    def log_prob(self, z):
        """Log-density in nats, [..., B, K] -> [..., B]: `averaged_log_posterior`."""
        return averaged_log_posterior(z, *self.functions, num_nodes=self.num_nodes)

    def entropy(self, num_points=64):
        """Entropy in nats by quadrature, num_points for z under each node of g: [B]."""
        mean_f, mean_g, var_f, var_g = self.functions
        nodes, log_weight = _hermite(self.num_nodes, mean_f)
        points, log_point_weight = _hermite(num_points, mean_f)
        scale = (var_f + torch.exp(mean_g + var_g.sqrt() * nodes[:, None, None])).sqrt()  # [H, B, K]
        total = 0.0
        for j in range(mean_f.shape[-1]):  # one latent at a time: the product of the grids of all would not fit
            part = slice(j, j + 1)
            z = mean_f[:, part] + scale[..., part] * points[:, None, None, None]
            weight = (log_weight[:, None] + log_point_weight[:, None, None]).exp()
            log_prob = averaged_log_posterior(z, *(v[:, part] for v in self.functions), num_nodes=self.num_nodes)
            total = total - (weight * log_prob).sum((0, 1))
        return total

    def mutual_information(self):
        """I(z; W, U | x), what averaging adds to the entropy, and to the bound: [B], in nats (eq-gp-information).

        H(averaged) - E H(q | W, U); for var_g = 0 it is 1/2 sum_j log(1 + var_f exp(-mean_g)).
        """
        return self.entropy() - 0.5 * (self.functions.mean_g + 1 + LOG_2PI).sum(-1)

    def plug_in(self):
        """The posterior of the mean encoder, N(mean_f, exp(mean_g)): a `DiagonalNormal`."""
        return DiagonalNormal(self.functions.mean_f, self.functions.mean_g)

    def matched(self):
        """The `DiagonalNormal` with the same mean and variance."""
        return DiagonalNormal(self.mean, self.variance.log())


# ---------------------------------------------------------------- the random encoder
def weight_kl(mean, prior_var, *, log_var=None, scale_tril=None):
    """KL(q || N(0, prior_var I)) of independent weight vectors, in nats: a scalar, summed (eq-gp-weight-kl).

    mean [K, m]; log_var [K, m] for diagonal covariances, or scale_tril [K, m, m], lower triangular, for full ones;
    with neither, the weights are a point and this is minus the log prior up to a constant, |mean|^2 / (2 prior_var).
    prior_var: a positive number. It scales neither with the batch nor with the data.
    """
    check_positive(prior_var, "prior_var")
    squares = mean.square().sum()
    if log_var is None and scale_tril is None:
        return 0.5 * squares / prior_var
    if scale_tril is None:
        trace, log_det = log_var.exp().sum(), log_var.sum()
    else:
        trace = scale_tril.square().sum()
        log_det = 2 * torch.diagonal(scale_tril, dim1=-2, dim2=-1).log().sum()
    return 0.5 * ((trace + squares) / prior_var + mean.numel() * (math.log(prior_var) - 1) - log_det)


class _Weights(nn.Module):
    """Normal law of K weight vectors of m features: q(W) or q(U), started at mean 0."""

    def __init__(self, latent_dim, num_features, covariance, prior_var, initial_log_var):
        super().__init__()
        self.covariance, self.prior_var = covariance, prior_var
        self.mean = nn.Parameter(torch.zeros(latent_dim, num_features))
        if covariance == "diagonal":
            self.log_var = nn.Parameter(torch.full((latent_dim, num_features), float(initial_log_var)))
        elif covariance == "full":  # the diagonal is kept as its logarithm
            start = torch.eye(num_features) * (0.5 * initial_log_var)
            self.raw = nn.Parameter(start.repeat(latent_dim, 1, 1))

    def scale_tril(self):
        """Factors L [K, m, m] of the covariances L L^T."""
        diagonal = torch.diagonal(self.raw, dim1=-2, dim2=-1).exp()
        return self.raw.tril(-1) + torch.diag_embed(diagonal)

    def forward(self, psi):
        """Mean and variance of the weights' linear functions at psi [B, m]: two [B, K]."""
        mean = psi @ self.mean.mT
        if self.covariance == "diagonal":
            return mean, psi.square() @ self.log_var.exp().mT
        if self.covariance == "full":  # |L^T psi|^2: never negative
            return mean, torch.einsum("bm,kmn->bkn", psi, self.scale_tril()).square().sum(-1)
        return mean, torch.zeros_like(mean)

    def kl(self):
        extra = {"diagonal": lambda: {"log_var": self.log_var}, "full": lambda: {"scale_tril": self.scale_tril()},
                 "none": dict}[self.covariance]()
        return weight_kl(self.mean, self.prior_var, **extra)


class RandomEncoder(nn.Module):
    """An encoder whose mean and log-variance are Gaussian processes with a linear deep kernel.

    f = b + W psi, g = c + U psi; q(W, U) is normal, independent over latents (eq-gp-random-encoder). The trunk
    (hidden layers, tanh on the last) feeds the linear heads b, c and the features psi = (trunk, 1) / sqrt(m).

    data_dim: D, latent_dim: K, hidden_dims: widths of the trunk, the last gives m - 1; covariance of each weight
    vector: "diagonal" (O(B K m) a pass), "full" (O(B K m^2), the exact Gaussian process for a fixed decoder) or "none":
    the same heads without randomness, the control. prior_w, prior_u: prior *variances* of the weights;
    train_base=False: b, c and the trunk stay as they are. base: a module [B, D] -> [B, 2 K] for (b, c), and features:
    a module [B, D] -> [B, m] for psi, used as they are, together. initial_log_var: where the weights' log-variances
    start (they move slowly: give them a larger learning rate, see `RandomInferenceVAE.parameter_groups`).

    Call it on x [B, D] for `RandomFunctions`: the whole inference is one pass.

    >>> [v.shape for v in RandomEncoder(6, 2, (8,))(torch.zeros(5, 6))][0]
    torch.Size([5, 2])
    """

    def __init__(self, data_dim, latent_dim, hidden_dims=(200, 200), *, covariance="diagonal", prior_w=1.0, prior_u=1.0,
                 train_base=True, base=None, features=None, activation="relu", initial_log_var=-4.0):
        super().__init__()
        check_count(data_dim, "data_dim")
        check_count(latent_dim, "latent_dim")
        require(covariance in COVARIANCE,
                f"covariance must be one of {', '.join(map(repr, COVARIANCE))}, got {covariance!r}")
        require((base is None) == (features is None), "base and features must be given together, or neither")
        self.data_dim, self.latent_dim, self.covariance = data_dim, latent_dim, covariance
        prior_w, prior_u = check_positive(prior_w, "prior_w"), check_positive(prior_u, "prior_u")
        if features is None:
            hidden_dims = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
            self.trunk = trunk(data_dim, hidden_dims, activation)
            self.head = mlp([hidden_dims[-1], 2 * latent_dim])
            num_features = hidden_dims[-1] + 1
        else:
            self.base_module, self.feature_module = base, features
            like = next((p for p in [*features.parameters(), *features.buffers()]), torch.zeros(0))
            with torch.no_grad():
                num_features = features(torch.zeros(1, data_dim).to(like)).shape[-1]
        if not train_base:
            for module in (("trunk", "head") if features is None else ("base_module", "feature_module")):
                getattr(self, module).requires_grad_(False)
        self.weights_w = _Weights(latent_dim, num_features, covariance, prior_w, initial_log_var)
        self.weights_u = _Weights(latent_dim, num_features, covariance, prior_u, initial_log_var)

    def base_and_features(self, x):
        """(b, c) as one [B, 2 K], and psi [B, m]."""
        if hasattr(self, "feature_module"):
            return self.base_module(x), self.feature_module(x)
        h = self.trunk(x)
        psi = torch.cat([h, torch.ones_like(h[..., :1])], -1) / math.sqrt(h.shape[-1] + 1)
        return self.head(h), psi

    def features(self, x):
        """psi(x), [B, m]: the last hidden layer and a constant, divided by sqrt(m) so that |psi| is of order 1."""
        return self.base_and_features(x)[1]

    def forward(self, x):
        require(torch.is_tensor(x) and x.ndim == 2 and x.shape[1] == self.data_dim,
                f"x must have shape [B, {self.data_dim}], got {list(getattr(x, 'shape', []))}")
        if not hasattr(self, "feature_module") and self.covariance != "full":
            return self._fused(x)
        base, psi = self.base_and_features(x)
        b, c = base.chunk(2, -1)
        shift_f, var_f = self.weights_w(psi)
        shift_g, var_g = self.weights_u(psi)
        return RandomFunctions(b + shift_f, c + shift_g, var_f, var_g)

    def _fused(self, x):
        """The same with two matrix products: base and weights read the same h, and W and U the same squares of it."""
        h, parts = self.trunk(x), (self.weights_w, self.weights_u)
        scale = 1 / math.sqrt(h.shape[-1] + 1)
        linear, mean = self.head[-1], scale * torch.cat([part.mean for part in parts])
        mean_f, mean_g = nn.functional.linear(h, linear.weight + mean[:, :-1], linear.bias + mean[:, -1]).chunk(2, -1)
        if self.covariance == "none":
            return RandomFunctions(mean_f, mean_g, torch.zeros_like(mean_f), torch.zeros_like(mean_g))
        var = scale**2 * torch.cat([part.log_var for part in parts]).exp()
        var_f, var_g = nn.functional.linear(h.square(), var[:, :-1], var[:, -1]).chunk(2, -1)
        return RandomFunctions(mean_f, mean_g, var_f, var_g)

    def kl(self):
        """KL(q(W, U) || p(W, U)) of the whole encoder, a scalar in nats; "none": the ridge |M|^2 / (2 prior)."""
        return self.weights_w.kl() + self.weights_u.kl()

    def posterior(self, x):
        """The posterior averaged over the random encoders: `AveragedPosterior`; "none": a `DiagonalNormal`."""
        functions = self(x)
        if self.covariance == "none":
            return DiagonalNormal(functions.mean_f, functions.mean_g)
        return AveragedPosterior(*functions)

    def uncertainty(self, x, kind="nats"):
        """How uncertain the encoder is about its own output at each row of x [B, D]: [B] (eq-gp-uncertainty).

        kind "nats": 1/2 sum_j var_f exp(-mean_g) + 1/4 sum_j var_g, the bound that a random draw of the encoder loses
        to second order, near the optimum of a near-linear decoder; it does not change when a latent is rescaled.
        "variance": sum_j var_f. "entropy": that of the averaged posterior. Raises ValueError where it is not finite.
        """
        return uncertainty_of(self(x), kind)


def uncertainty_of(functions, kind="nats"):
    """The uncertainty of `RandomFunctions`, [B]: see `RandomEncoder.uncertainty`."""
    require(kind in UNCERTAINTY, f"kind must be one of {', '.join(map(repr, UNCERTAINTY))}, got {kind!r}")
    mean_f, mean_g, var_f, var_g = functions
    if kind == "entropy":
        return AveragedPosterior(*functions).entropy()
    value = var_f.sum(-1) if kind == "variance" else (0.5 * var_f * torch.exp(-mean_g) + 0.25 * var_g).sum(-1)
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"the uncertainty is not finite for {int(bad.sum())} of {len(bad)} rows of x, first row "
                         f"{row}: mean_g from {mean_g[row].min().item():g} to {mean_g[row].max().item():g}, var_f up "
                         f"to {var_f[row].max().item():g}, var_g up to {var_g[row].max().item():g}")
    return value


class Inference(NamedTuple):
    """What one pass gives: the posterior of each datum, and the encoder's uncertainty about it, [B] in nats."""

    posterior: object
    uncertainty: torch.Tensor


class RandomInferenceVAE(AmortizedVAE):
    """A variational autoencoder with a `RandomEncoder`, trained on the average bound (eq-gp-objective).

    bound(x) = J_n - beta KL(q(W, U) || p(W, U)) / num_data, where J_n is the bound of a random encoder averaged over
    q(W, U). Summed over the data with beta = 1 it is a lower bound of the data's log-likelihood, for every q(W, U).

    num_data: N, the size of the training set (the divergence is divided by N, not by the batch); beta: its weight;
    other arguments: of `AmortizedVAE` and `RandomEncoder`. covariance="none": deterministic heads with a ridge penalty.
    """

    def __init__(self, data_dim, latent_dim, hidden_dims=(200, 200), *, num_data, beta=1.0, train_base=True,
                 covariance="diagonal", prior_w=1.0, prior_u=1.0, base=None, features=None, initial_log_var=-4.0,
                 **options):
        require("encoder" not in options, "encoder: give base and features instead")
        hidden_dims = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        encoder_dims = options.pop("encoder_dims", None) or hidden_dims[::-1]
        encoder = RandomEncoder(data_dim, latent_dim, encoder_dims, covariance=covariance, prior_w=prior_w,
                                prior_u=prior_u, train_base=train_base, base=base, features=features,
                                activation=options.get("activation", "relu"), initial_log_var=initial_log_var)
        super().__init__(data_dim, latent_dim, hidden_dims, encoder=encoder, **options)
        self.num_data = check_count(num_data, "num_data")
        require(isinstance(beta, (int, float)) and 0 <= beta < math.inf,
                f"beta must be a finite number of at least 0, got {beta!r}")
        self.beta = float(beta)

    def parameter_groups(self, lr, factor=10.0):
        """Groups for `fit`: the weights' log-variances learn with `factor` times lr (a number or function of the step).

        They start at initial_log_var and Adam moves them by about lr a step, so that with lr alone they have not
        arrived when everything else has.
        """
        fast = {id(p) for name, p in self.encoder.named_parameters() if name.endswith(("log_var", "raw"))}
        faster = (lambda step: factor * lr(step)) if callable(lr) else factor * lr
        parts = ([p for p in self.parameters() if id(p) not in fast], [p for p in self.parameters() if id(p) in fast])
        return [{"params": part, "lr": rate} for part, rate in zip(parts, (lr, faster), strict=True) if part]

    # ---- inference
    def encode(self, x):
        """Mean and log-variance of the mean encoder: two [B, K]."""
        functions = self.encoder(self._checked(x))
        return functions.mean_f, functions.mean_g

    def posterior(self, x):
        """The posterior averaged over the random encoders: `AveragedPosterior`, or for "none" a `DiagonalNormal`."""
        return self.encoder.posterior(self._checked(x))

    def infer(self, x):
        """One pass: `Inference` with the averaged posterior and the uncertainty [B] in nats."""
        functions = self.encoder(self._checked(x))
        return Inference(AveragedPosterior(*functions), uncertainty_of(functions))

    def uncertainty(self, x, kind="nats"):
        """How uncertain the encoder is at x [B, D]: [B]; kind as in `RandomEncoder.uncertainty`."""
        return self.encoder.uncertainty(self._checked(x), kind)

    # ---- bounds
    def noise_spec(self, batch_size, num_samples=1):
        """{name: (kind, shape, batch axis)} of the noise that `bound` takes; "g" is there where g is random."""
        spec = super().noise_spec(batch_size, num_samples)
        return spec if self.encoder.covariance == "none" else {**spec, "g": spec["z"]}

    def _average(self, x, functions, noise):
        mean_f, mean_g, var_f, var_g = functions
        g = mean_g + var_g.sqrt() * noise["g"] if "g" in noise else mean_g
        z = mean_f + (var_f + g.exp()).sqrt() * noise["z"]  # f is integrated out
        return self.observation(z).log_prob(x).mean(0) - average_kl(functions)

    def average_bound(self, x, *, num_samples=1, noise=None, generator=None):
        """J_n, the bound of a random encoder averaged over q(W, U): [B], in nats (eq-gp-average-bound)."""
        functions = self.encoder(self._checked(x))
        return self._average(x, functions, self._noise(len(x), num_samples, noise, generator, functions.mean_f))

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """J_n - beta KL / num_data of each row of x: [B], in nats. noise: {"g": [S, B, K], "z": [S, B, K]}."""
        average = self.average_bound(x, num_samples=num_samples, noise=noise, generator=generator)
        return average - self.beta / self.num_data * self.encoder.kl()

    def mean_bound(self, x, *, num_samples=1, noise=None, generator=None):
        """The bound of the mean encoder N(mean_f, exp(mean_g)): [B], in nats. noise: [S, B, K], or a dict with "z"."""
        mean, log_var = self.encode(x)
        if noise is None:
            noise = draw_normal((num_samples, *mean.shape), mean, generator)
        return self._gaussian_bound(x, mean, log_var, noise["z"] if isinstance(noise, dict) else noise)

    def averaged_bound(self, x, *, num_samples=1, noise=None, generator=None):
        """The bound *of* the averaged posterior, its density by quadrature: [B], in nats (eq-gp-two-bounds).

        Above `average_bound` by the mutual information of z and the weights; do not train on it: the split between the
        width of z and the uncertainty about the encoder would be decided by the divergence alone.
        """
        posterior = self.posterior(x)
        noise = self._noise(len(x), num_samples, noise, generator, posterior.mean)
        drawn = noise if isinstance(posterior, AveragedPosterior) else noise["z"]
        z = posterior.rsample(noise["z"].shape[:1], noise=drawn)
        return (self.log_joint(x, z) - posterior.log_prob(z)).mean(0)


# ---------------------------------------------------------------- the exact Gaussian process, for few data
class InstanceOptimum(NamedTuple):
    """The best diagonal normal of each datum: mean, log_var [B, K], its bound [B], and the bound's curvatures.

    noise_f, noise_g [B, K]: one over minus the second derivative of the bound in the mean and in the log-variance, the
    noise variances with which these are observations of the encoder's functions (2 for g in the linear case).
    """

    mean: torch.Tensor
    log_var: torch.Tensor
    bound: torch.Tensor
    noise_f: torch.Tensor
    noise_g: torch.Tensor


def instance_optimum(log_joint, start, *, num_samples=256, num_steps=300, lr=0.1, seed=0, min_curvature=0.05):
    """Optimise a diagonal normal for each datum, all at once: `InstanceOptimum` (eq-gp-curvature, eq-gp-targets).

    log_joint: maps z [S, B, K] to [S, B]; start: a `DiagonalNormal` over [B, K]; num_samples, num_steps, lr, seed: of
    `evaluation.fit_posterior`. At the optimum the curvature in the mean is -exp(-log_var); in the log-variance it is
    found by automatic differentiation, and minus it is held above min_curvature.
    """
    best, bound = fit_posterior(log_joint, start, num_samples=num_samples, num_steps=num_steps, lr=lr, seed=seed)
    mean, log_var = best.loc.detach(), best.log_var.detach().requires_grad_()
    noise = quasi_normal(num_samples, mean.shape[-1], seed=seed, dtype=mean.dtype, device=mean.device)[:, None]
    with torch.enable_grad():
        value = log_joint(mean + torch.exp(0.5 * log_var) * noise).mean(0) + 0.5 * log_var.sum(-1)
        slope, = torch.autograd.grad(value.sum(), log_var, create_graph=True)
        curvature = torch.stack([torch.autograd.grad(slope[:, j].sum(), log_var, retain_graph=True)[0][:, j]
                                 for j in range(mean.shape[-1])], -1)
    return InstanceOptimum(mean, log_var.detach(), bound, log_var.detach().exp(),
                           1 / (-curvature).clamp(min=min_curvature))


class ExactGPEncoder:
    """A random encoder with any kernel: exact regression on the best posteriors of N data, O(N^3) (teaching variant).

    base: maps x [B, D] to [B, 2 K], (b, c); x [N, D]; optimum: the `InstanceOptimum` of x; kernel: such as
    `rbf_kernel()`; features: maps x to the kernel's inputs [B, m] (default: x itself); jitter: relative, of the
    Cholesky factor. Call it on new x [M, D] for `RandomFunctions`. With a local kernel the variance returns to the
    prior's far from the data, which that of a linear kernel need not do. Raises ValueError for a singular kernel.
    """

    def __init__(self, base, x, optimum, *, kernel, features=None, jitter=1e-8):
        self.base, self.kernel, self.jitter = base, kernel, jitter
        self.features = features or (lambda rows: rows)
        require(x.ndim == 2 and len(x) == len(optimum.mean) and len(x) > 0,
                f"x must have shape [N, D] with N = {len(optimum.mean)} rows as the optimum, got {list(x.shape)}")
        with torch.no_grad():
            self.x, (b, c) = self.features(x), base(x).chunk(2, -1)
        self.rest_f, self.rest_g, self.optimum = optimum.mean - b, optimum.log_var - c, optimum
        self(x[:1])  # a singular kernel is found now

    @torch.no_grad()
    def __call__(self, x):
        b, c = self.base(x).chunk(2, -1)
        predict = lambda y, noise: gp_function_space(self.x, y, noise, self.features(x), kernel=self.kernel,
                                                     jitter=self.jitter)
        f, g = predict(self.rest_f, self.optimum.noise_f), predict(self.rest_g, self.optimum.noise_g)
        return RandomFunctions(b + f.mean, c + g.mean, f.var, g.var)

    def posterior(self, x):
        """The averaged posterior at x [M, D]: `AveragedPosterior`."""
        return AveragedPosterior(*self(x))

    def uncertainty(self, x, kind="nats"):
        """As `RandomEncoder.uncertainty`: x [M, D] -> [M]."""
        return uncertainty_of(self(x), kind)
