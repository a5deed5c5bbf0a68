"""Lower bounds of log p(x) from log-weights log_w = log p(x, z) - log q(z | x) with z drawn from q: [S, B] -> [B]."""

import math

import torch

__all__ = ["elbo", "iwae", "renyi"]


def _check(log_w):
    if log_w.ndim == 0 or log_w.shape[0] == 0:
        raise ValueError(f"log_w must have shape [S, B] with at least one sample, got {list(log_w.shape)}")


def elbo(log_w):
    """Average the log-weights: the evidence lower bound, mean_s log w_s, in nats.

    log_w: [S, B] -> [B]. Its expectation is log p(x) - KL(q || posterior) for every S.

    >>> elbo(torch.tensor([[0.0], [-2.0]]))
    tensor([-1.])
    """
    _check(log_w)
    return log_w.mean(0)


def iwae(log_w):
    """Take the logarithm of the average weight: the importance-weighted bound, log mean_s w_s, in nats.

    log_w: [S, B] -> [B]. Its expectation rises with S towards log p(x) (Burda, Grosse and Salakhutdinov 2016).

    >>> iwae(torch.tensor([[0.0], [0.0]]))
    tensor([0.])
    """
    _check(log_w)
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


def renyi(log_w, alpha):
    """Average the weights to the power 1 - alpha: the Renyi bound, log(mean_s w_s^(1 - alpha)) / (1 - alpha), in nats.

    log_w: [S, B] -> [B]; alpha: any real number. alpha = 0 is `iwae`, alpha = 1 the limit `elbo`; it falls as alpha
    rises, for each set of weights (Li and Turner 2016).
    """
    _check(log_w)
    power = 1 - alpha
    if not math.isfinite(power):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    if power == 0:
        return elbo(log_w)
    if abs(power) < 0.01:  # all powers are near 1: their logarithm without the cancellation against log S
        centre = log_w.mean(0)
        return centre + torch.log1p(torch.expm1(power * (log_w - centre)).mean(0)) / power
    return iwae(power * log_w) / power
