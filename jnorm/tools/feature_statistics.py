"""Feature statistics beside the data and the model: in a file of their own, and in the layers that standardize."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import nnx as jnx
from .._norms.feature_standardization import KEYS, _check_keys
from ._data_files import reading
from ._layers import Layers, check_tree, chosen, path_text
from ._written_files import replacing

Model = TypeVar("Model")
_COLLECTION = "batch_stats"


def save_feature_statistics(path: str | os.PathLike[str], statistics: Any) -> None:
    """Write feature statistics to a file of their own, an .npz archive of plain arrays.

    Args:
      path: of the file, which is replaced where it exists; folders that are missing are made.
      statistics: from :func:`feature_statistics_of_files` or :func:`jnorm.feature_statistics`; or several, in a dict, which may be
        nested, such as `{"inputs": ..., "targets": ...}`.

    Returns:
      None. The file appears under its name when it is complete.

    Raises:
      ValueError: something else than statistics, or a name with "/" in it, or that is no string.

    Example:
      >>> import tempfile, jnorm, jnorm.tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jnorm.tools.save_feature_statistics(f"{folder}/inputs.npz", jnorm.feature_statistics_state(2))
      ...     {k: v.tolist() for k, v in jnorm.tools.load_feature_statistics(f"{folder}/inputs.npz").items()}
      {'count': [0.0, 0.0], 'mean': [0.0, 0.0], 'var': [1.0, 1.0]}
    """
    flat: dict[str, np.ndarray] = {}
    _flatten(statistics, "", flat)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        np.savez(stream, allow_pickle=False, **flat)


def load_feature_statistics(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save_feature_statistics` wrote.

    Args:
      path: of the file.

    Returns:
      The statistics, or the dict of several, as arrays of NumPy of the dtypes that were saved; bfloat16 as float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or has something else in it than statistics; the error says what is missing or too much.

    Example:
      >>> import tempfile, jnorm, jnorm.tools
      >>> both = {"inputs": jnorm.feature_statistics_state(2), "targets": jnorm.feature_statistics_state(1)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jnorm.tools.save_feature_statistics(f"{folder}/both.npz", both)
      ...     jnorm.tools.load_feature_statistics(f"{folder}/both.npz")["targets"]["var"].tolist()
      [1.0]
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    tree: dict[str, Any] = {}
    with reading(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz archive.")
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                *folders, key = name.split("/")
                node = tree
                for folder in folders:
                    node = node.setdefault(folder, {})
                    if not isinstance(node, dict):
                        break
                if not isinstance(node, dict) or key in node:
                    raise ValueError(f"it has arrays within what is an array, at {name!r}.")
                node[key] = archive[name]
        _flatten(tree, "", {})
    return tree


def with_feature_statistics(model: Model, statistics: Any, layers: Layers | None = None) -> Model:
    """A model whose layers of feature standardization have these statistics.

    Args:
      model: the variables of a Linen model, or its collection "batch_stats"; or an NNX model.
      statistics: from :func:`feature_statistics_of_files`, :func:`load_feature_statistics` or :func:`jnorm.feature_statistics`.
      layers: which layers, by their paths, such as "encoder/inputs": a pattern ("*" stands for anything) or the path of something that
        they lie in, several of these, or a function from path to bool. None: all.

    Returns:
      The variables with the statistics in place of what was there, in its dtypes. Of an NNX model a copy.

    Raises:
      ValueError: no such layer in the model; `layers` matches none, which lists what there is; statistics of another number of features
        than a layer, which is named.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> from jnorm import nnx as jnx
      >>> statistics = {"count": jnp.array([4.0]), "mean": jnp.array([10.0]), "var": jnp.array([9.0])}
      >>> layer = jnorm.tools.with_feature_statistics(jnx.FeatureStandardization(1), statistics)
      >>> layer(jnp.array([[7.0], [16.0]])).tolist()
      [[-1.0], [2.0]]
    """
    _check_keys(statistics, "statistics")
    if isinstance(model, nnx.Module):
        return _in_module(model, statistics, layers)
    if isinstance(model, Mapping) and isinstance(model.get(_COLLECTION), Mapping) and not _is_statistics(model):
        return type(model)({**model, _COLLECTION: with_feature_statistics(model[_COLLECTION], statistics, layers)})  # type: ignore[call-arg]
    check_tree(model)
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_statistics)
    wanted = set(chosen(_some(path_text(path) for path, node in found if _is_statistics(node)), layers, "layers"))

    def one(path: Any, node: Any) -> Any:
        text = path_text(path)
        if text not in wanted or not _is_statistics(node):
            return node
        return type(node)({key: _of_shape(statistics, key, node[key], text, False) for key in node})

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=_is_statistics)


def _in_module(model: Any, statistics: Any, layers: Layers | None) -> Any:
    model = nnx.clone(model)
    there = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, jnx.FeatureStandardization)}
    for path in chosen(_some(there), layers, "layers"):
        for key in KEYS:
            variable = getattr(there[path], key)
            variable.set_value(_of_shape(statistics, key, variable[...], path, True))
    return model


def _some(paths: Any) -> list[str]:
    paths = list(paths)
    if not paths:
        raise ValueError("there is no FeatureStandardization in the model, nor its 'count', 'mean' and 'var' in the variables.")
    return paths


def _of_shape(statistics: Any, key: str, there: Any, path: str, flat: bool) -> jax.Array:
    """A module of NNX holds the statistics of all its feature axes in one row."""
    new = statistics[key]
    if np.shape(new) != np.shape(there) and not (flat and np.size(new) == np.size(there)):
        raise ValueError(f"the statistics are of features of shape {np.shape(new)}, and those of the layer {path!r} of {np.shape(there)}.")
    return jnp.asarray(new, there.dtype).reshape(np.shape(there))


def _is_statistics(node: Any) -> bool:
    """Of features, each with its count; running statistics have one count, or none."""
    return isinstance(node, Mapping) and set(node) == set(KEYS) and len({np.shape(node[key]) for key in KEYS}) == 1


def _flatten(tree: Any, path: str, into: dict[str, np.ndarray]) -> None:
    """By names such as "inputs/mean"."""
    if isinstance(tree, Mapping) and tree and all(isinstance(node, Mapping) for node in tree.values()):
        for name, node in tree.items():
            if not isinstance(name, str) or "/" in name or not name:
                raise ValueError(f"names of statistics must be strings without '/', got {name!r}.")
            _flatten(node, f"{path}{name}/", into)
        return
    _check_keys(tree, path.rstrip("/") or "statistics")
    into |= {path + key: _kept(np.asarray(tree[key])) for key in KEYS}


def _kept(array: np.ndarray) -> np.ndarray:
    """NumPy keeps no bfloat16 in files."""
    return array if array.dtype.kind == "f" else array.astype(np.float32)
