"""The images of handwritten digits: scikit-learn's small set, or MNIST's IDX files. Also cuts them into batches of one fixed size."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jnorm

NUM_CLASSES = 10


class DigitsError(Exception):
    """A request that the example cannot fulfill; the message is for the user, who sees it without a traceback."""


class Dataset(NamedTuple):
    train_images: np.ndarray  # (N, height, width) float32 in [0, 1]
    train_labels: np.ndarray  # (N,) int32 in [0, 10)
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.train_images.shape[1:]


class Batch(NamedTuple):
    images: jax.Array
    labels: jax.Array


def load_data(data_dir: str | None) -> Dataset:
    """MNIST from `data_dir`, or scikit-learn's digits if that is None."""
    return load_sklearn_digits() if data_dir is None else load_mnist(Path(data_dir))


def load_sklearn_digits() -> Dataset:
    """1797 images of 8x8 pixels; the split is the same whatever the seed of the run, so that accuracies can be compared."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, target = load_digits(return_X_y=True)
    images = (np.asarray(pixels) / 16).astype(np.float32).reshape(-1, 8, 8)  # the pixels are 0 ... 16
    labels = np.asarray(target).astype(np.int32)
    train, test = map(np.asarray, train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0))
    return Dataset(images[train], labels[train], images[test], labels[test])


def load_mnist(data_dir: Path) -> Dataset:
    """MNIST (or a set in its format) from the four IDX files in `data_dir`, gzipped or not."""
    if not data_dir.is_dir():
        raise DigitsError(f"--data-dir: {data_dir} is not a directory")
    train_images, train_labels = _load_mnist_part(data_dir, "train")
    test_images, test_labels = _load_mnist_part(data_dir, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DigitsError(f"{data_dir}: images to train with are {train_images.shape[1:]}, images to test with {test_images.shape[1:]}")
    return Dataset(train_images, train_labels, test_images, test_labels)


def _load_mnist_part(data_dir: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images_path = _find_idx(data_dir, f"{part}-images", 3)
    labels_path = _find_idx(data_dir, f"{part}-labels", 1)
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DigitsError(f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels")
    if images.size == 0:
        raise DigitsError(f"{images_path} has no images: its dimensions are {images.shape}")
    if labels.max() >= NUM_CLASSES:
        raise DigitsError(f"{labels_path} has the label {labels.max()}; labels must be 0 ... {NUM_CLASSES - 1}")
    return images.astype(np.float32) / 255, labels.astype(np.int32)


def _find_idx(data_dir: Path, stem: str, rank: int) -> Path:
    # The original name has a hyphen before "idx"; some archives unpack to a dot.
    names = [f"{stem}{separator}idx{rank}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (data_dir / name).is_file():
            return data_dir / name
    raise DigitsError(f"{data_dir} has no file {names[0]}, with or without .gz")


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes: 00 00 08 rank, the dimensions as big-endian 32-bit integers, then the values."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DigitsError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, 8, rank]):
        expected = bytes([0, 0, 8, rank]).hex(" ")
        raise DigitsError(f"{path} is not an IDX file of rank {rank}: it starts with {content[:4].hex(' ') or 'nothing'}, not {expected}")
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DigitsError(f"{path} is truncated or damaged: {len(content) - header} values follow the header, which promises {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def batches(images: np.ndarray, labels: np.ndarray, batch_size: int, multiple: int = 1) -> Iterator[tuple[Batch, jax.Array]]:
    """Yields (batch, mask) in the order given. Every batch has the same padded size: jit then compiles the step only once.

    The size is `batch_size` rounded up to a multiple of `multiple`, the number of devices; `mask` is False on the zeros that pad.
    """
    padded_size = -(-batch_size // multiple) * multiple
    for start in range(0, len(images), batch_size):
        padded_images, mask = jnorm.pad_batch(jnp.asarray(images[start : start + batch_size]), padded_size)
        padded_labels, _ = jnorm.pad_batch(jnp.asarray(labels[start : start + batch_size]), padded_size)
        yield Batch(padded_images, padded_labels), mask.reshape(-1)
