"""One training step of a VAE (784-200-200-50, batch 100): our loop against a bare hand-written one on the same model.

A unit is a whole call of 64 steps, set-up included: one block of noise is drawn in it, and the optimiser is made.
"""

import copy

import torch

from benchmarks import harness
from dlgm_tutorial.training import fit

BATCH, LATENT, STEPS = 100, 50, 64


class VAE(torch.nn.Module):
    """The plain VAE with Bernoulli pixels, written out."""

    def __init__(self):
        super().__init__()
        layers = lambda size: torch.nn.Sequential(torch.nn.Linear(size, 200), torch.nn.Tanh(),
                                                  torch.nn.Linear(200, 200), torch.nn.Tanh())
        self.encoder, self.to_q = layers(784), torch.nn.Linear(200, 2 * LATENT)
        self.decoder, self.to_x = layers(LATENT), torch.nn.Linear(200, 784)

    def noise_spec(self, batch_size, num_samples=1):
        return {"z": ("normal", (num_samples, batch_size, LATENT), 1)}

    def bound(self, x, *, num_samples=1, noise=None):
        loc, log_var = self.to_q(self.encoder(x)).chunk(2, -1)
        z = loc + (0.5 * log_var).exp() * noise
        logits = self.to_x(self.decoder(z))
        log_px = (x * logits - torch.nn.functional.softplus(logits)).sum(-1).mean(0)
        return log_px - 0.5 * (loc**2 + log_var.exp() - 1 - log_var).sum(-1)


def by_hand(model, data, steps, fused):
    """The loop as one writes it in a script."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
    per_epoch = len(data) // BATCH
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(data))
        x = data[order[step % per_epoch * BATCH:][:BATCH]]
        loss = -model.bound(x, noise=torch.randn(1, BATCH, LATENT)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    options = harness.arguments(rounds=21)
    torch.manual_seed(0)
    data = (torch.rand(10_000, 784) < 0.13).float()
    initial = VAE()
    ours = lambda: fit(copy.deepcopy(initial), data, num_steps=STEPS, batch_size=BATCH, lr=1e-3, device="cpu")
    candidates = {"by hand, fused Adam": lambda: by_hand(copy.deepcopy(initial), data, STEPS, True),
                  "by hand, default Adam": lambda: by_hand(copy.deepcopy(initial), data, STEPS, None),
                  "fit": ours}
    report = harness.compare(candidates, reference="by hand, fused Adam", rounds=options.rounds)
    harness.write("training_step", "Training step of a VAE, our loop against a bare one", "fit at most 1.05",
                  {f"{STEPS} steps, set-up included": report}, batch=BATCH, sizes=[784, 200, 200, LATENT],
                  steps=STEPS)


if __name__ == "__main__":
    main()
