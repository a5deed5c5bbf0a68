"""Importance-sampled evidence of a VAE (decoder 50-200-200-784) against its floor: the decoder's matrix products alone.

A unit is log_likelihood_is of 20 images with 500 samples each; the floor multiplies arrays of the same shapes, in
chunks of the same size, and does nothing else.
"""

from functools import partial

import torch

from benchmarks import harness
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.evaluation import log_likelihood_is
from dlgm_tutorial.likelihoods import Bernoulli
from dlgm_tutorial.networks import mlp

LATENT, IMAGES, SAMPLES, CHUNK = 50, 20, 500, 1000


class VAE(torch.nn.Module):
    """The two methods that the estimate needs."""

    def __init__(self, activation="tanh"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = mlp([784, 200, 200, 2 * LATENT], activation, generator=generator)
        self.decoder = mlp([LATENT, 200, 200, 784], activation, generator=generator)

    def posterior(self, x):
        return DiagonalNormal(*self.encoder(x).chunk(2, -1))

    def log_joint(self, x, z):
        zeros = torch.zeros(LATENT)
        return Bernoulli(self.decoder(z)).log_prob(x) + DiagonalNormal(zeros, zeros).log_prob(z)


def main():
    options = harness.arguments(rounds=21)
    model = VAE()
    torch.manual_seed(1)
    x = (torch.rand(IMAGES, 784) < 0.13).float()
    weights = [layer.weight for layer in model.decoder if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(CHUNK, weight.shape[1]) for weight in weights]

    @torch.no_grad()
    def floor():
        for _ in range(IMAGES * SAMPLES // CHUNK):
            for h, weight in zip(inputs, weights, strict=True):
                h @ weight.mT

    @torch.no_grad()
    def decode():
        for _ in range(IMAGES * SAMPLES // CHUNK):
            model.decoder(torch.randn(CHUNK // IMAGES, IMAGES, LATENT))

    candidates = {"matrix products alone": floor, "decoder and normal draws": decode,
                  "log_likelihood_is": partial(log_likelihood_is, model, x, SAMPLES),
                  "log_likelihood_is, all at once": partial(log_likelihood_is, model, x, SAMPLES, chunk=10_000)}
    report = harness.compare(candidates, reference="matrix products alone", rounds=options.rounds)
    harness.write("evidence", "Importance-sampled evidence against its matrix products",
                  "log_likelihood_is at most 1.3", {f"{IMAGES} images, {SAMPLES} samples": report},
                  sizes=[LATENT, 200, 200, 784], chunk=CHUNK, note=(
                      f"The decoder's tanh, biases and the normal draws bring the floor to "
                      f"{report['decoder and normal draws']['ratio']:.2f}; most of the rest is a softplus for each of "
                      "784 pixels, which these small networks do not hide behind their products."))


if __name__ == "__main__":
    main()
