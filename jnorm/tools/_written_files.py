"""Files that are written some rows at a time, and are complete or not there."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A stream, whose bytes are in the file when all went well; what goes wrong leaves there what was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, row_shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that writes some rows more. How many there were is put in at the end, for which NumPy leaves room."""
    with replacing(path) as stream:
        number = 0

        def head() -> int:
            description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (number, *row_shape)}
            np.lib.format.write_array_header_1_0(stream, description)
            return stream.tell()

        def write(rows: np.ndarray) -> None:
            nonlocal number
            number += len(rows)
            stream.write(np.ascontiguousarray(rows, dtype).reshape(-1).view(np.uint8).data)

        length = head()
        yield write
        stream.seek(0)
        assert head() == length
