"""Saving and loading a trained network with orbax, along with what is needed to test it."""

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from digits_apis import init_model
from digits_data import DigitsError
from digits_models import Architecture, Params, State

FORMAT = "jnorm digits 1"


class Checkpoint(NamedTuple):
    arch: Architecture
    data_dir: str | None
    params: Params
    state: State


def check_destination(path: Path) -> None:
    """Refuses, before any training, a path that holds anything but a checkpoint: saving would erase it."""
    if path.exists() and not _is_checkpoint(path) and not (path.is_dir() and not any(path.iterdir())):
        raise DigitsError(f"--checkpoint: {path} exists and is not a checkpoint; saving there would erase it")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, over an older one."""
    metadata = {"format": FORMAT, "data_dir": checkpoint.data_dir, "architecture": dataclasses.asdict(checkpoint.arch)}
    arrays = ocp.args.StandardSave({"params": checkpoint.params, "state": checkpoint.state})
    with _checkpointer() as checkpointer:
        checkpointer.save(path.resolve(), args=ocp.args.Composite(arrays=arrays, metadata=ocp.args.JsonSave(metadata)), force=True)


def load_checkpoint(path: Path, sharding: jax.sharding.Sharding | None = None) -> Checkpoint:
    """Reads a checkpoint, wherever it was written, onto the devices of `sharding`: the first one of this process where it is None."""
    if not path.exists():
        raise DigitsError(f"there is no checkpoint at {path}: train first, or give its place with --checkpoint")
    if not _is_checkpoint(path):
        raise DigitsError(f"{path} is not a checkpoint")
    try:
        with _checkpointer() as checkpointer:
            metadata = checkpointer.restore(path.resolve(), args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            fields = metadata["architecture"]
            arch = Architecture(**{**fields, "image_shape": tuple(fields["image_shape"])})
            # The expected shapes, without computing anything: a checkpoint of another network does not pass.
            params, state = jax.eval_shape(lambda: init_model(arch, jax.random.key(0)))
            # Said for each array: else Orbax looks for the devices that it was written from, which may not be there.
            there = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            params, state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), (params, state))
            expected = ocp.args.StandardRestore({"params": params, "state": state})
            arrays = checkpointer.restore(path.resolve(), args=ocp.args.Composite(arrays=expected)).arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DigitsError(f"the checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(arch, metadata["data_dir"], arrays["params"], arrays["state"])


def _is_checkpoint(path: Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").is_file()


def _checkpointer() -> ocp.Checkpointer:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports each of its steps
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
