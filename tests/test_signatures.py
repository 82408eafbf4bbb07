"""The classes take what Flax's take, in its order and with its defaults; they take all that the functions take; and pyright sees it."""

import importlib.util
import inspect
import json
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import pytest
from flax import nnx

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from cases import CLASSES

APIS = {"linen": (nn, jnn), "nnx": (nnx, jnx)}
CALL = "__call__"
INIT = "__init__"
LINEN_OWN = {"self", "name", "parent"}  # of every Linen module

STATISTICS = "running statistics as batch_norm has them"
ACTIVATION = "the fused activation"
SAVE = {"save": "what is kept for the backward pass"}
OF_FUNCTION = "an option of the function that Flax's class lacks"
ADDED = {  # (api, class, method) -> what ours takes after Flax's parameters, and why
    ("linen", "BatchNorm", INIT): {
        "update_running": STATISTICS,
        "track_count": "a variable more, for cumulative averages",
        "running_var_correction": STATISTICS,
        "activation": ACTIVATION,
    }
    | SAVE,
    ("linen", "LayerNorm", INIT): SAVE,
    ("linen", "RMSNorm", INIT): SAVE,
    ("linen", "BatchNorm", CALL): {
        "update_running": "a step may hold the statistics still",
        "momentum": "may be traced: a schedule",
        "residual": "the fused addition",
        "statistics": "those of a larger batch, accumulated over micro-batches",
    },
    ("linen", "GroupNorm", INIT): {"feature_axes": OF_FUNCTION, "activation": ACTIVATION} | SAVE,
    ("linen", "InstanceNorm", INIT): {"reduction_axes": OF_FUNCTION, "activation": ACTIVATION} | SAVE,
    ("linen", "WeightNorm", INIT): {
        "scale_from": "PyTorch's start, and the paper's from data",
        "init_scale": "of the start from data",
        "axis_name": "of the start from data",
    },
    ("nnx", "SpectralNorm", CALL): {"kwargs": "of the layer; Flax's cannot be given any"},
}
ADDED |= {("nnx", name, method): why for (api, name, method), why in list(ADDED.items()) if api == "linen"}
SHARED = [
    (api, name, method) for api, (theirs, _) in APIS.items() for name in jnn.__all__ if hasattr(theirs, name) for method in (INIT, CALL)
]


def parameters(cls, method=INIT):
    """Of the class's own function: the metaclass of NNX hides the signature of the class."""
    found = inspect.signature(getattr(cls, method)).parameters.values()
    return [p for p in found if p.name not in (LINEN_OWN if method == INIT else {"self"})]


def plain(default):
    """Defaults that compare by value: metadata and filters do not."""
    if isinstance(default, types.MappingProxyType):
        return dict(default)
    return repr(default) if isinstance(default, nnx.PathContains) else default


def of(p):
    """What must be the same of a parameter."""
    return p.name, p.kind, plain(p.default)


@pytest.mark.parametrize(("api", "name", "method"), SHARED)
def test_flax_parameters_come_first(api, name, method):
    """Named parameters in Flax's order, kinds and defaults; then ours. NNX's are keywords, so that `**kwargs` stays the last."""
    theirs, ours = (parameters(getattr(module, name), method) for module in APIS[api])
    assert [of(p) for p in ours[: len(theirs)]] == [of(p) for p in theirs]
    added = ADDED.get((api, name, method), {})
    assert [p.name for p in ours[len(theirs) :]] == list(added)
    assert all(added.values())


@pytest.mark.parametrize("name", [n for n in jnn.__all__ if hasattr(nn, n)])
def test_default_factories_of_linen_are_flax(name):
    """Such as `variable_filter`, which a signature shows as a factory only."""
    factories = [
        {f.name: f.default_factory() for f in vars(getattr(module, name))["__dataclass_fields__"].values() if callable(f.default_factory)}
        for module in (jnn, nn)
    ]
    assert factories[0] == factories[1]


def test_all_of_flax_norms_are_there():
    """A class that Flax adds would show here."""
    for theirs, ours in APIS.values():
        assert {n for n in dir(theirs) if n.endswith("Norm")} <= set(ours.__all__)


# --- functions, Linen, NNX ----------------------------------------------------------------------------------------------------

FUNCTIONS = {cls: getattr(jnorm, norm) for norm, cls in CLASSES.items()}
FUNCTIONS |= {
    "CrossIterationBatchNorm": jnorm.cross_iteration_batch_norm,
    "FeatureStandardization": jnorm.standardize_features,
    "NormalizationPropagation": jnorm.reparam.normalization_propagation,
    "ThresholdedLinearUnit": jnorm.thresholded_linear_unit,
    "WeightNorm": jnorm.reparam.weight_norm,
    "SpectralNorm": jnorm.reparam.spectral_norm,
    "WeightStandardization": jnorm.reparam.weight_standardization,
}
RENAMED = {
    ("BatchNorm", "feature_axes"): "axis",  # Flax's name
    ("FilterResponseNorm", "learned_epsilon"): "use_learned_epsilon",  # it is a parameter
    ("NormalizationPropagation", "linear_op"): "layer_instance",
}
OF_LAYER = {"CrossIterationBatchNorm": {"kernel", "linear_op", "num_groups", "feature_axes"}}  # what the layer that it wraps says
OTHER_DEFAULT = {  # (api, class, option) -> why it is not the function's
    ("linen", "BatchNorm", "use_running_average"): "None: Flax has it said, in the constructor or in the call",
    ("linen", "TrackedInstanceNorm", "use_running_average"): "as BatchNorm",
    ("linen", "CrossMiniBatchNorm", "use_running_average"): "as BatchNorm",
    ("linen", "BatchRenorm", "use_running_average"): "as BatchNorm",
    ("linen", "MeanOnlyBatchNorm", "use_running_average"): "as BatchNorm",
    ("linen", "FilterResponseNorm", "learned_epsilon"): "whether there is one",
    ("nnx", "FilterResponseNorm", "learned_epsilon"): "whether there is one",
    ("linen", "GroupNorm", "num_groups"): "32 is Flax's",
    ("nnx", "GroupNorm", "num_groups"): "32 is Flax's",
    ("linen", "SpectralNorm", "update_stats"): "Flax has it said in each call",
    ("linen", "DivisiveBatchNorm", "use_running_average"): "as BatchNorm",
    ("linen", "GhostBatchNorm", "use_running_average"): "as BatchNorm",
    ("linen", "NormalizationPropagation", "linear_op"): "the layer is the operation",
    ("nnx", "NormalizationPropagation", "linear_op"): "the layer is the operation",
    ("linen", "CrossIterationBatchNorm", "use_running_average"): "as BatchNorm",
    ("linen", "EvalNorm", "mean_weight"): "None: it may be learned, or given to the call",
    ("nnx", "EvalNorm", "mean_weight"): "None: it may be learned, or given to the call",
}
FOR_NNX = {  # what only NNX has: its modules are made before x is seen, with keys, and promote by a function
    "num_features": "before x is seen",
    "rngs": "keys of the initializers",
    "promote_dtype": "Flax's hook",
    "bias_metadata": "of the variable",
    "scale_metadata": "of the variable",
    "learned_epsilon_metadata": "of the variable",
    "threshold_metadata": "of the variable",
}
ONLY_LINEN = {
    "force_float32_reductions": "Flax's NNX classes do not have it",
    "collection_name": "NNX has variable types in place of collections",
    "args": "NNX's layers have a first argument, x",
}


def defaults(cls):
    """Of what is given to the constructor or to the call. The constructor's default is what counts where both take one."""
    return {p.name: plain(p.default) for method in (CALL, INIT) for p in parameters(cls, method)}


def options_of(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", jnn.__all__)
def test_every_option_of_the_function_is_one_of_the_class(name, api):
    taken = defaults(getattr(APIS[api][1], name))
    for option, default in options_of(FUNCTIONS[name]).items():
        there = RENAMED.get((name, option), option)
        if option in OF_LAYER.get(name, ()):
            assert there not in taken, option
            continue
        assert there in taken, option
        if (api, name, option) in OTHER_DEFAULT:
            assert taken[there] != default, f"{option} need not be listed"
        else:
            assert taken[there] == default, option


@pytest.mark.parametrize("name", jnn.__all__)
def test_linen_and_nnx_take_the_same(name):
    linen, other = (defaults(getattr(ours, name)) for _, ours in APIS.values())
    assert set(linen) - set(other) <= set(ONLY_LINEN)
    more = set(other) - set(linen) - set(FOR_NNX)
    # a Linen wrapper has x among *args
    assert more <= ({"x"} if "args" in linen else set())
    differing = {k for k in set(linen) & set(other) if linen[k] != other[k]} - {"variable_filter"}
    # an NNX module is told by train() and eval(), and starts as training
    assert differing <= {"use_running_average", "update_stats"}


def test_no_entry_of_the_tables_is_stale():
    for (api, name, option), why in OTHER_DEFAULT.items():
        assert why and option in options_of(FUNCTIONS[name]) and api in APIS
    everything = [defaults(getattr(ours, n)) for _, ours in APIS.values() for n in ours.__all__]
    for option in (*FOR_NNX, *ONLY_LINEN):
        assert any(option in d for d in everything), option


@pytest.mark.parametrize("name", jnx.__all__)
def test_constructors_of_nnx_are_called_by_keyword(name):
    """All but what the module is made for; for groups Flax has two more."""
    positional = [p.name for p in parameters(getattr(jnx, name)) if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional in (["num_features"], ["num_features", "num_groups", "group_size"], ["layer_instance"])


# --- pyright ------------------------------------------------------------------------------------------------------------------

TYPED = """
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jnorm import linen as jnn
from jnorm import nnx as jnx

x = jnp.ones((2, 4, 4, 8))
key, rngs = jax.random.key(0), nnx.Rngs(0)

bn = jnn.BatchNorm(use_running_average=False, axis=(-1, 1), momentum=None, track_count=True, dtype=jnp.bfloat16, activation="relu")
variables = bn.init(key, x)
y = bn.apply(variables, x, mask=x > 0, momentum=jnp.array(0.9), mutable=["batch_stats"])
jnn.LayerNorm(1e-5, reduction_axes=(1, 2), feature_axes=[-1], name="norm")
jnn.RMSNorm(use_scale=False, scale_init=nn.initializers.ones, save="output")
jnn.AddLayerNorm(1e-5, use_bias=False).apply(variables, x, x, mask=x > 0)
jnn.AddRMSNorm(scale_init=nn.initializers.ones)
jnn.GroupNorm(num_groups=None, group_size=2, activation=jnp.tanh)
jnn.FilterResponseNorm(use_learned_epsilon=True, learned_epsilon_init=nn.initializers.ones)
jnn.ThresholdedLinearUnit(feature_axes=(1, -1), threshold_init=nn.initializers.zeros)
jnn.FilterResponseNorm(learned_epsilon=1e-4)  # error
jnn.ThresholdedLinearUnit(dtype=jnp.bfloat16)  # error
jnn.InstanceNorm(axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
jnn.TrackedInstanceNorm(running_var_correction=1)
renorm = jnn.BatchRenorm(r_max=2.0, d_max=1.0)
y = renorm.apply(variables, x, True, r_max=jnp.array(1.5), d_max=0.5)
jnn.MeanOnlyBatchNorm(use_bias=False, momentum=0.9)
jnn.WeightNorm(nn.Dense(2), feature_axes=None, variable_filter=None)
folded = nn.Dense(2).apply(jnn.WeightNorm(nn.Dense(2), scale_from="data", init_scale=0.5).fold(variables), x)
jnn.SpectralNorm(nn.Conv(2, (3, 3)), n_steps=2)
jnn.WeightStandardization(nn.Conv(2, (3, 3)), epsilon_mode="max", fan_in=True)
jnn.CrossMiniBatchNorm(num_mini_batches=4, gradient="published", update="last")
jnn.FeatureStandardization(correction=1).apply(variables, x, fit=True, mutable=["batch_stats"])
jnn.GhostBatchNorm(32, grouping="strided", remainder="smaller", update="each", use_running_average=True)
jnn.EvalNorm(learn_weights=True).apply(variables, x, True, mean_weight=jnp.ones(8), mutable=["batch_stats"])
jnn.DivisiveNorm((1, 5, 5, None), (1, 3, 3, None), use_learned_sigma=True, border="renorm").apply({}, x, return_l1=True)
jnn.DivisiveBatchNorm(sigma=0.5, use_running_average=False)
jnn.NormalizationPropagation(nn.Dense(2), activation=jnp.tanh, gain=1.0)
jnn.DivisiveNorm()  # error
jnn.DivisiveNorm((1, "5", 5, None))  # error
jnn.NormalizationPropagation(nn.Dense(2), linear_op=None)  # error
jnn.BatchNorm(momentun=0.9)  # error
jnn.GhostBatchNorm()  # error
jnn.GhostBatchNorm(32, update="last")  # error
jnn.EvalNorm(mean_weight="1/32")  # error
jnn.CrossIterationBatchNorm(nn.Dense(2, use_bias=False), window=3, rule="drop").apply(variables, x, window_size=jnp.array(2))
jnn.CrossIterationBatchNorm(nn.Dense(2), rule="mean")  # error
jnn.CrossIterationBatchNorm(window=3)  # error
jnn.CrossMiniBatchNorm()  # error
jnn.CrossMiniBatchNorm(num_mini_batches=4, gradient="darknet")  # error
jnn.BatchNorm(momentum="0.9")  # error
jnn.BatchRenorm(r_max="3")  # error
jnn.MeanOnlyBatchNorm(epsilon=1e-5)  # error
jnn.LayerNorm(use_bias=3)  # error
jnn.RMSNorm(use_bias=False)  # error
jnn.RMSNorm(save="y")  # error
jnn.AddRMSNorm(use_bias=False)  # error
jnn.GroupNorm(num_groups=2.5)  # error
jnn.InstanceNorm(reduction_axes="hw")  # error
jnn.WeightStandardization(nn.Dense(2), epsilon_mode="middle")  # error
jnn.SpectralNorm()  # error
jnn.WeightNorm(nn.Dense(2), scale_from="ones")  # error

layer = jnx.BatchNorm(8, use_running_average=None, axis=-1, momentum=None, track_count=True, activation="relu", rngs=rngs)
z: jax.Array = layer(x, use_running_average=True, mask=None, residual=x, update_running=False)
layer.eval()
jnx.LayerNorm(8, reduction_axes=(1, 2), rngs=rngs)(x, mask=x > 0)
jnx.RMSNorm(8, use_scale=False, save="output", rngs=rngs)(x, None)
pair: tuple[jax.Array, jax.Array] = jnx.AddLayerNorm(8, use_bias=False, rngs=rngs)(x, x, mask=x > 0)
pair = jnx.AddRMSNorm(8, rngs=rngs)(x, residual=x)
jnx.GroupNorm(8, None, 2, activation=jnp.tanh, rngs=rngs)
jnx.InstanceNorm(8, axis_name=("a", "b"), rngs=rngs)
jnx.ThresholdedLinearUnit(8, rngs=rngs)(jnx.FilterResponseNorm(8, use_learned_epsilon=True, rngs=rngs)(x, mask=x > 0))
jnx.FilterResponseNorm(8, use_fast_variance=True, rngs=rngs)  # error
jnx.ThresholdedLinearUnit(8, rngs=rngs)(x, x)  # error
jnx.TrackedInstanceNorm(8, running_var_correction=1, rngs=rngs)
jnx.BatchRenorm(8, r_max=2.0, rngs=rngs)(x, r_max=jnp.array(1.5), d_max=0.5)
jnx.MeanOnlyBatchNorm(8, use_bias=False, rngs=rngs)(x, residual=x)
jnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), feature_axes=None, rngs=rngs)(x)
started: jax.Array = jnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), rngs=rngs, scale_from="data").initialize_from(x)
jnx.SpectralNorm(nnx.Linear(2, 2, rngs=rngs), update_stats=False, rngs=rngs)(x, update_stats=True)
jnx.WeightStandardization(nnx.Linear(2, 2, rngs=rngs), epsilon_mode="inside", rngs=rngs)(x)
jnx.CrossMiniBatchNorm(8, num_mini_batches=4, rngs=rngs)(x, num_mini_batches=jnp.array(2))
jnx.FeatureStandardization(8, minimum_std=1e-3)(x, fit=True, mask=x > 0)
jnx.GhostBatchNorm(8, group_size=32, grouping="strided", rngs=rngs)(x, residual=x)
jnx.EvalNorm(8, mean_weight=0.5, rngs=rngs)(x, True, var_weight=jnp.array(0.25))
y, l1 = jnx.DivisiveNorm(8, sum_field=(1, 5, 5, None), rngs=rngs)(x, mask=x > 0, return_l1=True)
z = jnx.DivisiveBatchNorm(8, sigma=0.5, use_learned_sigma=True, rngs=rngs)(x, True, residual=x)
z = jnx.NormalizationPropagation(nnx.Linear(8, 8, rngs=rngs), activation=None, rngs=rngs)(x)
jnx.DivisiveNorm(8, rngs=rngs)  # error
jnx.DivisiveNorm(8, sum_field=(1, 5, 5, None), border="same", rngs=rngs)  # error
jnx.NormalizationPropagation(nnx.Linear(8, 8, rngs=rngs), gain="1", rngs=rngs)  # error
jnx.BatchNorm(8)  # error
jnx.GhostBatchNorm(8, rngs=rngs)  # error
jnx.EvalNorm(8, rngs=rngs)(x, residual=x)  # error
z = jnx.CrossIterationBatchNorm(nnx.Linear(2, 2, use_bias=False, rngs=rngs), window=3, rngs=rngs)(x, window_size=jnp.array(2))
jnx.CrossIterationBatchNorm(nnx.Linear(2, 2, rngs=rngs), window=3)  # error
jnx.CrossIterationBatchNorm(8, rngs=rngs)  # error
jnx.CrossMiniBatchNorm(8, 4, rngs=rngs)  # error
jnx.BatchNorm(8, momentun=0.9, rngs=rngs)  # error
jnx.LayerNorm("8", rngs=rngs)  # error
jnx.BatchRenorm(8, d_max="5", rngs=rngs)  # error
jnx.MeanOnlyBatchNorm(8, use_scale=True, rngs=rngs)  # error
jnx.RMSNorm(8, use_bias=False, rngs=rngs)  # error
jnx.RMSNorm(8, save=True, rngs=rngs)  # error
jnx.AddRMSNorm(8, rngs=rngs)(x)  # error
jnx.GroupNorm(8, num_groups="4", rngs=rngs)  # error
jnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), scale=1.0, rngs=rngs)  # error
jnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), rngs=rngs, scale_from="ones")  # error
layer(x, masks=None)  # error
layer(x, train=True)  # error
jnx.SpectralNorm(nnx.Linear(2, 2, rngs=rngs), epsilon="1e-12", rngs=rngs)  # error
"""


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_sees_what_the_classes_take(tmp_path):
    (tmp_path / "use.py").write_text(TYPED)
    # what pyright would take from a project file; the package is found where this test found it
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(pathlib.Path(jnorm.__file__).parents[1])]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("{"), done.stderr[-500:]
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = {d["range"]["start"]["line"] for d in found if d["severity"] == "error"}
    lines = TYPED.splitlines()
    assert {lines[i] for i in wrong} == {line for line in lines if line.endswith("# error")}
