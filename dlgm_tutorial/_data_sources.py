"""The files behind `datasets`: where each comes from, its checksum, and how it becomes an array.

A reader is `read(part, get)`: `get(file, ...)` returns the path of the first of these alternatives that is to hand, or
of the last one, downloaded; checked in either case. The reader returns images [N, C, H, W] (uint8, or floats in [0, 1])
and labels [N] or None.
"""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = []


@dataclass(frozen=True)
class File:
    """A file as it is published. checksum: "sha256:", "md5:" or "git:" (the id of the blob), then the digits."""

    name: str
    checksum: str
    urls: tuple = ()


@dataclass(frozen=True)
class Source:
    """A data set. splits: name -> (part, rows), with rows(N) the index of the split's rows in the part of N images."""

    kind: str  # "grey": can be binarised; "binary": is; "colour"
    read: Callable
    splits: dict
    files: tuple = ()


def all_rows(n):
    return slice(None)


def but_last(num):
    return lambda n: slice(0, n - num)


def last(num):
    return lambda n: slice(n - num, n)


def whole(*splits):
    return {split: (split, all_rows) for split in splits}


# --- idx: MNIST and Fashion-MNIST ---------------------------------------------------------------------------------

def idx(path):
    """Return the array of a gzipped idx file: two zeros, type 8, the number of dimensions, the sizes, the bytes."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)


def idx_source(checksums, urls):
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = tuple(File(name, f"sha256:{checksum}", tuple(url + name for url in urls))
                  for name, checksum in zip(names, checksums, strict=True))

    def read(part, get):
        images, labels = files[:2] if part == "train" else files[2:]
        return idx(get(images))[:, None], idx(get(labels))

    splits = {"train": ("train", but_last(10_000)), "valid": ("train", last(10_000)), "test": ("test", all_rows)}
    return Source("grey", read, splits, files)


MNIST = idx_source(
    ["440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
     "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
     "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
     "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"],
    ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/",
     "http://yann.lecun.com/exdb/mnist/"])

FASHION = idx_source(
    ["3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
     "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
     "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
     "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"],
    ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
     "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"])


# --- the fixed binarisation of MNIST: text, each line 784 digits separated by spaces ------------------------------

AMAT_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
AMAT = {split: (File(f"binarized_mnist_{split}.amat.gz", f"sha256:{packed}"),
                File(f"binarized_mnist_{split}.amat", f"sha256:{plain}", (f"{AMAT_URL}binarized_mnist_{split}.amat",)))
        for split, packed, plain in [
            ("train", "af247bd6075cf9adc4715459dcd5f13eaa99a2c92d8d81379a05da94770b6c0e",
             "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
            ("valid", "533b71bc0198f4d73c54ae5fe6c96fc08dc3cf1b3fae24c5521dbc0452507e38",
             "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
            ("test", "32a3c54d03504632bf9f131b4a148c7567aa6fc87da017049b044bdc14c2a0f2",
             "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c")]}
DERIVED_LABELS = File("binarized_mnist_labels_derived.npz",
                      "sha256:4f342492f45ecaaa91f37b0355d9dcb749cd84b2bfc90b851a3f31d52e75f0bf")


def read_amat(part, get):
    path = get(*AMAT[part])
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    x = (np.frombuffer(content, np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0")).astype(np.float32)
    labels = get(DERIVED_LABELS, required=False)
    return x.reshape(-1, 1, 28, 28), None if labels is None else np.load(labels)[f"{part}_labels"]


# --- OMNIGLOT: 105 x 105, True is paper; here 28 x 28 by exact area averaging, 1 is ink ---------------------------

OMNIGLOT_URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
OMNIGLOT = {part: (File(f"images_{part}.npz", f"sha256:{packed}"),
                   File(f"images_{part}.zip", f"md5:{published}", (f"{OMNIGLOT_URL}images_{part}.zip",)))
            for part, packed, published in [
                ("background", "8bf84167413cd00beacdce3fe582f780ab538d8dbef043a6d688f2527bbce199",
                 "68d2efa1b9178cc56df9314c21c6e718"),
                ("evaluation", "0b84c7ffd94c4841c0040e529c86a82eaaccb986d8eadad5673f7991b7475276",
                 "6b91aef0f799c5bb55b94e3f2daec811")]}


def area_average(ink, size=28):
    """Return A ink A^T [N, size, size] in float64, A [size, n]: the share of old pixel j in new pixel i.

    ink: [N, n, n]. A new pixel is the mean of what it covers, so the mean of an image does not change.
    """
    n = ink.shape[-1]
    step = n / size
    new, old = np.arange(size)[:, None], np.arange(n)
    overlap = np.minimum(step * (new + 1), old + 1) - np.maximum(step * new, old)
    weights = np.clip(overlap, 0, None) / step
    blocks = np.array_split(ink, len(ink) // 1000 + 1)  # in float64 all of OMNIGLOT would take 3 GB
    return np.concatenate([weights @ block.astype(float) @ weights.T for block in blocks])


def omniglot_images(path):
    """Return the images [characters, 20, 105, 105], True is paper, in the order of the official character numbers."""
    if path.suffix == ".npz":
        return np.load(path)["images"]
    from PIL import Image
    with zipfile.ZipFile(path) as archive:  # .../NNNN_DD.png: character, drawer
        names = sorted((n for n in archive.namelist() if n.endswith(".png")), key=lambda n: n.rsplit("/")[-1])
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) != 0 for name in names]
    return np.stack(pixels).reshape(-1, 20, 105, 105)


def read_omniglot(part, get):
    images = omniglot_images(get(*OMNIGLOT[part]))
    first = {"background": 0, "evaluation": 964}[part]
    labels = np.repeat(np.arange(first, first + len(images)), 20)
    return area_average(~images.reshape(-1, 105, 105))[:, None], labels


def drawers(low, high):
    """Rows of the drawers low..high-1 of the 20 of each character."""
    return lambda n: (np.arange(n) % 20 >= low) & (np.arange(n) % 20 < high)


OMNIGLOT_SPLITS = {"train": ("background", drawers(0, 18)), "valid": ("background", drawers(18, 20)),
                   "test": ("evaluation", all_rows), **whole("background", "evaluation")}

# Burda's file, that the IWAE paper and its successors use: other images, another cut, pixels stored column by column.
BURDA = File("chardata.mat", "git:016a3536ffe5e1d38e42563a18d7a78bfaf643ec",
             ("https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",))


def read_burda(part, get):
    from scipy.io import loadmat
    pixels = loadmat(get(BURDA), variable_names=["data", "testdata"])
    x = pixels["data" if part == "train" else "testdata"].T.reshape(-1, 1, 28, 28).swapaxes(2, 3)
    if part == "train":
        x = x[np.random.RandomState(123).permutation(len(x))]  # noqa: NPY002 (the published order)
    return x, None


BURDA_SPLITS = {"train": ("train", but_last(1345)), "valid": ("train", last(1345)), "test": ("test", all_rows)}


# --- colour -------------------------------------------------------------------------------------------------------

CIFAR_SUBSET = tuple(File(f"cifar10_batch_{i}.png", f"sha256:{checksum}") for i, checksum in enumerate([
    "0614720d69293a033786d5fe2924c4e9a9b48874f19ca4627c4662a864ee9f2d",
    "2927e26ea68602e34a7424826b76b7336ce36b8f6bcc2e9fce0c05568ff6b4c1",
    "0b2759e307bb405bb1a6531f8a0f557eaec46d7546050612fdb836f0fa60eae0"]))
# The binary version: the same images as the Python version, without a pickle to trust.
CIFAR = File("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530",
             ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",))
SVHN = {part: File(f"{part}_32x32.mat", f"md5:{checksum}",
                   (f"http://ufldl.stanford.edu/housenumbers/{part}_32x32.mat",))
        for part, checksum in [("train", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                               ("test", "eb5a983be6a315427106f1b164d9cef3"),
                               ("extra", "a93ce644f1a588dc4d68dda5feec44a7")]}
CELEBA = File("img_align_celeba.zip", "md5:00d2c5bc6d35e252742224ab0c1e8fcb",
              ("https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip",))
CELEBA_NUMBERS = {"train": range(1, 162_771), "valid": range(162_771, 182_638), "test": range(182_638, 202_600)}


def read_cifar_subset(part, get):
    from PIL import Image
    rows = np.concatenate([np.asarray(Image.open(get(file))) for file in CIFAR_SUBSET])  # an image a row
    return rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2), None


def read_cifar(part, get):
    wanted = "data_batch_" if part == "train" else "test_batch"
    with tarfile.open(get(CIFAR)) as archive:
        names = sorted(name for name in archive.getnames() if wanted in name)
        content = b"".join(archive.extractfile(name).read() for name in names)
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)  # a label, then the planes R, G, B
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def read_svhn(part, get):
    from scipy.io import loadmat
    content = loadmat(get(SVHN[part]))
    return content["X"].transpose(3, 2, 0, 1), content["y"].ravel() % 10  # 10 stands for the digit 0


def read_celeba(part, get):
    """The middle 148 x 148 of the 178 x 218 pixels, averaged to 32 x 32: what most papers call CelebA-32."""
    from PIL import Image

    def pixels(content):
        middle = Image.open(io.BytesIO(content)).crop((15, 35, 163, 183))
        return np.asarray(middle.resize((32, 32), Image.Resampling.BOX))

    with zipfile.ZipFile(get(CELEBA)) as archive:
        names = {int(name[-10:-4]): name for name in archive.namelist() if name.endswith(".jpg")}
        images = [pixels(archive.read(names[number])) for number in sorted(names) if number in CELEBA_NUMBERS[part]]
    return np.stack(images).transpose(0, 3, 1, 2), None


SOURCES = {
    "mnist": MNIST,
    "binarized_mnist": Source("binary", read_amat, whole("train", "valid", "test"),
                              (*AMAT["train"], *AMAT["valid"], *AMAT["test"], DERIVED_LABELS)),
    "fashion_mnist": FASHION,
    "omniglot": Source("grey", read_omniglot, OMNIGLOT_SPLITS, (*OMNIGLOT["background"], *OMNIGLOT["evaluation"])),
    "burda_omniglot": Source("grey", read_burda, BURDA_SPLITS, (BURDA,)),
    "cifar10_subset": Source("colour", read_cifar_subset, {
        "train": ("all", lambda n: slice(0, 2500)), "valid": ("all", lambda n: slice(2500, 2750)),
        "test": ("all", lambda n: slice(2750, n))}, CIFAR_SUBSET),
    "cifar10": Source("colour", read_cifar, {
        "train": ("train", but_last(10_000)), "valid": ("train", last(10_000)), "test": ("test", all_rows)}, (CIFAR,)),
    "svhn": Source("colour", read_svhn, {
        "train": ("train", but_last(7_257)), "valid": ("train", last(7_257)), **whole("test", "extra")},
        tuple(SVHN.values())),
    "celeba": Source("colour", read_celeba, whole("train", "valid", "test"), (CELEBA,)),
}

UNCHECKED = "its only address, {}, comes with no published checksum"
LEFT_OUT = {
    "frey_faces": UNCHECKED.format("https://cs.nyu.edu/~roweis/data/frey_rawface.mat"),
    "caltech_silhouettes": UNCHECKED.format(
        "https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat"),
}
