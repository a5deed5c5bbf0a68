"""Gaussian-process regression twice, over functions and over weights, with a noise variance for each target."""

import math
from typing import NamedTuple

import torch

from dlgm_tutorial._gaussian_vae import LOG_2PI, check_positive, require

JITTER = {torch.float64: 1e-10, torch.float32: 1e-6}


class GPPrediction(NamedTuple):
    """Mean and variance of the function at new inputs, [M] or [M, J], and log p(y) in nats, a number or [J]."""

    mean: torch.Tensor
    var: torch.Tensor
    log_evidence: torch.Tensor


def rbf_kernel(scale=1.0, length=1.0):
    """The kernel scale^2 exp(-|a - b|^2 / (2 length^2)): a function of a [..., N, m] and b [..., M, m] to [..., N, M].

    scale, length: positive numbers.

    >>> rbf_kernel()(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([[1.]])
    """
    check_positive(scale, "scale")
    check_positive(length, "length")

    def kernel(a, b):
        squares = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
        return scale**2 * torch.exp(-0.5 * squares / length**2)
    return kernel


def linear_kernel(prior_var=1.0):
    """The kernel prior_var a . b of a linear function with weights N(0, prior_var I): shapes as in `rbf_kernel`.

    >>> linear_kernel(0.5)(torch.ones(1, 2), torch.ones(1, 2))
    tensor([[1.]])
    """
    check_positive(prior_var, "prior_var")
    return lambda a, b: prior_var * a @ b.mT


def factorise(matrix, name):
    """Lower Cholesky factor of symmetric matrices [..., n, n]; ValueError naming the matrix where one is singular."""
    require(bool(torch.isfinite(matrix).all()), f"{name} is not finite: check the inputs for NaN or infinity")
    factor, info = torch.linalg.cholesky_ex(matrix)
    # Rounding may let a singular matrix pass with a pivot that is nothing but rounding.
    diagonal = torch.diagonal(factor, dim1=-2, dim2=-1)
    smallest = (diagonal.square() / torch.diagonal(matrix, dim1=-2, dim2=-1)).min()
    if bool((info > 0).any()) or not smallest > 8 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps:
        raise ValueError(f"{name} is singular to working precision: inputs that repeat or nearly do need a positive "
                         "noise_var, or a jitter")
    return factor


def _targets(y, noise_var, num):
    """y as [J, N] and noise as [J or 1, N], with the checks that both spaces share."""
    require(torch.is_tensor(y) and y.ndim in (1, 2) and len(y) == num and num > 0,
            f"y must have shape [N] or [N, J] with N = {num} and at least one row, got {list(getattr(y, 'shape', []))}")
    noise = torch.as_tensor(noise_var, dtype=y.dtype, device=y.device)
    require(noise.shape in ((), (num,), y.shape),
            f"noise_var must be a number, [{num}] or of the shape of y, {list(y.shape)}, got {list(noise.shape)}")
    require(bool((noise >= 0).all()) and bool(noise.isfinite().all()),
            "noise_var must be finite and not negative, got values from "
            f"{noise.min().item():g} to {noise.max().item():g}")
    require(bool(y.isfinite().all()), "y must be finite, got NaN or infinity")
    noise = noise.expand(num) if noise.ndim == 0 else noise
    rows = lambda v: v.mT if v.ndim == 2 else v[None]
    return rows(y), rows(noise)


def gp_function_space(x, y, noise_var, x_new, *, kernel, jitter=0.0):
    """Condition a zero-mean Gaussian process on noisy values: `GPPrediction` at x_new (eq-gp-function-space).

    mean = k* (K + Sigma)^-1 y, variance = k** - k* (K + Sigma)^-1 k*, with Sigma = diag(noise_var).
    x [N, m], x_new [M, m]; y: [N], or [N, J] for J independent functions with one kernel; noise_var: a number, [N] or
    the shape of y; kernel: as `rbf_kernel` and `linear_kernel` return; jitter: added to the diagonal, relative to its
    mean. Cost O(N^3). Raises ValueError where K + Sigma is singular or an argument does not fit.
    """
    require(x.ndim == 2 and x_new.ndim == 2 and x.shape[1] == x_new.shape[1],
            f"x and x_new must have shapes [N, m] and [M, m], got {list(x.shape)} and {list(x_new.shape)}")
    targets, noise = _targets(y, noise_var, len(x))
    matrix = kernel(x, x)
    noise = noise + jitter * torch.diagonal(matrix).mean()
    factor = factorise(matrix + torch.diag_embed(noise), "the kernel matrix plus noise_var")  # [J or 1, N, N]
    across = kernel(x, x_new)
    half = torch.linalg.solve_triangular(factor, across.expand(len(factor), *across.shape), upper=False)
    white = torch.linalg.solve_triangular(factor, targets[..., None], upper=False)  # [J, N, 1]
    mean = (half.mT @ white)[..., 0]
    prior = kernel(x_new[:, None], x_new[:, None])[:, 0, 0]
    var = (prior - half.square().sum(-2)).clamp(min=0).expand_as(mean)
    log_det = 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
    evidence = -0.5 * (white.square().sum((-2, -1)) + log_det + len(x) * LOG_2PI)
    return GPPrediction(mean[0], var[0], evidence[0]) if y.ndim == 1 else GPPrediction(mean.mT, var.mT, evidence)


class WeightPosterior(NamedTuple):
    """Normal posterior of the weights: mean [m] or [J, m], covariance [m, m] or [J, m, m], log p(y) in nats."""

    mean: torch.Tensor
    covariance: torch.Tensor
    log_evidence: torch.Tensor

    def predict(self, features):
        """The function at features [M, m]: `GPPrediction` (eq-gp-weight-space)."""
        factor = torch.linalg.cholesky(self.covariance)
        var = (features @ factor).square().sum(-1)  # a sum of squares, never negative
        if self.mean.ndim == 1:
            return GPPrediction(features @ self.mean, var, self.log_evidence)
        return GPPrediction(features @ self.mean.mT, var.mT, self.log_evidence)


def gp_weight_space(features, y, noise_var, *, prior_var=1.0):
    """Posterior of the weights of a linear function of features: `WeightPosterior` (eq-gp-weight-space).

    V = (I / prior_var + Psi^T Sigma^-1 Psi)^-1, M = V Psi^T Sigma^-1 y, and the evidence (eq-gp-evidence): the process
    of `gp_function_space` with `linear_kernel(prior_var)`, in O(N m^2 + m^3). features [N, m]; y, noise_var: as in
    `gp_function_space`, noise positive; prior_var: a positive number. Raises ValueError where an argument does not fit.
    """
    require(features.ndim == 2, f"features must have shape [N, m], got {list(features.shape)}")
    check_positive(prior_var, "prior_var")
    targets, noise = _targets(y, noise_var, len(features))
    require(bool((noise > 0).all()), "noise_var must be positive in weight space, got 0")
    require(bool(features.isfinite().all()), "features must be finite, got NaN or infinity")
    weighted = features.mT / noise[:, None, :]  # [J or 1, m, N]
    size = features.shape[1]
    eye = torch.eye(size, dtype=y.dtype, device=y.device)
    factor = factorise(weighted @ features + eye / prior_var, "the precision of the weights")
    right = weighted @ targets[..., None]
    mean = torch.cholesky_solve(right.expand(len(targets), size, 1), factor.expand(len(targets), size, size))[..., 0]
    covariance = torch.cholesky_inverse(factor).expand(len(targets), size, size)
    log_det = 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1) + size * math.log(prior_var)
    rest = targets - mean @ features.mT
    squares = (rest.square() / noise).sum(-1) + mean.square().sum(-1) / prior_var
    evidence = -0.5 * (squares + log_det + noise.log().sum(-1) + len(features) * LOG_2PI)
    if y.ndim == 1:
        return WeightPosterior(mean[0], covariance[0], evidence[0])
    return WeightPosterior(mean, covariance, evidence)
