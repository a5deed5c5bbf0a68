"""Importance-sampled evidence of two VAEs (decoders 50-200-200-784, 50-500-500-784) against their matrix products.

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
WIDTHS = (200, 500)


class VAE(torch.nn.Module):
    """The two methods that the estimate needs."""

    def __init__(self, width, activation="tanh"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = mlp([784, width, width, 2 * LATENT], activation, generator=generator)
        self.decoder = mlp([LATENT, width, width, 784], activation, generator=generator)

    def posterior(self, x):
        return DiagonalNormal(*self.encoder(x).chunk(2, -1))

    def log_joint(self, x, z):
        zeros = torch.zeros(LATENT)
        return Bernoulli(self.decoder(z)).log_prob(x) + DiagonalNormal(zeros, zeros).log_prob(z)


def compare(width, rounds):
    """The report for one width of the hidden layers."""
    model = VAE(width)
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
    return harness.compare(candidates, reference="matrix products alone", rounds=rounds)


def main():
    options = harness.arguments(rounds=21)
    reports = {f"hidden layers of {width}": compare(width, options.rounds) for width in WIDTHS}
    decode, whole = ([f"{report[name]['ratio']:.2f}" for report in reports.values()]
                     for name in ("decoder and normal draws", "log_likelihood_is"))
    note = (f"The decoder's tanh, biases and the normal draws alone bring the floor to {' and '.join(decode)}; the "
            f"whole estimate, with a softplus for each of 784 pixels, takes {' and '.join(whole)}. The softplus costs "
            "the same however wide the layers before it are; the products do not.")
    harness.write("evidence", "Importance-sampled evidence against its matrix products",
                  "log_likelihood_is at most 1.3", reports, images=IMAGES, samples=SAMPLES, latents=LATENT, chunk=CHUNK,
                  note=note)


if __name__ == "__main__":
    main()
