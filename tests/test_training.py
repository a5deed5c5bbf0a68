"""The training loop: chance as a function, exact resume, several processes, checkpoints that are checked."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dlgm_tutorial import training
from dlgm_tutorial.checks import check_mc
from dlgm_tutorial.training import fit, read_checkpoint, step_noise

HERE = Path(__file__).parent
N, B, S, D, K, H = 23, 7, 2, 5, 3, 6


class TinyVAE(torch.nn.Module):
    """One latent layer, Gaussian likelihood: just enough of the models' contract to be trained."""

    def __init__(self, seed=0, dtype=torch.float64, hidden=H):
        super().__init__()
        rng = np.random.default_rng(seed)
        weight = lambda *shape: torch.nn.Parameter(torch.tensor(0.3 * rng.standard_normal(shape), dtype=dtype))
        self.encoder, self.to_loc, self.to_log_var = weight(hidden, D), weight(K, hidden), weight(K, hidden)
        self.decoder = weight(D, K)
        self.register_buffer("epochs", torch.zeros((), dtype=dtype))

    def noise_spec(self, batch_size, num_samples=1):
        return {"z": ("normal", (num_samples, batch_size, K), 1)}

    def bound(self, x, *, num_samples=1, noise=None):
        assert noise.shape == (num_samples, len(x), K) and noise.dtype == x.dtype
        hidden = torch.tanh(x @ self.encoder.T)
        loc, log_var = hidden @ self.to_loc.T, hidden @ self.to_log_var.T
        z = loc + (0.5 * log_var).exp() * noise
        kl = 0.5 * (loc**2 + log_var.exp() - 1 - log_var).sum(-1)
        return -0.5 * ((x - z @ self.decoder.T)**2).sum(-1).mean(0) - kl


class TwoNoises(torch.nn.Module):
    """A bound that is the mean of its parameter times what it was handed: the gradient shows the noise."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def noise_spec(self, batch_size, num_samples=1):
        return {"u": ("uniform", (batch_size, 2), 0), "e": ("normal", (num_samples, batch_size), 1),
                "shared": ("normal", (3,), None)}

    def bound(self, x, *, num_samples=1, noise=None):
        features = torch.stack([noise["u"][:, 0], noise["u"][:, 1] * x[:, 0], noise["e"].mean(0),
                                noise["shared"].sum().expand(len(x))], -1)
        return features @ self.w


def examples(dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(1).standard_normal((N, D))).to(dtype)


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


GOLDEN = {"latent": [-1.631850959921716, 0.2003408901957487, -1.2667451464922976],
          "binarization": [0.41703903675079346, 0.18900948762893677, 0.3071753978729248],
          "evaluation": [-0.5752265546515246, 0.002386553691831586, -0.36301466555428524]}
SETTINGS = dict(num_steps=40, batch_size=B, lr=0.01, num_samples=S, record_every=9, device="cpu")


def count_epochs(model, epoch):
    model.epochs += epoch + 1


# --- Chance as a function

def test_golden_numbers_of_each_stream():
    # NumPy promises stable bit generators, not stable distributions: a change here changes every run of the book.
    draw = lambda number: training.stream(3, number, 5)
    assert draw(training.ORDER).permutation(6).tolist() == [2, 1, 4, 5, 3, 0]
    np.testing.assert_allclose(draw(training.LATENT).standard_normal(3), GOLDEN["latent"], rtol=1e-14)
    uniforms = draw(training.BINARIZATION).random(3, dtype=np.float32)
    np.testing.assert_allclose(uniforms, GOLDEN["binarization"], rtol=1e-7)
    np.testing.assert_allclose(draw(training.EVALUATION).standard_normal(3), GOLDEN["evaluation"], rtol=1e-14)


def test_streams_counters_entries_and_seeds_are_all_different():
    first = {training.stream(seed, number, counter, entry).random()
             for seed in range(3) for number in range(3) for counter in range(3) for entry in range(3)}
    assert len(first) == 81


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5])
def test_stream_refuses_what_is_not_a_32_bit_word(bad):
    with pytest.raises(ValueError, match=r"must be integers in \[0, 2\*\*32\)"):
        training.stream(bad, 0)


def test_epoch_order_is_a_fresh_permutation_each_epoch():
    orders = [training.epoch_order(N, epoch, seed=1) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(N)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_noise_is_the_same_in_both_precisions_and_across_blocks():
    spec = TwoNoises().noise_spec(B, S)
    for step in (0, 63, 64, 200):
        double, single = (step_noise(spec, step, seed=4, dtype=dtype) for dtype in (torch.float64, torch.float32))
        for name, (_, shape, _) in spec.items():
            assert double[name].shape == shape and single[name].dtype == torch.float32
            assert (double[name] - single[name]).abs().max() < 1e-6
    one, two = step_noise(spec, 63, seed=4), step_noise(spec, 64, seed=4)
    assert (one["e"] != two["e"]).all()


def test_noise_of_a_large_shape_comes_in_short_blocks():
    shape = (2**19 + 1,)  # two steps would exceed a block of 2**20 numbers
    noise = step_noise({"z": ("normal", shape, 0)}, 3, seed=1)
    assert noise[:4].tolist() == training.stream(1, training.LATENT, 3).standard_normal(4).tolist()


def test_uniform_noise_is_open_at_both_ends_in_float32():
    u = step_noise({"u": ("uniform", (2**20,), 0)}, 0, dtype=torch.float32)
    assert 0 < u.min() and u.max() < 1
    check_mc(u, 0.5, what="mean of uniform noise")

    class Ends(np.random.Generator):  # draws that rounding to float32 sends to 0 and to 1
        def random(self, size=None, dtype=np.float64, out=None):
            return np.tile([0.0, 1 - 2.0**-53], (size[0], size[1] // 2))
    noise = training._Noise(0, training.LATENT, 0, "uniform", (4,), (), torch.empty(0))
    original, training.stream = training.stream, lambda *words: Ends(np.random.PCG64(0))
    try:
        ends = noise(0)
    finally:
        training.stream = original
    assert torch.isfinite(torch.log(ends)).all() and torch.isfinite(torch.log1p(-ends)).all()


def test_spec_of_one_entry_is_a_tensor_of_several_a_dict_of_none_nothing():
    normal = ("normal", (2, 3), 0)
    assert step_noise({}, 0) is None
    assert torch.is_tensor(step_noise({"z": normal}, 0))
    assert list(step_noise({"a": normal, "b": normal}, 0)) == ["a", "b"]


@pytest.mark.parametrize("entry, message", [(("gamma", (2,), 0), "kind of 'z' must be"),
                                            (("normal", (2,), 1), "batch_axis of 'z' must be")])
def test_noise_spec_is_checked(entry, message):
    with pytest.raises(ValueError, match=message):
        step_noise({"z": entry}, 0)


# --- The loop against an independent one

def test_fit_follows_a_numpy_adam_step_for_step():
    """A linear decoder without noise: gradient by hand, Adam by hand, order from epoch_order."""
    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))

        def bound(self, x):
            return -0.5 * (x @ self.w - 1.0)**2

    x, steps, lr = examples(), 60, 0.05
    w = np.zeros(D)
    m, v = np.zeros(D), np.zeros(D)
    losses = []
    for t in range(steps):
        epoch, place = divmod(t, N // B)
        rows = training.epoch_order(N, epoch, seed=5).numpy()[place * B:(place + 1) * B]
        batch = x.numpy()[rows]
        residual = batch @ w - 1.0
        losses.append(0.5 * (residual**2).mean())
        gradient = batch.T @ residual / B
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = lr / (1 + t)
        w -= rate * m / (1 - 0.9**(t + 1)) / (np.sqrt(v / (1 - 0.999**(t + 1))) + 1e-8)
    model = Regression()
    history = fit(model, x, num_steps=steps, batch_size=B, lr=lambda step: lr / (1 + step), seed=5, record_every=20)
    np.testing.assert_allclose(model.w.detach().numpy(), w, rtol=0, atol=1e-13)
    np.testing.assert_allclose(history.column("bound"), -np.reshape(losses, (3, 20)).mean(1), rtol=1e-13)
    assert history.column("step").tolist() == [20, 40, 60]
    assert history.column("epoch").tolist() == [6, 13, 19]


def test_first_gradient_is_that_of_step_noise_and_epoch_order():
    """Every kind of noise reaches the bound as step_noise says; Adam's first moment shows the gradient."""
    x, seen = examples(), []
    loss = lambda model, batch, noise: seen.append((batch, noise)) or -model.bound(batch, noise=noise)
    fit(TwoNoises(), x, num_steps=5, batch_size=B, lr=0.1, seed=2, loss=loss)
    want = step_noise(TwoNoises().noise_spec(B), 4, seed=2)
    batch, noise = seen[4]
    assert all(torch.equal(noise[name], want[name]) for name in want)
    assert torch.equal(batch, x[training.epoch_order(N, 1, seed=2)[B:2 * B]])


def test_accumulated_parts_make_the_same_step():
    models = [TinyVAE() for _ in range(3)]
    for model, accumulate in zip(models, (1, 4, 7), strict=True):
        fit(model, examples(), accumulate=accumulate, **SETTINGS)
    for other in models[1:]:
        assert (parameters_of(models[0]) - parameters_of(other)).abs().max() < 1e-12
    two = [TwoNoises() for _ in range(2)]
    for model, accumulate in zip(two, (1, 3), strict=True):
        fit(model, examples(), accumulate=accumulate, **SETTINGS)
    assert (parameters_of(two[0]) - parameters_of(two[1])).abs().max() < 1e-12


def test_float32_trains_on_the_same_noise_as_float64():
    models = [TinyVAE(dtype=dtype) for dtype in (torch.float64, torch.float32)]
    for model in models:
        fit(model, examples(), **SETTINGS)
    assert models[1].decoder.dtype == torch.float32
    assert (parameters_of(models[0]) - parameters_of(models[1])).abs().max() < 1e-4


def test_clip_norm_scales_a_long_gradient_down():
    # Adam with eps far above the gradient is gradient descent: the first step's length is the clipped norm.
    model = TwoNoises()
    groups = [{"params": [model.w], "eps": 1e6}]
    fit(model, examples(), num_steps=1, batch_size=B, lr=1e6, parameter_groups=groups, clip_norm=1e-3)
    assert abs(model.w.norm().item() - 1e-3) < 1e-8
    assert torch.equal(model.unused, torch.ones(2, dtype=torch.float64))


def test_parameter_groups_have_their_own_rates_and_leave_the_rest():
    model = TinyVAE()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = []
    fit(model, examples(), parameter_groups=[
        {"params": [model.decoder], "lr": lambda step: rates.append(step) or 1e-3},
        {"params": iter([model.to_loc])}], **{**SETTINGS, "num_steps": 1})
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["encoder"] == moved["to_log_var"] == 0
    assert abs(moved["decoder"] - 1e-3) < 1e-6 and abs(moved["to_loc"] - 1e-2) < 1e-5


def test_binarized_data_are_fresh_bernoulli_draws_of_the_means():
    means = torch.tensor([[0.0, 1.0, 0.25]], dtype=torch.float64).repeat(8, 1)
    seen = []

    class Pixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def bound(self, x):
            seen.append(x)
            return x @ self.w

    fit(Pixels(), means, num_steps=300, batch_size=8, lr=0.1, binarize=True)
    draws = torch.stack(seen)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert (draws[..., 0] == 0).all() and (draws[..., 1] == 1).all()
    check_mc(draws[..., 2].flatten(), 0.25, what="mean of a binarised pixel")
    assert not torch.equal(draws[0], draws[1])


def test_tuple_data_gives_tuple_batches_and_dataset_gives_x():
    x, labels = examples(), torch.arange(N)
    class Data:
        pass
    data = Data()
    data.x = x.numpy()
    data.x.flags.writeable = False
    model = TinyVAE()
    seen = []

    def loss(model, batch, noise):
        assert batch[1].dtype == torch.int64 and torch.equal(x[batch[1]], batch[0])
        seen.append(batch[1])
        return -model.bound(batch[0], num_samples=S, noise=noise)
    fit(model, (x, labels), loss=loss, **{**SETTINGS, "num_steps": 3})
    assert sorted(torch.cat(seen).tolist()) == sorted(set(torch.cat(seen).tolist()))
    other = TinyVAE()
    fit(other, data, **{**SETTINGS, "num_steps": 3})
    assert torch.equal(parameters_of(model), parameters_of(other))


def test_after_epoch_figures_and_progress():
    calls, lines = [], []
    model = TinyVAE()

    def after(model, epoch):
        calls.append(epoch)
        return {"figure": np.float32(epoch)} if epoch == 1 else None
    history = fit(model, examples(), after_epoch=after, progress=lambda *line: lines.append(line),
                  **{**SETTINGS, "num_steps": 10, "record_every": 100})
    assert calls == [0, 1, 2]
    assert history.column("figure").tolist() == [1.0]
    assert [(step, total) for step, total, _ in lines] == [(6, 10), (10, 10)]
    assert lines[0][2] == history[0]


# --- Resume

def run_to_the_end(checkpoint, num_steps=SETTINGS["num_steps"]):
    model = TinyVAE()
    history = fit(model, examples(), checkpoint=checkpoint, after_epoch=count_epochs,
                  **{**SETTINGS, "num_steps": num_steps})
    return model, history


def same(one, two):
    without_time = lambda history: [{k: v for k, v in record.items() if k != "seconds"} for record in history]
    states = [run[0].state_dict() for run in (one, two)]
    return (all(torch.equal(states[0][name], states[1][name]) for name in states[0])
            and without_time(one[1]) == without_time(two[1]))


def test_stopped_and_lengthened_run_ends_as_the_whole_one(tmp_path):
    whole = run_to_the_end(tmp_path / "whole.pt")
    for stop in (9, 18, 27):
        run_to_the_end(tmp_path / "parts.pt", stop)
    assert same(run_to_the_end(tmp_path / "parts.pt"), whole)
    assert same(run_to_the_end(tmp_path / "parts.pt"), whole)  # nothing left to do
    states = [read_checkpoint(tmp_path / name)["optimizer"]["state"] for name in ("whole.pt", "parts.pt")]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert not list(tmp_path.glob("*.part"))


def start_worker(checkpoint, *arguments, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []),
               str(HERE / "training_worker.py"), str(checkpoint), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(worker):
    _, errors = worker.communicate(timeout=300)
    assert worker.returncode == 0, errors


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_ends_bit_identical(tmp_path, kills):
    checkpoint, steps = tmp_path / "killed.pt", 1000 * kills
    rng = random.Random(kills)
    killed = 0
    while killed < kills:
        worker = start_worker(checkpoint, str(steps))
        was, deadline = step_of(checkpoint), time.time() + 120
        while step_of(checkpoint) == was and worker.poll() is None and time.time() < deadline:
            time.sleep(0.001)  # it trains, it is not only starting
        time.sleep(rng.uniform(0, 0.15))
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        assert worker.returncode == -signal.SIGKILL, "the run ended before it could be killed: make it longer"
        killed += 1
    before = step_of(checkpoint)
    finish(start_worker(checkpoint, str(steps)))
    finish(start_worker(tmp_path / "whole.pt", str(steps)))
    killed, whole = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "whole.pt")
    assert 0 < before < steps == killed["step"] == whole["step"]
    assert all(torch.equal(killed["model"][name], whole["model"][name]) for name in whole["model"])
    moments = [contents["optimizer"]["state"] for contents in (killed, whole)]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[1] for key in moments[1][i])
    assert [r["bound"] for r in killed["history"]] == [r["bound"] for r in whole["history"]]


def step_of(checkpoint):
    return read_checkpoint(checkpoint)["step"] if checkpoint.exists() else 0


def test_one_and_two_processes_end_in_the_same_parameters(tmp_path):
    two = start_worker(tmp_path / "two.pt", "60", processes=2)
    finish(start_worker(tmp_path / "one.pt", "60"))
    finish(two)
    one, two = read_checkpoint(tmp_path / "one.pt"), read_checkpoint(tmp_path / "two.pt")
    for name in one["model"]:
        assert (one["model"][name] - two["model"][name]).abs().max() < 1e-12, name
    np.testing.assert_allclose([r["bound"] for r in two["history"]], [r["bound"] for r in one["history"]], rtol=1e-12)
    both = torch.load(tmp_path / "two.pt.rank1", weights_only=True)  # the other process holds the same model
    assert all(torch.equal(both[name], two["model"][name]) for name in both)
    # A run that one process began may be ended by two, and is the same run.
    finish(start_worker(tmp_path / "one.pt", "90", processes=2))
    finish(start_worker(tmp_path / "two.pt", "90"))
    one, two = read_checkpoint(tmp_path / "one.pt"), read_checkpoint(tmp_path / "two.pt")
    assert all((one["model"][name] - two["model"][name]).abs().max() < 1e-12 for name in one["model"])


# --- Checkpoints that must be refused

def test_half_written_checkpoint_is_refused_by_name_at_any_length(tmp_path):
    path = tmp_path / "run.pt"
    run_to_the_end(path, 9)
    contents = path.read_bytes()
    for length in [0, 1, 100, len(contents) // 2, len(contents) - 1]:
        path.write_bytes(contents[:length])
        with pytest.raises(ValueError, match=r"checkpoint .*run\.pt is damaged .*delete it to start anew"):
            run_to_the_end(path)


def test_flipped_bit_is_refused_or_harmless(tmp_path):
    path = tmp_path / "run.pt"
    run_to_the_end(path, 9)
    contents, good = path.read_bytes(), read_checkpoint(path)
    rng, refused = random.Random(0), 0
    for _ in range(150):
        flipped = bytearray(contents)
        place = rng.randrange(len(flipped))
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            got = read_checkpoint(path)
        except ValueError as error:
            assert "run.pt is damaged" in str(error)
            refused += 1
        else:  # alignment padding, or a field that nobody reads
            assert got["step"] == good["step"]
            assert all(torch.equal(got["model"][name], good["model"][name]) for name in good["model"])
    assert refused > 20
    tensor = contents.find(good["model"]["decoder"].numpy().tobytes())
    flipped = bytearray(contents)
    flipped[tensor] ^= 1  # the last bit of a parameter: torch.load alone takes it
    path.write_bytes(flipped)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["decoder"], good["model"]["decoder"])
    with pytest.raises(ValueError, match="checksum of .* is wrong"):
        read_checkpoint(path)


def test_left_over_part_of_a_killed_write_does_not_matter(tmp_path):
    (tmp_path / "run.pt.part").write_bytes(b"half")
    assert same(run_to_the_end(tmp_path / "run.pt"), run_to_the_end(None))
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("change, message", [
    (dict(model=TinyVAE(hidden=H + 1)), r"shape of encoder is \[6, 5\] float64, expected \[7, 5\] float64"),
    (dict(model=TinyVAE(dtype=torch.float32)), "float64, expected .* float32"),
    (dict(data=examples() + 1), "data is [0-9a-f]{64}, expected [0-9a-f]{64}"),
    (dict(seed=1), "seed is 0, expected 1"),
    (dict(batch_size=B - 1), "batch_size is 7, expected 6"),
    (dict(lr=0.02), "lr of group 0 is 0.01, expected 0.02"),
    (dict(loss=lambda model, batch, noise: noise.mean((0, 2))), "loss is -bound, expected .*lambda"),
    (dict(clip_norm=1.0), "clip_norm is None, expected 1.0"),
    (dict(describe={"objective": "iwae"}), "objective is absent, expected iwae"),
    (dict(num_steps=8), "at step 9, past num_steps=8"),
])
def test_foreign_checkpoint_is_refused_by_name_and_changes_nothing(tmp_path, change, message):
    path = tmp_path / "run.pt"
    fit(TinyVAE(), examples(), checkpoint=path, **{**SETTINGS, "num_steps": 9})
    arguments = {"model": TinyVAE(), "data": examples(), **SETTINGS, **change}
    model, data = arguments.pop("model"), arguments.pop("data")
    before, contents = parameters_of(model), path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint .*run\.pt is .*" + message):
        fit(model, data, checkpoint=path, **arguments)
    assert torch.equal(parameters_of(model), before) and path.read_bytes() == contents


def test_other_files_are_not_taken_for_checkpoints(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by fit"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent.pt"):
        read_checkpoint(tmp_path / "absent.pt")


def test_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"):
        with training.write_atomically(path) as file:
            file.write(b"new")
            raise RuntimeError("disk")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# --- Bad input

@pytest.mark.parametrize("change, message", [
    (dict(lr=0), "lr must be a positive number or a function of the step, got 0"),
    (dict(lr=float("nan")), "lr must be a positive number"),
    (dict(lr="fast"), "lr must be a positive number or a function of the step, got 'fast'"),
    (dict(num_steps=0), "num_steps must be an integer of at least 1, got 0"),
    (dict(num_steps=2.5), "num_steps must be an integer of at least 1, got 2.5"),
    (dict(batch_size=N + 1), f"batch_size must be at most the number of examples, {N}, got {N + 1}"),
    (dict(accumulate=B + 1), f"accumulate must be at most the {B} examples of a process, got {B + 1}"),
    (dict(record_every=0), "record_every must be"),
    (dict(num_samples=0), "num_samples must be"),
    (dict(seed=-1), r"seed must be an integer in \[0, 2\*\*32\), got -1"),
    (dict(clip_norm=0), "clip_norm must be positive or None, got 0"),
    (dict(device="gpu7"), "device must be 'auto' or a device of this machine such as 'cpu', got 'gpu7'"),
    (dict(data=torch.zeros(0, D)), "data is empty"),
    (dict(data=torch.full((N, D), float("nan"))), "data must be finite"),
    (dict(data=torch.tensor(1.0)), r"data must be an array \[N, ...\]"),
    (dict(data=(examples(), torch.zeros(N + 1))), rf"one length, got lengths \[{N}, {N + 1}\]"),
    (dict(data=(examples(), torch.zeros(N))), "data is a tuple of 2 arrays: give a loss"),
    (dict(binarize=True), r"binarize: data must be Bernoulli means in \[0, 1\]"),
    (dict(parameter_groups=[{"params": []}]), "model has no parameter that requires a gradient"),
    (dict(parameter_groups=[{"params": [torch.zeros(1)], "lr": -1}]), "lr of a parameter group must be"),
    (dict(loss=lambda model, batch, noise: model.decoder.sum()),
     r"loss must return one value per example, \[7\], got shape \[\]"),
])
def test_bad_arguments_are_named(change, message):
    arguments = {"data": examples(), **SETTINGS, **change}
    data = arguments.pop("data")
    with pytest.raises(ValueError, match=message):
        fit(TinyVAE(), data, **arguments)


def test_bound_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"

    def breaks_after(model, batch, noise, count=[]):  # noqa: B006
        count.append(1)
        return -model.bound(batch, num_samples=S, noise=noise) * (float("nan") if len(count) == 15 else 1.0)
    with pytest.raises(FloatingPointError, match="the bound is nan between steps 9 and 18"):
        fit(TinyVAE(), examples(), loss=breaks_after, checkpoint=path, **SETTINGS)
    assert read_checkpoint(path)["step"] == 9


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_run_agrees_with_the_cpu(tmp_path):
    models = [TinyVAE() for _ in range(2)]
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        fit(model, examples(), **{**SETTINGS, "device": device})
    assert models[1].decoder.is_cuda
    assert (parameters_of(models[0]) - parameters_of(models[1]).cpu()).abs().max() < 1e-10


def test_scale_of_the_pages_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DLGM_SCALE", raising=False)
    assert training.scaled(800, 20_000) == 800
    monkeypatch.setenv("DLGM_SCALE", "gpu")
    assert training.scaled(800, 20_000) == 20_000
    monkeypatch.setenv("DLGM_SCALE", "huge")
    with pytest.raises(ValueError, match="the environment variable DLGM_SCALE must be cpu or gpu, got 'huge'"):
        training.scaled(800, 20_000)


def test_choose_device_takes_a_name_or_finds_one():
    assert training.choose_device("cpu").type == "cpu"
    assert training.choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_history_column_leaves_out_records_without_the_figure():
    history = training.History([{"step": 1, "bound": -2.0}, {"step": 2, "bound": -1.0, "valid": -1.5}])
    assert history.column("bound").tolist() == [-2.0, -1.0]
    assert history.column("valid").tolist() == [-1.5]
