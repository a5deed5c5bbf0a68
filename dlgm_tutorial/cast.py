"""The cast: four small ReLU decoders with Gaussian noise, and four points of each, that every chapter meets.

    line      1 -> 2   affine: the best line through the data of `wave`; everything closed form
    wave      1 -> 2   two hidden layers, trained on the wave toy
    digits2   2 -> 64  one hidden layer, trained on the 8x8 digits
    digits10  10 -> 64 one hidden layer, too many latents for exactness

The points are called easy, bent (a skewed posterior), torn (two modes) and stranger (far from the model). The model is
z ~ N(0, I), x = decoder(z) + N(0, noise_var I). `line` shares the points of `wave`, and all its posteriors are normal;
with ten latents a posterior that leans has a second mode too, so the bent point of `digits10` has a small one.
`python -m dlgm_tutorial.reproduce 00 cast` makes the files again.
"""

import math
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import nn

from dlgm_tutorial.evaluation import posterior_on_grid
from dlgm_tutorial.likelihoods import Gaussian
from dlgm_tutorial.networks import mlp_from_weights

__all__ = ["NAMES", "POINTS", "Member", "digits10", "digits2", "line", "load", "wave"]

NAMES = ("line", "wave", "digits2", "digits10")
POINTS = ("easy", "bent", "torn", "stranger")


@dataclass(frozen=True)
class Member:
    """One decoder of the cast with its four points and the best answers known; all tensors float64 on the CPU.

    decoder: nn.Sequential [..., K] -> [..., D], frozen; noise_var: a number; weights: the decoder as NumPy pairs
    [(W [out, in], b [out]), ...]; x: the four points [4, D], in the order of POINTS. log_evidence, standard_error: [4]
    in nats; mean [4, K], covariance [4, K, K]: of the posterior. Where standard_error is 0 these come from quadrature
    between the bends (from a closed form for `line`), refined until nothing moved by more than converged_to; for
    digits10 from annealed importance sampling and from HMC. low, high [4, K]: boxes that hold the posteriors.
    modes [2, K]: the two modes of the torn point of digits10.
    """

    name: str
    decoder: nn.Sequential
    noise_var: float
    weights: list
    x: torch.Tensor
    log_evidence: torch.Tensor
    standard_error: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    converged_to: float
    modes: torch.Tensor | None = None

    @property
    def points(self):
        """The four points by name, {"easy": x [D], ...}."""
        return dict(zip(POINTS, self.x, strict=True))

    @property
    def num_latents(self):
        """K."""
        return self.decoder[0].in_features

    def log_joint(self, x, z):
        """log p(x, z) in nats: x [B, D], z [S, B, K] -> [S, B]."""
        log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return Gaussian(self.decoder(z), self.noise_var).log_prob(x) + log_prior

    def posterior_grid(self, num_points=None):
        """The posteriors of the four points on fine grids, an `evaluation.GridPosterior`; one or two latents.

        num_points: along each axis (default 2001 for one latent, 201 for two). Its errors are those of a grid;
        log_evidence, mean and covariance above are better.
        """
        if self.num_latents > 2:
            raise ValueError(f"{self.name} has {self.num_latents} latents: its posteriors fit no grid")
        low, high = self.low.amin(0), self.high.amax(0)
        num_points = num_points or {1: 2001, 2: 201}[self.num_latents]
        return posterior_on_grid(lambda z: self.log_joint(self.x, z), low, high, num_points)


def load(name):
    """Read a member of the cast by its name -> Member.

    >>> wave = load("wave")
    >>> wave.decoder(torch.zeros(5, 1, dtype=torch.float64)).shape, list(wave.points)
    (torch.Size([5, 2]), ['easy', 'bent', 'torn', 'stranger'])
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    with resources.as_file(resources.files("dlgm_tutorial.data") / f"cast_{name}.npz") as path, np.load(path) as file:
        content = dict(file)
    num_layers = sum(key.startswith("W") for key in content)
    weights = [(content.pop(f"W{i}"), content.pop(f"b{i}")) for i in range(num_layers)]
    noise_var, converged_to = float(content.pop("noise_var")), float(content.pop("converged_to"))
    decoder = mlp_from_weights(weights, "relu").requires_grad_(False)
    tensors = {key: torch.from_numpy(value) for key, value in content.items()}
    return Member(name, decoder, noise_var, weights, converged_to=converged_to, **tensors)


def line():
    """Read `line` -> Member."""
    return load("line")


def wave():
    """Read `wave` -> Member."""
    return load("wave")


def digits2():
    """Read `digits2` -> Member."""
    return load("digits2")


def digits10():
    """Read `digits10` -> Member."""
    return load("digits10")
