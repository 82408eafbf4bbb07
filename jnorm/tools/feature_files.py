"""Standardization of a data set in files, with bounded memory: its statistics, and the standardized copies."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._norms.feature_standardization import _check_keys
from .._pipeline.axes import Layout, canonical_axes, others
from ..typing import Axes, FeatureStatistics
from ._data_files import Members, Part, parts_of
from ._feature_sums import Sums
from ._progress import progress_bar
from ._written_files import writing

Source = Any
Missing = Literal["nan"] | None
_MAX_BYTES = 64 << 20


def feature_statistics_of_files(
    sources: Source,
    *,
    feature_axes: Axes = -1,
    missing: Missing = None,
    members: Members = None,
    csv_header: bool = False,
    max_bytes: int = _MAX_BYTES,
    progress: bool = False,
) -> FeatureStatistics:
    r"""The statistics of a data set in files, for :func:`jnorm.standardize_features` and :func:`standardize_files`.

    .. math:: n = \sum_f n_f, \qquad \mu = \frac{1}{n}\sum_f n_f\mu_f, \qquad
              \sigma^2 = \frac{1}{n}\sum_f n_f\left(\sigma_f^2 + (\mu_f - \mu)^2\right)

    The mean and biased variance of all values together, however the files are cut. They are read some rows at a time; what all files
    are is looked at first, so that one that does not fit is told at once.

    Args:
      sources: the path of a file, of a folder (all data files that lie in it), or a pattern such as `"data/**/x*.npy"`; an array; or an
        iterable of paths and arrays, such as a generator of batches. Files are .npy, .npz, .csv or .tsv.
      feature_axes: the axes that have their own statistics, of each array as it lies in its file; axis 0 is that of the examples, and is
        none. An array `(n,)` is read as `(n, 1)`.
      missing: "nan": values that are NaN, or empty in a table of text, are left out, each feature having its own count. None: they are
        an error.
      members: of .npz archives, the name, or names, of the arrays to read; None: all.
      csv_header: the first line of tables of text has names. A list may be without any, as the share of a process may.
      max_bytes: what is held of the data at a time; at least one row is.
      progress: show a progress bar, which needs rich.

    Returns:
      `{"count", "mean", "var"}` of the shape of the features, float64 arrays of NumPy. JAX takes them as float32, unless its
      `jax_enable_x64` is set. A feature of which there was no value has count 0, mean 0 and variance 1, with a warning.

    Raises:
      ValueError: no files, an empty one, one that cannot be read, or of other features than the first; NaN without `missing`;
        infinite values; axes that do not fit; `members` or `csv_header` where the path leads to no such file. The error names the file.
      TypeError: values that are no real numbers; a masked array.
      FileNotFoundError: a path that leads to nothing.
      ImportError: `progress` without rich.

    Numerics:
      In float64, around the mean of the first rows that are read: a mean that is 1e6 times the spread costs no digits of the variance.
      Blocks of rows are merged by the differences of their means.

    Distributed:
      Each process takes a share of the files, at least one: `files[jax.process_index() :: jax.process_count()]`; what they found goes
      into :func:`jnorm.merge_feature_statistics`, under `jax.enable_x64(True)` in float64.

    Example:
      >>> import tempfile, numpy as np, jnorm.tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name, rows in (("a", [[1.0, 10.0], [3.0, 10.0]]), ("b", [[2.0, 10.0], [6.0, 10.0]])):
      ...         np.save(f"{folder}/{name}.npy", np.array(rows, np.float32))
      ...     statistics = jnorm.tools.feature_statistics_of_files(folder)
      >>> {k: v.tolist() for k, v in statistics.items()}
      {'count': [4.0, 4.0], 'mean': [3.0, 10.0], 'var': [3.5, 0.0]}

    References:
      Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if missing not in ("nan", None):
        raise ValueError(f'missing must be "nan" or None, got {missing!r}.')
    parts, size = _parts(sources, members, csv_header, feature_axes)
    sums = None
    with progress_bar(progress, "statistics", size, of_bytes=True) as advance:
        for part, layout in parts:
            sums = sums or Sums(layout.feature_shape)
            at = 0
            for rows in part.read(_rows_at_a_time(part, max_bytes)):
                block = rows.values.reshape(len(rows.values), *layout.shape[1:])
                sums.add(block, layout, missing == "nan", f"{part.name}, in the rows {at} to {at + len(block) - 1},")
                at += len(block)
                advance(rows.size)
    if sums is None:
        raise ValueError("there are no files or arrays, and so no statistics. An iterator that an earlier loop used up has none left.")
    return sums.statistics()


def standardize_files(
    sources: Source,
    folder: str | os.PathLike[str],
    statistics: FeatureStatistics,
    *,
    inverse: bool = False,
    correction: int | float = 0,
    minimum_std: float = 0.0,
    feature_axes: Axes = -1,
    dtype: Any = None,
    members: Members = None,
    csv_header: bool = False,
    overwrite: bool = False,
    max_bytes: int = _MAX_BYTES,
    progress: bool = False,
) -> list[Path]:
    """Writes standardized copies of files: :func:`jnorm.standardize_features`, with bounded memory.

    Args:
      sources: as in :func:`feature_statistics_of_files`, but of files only.
      folder: where to write; it is made where it is missing. `a.npy`, `a.csv` and `a.tsv` become `a.npy`, and the member x of `a.npz`
        becomes `a-x.npy`.
      statistics: from :func:`feature_statistics_of_files` or :func:`jnorm.feature_statistics`.
      inverse: from standardized values to those in their own units: :func:`jnorm.unstandardize_features`.
      correction: as in :func:`jnorm.standardize_features`.
      minimum_std: as there.
      feature_axes: the axes that have their own statistics, of each array as it lies in its file; not axis 0, that of the examples.
      dtype: of what is written, float16, float32 or float64; None: that of the file, float32 for integers.
      members: of .npz archives, the name, or names, of the arrays to read; None: all.
      csv_header: the first line of tables of text has names.
      overwrite: replace files that are there already. The ones that are read are never replaced.
      max_bytes: what is held of the data at a time; at least one row is.
      progress: show a progress bar, which needs rich.

    Returns:
      The paths of what was written, in the order of the sources. Missing values, NaN, stay so. A file appears under its name when it is
      complete.

    Raises:
      ValueError: no files, an empty one, one that cannot be read, or whose features are not those of the statistics; two that would be
        written under one name; a file that would be written over itself. All but what cannot be read, and values too large for the
        dtype, is found before anything is written.
      TypeError: values that are no real numbers; arrays among the sources; a dtype that is not floating.
      FileExistsError: a file to write is there already, without `overwrite`.
      ImportError: `progress` without rich.

    Numerics:
      In float64, rounded once to the dtype. What a constant feature is, is told in the dtype of the statistics: with float64 ones, those
      with a standard deviation of at most 2.2e-16 times the size of the mean.

    Example:
      >>> import tempfile, numpy as np, jnorm.tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/x.npy", np.array([[1.0, 10.0], [3.0, 10.0]], np.float32))
      ...     statistics = jnorm.tools.feature_statistics_of_files(f"{folder}/x.npy")
      ...     (path,) = jnorm.tools.standardize_files(f"{folder}/x.npy", f"{folder}/standardized", statistics)
      ...     np.load(path).tolist()
      [[-1.0, 0.0], [1.0, 0.0]]
    """
    _check_keys(statistics, "statistics")
    features = np.shape(statistics["mean"])
    parts, size = _parts(sources, members, csv_header, feature_axes, features)
    parts = list(parts)
    if not parts:
        raise ValueError("there are no files to standardize.")
    folder = Path(folder).expanduser()
    targets = _targets([part for part, _ in parts], folder, overwrite)
    dtypes = [_dtype(dtype, part.dtype) for part, _ in parts]
    mean, divisor = _mean_and_divisor(statistics, correction, minimum_std)
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(progress, "unstandardized" if inverse else "standardized", size, of_bytes=True) as advance:
        for (part, layout), target, kind in zip(parts, targets, dtypes, strict=True):
            shift, factor = layout.feature_view(mean), layout.feature_view(divisor)
            with writing(target, part.shape[1:], kind) as write:
                for rows in part.read(_rows_at_a_time(part, max_bytes)):
                    x = rows.values.astype(np.float64).reshape(len(rows.values), *layout.shape[1:])
                    if inverse:
                        x *= factor
                        x += shift
                    else:
                        x -= shift
                        x /= factor
                    write(_narrowed(x, kind, part.name).reshape(rows.values.shape))
                    advance(rows.size)
    return targets


# --- What is read, and whether it fits ----------------------------------------------------------------------------------------


class _Fitting(NamedTuple):
    part: Part
    layout: Layout


def _parts(sources: Source, members: Members, csv_header: bool, feature_axes: Axes, features: Any = None) -> tuple[Any, int | None]:
    """The arrays with their axes, and their bytes; of a generator one after another, of a size that is not known."""
    fitting = _fitting(parts_of(sources, members, csv_header), feature_axes, features)
    if not isinstance(sources, str | os.PathLike | list | tuple) and not hasattr(sources, "__array__"):
        return fitting, None
    parts = list(fitting)
    return parts, sum(part.size for part, _ in parts)


def _fitting(parts: Iterator[Part], feature_axes: Axes, features: tuple[int, ...] | None) -> Iterator[_Fitting]:
    whose = "the statistics have"
    seen: dict[Any, str] = {}
    for part in parts:
        if part.path is not None and (before := seen.setdefault((part.path.resolve(), part.member), part.name)) is not part.name:
            raise ValueError(f"{before} is there twice, the second time as {part.name}.")
        shape = part.shape if len(part.shape) > 1 else (*part.shape, 1)
        axes = canonical_axes(feature_axes, len(shape), "feature_axes", part.name)
        if 0 in axes:
            raise ValueError(f"feature_axes={feature_axes!r} has axis 0 of {part.name} in it, which is that of the examples.")
        layout = Layout(shape, others(len(shape), axes), axes)
        if features is None:
            features, whose = layout.feature_shape, f"{part.name} of shape {_text(part.shape)} has"
        if layout.feature_shape != features:
            raise ValueError(
                f"{part.name} of shape {_text(part.shape)} has features of shape {layout.feature_shape}, and {whose} such of {features}."
            )
        yield _Fitting(part, layout)


def _text(shape: tuple[int, ...]) -> str:
    return str(shape).replace("-1", "?")


def _rows_at_a_time(part: Part, max_bytes: int) -> int:
    """Beside the rows as they were read there are theirs in float64, of the result, and one byte each for whether they count."""
    if not max_bytes > 0:
        raise ValueError(f"max_bytes must be above 0, got {max_bytes}.")
    return max(1, int(max_bytes) // (part.row_bytes + math.prod(part.shape[1:]) * 17))


# --- Standardized copies --------------------------------------------------------------------------------------------------------


def _mean_and_divisor(statistics: Any, correction: int | float, minimum_std: float) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`jnorm.standardize_features` has them, in float64."""
    for name, value in (("correction", correction), ("minimum_std", minimum_std)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    eps = np.finfo(np.promote_types(np.asarray(statistics["mean"]).dtype, np.float32)).eps
    count, mean, var = (np.asarray(statistics[key], np.float64) for key in ("count", "mean", "var"))
    std = np.sqrt(var * count / np.maximum(count - correction, 1))
    varies = std > float(eps) * abs(mean)
    return mean, np.where(varies, np.maximum(std, minimum_std), 1.0)


def _dtype(dtype: Any, of: np.dtype) -> np.dtype:
    if dtype is None:
        return of if jnp.issubdtype(of, np.floating) else np.dtype(np.float32)
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"dtype must be a floating one that NumPy keeps in files, such as float32, got {np.dtype(dtype)}.")
    return np.dtype(dtype)


def _narrowed(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    if np.count_nonzero(np.isfinite(narrow)) != np.count_nonzero(np.isfinite(x)):
        raise ValueError(f"{name} has values that are too large for {dtype}, in which they would be written; give a wider dtype=.")
    return narrow


def _targets(parts: list[Part], folder: Path, overwrite: bool) -> list[Path]:
    read = {part.path.resolve(): part.name for part in parts if part.path is not None}
    written: dict[Path, str] = {}
    for part in parts:
        if part.path is None:
            raise TypeError(f"standardize_files takes files, got {part.name}; for arrays there is jnorm.standardize_features.")
        target = folder / f"{part.stem}.npy"
        if target in written:
            raise ValueError(f"{written[target]} and {part.name} would both be written to {target}; call it once for each folder.")
        if target.resolve() in read:
            raise ValueError(f"{part.name} would be written over {read[target.resolve()]}, which is read; give another folder.")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} is there already; overwrite=True replaces it.")
        written[target] = part.name
    return list(written)
