"""Importance-sampled evidence of a VAE (decoder 50-200-200-784) against its floor: the decoder's matrix products alone.

A unit is log_likelihood_is of 20 images with 500 samples each, or of two images with 5,000 samples each under the model
of chapter 2 (decoder 200-200-200-784); the floor multiplies arrays of the same shapes, in chunks of the same size, and
does nothing else. The note says how much memory 5,000 samples for each of 20 images take.
"""

import resource
from functools import partial

import torch

from benchmarks import harness
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.evaluation import log_likelihood_is
from dlgm_tutorial.likelihoods import Bernoulli
from dlgm_tutorial.networks import mlp
from dlgm_tutorial.stochastic_backprop import DLGM

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


def products(weights, inputs, num_chunks):
    """The decoder's matrix products alone."""
    with torch.no_grad():
        for _ in range(num_chunks):
            for h, weight in zip(inputs, weights, strict=True):
                h @ weight.mT


def of_chapter_2(options):
    """The model of the paper's table, 5,000 samples an image, and the memory that they take."""
    model = DLGM(784, 200, ((200, 200),), recognition_dims=(200,))
    x = (torch.rand(20, 784) < 0.13).float()
    weights = [layer.weight for layer in model.networks[0] if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(CHUNK, weight.shape[1]) for weight in weights]
    model.log_likelihood(x[:2], 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.log_likelihood(x, 5000)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    @torch.no_grad()
    def decode():
        for _ in range(10_000 // CHUNK):
            model.networks[0](torch.randn(CHUNK // 2, 2, 200))

    candidates = {"matrix products alone": partial(products, weights, inputs, 10_000 // CHUNK),
                  "decoder and normal draws": decode,
                  "DLGM.log_likelihood": partial(model.log_likelihood, x[:2], 5000)}
    return memory, harness.compare(candidates, reference="matrix products alone", rounds=options.rounds)


def of_a_vae(width, rounds):
    """The report for one width of the hidden layers."""
    model = VAE(width)
    torch.manual_seed(1)
    x = (torch.rand(IMAGES, 784) < 0.13).float()
    weights = [layer.weight for layer in model.decoder if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(CHUNK, weight.shape[1]) for weight in weights]

    @torch.no_grad()
    def decode():
        for _ in range(IMAGES * SAMPLES // CHUNK):
            model.decoder(torch.randn(CHUNK // IMAGES, IMAGES, LATENT))

    candidates = {"matrix products alone": partial(products, weights, inputs, IMAGES * SAMPLES // CHUNK),
                  "decoder and normal draws": decode,
                  "log_likelihood_is": partial(log_likelihood_is, model, x, SAMPLES),
                  "log_likelihood_is, all at once": partial(log_likelihood_is, model, x, SAMPLES, chunk=10_000)}
    return harness.compare(candidates, reference="matrix products alone", rounds=rounds)


def main():
    options = harness.arguments(rounds=21)
    vaes = {f"hidden layers of {width}": of_a_vae(width, options.rounds) for width in WIDTHS}
    decode, whole = ([f"{report[name]['ratio']:.2f}" for report in vaes.values()]
                     for name in ("decoder and normal draws", "log_likelihood_is"))
    memory, deep = of_chapter_2(options)
    harness.write("evidence", "Importance-sampled evidence against its matrix products",
                  "log_likelihood_is at most 1.3", {**vaes, "chapter 2's model, 2 images, 5000 samples": deep},
                  images=IMAGES, samples=SAMPLES, latents=LATENT, chunk=CHUNK, note=(
                      f"The decoder's tanh, biases and the normal draws bring the floor to {' and '.join(decode)}, the "
                      f"whole estimate takes {' and '.join(whole)}: a softplus for each of 784 pixels costs the same "
                      "however wide the layers before it are, the products do not. With chapter 2's model "
                      f"(ReLU) draws, biases and activations make {deep['decoder and normal draws']['ratio']:.2f} of "
                      f"its {deep['DLGM.log_likelihood']['ratio']:.2f}. 5,000 samples for each of 20 images raise the "
                      f"peak of the process's memory by {memory:.0f} MB: the draws are taken in chunks."))


if __name__ == "__main__":
    main()
