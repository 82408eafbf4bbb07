"""Feature standardization of a data set in files: against float64 NumPy on the whole, in bounded memory; saved, and put into models."""

import re
import sys
import tracemalloc
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.core import FrozenDict
from sklearn.datasets import load_digits

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from native_fuzz import python
from refusals import refuses

KEYS = ("count", "mean", "var")
DIGITS = load_digits().data.astype(np.float32)


def whole(x, axes=0):
    """In float64 and all at once, around the mean of the first rows, as long double would have it."""
    x = x.astype(np.longdouble)
    count = (~np.isnan(x)).sum(axes)
    return {"count": count, "mean": np.nanmean(x, axes), "var": np.nanvar(x, axes)}


def close(statistics, x, axes=0, shape=None):
    """float64 sums of n deviations from a center near the mean: some n roundings of the size of the spread, and one of the mean's."""
    want, n = whole(x, axes), x.size
    spread = np.sqrt(want["var"])
    eps = np.finfo(np.float64).eps
    np.testing.assert_array_equal(statistics["count"], want["count"])
    assert (abs(statistics["mean"] - want["mean"]) <= eps * (n * spread + 2 * abs(want["mean"]))).all()
    assert (abs(statistics["var"] - want["var"]) <= eps * (4 * n * want["var"] + 1e-300)).all()
    assert all(v.dtype == np.float64 for v in statistics.values())


def rows(rng, shape=(50, 3), offset=(0, 300, -5), dtype=np.float32):
    return (rng.normal(size=shape) * [1, 20, 0.1] + offset).astype(dtype)


# --- statistics ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits in files of unlike sizes, and of each kind."""
    folder = tmp_path_factory.mktemp("digits")
    one, two, three, four = np.split(DIGITS, [700, 701, 800])
    np.save(folder / "a.npy", one)
    np.savez_compressed(folder / "b.npz", x=two, more=np.asfortranarray(three))
    np.savetxt(folder / "c.csv", four, delimiter=",", header="not a number", comments="")
    return folder


@pytest.mark.parametrize("max_bytes", [1, 100_000, 64 << 20], ids=["row", "blocks", "all"])
def test_digits_in_files(digits, max_bytes):
    """Of a row each, of some rows, and whole; a large archive in Fortran's order has its own test."""
    one, two, three, four = np.split(DIGITS, [700, 701, 800])
    if max_bytes > 1:
        close(tools.feature_statistics_of_files(digits, csv_header=True, max_bytes=max(max_bytes, 200_000)), DIGITS)
    close(tools.feature_statistics_of_files(digits / "a.npy", max_bytes=max_bytes), one)
    close(tools.feature_statistics_of_files(digits / "c.csv", csv_header=True, max_bytes=max_bytes), four)


def test_what_the_files_may_be_given_as(digits, tmp_path, monkeypatch):
    """Folder, pattern, list, iterators of paths and of arrays, one array, members: the same to the bit, or to rounding where cut."""
    want = tools.feature_statistics_of_files(digits, csv_header=True)
    paths = [digits / "a.npy", str(digits / "b.npz"), digits / "c.csv"]
    monkeypatch.chdir(digits)
    for sources in (str(digits), paths, iter(paths), str(digits / "*"), "*.*[yzv]", str(digits / "**" / "?.*")):
        jax.tree.map(np.testing.assert_array_equal, tools.feature_statistics_of_files(sources, csv_header=True), want)
    arrays = (np.float64(DIGITS[:700]), jnp.asarray(DIGITS[700:1000]), DIGITS[1000:])
    close(tools.feature_statistics_of_files(a for a in arrays), DIGITS)
    close(tools.feature_statistics_of_files(DIGITS, max_bytes=4000), DIGITS)
    close(tools.feature_statistics_of_files(["b.npz", DIGITS[:3]], members=["x"]), np.concatenate([DIGITS[700:701], DIGITS[:3]]))
    (tmp_path / "same.npy").symlink_to(digits / "a.npy")
    with refuses("a.npy", "twice", "same.npy"):
        tools.feature_statistics_of_files(["a.npy", "c.csv", tmp_path / "same.npy"], csv_header=True)
    assert (digits / "a.npy").stat().st_size == 128 + 700 * 256  # and nothing else was written
    assert len(list(digits.iterdir())) == 3


@pytest.mark.parametrize("offset", [0, 1e6, -1e12])
def test_a_mean_far_above_the_spread(offset, tmp_path, rng):
    """No digit of the variance is lost to the mean, in one block or in many; and none to blocks whose means are far apart."""
    x = rng.normal(size=(400, 3)) + offset
    x[200:] += [0, 50, 1e3]
    np.save(tmp_path / "x.npy", x)
    for max_bytes in (2000, 64 << 20):
        close(tools.feature_statistics_of_files(tmp_path, max_bytes=max_bytes), x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "uint8", "int64", "bool"])
def test_dtypes(dtype, tmp_path, rng):
    x = (rng.uniform(0, 200, (40, 3)) if dtype != "bool" else rng.uniform(size=(40, 3)) > 0.3).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    close(tools.feature_statistics_of_files(tmp_path, max_bytes=500), x)


def test_feature_axes(tmp_path, rng):
    """Per channel, per pixel, channels first, and vectors as one feature; images of several sizes."""
    x = rng.integers(0, 256, (9, 4, 5, 3)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    for axes in (-1, (1, 2, 3), (1,), (-3, 2)):
        kept = {a % 4 for a in ((axes,) if isinstance(axes, int) else axes)}
        got = tools.feature_statistics_of_files(tmp_path / "x.npy", feature_axes=axes, max_bytes=3000)
        close(got, x, tuple(a for a in range(4) if a not in kept))
    np.save(tmp_path / "y.npy", x[:, :2, ::2])
    both = np.concatenate([x.reshape(-1, 3), x[:, :2, ::2].reshape(-1, 3)])
    close(tools.feature_statistics_of_files(tmp_path), both)
    close(tools.feature_statistics_of_files(x[:, 0, 0, 0], max_bytes=40), x[:, 0, 0, :1])


def test_missing_values(tmp_path, rng):
    """Each feature has its own count; empty fields of tables are missing too; a feature without any is told and stays as it is."""
    x = rows(rng, (60, 3))
    x[rng.uniform(size=x.shape) < 0.3] = np.nan
    x[:20, 1] = np.nan  # none in the first blocks
    np.save(tmp_path / "x.npy", x[:50])
    text = "\n".join(",".join("" if np.isnan(v) else repr(float(v)) for v in row) for row in x[50:])
    (tmp_path / "y.tsv").write_text(text.replace(",", "\t"))
    for max_bytes in (500, 64 << 20):
        close(tools.feature_statistics_of_files(tmp_path, missing="nan", max_bytes=max_bytes), x)
    with refuses("x.npy", "rows 0 to", "NaN", "features 0, 1, 2", 'missing="nan"'):
        tools.feature_statistics_of_files(tmp_path)
    x[:, 1] = np.nan
    with pytest.warns(UserWarning, match="no value of feature 1"):
        got = tools.feature_statistics_of_files(x, missing="nan")
    assert [got[k][1] for k in KEYS] == [0, 0, 1]
    close({k: v[::2] for k, v in got.items()}, x[:, ::2])


def test_shares_of_processes_are_merged(digits):
    """As two processes would, in float64."""
    files = [digits / "a.npy", digits / "b.npz", digits / "c.csv"]
    shares = [tools.feature_statistics_of_files(files[i::2], csv_header=True) for i in range(2)]
    with jax.enable_x64(True):
        merged = jax.device_get(jnorm.merge_feature_statistics(*shares))
    close(merged, DIGITS)


def test_they_are_those_of_the_function(digits, x64):
    state = jnorm.feature_statistics(DIGITS[:700], jnorm.feature_statistics_state(64, dtype=jnp.float64))
    got = tools.feature_statistics_of_files(digits / "a.npy")
    assert set(got) == set(state)
    z = jnorm.standardize_features(DIGITS, got)
    assert abs(z - jnorm.standardize_features(DIGITS, state)).max() < 1e-4


# --- memory -------------------------------------------------------------------------------------------------------------------


def peak(function, *args, **options):
    tracemalloc.start()
    try:
        function(*args, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["npy", "fortran", "npz", "compressed", "csv", "arrays"])
def test_memory_is_bounded(kind, tmp_path, rng):
    """What is held stays below `max_bytes` and a constant, for four times as many rows; also in writing, with missing values."""
    bound, constant = 400_000, 3 * (1 << 18)
    number = 2_000 if kind == "csv" else 24_000
    x = rng.normal(size=(4 * number, 16)).astype(np.float32)
    peaks = []
    for n in (number, 4 * number):
        path = tmp_path / f"x.{'npz' if kind in ('npz', 'compressed') else 'csv' if kind == 'csv' else 'npy'}"
        if kind == "csv":
            np.savetxt(path, x[:n], delimiter=",")
        elif kind in ("npz", "compressed"):
            (np.savez if kind == "npz" else np.savez_compressed)(path, x=x[:n])
        else:
            np.save(path, np.asfortranarray(x[:n]) if kind == "fortran" else x[:n])
        source = (x[at : at + 5000] for at in range(0, n, 5000)) if kind == "arrays" else path
        peaks.append(peak(tools.feature_statistics_of_files, source, missing="nan", max_bytes=bound))
        statistics = tools.feature_statistics_of_files(x[:n])
        if kind != "arrays":
            options = {"max_bytes": bound, "overwrite": True}
            peaks.append(peak(tools.standardize_files, path, tmp_path / "out", statistics, **options))
    assert max(peaks) < bound + constant < 0.7 * number * 16 * (64 if kind == "csv" else 8)
    assert max(peaks[len(peaks) // 2 :]) < 1.1 * max(peaks[: len(peaks) // 2]) + 50_000


NO_DEVICE = """
import sys, jax, numpy as np
from jnorm import tools
statistics = tools.feature_statistics_of_files(sys.argv[1] + "/x.npy", max_bytes=2000)
tools.standardize_files(sys.argv[1] + "/x.npy", sys.argv[1] + "/z", statistics)
jax.config.update("jax_num_cpu_devices", 3)  # refused once there are devices
assert len(jax.devices()) == 3
"""


def test_no_device_is_taken(tmp_path, rng):
    """A process that prepares data leaves the memory of the accelerators alone, which JAX takes with its first array."""
    np.save(tmp_path / "x.npy", rows(rng))
    done = python("-c", NO_DEVICE, str(tmp_path))
    assert done.returncode == 0, done.stderr


# --- standardized copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [3000, 64 << 20])
def test_standardized_copies(digits, tmp_path, max_bytes):
    """And back. They are what the function gives; sources stay as they are."""
    before = {p.name: p.read_bytes() for p in digits.iterdir()}
    statistics = tools.feature_statistics_of_files(digits, csv_header=True)
    options = {"csv_header": True, "max_bytes": max_bytes, "members": ["x"]}
    paths = tools.standardize_files(digits, tmp_path / "new" / "z", statistics, **options)
    assert [p.relative_to(tmp_path / "new" / "z").as_posix() for p in paths] == ["a.npy", "b-x.npy", "c.npy"]
    assert {p.name for p in (tmp_path / "new" / "z").iterdir()} == {p.name for p in paths}
    x, z = np.split(DIGITS, [700, 701, 800]), [np.load(p) for p in paths]
    assert [a.dtype.name for a in z] == ["float32", "float32", "float64"]
    std = np.sqrt(statistics["var"])
    for part, of in zip(z, (x[0], x[1], x[3]), strict=True):
        want = (of - statistics["mean"]) / np.where(std > 0, std, 1)
        np.testing.assert_allclose(part, want, rtol=np.finfo(part.dtype).eps, atol=1e-15)
    assert (std == 0).any()
    back = tools.standardize_files(paths, tmp_path / "back", statistics, inverse=True, dtype="float64", max_bytes=max_bytes)
    for path, of, of_z in zip(back, (x[0], x[1], x[3]), z, strict=True):
        assert np.load(path).dtype == np.float64
        eps = np.finfo(of_z.dtype).eps
        assert (abs(np.load(path) - of) <= 2 * eps * (abs(of - statistics["mean"]) + 1e-9 + abs(statistics["mean"]))).all()
    assert {p.name: p.read_bytes() for p in digits.iterdir()} == before


@pytest.mark.parametrize("case", ["plain", "correction", "minimum_std", "float32", "pixels"])
def test_copies_are_those_of_the_function(case, tmp_path, rng, x64):
    """All options, with constant and never counted features among the others."""
    x = rng.normal(size=(20, 3, 4)) * [1, 1e-3, 50, 0] + [0, 1e3, -2e6, 0.1]
    axes = (1, 2) if case == "pixels" else -1
    np.save(tmp_path / "x.npy", x)
    statistics = tools.feature_statistics_of_files(tmp_path, feature_axes=axes)
    options = {"correction": 1} if case == "correction" else {"minimum_std": 0.5} if case == "minimum_std" else {}
    if case == "float32":  # as jnorm.feature_statistics has them: constant is what is so in float32
        statistics = {k: v.astype(np.float32) for k, v in statistics.items()}
        statistics["var"][1] = 1e-12
    for inverse, function in ((False, jnorm.standardize_features), (True, jnorm.unstandardize_features)):
        (path,) = tools.standardize_files(
            tmp_path / "x.npy", tmp_path / "z", statistics, inverse=inverse, feature_axes=axes, overwrite=True, **options
        )
        want = function(x, {k: jnp.asarray(v) for k, v in statistics.items()}, feature_axes=axes, **options)
        # Some roundings of the divisor, which the function has in the dtype of the statistics, and of the three operations
        eps = np.finfo(statistics["var"].dtype).eps
        np.testing.assert_allclose(np.load(path), want, rtol=8 * eps, atol=8 * eps * abs(statistics["mean"]).max() * inverse)


def test_integers_vectors_and_missing_values(tmp_path, rng):
    x = rng.integers(0, 256, (9, 4, 3)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    y = rng.normal(size=30)
    y[4] = np.nan
    np.save(tmp_path / "y.npy", y)
    (path,) = tools.standardize_files(tmp_path / "x.npy", tmp_path / "z", tools.feature_statistics_of_files(tmp_path / "x.npy"))
    assert (np.load(path).dtype, np.load(path).shape) == (np.float32, (9, 4, 3))
    statistics = tools.feature_statistics_of_files(tmp_path / "y.npy", missing="nan")
    (path,) = tools.standardize_files(tmp_path / "y.npy", tmp_path / "z", statistics, dtype=np.float16)
    z = np.load(path)
    assert (z.dtype, z.shape, np.flatnonzero(np.isnan(z)).tolist()) == (np.float16, (30,), [4])
    np.testing.assert_allclose(z, (y - np.nanmean(y)) / np.nanstd(y), atol=2e-3)


def test_files_are_complete_or_not_there(tmp_path, rng):
    """A source that ends too early leaves what was there before, and nothing half."""
    x, target = rows(rng), tmp_path / "z" / "x.npy"
    np.save(tmp_path / "x.npy", x)
    statistics = tools.feature_statistics_of_files(tmp_path / "x.npy")
    tools.standardize_files(tmp_path / "x.npy", tmp_path / "z", statistics)
    before = target.read_bytes()
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-7])
    with refuses("x.npy", "cannot be read", "before its last row"):
        tools.standardize_files(tmp_path / "x.npy", tmp_path / "z", statistics, overwrite=True, max_bytes=1000)
    assert target.read_bytes() == before and [p.name for p in (tmp_path / "z").iterdir()] == ["x.npy"]


def test_what_would_be_overwritten(tmp_path, rng):
    """All is looked at before anything is written."""
    (tmp_path / "in").mkdir()
    for name in ("x.npy", "in/x.npy", "in/a.npy"):
        np.save(tmp_path / name, rows(rng))
    statistics = tools.feature_statistics_of_files(tmp_path / "x.npy")
    with refuses("over", "which is read", "another folder"):
        tools.standardize_files(tmp_path / "x.npy", tmp_path, statistics, overwrite=True)
    with refuses("both be written to", str(tmp_path / "z" / "x.npy")):
        tools.standardize_files([tmp_path / "in", tmp_path / "x.npy"], tmp_path / "z", statistics)
    assert not (tmp_path / "z").exists()
    tools.standardize_files(tmp_path / "x.npy", tmp_path / "z", statistics)
    with refuses("z/x.npy is there already", "overwrite=True", kind=FileExistsError):
        tools.standardize_files(tmp_path / "in", tmp_path / "z", statistics)
    assert [p.name for p in (tmp_path / "z").iterdir()] == ["x.npy"]
    with refuses("array 1", "jnorm.standardize_features", kind=TypeError):
        tools.standardize_files([tmp_path / "x.npy", rows(rng)], tmp_path / "y", statistics)
    with refuses("dtype", "int32", kind=TypeError):
        tools.standardize_files(tmp_path / "x.npy", tmp_path / "y", statistics, dtype=np.int32)
    for name in ("correction", "minimum_std"):
        with refuses(name, "at least 0", "-1"):
            tools.standardize_files(tmp_path / "x.npy", tmp_path / "y", statistics, **{name: -1})
    with refuses("x.npy", "(50, 3)", "features of shape (3,)", "the statistics have", "(4,)"):
        tools.standardize_files(tmp_path / "x.npy", tmp_path / "y", jnorm.feature_statistics_state(4))
    with refuses("count", "['mean', 'var']"):
        tools.standardize_files(tmp_path / "x.npy", tmp_path / "y", jnorm.batch_norm_state(3))
    with refuses("there are no files"):
        tools.standardize_files([], tmp_path / "y", statistics)
    assert not (tmp_path / "y").exists()


# --- bad input ----------------------------------------------------------------------------------------------------------------


def test_no_files(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for sources in ([], iter([])):
        with refuses("no files or arrays"):
            tools.feature_statistics_of_files(sources)
    with refuses("no data in the folder", str(tmp_path), ".npy, .npz, .csv, .tsv"):
        tools.feature_statistics_of_files(tmp_path)
    with refuses("no file or folder", "nowhere.npy", kind=FileNotFoundError):
        tools.feature_statistics_of_files(tmp_path / "nowhere.npy")
    with refuses("pattern", "*.npy"):
        tools.feature_statistics_of_files(str(tmp_path / "*.npy"))
    with refuses("notes.txt", "unknown kind", ".npy"):
        tools.feature_statistics_of_files(tmp_path / "notes.txt")
    for sources, got in (
        (3, "int"),
        ([1.0], "float"),
        ([[1.0, 2.0], [3.0, 4.0]], "list; give rows of numbers as one np.array"),
        ({}, "dict"),
    ):
        with refuses("sources", got, kind=TypeError):
            tools.feature_statistics_of_files(sources)


def test_options_that_nothing_is_for(tmp_path, rng):
    np.save(tmp_path / "a.npy", rows(rng))
    for sources in (tmp_path, str(tmp_path / "*.npy"), rows(rng)):
        with refuses("members='x'", ".npz archives", "there is none in"):
            tools.feature_statistics_of_files(sources, members="x")
        with refuses("csv_header=True", "tables of text", "there is none in"):
            tools.feature_statistics_of_files(sources, csv_header=True)
    tools.feature_statistics_of_files([tmp_path / "a.npy"], members="x", csv_header=True)  # the share of a process


def test_the_home_folder(tmp_path, rng, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "a.npy", rows(rng))
    statistics = tools.feature_statistics_of_files("~/a.npy")
    tools.save_feature_statistics("~/new/folder/s.npz", statistics)
    jax.tree.map(np.testing.assert_array_equal, tools.load_feature_statistics("~/new/folder/s.npz"), statistics)
    assert tools.standardize_files("~/*.npy", "~/out", statistics) == [tmp_path / "out/a.npy"]


def test_masked_arrays():
    x = np.ma.masked_array(np.float32([[1, 2], [3, 100]]), [[False, False], [False, True]])
    for sources in (x, [x]):
        with refuses("masked", ".filled(np.nan)", 'missing="nan"', kind=TypeError):
            tools.feature_statistics_of_files(sources)
    assert tools.feature_statistics_of_files(x.filled(np.nan), missing="nan")["mean"].tolist() == [2, 2]


def test_what_the_dtype_cannot_hold(tmp_path):
    np.save(tmp_path / "a.npy", np.float16([[1], [-1]]))
    statistics = {"count": np.float64([2]), "mean": np.float64([0]), "var": np.float64([1e12])}
    with refuses("a.npy", "too large for float16", "dtype="):
        tools.standardize_files(tmp_path / "a.npy", tmp_path / "out", statistics, inverse=True)
    assert not list((tmp_path / "out").iterdir())
    (path,) = tools.standardize_files(tmp_path / "a.npy", tmp_path / "out", statistics, inverse=True, dtype=np.float32)
    assert np.load(path).tolist() == [[1e6], [-1e6]]


def test_files_of_other_features(tmp_path, rng):
    """Found before a file is read, of which the last may come hours later; of an iterator, when it comes."""
    np.save(tmp_path / "a.npy", np.full((4, 3), np.nan))
    np.save(tmp_path / "b.npy", np.ones((5, 2)))
    with refuses("b.npy of shape (5, 2)", "(2,)", "a.npy of shape (4, 3) has", "(3,)"):
        tools.feature_statistics_of_files(tmp_path)
    with refuses("array 1 of shape (5, 2)", "array 0 of shape (4, 3)"):
        tools.feature_statistics_of_files(a for a in (np.ones((4, 3)), np.ones((5, 2))))
    (tmp_path / "b.npy").unlink()
    (tmp_path / "c.csv").write_text("1,2\n")
    with refuses("c.csv of shape (?, 2)", "(3,)"):
        tools.feature_statistics_of_files(tmp_path)
    with refuses("feature_axes=0", "array", "examples"):
        tools.feature_statistics_of_files(np.ones((4, 3)), feature_axes=0)
    with refuses("feature_axes=2", "the array"):
        tools.feature_statistics_of_files(np.ones((4, 3)), feature_axes=2)


@pytest.mark.parametrize(
    "array, fragments",
    [
        (np.array([[1, "a"]], object), ("of real numbers", "object")),
        (np.array([["a"]]), ("of real numbers", "<U1")),
        (np.ones((2, 2), np.complex64), ("complex64", "two features")),
        (np.ones((2, 2), jnp.bfloat16), ("bfloat16", "float32")),
        (np.ones(3, [("a", "f4"), ("ü", "f4")]), ("of real numbers",)),
    ],
    ids=["object", "text", "complex", "bfloat16", "fields"],
)
def test_values_that_are_no_numbers(array, fragments, tmp_path):
    np.save(tmp_path / "x.npy", array)
    with refuses("x.npy", *fragments, kind=TypeError):
        tools.feature_statistics_of_files(tmp_path)


def test_arrays_of_bfloat16_are_numbers():
    close(tools.feature_statistics_of_files([jnp.ones((3, 2), jnp.bfloat16)]), np.ones((3, 2)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()], ids=str)
def test_empty_arrays(shape, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(shape))
    with refuses("x.npy", "one number" if shape == () else "empty"):
        tools.feature_statistics_of_files(tmp_path)


def test_values_that_are_not_finite(tmp_path, rng):
    x = rows(rng)
    x[40, 2] = np.inf
    np.save(tmp_path / "x.npy", x)
    for missing in (None, "nan"):
        with refuses("x.npy", "infinite", "feature 2"):
            tools.feature_statistics_of_files(tmp_path, missing=missing)
    with refuses("rows 40 to 40", "infinite"):
        tools.feature_statistics_of_files(tmp_path, max_bytes=1)
    with refuses("array", "too large for float64", "feature 0"):
        tools.feature_statistics_of_files(np.array([[1e200, 1], [-1e200, 1]]))
    with refuses("missing", "'zero'"):
        tools.feature_statistics_of_files(tmp_path, missing="zero")
    with refuses("max_bytes", "0"):
        tools.feature_statistics_of_files(tmp_path, max_bytes=0)


def test_files_that_cannot_be_read(tmp_path, rng):
    def refused(name, content, *fragments, **options):
        (tmp_path / name).write_bytes(content)
        with refuses(name, *fragments):
            tools.feature_statistics_of_files(tmp_path / name, **options)

    refused("empty.npy", b"", "cannot be read")
    refused("text.npy", b"no array at all", "cannot be read", "magic")
    refused("text.npz", b"no archive at all", "cannot be read", "zip")
    np.savez(tmp_path / "x.npz", x=rows(rng), y=rows(rng))
    with refuses("x.npz", "['x', 'y']", "members='z'"):
        tools.feature_statistics_of_files(tmp_path / "x.npz", members="z")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[300] ^= 255
    refused("broken.npz", bytes(content), "'x'", "cannot be read", "CRC")
    with zipfile.ZipFile(tmp_path / "none.npz", "w") as archive:
        archive.writestr("x.txt", "x")
    with refuses("none.npz", "the members []"):
        tools.feature_statistics_of_files(tmp_path / "none.npz")
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(rows(rng)))
    with refuses("f.npz", "'x'", "Fortran", "np.ascontiguousarray"):
        tools.feature_statistics_of_files(tmp_path / "f.npz", max_bytes=1000)


def test_tables_of_text(tmp_path, rng):
    def table(text, **options):
        (tmp_path / "x.csv").write_bytes(text.encode())
        return tools.feature_statistics_of_files(tmp_path / "x.csv", **options)

    x = rows(rng, (9, 3), dtype=np.float64)
    lines = "\r\n".join(",".join(map(repr, row)) for row in x.tolist())
    close(table(f'\ufeff"a","b # c",d\r\n# more\r\n{lines}\r\n\r\n'.replace(" # c", ""), csv_header=True), x)
    close(table(lines, max_bytes=1), x)
    with refuses("x.csv", "line 1 has names", "'a,b,c'", "csv_header=True"):
        table(f"a,b,c\n{lines}")
    for text in ("", "a,b\n", "# a,b\n"):
        with refuses("x.csv", "is empty, without a line of numbers"):
            table(text, csv_header=True)


NOT_NUMBERS = {
    "1,2\n3,?": "line 2 has '?' in place of a number, in column 2; a missing value is an empty field, or nan.",
    "1,2,x\n4,5,6\n7,8,9\n": "line 1 has 'x' in place of a number, in column 3; a missing",  # one row of data, and no names
    "?,2\n3,?": "line 1 has '?' in place of a number, in column 1; a missing",
    "a,b": "line 1 has 'a' in place of a number, in column 1; a missing",
    "# one\n1,2\n\n3,N/A": "line 4 has 'N/A' in place of a number, in column 2; a missing",
    "1;2;3\n4;5;6\n": "line 1 has '1;2;3' in place of a number, in column 1; columns must be separated by ',', as of",
    "1,5;2,5\n": "line 1 has '5;2' in place of a number, in column 2; columns must be separated by ','",
    "1 " * 70_000: "line 1 has '1 1 1",  # longer than a field of Python's reader
    "1,2\n1,2\n3,4,5": "line 3 has 3 columns, the first of the numbers has 2.",
    "1,2\n1,2\n3\n": "line 3 has 1 columns, the first of the numbers has 2.",
}


@pytest.mark.parametrize("max_bytes", [1, 64 << 20])
@pytest.mark.parametrize("text", NOT_NUMBERS, ids=lambda text: text[:12])
def test_a_field_of_a_table_that_is_no_number(text, max_bytes, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"x.csv cannot be read: {NOT_NUMBERS[text]}") + "(?!.*csv_header)"):
        tools.feature_statistics_of_files(tmp_path / "x.csv", max_bytes=max_bytes)


def test_a_field_below_the_names_that_is_no_number(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n\n1\t2\n3\t4,5")
    with refuses("line 4 has '4,5' in place of a number", r"separated by '\t', as of a .tsv file, not by ','"):
        tools.feature_statistics_of_files(tmp_path / "x.tsv", csv_header=True)


# --- progress -----------------------------------------------------------------------------------------------------------------


def test_progress(digits, tmp_path, capsys, monkeypatch):
    """On the standard error, to the end; clear without rich; of an iterator nobody knows how much there is."""
    statistics = tools.feature_statistics_of_files(digits, csv_header=True, progress=True)
    tools.standardize_files(digits / "a.npy", tmp_path, statistics, progress=True)
    tools.feature_statistics_of_files(iter([DIGITS]), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "statistics" in err and "standardized" in err and "179.2/179.2 kB" in err
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with refuses("progress=True", "rich", "jnorm[examples]", kind=ImportError):
        tools.feature_statistics_of_files(digits, csv_header=True, progress=True)
    tools.feature_statistics_of_files(digits / "a.npy")


# --- saved, and put into models -----------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path, rng):
    one = tools.feature_statistics_of_files(rows(rng))
    two = jnorm.feature_statistics(rows(rng)[:, :2], jnorm.feature_statistics_state(2))
    for tree in (one, two, {"inputs": {"a": one, "b": two}, "targets": two}):
        tools.save_feature_statistics(tmp_path / "s.npz", tree)
        jax.tree.map(np.testing.assert_array_equal, tools.load_feature_statistics(str(tmp_path / "s.npz")), jax.tree.map(np.asarray, tree))
    assert tools.load_feature_statistics(tmp_path / "s.npz")["targets"]["mean"].dtype == np.float32
    before = (tmp_path / "s.npz").read_bytes()
    for tree, fragments in (
        ({"a/b": one}, ("a/b",)),
        ({3: one}, ("3",)),
        ({}, ("statistics must be a dict",)),
        ({"inputs": one, "norm": {"mean": one["mean"], "var": one["var"]}}, ("norm", "['mean', 'var']")),
    ):
        with refuses(*fragments):
            tools.save_feature_statistics(tmp_path / "s.npz", tree)
    assert (tmp_path / "s.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_saved_in_bfloat16(tmp_path):
    tools.save_feature_statistics(tmp_path / "s.npz", {k: jnp.full(2, 1.5, jnp.bfloat16) for k in KEYS})
    new = tools.load_feature_statistics(tmp_path / "s.npz")
    assert all(v.dtype == np.float32 and v.tolist() == [1.5, 1.5] for v in new.values())


def test_files_that_have_no_statistics(tmp_path):
    for names in (("a", "a/b"), ("a/b", "a"), ("a", "a/b/c")):
        np.savez(tmp_path / "s.npz", **{name: np.ones(2) for name in names})
        with refuses("s.npz", "arrays within what is an array", names[1]):
            tools.load_feature_statistics(tmp_path / "s.npz")
    (tmp_path / "s.npz").unlink()
    with refuses("no file", "s.npz", kind=FileNotFoundError):
        tools.load_feature_statistics(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mean=np.ones(2), var=np.ones(2), scale=np.ones(2))
    with refuses("s.npz", "['mean', 'scale', 'var']", "'count', 'mean' and 'var'"):
        tools.load_feature_statistics(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mean=np.ones(2), var=np.ones(2), count=np.ones(3))
    with refuses("s.npz", "'count'", "(2,)", "(3,)"):
        tools.load_feature_statistics(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_text("nothing")
    with refuses("s.npz", "no .npz archive"):
        tools.load_feature_statistics(tmp_path / "s.npz")


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(jnn.FeatureStandardization(name="inputs")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnn.FeatureStandardization(feature_axes=(1, 2), name="outputs")(Inner(name="inner")(x)[:, None])


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Sequential(jnx.FeatureStandardization(3), nnx.Linear(3, 2, rngs=rngs), jnx.BatchNorm(2, rngs=rngs))
        self.outputs = jnx.FeatureStandardization(4, feature_axes=(1, 2))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("freeze", [dict, FrozenDict], ids=["dict", "FrozenDict"])
def test_into_linen(freeze, rng):
    """Through Flax's serialization too. What is not asked for stays."""
    x = rows(rng, (8, 3))
    statistics = tools.feature_statistics_of_files(x)
    variables = freeze(Model().init(jax.random.key(0), x))
    before = jax.tree.map(np.array, variables)
    new = tools.with_feature_statistics(variables, statistics, "inner/inputs")
    equal(variables, before)
    assert type(new) is type(variables)
    inputs = new["batch_stats"]["inner"]["inputs"]
    assert {v.dtype.name for v in inputs.values()} == {"float32"}
    np.testing.assert_allclose(inputs["mean"], statistics["mean"], rtol=1e-7)
    equal(new["batch_stats"]["outputs"], variables["batch_stats"]["outputs"])
    equal(new["params"], variables["params"])
    equal(new["batch_stats"], tools.with_feature_statistics(variables["batch_stats"], statistics, ["inner"]))
    equal(serialization.from_bytes(variables, serialization.to_bytes(new)), jax.tree.map(np.asarray, new))
    Model().apply(new, x)
    layer = jnn.FeatureStandardization()
    alone = tools.with_feature_statistics(layer.init(jax.random.key(0), x), statistics)
    np.testing.assert_allclose(layer.apply(alone, x), (x - whole(x)["mean"]) / np.sqrt(whole(x)["var"]), atol=1e-5)
    with refuses("layers='nothing'", "'inner/inputs'", "'outputs'"):
        tools.with_feature_statistics(variables, statistics, "nothing")
    with refuses("'outputs'", "(3,)", "(1, 3)"):
        tools.with_feature_statistics(variables, statistics, "outputs")
    with refuses("no FeatureStandardization"):
        tools.with_feature_statistics({"params": variables["params"]}, statistics)
    with refuses("no FeatureStandardization"):
        tools.with_feature_statistics({"batch_stats": {"norm": {**jnorm.batch_norm_state(3), "count": jnp.ones(())}}}, statistics)
    with refuses("count", "['mean', 'var']"):
        tools.with_feature_statistics(variables, jnorm.batch_norm_state(3))


def test_into_nnx(rng):
    """A copy; several feature axes lie in one row there."""
    x = rows(rng, (8, 3))
    statistics, model = tools.feature_statistics_of_files(x), NNXModel(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    new = tools.with_feature_statistics(model, statistics, "inner/*")
    equal(jax.tree.map(np.array, nnx.state(model)), before)
    layer = new.inner.layers[0]
    assert layer.mean[...].dtype == np.float32
    np.testing.assert_allclose(layer(x), (x - whole(x)["mean"]) / np.sqrt(whole(x)["var"]), atol=1e-5)
    equal(nnx.state(new.outputs), nnx.state(model.outputs))
    pixels = {k: np.arange(1.0, 5).reshape(2, 2) for k in KEYS}
    new = tools.with_feature_statistics(new, pixels, lambda path: path == "outputs")
    assert new.outputs.var[...].tolist() == [1, 2, 3, 4]
    with refuses("'inner/layers/0'", "(3,)"):
        tools.with_feature_statistics(model, pixels, "inner")
    with refuses("layers='nothing'", "'inner/layers/0'", "'outputs'"):
        tools.with_feature_statistics(model, statistics, "nothing")
    with refuses("no FeatureStandardization"):
        tools.with_feature_statistics(jnx.BatchNorm(3, rngs=nnx.Rngs(0)), statistics)


def test_scikit_learn_has_the_same(rng):
    """An own implementation that skips NaN, fed in parts."""
    from sklearn.preprocessing import StandardScaler

    x = rows(rng, (60, 3), dtype=np.float64)
    x[rng.uniform(size=x.shape) < 0.2] = np.nan
    scaler = StandardScaler()
    for part in np.split(x, 3):
        scaler.partial_fit(part)
    got = tools.feature_statistics_of_files(x, missing="nan", max_bytes=900)
    np.testing.assert_array_equal(got["count"], scaler.n_samples_seen_)
    np.testing.assert_allclose(got["mean"], scaler.mean_, rtol=1e-13)
    np.testing.assert_allclose(got["var"], scaler.var_, rtol=1e-11)
