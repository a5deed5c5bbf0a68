"""Data sets: embedded, from a local folder, or downloaded once and checked; and the toy sets.

What cannot be had is an error that names the file and its address; nothing is ever made up in its place.
"""

import hashlib
import math
import os
import tempfile
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from dlgm_tutorial._data_sources import LEFT_OUT, SOURCES, Source, all_rows, last

__all__ = ["Dataset", "available", "binarize", "circle", "load", "parabola", "wave"]

BINARIZATIONS = (None, "fixed", "dynamic", "threshold")


@dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    x: [N, D] float32 in [0, 1], colour images plane by plane; y: [N] int64 or None;
    image_shape: (channels, height, width); name, split, binarization: what was asked for.
    """

    x: torch.Tensor
    y: torch.Tensor | None
    image_shape: tuple
    name: str = ""
    split: str = ""
    binarization: str | None = None

    def numpy(self, dtype=np.float64):
        """Return the same with NumPy arrays, x [N, D] in dtype; with np.float32 nothing is copied."""
        y = None if self.y is None else self.y.numpy()
        return replace(self, x=self.x.numpy().astype(dtype, copy=False), y=y)


def load(name, split, *, data_dir=None, binarization=None):
    """Return one split of a data set: Dataset(x [N, D], y [N] or None, image_shape).

    name: one of `available()`. split: usually "train", "valid" or "test"; "train+valid" joins two.
    data_dir: a folder that holds a folder for each set. It is looked for there, else in $DLGM_DATA_DIR, else in the
    cache, else downloaded into the cache. Checksums are compared at every load.

    binarization, of grey images only:
      "dynamic"    keeps the grey values, to be read as means: training draws new pixels with `binarize` at each use;
      "fixed"      one stored draw: the Larochelle and Murray files for mnist, the stream of RandomState(0) for digits;
      "threshold"  1 where the grey value is above 1/2.
    Likelihoods on the three are not comparable. The rows of the stored draw of MNIST are in another order than MNIST's,
    and its test rows are sorted by digit: take a stride or a shuffle, not the first so many. Its y was derived by
    matching rows with MNIST, and is None where that file is not to hand.

    Raises ValueError for an unknown name, split or binarization and for a corrupt file; FileNotFoundError where
    a folder or file cannot be had.

    >>> digits = load("digits", "train")
    >>> digits.x.shape, digits.image_shape
    (torch.Size([1297, 64]), (1, 8, 8))
    """
    if name in LEFT_OUT:
        raise ValueError(f"name: {name} is left out: {LEFT_OUT[name]}, and unchecked data are not used here")
    if name not in CATALOGUE:
        raise ValueError(f"name must be one of {', '.join(CATALOGUE)}, got {name!r}")
    if binarization not in BINARIZATIONS:
        raise ValueError(f"binarization must be None, 'fixed', 'dynamic' or 'threshold', got {binarization!r}")
    stored = {"mnist": "binarized_mnist"}.get(name, name) if binarization == "fixed" else name
    source = CATALOGUE[stored]
    _check_kind(stored, source.kind, binarization)
    parts = split.split("+") if isinstance(split, str) else [split]
    if not all(part in source.splits for part in parts):
        known = ", ".join(source.splits)
        raise ValueError(f"split of {name} must be one of {known} (or two joined by +), got {split!r}")

    folders = _folders(data_dir)

    def get(*files, required=True):
        return _locate(stored, files, folders, required)

    pieces = [_read(source, part, get, binarization) for part in parts]
    x = np.concatenate([x for x, _ in pieces])
    labels = [y for _, y in pieces]
    y = None if labels[0] is None else torch.from_numpy(np.concatenate(labels).astype(np.int64))
    return Dataset(torch.from_numpy(x.reshape(len(x), -1)), y, x.shape[1:], name, split, binarization)


def _check_kind(name, kind, binarization):
    got = f"got {binarization!r}"
    if kind == "colour" and binarization is not None:
        raise ValueError(f"binarization must be None for {name}, a set of colour images, {got}")
    if kind == "binary" and binarization not in (None, "fixed"):
        raise ValueError(f"binarization must be None or 'fixed' for {name}, which is binary already, {got}")
    if kind == "grey" and binarization == "fixed" and name != "digits":
        raise ValueError(f"binarization: no fixed binarisation of {name} is in use; take 'dynamic' or 'threshold'")


def _read(source, split, get, binarization):
    """Return images [N, C, H, W] float32 in [0, 1] and labels [N] or None of one split."""
    part, rows = source.splits[split]
    if part == "grey" and binarization == "fixed":
        part = "fixed"
    images, labels = source.read(part, get)
    index = rows(len(images))
    x = images[index]
    x = x / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)
    if binarization == "threshold":
        x = (x > 0.5).astype(np.float32)
    return np.ascontiguousarray(x), None if labels is None else labels[index]


def available(*, data_dir=None):
    """Return {name: how it would be had}: "embedded", "on disk", "to download", or why it is left out.

    data_dir: as in `load`.
    """
    folders = _folders(data_dir)

    def state(name, source):
        if not source.files:
            return "embedded"
        here = any((folder / name / file.name).exists() for folder in folders for file in source.files)
        return "on disk" if here else "to download" if any(file.urls for file in source.files) else "not to hand"

    return ({name: state(name, source) for name, source in CATALOGUE.items()}
            | {name: f"left out: {reason}" for name, reason in LEFT_OUT.items()})


def binarize(x, *, noise=None, generator=None):
    """Draw pixels that are 1 with probability x: (noise < x), shape and dtype of x [...].

    noise: uniform on [0, 1), shape of x; else drawn, from generator if given. Raises ValueError outside [0, 1].

    >>> binarize(torch.tensor([0.0, 0.3, 1.0]), noise=torch.tensor([0.0, 0.2, 0.9]))
    tensor([0., 1., 1.])
    """
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("x must lie in [0, 1] (grey values as means); divide pixels of 0..255 by 255")
    if noise is None:
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    if noise.shape != x.shape:
        raise ValueError(f"noise must have the shape of x, {list(x.shape)}, got {list(noise.shape)}")
    return (noise < x).to(x.dtype)


# --- toy sets in the plane ----------------------------------------------------------------------------------------

def circle(num, *, noise_std=0.1, generator=None, dtype=torch.float32):
    """Draw num points [num, 2]: uniform on the unit circle, plus normal noise of standard deviation noise_std.

    generator: of the draws; dtype: of the result. From the public code of Balestriero et al. 2020.
    """
    angle = 2 * math.pi * torch.rand(num, generator=generator, dtype=dtype)
    return _noisy(torch.stack([angle.cos(), angle.sin()], -1), noise_std, generator)


def wave(num, *, noise_std=0.1, generator=None, dtype=torch.float32):
    """Draw num points [num, 2]: (t, cos 1.4 t), t standard normal, plus normal noise of standard deviation noise_std.

    generator: of the draws; dtype: of the result. From the public code of Balestriero et al. 2020.
    """
    t = torch.randn(num, generator=generator, dtype=dtype)
    return _noisy(torch.stack([t, torch.cos(1.4 * t)], -1), noise_std, generator)


def parabola(num, *, noise_std=0.5, generator=None, dtype=torch.float32):
    """Draw num points [num, 2]: (z, z^2 / 2), z standard normal, plus normal noise of standard deviation noise_std.

    generator: of the draws; dtype: of the result. An encoder of one affine layer errs on it by design.
    """
    z = torch.randn(num, generator=generator, dtype=dtype)
    return _noisy(torch.stack([z, z**2 / 2], -1), noise_std, generator)


def _noisy(points, noise_std, generator):
    return points + noise_std * torch.randn(points.shape, generator=generator, dtype=points.dtype)


# --- what is embedded ---------------------------------------------------------------------------------------------

def _read_digits(part, get):
    """scikit-learn's digits in a fixed order that spreads the drawers over the splits; part "fixed": one draw."""
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    stream = np.random.RandomState(0)  # noqa: NPY002 (its stream is promised never to change)
    order = stream.permutation(len(x))
    x = x[order] / 16
    if part == "fixed":
        x = (stream.rand(*x.shape) < x).astype(np.float32)
    return x.reshape(-1, 1, 8, 8), y[order]


def _read_mnist_sample(part, get):
    """Row 10 i + d is the i-th image of digit d in MNIST's test file: 100 of each, balanced at any multiple of ten."""
    with resources.as_file(resources.files("dlgm_tutorial.data") / "mnist_sample.npz") as path:
        content = np.load(path)
        return content["images"][:, None], content["labels"]


CATALOGUE = {
    "digits": Source("grey", _read_digits, {"train": ("grey", lambda n: slice(0, n - 500)),
                                            "valid": ("grey", lambda n: slice(n - 500, n - 300)),
                                            "test": ("grey", last(300))}),
    "mnist_sample": Source("grey", _read_mnist_sample, {"test": ("grey", all_rows)}),
    **SOURCES,
}


# --- files: found, or fetched; always checked ---------------------------------------------------------------------

def _folders(data_dir):
    """Return the folders to look in, in order; the last is the cache."""
    import pooch
    folders = []
    for given, what in [(data_dir, "data_dir"), (os.environ.get("DLGM_DATA_DIR"), "$DLGM_DATA_DIR")]:
        if given:
            if not Path(given).is_dir():
                raise FileNotFoundError(f"{what} must be a folder, got {str(given)!r}, which is none")
            folders.append(Path(given))
    return [*folders, Path(pooch.os_cache("dlgm_tutorial"))]


def _locate(name, files, folders, required):
    """Return the path of the first of the alternative files that is to hand and right; else download the last one."""
    *given, cache = [folder / name for folder in folders]
    for folder in given:
        for file in files:
            if (folder / file.name).exists():
                return _verified(folder / file.name, file)
    for file in files:
        if (cache / file.name).exists() and _checksum(cache / file.name, file.checksum) == file.checksum:
            return cache / file.name  # a damaged file of the cache is ours to replace
    if not required:
        return None
    return _download(name, files[-1], cache, [str(folder) for folder in given])


def _download(name, file, cache, searched):
    import pooch
    cache.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in file.urls:
        try:
            with tempfile.TemporaryDirectory(dir=cache) as scratch:  # moved into place only when whole and right
                path = Path(scratch) / file.name
                pooch.HTTPDownloader(timeout=30)(url, str(path), None)
                os.replace(_verified(path, file), cache / file.name)
            return cache / file.name
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {error}")
    where = ", ".join([*searched, str(cache)])
    why = "; ".join(failures) if failures else "it has no public address: put it into $DLGM_DATA_DIR"
    raise FileNotFoundError(f"{name}: {file.name} is neither in {where} nor could it be downloaded ({why})")


def _verified(path, file):
    found = _checksum(path, file.checksum)
    if found != file.checksum:
        source = f"; the right one is at {file.urls[0]}" if file.urls else ""
        raise ValueError(f"{path} is corrupt or incomplete: its checksum must be {file.checksum}, got {found}{source}")
    return path


def _checksum(path, like):
    """Return the checksum of a file, of the kind of `like`; "git" is the SHA-1 of the file as a git blob."""
    kind = like.split(":")[0]
    digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"
