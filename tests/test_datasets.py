"""Data sets: known values of the real files, the traps, and what happens when files are missing, damaged or served badly."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import re
import struct
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from dlgm_tutorial import _data_sources as sources
from dlgm_tutorial import checks, datasets

FOLDER = os.environ.get("DLGM_DATA_DIR")


def needs(*names):
    missing = [name for name in names if FOLDER is None or not (Path(FOLDER) / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} in $DLGM_DATA_DIR")


@functools.lru_cache(maxsize=8)
def load(name, split, binarization=None):
    return datasets.load(name, split, binarization=binarization)


def pixels(x):
    """The integers 0..255 that the file holds."""
    return torch.round(255 * x.double())


def counts(data):
    return torch.bincount(data.y).tolist()


def baseline(train, test):
    """Expected test NLL [nats per image] of independent pixels with p = (n + 1) / (N + 2)."""
    p = (train.x.double().sum(0) + 1) / (len(train.x) + 2)
    mean = test.x.double().mean(0)
    return -float(mean @ p.log() + (1 - mean) @ torch.log1p(-p))


def floor(data):
    """Mean entropy [nats per image] of the pixels, grey values read as probabilities: nothing gets below it."""
    x = data.x.double()
    return -float((torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1).mean())


# --- the embedded sets --------------------------------------------------------------------------------------------

def test_digits_are_scikit_learns_divided_by_sixteen():
    data = load("digits", "train+valid+test")
    assert data.x.shape == (1797, 64) and data.x.dtype == torch.float32 and data.image_shape == (1, 8, 8)
    assert counts(data) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.x.mean().item() * 16 == pytest.approx(4.8841646, abs=1e-6)
    assert [len(load("digits", split).x) for split in ("train", "valid", "test")] == [1297, 200, 300]
    stream = np.random.RandomState(0)  # noqa: NPY002
    from sklearn.datasets import load_digits
    raw = load_digits().data[stream.permutation(1797)] / 16
    np.testing.assert_array_equal(load("digits", "train").x, raw[:1297].astype(np.float32))
    fixed = load("digits", "train+valid+test", "fixed").x
    np.testing.assert_array_equal(fixed, stream.rand(1797, 64) < raw)


@needs("digits")
def test_digits_equal_the_original_table():
    table = np.loadtxt(Path(FOLDER) / "digits/digits.csv.gz", delimiter=",")
    data = load("digits", "train+valid+test").numpy()
    ours = np.column_stack([16 * data.x, data.y])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], table[np.lexsort(table.T)])


def test_mnist_sample_is_balanced_and_interleaved():
    data = load("mnist_sample", "test")
    assert data.x.shape == (1000, 784) and data.image_shape == (1, 28, 28)
    assert data.y.tolist() == list(range(10)) * 100
    assert 0 == data.x.min() and data.x.max() == 1


@needs("mnist")
def test_mnist_sample_is_the_first_hundred_test_images_of_each_digit():
    sample, test = load("mnist_sample", "test"), load("mnist", "test")
    for digit in range(10):
        assert torch.equal(sample.x[digit::10], test.x[test.y == digit][:100])


# --- check values and traps of the full sets ----------------------------------------------------------------------

@needs("mnist")
def test_mnist_values_and_cut():
    train, valid, test = (load("mnist", split) for split in ("train", "valid", "test"))
    assert [len(part.x) for part in (train, valid, test)] == [50_000, 10_000, 10_000]
    assert train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4] and test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert counts(train) == [4932, 5678, 4968, 5101, 4859, 4506, 4951, 5175, 4842, 4988]
    assert counts(valid) == [991, 1064, 990, 1030, 983, 915, 967, 1090, 1009, 961]
    assert counts(test) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    everything = pixels(torch.cat([train.x, valid.x])) / 255
    assert everything.mean().item() == pytest.approx(0.1306604763, abs=1e-9)
    assert everything.std(correction=0).item() == pytest.approx(0.3081078039, abs=1e-8)
    assert pixels(test.x).mean().item() / 255 == pytest.approx(0.1325146058, abs=1e-9)


@needs("mnist")
def test_mnist_baselines_and_entropy_floors():
    train, valid, test = (load("mnist", split, "dynamic") for split in ("train", "valid", "test"))
    assert torch.equal(train.x, load("mnist", "train").x)  # "dynamic" keeps the means
    assert baseline(train, test) == pytest.approx(205.8088, abs=6e-5)
    assert baseline(train, valid) == pytest.approx(204.7524, abs=6e-5)
    assert floor(test) == pytest.approx(45.5345, abs=6e-5) and floor(train) == pytest.approx(45.7230, abs=6e-5)


@needs("mnist")
def test_mnist_threshold_is_at_128():
    train, test = load("mnist", "train", "threshold"), load("mnist", "test", "threshold")
    assert train.x.double().mean().item() == pytest.approx(0.1325623, abs=6e-8)
    assert test.x.double().mean().item() == pytest.approx(0.1342295, abs=6e-8)
    assert baseline(train, test) == pytest.approx(205.8499, abs=6e-5)
    assert torch.equal(test.x, (pixels(load("mnist", "test").x) >= 128).float())


@needs("binarized_mnist")
def test_fixed_binarisation_values_and_baselines():
    train, valid, test = (load("binarized_mnist", split) for split in ("train", "valid", "test"))
    assert [(len(p.x), int(p.x.double().sum())) for p in (train, valid, test)] == [
        (50_000, 5_118_041), (10_000, 1_028_036), (10_000, 1_038_896)]
    assert set(test.x.unique().tolist()) == {0.0, 1.0}
    assert baseline(train, valid) == pytest.approx(206.3222, abs=6e-5)
    assert baseline(train, test) == pytest.approx(205.7933, abs=6e-5)


@needs("binarized_mnist", "mnist")
def test_fixed_binarisation_is_not_in_mnists_order():
    """The test file is sorted by digit, and train and valid are mixed; the labels are derived, and say so."""
    train, test = load("mnist", "train", "fixed"), load("mnist", "test", "fixed")
    assert torch.equal(test.x, load("binarized_mnist", "test").x)
    assert counts(train) == [4946, 5642, 4924, 5091, 4865, 4515, 4929, 5219, 4888, 4981]
    assert torch.equal(test.y, test.y.sort().values), "the test rows are sorted by digit"
    assert test.y[:1000].unique().tolist() == [0, 1], "the first thousand are zeros and ones only"
    grey = load("mnist", "train")
    assert (train.y == grey.y).double().mean() < 0.2, "rows do not correspond to MNIST's"
    assert not torch.equal(train.y[:10], grey.y[:10])
    assert "derived" in datasets.load.__doc__


@needs("binarized_mnist")
def test_both_forms_of_the_binarised_files_give_the_same(tmp_path):
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    content = gzip.decompress((Path(FOLDER) / "binarized_mnist/binarized_mnist_valid.amat.gz").read_bytes())
    (folder / "binarized_mnist_valid.amat").write_bytes(content)
    data = datasets.load("binarized_mnist", "valid", data_dir=tmp_path)
    assert torch.equal(data.x, load("binarized_mnist", "valid").x)


@needs("omniglot")
@pytest.mark.parametrize("part, mean, std, total, sha", [
    ("background", 0.0779396, 0.2303232, 300_409_388, "b90c08f235503b656b2de3823223a299215728e01e3bb05a42f99484be9e541c"),
    ("evaluation", 0.0842840, 0.2391887, 222_079_588, "62e72255479a8b28a07c73039c1007e0c100508b8fe75d6545626b62052db576")])
def test_omniglot_area_averages(part, mean, std, total, sha):
    """Ink is 1 (True in the file is paper), averages are exact, in file order."""
    images = sources.omniglot_images(Path(FOLDER) / f"omniglot/images_{part}.npz")
    x = sources.area_average(~images.reshape(-1, 105, 105))
    assert x.mean() == pytest.approx(mean, abs=6e-8) and x.std() == pytest.approx(std, abs=6e-8)
    grey = np.floor(255 * x + 0.5).astype(np.uint8)
    assert int(grey.sum(dtype=np.int64)) == total
    assert hashlib.sha256(grey.tobytes()).hexdigest() == sha
    np.testing.assert_array_equal(load("omniglot", part).x, x.reshape(len(x), -1).astype(np.float32))


@needs("omniglot")
def test_omniglot_splits_and_baseline():
    background, test = load("omniglot", "background"), load("omniglot", "test")
    assert (len(background.x), len(test.x)) == (19_280, 13_180)
    assert [len(load("omniglot", split).x) for split in ("train", "valid")] == [964 * 18, 964 * 2]
    assert load("omniglot", "valid").y.bincount().tolist() == [2] * 964  # every character, two of its drawers
    assert int(test.y.min()) == 964 and int(test.y.max()) == 1622
    assert baseline(background, test) == pytest.approx(177.3672, abs=6e-5)
    assert floor(test) == pytest.approx(47.6869, abs=6e-5) and floor(background) == pytest.approx(44.9412, abs=6e-5)


@pytest.mark.parametrize("n, size", [(105, 28), (6, 3), (5, 5), (7, 2)])
def test_area_average_is_the_mean_of_a_finer_picture(n, size):
    """The oracle: blow the image up so that new pixels are whole blocks, then take block means."""
    ink = np.random.default_rng(0).random((2, n, n))
    fine = ink.repeat(size, 1).repeat(size, 2)
    want = fine.reshape(2, size, n, size, n).mean((2, 4))
    np.testing.assert_allclose(sources.area_average(ink, size), want, rtol=1e-12)


@needs("fashion_mnist")
def test_fashion_mnist_values():
    train, test = load("fashion_mnist", "train"), load("fashion_mnist", "test")
    assert train.y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5] and test.y[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert counts(test) == [1000] * 10 and counts(load("fashion_mnist", "train+valid")) == [6000] * 10
    assert test.x.double().mean().item() == pytest.approx(0.2868492808, abs=1e-8)
    assert baseline(train, test) == pytest.approx(385.0213, abs=6e-5) and floor(test) == pytest.approx(189.8583, abs=6e-5)
    assert baseline(load("fashion_mnist", "train", "threshold"), load("fashion_mnist", "test", "threshold")
                    ) == pytest.approx(383.1314, abs=6e-5)


@needs("cifar10_subset")
def test_cifar_subset_values():
    data = load("cifar10_subset", "train+valid+test")
    assert [len(load("cifar10_subset", split).x) for split in ("train", "valid", "test")] == [2500, 250, 250]
    assert data.image_shape == (3, 32, 32) and data.y is None
    images = data.x.reshape(-1, 3, 32, 32).double()
    np.testing.assert_allclose(images.mean((0, 2, 3)), (0.490532, 0.481330, 0.445017), atol=6e-7)
    np.testing.assert_allclose(images.transpose(0, 1).reshape(3, -1).std(1), (0.245501, 0.242303, 0.260946), atol=6e-7)
    first = torch.round(255 * images[0, :, 0, :4]).T.int().tolist()
    assert first == [[59, 62, 63], [43, 46, 45], [50, 48, 43], [68, 54, 42]]
    stored = pixels(images[:1000]).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert hashlib.sha256(np.ascontiguousarray(stored).tobytes()).hexdigest() == \
        "133c5674fd1c56ceeeb944ddcdc368da2593ce5b67acfa216ab83f98a084f388"


# --- downloads, from a server on the loopback ---------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if self.path in self.server.broken else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serve files on 127.0.0.1, with no data folder and an empty cache."""
    monkeypatch.delenv("DLGM_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.files, served.broken = {}, set()
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{served.server_port}/"
        served.cache = tmp_path / "cache" / "dlgm_tutorial"
        yield served
        served.shutdown()
        thread.join()


def publish(server, monkeypatch, holder, key, content, checksum=None, others=()):
    """Put content on the server in place of a file of `_data_sources` (holder[key] or holder.key)."""
    file = holder[key] if isinstance(holder, dict) else getattr(holder, key)
    *rest, file = file if isinstance(file, tuple) else (file,)
    server.files[f"/{file.name}"] = content
    fake = replace(file, checksum=checksum or f"md5:{hashlib.md5(content).hexdigest()}", urls=(*others, server.url + file.name))
    value = (*rest, fake) if rest else fake
    monkeypatch.setitem(holder, key, value) if isinstance(holder, dict) else monkeypatch.setattr(holder, key, value)
    return fake


def cached(server):
    return sorted(path.name for path in server.cache.rglob("*") if path.is_file())


def idx_bytes(array):
    return gzip.compress(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes(), 1)


def mnist_like(server, num=10_007):
    """A source like MNIST's, on the server, with `num` images in each file."""
    y = (np.arange(num) % 10).astype(np.uint8)
    images = np.zeros((num, 28, 28), np.uint8)
    images[:, 3, 4] = np.arange(num) % 256
    content = [idx_bytes(images), idx_bytes(y)] * 2
    source = sources.idx_source([hashlib.sha256(c).hexdigest() for c in content], [server.url])
    server.files |= {f"/{file.name}": c for file, c in zip(source.files, content, strict=True)}
    return source


def test_download_is_checked_kept_and_not_repeated(server, monkeypatch):
    monkeypatch.setitem(datasets.CATALOGUE, "mnist", mnist_like(server))
    assert datasets.available()["mnist"] == "to download"
    train, valid = datasets.load("mnist", "train"), datasets.load("mnist", "valid")
    assert train.x.shape == (7, 784) and train.y.tolist() == [0, 1, 2, 3, 4, 5, 6] and len(valid.x) == 10_000
    assert torch.equal(train.x[:, 3 * 28 + 4], torch.arange(7) / 255)
    assert cached(server) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert datasets.available()["mnist"] == "on disk"
    server.files.clear()
    assert torch.equal(datasets.load("mnist", "train").x, train.x)


def test_half_download_leaves_nothing_and_names_file_and_address(server, monkeypatch):
    source = mnist_like(server)
    monkeypatch.setitem(datasets.CATALOGUE, "mnist", source)
    server.broken.add("/train-images-idx3-ubyte.gz")
    with pytest.raises(FileNotFoundError, match=f"mnist: train-images-idx3-ubyte.gz .*{re.escape(source.files[0].urls[0])}"):
        datasets.load("mnist", "train")
    assert cached(server) == []


def test_wrong_content_leaves_nothing_and_names_file_and_address(server, monkeypatch):
    source = mnist_like(server)
    monkeypatch.setitem(datasets.CATALOGUE, "mnist", source)
    server.files["/train-images-idx3-ubyte.gz"] = b"<html>sign in to the network</html>"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(source.files[0].urls[0])}: .*corrupt or incomplete"):
        datasets.load("mnist", "train")
    assert cached(server) == []


def test_second_address_is_used_when_the_first_fails(server, monkeypatch):
    fake = publish(server, monkeypatch, sources, "BURDA", burda(), others=(server.url + "gone",))
    assert datasets.load("burda_omniglot", "test").x.shape == (5, 784)
    assert cached(server) == [fake.name]


def test_damaged_file_in_the_cache_is_fetched_again(server, monkeypatch):
    fake = publish(server, monkeypatch, sources, "BURDA", burda())
    want = datasets.load("burda_omniglot", "test").x
    (server.cache / "burda_omniglot" / fake.name).write_bytes(b"damaged")
    assert torch.equal(datasets.load("burda_omniglot", "test").x, want)


def test_empty_folder_and_no_network_is_one_clear_error(server, tmp_path, monkeypatch):
    source = mnist_like(server)
    server.files.clear()
    monkeypatch.setitem(datasets.CATALOGUE, "mnist", source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("mnist", "train", data_dir=tmp_path / "empty")
    for word in ("mnist: train-images-idx3-ubyte.gz", str(tmp_path / "empty" / "mnist"), source.files[0].urls[0], "404"):
        assert word in str(caught.value)
    assert list((tmp_path / "empty").iterdir()) == []


def test_set_without_a_public_address_says_where_to_put_it(server):
    assert datasets.available()["cifar10_subset"] == "not to hand"
    with pytest.raises(FileNotFoundError, match="cifar10_batch_0.png.*no public address: put it into"):
        datasets.load("cifar10_subset", "train")


def test_corrupt_file_in_the_data_folder_is_named_and_left_alone(server, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError) as caught:
        datasets.load("mnist", "train", data_dir=tmp_path)
    assert str(path) in str(caught.value) and sources.MNIST.files[0].urls[0] in str(caught.value)
    assert path.read_bytes() == b"half a file"


def test_data_folder_goes_before_the_environment(server, tmp_path, monkeypatch):
    for folder, content in [("argument", burda()), ("environment", b"damaged")]:
        (tmp_path / folder / "burda_omniglot").mkdir(parents=True)
        (tmp_path / folder / "burda_omniglot" / "chardata.mat").write_bytes(content)
    publish(server, monkeypatch, sources, "BURDA", burda())
    monkeypatch.setenv("DLGM_DATA_DIR", str(tmp_path / "environment"))
    assert datasets.load("burda_omniglot", "test", data_dir=tmp_path / "argument").x.shape == (5, 784)
    with pytest.raises(ValueError, match="environment.*corrupt or incomplete"):
        datasets.load("burda_omniglot", "test")
    assert cached(server) == []


# --- the parsers of sets that are only downloaded -----------------------------------------------------------------

def mat(**arrays):
    stream = io.BytesIO()
    scipy.io.savemat(stream, arrays, do_compression=True)
    return stream.getvalue()


@functools.cache
def burda():
    """1,350 training and 5 test images, one a column, pixels column by column."""
    rng = np.random.default_rng(0)
    return mat(data=rng.random((784, 1350)), testdata=rng.random((784, 5)))


def test_burdas_omniglot(server, monkeypatch):
    content = burda()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    publish(server, monkeypatch, sources, "BURDA", content, checksum=f"git:{blob}")
    raw = scipy.io.loadmat(io.BytesIO(content))
    train, valid, test = (datasets.load("burda_omniglot", split) for split in ("train", "valid", "test"))
    assert [len(part.x) for part in (train, valid, test)] == [5, 1345, 5]
    np.testing.assert_array_equal(test.x[2].reshape(28, 28), raw["testdata"][:, 2].reshape(28, 28).T.astype(np.float32))
    order = np.random.RandomState(123).permutation(1350)  # noqa: NPY002
    np.testing.assert_array_equal(train.x[0].reshape(28, 28), raw["data"][:, order[0]].reshape(28, 28).T.astype(np.float32))


def test_svhn(server, monkeypatch):
    x = np.zeros((32, 32, 3, 7260), np.uint8)
    x[5, 6, 1, 2] = 255
    publish(server, monkeypatch, sources.SVHN, "train", mat(X=x, y=np.array([[10], [1], [9]] * 2420)))
    data = datasets.load("svhn", "train")
    assert data.x.shape == (3, 3072) and data.image_shape == (3, 32, 32) and data.y.tolist() == [0, 1, 9]
    assert data.x.reshape(-1, 3, 32, 32)[2, 1, 5, 6] == 1 and data.x.sum() == 1


def test_cifar10_binary_archive(server, monkeypatch):
    rows = np.zeros((2002, 3073), np.uint8)
    rows[:, 0] = np.arange(2002) % 10
    rows[1, 1 + 1024 + 32 * 5 + 6] = 255
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name in ["batches.meta.txt", *(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows.nbytes
            archive.addfile(info, io.BytesIO(rows.tobytes()))
    publish(server, monkeypatch, sources, "CIFAR", stream.getvalue())
    train, test = datasets.load("cifar10", "train"), datasets.load("cifar10", "test")
    assert train.y.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] and len(test.x) == 2002
    assert train.x.reshape(-1, 3, 32, 32)[1, 1, 5, 6] == 1 and train.x.sum() == 1


def test_celeba(server, monkeypatch):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[35:183, 15:163] = (200, 100, 50)
    stream, picture = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(picture, "jpeg", quality=100, subsampling=0)
    with zipfile.ZipFile(stream, "w") as archive:
        for number in (1, 162_770, 162_771, 182_638):
            archive.writestr(f"img_align_celeba/{number:06d}.jpg", picture.getvalue())
    publish(server, monkeypatch, sources, "CELEBA", stream.getvalue())
    assert [len(datasets.load("celeba", split).x) for split in ("train", "valid", "test")] == [2, 1, 1]
    image = datasets.load("celeba", "train").x[0].reshape(3, 32, 32) * 255
    np.testing.assert_allclose(image[:, 1:-1, 1:-1].mean((1, 2)), (200, 100, 50), atol=2)


def test_omniglot_from_the_published_archive(server, monkeypatch):
    paper = np.random.default_rng(0).random((2, 20, 105, 105)) < 0.9
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for character, alphabet in [(1, "Tifinagh"), (0, "Zulu")]:  # alphabets out of order: the number decides
            for drawer in range(20):
                picture = io.BytesIO()
                Image.fromarray(paper[character, drawer]).save(picture, "png")
                archive.writestr(f"images_background/{alphabet}/character01/{character + 1:04d}_{drawer + 1:02d}.png",
                                 picture.getvalue())
    publish(server, monkeypatch, sources.OMNIGLOT, "background", stream.getvalue())
    data = datasets.load("omniglot", "background")
    assert data.y.tolist() == [0] * 20 + [1] * 20
    want = sources.area_average(~paper.reshape(-1, 105, 105)).reshape(40, -1).astype(np.float32)
    np.testing.assert_array_equal(data.x, want)
    assert torch.equal(datasets.load("omniglot", "valid").x, data.x[[18, 19, 38, 39]])


def test_binarised_mnist_from_the_published_text(server, monkeypatch):
    x = np.random.default_rng(0).integers(0, 2, (3, 784))
    text = "".join(" ".join(map(str, row)) + "\n" for row in x).encode()
    publish(server, monkeypatch, sources.AMAT, "valid", text)
    data = datasets.load("binarized_mnist", "valid")
    np.testing.assert_array_equal(data.x, x)
    assert data.y is None  # the derived labels have no public address


# --- drawing ------------------------------------------------------------------------------------------------------

def test_binarize_has_the_right_means_and_follows_its_noise():
    x = torch.tensor([[0.0, 0.25, 0.9, 1.0]], dtype=torch.float64).expand(20_000, 4)
    draws = datasets.binarize(x, generator=torch.Generator().manual_seed(1))
    assert draws.dtype == torch.float64 and draws[:, 0].max() == 0 and draws[:, 3].min() == 1
    checks.check_mc(draws[:, 1:3].numpy(), [0.25, 0.9], "means of binarised pixels")
    noise = torch.full_like(x, 0.25)  # noise below x is ink: 0.25 < 0.25 is not
    assert datasets.binarize(x, noise=noise)[0].tolist() == [0, 0, 1, 1]


def test_toy_sets_have_their_moments():
    draw = functools.partial(torch.Generator().manual_seed)
    points = datasets.circle(20_000, generator=draw(0), dtype=torch.float64).numpy()
    checks.check_mc(np.sum(points**2, 1), 1 + 2 * 0.01, "squared radius of the circle toy")
    checks.check_mc(points, [0.0, 0.0], "centre of the circle toy")
    points = datasets.wave(20_000, generator=draw(1), dtype=torch.float64).numpy()
    checks.check_mc(points[:, 1], np.exp(-1.4**2 / 2), "height of the wave toy")  # E cos(a t) for normal t
    checks.check_mc(points[:, 0]**2, 1.01, "width of the wave toy")
    points = datasets.parabola(20_000, generator=draw(2), dtype=torch.float64).numpy()
    checks.check_mc(points[:, 1], 0.5, "height of the parabola toy")
    checks.check_mc(points[:, 1]**2, 0.75 + 0.25, "squared height of the parabola toy")  # E z^4 / 4 + 1/4


def test_toy_sets_are_functions_of_their_generator():
    for draw in (datasets.circle, datasets.wave, datasets.parabola):
        one, two = (draw(7, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one, two) and one.shape == (7, 2) and one.dtype == torch.float32
    sharp = datasets.circle(7, noise_std=0.0, dtype=torch.float64)
    torch.testing.assert_close(sharp.norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_numpy_view():
    data = load("digits", "test")
    assert data.numpy().x.dtype == np.float64 and data.numpy().y.dtype == np.int64
    assert np.shares_memory(data.numpy(np.float32).x, data.x.numpy())
    assert isinstance(data.numpy(), datasets.Dataset) and data.numpy().image_shape == (1, 8, 8)


# --- bad input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    (("nmist", "train"), "name must be one of digits, .*got 'nmist'"),
    (("frey_faces", "train"), "frey_faces is left out: .*no published checksum"),
    (("digits", "dev"), "split of digits must be one of train, valid, test .*got 'dev'"),
    (("digits", "train+dev"), "got 'train.dev'"),
    (("digits", None), "split of digits must be one of"),
    (("mnist_sample", "train"), "split of mnist_sample must be one of test"),
    (("digits", "train", "stochastic"), "binarization must be None, 'fixed', 'dynamic' or 'threshold', got 'stochastic'"),
    (("omniglot", "train", "fixed"), "no fixed binarisation of omniglot"),
    (("binarized_mnist", "train", "dynamic"), "binary already, got 'dynamic'"),
    (("cifar10", "train", "threshold"), "must be None for cifar10, a set of colour images"),
])
def test_bad_arguments_are_named(arguments, message):
    name, split, *binarization = arguments
    with pytest.raises(ValueError, match=message):
        datasets.load(name, split, binarization=binarization[0] if binarization else None)


def test_folder_that_does_not_exist_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="data_dir must be a folder, got '.*nowhere'"):
        datasets.load("mnist", "train", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("DLGM_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"\$DLGM_DATA_DIR must be a folder"):
        datasets.available()


@pytest.mark.parametrize("x, noise, message", [
    (torch.tensor([0.0, 255.0]), None, r"x must lie in \[0, 1\]"),
    (torch.tensor([float("nan")]), None, r"x must lie in \[0, 1\]"),
    (torch.rand(3), torch.rand(2), r"noise must have the shape of x, \[3\], got \[2\]")])
def test_binarize_refuses_what_is_no_mean(x, noise, message):
    with pytest.raises(ValueError, match=message):
        datasets.binarize(x, noise=noise)


def test_left_out_sets_say_why():
    for name, state in datasets.available().items():
        assert state in ("embedded", "on disk", "to download", "not to hand") or re.match(r"left out: .*https://", state), name
