"""What stands in the place of an array, a state, a size, a dtype, a number or a layer, and is none: the message names the argument."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, nnx

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import reparam, tools
from refusals import NORMS, STATE, STD_STATE, X, refuses

KEY = jax.random.key(0)
ROW = np.ones((2, 3), np.float32)
FEATURES = jnorm.feature_statistics_state(6)
APIS = pytest.mark.parametrize("api", ["linen", "nnx"])


# --- arrays -----------------------------------------------------------------------------------------------------------------

OF_AN_ARRAY = NORMS | {
    "divisive_norm": lambda x: jnorm.divisive_norm(x, sum_field=(3, 3)),
    "divisive_batch_norm": lambda x: jnorm.divisive_batch_norm(x, STATE),
    "eval_norm_fit": lambda x: jnorm.eval_norm_fit(x, STATE, jnorm.eval_norm_fit_state(6)),
    "feature_statistics": lambda x: jnorm.feature_statistics(x, FEATURES),
    "local_response_norm": jnorm.local_response_norm,
    "mean_only_batch_norm": lambda x: jnorm.mean_only_batch_norm(x, {"mean": STATE["mean"]}),
    "moments": lambda x: jnorm.moments(x, 0),
    "normalize": lambda x: jnorm.normalize(x, lambda *_: (), (), reduction_axes=0, feature_axes=-1),
    "pad_batch": lambda x: jnorm.pad_batch(x, 8),
    "standardize_features": lambda x: jnorm.standardize_features(x, FEATURES),
    "thresholded_linear_unit": lambda x: jnorm.thresholded_linear_unit(x, STATE["mean"]),
}


@pytest.mark.parametrize("name", OF_AN_ARRAY)
@pytest.mark.parametrize("value", [{"image": X}, None, "x", (X, STATE)], ids=lambda v: type(v).__name__)
def test_x_that_is_no_array(name, value):
    """Such as a batch of a data set, or all that a norm with a state returned."""
    with refuses(f"x must be an array, got {type(value).__name__}.", kind=TypeError):
        OF_AN_ARRAY[name](value)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scale", lambda v: jnorm.layer_norm(X, v)),
        ("bias", lambda v: jnorm.batch_norm(X, STATE, bias=v)),
        ("residual", lambda v: jnorm.batch_norm(X, STATE, residual=v)),
        ("z", lambda v: jnorm.unstandardize_features(v, FEATURES)),
        ("v", reparam.weight_norm),
    ],
)
def test_other_arrays_that_are_none(name, call):
    with refuses(f"{name} must be an array, got dict.", kind=TypeError):
        call({"a": X})


@APIS
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "AddLayerNorm", "GhostBatchNorm", "EvalNorm", "FeatureStandardization"])
def test_x_of_a_module_that_is_no_array(name, api):
    options = {"GhostBatchNorm": {"group_size": 2}, "EvalNorm": {"mean_weight": 0.5}}.get(name, {})
    x = ({"image": X}, X) if name == "AddLayerNorm" else ({"image": X},)
    with refuses(name, "x must be an array, got dict.", kind=TypeError):
        getattr(jnn, name)(**options).init(KEY, *x) if api == "linen" else getattr(jnx, name)(6, **options, rngs=nnx.Rngs(0))(*x)


# --- states -----------------------------------------------------------------------------------------------------------------

OF_A_STATE = {
    "batch_norm": (lambda v: jnorm.batch_norm(X, v), STATE),
    "batch_renorm": (lambda v: jnorm.batch_renorm(X, v), STD_STATE),
    "cross_mini_batch_norm": (lambda v: jnorm.cross_mini_batch_norm(X, v, num_mini_batches=1), jnorm.cross_mini_batch_norm_state(6)),
    "cross_iteration_batch_norm": (
        lambda v: jnorm.cross_iteration_batch_norm(X, v, inputs=X, kernel=np.eye(6, dtype=np.float32), linear_op=jnp.matmul),
        jnorm.cross_iteration_batch_norm_state((6, 6)),
    ),
    "standardize_features": (lambda v: jnorm.standardize_features(X, v), FEATURES),
    "eval_norm_fit": (lambda v: jnorm.eval_norm_fit(X, STATE, v), jnorm.eval_norm_fit_state(6)),
}


@pytest.mark.parametrize("name", OF_A_STATE)
@pytest.mark.parametrize("frozen", [core.freeze, types.MappingProxyType])
def test_state_that_is_another_mapping(name, frozen):
    """To make a new one, as for what is no state at all, would lose what it has."""
    call, state = OF_A_STATE[name]
    argument = "fit" if name == "eval_norm_fit" else "state"
    with refuses(f"{argument} must be a dict", type(frozen({})).__name__, f"dict({argument}), or flax.core.unfreeze", "keeps") as error:
        call(frozen(state))
    assert "make it with" not in str(error.value)
    call(dict(frozen(state)))
    with refuses(f"{argument} must be a dict", "got NoneType; make it with jnorm."):
        call(None)


def test_state_and_axis_name_swapped():
    """Nothing of the tree is in the message."""
    with refuses("state must be a tree", "the string 'd', and axis_name dict", kind=TypeError) as error:
        tools.sync_state("d", {"batch_stats": STATE})
    assert "1." not in str(error.value)


def test_statistics_that_are_none():
    for value in (STATE, X):
        with refuses(f"stats must be jnorm.Stats, as jnorm.moments returns them, got {type(value).__name__}.", kind=TypeError):
            jnorm.combine(value, 0)


# --- sizes ------------------------------------------------------------------------------------------------------------------

MAKERS = {
    name: getattr(jnorm, name)
    for name in (
        "batch_norm_state",
        "batch_renorm_state",
        "cross_mini_batch_norm_state",
        "eval_norm_fit_state",
        "feature_statistics_state",
        "mean_only_batch_norm_state",
    )
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("value", "got"), [(5.0, "5.0"), (None, "None"), ("5", "'5'"), ((2, 2.5), "(2, 2.5)"), (X, "an array of shape (4, 3, 2, 6)")]
)
def test_sizes_that_are_none(name, value, got):
    with refuses("num_features must be an int, such as x.shape[-1], or a sequence of ints", f"got {got}.", kind=TypeError):
        MAKERS[name](value)


@pytest.mark.parametrize("name", MAKERS)
def test_negative_sizes(name):
    for value in (-5, (2, -5)):
        with refuses("num_features must be at least 0, got -5."):
            MAKERS[name](value)
    assert MAKERS[name]((np.int64(2), 0))  # no features are a case of their number


def test_other_sizes_that_are_none():
    for value, got in ((5.0, "5.0"), (-5, "-5"), (X, "an array of shape")):
        with refuses("num_features must be an int of at least 0", f"got {got}"):
            reparam.spectral_norm_state(KEY, value)
    with refuses("kernel_shape must be at least 0, got -5."):
        jnorm.cross_iteration_batch_norm_state((3, -5))
    for value, got in ((8.0, "8.0"), (X, "an array of shape")):
        with refuses("multiple must be an int", f"got {got}", kind=TypeError):
            jnorm.pad_batch(X, value)


# --- dtypes and numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NORMS, *MAKERS])
def test_dtype_that_there_is_not(name):
    with refuses("dtype must be", '"bfloat16"', "got 'bfloat'.", kind=TypeError):
        NORMS[name](X, dtype="bfloat") if name in NORMS else MAKERS[name](6, dtype="bfloat")


@APIS
def test_dtype_of_a_module_that_there_is_not(api):
    with refuses("LayerNorm", "dtype must be", "got 'bfloat'.", kind=TypeError):
        jnn.LayerNorm(dtype="bfloat").init(KEY, X) if api == "linen" else jnx.LayerNorm(6, dtype="bfloat", rngs=nnx.Rngs(0))(X)


def schedule(step):
    return 1.0 + step


@pytest.mark.parametrize("name", ["r_max", "d_max", "momentum"])
def test_a_schedule_in_place_of_its_value(name):
    message = (f"{name} must be a number or a traced scalar, got a function", f"{name}=schedule(step)")
    given = {name: schedule}
    with refuses(*message, kind=TypeError):
        jnorm.batch_renorm(X, STD_STATE, **given)
    for options, call in ((given, {}), ({}, given)):
        with refuses("BatchRenorm: ", *message, kind=TypeError):
            jnn.BatchRenorm(use_running_average=False, **options).init(KEY, X, **call)
        with refuses("BatchRenorm(num_features=6): ", *message, kind=TypeError):
            jnx.BatchRenorm(6, **options, rngs=nnx.Rngs(0))(X, **call)


def test_no_function_of_a_micro_batch():
    with refuses("f must be a function of one micro-batch", "got ndarray.", kind=TypeError):
        jnorm.accumulated_moments(X, X, 0)


def test_a_map_that_is_none():
    with refuses("map must be a function of statistics and aux, got NoneType", kind=TypeError):
        jnorm.normalize(X, None, (), reduction_axes=0, feature_axes=-1)  # pyright: ignore[reportArgumentType]


# --- of modules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [KEY, 0, None], ids=["key", "int", "None"])
def test_rngs_that_are_none(value):
    message = ("rngs must be nnx.Rngs", "nnx.Rngs(key)", f"got {type(value).__name__}.")
    makers = (
        lambda: jnx.BatchNorm(6, rngs=value),
        lambda: jnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=value),
        lambda: jnx.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=value),
        lambda: jnx.FilterResponseNorm(6, use_scale=False, use_bias=False, use_learned_epsilon=True, rngs=value),
    )
    for make in makers:
        with refuses(*message, kind=TypeError):
            make()
    jnx.BatchNorm(6, use_scale=False, use_bias=False, rngs=value)  # nothing is drawn


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm", "WeightStandardization", "NormalizationPropagation"])
def test_a_layer_that_is_none(name):
    call = {"update_stats": False} if name == "SpectralNorm" else {}
    options = [{}, {"scale_from": "data"}] if name == "WeightNorm" else [{}]
    for value, linen, nnx_ in ((nn.Dense, "the class Dense", nnx.Linear), (5, "int", 5)):
        for more in options if value is nn.Dense else [{}]:
            with refuses(f"{name}: layer_instance must be an nn.Module, got {linen}", kind=TypeError):
                getattr(jnn, name)(value, **more).init(KEY, ROW, **call)
        with refuses("layer_instance must be an nnx.Module, got", linen.replace("Dense", "Linear"), kind=TypeError):
            getattr(jnx, name)(nnx_, rngs=nnx.Rngs(0))(ROW)


@APIS
def test_a_matrix_for_instance_norm(api):
    """In words that fit the function and the class, and no axes that nobody passed."""
    with refuses("InstanceNorm", "(4, 6)", "use layer normalization, or give reduction_axes") as error:
        jnn.InstanceNorm().init(KEY, X[:, 0, 0]) if api == "linen" else jnx.InstanceNorm(6, rngs=nnx.Rngs(0))(X[:, 0, 0])
    assert "(1,)" not in str(error.value) and "_norm " not in str(error.value)
