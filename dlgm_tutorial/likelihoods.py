"""log p(x | z): what the decoder's output says about the data; summed over the data dimension, in nats."""

import math

import torch
import torch.nn.functional as F

__all__ = ["Bernoulli", "Gaussian"]


def _check_data(x, parameter, name):
    if x.shape[-1:] != parameter.shape[-1:]:
        raise ValueError(f"x must have {parameter.shape[-1]} entries in its last dimension, as {name} has, "
                         f"got shape {list(x.shape)}")


def _sum(log_prob, observed):
    """Sum over the last dimension, over the observed entries where a mask is given."""
    if observed is not None:
        log_prob = torch.where(observed, log_prob, torch.zeros_like(log_prob))
    return log_prob.sum(-1)


def _binary(x):
    """True where all entries are exactly 0 or 1; NaN and infinity are neither."""
    low, high = torch.aminmax(x)
    # Between 0 and 1 no term x (1 - x) is negative: their sum is zero only if each of them is.
    return bool((low >= 0) & (high <= 1) & (torch.dot(x.reshape(-1), (1 - x).reshape(-1)) == 0))


class Bernoulli:
    """Independent binary pixels, given by their logits.

    logits: [..., D]. x must be exactly 0 or 1: the expression also yields numbers for grey levels, but these are no
    log-likelihoods, so other values are refused. `validate=False` skips that check where x is known to be binary.

    >>> Bernoulli(torch.zeros(1, 3)).log_prob(torch.tensor([[0.0, 1.0, 1.0]]))  # 3 log(1/2)
    tensor([-2.0794])
    """

    def __init__(self, logits, *, validate=True):
        self.logits, self.validate = logits, validate

    @property
    def mean(self):
        return torch.sigmoid(self.logits)

    def log_prob(self, x, *, observed=None):
        """log p(x) in nats, log sigmoid((2 x - 1) logits) summed over the last dimension: [...].

        x: [..., D], zeros and ones; observed: boolean [..., D], entries that count (default all; others may be NaN).
        """
        _check_data(x, self.logits, "logits")
        if observed is not None:
            x = torch.where(observed, x, torch.zeros_like(x))
        if self.validate and not _binary(x):
            raise ValueError("x must be 0 or 1 for a Bernoulli likelihood, got values from "
                             f"{x.min().item():g} to {x.max().item():g}: binarise the data")
        # log sigmoid(v) = -softplus(-v): torch's softplus is three times as fast as its logsigmoid on a CPU. Beyond its
        # threshold it returns the argument, at 50 without error.
        sign = torch.sub(x.new_ones(()), x, alpha=2)
        return -_sum(F.softplus(sign * self.logits, threshold=50.0), observed)

    def sample(self, *, noise=None, generator=None):
        """Draw pixels, [..., D]: 1 where uniform noise [..., D] is below the mean."""
        if noise is None:
            like = self.logits
            noise = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return (noise < self.mean).to(noise.dtype)


class Gaussian:
    """Independent normal entries around a mean.

    mean: [..., D]; noise_var: variance, a positive number or a tensor that broadcasts against the mean, such as [D].

    >>> Gaussian(torch.zeros(1, 2), 1.0).log_prob(torch.zeros(1, 2))  # -log(2 pi)
    tensor([-1.8379])
    """

    def __init__(self, mean, noise_var, *, validate=True):
        noise_var = torch.as_tensor(noise_var, dtype=mean.dtype, device=mean.device)
        if validate and not bool(((noise_var > 0) & noise_var.isfinite()).all()):
            raise ValueError(f"noise_var must be positive and finite, got a minimum of {noise_var.min().item():g}")
        self.mean, self.noise_var, self.validate = mean, noise_var, validate

    def log_prob(self, x, *, observed=None):
        """log p(x) in nats, summed over the last dimension: [...].

        x: [..., D]; observed: boolean [..., D], entries that count (default: all; the others may be NaN).
        """
        _check_data(x, self.mean, "mean")
        if observed is not None:
            x = torch.where(observed, x, torch.zeros_like(x))
        if self.validate and not bool(torch.isfinite(x).all()):
            raise ValueError("x must be finite for a Gaussian likelihood, got NaN or infinity")
        squares = (x - self.mean).square() / self.noise_var
        return _sum(-0.5 * (squares + self.noise_var.log() + math.log(2 * math.pi)), observed)

    def sample(self, *, noise=None, generator=None):
        """Draw data, [..., D]: mean + sqrt(noise_var) noise, noise standard normal [..., D]."""
        if noise is None:
            like = self.mean
            noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.mean + self.noise_var.sqrt() * noise
