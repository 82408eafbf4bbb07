"""The images, split in three, and the orders in which a training sees them."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jnorm
from digits_data import NUM_CLASSES, DigitsError, load_data


@dataclass(frozen=True)
class Sizes:
    train: int = 704  # a multiple of all batch sizes, so that no image is left out
    validation: int = 300
    test: int = 793


class Images(NamedTuple):
    images: np.ndarray  # (N, height, width, 1) float32, standardized by the mean and deviation of the training images
    labels: np.ndarray  # (N,) int32


class Task(NamedTuple):
    train: Images
    validation: Images
    test: Images


def load_task(data_dir: str | None, sizes: Sizes) -> Task:
    """The same split whatever the seed of a run. scikit-learn's digits are pooled first; of MNIST the test images are its own."""
    data = load_data(data_dir)
    images, labels = data.train_images, data.train_labels
    if data_dir is None:
        images, labels = np.concatenate([images, data.test_images]), np.concatenate([labels, data.test_labels])
        train, validation, test = _split(images, labels, (sizes.train, sizes.validation, sizes.test))
    else:
        train, validation = _split(images, labels, (sizes.train, sizes.validation))
        (test,) = _split(data.test_images, data.test_labels, (sizes.test,))
    statistics = jnorm.feature_statistics(jnp.asarray(train.images), jnorm.feature_statistics_state(1))

    def standardized(part: Images) -> Images:
        return Images(np.asarray(jnorm.standardize_features(jnp.asarray(part.images), statistics)), part.labels)

    return Task(standardized(train), standardized(validation), standardized(test))


def _split(images: np.ndarray, labels: np.ndarray, sizes: tuple[int, ...]) -> list[Images]:
    """Random disjoint parts, each with the classes in proportion."""
    from sklearn.model_selection import train_test_split

    wanted = ", ".join(map(str, sizes))
    if sum(sizes) > len(labels):
        raise DigitsError(f"parts of {wanted} images are needed, and there are {len(labels)}")
    rest, parts = np.arange(len(labels)), []
    for size in sizes:
        if size == len(rest):
            taken, rest = rest, rest[:0]
        else:
            try:
                taken, rest = map(np.asarray, train_test_split(rest, train_size=size, stratify=labels[rest], random_state=0))
            except ValueError as error:
                raise DigitsError(f"{len(labels)} images cannot be split into {wanted} and the rest: {error}") from error
        parts.append(Images(images[taken][..., None], labels[taken]))
    return parts


def shuffled(labels: np.ndarray, seed: int, epochs: int, batch_size: int) -> np.ndarray:
    """The images of each batch, (batches, batch_size): each image once an epoch."""
    rng = np.random.default_rng(seed)
    whole = len(labels) // batch_size * batch_size
    return np.concatenate([rng.permutation(len(labels))[:whole] for _ in range(epochs)]).reshape(-1, batch_size)


def few_classes(labels: np.ndarray, seed: int, epochs: int, batch_size: int, classes: int = 2) -> np.ndarray:
    """As many batches, each of that many classes drawn at random and equally many images of each."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in range(NUM_CLASSES)]

    def batch() -> np.ndarray:
        drawn = rng.choice(NUM_CLASSES, classes, replace=False)
        each = batch_size // classes
        return np.concatenate([rng.choice(members[label], each, replace=len(members[label]) < each) for label in drawn])

    return np.stack([batch() for _ in range(epochs * (len(labels) // batch_size))])
