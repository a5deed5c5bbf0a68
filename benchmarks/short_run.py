"""Short-run chains (784 pixels) against as many bare passes through the decoder, forward and back to its input.

A bare pass computes the mean and one product with the transposed Jacobian: the least that a Langevin step can cost. The
generators are those of `reproduce 06 mnist-one` and `mnist-three`. Further reports: time against the number of steps,
of layers and of chains, as seconds per step and chain. On a GPU the compiled step stands beside (`torch.compile`,
graphs); without one it is left out.
"""

import torch

from benchmarks import harness
from dlgm_tutorial.short_run_mcmc import MultiLayerGenerator, ShortRunModel, short_run

BATCH, STEPS = 100, 20
WIDTHS = {1: ((30,), ((128, 128),)), 3: ((30, 20, 10), ((128, 128), (48,), (48,))),
          5: ((30, 20, 10, 10, 10), ((128, 128), (48,), (48,), (48,), (48,)))}


def make(num_layers, device):
    torch.manual_seed(0)
    dims, hidden = WIDTHS[num_layers]
    return MultiLayerGenerator(784, dims, hidden, noise_var=0.09, output="sigmoid").to(device)


def bare(generator, x, z, num_steps):
    for _ in range(num_steps):
        z = z.detach().requires_grad_()
        mean = generator.mean(z)
        torch.autograd.grad(mean, z, x[None])


def chain(generator, x, z, num_steps):
    model = ShortRunModel(generator, num_steps=num_steps, step_size=0.05)
    noise = {"start": z, "chain": torch.randn(num_steps, *z.shape, device=z.device)}
    return lambda: model.infer(x, noise=noise)


def compiled(generator, x, z, num_steps):
    """The same chain with its score compiled into one graph."""
    score = torch.compile(lambda z: generator.score(x, z), mode="reduce-overhead")
    noise = torch.randn(num_steps, *z.shape, device=z.device)
    return lambda: short_run(score, z, 0.05, num_steps, noise=noise)


def main():
    options = harness.arguments(rounds=31)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reports = {}
    inputs = lambda generator, num: (torch.rand(num, 784, device=device),
                                     torch.randn(1, num, generator.num_latents, device=device))
    for num_layers in (1, 3):
        generator = make(num_layers, device)
        x, z = inputs(generator, BATCH)
        reference = f"{STEPS} bare passes"
        candidates = {reference: lambda generator=generator, x=x, z=z: bare(generator, x, z, STEPS),
                      f"short run of {STEPS} steps": chain(generator, x, z, STEPS)}
        if device == "cuda":
            candidates["short run, compiled score"] = compiled(generator, x, z, STEPS)
        reports[f"layers: {num_layers}"] = harness.compare(candidates, reference=reference, rounds=options.rounds)
    generator = make(1, device)
    x, z = inputs(generator, BATCH)
    reports["a step, by number of steps"] = harness.compare(
        {f"T = {num}": chain(generator, x, z, num) for num in (5, 20, 80)}, reference="T = 20",
        rounds=max(5, options.rounds // 3), work={f"T = {num}": num for num in (5, 20, 80)})
    runs = {num: make(num, device) for num in WIDTHS}
    reports["a step, by number of layers"] = harness.compare(
        {f"L = {num}": chain(g, *inputs(g, BATCH), STEPS) for num, g in runs.items()}, reference="L = 1",
        rounds=max(5, options.rounds // 3), work={f"L = {num}": STEPS for num in runs})
    sizes = (1, 10, 100, 1000)
    reports["a chain, by number of chains"] = harness.compare(
        {f"B = {num}": chain(generator, *inputs(generator, num), STEPS) for num in sizes}, reference="B = 100",
        rounds=max(5, options.rounds // 3), work={f"B = {num}": num for num in sizes})
    harness.write("short_run", "Short-run chains, against bare passes through the decoder",
                  "at most 1.3 times the bare passes", reports, batch=BATCH, steps=STEPS)


if __name__ == "__main__":
    main()
