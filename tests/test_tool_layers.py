"""How the tools find states and modules, and choose some of them by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from jnorm.tools import _layers
from jnorm.tools.convert import _trees
from refusals import refuses

PATHS = ["norm", "encoder/0/norm", "encoder/10/norm", "head/norm_2"]


@pytest.mark.parametrize(
    "layers, want",
    [
        (None, PATHS),
        ("norm", ["norm"]),
        ("*norm", PATHS[:3]),
        ("encoder", PATHS[1:3]),
        ("encoder/1*", ["encoder/10/norm"]),
        ("encoder/1", None),
        ("*/[02]*", PATHS[1:2]),
        ("e*r", PATHS[1:3]),
        (["head", "norm"], ["norm", "head/norm_2"]),
        (lambda path: path.endswith("2"), ["head/norm_2"]),
        (["norm", "tail"], None),
        (lambda path: False, None),
    ],
)
def test_the_choice_by_path(layers, want):
    if want is None:
        with refuses("layers=", "matches none of the norms", "'head/norm_2'"):
            _layers.chosen(PATHS, layers)
    else:
        assert _layers.chosen(PATHS, layers) == want


@pytest.mark.parametrize(
    "layers, kind", [([], ValueError), ((), ValueError), (3, TypeError), (["norm", 3], TypeError), (b"norm", TypeError)]
)
def test_no_choice(layers, kind):
    with refuses(f"{layers!r}", "layers", kind=kind):
        _layers.chosen(PATHS, layers)
    with refuses(f"{layers!r}", "flattened", kind=kind):  # as it is called there
        _layers.chosen(PATHS, layers, "layers", "flattened")


def test_states_in_a_tree():
    state = {"a": [jnorm.batch_norm_state(1), {"kernel": jnp.ones(1)}], "features": jnorm.feature_statistics_state(1)}
    assert list(_layers.states_of(state)) == ["a/0"] and list(_layers.states_of(state["a"][0])) == [""]
    changed = _layers.map_states(lambda s: {**s, "mean": s["mean"] + 1}, state)
    assert changed["a"][0]["mean"] == 1 and changed["features"]["mean"] == 0 and changed["a"][1] is not None
    assert _layers.is_state(jnorm.batch_norm_state((), track_count=True))
    with refuses("matches none of the states: 'a/0'"):
        _layers.map_states(lambda s: s, state, layers="b")
    with refuses("there are no running statistics"):
        _layers.states_of({"kernel": jnp.ones(1)})


def test_parameters_with_the_names_of_statistics():
    variables = {"params": {"head": {"mean": jnp.ones(1), "log_std": jnp.ones(1)}}, "batch_stats": {"norm": jnorm.batch_norm_state(1)}}
    new = tools.blend_statistics(variables, variables, source_count=0, count=1)
    assert list(_layers.states_of(variables)) == ["batch_stats/norm"] and new["params"] is not variables["params"]
    assert new["params"]["head"]["mean"] is variables["params"]["head"]["mean"]
    with refuses("no running statistics"):
        _layers.states_of({**variables, "batch_stats": {"other": jnp.ones(1)}})


def test_what_holds_no_states_of_its_own():
    model, step = jnx.BatchNorm(1, rngs=nnx.Rngs(0)), lambda *_: None
    statistics = jnorm.feature_statistics_state(1)
    uses = {
        "recalibrate": lambda tree: tools.recalibrate(step, tree, [0]),
        "blend": lambda tree: tools.blend_statistics(tree, tree, source_count=1, count=1),
        "population": tools.population_state,
        "freeze": tools.freeze,
        "features": lambda tree: tools.with_feature_statistics(tree, statistics),
    }
    for name, use in uses.items():
        for tree in (nnx.state(model), {"m": nnx.state(model)}):
            with refuses("state belongs to its graph", "nnx.merge", kind=TypeError):
                use(tree)
        with refuses("Linen module", "init", kind=TypeError):
            use(Block())
        with refuses("one NNX model", "nnx.List", kind=TypeError):
            use([model])
        if name == "population":
            with refuses("not an NNX model", "commit_once", kind=TypeError):
                use(model)


class Block(nn.Module):
    norms: tuple = (jnn.BatchNorm, nn.LayerNorm)

    @nn.compact
    def __call__(self, x, train):
        for norm in self.norms:
            x = norm(**({"use_running_average": not train} if norm is jnn.BatchNorm else {}))(nn.Dense(2)(x))
        return x


def test_norms_of_linen_in_the_order_of_calls():
    x = jnp.ones((3, 2))
    for order in ((jnn.BatchNorm, nn.LayerNorm), (nn.LayerNorm, jnn.BatchNorm)):
        model = nn.Sequential([Block(order)])
        variables = model.init(jax.random.key(0), x, train=True)
        norms = _layers.linen_norms(model, variables, x, train=True)
        assert list(norms) == [f"layers_0/{norm.__name__}_0" for norm in order]
        assert {type(norm) for norm in norms.values()} == set(order)
    with refuses("there is no norm in the model"):
        _layers.linen_norms(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), x), x)


def test_norms_of_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), jnx.BatchNorm(2, rngs=rngs), nnx.Sequential(nnx.LayerNorm(2, rngs=rngs)))
    assert list(_layers.nnx_norms(model)) == ["layers/1", "layers/2/layers/0"]
    assert list(_layers.nnx_norms(model, _layers.RUNNING_NNX)) == ["layers/1"]
    assert list(_layers.nnx_norms(model.layers[1])) == [""]
    with refuses("there is no norm with running statistics in the model"):
        _layers.nnx_norms(model.layers[0], _layers.RUNNING_NNX)


class Biased(nn.Module):
    """A norm that only its class tells."""

    @nn.compact
    def __call__(self, x):
        return jnn.BatchNorm(use_running_average=True, use_scale=False)(nn.Dense(2)(x))


def test_compiled_before_it_was_looked_into():
    """What `nn.jit` and `jax.jit` have traced already is not called again, unless it is traced anew."""
    x, model = jnp.ones((3, 2)), nn.jit(Biased)()
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x)
    call = jax.jit(lambda params: model.apply({**variables, "params": params}, x))
    call(variables["params"])
    for _ in range(2):
        assert list(_layers.linen_norms(model, variables, x)) == ["BatchNorm_0"]
        assert tools.fold(model, variables, x).report.folded == {"BatchNorm_0": "Dense_0"}
        assert tools.norm_param_mask(variables["params"], call=call)["BatchNorm_0"] == {"bias": True}
        assert set(_trees.of_linen_model(model, variables, (x,), {}).layers) == {"Dense_0", "BatchNorm_0"}
