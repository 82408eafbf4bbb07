"""Programs in which a norm is just within, or just beyond, what folds without a change of the output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jnorm import tools
from test_fold import IMAGE, Fn, Net, chain, check_nnx, close, linen_norm, norm, ready, rngs


def conv(i, o, **options):
    return nnx.Conv(i, o, (2, 2), padding="VALID", rngs=rngs(), **options)


# --- A norm before and a norm after the same layer --------------------------------------------------------------------------


def summed(net, x):
    return net.b(net.conv(net.a(x)).sum((1, 2)))


def padded(net, x):
    return net.b(jnp.pad(net.conv(net.a(x)), ((0, 0), (1, 1), (1, 1), (0, 0))))


def summed_and_added(net, x):
    return net.b(net.conv(net.a(x)).sum((1, 2)) + net.bias[...])


@pytest.mark.parametrize("call", [summed, padded, summed_and_added], ids=["sum", "pad", "sum and bias"])
def test_what_lies_between_a_layer_and_the_second_norm(call, rng, x64):
    """The bias that the first norm brings is scaled as the kernel is."""
    model = ready(Net(call, a=norm(3), conv=conv(3, 4, use_bias=False), b=norm(4), bias=nnx.Param(jnp.ones((1, 4)))), rng)
    check_nnx(model, jnp.asarray(rng.normal(size=IMAGE)), {"a": "conv", "b": "conv"})


# --- What stays ---------------------------------------------------------------------------------------------------------------


def kept(call, *fragments, x=None, **modules):
    """That the norm "n" stays, with a reason that says this."""
    model = Net(call, **{"n": norm(3), **modules})
    model.eval()
    _, report = tools.fold(model, jnp.ones((2, 3)) if x is None else x)
    assert "n" in report.kept and all(f in report.kept["n"] for f in fragments), str(report)


def also_looped(net, x):
    x = net.n(net.layer(x))
    return jax.lax.fori_loop(0, 2, lambda i, x: net.n(jnp.tanh(x)), x)


def also_in_a_branch(net, x):
    x = net.n(net.layer(x))
    return jax.lax.cond(x.sum() > 0, lambda x: net.n(jnp.tanh(x)), lambda x: x, x)


@pytest.mark.parametrize("call, body", [(also_looped, "scan"), (also_in_a_branch, "cond")], ids=["loop", "branch"])
def test_a_norm_that_is_called_in_a_body_too(call, body):
    kept(call, f"in the body of a {body}", layer=nnx.Linear(3, 3, rngs=rngs()))


VALID = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def spread_window(net, x):
    return jax.lax.conv_general_dilated(net.n(x), jnp.broadcast_to(net.kernel[...], (2, 2, 3, 4)), **VALID) + net.bias[...]


def spread_einsum(net, x):
    return jnp.einsum("btc,tco->bo", net.n(x), jnp.broadcast_to(net.kernel[...], (5, 3, 4))) + net.bias[...]


@pytest.mark.parametrize(
    "call, kernel, bias, shape",
    [(spread_window, (1, 1, 3, 4), (1, 1, 1, 4), (2, 6, 6, 3)), (spread_einsum, (1, 3, 4), (1, 4), (2, 5, 3))],
    ids=["window", "einsum"],
)
def test_a_kernel_that_is_spread_along_what_is_summed_over(call, kernel, bias, shape):
    """The sum over the parameter is not the sum over what goes into the product."""
    kept(call, "repeated", x=jnp.ones(shape), kernel=nnx.Param(jnp.ones(kernel)), bias=nnx.Param(jnp.ones(bias)))


def test_a_kernel_whose_axes_of_one_are_added(rng, x64):
    """That is not spread."""

    def call(net, x):
        return jax.lax.conv_general_dilated(net.n(x), net.kernel[...][None, None], **VALID) + net.bias[...]

    model = ready(Net(call, n=norm(3), kernel=nnx.Param(jnp.ones((3, 4))), bias=nnx.Param(jnp.ones((1, 1, 1, 4)))), rng)
    check_nnx(model, jnp.asarray(rng.normal(size=IMAGE)), {"n": ""})


def masked_bias(net, x):
    return net.n(x @ net.layer.kernel[...] + net.layer.bias[...] * net.mask[...])


def masked_bias_after(net, x):
    return net.n(x) @ net.layer.kernel[...] + net.layer.bias[...] * net.mask[...]


@pytest.mark.parametrize("call", [masked_bias, masked_bias_after], ids=["before", "after"])
def test_a_masked_bias(call):
    """What is added to it would be masked too."""
    mask = nnx.BatchStat(jnp.array([[1.0, 0.0, 1.0]]))
    layer = nnx.Linear(3, 3, rngs=rngs())
    layer.bias = nnx.Param(jnp.ones((1, 3)))
    kept(call, "masks its bias", layer=layer, mask=mask)


def whole_kernel(net, x):
    return net.n(x @ net.layer.kernel[...].astype(jnp.int8).astype(jnp.float32))


def whole_data(net, x):
    return net.layer(net.n(x).astype(jnp.int8).astype(jnp.float32))


def whole_output(net, x):
    return net.n(net.layer(x).astype(jnp.int8).astype(jnp.float32))


@pytest.mark.parametrize("call", [whole_kernel, whole_data, whole_output], ids=["kernel", "data", "output"])
def test_rounding_to_integers(call):
    """As in training for quantization: between, numbers are others than those that the fold scales."""
    kept(call, layer=nnx.Linear(3, 3, rngs=rngs()))


def test_other_floating_dtypes_between(rng):
    """They are no obstacle."""

    def call(net, x):
        return net.n((x @ net.layer.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.float16))

    model = Net(call, n=norm(3), layer=nnx.Linear(3, 3, use_bias=False, rngs=rngs()))
    model.eval()
    assert tools.fold(model, jnp.ones((2, 3))).report.folded == {"n": "layer"}


def grouped(net, x):
    kernel = net.kernel[...].reshape(1, 2, 6)
    options = {"window_strides": (1,), "padding": "VALID", "dimension_numbers": ("NHC", "HIO", "NHC")}
    return jax.lax.conv_general_dilated(net.n(x), kernel, **options, feature_group_count=2) + net.bias[...]


def test_a_grouped_convolution_with_a_reshaped_kernel():
    """The outputs, in which the groups lie, are two axes of the parameter."""
    modules = {"kernel": nnx.Param(jnp.ones((1, 2, 3, 2))), "bias": nnx.Param(jnp.ones((1, 1, 6)))}
    kept(grouped, "in groups", x=jnp.ones((2, 5, 4)), n=norm(4), **modules)


def kernel_given_out(net, x):
    return net.n(net.layer(x)), net.layer.kernel[...]


def kernel_stored(net, x):
    net.seen = nnx.Cache(net.layer.kernel[...])
    return net.n(net.layer(x))


@pytest.mark.parametrize("call", [kernel_given_out, kernel_stored], ids=["output", "stored"])
def test_a_parameter_that_is_given_out(call):
    kept(call, "layer/kernel", "more than once", layer=nnx.Linear(3, 3, rngs=rngs()))


def test_a_parameter_that_is_given_out_in_linen():
    def call(x):
        layer = nn.Dense(3, name="layer")
        return linen_norm(name="n")(layer(x)), layer.variables["params"]["kernel"]

    model, x = Fn(call), jnp.ones((2, 3))
    report = tools.fold(model, jax.jit(model.init)(jax.random.key(0), x), x).report
    assert "more than once" in report.kept["n"]


# --- Complex numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("layer", "n"), ("n", "layer")], ids=["before", "after"])
def test_the_new_bias_of_a_complex_norm_is_complex(names, rng, x64):
    """Of a layer with a real kernel too."""
    n = norm(3)
    model = ready(Net(chain(*names), layer=nnx.Linear(3, 3, use_bias=False, rngs=rngs()), n=n), rng)
    n.mean = nnx.BatchStat(jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3)))
    x = jnp.asarray(rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3)))
    with jax.numpy_dtype_promotion("standard"):
        folded, report = tools.fold(model, x)
        got, want = folded(x), model(x)
    assert report.folded == {"n": "layer"} and folded.layer.kernel[...].dtype == jnp.float64
    assert folded.layer.bias[...].dtype == got.dtype == jnp.complex128
    close(got.real, want.real)
    close(got.imag, want.imag)


def test_a_real_bias_has_no_place_for_what_a_complex_norm_adds():
    with jax.numpy_dtype_promotion("standard"):
        layer = nnx.Linear(3, 3, rngs=rngs())
        kept(chain("layer", "n"), "what it adds is complex", "is real", x=jnp.ones((2, 3), jnp.complex64), layer=layer)


def test_a_real_kernel_has_no_place_for_a_complex_scale():
    """As Flax's norms may have."""
    with jax.numpy_dtype_promotion("standard"):
        modules = {"layer": nnx.Linear(3, 3, rngs=rngs()), "n": nnx.BatchNorm(3, param_dtype=jnp.complex64, rngs=rngs())}
        kept(chain("layer", "n"), "its scale is complex", "is real", x=jnp.ones((2, 3), jnp.complex64), **modules)
