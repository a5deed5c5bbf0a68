"""The one training loop of the book: every model is fitted by `fit`.

Chance is a function, never a state. The order of the data and all noise are functions of (seed, stream, counter)
alone, so a run that was killed and resumed, or spread over several processes, ends where the uninterrupted run on one
process ends, and a NumPy program can replay it number by number (`epoch_order`, `step_noise`).

Several processes: start the program with `torchrun --nproc-per-node N` inside `with processes():`. Each process takes
its share of the batch and of the noise, and one all-reduce adds up [loss, all gradients]; the model is not wrapped.
"""

import contextlib
import hashlib
import math
import os
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dlgm_tutorial import __version__

__all__ = ["BINARIZATION", "EVALUATION", "LATENT", "ORDER", "History", "choose_device", "epoch_order", "fit",
           "processes", "read_checkpoint", "scaled", "step_noise", "stream", "write_atomically"]

# One stream for each use of chance. A number, once given, is never given to anything else.
ORDER, LATENT, BINARIZATION, EVALUATION = 0, 1, 2, 3
CHECKPOINT_FORMAT = 1


# --- Chance as a function

def stream(seed, stream, counter=0, entry=0):
    """Return the NumPy generator of (seed, stream, counter, entry): the same four numbers, the same draws.

    seed, stream, counter, entry: integers in [0, 2**32); NumPy's SeedSequence mixes them, so that neighbouring
    counters are independent. Raises ValueError for another seed.

    >>> bool(stream(0, LATENT, 5).random() == stream(0, LATENT, 5).random())
    True
    """
    words = [seed, stream, counter, entry]
    # Up to here each number is one 32-bit word of the SeedSequence, hence no two lists meet.
    if not all(isinstance(word, (int, np.integer)) and 0 <= word < 2**32 for word in words):
        raise ValueError(f"seed, stream, counter and entry must be integers in [0, 2**32), got {words}")
    return np.random.default_rng([int(word) for word in words])


def epoch_order(num_data, epoch, *, seed=0):
    """Return the order in which `fit` visits the rows of the data in an epoch: a permutation, int64 [num_data].

    Step t of an epoch takes rows order[t B : (t + 1) B]; a last batch shorter than B is dropped.
    """
    return torch.from_numpy(stream(seed, ORDER, epoch).permutation(num_data))


class _Noise:
    """One noise array as a function of (seed, stream, entry, step), drawn for a block of steps at once.

    Drawn in float64 (binarisation: float32), then cast, so that float32 and float64 runs see the same noise. The
    length of a block follows from the shape alone: it is part of the definition. Every process draws the global
    block and keeps `index`, its slice of the batch.
    """

    def __init__(self, seed, purpose, entry, kind, shape, index, like):
        self.seed, self.purpose, self.entry, self.kind = seed, purpose, entry, kind
        self.shape, self.index, self.like = tuple(shape), index, like
        self.length = max(1, min(64, 2**20 // max(1, math.prod(self.shape))))
        self.block = None

    def __call__(self, step):
        block, place = divmod(step, self.length)
        if block != self.block:
            rng = stream(self.seed, self.purpose, block, self.entry)
            if self.kind == "normal":
                draws = rng.standard_normal((self.length, *self.shape))
            else:
                precision = np.float32 if self.kind == "uniform32" else np.float64
                draws = rng.random((self.length, *self.shape), dtype=precision)
            draws = torch.from_numpy(draws[(slice(None), *self.index)]).to(self.like)
            if self.kind == "uniform":  # open at both ends, also after rounding to float32: log u and log(1 - u) exist
                limits = torch.finfo(draws.dtype)
                draws.clamp_(limits.tiny, 1 - limits.eps / 2)
            self.draws, self.block = draws, block
        return self.draws[place]


def _check_spec(spec):
    for name, entry in spec.items():
        kind, shape, axis = entry
        if kind not in ("normal", "uniform"):
            raise ValueError(f"noise_spec: kind of {name!r} must be 'normal' or 'uniform', got {kind!r}")
        if axis is not None and not 0 <= axis < len(shape):
            raise ValueError(f"noise_spec: batch_axis of {name!r} must be an axis of {tuple(shape)}, got {axis!r}")


def _at(axis, rows):
    """The index that takes `rows` along the batch axis (None: the array is shared by the whole batch)."""
    return () if axis is None else (slice(None),) * axis + (rows,)


def _hand_over(arrays):
    """What a bound receives as `noise=`: nothing, the one array, or a dict of several."""
    if len(arrays) > 1:
        return arrays
    return next(iter(arrays.values()), None)


def step_noise(spec, step, *, seed=0, dtype=torch.float64, device="cpu"):
    """Return the noise that `fit` hands to the bound at a step, counted from 0.

    spec: {name: (kind, shape, batch_axis)}, as a model's noise_spec(batch_size, num_samples) gives it; kind "normal"
    is standard normal, "uniform" is on the open interval (0, 1). Entry i of the spec is drawn from stream
    (seed, LATENT, block of steps, i).
    Returns None for an empty spec, the one tensor for a spec of one entry, else a dict name -> tensor: what `bound`
    takes as `noise=`.

    >>> step_noise({"z": ("normal", (1, 3, 2), 1)}, 7).shape
    torch.Size([1, 3, 2])
    """
    _check_spec(spec)
    like = torch.empty(0, dtype=dtype, device=device)
    return _hand_over({name: _Noise(seed, LATENT, i, kind, shape, (), like)(step)
                       for i, (name, (kind, shape, _)) in enumerate(spec.items())})


# --- Devices and processes

def choose_device(device="auto"):
    """Return the torch.device of a name: "auto" is this process's CUDA device where there is one, else the CPU.

    Raises ValueError for a device that torch does not know or that this machine lacks.
    """
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be 'auto' or a device of this machine such as 'cpu', got {device!r}") from error
    return device


def scaled(default, gpu):
    """Choose a size of a page, such as its training steps: `default`, or `gpu` where DLGM_SCALE is set to gpu.

    Pages are sized for two cores of a CPU; the environment variable asks for what a GPU does in some minutes.
    Raises ValueError for another value of the variable than cpu or gpu.

    >>> scaled(800, 20_000)
    800
    """
    scale = os.environ.get("DLGM_SCALE", "cpu")
    if scale not in ("cpu", "gpu"):
        raise ValueError(f"the environment variable DLGM_SCALE must be cpu or gpu, got {scale!r}")
    return gpu if scale == "gpu" else default


@contextlib.contextmanager
def processes(device="auto"):
    """Join the processes that `torchrun` started, for the length of a `with` block; alone, do nothing.

    Gives (rank, world), this process's number and how many there are. NCCL where the device is a GPU, else gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    on_gpu = choose_device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
        dist.barrier()  # else a process may be torn down while another still talks to it
    finally:
        dist.destroy_process_group()


def _sum_over_processes(parameters, loss):
    """Add up loss and gradients over the processes, in place, by one all-reduce of one flat vector."""
    flat = torch.cat([loss.reshape(1).to(parameters[0]), *(p.grad.flatten() for p in parameters)])
    dist.all_reduce(flat)
    loss_sum, *gradients = flat.split([1, *(p.numel() for p in parameters)])
    loss.copy_(loss_sum[0])
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad.copy_(gradient.view_as(p))


# --- Files

@contextlib.contextmanager
def write_atomically(path):
    """Open `path` for writing bytes, such that at every moment the whole old file or the whole new one is there.

    Written to PATH.part in the same folder, flushed to the disk, then put in place by os.replace. If the block
    raises, the old file stays and the part is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path):
    """Return what `fit` wrote to the file `path`, on the CPU: a dict with describe, step, history, model, optimizer.

    Raises FileNotFoundError where there is none, ValueError for a damaged file. torch.load alone does not notice a
    flipped bit, so the checksums of the zip file are compared first.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the damage makes zipfile, pickle or torch raise
        raise ValueError(f"checkpoint {path} is damaged ({error}); delete it to start anew") from error
    if not isinstance(contents, dict) or contents.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"checkpoint {path} was not written by fit, or by another version of it: "
                         f"expected format {CHECKPOINT_FORMAT}")
    return contents


def _load(path, model, optimizer, describe, num_steps):
    """Put a checkpoint's state into model and optimizer, after all checks have passed; (0, History()) without one."""
    if path is None or not Path(path).exists():
        return 0, History()
    contents = read_checkpoint(path)
    for key in [*describe, *(key for key in contents["describe"] if key not in describe)]:
        got, want = contents["describe"].get(key, "absent"), describe.get(key, "absent")
        if got != want:
            raise ValueError(f"checkpoint {path} is of another run: {key} is {got}, expected {want}")
    if contents["step"] > num_steps:
        raise ValueError(f"checkpoint {path} is at step {contents['step']}, past num_steps={num_steps}")
    model.load_state_dict(contents["model"])
    optimizer.load_state_dict(contents["optimizer"])
    return contents["step"], History(contents["history"])


def _save(path, model, optimizer, step, describe, history):
    contents = {"format": CHECKPOINT_FORMAT, "describe": describe, "step": step, "history": [dict(r) for r in history],
                "versions": {"dlgm_tutorial": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
                "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with write_atomically(path) as file:
        torch.save(contents, file)


def _describe(model, data, optimizer, **settings):
    """What makes two runs the same run, in plain types. Steps, records, device and processes are not in it."""
    digest = hashlib.sha256()
    for array in data:
        digest.update(array.detach().cpu().contiguous().numpy().tobytes())
    plain = lambda value: (getattr(value, "__qualname__", type(value).__name__) if callable(value)
                           else value.item() if isinstance(value, np.generic) else value)
    shapes = {f"shape of {key}": f"{list(value.shape)} {value.dtype}".replace("torch.", "")
              for key, value in model.state_dict().items()}
    groups = {f"parameter group {i}": ", ".join(
        [f"{len(group['params'])} tensors", *(f"{key} {group[key]}" for key in ("betas", "eps", "weight_decay"))])
        for i, group in enumerate(optimizer.param_groups)}
    return {"model": type(model).__qualname__, **shapes, "data": digest.hexdigest(), "optimizer": "Adam", **groups,
            **{key: plain(value) for key, value in settings.items()}}


# --- The loop

class History(list):
    """The records of a run: a list of dicts with step, epoch, bound [nats] and seconds, one every `record_every` steps.

    >>> History([{"step": 10, "bound": -3.0}, {"step": 20, "bound": -2.0}]).column("bound").tolist()
    [-3.0, -2.0]
    """

    def column(self, name):
        """Return one figure of all records that have it, as an array, for a plot."""
        return np.array([record[name] for record in self if name in record])


def _negative_bound(model, batch, noise, *, num_samples):
    """The default loss: minus the model's own bound, [B]."""
    return -(model.bound(batch) if noise is None else model.bound(batch, num_samples=num_samples, noise=noise))


def _tensors(data, device, dtype):
    """The data as a tuple of tensors of one length; floats in the model's precision."""
    data = getattr(data, "x", data)
    arrays = tuple(array if torch.is_tensor(array) else torch.from_numpy(np.require(array, requirements="W"))
                   for array in (data if isinstance(data, (tuple, list)) else [data]))
    if not arrays or any(array.ndim == 0 for array in arrays):
        raise ValueError("data must be an array [N, ...], or a tuple of arrays with one N")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"data must be arrays of one length, got lengths {[len(array) for array in arrays]}")
    if len(arrays[0]) == 0:
        raise ValueError("data is empty: expected at least one example")
    for array in arrays:
        # One value that is not finite makes the sum so: one pass over the data settles most cases.
        if array.is_floating_point() and not (math.isfinite(array.sum()) or torch.isfinite(array).all()):
            raise ValueError("data must be finite, got NaN or infinity")
    return tuple(array.to(device, dtype if array.is_floating_point() else None) for array in arrays)


def _check(*, num_steps, batch_size, num_data, world, accumulate, record_every, num_samples, seed, clip_norm):
    for name, value in {"num_steps": num_steps, "batch_size": batch_size, "accumulate": accumulate,
                        "record_every": record_every, "num_samples": num_samples}.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if batch_size > num_data:
        raise ValueError(f"batch_size must be at most the number of examples, {num_data}, got {batch_size}")
    smallest = batch_size // world
    if accumulate > smallest:
        raise ValueError(f"accumulate must be at most the {smallest} examples of a process, got {accumulate}")
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm!r}")


def _check_lr(lr, name="lr"):
    if not callable(lr) and not (isinstance(lr, (int, float)) and 0 < lr < math.inf):
        raise ValueError(f"{name} must be a positive number or a function of the step, got {lr!r}")
    return lr


def _make_optimizer(model, parameter_groups, lr):
    """Fused Adam, and the learning rate of each of its groups: a number, or a function of the step."""
    groups = [{"params": list(model.parameters())}] if parameter_groups is None else [
        {**group, "params": list(group["params"])} for group in parameter_groups]
    rates = [_check_lr(group.get("lr", lr), "lr of a parameter group") for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["params"] = [p for p in group["params"] if p.requires_grad]
        group["lr"] = float(rate(0) if callable(rate) else rate)
    if not any(group["params"] for group in groups):
        raise ValueError("model has no parameter that requires a gradient: nothing would be trained")
    return torch.optim.Adam(groups, fused=True), rates


def fit(model, data, *, num_steps, batch_size, lr, seed=0, loss=None, parameter_groups=None, after_epoch=None,
        device="auto", checkpoint=None, accumulate=1, progress=None, num_samples=1, binarize=False, clip_norm=None,
        record_every=500, describe=None):
    """Maximise the model's bound by Adam on mini-batches; return the `History`. The model is trained in place.

    model         an nn.Module with bound(x, *, num_samples, noise) -> [B] and noise_spec(batch_size, num_samples) ->
                  {name: (kind "normal" | "uniform", shape, batch_axis)}; a model without noise_spec gets no noise.
                  A spec of one entry is handed over as that tensor, of several as a dict name -> tensor (`step_noise`).
                  A batch_axis of None: an array that the whole batch shares. The model's precision is the run's.
    data          [N, ...] array, tensor or Dataset (its x); or a tuple of such arrays of one length, and a batch is
                  a tuple too (labels, row numbers): then give a loss
    num_steps     parameter updates in all, those of a resumed checkpoint included
    lr            learning rate: a number, or a function of the step (from 0)
    loss          callable (model, batch, noise) -> [B], minimised; default: minus the bound with num_samples samples
    parameter_groups   a list of dicts as torch.optim.Adam takes them ("params", and "lr", "betas", "weight_decay",
                  ...); parameters in no group stay as they are. Default: all parameters, with lr
    after_epoch   callable (model, epoch), after each pass through the data. What it changes must be in the model's
                  state_dict (parameters, buffers) to survive a resume. Figures {name: number} that it returns
                  enter the history
    device        "auto" (CUDA where there is one), or a device; model and data are moved there
    checkpoint    a file: written every record_every steps and at the end, resumed from where it exists
    accumulate    split each batch into so many parts, one backward pass each: less memory, same step
    progress      callable (step, num_steps, record), at each record
    binarize      read x as Bernoulli means and draw it anew at each use (dynamic binarisation)
    clip_norm     largest norm of the whole gradient; a longer one is scaled down
    describe      further plain values that a checkpoint must agree on, such as {"data_name": "mnist"}

    Each record holds step, epoch, seconds and the bound in nats (minus the loss), averaged over the steps since the
    last record. All chance is a function of (seed, step): see `epoch_order`, `step_noise`. A model with dropout or
    other noise of its own inside is not resumed exactly.
    Raises ValueError for bad arguments, a damaged checkpoint or one of another run (nothing is changed then), and
    FloatingPointError when the bound is no longer finite (the last checkpoint stays).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = choose_device(device)
    _check_lr(lr)
    optimizer, rates = _make_optimizer(model.to(device), parameter_groups, lr)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    data = _tensors(data, device, parameters[0].dtype)
    _check(num_steps=num_steps, batch_size=batch_size, num_data=len(data[0]), world=world, accumulate=accumulate,
           record_every=record_every, num_samples=num_samples, seed=seed, clip_norm=clip_norm)
    if len(data) > 1 and loss is None:
        raise ValueError(f"data is a tuple of {len(data)} arrays: give a loss, the bound takes one")
    if binarize and not ((data[0] >= 0) & (data[0] <= 1)).all():
        raise ValueError("binarize: data must be Bernoulli means in [0, 1]")
    if world > 1 and any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ValueError("model has batch normalisation, whose buffers differ between processes: use one process")

    # This process's share of the batch, of the noise, and the model's state before the first step
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    share = mine.stop - mine.start
    spec = model.noise_spec(batch_size, num_samples) if hasattr(model, "noise_spec") else {}
    _check_spec(spec)
    noises = {name: _Noise(seed, LATENT, i, kind, shape, _at(axis, mine), parameters[0])
              for i, (name, (kind, shape, axis)) in enumerate(spec.items())}
    uniforms = _Noise(seed, BINARIZATION, 0, "uniform32", (batch_size, *data[0].shape[1:]), (mine,),
                      torch.empty(0, device=device))
    described = checkpoint and _describe(
        model, data, optimizer, batch_size=batch_size, seed=seed, loss=loss or "-bound", num_samples=num_samples,
        binarize=binarize, clip_norm=clip_norm, **{f"lr of group {i}": rate for i, rate in enumerate(rates)},
        **(describe or {}))
    start, history = _load(checkpoint, model, optimizer, described, num_steps)
    if world > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)
    loss = loss or partial(_negative_bound, num_samples=num_samples)
    per_epoch, epoch = len(data[0]) // batch_size, None
    seconds, started = (history[-1]["seconds"] if history else 0.0), time.perf_counter()
    total, since = 0.0, start

    for step in range(start, num_steps):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            order = epoch_order(len(data[0]), epoch, seed=seed).to(device)
        first = step % per_epoch * batch_size
        rows = order[first:first + batch_size][mine]
        noise = {name: draw(step) for name, draw in noises.items()}
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if callable(rate):
                group["lr"] = float(rate(step))

        optimizer.zero_grad()
        step_loss = 0.0
        for part in (slice(i, share, accumulate) for i in range(accumulate)):
            batch = tuple(array[rows[part]] for array in data)
            if binarize:
                batch = ((uniforms(step)[part] < batch[0]).to(batch[0].dtype), *batch[1:])
            part_noise = {name: noise[name][_at(spec[name][2], part)] for name in noise}
            values = loss(model, batch if len(batch) > 1 else batch[0], _hand_over(part_noise))
            if values.shape != rows[part].shape:
                raise ValueError(f"loss must return one value per example, {list(rows[part].shape)}, "
                                 f"got shape {list(values.shape)}")
            # Divided by the batch of all processes and summed over them, so unequal shares are exact.
            piece = values.sum() / batch_size
            piece.backward()
            step_loss = step_loss + piece.detach()
        for p in parameters:  # no gradient counts as zero, on every process alike
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if world > 1:
            _sum_over_processes(parameters, step_loss)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        total = total + step_loss

        done = step + 1
        figures = (after_epoch(model, epoch) if after_epoch and done % per_epoch == 0 else None) or {}
        if done % record_every == 0 or done == num_steps or figures:
            bound = -float(total) / (done - since)
            if not math.isfinite(bound):
                raise FloatingPointError(f"the bound is {bound} between steps {since} and {done}: "
                                         "a smaller lr or clip_norm may help")
            record = {"step": done, "epoch": epoch, "bound": bound, "seconds": seconds + time.perf_counter() - started,
                      **{name: float(value) for name, value in figures.items()}}
            history.append(record)
            total, since = 0.0, done
            if checkpoint and rank == 0:
                _save(checkpoint, model, optimizer, done, described, history)
            if world > 1:
                dist.barrier()
            if progress and rank == 0:
                progress(done, num_steps, record)
    return history
