"""PyTorch's norms, one at a time: outputs in training and evaluation and running statistics are PyTorch's own, there and back."""

import jax.numpy as jnp
import numpy as np
import pytest

import jnorm
from jnorm.tools import convert

torch = pytest.importorskip("torch", reason="PyTorch is an optional test dependency")

# float32 sums of at most 60 numbers of order ten, in two orders: 60 roundings are far more than either makes.
ATOL = 60 * 10 * 2**-24
SHAPES = {1: (4, 5, 6), 2: (4, 3, 2, 6), 3: (2, 2, 3, 2, 6), 0: (7, 6)}
LAST = {"LayerNorm", "RMSNorm"}
DIMS = {"BatchNorm1d": 1, "BatchNorm2d": 2, "BatchNorm3d": 3, "InstanceNorm1d": 1, "InstanceNorm2d": 2, "InstanceNorm3d": 3}

CASES = {
    "BatchNorm1d": (0, "BatchNorm1d", (6,), {}),
    "BatchNorm1d-sequence": (1, "BatchNorm1d", (6,), {"eps": 1e-2}),
    "BatchNorm2d": (2, "BatchNorm2d", (6,), {"momentum": 0.3}),
    "BatchNorm2d-cumulative": (2, "BatchNorm2d", (6,), {"momentum": None}),
    "BatchNorm2d-plain": (2, "BatchNorm2d", (6,), {"affine": False, "momentum": 0.0}),
    "BatchNorm2d-untracked": (2, "BatchNorm2d", (6,), {"track_running_stats": False}),
    "BatchNorm3d": (3, "BatchNorm3d", (6,), {}),
    "InstanceNorm1d": (1, "InstanceNorm1d", (6,), {}),
    "InstanceNorm2d-affine": (2, "InstanceNorm2d", (6,), {"affine": True, "eps": 1e-2}),
    "InstanceNorm2d-tracked": (2, "InstanceNorm2d", (6,), {"affine": True, "track_running_stats": True, "momentum": 0.3}),
    "InstanceNorm2d-still": (2, "InstanceNorm2d", (6,), {"track_running_stats": True, "momentum": None}),
    "InstanceNorm3d-tracked": (3, "InstanceNorm3d", (6,), {"track_running_stats": True}),
    "GroupNorm": (2, "GroupNorm", (3, 6), {"eps": 1e-2}),
    "GroupNorm-plain": (1, "GroupNorm", (2, 6), {"affine": False}),
    "LayerNorm": (2, "LayerNorm", (6,), {}),
    "LayerNorm-axes": (2, "LayerNorm", ((2, 6),), {}),
    "LayerNorm-scale": (1, "LayerNorm", (6,), {"bias": False}),
    "LayerNorm-plain": (1, "LayerNorm", ((5, 6),), {"elementwise_affine": False}),
    "RMSNorm": (1, "RMSNorm", (6,), {}),
    "RMSNorm-axes": (2, "RMSNorm", ((2, 6),), {"eps": 1e-3}),
}


def made(name, rng, dtype=torch.float32):
    """-> a module with values as a training leaves them, and the number of spatial axes."""
    spatial, kind, args, options = CASES[name]
    module = getattr(torch.nn, kind)(*args, **options)
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key == "num_batches_tracked":
                tensor.fill_(3)
            else:
                low, high = (0.5, 1.5) if "var" in key else (-1, 1)
                tensor.copy_(torch.tensor(rng.uniform(low, high, tensor.shape)))
    return module.to(dtype), spatial


def batch(rng, spatial):
    """Channels last. Few values are near the mean of many, so that no variance is small."""
    return (rng.normal(size=SHAPES[spatial]) * 2 + 1).astype(np.float32)


def run_torch(module, x, channels_second):
    x = np.moveaxis(x, -1, 1) if channels_second else x
    y = module(torch.tensor(x.copy())).detach().numpy()
    return np.moveaxis(y, 1, -1) if channels_second else y


def check_statistics(module, norm):
    for key in ("mean", "var"):
        if (there := getattr(module, f"running_{key}", None)) is not None:
            np.testing.assert_allclose(getattr(norm, key)[...], there.numpy(), rtol=0, atol=ATOL, err_msg=key)
    if getattr(norm, "count", None) is not None:
        assert float(norm.count[...]) == float(module.num_batches_tracked)


SLOW = {
    "BatchNorm1d-sequence",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm3d-tracked",
    "GroupNorm-plain",
    "LayerNorm",
    "LayerNorm-plain",
    "RMSNorm",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_the_norm_does_what_pytorchs_does(name, rng):
    """Two steps of training and evaluation, of the NNX module, the Linen one, the function, and of PyTorch's again after the way back."""
    module, spatial = made(name, rng)
    second = type(module).__name__ not in LAST
    norm = convert.of_torch(module)
    ours = norm.to_nnx()
    for mode in ("train", "train", "eval"):
        x = batch(rng, spatial)
        getattr(module, mode)(), getattr(ours, mode)()
        now = convert.of_nnx(ours, norm.shape)
        back = getattr(convert.as_torch(now, spatial + 2), mode)()
        linen, variables = now.to_linen()
        options = {"use_running_average": mode == "eval"} if norm.runs else {}
        want = run_torch(module, x, second)
        np.testing.assert_allclose(ours(x), want, rtol=0, atol=ATOL, err_msg=mode)
        np.testing.assert_allclose(run_torch(back, x, second), want, rtol=0, atol=ATOL, err_msg="back")
        np.testing.assert_allclose(linen.apply(variables, x, mutable=True, **options)[0], want, rtol=0, atol=ATOL, err_msg="linen")
        called = getattr(jnorm, now.function)(
            jnp.asarray(x), *([now.state()] if norm.runs else []), **now.params(), **now.options(), **options
        )
        np.testing.assert_allclose(called[0] if norm.runs else called, want, rtol=0, atol=ATOL, err_msg="function")
        check_statistics(module, ours)
        check_statistics(back, ours)


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm2d-untracked", "InstanceNorm2d-tracked", "GroupNorm"])
def test_channels_second(name, rng):
    """The norm in PyTorch's own layout."""
    module, spatial = made(name, rng)
    norm = convert.of_torch(module, channels_last=False)
    ours, x = norm.to_nnx(), np.moveaxis(batch(rng, spatial), -1, 1)
    np.testing.assert_allclose(ours(x), module(torch.tensor(x.copy())).detach().numpy(), rtol=0, atol=ATOL)
    check_statistics(module, ours)


def test_synchronized(rng):
    """Which a CPU evaluates only."""
    module = torch.nn.SyncBatchNorm(6, eps=1e-2, momentum=0.25)
    module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 1.5)
    norm, x = convert.of_torch(module), batch(rng, 2)
    assert (norm.kind, norm.momentum, norm.running_var_correction) == ("BatchNorm", 0.75, 1)
    ours = norm.to_nnx()
    ours.eval()
    np.testing.assert_allclose(ours(x), run_torch(module.eval(), x, True), rtol=0, atol=ATOL)
