"""Write dlgm_tutorial/data/mnist_sample.npz: the first 100 test images of each digit, digits interleaved.

    python tools/embed_mnist.py        # needs MNIST, see datasets.load
"""

from pathlib import Path

import numpy as np

from dlgm_tutorial import datasets

test = datasets.load("mnist", "test").numpy()
index = np.stack([np.flatnonzero(test.y == digit)[:100] for digit in range(10)], axis=1).ravel()
images = np.round(255 * test.x[index]).astype(np.uint8).reshape(-1, 28, 28)
target = Path(__file__).parents[1] / "dlgm_tutorial" / "data" / "mnist_sample.npz"
np.savez_compressed(target, images=images, labels=test.y[index].astype(np.uint8), index=index.astype(np.int32))
