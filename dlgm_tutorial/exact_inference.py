"""Exact inference: factor analysis and probabilistic PCA, the deep latent Gaussian model with an affine decoder.

Chapter 1 of the book. z ~ N(0, I), x | z ~ N(W z + b, diag(noise_var)): posterior, evidence, bound and the law of
missing coordinates are closed forms of K x K algebra, and the parameters are learned by EM (factor analysis) or at once
(probabilistic PCA). Densities are per example, in nats. Parameters: weight [D, K], bias [D], noise_var [D] or a number.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from dlgm_tutorial.distributions import DiagonalNormal, FullNormal
from dlgm_tutorial.evaluation import Estimate

__all__ = ["EMResult", "LinearGaussian", "Selection", "em_step", "fit_factor_analysis", "fit_ppca",
           "select_num_latents"]

LOG_2PI = math.log(2 * math.pi)


def _require(ok, message):
    if not ok:
        raise ValueError(message)


def _precision_to_scale_tril(precision):
    """Lower triangular T with T T^T = precision^-1, [..., K, K], from one Cholesky factor of the flipped matrix."""
    upper = torch.linalg.cholesky(precision.flip((-2, -1))).flip((-2, -1))
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(upper.mT, eye.expand_as(precision), upper=False)


class LinearGaussian(nn.Module):
    """Factor analysis: z ~ N(0, I), x | z ~ N(W z + b, diag(noise_var)); one number as noise_var makes it PPCA.

    weight: [D, K]; bias: [D], zero where absent; noise_var: a positive number or [D], variances. `decoder` takes the
    place of weight and bias: an `nn.Linear`, or an `nn.Sequential` that holds one and nothing else; it is used as it
    is, and not trained with `freeze_decoder=True`.

    Every method that takes x [B, D] also takes observed, a mask [B, D] or [D], true where a value was seen: what was
    not is integrated out, exactly, and may hold anything, NaN too. Each row may have a mask of its own.

    Raises ValueError where shapes do not fit, noise_var is not positive, or an observed value is not finite.

    >>> model = LinearGaussian(torch.tensor([[2.0], [1.0]]), noise_var=1.0)
    >>> model.posterior(torch.tensor([[2.0, 1.0]])).mean
    tensor([[0.8333]], grad_fn=...)
    >>> model.log_likelihood(torch.tensor([[2.0, 1.0]])).standard_error
    tensor([0.])
    """

    def __init__(self, weight=None, bias=None, noise_var=1.0, *, decoder=None, freeze_decoder=False):
        super().__init__()
        if decoder is None:
            _require(weight is not None and weight.ndim == 2 and weight.shape[0] > 0,
                     f"weight must have shape [D, K], got {None if weight is None else list(weight.shape)}")
            _require(bias is None or bias.shape == weight.shape[:1],
                     f"bias must have shape {list(weight.shape[:1])}, got {None if bias is None else list(bias.shape)}")
            decoder = nn.Linear(1, len(weight), device="meta")  # no random numbers are drawn for what is replaced
            decoder.in_features = weight.shape[1]
            decoder.weight = nn.Parameter(weight.detach().clone())
            decoder.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach().clone())
        else:
            _require(weight is None and bias is None, "weight and bias must be absent where decoder is given")
        layers = list(decoder) if isinstance(decoder, nn.Sequential) else [decoder]
        if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is None:
            raise TypeError(f"decoder must be one nn.Linear with a bias, got {decoder}")
        self.decoder = decoder.requires_grad_(not freeze_decoder)
        noise_var = torch.as_tensor(noise_var, dtype=self.weight.dtype, device=self.weight.device)
        _require(noise_var.shape in (torch.Size([]), self.bias.shape),
                 f"noise_var must be a number or have shape {list(self.bias.shape)}, got {list(noise_var.shape)}")
        _require(bool((noise_var > 0).all() & torch.isfinite(noise_var).all()), "noise_var must be positive and finite")
        self.log_noise_var = nn.Parameter(noise_var.log(), requires_grad=not freeze_decoder)

    @property
    def _linear(self):
        return self.decoder[0] if isinstance(self.decoder, nn.Sequential) else self.decoder

    @property
    def weight(self):
        """W, [D, K]."""
        return self._linear.weight

    @property
    def bias(self):
        """b, [D]."""
        return self._linear.bias

    @property
    def noise_var(self):
        """Variances of the noise, [D] (equal ones where the model has one for all)."""
        return self.log_noise_var.exp().expand(self.bias.shape)

    def covariance(self):
        """Covariance of x, W W^T + diag(noise_var) (eq-ei-marginal), [D, D]."""
        return self.weight @ self.weight.mT + torch.diag(self.noise_var)

    # --- Inference

    def log_joint(self, x, z, *, coordinates="noise", observed=None):
        """Evaluate log p(x, z) of the observed coordinates: x [B, D], z [S, B, K] -> [S, B].

        With one layer of latents, "noise" and "state" coordinates are the same.
        """
        _require(coordinates in ("noise", "state"), f"coordinates must be 'noise' or 'state', got {coordinates!r}")
        x, observed = self._check(x, observed)
        _require(z.ndim == 3 and z.shape[1:] == (len(x), self.weight.shape[1]),
                 f"z must have shape [S, {len(x)}, {self.weight.shape[1]}], got {list(z.shape)}")
        return self._log_joint(x, z, observed)

    def posterior(self, x, observed=None):
        """Posterior N(m, Lambda^-1) of the latents (eq-ei-posterior): x [B, D] -> FullNormal over [B, K]."""
        x, observed = self._check(x, observed)
        loc, scale_tril = self._posterior(x, observed)
        return FullNormal(loc, scale_tril.expand(*loc.shape, loc.shape[-1]))

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None, observed=None):
        """Evaluate log p(x), exactly (eq-ei-evidence): x [B, D] -> Estimate with value [B] and standard_error zero.

        num_samples, proposal and generator are there for the contract of all models and change nothing: the posterior
        is the perfect proposal, one sample of it is enough, so ess is 1. chunk: rows at a time (a mask costs K^2
        numbers a row).
        """
        x, observed = self._check(x, observed)
        rows = torch.arange(len(x), device=x.device).split(chunk or max(len(x), 1))
        per_row = observed is not None and len(observed) == len(x)
        value = torch.cat([self._evidence(x[r], observed[r] if per_row else observed) for r in rows])
        return Estimate(value, torch.zeros_like(value), torch.ones_like(value))

    def bound(self, x, *, num_samples=1, noise=None, generator=None, observed=None):
        """Evaluate what training maximises: here log p(x) itself (eq-ei-evidence), x [B, D] -> [B]."""
        return self._evidence(*self._check(x, observed))

    def noise_spec(self, batch_size, num_samples=1):
        """Return {}: the bound of this model needs no noise."""
        return {}

    def elbo(self, x, loc, cov, observed=None):
        """Evaluate E_q log p(x, z) + H(q) for q = N(loc, cov) in closed form (eq-ei-elbo-closed).

        x [B, D], loc [B, K], cov [K, K] or [B, K, K] -> [B]. It is log p(x) - KL(q || posterior): never above log p(x).
        """
        x, observed = self._check(x, observed)
        precision = self._precision(observed)
        _require(loc.shape == (len(x), self.weight.shape[1]),
                 f"loc must have shape {[len(x), self.weight.shape[1]]}, got {list(loc.shape)}")
        _require(cov.shape[-2:] == precision.shape[-2:], f"cov must have shape [..., K, K], got {list(cov.shape)}")
        at_mean = self._log_joint(x, loc[None], observed)[0]
        log_det = 2 * torch.linalg.cholesky(cov).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        curvature = (precision * cov).sum((-2, -1))
        return at_mean + 0.5 * (loc.shape[-1] * (1 + LOG_2PI) + log_det - curvature)

    def mean_field(self, x, observed=None):
        """Best approximation with independent latents: mean m, variances 1 / Lambda_kk (eq-ei-mean-field).

        x [B, D] -> DiagonalNormal over [B, K].
        """
        x, observed = self._check(x, observed)
        loc = self._posterior(x, observed)[0]
        diagonal = self._precision(observed).diagonal(dim1=-2, dim2=-1)
        return DiagonalNormal(loc, -diagonal.log().expand(loc.shape))

    def mean_field_gap(self, x, observed=None):
        """Evaluate its cost, 1/2 (sum_k log Lambda_kk - log |Lambda|) nats (eq-ei-mean-field-gap): x [B, D] -> [B].

        It depends on what was observed, not on the values seen there.
        """
        x, observed = self._check(x, observed)
        precision = self._precision(observed)
        log_det = 2 * torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        gap = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - log_det)
        return gap.expand(len(x))

    # --- Generation, reconstruction, missing data

    def sample_latents(self, num, *, generator=None):
        """Draw z from the prior, [num, K]."""
        return torch.randn(num, self.weight.shape[1], generator=generator, dtype=self.weight.dtype,
                           device=self.weight.device)

    def sample(self, num, *, generator=None):
        """Draw x from the model, noise included, [num, D]."""
        mean = self.decoder(self.sample_latents(num, generator=generator))
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.noise_var.sqrt() * noise

    def reconstruct(self, x, *, num_samples=1, generator=None, observed=None):
        """Mean of p(x' | z) over the posterior, W m + b: x [B, D] -> [B, D], exact whatever num_samples is.

        At a coordinate that was not observed this is its conditional mean given those that were.
        """
        x, observed = self._check(x, observed)
        return self.decoder(self._posterior(x, observed)[0])

    def impute(self, x, observed):
        """Mean and variance of each coordinate given the observed ones (eq-ei-missing): x [B, D] -> two of [B, D].

        Observed coordinates come back as they are, with variance zero.
        """
        x, observed = self._check(x, observed)
        loc, scale_tril = self._posterior(x, observed)
        variance = (self.weight @ scale_tril).square().sum(-1) + self.noise_var
        return torch.where(observed, x, self.decoder(loc)), torch.where(observed, 0.0, variance).expand(x.shape)

    # --- The algebra

    def _check(self, x, observed):
        """Validate x [B, D] and the mask; unobserved values become the bias, where their residual is zero."""
        num = len(self.bias)
        _require(x.ndim == 2 and x.shape[1] == num, f"x must have shape [B, {num}], got {list(x.shape)}")
        if observed is not None:
            if observed.dtype != torch.bool:
                raise TypeError(f"observed must be a mask of booleans, got {observed.dtype}")
            _require(observed.shape in (x.shape, x.shape[1:]),
                     f"observed must have shape {list(x.shape)} or [{num}], got {list(observed.shape)}")
            observed = observed[None] if observed.ndim == 1 else observed  # [1, D]: one precision for all rows
            x = torch.where(observed, x, self.bias.detach())
        _require(bool(torch.isfinite(x).all()), "x must be finite where it is observed, got NaN or infinity")
        return x, observed

    def _residual(self, x, mean, observed):
        return x - mean if observed is None else torch.where(observed, x - mean, torch.zeros_like(x))

    def _log_joint(self, x, z, observed):
        squares = (self._residual(x, self.decoder(z), observed).square() / self.noise_var).sum(-1)
        if observed is None:
            constant = self.noise_var.log().sum() + x.shape[1] * LOG_2PI
        else:
            constant = torch.where(observed, self.noise_var.log() + LOG_2PI, torch.zeros_like(x)).sum(-1)
        return -0.5 * (squares + constant + z.square().sum(-1) + z.shape[-1] * LOG_2PI)

    def _precision(self, observed):
        """Lambda = I + W^T diag(observed / noise_var) W (eq-ei-posterior): [K, K], or [B, K, K] by one product."""
        weight, (num_data, num_latents) = self.weight, self.weight.shape
        eye = torch.eye(num_latents, dtype=weight.dtype, device=weight.device)
        scaled = weight / self.noise_var[:, None]
        if observed is None:
            return eye + weight.mT @ scaled
        outer = (weight[:, :, None] * scaled[:, None, :]).reshape(num_data, num_latents**2)
        return eye + (observed.to(weight.dtype) @ outer).reshape(len(observed), num_latents, num_latents)

    def _posterior(self, x, observed):
        """Mean [B, K] and lower triangular root of the covariance, [K, K] or [B, K, K]."""
        scale_tril = _precision_to_scale_tril(self._precision(observed))
        evidence = self._residual(x, self.bias, observed) @ (self.weight / self.noise_var[:, None])
        if observed is None:
            return evidence @ (scale_tril @ scale_tril.mT), scale_tril
        return (scale_tril @ (scale_tril.mT @ evidence[..., None])).squeeze(-1), scale_tril

    def _evidence(self, x, observed):
        """log p(x) = log p(x, m) + K/2 log 2 pi - 1/2 log |Lambda|: residuals at m, so nothing large is subtracted."""
        loc, scale_tril = self._posterior(x, observed)
        log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self._log_joint(x, loc[None], observed)[0] + 0.5 * loc.shape[-1] * LOG_2PI + log_det


# --- Learning

class EMResult(NamedTuple):
    """What a fit returns: the model, and log_likelihoods [T], mean log p(x) in nats before each step and at the end."""

    model: LinearGaussian
    log_likelihoods: torch.Tensor


def em_step(weight, noise_var, covariance, *, noise="diagonal", min_noise_var=0.0, expand=False):
    """Take one EM step from the data's covariance alone (eq-ei-em-weight, eq-ei-em-noise).

    weight [..., D, K], noise_var [..., D], covariance [D, D] (about the data's mean, divided by N); noise: "diagonal"
    for factor analysis, "isotropic" for PPCA; min_noise_var: floor of the variances. Leading dimensions are separate
    problems, solved side by side. Returns (weight, noise_var, log_likelihood [...]): the new parameters, and the mean
    of log p(x) in nats at the old ones. The cost is D^2 K, whatever the number of data.

    expand: let the prior's covariance be learnt too, then take it into the weights: W L with L L^T the mean of
    E z z^T. The likelihood still never falls, the maximum is the same, and where the weights start at a wrong length
    it is reached in a hundredth of the steps. Source: Liu, Rubin and Wu (1998), parameter-expanded EM.
    """
    num_data, num_latents = weight.shape[-2:]
    scaled = weight / noise_var[..., None]
    eye = torch.eye(num_latents, dtype=weight.dtype, device=weight.device)
    root = torch.linalg.cholesky(eye + weight.mT @ scaled)
    posterior_cov = torch.cholesky_inverse(root)
    cross = covariance @ (scaled @ posterior_cov)  # mean of (x - b) m^T, [..., D, K]
    second_moment = posterior_cov + posterior_cov @ (scaled.mT @ cross)  # mean of E z z^T
    total = covariance.diagonal()
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + noise_var.log().sum(-1)
    squares = (total / noise_var).sum(-1) - (cross * scaled).sum((-2, -1))
    log_likelihood = -0.5 * (num_data * LOG_2PI + log_det + squares)
    length = torch.linalg.cholesky(second_moment)
    weight = torch.cholesky_solve(cross.mT, length).mT
    noise_var = total - (weight * cross).sum(-1)
    if expand:
        weight = weight @ length
    if noise == "isotropic":
        noise_var = noise_var.mean(-1, keepdim=True).expand(noise_var.shape)
    return weight, noise_var.clamp(min=min_noise_var), log_likelihood


def _moments(x, num_latents):
    _require(isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 2 and len(x) >= 2,
             f"x must be a tensor of floats [N, D] with N >= 2, got {type(x).__name__} {list(getattr(x, 'shape', []))}")
    _require(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity")
    _require(0 <= num_latents < x.shape[1], f"num_latents must be from 0 to {x.shape[1] - 1} for data of dimension "
                                            f"{x.shape[1]}, got {num_latents}")
    mean = x.mean(0, dtype=torch.float64)
    centred = x.double() - mean
    return mean, centred.mT @ centred / len(x)


def _principal(covariance, num_latents, min_noise_var):
    """Maximum-likelihood PPCA of a covariance (eq-ei-ppca): weight [D, K], noise_var (a number), mean of log p(x)."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)[:, :num_latents]
    noise_var = values[num_latents:].mean().clamp(min=min_noise_var)
    kept = values[:num_latents].clamp(min=noise_var)
    log_det = kept.log().sum() + (len(values) - num_latents) * noise_var.log()
    squares = (values[:num_latents] / kept).sum() + values[num_latents:].sum() / noise_var
    log_likelihood = -0.5 * (len(values) * LOG_2PI + log_det + squares)
    return vectors * (kept - noise_var).sqrt(), noise_var, log_likelihood


def fit_ppca(x, num_latents, *, min_noise_var=1e-6):
    """Fit probabilistic PCA at once, from the eigenvectors of the covariance (eq-ei-ppca).

    x: [N, D]; num_latents: K, from 0 to D - 1; min_noise_var: floor of the noise variance, in the units of x squared.
    Returns EMResult with log_likelihoods [1], the maximum. Source: Tipping and Bishop (1999), equations 7 and 8.
    Raises ValueError for bad shapes, values that are not finite, or K out of range.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
    >>> fit_ppca(x, 1).model.noise_var
    tensor([0.1250, 0.1250], grad_fn=...)
    """
    mean, covariance = _moments(x, num_latents)
    weight, noise_var, log_likelihood = _principal(covariance, num_latents, min_noise_var)
    model = LinearGaussian(weight.to(x.dtype), mean.to(x.dtype), noise_var.to(x.dtype))
    return EMResult(model, log_likelihood[None].to(x.dtype))


def fit_factor_analysis(x, num_latents, *, noise="diagonal", start=None, num_steps=1000, tol=1e-7, min_noise_var=1e-6,
                        expand=False):
    """Fit factor analysis by EM (eq-ei-em-weight, eq-ei-em-noise) on the mean and the covariance of the data.

    x: [N, D]; num_latents: K, from 0 to D - 1; noise: "diagonal", or "isotropic" for PPCA by EM; start: (weight [D, K],
    noise_var [D]), default the PPCA solution of the correlations, so that the units of the coordinates do not matter;
    num_steps: at most so many; tol: stop when a step gains less, in nats per example (0: never); min_noise_var: floor
    of the noise variances, in the units of x squared: the likelihood has no maximum where a coordinate can be predicted
    without error, a pixel that never changes being the plainest case; expand: parameter-expanded EM, often far fewer
    steps (see `em_step`).
    The work is in float64 whatever x is. Returns EMResult; log_likelihoods [T] never falls.
    Source: Rubin and Thayer (1982). Raises ValueError for bad shapes, values that are not finite, or K out of range.

    >>> x = torch.tensor([[2.0, 1.9, 2.1], [-1.0, -1.2, -0.9], [0.1, 0.0, -0.2], [-1.1, -0.7, -1.0]])
    >>> fit_factor_analysis(x, 1).model.weight.shape
    torch.Size([3, 1])
    """
    _require(noise in ("diagonal", "isotropic"), f"noise must be 'diagonal' or 'isotropic', got {noise!r}")
    _require(num_steps >= 0 and tol >= 0, f"num_steps and tol must not be negative, got {num_steps} and {tol}")
    mean, covariance = _moments(x, num_latents)
    if start is None:
        scale = covariance.diagonal().clamp(min=min_noise_var).sqrt()
        weight, noise_var, _ = _principal(covariance / torch.outer(scale, scale), num_latents, min_noise_var)
        weight, noise_var = scale[:, None] * weight, noise_var * scale.square()
        noise_var = noise_var if noise == "diagonal" else noise_var.mean().expand(len(mean))
    else:
        weight, noise_var = (torch.as_tensor(part, dtype=mean.dtype, device=mean.device) for part in start)
        _require(weight.shape == (len(mean), num_latents) and noise_var.shape == mean.shape,
                 f"start must be (weight [{len(mean)}, {num_latents}], noise_var [{len(mean)}]), "
                 f"got {list(weight.shape)} and {list(noise_var.shape)}")
    history = []
    for step in range(num_steps + 1):
        *new, value = em_step(weight, noise_var, covariance, noise=noise, min_noise_var=min_noise_var, expand=expand)
        history.append(value)
        if step == num_steps or (step > 0 and tol > 0 and value - history[-2] < tol):
            break
        weight, noise_var = new
    noise_var = noise_var[0] if noise == "isotropic" else noise_var
    model = LinearGaussian(weight.to(x.dtype), mean.to(x.dtype), noise_var.to(x.dtype))
    return EMResult(model, torch.stack(history).to(x.dtype))


class Selection(NamedTuple):
    """What `select_num_latents` returns: the best K, the candidates [C], and log p(x) held out, [C, N] in nats."""

    num_latents: int
    candidates: list
    log_likelihoods: torch.Tensor


def select_num_latents(x, candidates, *, num_folds=5, fit=fit_factor_analysis, generator=None):
    """Choose the number of latents by the held-out evidence, each example under a model that has not seen it.

    x: [N, D]; candidates: values of K; num_folds: parts that are left out in turn; fit: function (x, K) -> EMResult;
    generator: of the random division into folds. Returns Selection: the K with the largest mean, and all held-out
    log p(x), so that differences between candidates can be judged example by example.
    Raises ValueError without candidates or with fewer than two folds.
    """
    candidates = list(candidates)
    _require(len(candidates) > 0, "candidates is empty: there is nothing to choose from")
    _require(2 <= num_folds <= len(x), f"num_folds must be from 2 to N = {len(x)}, got {num_folds}")
    fold = torch.arange(len(x)) % num_folds
    fold = fold[torch.randperm(len(x), generator=generator)].to(x.device)
    held_out = x.new_empty(len(candidates), len(x))
    with torch.no_grad():
        for row, num_latents in enumerate(candidates):
            for part in range(num_folds):
                model = fit(x[fold != part], num_latents).model
                held_out[row, fold == part] = model.log_likelihood(x[fold == part]).value
    return Selection(candidates[int(held_out.mean(1).argmax())], candidates, held_out)
