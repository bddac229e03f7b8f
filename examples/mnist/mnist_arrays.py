"""MNIST as arrays, out of a package that `make .venv/mnist` installs."""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parents[2] / ".venv/mnist/mnist/data/mnist.pkl.gz"


class Digits(NamedTuple):
    """Images, float32 [n, 784] in [0, 1], and which digits they show, int64 [n]."""

    images: NDArray[np.float32]
    digits: NDArray[np.int64]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays and refuses all others: a pickle could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]  # its module moved between versions of numpy
        allowed = {
            "numpy.core.multiarray._reconstruct": reconstruct,
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"{DATA} holds {module}.{name}; expected numpy arrays only")
        return allowed[f"{module}.{name}"]


def load_digits(num_train: int, num_test: int) -> tuple[Digits, Digits]:
    """The first samples of the training set (60,000) and of the test set (10,000)."""
    if not DATA.exists():
        raise SystemExit(f"MNIST is missing, expected at {DATA}. Run `make demo`: it installs the data first.")
    pickled = io.BytesIO(gzip.decompress(DATA.read_bytes()))
    train, validation, test = _ArrayUnpickler(pickled, encoding="latin1").load()  # latin1: Python 2 wrote it
    images, digits = (np.concatenate(columns)[:num_train] for columns in zip(train, validation, strict=True))
    return Digits(images, digits), Digits(test[0][:num_test], test[1][:num_test])
