"""How convolutions go over x, told alike for Flax, PyTorch, Keras and Equinox, and compared."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Pads = tuple[tuple[int, int], ...]
Padding = str | int | Sequence[Any]
_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}


class Convolution(NamedTuple):
    """What a convolution does beside its values; all but the number of groups by axis of positions.

    `pads` are before and after x, or before and after the dilated x of a transposed convolution. Where they depend on the size of x they
    are the name of their rule, "SAME" or "SAME_LOWER".
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int
    pads: Pads | str
    mode: str  # what the padding is: "zeros", "circular", "reflect" or "replicate"


def convolution(
    kernel_size: Sequence[int], strides: Any, dilation: Any, groups: int, padding: Padding, mode: str = "zeros", input_dilation: Any = 1
) -> Convolution:
    """From what any of the libraries says: numbers for all axes or for each, a name of a padding in either case."""
    size = tuple(kernel_size)
    strides, dilation, input_dilation = (_spread(value, len(size)) for value in (strides, dilation, input_dilation))
    pads = _pads(padding, reaches(size, dilation), strides)
    mode = "zeros" if pads == ((0, 0),) * len(size) else mode  # nothing is added
    return Convolution(size, strides, dilation, input_dilation, groups, pads, mode)


def of_flax(module: Any) -> Convolution:
    """Of a Conv or a ConvTranspose of NNX or Linen."""
    size, padding = _spread(module.kernel_size, 1), module.padding
    mode = _MODES.get(padding, "zeros") if isinstance(padding, str) else "zeros"
    if type(module).__name__ == "ConvTranspose":
        strides, dilation = _spread(module.strides, len(size)), _spread(module.kernel_dilation, len(size))
        padding = _transposed(padding, reaches(size, dilation), strides)
    groups, input_dilation = getattr(module, "feature_group_count", 1), getattr(module, "input_dilation", 1)
    return convolution(size, module.strides, module.kernel_dilation, groups, padding, mode, input_dilation)


def differences(here: Convolution, there: Convolution) -> list[str]:
    """What the two do otherwise. Kernels of other sizes are left to the shapes, all of which are told at once."""
    if here.kernel_size != there.kernel_size:
        return []
    keys = ("strides", "dilation", "input_dilation", "groups")
    found = [
        f"{key} is {getattr(here, key)} here, {getattr(there, key)} there" for key in keys if getattr(here, key) != getattr(there, key)
    ]
    if here.mode != there.mode:
        return [*found, f"the padding is {here.mode} here, {there.mode} there"]
    if found or here.pads == there.pads:  # what "SAME" is depends on the others
        return found
    named = isinstance(here.pads, str) or isinstance(there.pads, str)
    why = f", where the name with strides {here.strides} depends on the size of x" if named else ""
    return [f"{_told(here.pads)} here, {_told(there.pads)} there{why}"]


def reaches(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The sizes of a dilated kernel."""
    return [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]


def _told(pads: Pads | str) -> str:
    """As the argument that it is here."""
    return f'padding="{pads}"' if isinstance(pads, str) else f"padding={list(pads)}"


def _spread(value: Any, n: int) -> tuple[int, ...]:
    return (1,) * n if value is None else (value,) * n if isinstance(value, int) else tuple(value)


def _pads(padding: Padding, reaches: list[int], strides: tuple[int, ...]) -> Pads | str:
    if not isinstance(padding, str):
        each = (padding,) * len(reaches) if isinstance(padding, int) else tuple(padding)
        return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in each)
    rule = padding.upper()
    if rule == "VALID":
        return ((0, 0),) * len(reaches)
    if rule == "CAUSAL":
        return tuple((k - 1, 0) for k in reaches)
    if rule.startswith("SAME") and any(s > 1 and k > 1 for k, s in zip(reaches, strides, strict=True)):
        return rule
    smaller_first = tuple(((k - 1) // 2, k // 2) for k in reaches)
    return tuple((high, low) for low, high in smaller_first) if rule == "SAME_LOWER" else smaller_first


def _transposed(padding: Padding, reaches: list[int], strides: tuple[int, ...]) -> Padding:
    """What Flax's names are around the dilated x."""
    each = list(zip(reaches, strides, strict=True))
    if padding == "VALID":
        return tuple((k - 1, s - 1 + max(k - s, 0)) for k, s in each)
    if padding == "SAME":
        totals = [(k + s - 2, k - 1 if s > k - 1 else -(-(k + s - 2) // 2)) for k, s in each]
        return tuple((low, total - low) for total, low in totals)
    return padding
