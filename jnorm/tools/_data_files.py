"""Arrays in files, read some rows at a time, so that no file has to fit in memory."""

import contextlib
import glob
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._text_tables import columns_of, lines_of, numbers_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".npy", ".npz", *DELIMITERS)
Members = str | Sequence[str] | None
_PIECE = 1 << 18  # bytes: what is read at once, which an archive holds twice while it decompresses


class Rows(NamedTuple):
    """Some rows, and how many bytes of the file they were."""

    values: np.ndarray
    size: int


class Part(NamedTuple):
    """One array: a file, a member of an archive, or what was given as an array."""

    name: str
    """What an error calls it."""
    path: Path | None
    member: str | None
    """Of an archive."""
    shape: tuple[int, ...]
    """Of a table of text the number of rows, the first, is -1: not known."""
    dtype: np.dtype
    row_bytes: int
    """What reading holds of a row."""
    size: int
    read: Callable[[int], Iterator[Rows]]
    """In blocks of so many rows."""

    @property
    def stem(self) -> str:
        """Of the name of what is written for it."""
        assert self.path is not None
        return self.path.stem + ("" if self.member is None else "-" + self.member.replace("/", "-"))


def parts_of(sources: Any, members: Members, csv_header: bool) -> Iterator[Part]:
    """The arrays that are meant by a path, a folder, a pattern, an array, or an iterable of these."""
    if isinstance(sources, str | os.PathLike):
        files = _files(Path(sources))
        _check_used({file.suffix.lower() for file in files}, f"{sources}", members, csv_header)
        for path in files:
            yield from _parts_of_file(path, members, csv_header)
    elif hasattr(sources, "__array__"):
        _check_used(set(), "an array", members, csv_header)
        yield _of_array(sources, "the array")
    elif isinstance(sources, Iterable) and not isinstance(sources, Mapping):
        for number, source in enumerate(sources):
            if hasattr(source, "__array__"):
                yield _of_array(source, f"array {number}")
            elif isinstance(source, str | os.PathLike):
                for path in _files(Path(source)):
                    yield from _parts_of_file(path, members, csv_header)
            else:
                fix = "; give rows of numbers as one np.array" if isinstance(source, list | tuple | int | float) else ""
                raise TypeError(f"sources[{number}] must be a path or an array, got {type(source).__name__}{fix}.")
    else:
        raise TypeError(f"sources must be a path, a pattern, an array, or an iterable of these, got {type(sources).__name__}.")


def _check_used(suffixes: set[str], where: str, members: Members, csv_header: bool) -> None:
    """Not of lists, which may be the share of a process."""
    if members is not None and ".npz" not in suffixes:
        raise ValueError(f"members={members!r} is for .npz archives, and there is none in {where}.")
    if csv_header and not suffixes & set(DELIMITERS):
        raise ValueError(f"csv_header=True is for tables of text, .csv or .tsv, and there is none in {where}.")


def _files(path: Path) -> list[Path]:
    path = path.expanduser()
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith("."))
        if not found:
            raise ValueError(f"there is no data in the folder {path}: no file that ends with one of {known}.")
        return found
    if not path.exists() and glob.has_magic(str(path)):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise ValueError(f"no file matches the pattern {path}.")
    elif path.exists():
        found = [path]
    else:
        raise FileNotFoundError(f"there is no file or folder {path}.")
    for file in found:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{file} is of an unknown kind: the files that are read end with one of {known}.")
    return found


def _parts_of_file(path: Path, members: Members, csv_header: bool) -> Iterator[Part]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        yield _of_npy(str(path), path, None, lambda: path.open("rb"), lambda: np.load(path, mmap_mode="r"))
    elif suffix == ".npz":
        for member in _members(path, members):
            yield _of_npy(f"{path}[{member!r}]", path, member, lambda member=member: _open_member(path, member))
    else:
        yield _of_table(path, DELIMITERS[suffix], csv_header)


@contextlib.contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Says which file it was that could not be read."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{name} cannot be read: {str(e) or type(e).__name__}") from e


def _part(
    name: str, path: Path | None, member: str | None, shape: tuple[int, ...], dtype: Any, row_bytes: int, size: int, read: Any
) -> Part:
    dtype = np.dtype(dtype)
    if dtype.kind not in "biu" and not jnp.issubdtype(dtype, np.floating):
        fix = " NumPy keeps no bfloat16 in files: save it as float32." if dtype.kind == "V" else ""
        fix = " Standardize the real and imaginary parts as two features." if dtype.kind == "c" else fix
        raise TypeError(f"{name} must be of real numbers, got dtype {dtype}.{fix}")
    if not shape:
        raise ValueError(f"{name} is one number, without an axis of examples.")
    if 0 in shape:
        raise ValueError(f"{name} is empty: its shape is {shape}.")
    return Part(name, path, member, shape, dtype, row_bytes, size, read)


# --- Arrays ---------------------------------------------------------------------------------------------------------------------


def _of_array(array: Any, name: str) -> Part:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f'{name} is a masked one, whose mask is not looked at: give .filled(np.nan) of it, with missing="nan".')
    array = np.asarray(array)

    def read(number: int) -> Iterator[Rows]:
        for at in range(0, len(array), number):
            rows = array[at : at + number]
            yield Rows(rows, rows.nbytes)

    return _part(name, None, None, array.shape, array.dtype, 0, array.nbytes, read)


# --- NumPy's files --------------------------------------------------------------------------------------------------------------


def _members(path: Path, members: Members) -> list[str]:
    with reading(path), zipfile.ZipFile(path) as archive:
        there = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    asked = there if members is None else [members] if isinstance(members, str) else list(members)
    missing = [name for name in asked if name not in there]
    if missing or not asked:
        raise ValueError(f"{path} has the members {there}, got members={members!r}.")
    return asked


@contextlib.contextmanager
def _open_member(path: Path, member: str) -> Iterator[Any]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as stream:
        yield stream


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Its shape, whether in Fortran's order, and its dtype."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"it is in version {version} of NumPy's format, which is for arrays with fields.")


def _of_npy(name: str, path: Path, member: str | None, opened: Callable[[], Any], mapped: Callable[[], Any] | None = None) -> Part:
    with reading(name), opened() as stream:
        shape, fortran, dtype = _header(stream)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def read(number: int) -> Iterator[Rows]:
        sizes = [min(number, shape[0] - at) for at in range(0, shape[0], number)]
        with reading(name):
            blocks = _columns_first(mapped, opened, shape, dtype, sizes) if fortran else _streamed(opened, shape, dtype, sizes)
            for block in blocks:
                yield Rows(block, block.nbytes)

    return _part(name, path, member, shape, dtype, row_bytes, row_bytes * math.prod(shape[:1]), read)


def _streamed(opened: Callable[[], Any], shape: tuple[int, ...], dtype: np.dtype, sizes: list[int]) -> Iterator[np.ndarray]:
    """Not by a map of the file in memory, whose pages would count as memory of the process."""
    with opened() as stream:
        _header(stream)
        for size in sizes:
            yield _filled(np.empty((size, *shape[1:]), dtype), stream)


def _filled(block: np.ndarray, stream: Any) -> np.ndarray:
    buffer, at = block.reshape(-1, order="A").view(np.uint8).data, 0
    while at < len(buffer):
        number = stream.readinto(buffer[at : at + _PIECE])
        if not number:
            raise EOFError("it ends before its last row, as a file does whose writing was interrupted.")
        at += number
    return block


def _columns_first(
    mapped: Callable[[], Any] | None, opened: Callable[[], Any], shape: tuple[int, ...], dtype: np.dtype, sizes: list[int]
) -> Iterator[np.ndarray]:
    """In Fortran's order a row lies all over the file."""
    if mapped is not None:
        whole = mapped()
    elif len(sizes) == 1:
        with opened() as stream:
            _header(stream)
            whole = _filled(np.empty(shape, dtype, order="F"), stream)
    else:
        raise ValueError(
            "it is in Fortran's order within an archive, where no rows can be read alone, and larger than max_bytes allows; "
            "save it with np.ascontiguousarray, or as .npy."
        )
    for at, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        yield np.array(whole[at : at + size])


# --- Tables of text -------------------------------------------------------------------------------------------------------------


def _of_table(path: Path, delimiter: str, header: bool) -> Part:
    with reading(path):
        first = list(itertools.islice(lines_of(path), int(header), int(header) + 2))
        if not first:
            raise ValueError(f"it is empty, without a line of numbers{' after that of the names' if header else ''}.")
        columns = columns_of(first, delimiter, header)

    def read(number: int) -> Iterator[Rows]:
        with reading(path):
            left = itertools.islice(lines_of(path), int(header), None)
            while some := list(itertools.islice(left, number)):
                yield Rows(numbers_of(some, delimiter, columns), sum(len(line.text) for line in some))

    # A line is held as a string, with what Python adds to one, while its numbers are made.
    row_bytes = 2 * columns * 8 + 2 * len(first[0].text) + 300
    return _part(str(path), path, None, (-1, columns), np.float64, row_bytes, path.stat().st_size, read)
