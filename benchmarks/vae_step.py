"""Training steps of a VAE (784-200-200-50, batch 100): our model and loop, a script written by hand, Pyro and pythae.

The same networks, data and batch size everywhere, Adam with learning rate 1e-3 in the variant that each peer uses.
A unit is 64 steps, set-up included.
"""

import contextlib
import copy
import io

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import harness
from dlgm_tutorial.stochastic_backprop import DLGM
from dlgm_tutorial.training import fit

BATCH, LATENT, STEPS, LR = 100, 50, 64, 1e-3


def network(*sizes):
    layers = [module for i, o in zip(sizes, sizes[1:], strict=False) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ByHand(nn.Module):
    """What one writes in a script: encoder, noise, decoder, cross-entropy, KL."""

    def __init__(self, rank_one=False):
        super().__init__()
        self.rank_one = rank_one
        self.encoder = network(784, 200, 200, (3 if rank_one else 2) * LATENT)
        self.decoder = network(LATENT, 200, 200, 784)

    def loss(self, x):
        noise = torch.randn(len(x), LATENT)
        if self.rank_one:
            loc, log_d, u = self.encoder(x).chunk(3, -1)
            s = torch.exp(-0.5 * log_d)
            w = s * u
            t = (w * w).sum(-1, keepdim=True)
            z = loc + s * (noise - w * (w * noise).sum(-1, keepdim=True) / (1 + t + torch.sqrt(1 + t)))
            trace = (s * s).sum(-1) - ((s * w)**2).sum(-1) / (1 + t[:, 0])
            kl = 0.5 * ((loc * loc).sum(-1) + trace - LATENT + log_d.sum(-1) + torch.log1p(t[:, 0]))
        else:
            loc, log_var = self.encoder(x).chunk(2, -1)
            z = loc + torch.exp(0.5 * log_var) * noise
            kl = 0.5 * (loc * loc + log_var.exp() - 1 - log_var).sum(-1)
        return (F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1) + kl).mean()


def batches(data):
    order = torch.randperm(len(data))
    for step in range(STEPS):
        yield data[order[step * BATCH:(step + 1) * BATCH]]


def by_hand(model, data, fused):
    optimizer = torch.optim.Adam(model.parameters(), LR, fused=fused)
    for x in batches(data):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()


def with_pyro(model, data):
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, TraceMeanField_ELBO

    def generative(x):
        pyro.module("decoder", model.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(1), obs=x)

    def recognition(x):
        pyro.module("encoder", model.encoder)
        with pyro.plate("data", len(x)):
            loc, log_var = model.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, torch.exp(0.5 * log_var)).to_event(1))

    pyro.clear_param_store()
    pyro.enable_validation(False)
    svi = SVI(generative, recognition, pyro.optim.Adam({"lr": LR}), TraceMeanField_ELBO())
    for x in batches(data):
        svi.step(x)


def pythae_model(model):
    with contextlib.redirect_stdout(io.StringIO()):
        from pythae.data.datasets import DatasetOutput
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model.encoder)

        def forward(self, x):
            loc, log_var = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model.decoder)

        def forward(self, z):
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))

    config = VAEConfig(input_dim=(784,), latent_dim=LATENT, reconstruction_loss="bce")
    return VAE(config, Encoder(), Decoder()), DatasetOutput


def with_pythae(start, data):
    model, output = copy.deepcopy(start[0]), start[1]
    optimizer = torch.optim.Adam(model.parameters(), LR)
    for x in batches(data):
        optimizer.zero_grad()
        model(output(data=x)).loss.backward()
        optimizer.step()


def main():
    options = harness.arguments(rounds=21)
    torch.manual_seed(0)
    data = (torch.rand(10_000, 784) < 0.13).float()
    hand, hand_one = ByHand(), ByHand(rank_one=True)
    ours = {kind: DLGM(784, LATENT, ((200, 200),), recognition=kind) for kind in ("diagonal", "rank1")}
    train = lambda model: fit(copy.deepcopy(model), data, num_steps=STEPS, batch_size=BATCH, lr=LR, device="cpu")
    start = pythae_model(hand)
    script = "by hand, fused Adam"
    reports = {"diagonal posterior": harness.compare({
        script: lambda: by_hand(copy.deepcopy(hand), data, True),
        "by hand, default Adam": lambda: by_hand(copy.deepcopy(hand), data, None),
        "fit(DLGM)": lambda: train(ours["diagonal"]),
        "Pyro's SVI, its Adam, validation off": lambda: with_pyro(copy.deepcopy(hand), data),
        "pythae's VAE, default Adam": lambda: with_pythae(start, data)}, reference=script, rounds=options.rounds)}
    reports["rank-one posterior"] = harness.compare({
        script: lambda: by_hand(copy.deepcopy(hand_one), data, True), "fit(DLGM)": lambda: train(ours["rank1"])},
        reference=script, rounds=options.rounds)
    ratio = reports["diagonal posterior"]["Pyro's SVI, its Adam, validation off"]["ratio"]
    ratio /= reports["diagonal posterior"]["fit(DLGM)"]["ratio"]
    harness.write("vae_step", "Training step of a VAE, against a script, Pyro and pythae",
                  "fit(DLGM) at most 1.05, and 1.5 times as fast as Pyro", reports, batch=BATCH,
                  sizes=[784, 200, 200, LATENT], note=f"Pyro takes {ratio:.2f} times as long as fit(DLGM).")


if __name__ == "__main__":
    main()
