"""Models of PyTorch, to NNX and Linen and back: equal outputs in float64, where only a wrong layout can differ, and what is refused."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
from jnorm.tools import convert
from refusals import refuses

torch = pytest.importorskip("torch", reason="PyTorch is an optional test dependency")

import torch_models  # noqa: E402

# Numbers of order one, through twenty layers.
ATOL = 1e-11
# Running statistics of order one are float32 here.
STATISTICS = 4 * 2**-24
STANDARD = types.SimpleNamespace(Linear=nnx.Linear)


@pytest.fixture(autouse=True)
def _float64(x64):
    with jax.numpy_dtype_promotion("standard"):
        yield


def images(rng):
    """Of odd sizes all the way: there "SAME" is PyTorch's padding at a stride of 2 too."""
    return rng.normal(size=(4, 9, 9, 3))


def theirs(model, x):
    x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
    with torch.no_grad():
        return model(torch.tensor(x.copy())).numpy()


def resnet(norms=jnx):
    """With PyTorch's padding."""
    model = models.NNXResNet(norms, nnx.Rngs(0), jnp.float64)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            module.padding = module.kernel_size[0] // 2
    return model


def run(model, x):
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, x):
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    y, state = call(state, x)
    nnx.update(model, state)
    return np.asarray(y)


def largest(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def test_resnet(rng):
    """Evaluation, a step of training, evaluation, of the model that came and of the one that went back."""
    source, x = torch_models.trained(torch_models.ResNet().double(), rng), images(rng)
    given = resnet()
    before = jax.tree.map(np.asarray, nnx.state(given))
    model = convert.load_torch(given, source, rename=torch_models.resnet_name)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(given)))
    assert given.norm.running_var_correction == 0
    back = torch_models.ResNet().double()
    back.load_state_dict(convert.to_torch(model, rename=torch_models.resnet_name))
    differences = {}
    for mode in ("eval", "train", "then eval"):
        for one in (model, source, back):
            one.eval() if "eval" in mode else one.train()
        want = theirs(source, x)
        np.testing.assert_array_equal(theirs(back, x), want)
        # Evaluation after a step sees running statistics that were rounded.
        atol = ATOL if mode != "then eval" else 20 * STATISTICS * abs(want).max()
        differences[mode] = largest(run(model, x), want)
        assert differences[mode] < atol, mode
    statistics = {key: a.numpy() for key, a in source.state_dict().items() if "running" in key}
    ours = {key: a.numpy() for key, a in convert.to_torch(model, rename=torch_models.resnet_name).items() if "running" in key}
    assert statistics.keys() == ours.keys()
    differences["statistics"] = max(largest(ours[key], statistics[key]) for key in statistics)
    for key, there in statistics.items():
        np.testing.assert_allclose(ours[key], there, rtol=0, atol=STATISTICS * max(abs(there).max(), 1), err_msg=key)
    print("ResNet-18, largest differences:", differences)
