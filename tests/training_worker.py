"""A run of its own process for test_training.py: python training_worker.py CHECKPOINT NUM_STEPS (or under torchrun)."""

import sys

import torch
from test_training import TinyVAE, count_epochs, examples

from dlgm_tutorial.training import fit, processes

if __name__ == "__main__":
    checkpoint, num_steps = sys.argv[1], int(sys.argv[2])
    with processes("cpu") as (rank, world):
        model = TinyVAE(seed=rank)  # other weights on other processes: those of the first must win
        fit(model, examples(), num_steps=num_steps, batch_size=7, lr=0.003, num_samples=2, checkpoint=checkpoint,
            record_every=20, after_epoch=count_epochs, device="cpu", clip_norm=5.0)
        if rank:
            torch.save(model.state_dict(), f"{checkpoint}.rank{rank}")
