"""A norm through its function, its Linen class and its NNX class is one program: values, state and gradients are bitwise equal."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cases
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from cases import BY_NAME, CASES, PLAIN
from pairwise import checkerboard

THROUGH = {"linen": cases.call_linen, "nnx": cases.call_nnx}
LOW = ("float16", "float16")
WITH_CLASS = [c for c in CASES if c.norm in cases.CLASSES]
each_api = pytest.mark.parametrize("api", THROUGH)


def name_of(case):
    return case.name


def assert_equal(one, two):
    """Trees of arrays, in structure, dtype and every bit (so that a NaN is one, and -0 is not 0)."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def assert_same(one, two, *given, run=False):
    """The results of two functions are bitwise equal. What JAX gives the compiler as the same text need not be compiled to know that."""
    one, two = (jax.jit(f).lower(*given) for f in (one, two))
    assert one.out_info == two.out_info
    if run or one.as_text() != two.as_text():
        assert_equal(one.compile()(*given), two.compile()(*given))


# --- the norms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.thinned(WITH_CLASS), ids=name_of)
def test_function_linen_and_nnx_are_the_same(case):
    given = cases.inputs(case)
    for through in THROUGH.values():
        assert_same(
            cases.value_and_gradients(case),
            cases.value_and_gradients(case, through=through),
            given,
            run=case.name in ("batch_norm", "layer_norm"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_CLASS, ids=name_of)
def test_function_linen_and_nnx_run_the_same(case):
    given = cases.inputs(case)
    for through in THROUGH.values():
        assert_same(cases.value_and_gradients(case), cases.value_and_gradients(case, through=through), given, run=True)


def promoted(*arrays):
    """Flax promotes bfloat16 and float32 to float32: y is as wide as what it is made of."""
    return np.dtype("float32") if any(a.dtype == np.float32 for a in arrays) else np.dtype(jnp.bfloat16)


MIXED = [c for c in WITH_CLASS if c.options.get("save") != "output"]  # which asks for y of x's dtype
ONE_EACH = [c for c in MIXED if not c.own or c in cases.FAMILY]
PROMOTING = checkerboard(ONE_EACH, THROUGH)
PROMOTING += [pytest.param(c, api, marks=pytest.mark.slow) for c in MIXED if c not in ONE_EACH for api in THROUGH]


def dtype_of_y(case, given, api):
    """Flax's rule: of x, scale and bias. NNX promotes x together with the running mean and variance too, where there are some."""
    arrays = [given["x"], *(given[name] for name in case.affine)]
    return promoted(*arrays, *(given["state"].values() if api == "nnx" and case.state else ()))


@pytest.mark.parametrize(("case", "api"), PROMOTING, ids=lambda v: v if isinstance(v, str) else v.name)
def test_bfloat16_input_and_float32_parameters(case, api):
    """y is float32 where there is a parameter; where there is none it is x's dtype."""
    given = cases.inputs(case, dtype="bfloat16")
    given["dy"] = given["dy"].astype(dtype_of_y(case, given, api))
    function = cases.value_and_gradients(case, dtype=given["dy"].dtype)
    assert_same(function, cases.value_and_gradients(case, through=THROUGH[api]), given)


@each_api
@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_bfloat16_throughout(case, api):
    """The state stays float32, so that NNX's rule makes y float32 where there is one."""
    given = cases.inputs(case, dtype="bfloat16", parameters="bfloat16")
    given["dy"] = given["dy"].astype(dtype_of_y(case, given, api))
    function = cases.value_and_gradients(case, dtype=given["dy"].dtype)
    assert_same(function, cases.value_and_gradients(case, through=THROUGH[api]), given)


@each_api
@pytest.mark.parametrize("case", PLAIN, ids=name_of)
@pytest.mark.parametrize(("x", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), pytest.param(*LOW, marks=pytest.mark.slow)])
def test_dtype(case, api, x, dtype):
    given = cases.inputs(case, dtype=x)
    given["dy"] = given["dy"].astype(dtype)
    function = cases.value_and_gradients(case, dtype=jnp.dtype(dtype))
    assert_same(function, cases.value_and_gradients(case, through=THROUGH[api], dtype=jnp.dtype(dtype)), given)


@each_api
@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_integers_are_read_as_float32(case, api):
    given = cases.inputs(case)
    whole = given["x"].astype(np.int32)
    run = functools.partial(THROUGH[api], case)
    assert_same(lambda g: run(g), lambda g: run(g | {"x": g["x"].astype(jnp.float32)}), given | {"x": whole})


@each_api
@pytest.mark.parametrize(
    "name", ["batch_norm", "layer_norm_samples", "rms_norm_mask", "group_norm_mask", "instance_norm", "tracked_instance_norm"]
)
def test_axis_name_and_groups(name, api):
    """Under vmap; what does not have the mapped axis goes in whole."""
    case = BY_NAME[name]
    given = cases.inputs(case)
    given |= {k: np.stack([given[k], given[k][::-1], given[k] * 2, given[k] + 1]) for k in ("x", "dy")}
    axes = ({k: 0 if k in ("x", "dy") else None for k in given},)
    options = {"axis_name": "i", "axis_index_groups": ((0, 2), (1, 3))}

    def mapped(**kw):
        return jax.vmap(cases.value_and_gradients(case, **options, **kw), axes, axis_name="i")

    assert_same(mapped(), mapped(through=THROUGH[api]), given)


# --- y kept in place of x ---------------------------------------------------------------------------------------------------


SAVING = [c for c in WITH_CLASS if c.options.get("save") == "output"]
SAVING += [cases.replace(c, name=f"{c.name}_output", options={"save": "output"}) for c in PLAIN if c.tracked]


@each_api
@pytest.mark.parametrize("case", SAVING, ids=name_of)
def test_output_of_bfloat16_with_float32_parameters_needs_a_dtype(case, api):
    given = cases.inputs(case, dtype="bfloat16")
    function = cases.value_and_gradients(case)
    assert_same(function, cases.value_and_gradients(case, through=THROUGH[api], dtype=jnp.bfloat16), given)
    if dtype_of_y(case, given, api) != jnp.bfloat16:
        refused(case, given, api, "dtype must be that of x, bfloat16, got float32", {})


def refused(case, given, api, says, options):
    """The module's name stands before the message of the function."""
    name = cases.CLASSES[case.norm] + ("" if api == "linen" else r"\(num_features=6\)")
    with pytest.raises(ValueError, match=f'^{name}: save="output" .*{says}'):
        THROUGH[api](case, given, **options)


@each_api
@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "instance_norm", "tracked_instance_norm"])
def test_outputs_that_do_not_tell_the_input(name, api):
    case = BY_NAME[name]
    for activation in ("relu", "silu", "gelu"):
        refused(case, cases.inputs(case), api, activation, {"save": "output", "activation": activation})


@each_api
def test_output_with_a_residual(api):
    case = BY_NAME["batch_norm_residual"]
    refused(case, cases.inputs(case), api, "a residual was added", {"save": "output"})


@each_api
@pytest.mark.parametrize("case", PLAIN, ids=name_of)
def test_neither_input_nor_output(case, api):
    with pytest.raises(ValueError, match='save must be "input" or "output", got None'):
        THROUGH[api](case, cases.inputs(case), save=None)


# --- what can be said at construction and at the call -------------------------------------------------------------------------


def run_module(case, given, api, constructor, at_call):
    """(y, state or None), with options for either place."""
    if api == "linen":
        module, variables = cases.linen_module(case, given, **constructor)
        y, updates = module.apply(variables, given["x"], **at_call, mutable=["batch_stats"])
        return y, updates.get("batch_stats")
    module = cases.nnx_module(case, given, **constructor)
    return module(given["x"], **at_call), {k: getattr(module, k)[...] for k in given["state"]}


STATEFUL = pytest.mark.parametrize("name", ["batch_norm_counted", "tracked_instance_norm_counted"])
PLACES = [
    ({"use_running_average": True}, {}),
    ({"use_running_average": True, "update_running": True}, {}),
    ({"use_running_average": False, "update_running": False}, {}),
    ({"use_running_average": False, "momentum": 0.5}, {"momentum": 0.9}),  # the call's comes before the constructor's
    ({"use_running_average": False, "update_running": False}, {"update_running": True}),
]


@each_api
@STATEFUL
@pytest.mark.parametrize(("options", "before"), PLACES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "unset")
def test_options_of_the_call_are_those_of_the_constructor(name, api, options, before):
    case = BY_NAME[name]
    given = cases.inputs(case)
    # Linen refuses use_running_average in both places
    none = {"use_running_average": None}
    assert_same(
        lambda g: run_module(case, g, api, none | before, options),
        lambda g: run_module(case, g, api, options, {}),
        given,
    )


@each_api
@STATEFUL
def test_momentum_may_be_traced(name, api):
    case = BY_NAME[name]
    given = cases.inputs(case)
    traced = jax.jit(lambda g, m: run_module(case, g, api, {}, {"momentum": m}))(given, np.float32(0.25))
    assert_equal(traced, jax.jit(lambda g, m: cases.call(case, g, momentum=m))(given, np.float32(0.25)))


def test_train_and_eval_of_nnx():
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)

    def after(method):
        def run(g):
            module = cases.nnx_module(case, g, use_running_average=None)
            getattr(module, method)()
            return module(g["x"]), {k: getattr(module, k)[...] for k in g["state"]}

        return run

    assert_same(after("train"), lambda g: cases.call(case, g), given)
    assert_same(after("eval"), lambda g: cases.call(case, g, use_running_average=True), given)


@pytest.mark.parametrize("api", THROUGH)
def test_evaluation_with_running_statistics_that_moved(api):
    """use_running_average and update_running together: y of the old statistics, the state of the new ones."""
    case = BY_NAME["batch_norm"]
    given = cases.inputs(case)
    options = {"use_running_average": True, "update_running": True}
    assert_same(lambda g: run_module(case, g, api, options, {}), lambda g: cases.call(case, g, **options), given)


# --- reparametrizations -----------------------------------------------------------------------------------------------------

X = {"dense": (3, 5), "conv": (2, 4, 4, 3)}


def linen_layer(kind):
    return nn.Dense(4) if kind == "dense" else nn.Conv(4, (3, 3))


def nnx_layer(kind):
    return nnx.Linear(5, 4, rngs=nnx.Rngs(0)) if kind == "dense" else nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))


def layer_inputs(kind, kernel="float32", scale_shape=(4,)):
    rng = np.random.default_rng(0)
    shape = {"dense": (5, 4), "conv": (3, 3, 3, 4)}[kind]
    given = {
        "x": rng.normal(size=X[kind]),
        "bias": rng.normal(size=4),
        "scale": rng.normal(size=scale_shape) + 1,
        "u": rng.normal(size=(1, 4)),
    }
    given |= {"dy": rng.normal(size=(*X[kind][:-1], 4))}
    given = {k: v.astype(np.float32) for k, v in given.items()}
    return given | {"kernel": rng.normal(size=shape).astype(kernel), "sigma": np.ones((), np.float32)}


def plain_linen(kind, g, kernel):
    return linen_layer(kind).apply({"params": {"kernel": kernel, "bias": g["bias"]}}, g["x"])


def plain_nnx(kind, g, kernel):
    layer = nnx_layer(kind)
    layer.kernel, layer.bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.asarray(g["bias"]))
    return layer(g["x"])


PLAIN_LAYER = {"linen": plain_linen, "nnx": plain_nnx}


def wrapped_linen(name, kind, g, options, update_stats=None):
    module = getattr(jnn, name)(linen_layer(kind), **options)
    variables = {"params": {"layer_instance": {"kernel": g["kernel"], "bias": g["bias"]}}}
    if name == "SpectralNorm":
        stats = {"layer_instance/kernel/u": g["u"], "layer_instance/kernel/sigma": g["sigma"]}
        y, new = module.apply(variables | {"batch_stats": stats}, g["x"], update_stats=update_stats, mutable=["batch_stats"])
        return y, {k.rsplit("/")[-1]: v for k, v in new["batch_stats"].items()}
    if options.get("use_scale", name == "WeightNorm"):
        variables["params"]["layer_instance/kernel/scale"] = g["scale"]
    return module.apply(variables, g["x"]), {}


def wrapped_nnx(name, kind, g, options, update_stats=None):
    layer = nnx_layer(kind)
    layer.kernel, layer.bias = nnx.Param(jnp.asarray(g["kernel"])), nnx.Param(jnp.asarray(g["bias"]))
    module = getattr(jnx, name)(layer, **options, rngs=nnx.Rngs(0))
    if name == "SpectralNorm":
        for key in ("u", "sigma"):
            module.batch_stats["kernel", key][...] = g[key]
        y = module(g["x"], update_stats=update_stats)
        return y, {k: module.batch_stats["kernel", k][...] for k in ("u", "sigma")}
    if module.use_scale:
        module.scales[("kernel",)][...] = g["scale"]
    return module(g["x"]), {}


WRAPPED = {"linen": wrapped_linen, "nnx": wrapped_nnx}


def with_gradients(run, given):
    """A function of `given` -> (y, state, gradients of all that is differentiable)."""

    def both(g):
        inner = {k: g[k] for k in ("x", "kernel", "bias", "scale")}
        y, vjp, state = jax.vjp(lambda inner: run(g | inner), inner, has_aux=True)
        return y, state, vjp(g["dy"])[0]

    return both, given


WEIGHTS = [  # class, its options, the function's
    ("WeightNorm", {}, {}),
    ("WeightNorm", {"epsilon": 0.1, "use_scale": False}, {"epsilon": 0.1}),
    ("WeightNorm", {"feature_axes": None}, {"feature_axes": None}),
    ("WeightNorm", {"feature_axes": (0, -1)}, {"feature_axes": (0, -1)}),
    ("WeightStandardization", {}, {}),
    (
        "WeightStandardization",
        {"use_scale": True, "epsilon": 1e-4, "epsilon_mode": "max", "correction": 0, "fan_in": True},
        {"epsilon": 1e-4, "epsilon_mode": "max", "correction": 0, "fan_in": True},
    ),
    (
        "WeightStandardization",
        {"epsilon_mode": "inside", "use_scale": True, "feature_axes": (-2, -1)},
        {"epsilon_mode": "inside", "feature_axes": (-2, -1)},
    ),
]
# A matrix standardized over none of its axes is refused.
ON_LAYERS = [(*w, kind) for w in WEIGHTS for kind in X if not (kind == "dense" and w[2].get("feature_axes") == (-2, -1))]
FUNCTIONS = {"WeightNorm": jnorm.reparam.weight_norm, "WeightStandardization": jnorm.reparam.weight_standardization}


@each_api
@pytest.mark.parametrize(("name", "options", "function", "kind"), ON_LAYERS, ids=[f"{w[0]}-{w[3]}-{i}" for i, w in enumerate(ON_LAYERS)])
def test_weights_of_a_layer(name, options, function, kind, api):
    shape = {None: (), (0, -1): (5 if kind == "dense" else 3, 4), (-2, -1): (3, 4)}.get(function.get("feature_axes", 0), (4,))
    scaled = options.get("use_scale", name == "WeightNorm")

    def by_function(g):
        return PLAIN_LAYER[api](kind, g, FUNCTIONS[name](g["kernel"], g["scale"] if scaled else None, **function)), {}

    given = layer_inputs(kind, scale_shape=shape)
    one, _ = with_gradients(by_function, given)
    two, _ = with_gradients(lambda g: WRAPPED[api](name, kind, g, options), given)
    assert_same(one, two, given, run=not options)


@each_api
@pytest.mark.parametrize("kind", X)
@pytest.mark.parametrize(("options", "update"), [({}, True), ({"n_steps": 3, "epsilon": 1e-3}, True), ({}, False)])
def test_spectral_norm_of_a_layer(options, update, kind, api):
    def by_function(g):
        w, state = jnorm.reparam.spectral_norm(g["kernel"], {k: g[k] for k in ("u", "sigma")}, update_stats=update, **options)
        return PLAIN_LAYER[api](kind, g, w), state

    given = layer_inputs(kind)
    one, _ = with_gradients(by_function, given)
    two, _ = with_gradients(lambda g: WRAPPED[api]("SpectralNorm", kind, g, options, update), given)
    assert_same(one, two, given, run=update and not options)


@pytest.mark.parametrize("kind", X)
@pytest.mark.parametrize("name", ["WeightNorm", "WeightStandardization", "SpectralNorm"])
def test_linen_and_nnx_wrap_the_same(name, kind):
    """Through two layers of Flax, Dense and Linear, which agree as well."""
    given = layer_inputs(kind)
    one, _ = with_gradients(lambda g: wrapped_linen(name, kind, g, {}, True), given)
    two, _ = with_gradients(lambda g: wrapped_nnx(name, kind, g, {}, True), given)
    assert_same(one, two, given)


@each_api
@pytest.mark.parametrize("name", ["WeightNorm", "WeightStandardization", "SpectralNorm"])
def test_bfloat16_weights_and_float32_scales(name, api):
    """The weight that is used is as wide as what it is made of: scale, or u and sigma, are float32."""
    given = layer_inputs("dense", kernel=jnp.bfloat16)
    options = {"use_scale": True} if name == "WeightStandardization" else {}

    def by_function(g):
        if name == "SpectralNorm":
            w, state = jnorm.reparam.spectral_norm(g["kernel"], {k: g[k] for k in ("u", "sigma")}, dtype=jnp.float32)
            return PLAIN_LAYER[api]("dense", g, w), state
        return PLAIN_LAYER[api]("dense", g, FUNCTIONS[name](g["kernel"], g["scale"], dtype=jnp.float32)), {}

    one, _ = with_gradients(by_function, given)
    two, _ = with_gradients(lambda g: WRAPPED[api](name, "dense", g, options, True), given)
    assert_same(one, two, given)


@pytest.mark.parametrize("param_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", ["int8", "bool", "float16"])
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_the_dtype_of_y_is_that_of_flax(name, x_dtype, param_dtype):
    x = jnp.zeros((2, 3, 4), x_dtype)
    groups = {"num_groups": 2} if name == "GroupNorm" else {}
    running = {"use_running_average": True} if name == "BatchNorm" else {}

    def linen(api):
        return api(param_dtype=param_dtype, **groups, **running).init_with_output(jax.random.key(0), x)[0]

    def with_nnx(api):
        return api(4, param_dtype=param_dtype, **groups, **running, rngs=nnx.Rngs(0))(x)

    for ours, theirs, call in [(jnn, nn, linen), (jnx, nnx, with_nnx)]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            want = jax.eval_shape(functools.partial(call, getattr(theirs, name))).dtype
        assert jax.eval_shape(functools.partial(call, getattr(ours, name))).dtype == want
