"""What of a PyTorch model only looks alike is refused, and what looks otherwise but is alike is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

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
    model = convert.load(jnx.TrackedInstanceNorm(3, rngs=RNGS), source)
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
    assert float(convert.load(jnx.BatchNorm(3, momentum=0.75, track_count=True, rngs=RNGS), state).count[...]) == 4
    with refuses("Missing: 'num_batches_tracked'"):
        convert.load(jnx.BatchNorm(3, momentum=None, track_count=True, rngs=RNGS), state)


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
    assert type(convert.as_torch(batch, ndim=2)).__name__ == "BatchNorm1d"


ATTENTION = nnx.MultiHeadAttention(2, 8, decode=False, rngs=RNGS)
CONV = torch.nn.Conv2d(3, 3, 3)
NEGATIVE_AXES = jnx.LayerNorm(4, reduction_axes=-2, feature_axes=-2, rngs=RNGS)


@pytest.mark.parametrize(
    ("model", "source", "told"),
    [
        (ATTENTION, torch.nn.MultiheadAttention(8, 4), "num_heads is 2 here, 4 there"),
        (ATTENTION, torch.nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn=True there"),
        (ATTENTION, torch.nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv=True there"),
        (nnx.MultiHeadAttention(2, 8, decode=False, normalize_qk=True, rngs=RNGS), {}, "normalize_qk=True"),
        (nnx.Conv(3, 3, (3, 3), padding="VALID", input_dilation=2, rngs=RNGS), CONV, "input_dilation is (2, 2) here, (1, 1) there"),
        (
            nnx.Conv(3, 3, (3, 3), padding="CIRCULAR", rngs=RNGS),
            torch.nn.Conv2d(3, 3, 3, padding=2, padding_mode="circular"),
            "padding=[(1, 1), (1, 1)] here, padding=[(2, 2), (2, 2)] there",
        ),
        (nnx.Conv(3, 3, (3, 3), rngs=RNGS), torch.nn.ConvTranspose2d(3, 3, 3), "Conv here, ConvTranspose2d there"),
        (nnx.ConvTranspose(3, 3, (3, 3), rngs=RNGS), CONV, "ConvTranspose here, Conv2d there"),
        (nnx.Embed(5, 3, rngs=RNGS), torch.nn.Linear(3, 5, bias=False), "Embed here, Linear there"),
        (nnx.Linear(5, 3, use_bias=False, rngs=RNGS), torch.nn.Embedding(3, 5), "Linear here, Embedding there"),
        (jnx.LayerNorm(4, reduction_axes=(1, 2), rngs=RNGS), torch.nn.LayerNorm(4), "reduction_axes is (1, 2) here, (-1,) there"),
        (NEGATIVE_AXES, torch.nn.LayerNorm(4), "reduction_axes is (-2,) here, (-1,) there"),
    ],
    ids=[
        *("heads", "zero", "bias", "normalized", "dilation", "circular", "transposed", "plain", "embedding", "dense"),
        *("axes", "negative axes"),
    ],
)
def test_layers_that_only_look_alike(model, source, told):
    with refuses(told):
        convert.load(model, source)


def test_a_circular_convolution():
    source = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    model = convert.load(nnx.Conv(3, 3, (3, 3), padding="CIRCULAR", rngs=RNGS), source)
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 3)).astype(np.float32)
    want = source(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model(x), want, atol=64 * 2**-24)


def test_stacked_layers():
    """Three layers in one, as loops have them: there is no PyTorch module of which that would be the state."""
    stack = nnx.List([nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0)(nnx.Rngs(0).split(3))])
    with refuses("0 (several Linear stacked: kernel has the shape (3, 4, 4))"):
        convert.to_torch(stack)
    norms = nnx.vmap(lambda rngs: jnx.BatchNorm(4, rngs=rngs), in_axes=0)(nnx.Rngs(0).split(3))
    with refuses("the model itself (several BatchNorm stacked: scale has the shape (3, 4))"):
        convert.to_torch(norms)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3, name="dense")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="blocks")(x, None)[0]

    model, x = Model(), jnp.ones((1, 3))
    with refuses("blocks/dense (several Dense stacked: kernel has the shape (2, 3, 3))"):
        convert.to_torch_linen(model, jax.eval_shape(model.init, jax.random.key(0), x), x)


def test_attention_of_linen_by_itself(rng):
    """With keys and values of other sizes, and as the whole model."""
    with jax.numpy_dtype_promotion("standard"):
        model = nn.MultiHeadDotProductAttention(2)
        q, k, v = (jnp.asarray(rng.normal(size=(1, 3, size)), jnp.float32) for size in (4, 6, 8))
        for arguments, sizes in (((q, k, v), {"kdim": 6, "vdim": 8}), ((q, q, q), {})):
            source = torch.nn.MultiheadAttention(4, 2, batch_first=True, **sizes)
            given = jax.eval_shape(model.init, jax.random.key(0), *arguments)
            variables = convert.load_linen(model, given, source, *arguments)
            with torch.no_grad():
                want = source(*(torch.tensor(np.asarray(a)) for a in arguments))[0].numpy()
            np.testing.assert_allclose(model.apply(variables, *arguments), want, atol=64 * 2**-24)
            assert convert.to_torch_linen(model, variables, *arguments).keys() == source.state_dict().keys()


# --- Names, orders, parts ---------------------------------------------------------------------------------------------------------------


def pair_of(rngs):
    """Attributes whose alphabetical order is not that of their definition."""
    return nnx.Dict(stem=nnx.Linear(3, 3, rngs=rngs), head=nnx.Linear(3, 3, rngs=rngs))


def test_the_order_of_an_abstract_model():
    source = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    with refuses('match="order" needs a model that is initialized'):
        convert.load(nnx.eval_shape(lambda: pair_of(nnx.Rngs(0))), source, match="order")
    model = convert.load(pair_of(RNGS), source, match="order")
    np.testing.assert_array_equal(model["stem"].bias[...], source[0].bias.detach().numpy())


def test_the_order_of_a_part():
    """Of the model, the source being whole or not; of the source."""
    model, state = pair_of(RNGS), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).state_dict()
    only_head = convert.load(model, state, match="order", layers="head")
    np.testing.assert_array_equal(only_head["head"].bias[...], state["1.bias"].numpy())
    np.testing.assert_array_equal(only_head["stem"].bias[...], model["stem"].bias[...])
    more = {**state, "fc.weight": torch.ones(7, 3), "fc.bias": torch.ones(7)}
    whole = convert.load(model, more, match="order", ignore=["fc.*"])
    np.testing.assert_array_equal(whole["head"].bias[...], state["1.bias"].numpy())
    part = convert.load(model, more, match="order", ignore=["fc", "1"], layers="stem")
    np.testing.assert_array_equal(part["stem"].bias[...], state["0.bias"].numpy())


@pytest.mark.parametrize("ignore", ["fc", "fc.*", ["fc."], ("fc.weight", "fc.bias")])
def test_what_is_ignored(ignore):
    state = {**torch.nn.Linear(3, 3).state_dict(), "fc.weight": torch.ones(7, 3), "fc.bias": torch.ones(7)}
    convert.load(nnx.Linear(3, 3, rngs=RNGS), state, ignore=ignore)
    with refuses("ignore='f' matches none of the keys"):
        convert.load(nnx.Linear(3, 3, rngs=RNGS), state, ignore="f")
    with refuses("flattened='fc' matches none of the layers"):
        convert.load(nnx.Linear(3, 3, rngs=RNGS), state, ignore=ignore, flattened={"fc": (3, 1, 1)})


def test_two_layers_of_one_name():
    model, rename = pair_of(RNGS), {"stem|head": "fc"}
    for call in (lambda: convert.to_torch(model, rename=rename), lambda: convert.load(model, {}, rename=rename)):
        with refuses("stem and head are both called 'fc.weight' there"):
            call()
    assert convert.to_torch(model, rename=rename, layers="head").keys() == {"fc.weight", "fc.bias"}


def test_abstract_models_are_whole_or_refused():
    source, make = torch.nn.Sequential(torch.nn.Linear(3, 3)), lambda: nnx.Dict(a=nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    abstract = nnx.eval_shape(lambda: nnx.Dict(a=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    with refuses("the model is abstract, and the source has no values for drop/rngs/count", "initialized"):
        convert.load(abstract, source, rename={"a": "0"})
    abstract["drop"].rngs = nnx.Rngs(0)
    convert.load(abstract, source, rename={"a": "0"})
    with refuses("no values for b/bias, b/kernel"):
        convert.load(nnx.eval_shape(lambda: nnx.Dict(a=make()["a"], b=make()["a"])), source, rename={"a": "0"}, layers="a")


def test_flags_of_a_call():
    """By position too they are what they are, not traced."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, scale, train):
            return nn.Dense(3)(x) * (scale if train else 1)

    model, x = Model(), jnp.ones((1, 3))
    variables = model.init(jax.random.key(0), x, 2.0, False)
    assert convert.to_torch_linen(model, variables, x, 2.0, False).keys() == {"Dense_0.weight", "Dense_0.bias"}


def test_what_a_call_does_not_use():
    """Without its layer nothing says in which layout a kernel is there."""

    class Model(nn.Module):
        def setup(self):
            self.one, self.other = nn.Dense(3), nn.Dense(3)

        def __call__(self, x):
            return self.one(x)

        def both(self, x):
            return self.other(self.one(x))

    model, x = Model(), jnp.ones((1, 3))
    variables = model.init(jax.random.key(0), x, method="both")
    with refuses("other/kernel (of a layer that the call does not use)"):
        convert.to_torch_linen(model, variables, x)


def test_variables_of_a_whole_model():
    model, x = nn.Sequential([nn.Dense(3), nn.LayerNorm()]), jnp.ones((1, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    with refuses("LayerNorm has use_scale=True, but its own variables", "layers_0"):
        convert.of_linen(model.layers[1], variables)
    assert convert.of_linen(model.layers[1], {"params": variables["params"]["layers_1"]}).shape == (3,)


def test_what_is_given_in_place_of_something_else():
    state, model = torch.nn.Linear(3, 3).state_dict(), nnx.Linear(3, 3, rngs=RNGS)
    with refuses("pass source['state_dict']"):
        convert.load(model, {"epoch": 3, "state_dict": state})
    with refuses("Dense is a module of Linen", "load_linen", kind=TypeError):
        convert.load(nn.Dense(3), state)  # pyright: ignore[reportArgumentType]
    with refuses("Missing: 'weight' (of the model itself", "no rule for the parametrizations of", "remove_parametrizations"):
        convert.load(model, torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3)))
    rest = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3)).state_dict(prefix="rest.")
    with pytest.raises(ValueError) as error:
        convert.load(model, {**state, **rest})
    assert "no rule" not in str(error.value)


def test_what_is_not_flattened():
    with refuses("flattened says (2, 3, 1) of the model itself, which has 4 features, not 6"):
        convert.to_torch(nnx.Linear(4, 2, rngs=RNGS), flattened={"*": (2, 3, 1)})
    with refuses("flattened is of dense layers and norms, the model itself is no such layer but Embed"):
        convert.to_torch(nnx.Embed(4, 2, rngs=RNGS), flattened={"*": (2, 2, 1)})
