"""Inference on a batch of 128 by every method of chapter 4, against the plain encoder; gaps in batch and one by one.

A unit of the first two parts is the posterior of 128 images (784-200-200, K = 10 or 50), with the same decoder; the
refined methods take 4 steps. A unit of the third is the search for the best normal of one image of 8x8 pixels (32
points, 50 steps, decoder 5-100-100-64), 1,000 images together or each alone.
"""

from functools import partial

import torch

from benchmarks import harness
from dlgm_tutorial.evaluation import inference_gaps
from dlgm_tutorial.gp_random_inference import (
    AmortizedVAE,
    AutoregressiveFlowVAE,
    HouseholderVAE,
    IterativeInferenceVAE,
    RandomInferenceVAE,
    RecursiveMixtureVAE,
    SemiAmortizedVAE,
    VariationalLaplaceVAE,
)

BATCH, PLAIN, GAPS, ALONE = 128, "plain encoder", 1000, 10


def methods(latent):
    sizes = (784, latent)
    return {PLAIN: AmortizedVAE(*sizes),
            "random encoder, diagonal": RandomInferenceVAE(*sizes, num_data=50_000),
            "random encoder, full": RandomInferenceVAE(*sizes, num_data=50_000, covariance="full"),
            "mixture of 2 encoders": RecursiveMixtureVAE(*sizes),
            "Householder flow, 4 reflections": HouseholderVAE(*sizes),
            "autoregressive flow, 2 steps": AutoregressiveFlowVAE(*sizes),
            "semi-amortised, 1 step": SemiAmortizedVAE(*sizes, num_steps=1),
            "semi-amortised, 4 steps": SemiAmortizedVAE(*sizes, num_steps=4),
            "semi-amortised, 8 steps": SemiAmortizedVAE(*sizes, num_steps=8),
            "iterative amortised, 4 steps": IterativeInferenceVAE(*sizes, num_steps=4),
            "variational Laplace, 4 steps": VariationalLaplaceVAE(*sizes, num_steps=4)}


@torch.no_grad()
def infer(model, x):
    if isinstance(model, RandomInferenceVAE):
        return model.infer(x)  # the posterior and its uncertainty
    if isinstance(model, AutoregressiveFlowVAE):
        return model.posterior(x).rsample_with_log_prob()  # without a draw the flow has done nothing yet
    return model.posterior(x)


def main():
    options = harness.arguments(rounds=15)
    torch.manual_seed(0)
    x = (torch.rand(BATCH, 784) < 0.13).float()
    reports = {}
    for latent in (10, 50):
        candidates = {name: partial(infer, model, x) for name, model in methods(latent).items()
                      if latent == 10 or "Laplace" not in name}
        reports[f"K = {latent}"] = harness.compare(candidates, reference=PLAIN, rounds=options.rounds, block=3)

    model = AmortizedVAE(64, 5, (100, 100))
    images = model.sample(GAPS)
    split = partial(inference_gaps, model, num_samples=32, num_steps=50)

    def together():
        split(images, log_likelihood=torch.zeros(GAPS), chunk=100)

    def alone():
        for image in images[:ALONE]:
            split(image[None], log_likelihood=torch.zeros(1))

    reports["gap decomposition"] = harness.compare(
        {"1,000 images, 100 at once": together, "one at a time": alone}, reference="1,000 images, 100 at once",
        rounds=max(3, options.rounds // 3), work={"1,000 images, 100 at once": GAPS, "one at a time": ALONE})
    harness.write("inference_latency", "Inference on a batch of 128 images, against the plain encoder",
                  "random encoder at most 1.3; one at a time at least 10", reports, batch=BATCH, note=(
                      "The random encoder returns its averaged posterior and its uncertainty, the flow one draw with "
                      "its density. Refined methods run the decoder and its gradient at each step. Variational Laplace "
                      "is timed with 10 latents alone."))


if __name__ == "__main__":
    main()
