"""`python -m jnorm`: what is installed, on which devices it runs, and which kernels are active: what a report of an error should have."""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import warnings
from typing import Any

import jax

from . import __version__
from ._kernels._library import HOW_TO_GET, VARIABLE, kernels_status

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# What changes which devices there are and how they compute. Only those that are set are shown.
VARIABLES = (VARIABLE, "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")


def report() -> dict[str, Any]:
    """All of it, in plain values."""
    devices, error = _devices()
    return {
        "versions": {"jnorm": __version__, "python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} processors",
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "platform": devices[0].platform if devices else None,
        "devices": [{"id": d.id, "platform": d.platform, "kind": d.device_kind, "process": d.process_index} for d in devices],
        "devices_error": error,
        "kernels": _kernels(devices[0].platform if devices else None),
    }


def _version(name: str) -> str | None:
    """Of a package; None: it is not installed. A broken one says how."""
    try:
        module = importlib.import_module(name)
    except Exception as e:  # whatever a package brings up that does not go with another
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{importlib.metadata.version(name)}, which cannot be imported: {_line(e)}"
        return None if isinstance(e, ModuleNotFoundError) and e.name == name else f"which cannot be imported: {_line(e)}"
    return str(getattr(module, "__version__", None) or importlib.metadata.version(name))


def _devices() -> tuple[list[Any], str | None]:
    try:
        return jax.devices(), None
    except Exception as e:  # a platform that was asked for and is not there, or a driver that does not start
        asked = os.environ.get("JAX_PLATFORMS")
        why = _line(e) if str(e).strip() else f"JAX cannot start the platform ({type(e).__name__}, without a word why)"
        return [], why + (f" (JAX_PLATFORMS={asked} asks for that; unset it, and JAX takes what there is.)" if asked else "")


def _line(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _kernels(where: str | None) -> dict[str, Any]:
    """The status, and in words what it means here and what to do."""
    status = kernels_status()
    if status.active == "native":
        words = "On the CPU jnorm computes with its native kernels."
        fix = None
    else:
        words = "On the CPU jnorm computes with XLA's code: same answers up to rounding, more passes over memory."
        fix = HOW_TO_GET if status.isa is None else f"Unset {VARIABLE}, or set it to native."
    if where not in ("cpu", None):
        words += f" On {where}, the default platform here, it always computes with XLA's code, which is compiled for the device."
    return {**status._asdict(), "meaning": words, "fix": fix}


def _text(found: dict[str, Any]) -> str:
    kernels, devices = found["kernels"], found["devices"]
    lines = [f"{name:10}{version or 'not installed'}" for name, version in found["versions"].items()]
    lines += [f"{'system':10}{found['system']}"]
    lines += [f"{'set':10}{name}={value}" for name, value in found["environment"].items()]
    lines += ["", f"{'platform':10}{found['platform'] or 'none'}"]
    if found["devices_error"]:
        lines += [f"{'devices':10}none: {found['devices_error']}"]
    for kind in dict.fromkeys((d["platform"], d["kind"]) for d in devices):
        number = sum((d["platform"], d["kind"]) == kind for d in devices)
        lines += [f"{'devices':10}{number} × {kind[1]}" + ("" if kind[0] == kind[1] else f" ({kind[0]})")]
    if processes := {d["process"] for d in devices} - {0}:
        lines += [f"{'processes':10}{len(processes) + 1}"]
    lines += ["", f"{'kernels':10}{kernels['active']}: {kernels['reason']}"]
    isa = kernels["isa"] or "none: the native kernels are missing"
    lines += [f"{'isa':10}{isa}" + (", of the native kernels, which are not used" if kernels["isa"] and kernels["active"] == "xla" else "")]
    lines += [kernels["meaning"]]
    return "\n".join(lines + ([f"To change that: {kernels['fix']}"] if kernels["fix"] else []))


def main(arguments: list[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(prog="python -m jnorm", description="What is installed, the devices, and which kernels are active.")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    asked = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are looked at only
        found = report()
    print(json.dumps(found, indent=2) if asked.json else _text(found))


if __name__ == "__main__":
    main()
