"""The library of native CPU kernels, and which form of the ops is lowered on the CPU: native, or XLA's own code."""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax

from .._jax_internals import register_cpu_target

FORMS = ("native", "xla")
VARIABLE = "JNORM_KERNELS"
_TARGETS = ("moments", "apply", "cotangent_sums", "cotangent_apply", "group_norm", "group_cotangent", "row_norm", "row_cotangent")
HOW_TO_GET = (
    "Install jnorm again where a C++17 compiler (gcc or clang, on Linux or macOS) is found, with "
    "`python -m pip install --verbose --force-reinstall --no-deps`, and read what that prints."
)


class KernelsStatus(NamedTuple):
    """Which form of its ops jnorm lowers on the CPU here, and why."""

    active: str
    """"native" or "xla"."""
    reason: str
    isa: str | None
    """The instruction set of the native kernels, "avx512" for instance, also where they are not active; None: they are missing."""


class _Library(NamedTuple):
    isa: str | None
    missing: str


def _load() -> _Library:
    """Load and register the library that lies beside this file."""
    path = Path(__file__).with_name("libjnorm_cpu" + (".dylib" if sys.platform == "darwin" else ".so"))
    if not path.exists():
        return _Library(None, "the native kernels are not installed")
    try:
        library = ctypes.CDLL(str(path))
        for name in _TARGETS:
            register_cpu_target(f"jnorm_{name}", getattr(library, f"jnorm_{name}"))
        library.jnorm_isa.restype = ctypes.c_char_p
        return _Library(library.jnorm_isa().decode(), "")
    except Exception as e:  # whatever a library of another build, machine or FFI version brings up
        why = f"the native kernels in {path} do not work with this jaxlib: {str(e).strip().splitlines()[0] if str(e).strip() else repr(e)}"
        warnings.warn(f"{why}. jnorm uses XLA's code. {HOW_TO_GET}", RuntimeWarning, stacklevel=2)
        return _Library(None, why)


_library = _load()
# Part of the key of JAX's caches: what was compiled for one choice is not used for another.
_chosen = jax.make_user_context(default_value=None)


def _checked(form: str, source: str) -> str:
    if form not in FORMS:
        raise ValueError(f'{source} must be "native" or "xla", got {form!r}.')
    if form == "native" and _library.isa is None:
        raise RuntimeError(f'{source} asks for "native", but {_library.missing}. {HOW_TO_GET}')
    return form


def _of_environment() -> str | None:
    wanted = os.environ.get(VARIABLE)
    try:
        return _checked(wanted, f"the environment variable {VARIABLE}") if wanted else None
    except (ValueError, RuntimeError) as error:
        # `python -m jnorm`, the report of what is wrong, imports this before a line of its own: the message is its answer.
        if sys.argv[:1] == ["-m"] and "jnorm" in sys.orig_argv:
            sys.exit(str(error))
        raise


_default = _of_environment()


def active() -> str:
    """The form that is lowered on the CPU at this moment."""
    return _chosen.value or _default or ("xla" if _library.isa is None else "native")


def kernels_status() -> KernelsStatus:
    """Which form of its ops jnorm lowers on the CPU: its own native kernels, or XLA's code; and why.

    Args: none.

    Returns:
      A tuple of `active`, "native" or "xla"; `reason`; and `isa`, the instruction set that the native kernels were chosen for, None where
      they are missing.

    Example:
      >>> import jnorm
      >>> with jnorm.kernels("xla"):
      ...     jnorm.kernels_status().active
      'xla'
    """
    if _chosen.value:
        reason = f'chosen by jnorm.kernels("{_chosen.value}")'
    elif _default:
        reason = f"chosen by the environment variable {VARIABLE}"
    else:
        reason = _library.missing or "installed with jnorm, and chosen by default"
    return KernelsStatus(active(), reason, _library.isa)


def kernels(form: str) -> AbstractContextManager[None]:
    """Choose the form of jnorm's ops on the CPU, for what this thread traces and compiles inside the `with` block.

    It acts within `with` alone: as a plain statement it only checks the form. For a whole process set the environment variable
    `JNORM_KERNELS`.

    Args:
      form: "native", jnorm's own kernels, or "xla", XLA's code. `jax.export` needs "xla": a serialized program cannot call into a library.

    Returns:
      A context manager. The choice is part of the key of jit's cache: a jitted function is compiled once for each form it is called under.

    Raises:
      ValueError: form is neither.
      RuntimeError: "native" where the kernels are missing; the message says why, and how to get them.

    Example:
      >>> import jax, jax.numpy as jnp, jnorm
      >>> with jnorm.kernels("xla"):
      ...     exported = jax.export.export(jax.jit(jnorm.layer_norm))(jnp.ones((2, 8)))
      >>> "custom_call" in exported.mlir_module()
      False
    """
    return _choosing(_checked(form, "jnorm.kernels"))


@contextmanager
def _choosing(form: str) -> Iterator[None]:
    with _chosen(form):
        yield
