"""What of a PyTorch model only looks alike is refused, and what looks otherwise but is alike is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm.tools import convert
from refusals import refuses

torch = pytest.importorskip("torch", reason="PyTorch is an optional test dependency")
RNGS = nnx.Rngs(0)


# --- Norms ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.25, None])
def test_instance_norm_with_running_statistics(momentum, rng):
    source = torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True, momentum=momentum)
    with torch.no_grad():
        source.running_var.copy_(torch.tensor([1.0, 2.0, 3.0]))
        source.weight.copy_(torch.tensor([3.0, 2.0, 1.0]))
    model = convert.load_torch(jnx.TrackedInstanceNorm(3, rngs=RNGS), source)
    assert model.momentum == (0.75 if momentum else 1)
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2))
    for mode in ("train", "eval"):
        getattr(source, mode)(), getattr(model, mode)()
        want = source(theirs).detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(model(x), want, atol=64 * 2**-24)
        np.testing.assert_allclose(model.var[...], source.running_var.numpy(), rtol=16 * 2**-24)
    assert convert.to_torch(model).keys() == source.state_dict().keys()


def test_files_older_than_the_count_of_batches():
    """The count of an exponential average does not follow from it; that of a cumulative one does."""
    state = torch.nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    assert float(convert.load_torch(jnx.BatchNorm(3, momentum=0.75, track_count=True, rngs=RNGS), state).count[...]) == 4
    with refuses("Missing: 'num_batches_tracked'"):
        convert.load_torch(jnx.BatchNorm(3, momentum=None, track_count=True, rngs=RNGS), state)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "LayerNorm", "shape": (3,), "reduction_axes": (0,)}, "reduction_axes=(0,)"),
        ({"kind": "InstanceNorm", "shape": (3,), "reduction_axes": (1,)}, "reduces all of its positions"),
        ({"kind": "GroupNorm", "shape": (4,), "num_groups": 2, "reduction_axes": (1, -1)}, "reduces all of its positions"),
        ({"kind": "InstanceNorm", "shape": (3, 4), "feature_axes": (1, 2)}, "one axis of channels"),
    ],
    ids=["over-batch", "instance", "group", "several"],
)
def test_axes_that_pytorch_does_not_have(options, told):
    with refuses(told):
        convert.as_torch(convert.Norm(**options))


def test_axes_that_pytorch_has():
    for options, name in (
        ({"kind": "LayerNorm", "shape": (3,), "reduction_axes": (0, 1, 2)}, "BatchNorm2d"),
        ({"kind": "InstanceNorm", "shape": (3,), "reduction_axes": (1, 2)}, "InstanceNorm2d"),
        ({"kind": "GroupNorm", "shape": (4,), "num_groups": 2, "reduction_axes": (1, 2, -1)}, "GroupNorm"),
    ):
        assert type(convert.as_torch(convert.Norm(**options))).__name__ == name
    batch = convert.Norm(kind="LayerNorm", shape=(3,), reduction_axes=(0,))
    assert type(convert.as_torch(batch, spatial=0)).__name__ == "BatchNorm1d"
