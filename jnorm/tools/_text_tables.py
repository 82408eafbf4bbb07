"""Lines of numbers, as of .csv files, and what an error says of those that are none."""

import contextlib
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SEPARATORS = (",", ";", "\t", "|")


class Line(NamedTuple):
    number: int
    """In the file, from 1."""
    text: str


def lines_of(path: Path) -> Iterator[Line]:
    """Those that are not empty, nor a comment alone."""
    with path.open(encoding="utf-8-sig", newline=None) as stream:
        for number, text in enumerate(stream, 1):
            if text.partition("#")[0].strip():
                yield Line(number, text)


def columns_of(first: Sequence[Line], delimiter: str, header: bool) -> int:
    """By the first line of numbers; the second tells whether that one is of names."""
    fields = _fields(first[0], delimiter)
    if not header and not any(map(_is_number, fields)) and all(map(_is_number, _fields(first[-1], delimiter))):
        raise ValueError(
            f"line {first[0].number} has names in place of numbers, {first[0].text.strip()[:60]!r}; csv_header=True leaves it out."
        )
    return numbers_of(first[:1], delimiter, len(fields)).shape[1]


def numbers_of(lines: Sequence[Line], delimiter: str, columns: int) -> np.ndarray:
    text = [line.text for line in lines]
    try:
        try:
            block = np.loadtxt(text, delimiter=delimiter, ndmin=2, quotechar='"')
        except ValueError:  # slower, and knows that an empty field is a missing value
            block = np.loadtxt(text, delimiter=delimiter, ndmin=2, quotechar='"', converters=_number)
        if block.shape[1] != columns:
            raise ValueError(f"{block.shape[1]} columns, where the first of the numbers has {columns}.")
        return block
    except ValueError as error:
        raise ValueError(_trouble(lines, delimiter, columns) or f"lines {lines[0].number} to {lines[-1].number}: {error}") from error


def _trouble(lines: Sequence[Line], delimiter: str, columns: int) -> str | None:
    """The first field that is no number, or line of another length."""
    for line in lines:
        fields = _fields(line, delimiter)
        for column, field in enumerate(fields, 1):
            if not _is_number(field):
                what = f"line {line.number} has {field[:60]!r} in place of a number, in column {column}"
                return f"{what}; {_cure(field, delimiter)}."
        if len(fields) != columns:
            return f"line {line.number} has {len(fields)} columns, the first of the numbers has {columns}."
    return None


def _cure(field: str, delimiter: str) -> str:
    for other in _SEPARATORS:
        if other in field and other != delimiter:
            return f"columns must be separated by {delimiter!r}, as of a {'.tsv' if delimiter == chr(9) else '.csv'} file, not by {other!r}"
    return "a missing value is an empty field, or nan"


def _fields(line: Line, delimiter: str) -> list[str]:
    text = line.text.partition("#")[0].rstrip("\r\n")
    try:
        return next(csv.reader([text], delimiter=delimiter))
    except csv.Error:  # it is longer than the reader takes
        return text.split(delimiter)


def _is_number(field: str) -> bool:
    with contextlib.suppress(ValueError):
        _number(field)
        return True
    return False


def _number(field: str) -> float:
    return float(field) if field.strip() else math.nan
