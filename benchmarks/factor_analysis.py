"""Factor analysis by EM: fit_factor_analysis against scikit-learn's FactorAnalysis, to the same log-likelihood.

scikit-learn runs with its own stopping rule at tol 1e-4 nats in all. Ours then stops at the first step whose mean
log-likelihood is at least as high, so that nobody wins by stopping early. Both start where they start by themselves.
"""

import warnings
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis

from benchmarks import harness
from dlgm_tutorial.exact_inference import fit_factor_analysis

NUM_LATENTS = 10


def varying_digits():
    """The 8x8 digits without the pixels that hardly vary, which have no maximum of the likelihood: [1797, 57]."""
    x = load_digits().data / 16
    return x[:, x.std(0) > 0.02]


def drawn(num, num_data):
    """Data that a factor analyser with noise of very different sizes made: [num, num_data]."""
    rng = np.random.default_rng(0)
    weight, scale = rng.standard_normal((num_data, NUM_LATENTS)), np.exp(rng.uniform(-1, 1, num_data))
    return rng.standard_normal((num, NUM_LATENTS)) @ weight.T + scale * rng.standard_normal((num, num_data))


def main():
    options = harness.arguments(rounds=15)
    reports, facts = {}, {}
    for name, x in {"digits": varying_digits(), "drawn data": drawn(5000, 200)}.items():
        unit = f"{name}, N = {len(x)}, D = {x.shape[1]}, K = {NUM_LATENTS}"
        tensor = torch.from_numpy(x)
        theirs = {method: FactorAnalysis(NUM_LATENTS, tol=1e-4, max_iter=5000, svd_method=method, random_state=0)
                  for method in ("lapack", "randomized")}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fit that did not converge
            goal = max(model.fit(x).score(x) for model in theirs.values())
        ours, our_steps = {}, {}
        for kind, expand in {"plain EM": False, "expanded EM": True}.items():
            result = fit_factor_analysis(tensor, NUM_LATENTS, num_steps=20_000, tol=1e-13, expand=expand)
            steps = int(torch.nonzero(result.log_likelihoods >= goal)[0])
            fit = partial(fit_factor_analysis, tensor, NUM_LATENTS, num_steps=steps, tol=0, expand=expand)
            assert fit().model.log_likelihood(tensor).value.mean() >= goal - 1e-9
            ours[f"fit_factor_analysis, {kind}"], our_steps[kind] = fit, steps
        reports[unit] = harness.compare({
            "scikit-learn, exact SVD": partial(theirs["lapack"].fit, x),
            "scikit-learn, randomised SVD (its default)": partial(theirs["randomized"].fit, x),
            **ours}, reference="scikit-learn, randomised SVD (its default)",
            rounds=options.rounds)
        facts[unit] = {"log_likelihood": goal, "our_steps": our_steps,
                       "their_steps": {method: model.n_iter_ for method, model in theirs.items()}}
    harness.write("factor_analysis", "Factor analysis by EM against scikit-learn, to equal log-likelihood",
                  "fit_factor_analysis below 1", reports, details=facts, note=(
        "Each candidate stops where its mean log-likelihood first reaches the higher of scikit-learn's two. Steps: " +
        "; ".join(f"{unit.split(',')[0]}: " + ", ".join(f"{kind} {steps}" for kind, steps in
                  {**fact["our_steps"], **{f"scikit-learn {k}": v for k, v in fact["their_steps"].items()}}.items())
                  for unit, fact in facts.items()) + "."))


if __name__ == "__main__":
    main()
