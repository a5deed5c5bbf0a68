"""Gradient of the mixture bound against its decodes alone, for 1 to 10 components; the exact KL against the series.

A unit of the first part is value and gradient of the indicator bound of MixtureDLGM (784-500-25, batch 100). Its
floor is the same for a decoder fed 100 C given latents, one product, with the Bernoulli likelihood. A unit of the
second part is value and gradient of 4,900 divergences (100 data, 49 sticks).
"""

from functools import partial

import torch

from benchmarks import harness
from dlgm_tutorial.likelihoods import Bernoulli
from dlgm_tutorial.mixture_latents import MixtureDLGM, kl_kumaraswamy_beta

BATCH, COMPONENTS = 100, (1, 3, 5, 10)


def gradient(value, parameters):
    return torch.autograd.grad(value, parameters, allow_unused=True)


def main():
    options = harness.arguments(rounds=11)
    torch.manual_seed(0)
    x = (torch.rand(BATCH, 784) < 0.13).float()
    reports = {}
    for num in COMPONENTS:
        model = MixtureDLGM(784, 25, num, hidden_dims=(500,))
        z = torch.randn(1, BATCH, num, 25, requires_grad=True)

        def decodes(model=model, z=z):
            log_px = Bernoulli(model.decoder(z), validate=False).log_prob(x[:, None])
            gradient(log_px.sum(), [z, *model.decoder.parameters()])

        def bound(model=model):
            gradient(model.bound(x).sum(), list(model.parameters()))

        reports[f"bound, C = {num}"] = harness.compare(
            {"C decodes as one product": decodes, "indicator bound": bound},
            reference="C decodes as one product", rounds=options.rounds)

    log_a, log_b = torch.randn(BATCH, 49, requires_grad=True), torch.randn(BATCH, 49, requires_grad=True)

    def kl(**how):
        gradient(kl_kumaraswamy_beta(log_a.exp(), log_b.exp(), 1.0, 5.0, **how).sum(), [log_a, log_b])

    candidates = {"quadrature, error below 2e-9": kl, "series, 10 terms": partial(kl, method="series"),
                  "series, 1000 terms": partial(kl, method="series", num_terms=1000)}
    reports["4,900 divergences"] = harness.compare(candidates, reference="quadrature, error below 2e-9",
                                                   rounds=options.rounds)
    harness.write("mixture_step", "Gradient of the mixture bound against its decodes; the exact divergence",
                  "indicator bound at most 1.3 for C from 3 up", reports, note=(
                      "The floor leaves out the encoder. The series needs far more than 1000 terms for the accuracy of "
                      "the quadrature where b is below 1."))


if __name__ == "__main__":
    main()
