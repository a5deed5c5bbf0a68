"""Sampling, log-density and KL of a rank-one normal in up to a million dimensions: what it costs over a diagonal one.

The peer is torch.distributions' LowRankMultivariateNormal of rank one; its rank-one term is in the covariance, ours in
the precision, at the same asymptotic cost. A unit is construction, one rsample, its log_prob and KL(q || N(0, I)).
"""

import torch
from torch.distributions import LowRankMultivariateNormal, kl_divergence

from benchmarks import harness
from dlgm_tutorial.distributions import DiagonalNormal, RankOnePrecisionNormal


def three_things(q, kl):
    q.log_prob(q.rsample())
    return kl(q)


def main():
    options = harness.arguments(rounds=15)
    reports = {}
    for num_latents in (1_000, 100_000, 1_000_000):
        loc, log_d, u = torch.randn(3, 1, num_latents, generator=torch.Generator().manual_seed(0))
        zeros, ones = torch.zeros(1, num_latents), torch.ones(1, num_latents)
        standard = LowRankMultivariateNormal(zeros, zeros[..., None], ones)
        candidates = {
            "DiagonalNormal": lambda loc=loc, log_d=log_d: three_things(
                DiagonalNormal(loc, -log_d), DiagonalNormal.kl_to_standard),
            "RankOnePrecisionNormal": lambda loc=loc, log_d=log_d, u=u: three_things(
                RankOnePrecisionNormal(loc, log_d, u), RankOnePrecisionNormal.kl_to_standard),
            "torch's LowRankMultivariateNormal": lambda loc=loc, log_d=log_d, u=u, standard=standard: three_things(
                LowRankMultivariateNormal(loc, u[..., None], log_d.exp()), lambda q: kl_divergence(q, standard))}
        reports[f"K = {num_latents:,}"] = harness.compare(candidates, reference="DiagonalNormal", rounds=options.rounds,
                                                          block=max(1, 20_000 // num_latents))
    harness.write("rank_one", "Sampling, log-density and KL of a rank-one normal",
                  "cost linear in K, and no more than the peer's", reports)


if __name__ == "__main__":
    main()
