"""The papers' experiments from the command line: one results file each, which the pages read.

    python -m dlgm_tutorial.reproduce --list
    python -m dlgm_tutorial.reproduce CHAPTER EXPERIMENT [--data-dir D] [--device auto] [--seeds 0-4] [--steps N]
                                      [--checkpoint-dir C] [--tf32] [--out book/results]
    python -m dlgm_tutorial.reproduce CHAPTER EXPERIMENT --merge PART... [--out book/results]

writes OUT/CHAPTER-EXPERIMENT.json (and .npz, where the experiment returns arrays) with the command, versions, commit,
device, data checksums, each seed's figures and their mean and standard error. It is rewritten after each seed. With
--checkpoint-dir a killed command resumes where it was. On several GPUs: one process a seed, each with its own --out,
then --merge of those folders; or `torchrun --nproc-per-node N -m dlgm_tutorial.reproduce ...` for one large run.

An experiment is a function in a module of `dlgm_tutorial/experiments/` whose name starts with its chapter: every such
module is found by its name, and chapters share no file. A template, `dlgm_tutorial/experiments/ch09_example.py`:

    from dlgm_tutorial.reproduce import experiment
    from dlgm_tutorial.stochastic_backprop import DLGM
    from dlgm_tutorial.training import fit

    @experiment("09", "vae-mnist", paper="Kingma and Welling 2014", table="Figure 2", hours=0.5, steps=50_000)
    def vae_mnist(run):
        '''A plain VAE on binarised MNIST.'''
        train, test = (run.load("binarized_mnist", split) for split in ("train", "test"))
        model = DLGM(784, [50], [[200, 200]])
        fit(model, train, batch_size=100, lr=1e-3, **run.fit_options())   # steps, seed, device, checkpoint, progress
        return {"bound": float(model.bound(test.x).mean())}, {"weight": model.weight.detach().numpy()}

It is called once a seed and returns figures {name: number, text, list or dict of those}, or (figures, arrays); the
arrays of the first seed become the .npz (at most 1 MB). `rows=` may name a function of the runs that makes the rows
of the table on the page (`results.table(NAME)`); without it, there is a row for each figure that is a number.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import pkgutil
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from dlgm_tutorial import __version__, training

__all__ = ["Experiment", "Run", "experiment", "experiments", "main", "merge", "progress_line",
           "summarise"]

MAX_ARRAYS = 2**20  # bytes of an .npz


@dataclass(frozen=True)
class Experiment:
    """What `@experiment` registers: the function, and what --list prints."""

    chapter: str
    name: str
    function: object
    paper: str = ""
    table: str = ""
    hours: float | None = None
    steps: int | None = None
    rows: object = None

    @property
    def file(self):
        """Name of its results file, without ending, as `results.load` takes it."""
        return f"{self.chapter}-{self.name}"

    @property
    def title(self):
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


_REGISTRY = {}


def experiment(chapter, name, *, paper="", table="", hours=None, steps=None, rows=None):
    """Register the decorated function run -> figures, or (figures, arrays), as an experiment.

    chapter: two digits, "01"; name: lower case with hyphens; paper, table: what is reproduced; hours: expected, all
    seeds on the machine that it is meant for; steps: default of --steps; rows: function (list of runs) -> rows of the
    page's table. Raises ValueError for a name that is taken or malformed.
    """
    if not re.fullmatch(r"\d\d", chapter) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"an experiment is named by two digits and lower-case words, '01' 'factor-analysis', "
                         f"got {chapter!r} {name!r}")

    def register(function):
        known = _REGISTRY.get((chapter, name))
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"experiment {chapter} {name} is registered twice: in {known.function.__module__} "
                             f"and in {function.__module__}")
        _REGISTRY[chapter, name] = Experiment(chapter, name, function, paper, table, hours, steps, rows)
        return function
    return register


def experiments():
    """Import every module of `dlgm_tutorial.experiments` and return {(chapter, name): Experiment}, in order."""
    package = importlib.import_module("dlgm_tutorial.experiments")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


# --- One run

@dataclass(frozen=True)
class Run:
    """What an experiment is given: one seed's settings, and its access to data and checkpoints."""

    file: str
    seed: int
    steps: int | None
    device: torch.device
    data_dir: str | None = None
    checkpoint_dir: str | None = None
    data_sha256: dict = field(default_factory=dict)

    def load(self, name, split, **options):
        """Return datasets.load(name, split, ...) from --data-dir; the checksum of its x enters the results file."""
        from dlgm_tutorial import datasets
        data = datasets.load(name, split, data_dir=self.data_dir, **options)
        array = np.ascontiguousarray(data.x)
        title = "/".join([name, split, *(f"{key}={value}" for key, value in options.items())])
        self.data_sha256[title] = hashlib.sha256(array.tobytes()).hexdigest()
        return data

    def checkpoint(self, part=""):
        """Return the checkpoint file of this seed (and part of the experiment), or None without --checkpoint-dir."""
        if self.checkpoint_dir is None:
            return None
        return Path(self.checkpoint_dir) / f"{self.file}-seed{self.seed}{'-' + part if part else ''}.pt"

    def fit_options(self, part=""):
        """Return the arguments of `fit` that the command line settles: num_steps, seed, device, checkpoint, progress.

        part: a word that tells the fits of one experiment apart. Raises ValueError where there is no number of steps.
        """
        if self.steps is None:
            raise ValueError(f"experiment {self.file} has no default number of steps: give --steps")
        return {"num_steps": self.steps, "seed": self.seed, "device": self.device, "checkpoint": self.checkpoint(part),
                "progress": progress_line(f"{self.file} seed {self.seed}{' ' + part if part else ''}")}


def progress_line(title, file=None):
    """Return a progress callable for `fit`: one line that rewrites itself on a terminal, else a line a record.

    title: what the line begins with; file: where it goes (default: standard error).
    """
    file = file or sys.stderr

    def progress(step, num_steps, record):
        end = "\n" if step == num_steps or not file.isatty() else "\r"
        print(f"{title}: step {step}/{num_steps}, bound {record['bound']:.3f} nats, {record['seconds']:.0f} s",
              end=end, file=file, flush=True)
    return progress


def _plain(value, name):
    """Figures as JSON knows them; ValueError names what is not finite or of another kind."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if torch.is_tensor(value) or isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"figure {name} is {value}: expected a finite number, or None for what does not exist")
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(f"figure {name} must be a number, text, list or dict, got {type(value).__name__}")
    return value


def _numbers(figures, prefix=""):
    """The figures that are numbers, nested ones under dotted names; lists are left out."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def summarise(runs):
    """Return {figure: {mean, standard_error, seeds}} over the runs; the standard error of one run is None.

    >>> summarise([{"figures": {"nats": 1.0}}, {"figures": {"nats": 3.0}}])
    {'nats': {'mean': 2.0, 'standard_error': 1.0, 'seeds': 2}}
    """
    values = {}
    for run in runs:
        for name, value in _numbers(run["figures"]):
            values.setdefault(name, []).append(value)
    error = lambda v: float(np.std(v, ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None
    return {name: {"mean": float(np.mean(v)), "standard_error": error(v), "seeds": len(v)}
            for name, v in values.items()}


# --- The file

def _git(*arguments):
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True,
                              timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor():
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _environment(device):
    commit = _git("rev-parse", "HEAD")
    cuda = device.type == "cuda"
    return {"version": __version__, "commit": commit,
            "dirty": commit and bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!/book/results")),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
                         "cuda": torch.version.cuda if cuda else None},
            "device": {"type": device.type, "name": torch.cuda.get_device_name(device) if cuda else _processor(),
                       "count": int(os.environ.get("WORLD_SIZE", 1))},
            "threads": torch.get_num_threads()}


def _write_json(path, contents):
    text = json.dumps(contents, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with training.write_atomically(path) as file:
        file.write(text.encode())


def _write_arrays(path, arrays):
    buffer = BytesIO()
    np.savez_compressed(buffer, **{name: array.detach().cpu().numpy() if torch.is_tensor(array) else np.asarray(array)
                                   for name, array in arrays.items()})
    if buffer.tell() > MAX_ARRAYS:
        raise ValueError(f"arrays of {path.stem} take {buffer.tell()} bytes compressed, at most {MAX_ARRAYS} are kept")
    with training.write_atomically(path) as file:
        file.write(buffer.getvalue())


def _add_tables(contents, entry):
    contents["summary"] = summarise(contents["runs"])
    contents["rows"] = _plain(entry.rows(contents["runs"]), "rows") if entry.rows else [
        {"figure": name, **values} for name, values in contents["summary"].items()]
    return contents


def _command(options, world):
    """The command that was given, without the options that name folders of this machine."""
    words = (["torchrun", "--nproc-per-node", str(world), "-m"] if world > 1 else ["python", "-m"])
    words += ["dlgm_tutorial.reproduce", options.chapter, options.experiment]
    words += ["--seeds", options.seeds] if options.seeds != "0" else []
    words += ["--steps", str(options.steps)] if options.steps is not None else []
    words += ["--device", options.device] if options.device != "auto" else []
    words += ["--tf32"] if options.tf32 else []
    return shlex.join(words)


def _reproduce(entry, options, seeds):
    device = training.choose_device(options.device)
    # Said explicitly: torch's own default is off for products and on for convolutions.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    with training.processes(options.device) as (rank, world):
        contents = {"experiment": f"{entry.chapter} {entry.name}", "title": entry.title, "paper": entry.paper,
                    "table": entry.table, "command": _command(options, world), **_environment(device),
                    "tf32": options.tf32, "steps": options.steps or entry.steps, "seeds": seeds,
                    "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "data_sha256": {}, "runs": []}
        for seed in seeds:
            run = Run(entry.file, seed, options.steps or entry.steps, device, options.data_dir, options.checkpoint_dir)
            torch.manual_seed(seed)  # initial weights; everything later is a function of (seed, step)
            started = time.perf_counter()
            result = entry.function(run)
            figures, arrays = result if isinstance(result, tuple) else (result, None)
            contents["data_sha256"].update(run.data_sha256)
            contents["runs"].append({"seed": seed, "seconds": round(time.perf_counter() - started, 3),
                                     "figures": _plain(figures, "figures")})
            if rank == 0:
                if arrays and seed == seeds[0]:
                    _write_arrays(Path(options.out) / f"{entry.file}.npz", arrays)
                _write_json(Path(options.out) / f"{entry.file}.json", _add_tables(contents, entry))
    return contents


def merge(entry, parts, out):
    """Join the results of the experiment `entry` from the folders `parts`, each with other seeds, in the folder `out`.

    The parts must agree in what makes them one experiment (version, commit, device, steps, data); the command
    of the first is kept, with all seeds. Raises FileNotFoundError or ValueError naming the folder and the difference.
    """
    files = [Path(part) / f"{entry.file}.json" for part in parts]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"nothing to merge: no {file}")
    contents = [json.loads(file.read_text()) for file in files]
    first = contents[0]
    for file, other in zip(files, contents, strict=True):
        for key in ("experiment", "version", "commit", "versions", "device", "tf32", "steps", "data_sha256"):
            if other[key] != first[key]:
                raise ValueError(f"{file} is of another run: {key} is {other[key]}, expected {first[key]}")
    runs = sorted((run for part in contents for run in part["runs"]), key=lambda run: run["seed"])
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the parts of {entry.file} hold the same seed twice: {seeds}")
    merged = {**first, "runs": runs, "seeds": seeds, "started": min(part["started"] for part in contents),
              "dirty": any(part["dirty"] for part in contents), "merged": [part["command"] for part in contents]}
    arrays = next((file.with_suffix(".npz") for file, part in zip(files, contents, strict=True)
                   if part["runs"] and part["runs"][0]["seed"] == seeds[0]), None)
    if arrays is not None and arrays.is_file():
        with training.write_atomically(Path(out) / arrays.name) as file:
            file.write(arrays.read_bytes())
    _write_json(Path(out) / f"{entry.file}.json", _add_tables(merged, entry))
    return merged


# --- The command line

def _seeds(text):
    """'0-4' or '0,2,5-7' as a list of integers."""
    seeds = []
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        for part in text.split(","):
            ends = [int(end) for end in part.split("-")]
            seeds += range(ends[0], ends[-1] + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected different seeds such as 3, 0-4 or 0,2,5-7, got {text!r}")
    return seeds


def _listing(known):
    lines = []
    for entry in known.values():
        source = ", ".join(part for part in (entry.paper, entry.table) if part)
        hours = "" if entry.hours is None else f" · {entry.hours:g} h"
        lines.append(f"{entry.chapter} {entry.name:28} {entry.title}{' · ' + source if source else ''}{hours}")
    return "\n".join(lines) or "no experiment is registered"


def main(arguments=None):
    """Run the command line on `arguments` (default: the program's own); return its status, 2 for an unknown word."""
    parser = argparse.ArgumentParser(prog="python -m dlgm_tutorial.reproduce",
                                     description="Run one of the papers' experiments and write its results file.")
    parser.add_argument("chapter", nargs="?", help="two digits, such as 01")
    parser.add_argument("experiment", nargs="?", help="its name, as --list prints it")
    parser.add_argument("--list", action="store_true", help="print all experiments with paper, table and hours")
    parser.add_argument("--data-dir", help="folder of the data sets (default: $DLGM_DATA_DIR, else downloads)")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, ...")
    parser.add_argument("--seeds", default="0", help="such as 3, 0-4 or 0,2,5-7")
    parser.add_argument("--steps", type=int, help="parameter updates (default: the experiment's)")
    parser.add_argument("--checkpoint-dir", help="folder of checkpoints: a killed command resumes from there")
    parser.add_argument("--tf32", action="store_true", help="train in TF32 on a GPU (recorded in the file)")
    parser.add_argument("--out", default="book/results", help="folder of the results file")
    parser.add_argument("--merge", nargs="+", metavar="PART", help="join the files of these folders instead of running")
    options = parser.parse_args(arguments)
    known = experiments()
    if options.list:
        print(_listing(known))
        return 0
    entry = known.get((options.chapter, options.experiment))
    if entry is None:
        asked = " ".join(word for word in (options.chapter, options.experiment) if word) or "nothing"
        print(f"no experiment {asked!r}; there are:\n{_listing(known)}", file=sys.stderr)
        return 2
    if options.merge:
        try:
            merge(entry, options.merge, options.out)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        return 0
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    try:
        seeds = _seeds(options.seeds)
    except ValueError as error:
        parser.error(str(error))
    _reproduce(entry, options, seeds)
    return 0


if __name__ == "__main__":
    np.finfo(np.float32), np.finfo(np.float64)  # NumPy looks for its smallest numbers once: before they are flushed
    torch.set_flush_denormal(True)  # Adam's moments of rarely lit pixels decay into denormals, which are slow
    # Experiments import `dlgm_tutorial.reproduce`: run that module, not this second copy named __main__.
    sys.exit(importlib.import_module("dlgm_tutorial.reproduce").main())
