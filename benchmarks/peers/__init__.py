"""Everyone that is compared. A peer that is not installed is listed as missing; one that has no such norm is left out of that case."""

import importlib
import importlib.util
from collections.abc import Callable

from ..cases import Case
from .built import Built, Unsupported

__all__ = ["JAX_PEERS", "TORCH_PEERS", "Built", "Unsupported", "build", "chosen", "missing"]

# name -> (module in this package, function there, package that it needs)
JAX_PEERS = {
    "jnorm native": ("ours", "native", "jnorm"),
    "jnorm xla": ("ours", "xla", "jnorm"),
    "flax.linen": ("flax_norms", "linen", "flax"),
    "flax.linen slow variance": ("flax_norms", "linen_slow_variance", "flax"),
    "flax.nnx": ("flax_norms", "nnx_norm", "flax"),
    "haiku": ("haiku_norms", "build", "haiku"),
    "equinox": ("equinox_norms", "build", "equinox"),
    "keras": ("keras_norms", "build", "keras"),
}
TORCH_PEERS = {"torch eager": "eager", "torch compile": "compile"}


def chosen(wanted: list[str]) -> list[str]:
    """Peers whose name begins with one of `wanted`, or all; jnorm is always among them."""
    names = [*JAX_PEERS, *TORCH_PEERS]
    unknown = [w for w in wanted if not any(n.startswith(w) for n in names)]
    if unknown:
        raise ValueError(f"--peers: no peer begins with {', '.join(unknown)}; there are {', '.join(names)}")
    return [n for n in names if not wanted or n.startswith(("jnorm", *wanted))]


def missing(names: list[str]) -> list[str]:
    """Those of `names` whose package is not installed."""
    packages = {name: JAX_PEERS[name][2] if name in JAX_PEERS else "torch" for name in names}
    return [name for name, package in packages.items() if importlib.util.find_spec(package) is None]


def build(name: str, case: Case) -> Built:
    """Raises Unsupported where the peer has no such norm."""
    module, function, _ = JAX_PEERS[name]
    make: Callable[[Case], Built] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return make(case)
