"""Statistics of a stream of batches, for evaluation: both estimators, in all styles, merged over hosts, and refused."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import distributed
import jnorm
import jnorm.linen as jnn
import jnorm.nnx as jnx
import oracles
from jnorm import tools
from refusals import refuses

ESTIMATORS = ("pooled", "mean")
DECAY = 0.5  # of "exponential"
SIZES = (5, 2, 9, 1, 4)
FEATURES = 3


def stream(rng, sizes=SIZES, offset=0.0):
    """Batches (n, 2, C) of different sizes and means: the spread between them is not small."""
    return [(rng.normal(size=(n, 2, FEATURES)) * 2 + 3 * rng.normal(size=FEATURES) + offset).astype(np.float32) for n in sizes]


def step(state, x, **options):
    return jnorm.batch_norm(x, state, **{"momentum": 0.9, **options})[1]


def truth(batches, estimator, masks=None, weights=None):
    """From the formulas, in float64: all values at once, or the averages of what each batch gives, by weight. -> {"mean", "var"}"""
    masks = [oracles.full_mask(m, b.shape) for m, b in zip(masks or [None] * len(batches), batches, strict=True)]
    columns = [[b[..., c][m[..., c]].astype(np.float64) for b, m in zip(batches, masks, strict=True)] for c in range(FEATURES)]
    columns = [[v for v in column if v.size] for column in columns]
    if estimator == "pooled":
        whole = [np.concatenate(column) for column in columns]
        return {"mean": np.array([v.mean() for v in whole]), "var": np.array([v.var() for v in whole])}
    ddof = int(estimator == "mean")
    spread = [[v.var(ddof=ddof) if v.size > ddof else 0.0 for v in column] for column in columns]
    average = lambda of_batches: np.average(of_batches, weights=weights)  # noqa: E731
    return {"mean": np.array([average([v.mean() for v in column]) for column in columns]), "var": np.array([average(v) for v in spread])}


def check(state, want, batches):
    """Each of the B updates rounds once, and a batch's own statistics are sums of its values."""
    length, largest = 2 * max(map(len, batches)) + 4 * len(batches), max(abs(b).max() for b in batches)
    oracles.assert_close(state["mean"], oracles.Bounded(want["mean"], abs(want["mean"]) + largest), length, what="mean")
    spread = want["var"] + max(b.astype(np.float64).var() for b in batches)
    oracles.assert_close(state["var"], oracles.Bounded(want["var"], spread), length, what="var")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_formulas(estimator, masked, rng):
    batches = stream(rng)
    masks = [rng.uniform(size=(len(b), 1, FEATURES)) < 0.7 for b in batches] if masked else None
    items = batches if masks is None else list(zip(batches, masks, strict=True))
    run = step if masks is None else lambda state, item: step(state, item[0], mask=item[1])
    check(tools.recalibrate(run, jnorm.batch_norm_state(FEATURES), items, estimator=estimator), truth(batches, estimator, masks), batches)


def test_algorithm_2_depends_on_the_batches():
    """{1, 2, 3, 4}: known by hand."""
    state, values = jnorm.batch_norm_state(1), np.arange(1, 5, dtype=np.float32)[:, None]
    halves = [values[:2], values[2:]]
    pairs = [values[[i, j]] for i in range(4) for j in range(i)]
    assert float(tools.recalibrate(step, state, halves, estimator="mean")["var"][0]) == 0.5
    np.testing.assert_allclose(tools.recalibrate(step, state, pairs, estimator="mean")["var"], 5 / 3, rtol=1e-6)
    assert float(tools.recalibrate(step, state, halves)["var"][0]) == 1.25
    assert float(tools.recalibrate(step, state, [values])["var"][0]) == 1.25
    np.testing.assert_allclose(tools.recalibrate(step, state, [values], estimator="mean")["var"], 5 / 3, rtol=1e-6)


def test_the_state_before_leaves_no_trace(rng):
    batches = stream(rng)
    far = {"mean": jnp.full(FEATURES, 1e8), "var": jnp.full(FEATURES, 1e8), "count": jnp.float32(7)}
    new = tools.recalibrate(step, far, batches)
    check(new, truth(batches, "pooled"), batches)
    assert set(new) == set(far) and float(new["count"]) == 7


def test_momentum_and_correction_have_no_effect(rng):
    batches, state = stream(rng), jnorm.batch_norm_state(FEATURES)
    one = tools.recalibrate(step, state, batches)
    for options in ({"momentum": None}, {"momentum": 0.0}, {"running_var_correction": 1}):
        two = tools.recalibrate(lambda s, x, options=options: step(s, x, **options), state, batches)
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_large_means_keep_their_variance(rng):
    """Around 1e4 the squares of float32 would leave no digit of a variance of 4."""
    batches = stream(rng, offset=1e4)
    new, want = tools.recalibrate(step, jnorm.batch_norm_state(FEATURES), batches), truth(batches, "pooled")
    # The state's mean is one float32, wrong by eps/2·1e4 in each update, which the distance of the next batch's mean has.
    distance = max(abs(b.mean((0, 1)) - want["mean"]).max() for b in batches)
    assert abs(new["var"] - want["var"]).max() <= 2 * len(batches) * 1e4 * 1.2e-7 * distance + 1e-4 * want["var"].max()


def test_a_feature_that_is_never_counted_keeps_what_it_had(rng):
    batches, state = stream(rng), {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 5, 6])}
    mask = np.array([True, False, True])
    new = tools.recalibrate(lambda s, x: step(s, x, mask=mask), state, batches)
    assert float(new["mean"][1]) == 2 and float(new["var"][1]) == 5
    keep = np.array([0, 2])
    want = truth(batches, "pooled")
    np.testing.assert_allclose(new["mean"][keep], want["mean"][keep], rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_merged_over_hosts(estimator, rng):
    """Two that saw parts of the stream, and one that saw nothing yet."""
    batches = stream(rng)
    start = tools.population_state({"a": jnorm.batch_norm_state(FEATURES)}, estimator=estimator)

    def collect(part):
        population = start
        for x in part:
            population = {"a": step(population["a"], x)}
        return population

    one, two = collect(batches[:2]), collect(batches[2:])
    for merged in (tools.merge_populations(one, two), tools.merge_populations(two, one)):
        check(tools.population_statistics(merged)["a"], truth(batches, estimator), batches)
    for merged in (tools.merge_populations(one, start), tools.merge_populations(start, one)):
        jax.tree.map(np.testing.assert_array_equal, merged, one)


@pytest.mark.parametrize("mode", distributed.MODES)
def test_over_devices(mode, rng):
    """Each batch is spread over eight devices, with uneven masks: `axis_name` merges it."""
    state = tools.population_state(jnorm.batch_norm_state(FEATURES))
    batches, masks = [], []
    for _ in range(2):
        x = rng.normal(size=(16, 2, 1, FEATURES)).astype(np.float32)
        mask = distributed.uneven(rng, x.shape)
        run = lambda g: (g["x"], step(g["state"], g["x"], mask=g["mask"], axis_name="d"), {"x": g["x"]})  # noqa: E731
        _, state, _ = distributed.MODES[mode](run, {"x": x, "mask": mask, "state": state})
        batches.append(x)
        masks.append(mask)
    check(tools.population_statistics(state), truth(batches, "pooled", masks), batches)


def test_jit_scan_and_complex(rng):
    x = (rng.normal(size=(4, 6, FEATURES)) + 1j * rng.normal(size=(4, 6, FEATURES)) + 2).astype(np.complex64)
    start = tools.population_state(jnorm.batch_norm_state(FEATURES, dtype=jnp.complex64))
    state, _ = jax.jit(lambda s, x: jax.lax.scan(lambda s, x: (step(s, x), None), s, x))(start, x)
    new = tools.population_statistics(state)
    wide = x.astype(np.complex128).reshape(-1, FEATURES)
    np.testing.assert_allclose(new["mean"], wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], (abs(wide - wide.mean(0)) ** 2).mean(0), rtol=1e-5)


def test_inside_a_transformation(rng):
    """All of it in one compiled program, for two networks at once."""
    x = rng.normal(size=(2, 4, 6, FEATURES)).astype(np.float32)

    def statistics(x):
        start = tools.population_state(jnorm.batch_norm_state(FEATURES))
        return tools.population_statistics(jax.lax.scan(lambda s, x: (step(s, x), None), start, x)[0])

    new = jax.jit(jax.vmap(statistics))(x)
    for i in range(2):
        check({k: v[i] for k, v in new.items()}, truth(list(x[i]), "pooled"), list(x[i]))


# --- modules ----------------------------------------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnn.BatchNorm(use_running_average=not train, track_count=True)(x)
        return jnn.BatchNorm(use_running_average=not train)(nn.tanh(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.one = jnx.BatchNorm(FEATURES, track_count=True, rngs=rngs)
        self.two = jnx.BatchNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x)))


def second_batches(batches):
    """What the second norm sees: the first normalizes each batch with its own statistics."""
    return [np.tanh((b - b.mean((0, 1), dtype=np.float64)) / np.sqrt(b.astype(np.float64).var((0, 1)) + 1e-5)) for b in batches]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_modules(api, estimator, rng):
    batches = stream(rng)
    if api == "linen":
        net = LinenNet()
        variables = net.init(jax.random.key(0), batches[0], train=True)
        params = variables.get("params", {})

        def run(stats, x):
            return net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        stats = tools.recalibrate(jax.jit(run), variables["batch_stats"], batches, estimator=estimator)
        assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
        net.apply({"params": params, "batch_stats": stats}, batches[0], train=False)
        found = [stats[f"BatchNorm_{i}"] for i in range(2)]
    else:
        model = NnxNet(nnx.Rngs(0))
        before = jax.tree.structure(nnx.to_pure_dict(nnx.state(model)))
        given, old = model, jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
        model = tools.recalibrate(nnx.jit(lambda m, x: m(x)), given, batches, estimator=estimator)
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(given)), old)
        assert jax.tree.structure(nnx.to_pure_dict(nnx.state(model))) == before
        model.eval()
        model(batches[0])
        found = [{k: getattr(m, k)[...] for k in ("mean", "var")} for m in (model.one, model.two)]
    check(found[0], truth(batches, estimator), batches)
    second = second_batches(batches)
    check(found[1], truth(second, estimator), [b.astype(np.float32) for b in second])


# --- refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [jnorm.batch_norm_state(1), jnx.BatchNorm(1, rngs=nnx.Rngs(0))], ids=["function", "nnx"])
def test_no_batches(state):
    with refuses("no batches", "iterator"):
        tools.recalibrate(lambda *_: 1 / 0, state, iter(()))


def test_a_step_that_evaluates():
    x = np.ones((2, 1), np.float32)
    with refuses("nothing was collected", "training mode"):
        tools.recalibrate(lambda s, x: step(s, x, use_running_average=True), jnorm.batch_norm_state(1), [x])
    model = jnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))
    with refuses("nothing was collected"):
        tools.recalibrate(lambda m, x: m(x), model, [x])
    assert not hasattr(model, "values")


def test_a_step_that_fails_leaves_the_model_as_it_was():
    model, x = jnx.BatchNorm(1, rngs=nnx.Rngs(0)), np.float32([[1], [3]])

    def fail(model, x):
        model(x)
        raise KeyError

    with pytest.raises(KeyError):
        tools.recalibrate(fail, model, [x])
    assert model.mean[...].tolist() == [0] and model.var[...].tolist() == [1] and not hasattr(model, "values")


def test_a_step_that_returns_something_else():
    with refuses("must return the new state"):
        tools.recalibrate(lambda s, x: None, jnorm.batch_norm_state(1), [0])


def test_bad_arguments():
    one = {"a": jnorm.batch_norm_state(1)}
    with refuses("estimator must be one of", "pooled", "'ema'"):
        tools.recalibrate(step, one, [0], estimator="ema")
    with refuses("no running statistics"):
        tools.recalibrate(step, {"kernel": jnp.ones(3)}, [0])
    with refuses("no norm with running statistics", "GhostBatchNorm"):
        tools.recalibrate(step, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), [0])
    pooled, mean = (tools.population_state(one, estimator=e) for e in ESTIMATORS)
    with refuses("same estimator", "'values'", "'batches'"):
        tools.merge_populations(pooled, mean)
    with refuses("population_state"):
        tools.merge_populations(one, one)


def test_a_step_that_returns_more_than_the_state():
    state, x = {"a": jnorm.batch_norm_state(1)}, np.ones((2, 1), np.float32)
    with refuses("returned tuple", "lacks a/mean", "its item [1] alone?"):
        tools.recalibrate(lambda s, x: (x, {"a": step(s["a"], x)}), state, [x])
    with pytest.raises(ValueError, match=r"it returned ndarray\.$"):
        tools.recalibrate(lambda s, x: x, state, [x])


def test_a_momentum_that_is_not_known():
    with refuses("momentum", "a known number"):
        jax.jit(lambda m: tools.recalibrate(step, jnorm.batch_norm_state(1), [0], estimator="exponential", momentum=m))(0.5)


def test_populations_of_unlike_models():
    one = tools.population_state({"a": jnorm.batch_norm_state(1), "other": jnp.ones(2)})
    both = tools.merge_populations(flax.core.freeze(one), one)
    assert isinstance(both, flax.core.FrozenDict) and both["a"].keys() == one["a"].keys()
    with refuses("the first alone has the states ['a']", "the second alone ['b']"):
        tools.merge_populations(one, {"b": one["a"]})
    with refuses("'a'", "same shapes", "(1,)", "(2,)"):
        tools.merge_populations(one, {"a": tools.population_state(jnorm.batch_norm_state(2))})


def test_populations_that_saw_nothing():
    start = {"n": jnorm.batch_norm_state(1), "o": jnorm.batch_norm_state(1)}
    with refuses("no state collects", "population_state"):
        tools.population_statistics(start)
    population = tools.population_state(start)
    with refuses("collects already"):
        tools.population_state(population)
    with refuses("nothing was collected:"):
        tools.population_statistics(population)
    seen = {**population, "n": step(population["n"], np.ones((2, 1), np.float32))}
    with refuses("nothing was collected in 'o':"):
        tools.population_statistics(seen)
    frozen = tools.population_state(tools.freeze(start, "o"))
    new = tools.population_statistics({**frozen, "n": seen["n"]})
    assert float(new["o"]["mean"][0]) == 0 and float(new["n"]["mean"][0]) == 1


def test_a_state_that_counts_twice():
    state = tools.population_state(jnorm.batch_norm_state(1))
    with refuses("'mean', 'var'"):
        step({**state, "batches": state["values"]}, np.ones((2, 1), np.float32))


# --- every norm with running statistics -------------------------------------------------------------------------------------

GROUP, EPSILON = 2, 1e-3
NORMS = {  # class -> the function on a batch, its state, and what its module is made with
    "BatchNorm": (jnorm.batch_norm, jnorm.batch_norm_state, {}),
    "DivisiveBatchNorm": (jnorm.divisive_batch_norm, jnorm.batch_norm_state, {}),
    "EvalNorm": (None, None, {"mean_weight": 0.5}),
    "GhostBatchNorm": (jnorm.ghost_batch_norm, jnorm.batch_norm_state, {"group_size": GROUP}),
    "CrossMiniBatchNorm": (jnorm.cross_mini_batch_norm, jnorm.cross_mini_batch_norm_state, {"num_mini_batches": 3}),
    "CrossIterationBatchNorm": (None, None, {"window": 3}),
    "TrackedInstanceNorm": (jnorm.tracked_instance_norm, jnorm.batch_norm_state, {}),
    "BatchRenorm": (jnorm.batch_renorm, jnorm.batch_renorm_state, {"epsilon": EPSILON}),
    "MeanOnlyBatchNorm": (jnorm.mean_only_batch_norm, jnorm.mean_only_batch_norm_state, {}),
}


def truth_of(name, batches, estimator):
    """In float64; what the norm takes for a batch is cut out first, and an instance norm's samples are averaged whatever the estimator."""
    weights = [DECAY ** (len(batches) - i) if estimator == "exponential" else 1 for i in range(len(batches))]
    if name == "TrackedInstanceNorm":
        samples, correction = np.concatenate(batches).astype(np.float64), int(estimator == "mean")
        weights = np.repeat(weights, [len(b) for b in batches])
        return {k: np.average(v, 0, weights) for k, v in (("mean", samples.mean(1)), ("var", samples.var(1, ddof=correction)))}
    if name == "GhostBatchNorm":
        weights = np.repeat(weights, [len(b) // GROUP for b in batches])
        batches = [b[i : i + GROUP] for b in batches for i in range(0, len(b), GROUP)]
    want = truth(batches, estimator, weights=weights)
    if name == "BatchRenorm":
        want["std"] = np.sqrt(want.pop("var") + EPSILON)
    return {"mean": want["mean"]} if name == "MeanOnlyBatchNorm" else want


def check_averages(name, state, batches, estimator):
    """Float32: a few hundred values, some tens of roundings of at most eps/2 of the largest."""
    for key, want in truth_of(name, batches, estimator).items():
        np.testing.assert_allclose(np.ravel(state[key]), want, atol=64 * 1.2e-7 * max(abs(b).max() ** 2 for b in batches), err_msg=key)


@pytest.fixture
def even(rng):
    """Batches that groups divide."""
    return stream(rng, (6, 2, 8, 4))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", [n for n, (norm, *_) in NORMS.items() if norm])
def test_functions(name, estimator, even):
    norm, make, options = NORMS[name]
    state = make(FEATURES)
    new = tools.recalibrate(jax.jit(lambda s, x: norm(x, s, **options)[1]), state, even, estimator=estimator)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    check_averages(name, new, even, estimator)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_classes(api, name, even):
    """A kernel that changes nothing makes the wrapper's input the norm's."""
    estimator, options = ESTIMATORS[len(name) % 2], NORMS[name][2]
    wraps = name == "CrossIterationBatchNorm"
    if api == "linen":
        module = getattr(jnn, name)(*[nn.Dense(FEATURES, use_bias=False)] * wraps, use_running_average=False, **options)
        variables = module.init(jax.random.key(0), even[0])
        params = variables["params"] | ({"layer_instance": {"kernel": jnp.eye(FEATURES)}} if wraps else {})
        run = jax.jit(lambda s, x: module.apply({"params": params, "batch_stats": s}, x, mutable=["batch_stats"])[1]["batch_stats"])
        new = tools.recalibrate(run, variables["batch_stats"], even, estimator=estimator)
        assert jax.tree.structure(new) == jax.tree.structure(variables["batch_stats"])
        check_averages(name, new, even, estimator)
        return
    rngs = nnx.Rngs(0)
    eye = lambda *_: jnp.eye(FEATURES)  # noqa: E731
    layer = nnx.Linear(FEATURES, FEATURES, use_bias=False, kernel_init=eye, rngs=rngs) if wraps else FEATURES
    module = getattr(jnx, name)(layer, **options, rngs=rngs)
    before = jax.tree.structure(nnx.to_pure_dict(nnx.state(module)))
    module = tools.recalibrate(nnx.jit(lambda m, x: m(x)), module, even, estimator=estimator)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(module))) == before
    check_averages(name, {k: v[...] for k, v in vars(module).items() if isinstance(v, nnx.BatchStat)}, even, estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ghost_groups_on_several_devices(estimator, even):
    """Under vmap, which is two devices here: the groups of both count."""
    start = tools.population_state(jnorm.batch_norm_state(FEATURES), estimator=estimator)
    x = even[2].reshape(2, 4, *even[2].shape[1:])
    _, states = jax.vmap(lambda x: jnorm.ghost_batch_norm(x, start, group_size=GROUP, axis_name="d"), axis_name="d")(x)
    for i in range(2):
        check_averages("GhostBatchNorm", jax.tree.map(lambda a, i=i: a[i], states), even[2:3], estimator)


def test_narrow_states_are_collected_in_float32(rng):
    """In bfloat16 the mean of a thousand batches would stop moving."""
    state = jnorm.batch_norm_state(1, dtype=jnp.bfloat16)
    batches = [np.full((4, 1), v, np.float32) for v in [0.0] * 200 + [4.0] * 200]
    new = tools.recalibrate(jax.jit(step), state, batches)
    assert float(new["mean"][0]) == 2 and float(new["var"][0]) == 4 and new["mean"].dtype == jnp.bfloat16


def test_frozen_collections_and_other_entries(even):
    """The tree comes back as it was given, with what is no state in it."""
    given = flax.core.freeze({"norm": jnorm.batch_norm_state(FEATURES), "other": {"kernel": jnp.ones(2)}})
    new = tools.recalibrate(lambda s, x: {**flax.core.unfreeze(s), "norm": step(flax.core.unfreeze(s)["norm"], x)}, given, even)
    assert isinstance(new, flax.core.FrozenDict) and new["other"]["kernel"].tolist() == [1, 1]
    check_averages("BatchNorm", new["norm"], even, "pooled")


def test_statistics_of_features_are_left_alone(even):
    given = {"norm": jnorm.batch_norm_state(FEATURES), "input": jnorm.feature_statistics(even[0], jnorm.feature_statistics_state(FEATURES))}
    new = tools.recalibrate(lambda s, x: {**s, "norm": step(s["norm"], x)}, given, even)
    jax.tree.map(np.testing.assert_array_equal, new["input"], given["input"])
