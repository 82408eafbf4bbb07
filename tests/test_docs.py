"""The documentation: the code of every page runs as it stands and does what it says, and every public name is on a page of the API."""

import contextlib
import functools
import importlib
import io
import re
import textwrap
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jnorm

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if "_build" not in p.relative_to(DOCS).parts)
MODULES = ["jnorm", "jnorm.reparam", "jnorm.linen", "jnorm.nnx", "jnorm.typing"]
MODULES += ["jnorm.tools", "jnorm.tools.convert", "jnorm.tools.inspect"]
# What a page needs that not every environment has.
OPTIONAL = ("torch", "keras", "haiku", "equinox")


def text_of(page):
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page):
    """The Python blocks of a page, each with the number of lines before it."""
    for block in re.finditer(r"^( *)```python\n(.*?)^ *```$", text_of(page), re.M | re.S):
        yield text_of(page)[: block.start(2)].count("\n"), textwrap.dedent(block[2])


@functools.cache
def run(page):
    """The names that a page's blocks define, run in order in one namespace; a traceback shows the lines of the page."""
    names = {"__name__": "__docs__"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line, code in blocks(page):
            exec(compile("\n" * line + code, str(DOCS / page), "exec"), names)
    return names | {"printed": printed.getvalue().splitlines()}


def differ(a, b):
    return max(float(abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))])
def test_code_runs(page):
    skip_without_packages(page)
    run(page)


def skip_without_packages(page):
    for name in OPTIONAL:
        if any(re.search(rf"^(import|from) {name}\b", code, re.M) for _, code in blocks(page)):
            pytest.importorskip(name)


def test_porting():
    skip_without_packages("guide/porting.md")
    names = run("guide/porting.md")
    # Two layers of sums of at most 128 numbers of order one.
    assert names["difference"] < 128 * 2**-24
    assert "Missing: 'head.weight' (of head; like 'fc.weight'" in names["told"]
    assert names["again"].momentum == pytest.approx(0.2)


def test_guides_have_code():
    assert not [p for p in PAGES if p.startswith("guide/") and not any(blocks(p))]


def test_training_loop():
    names = run("guide/training_loop.md")
    assert names["continued"] == names["after_restart"]
    assert names["frozen"] is names["state"] and names["same"] is names["state"]
    assert (names["moved"]["mean"] != names["state"]["mean"]).all()
    fixed = names["partly"].update(names["params"], names["partly"].init(names["params"]), names["params"])[0]
    assert not np.any(fixed["scale"]) and np.any(fixed["w"])
    # A debiased and a cumulative average of one batch are its mean: a sum of 32 rounding errors and a division.
    mean = np.asarray(names["hidden"], np.float64).mean(0)
    for state in (names["debiased"], names["average"]):
        np.testing.assert_allclose(state["mean"], mean, rtol=40 * 2.0**-24)


def test_training_loop_trains_in_each_way():
    names = run("guide/training_loop.md")
    untrained = np.mean(np.asarray(names["target"], np.float64) ** 2)  # of an output of 0
    for loss in (names["values"][-1], names["linen_value"], names["nnx_value"]):
        assert loss < untrained
    assert names["network"].norm.use_running_average is True


def test_recalibration():
    """What the page says of its errors, the mean squares of 1024 numbers."""
    names = run("guide/recalibration.md")
    of = lambda key, data="test": float(names["error"](names[key], names[data]))  # noqa: E731
    again = jnorm.tools.recalibrate(names["step"], names["averaged"], names["batches"])
    assert of("pooled") < of("trained") and float(names["error"](again, names["test"])) < 0.8 * of("averaged")
    assert of("adapted", "shifted") < 0.5 * of("settled", "shifted")
    new, some, all_of_few = (float(line.split()[1]) for line in names["printed"] if line.split()[0] in ("0", "16", "256"))
    assert some < min(new, all_of_few)
    assert names["printed"].count("True") == 3  # what is printed as a claim


def test_devices_give_the_answer_of_one():
    """Rounding of sums over 32 values: x is near 5, and y below 4."""
    names = run("guide/devices.md")
    eps, n = 2.0**-24, 32
    assert abs(names["y_one"]).max() < 4
    local = jax.pmap(names["local"], axis_name="data", in_axes=(0, None, None, None))
    y, state = local(names["shards"], names["state"], names["scale"], names["bias"])
    assert differ(y.reshape(n, 4), names["y_one"]) < 4 * (n + 16) * eps
    assert differ(jax.tree.map(lambda v: v[0], state), names["state_one"]) < 5 * (n + 16) * eps
    # The gradient of scale is the sum of 3·y³; on one device it is neither that of a shard nor eight times itself.
    whole = 3 * (np.asarray(names["y_one"], np.float64) ** 3).sum(0)
    for gradient in (names["by_jax"], names["by_hand"]):
        assert differ(gradient, whole) < 3 * n * 4**3 * (n + 16) * eps
    assert differ(names["updates"]["batch_stats"], jax.tree.map(np.asarray, names["state_one"])) < 5 * (n + 16) * eps


def test_devices_make_states_one():
    """Of a single batch the statistics of all its rows; a mean of the states lacks what lies between devices, (64 - 1) / 12 = 5.25."""
    names = run("guide/devices.md")
    rows = np.asarray(names["of_classes"], np.float64)
    for key, want in (("mean", rows.mean(0)), ("var", rows.var(0))):
        np.testing.assert_allclose(names["of_all"][key], want, rtol=64 * 2.0**-24)
    assert abs(names["of_all"]["var"] - names["mean_of_states"]["var"] - 5.25).max() < 3
    assert differ(names["of_stacked"], names["of_replicated"]) < 2.0**-20


def test_devices_train_fully_sharded():
    """Sums of at most 128 terms below 1, in a gradient that moves by a tenth; and rows of 32 and 64, whose sums are below 8."""
    names = run("guide/devices.md")
    assert differ(names["moved"], names["moved_on_one"]) < 0.1 * (128 + 16) * 2.0**-24
    assert differ(names["moved"], names["w"]) > 1e-3
    assert names["moved"]["up"].sharding.shard_shape((32, 64)) == (16, 16)
    assert differ(names["y_by_hand"], names["mlp"](names["w"], names["tokens"])) < 8 * (64 + 16) * 2.0**-24


def test_devices_count_the_rows_of_an_uneven_batch():
    names = run("guide/devices.md")
    mean = np.asarray(names["odd"], np.float64).mean(0)
    np.testing.assert_allclose(names["state_padded"]["mean"], 0.01 * mean, rtol=48 * 2.0**-24)
    assert differ(names["y_padded"][:29], names["y_odd"]) < 4 * 48 * 2.0**-24


def test_devices_merge_a_large_batch_by_counts():
    """The numbers of the page; and gradients of 29 rows, whose loss is of y³: sums of 29 terms, of which y³ is below 64."""
    names = run("guide/devices.md")
    np.testing.assert_allclose(names["merged"]["mean"].ravel(), 5, rtol=2.0**-20)
    np.testing.assert_allclose(names["merged"]["var"].ravel(), 8, rtol=2.0**-20)
    y = np.asarray(names["odd"], np.float64)
    y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
    for got, want in zip(names["of_parameters"], (3 * (y**3).mean(0), 3 * (y**2).mean(0)), strict=True):
        assert differ(got[0], want) < 3 * 64 * (29 + 16) * 2.0**-24


def test_accumulation_prints_what_the_page_says():
    printed = run("guide/accumulation.md")["printed"]
    for line in ("0.53", "3.98", "1.0", "0.28 0.42", "8 rows: 0.53, 0.48 with CmBN", "2 rows: 1.77, 0.68 with CmBN"):
        assert line in printed and line in text_of("guide/accumulation.md"), line
    # Of MultiSteps, commit once in both styles, ghost batches, several norms and devices; of the exact gradient and state.
    assert printed.count("True") == 6 and "True True" in printed and len(printed) == 13


def test_fine_tuning_prints_what_the_page_says():
    printed = run("guide/fine_tuning.md")["printed"]
    said = re.findall(r"^print\(.*# ((?:True|False)[ TrueFals]*)", text_of("guide/fine_tuning.md"), re.M)
    assert said == [line for line in printed if line.startswith(("True", "False"))]
    assert printed[4] == "{'bias': False, 'scale': False} {'bias': True, 'scale': True}" and len(printed) == 12


def test_weights_start_from_data_and_fold():
    """Sums of 64 numbers, which two layers of 8 and 16 terms, a few deviations large, made from the parameters anew."""
    names = run("api/weights.md")
    for y in (np.asarray(names[k], np.float64) for k in ("linen_y", "nnx_y", "y")):
        np.testing.assert_allclose(y.std(0), 1, atol=8 * (64 + 8 + 16) * 2.0**-24)
        np.testing.assert_allclose(y.mean(0), 0, atol=8 * (64 + 8 + 16) * 2.0**-24)
    np.testing.assert_array_equal(names["plain"](names["batch"]), names["nnx_net"].first(names["batch"]))


def test_numerics():
    names = run("guide/numerics.md")
    assert names["after"] == names["before"] and differ(names["y"], np.full((4, 1), 0.25)) < 1e-5
    assert names["stats"].var == 1.25
    assert names["printed"][0].startswith("[1.25]") and names["printed"][0] != "[1.25] [1.25]"
    assert "bfloat16 float32" in names["printed"]


def test_checkpointing_prints_what_the_page_says():
    names = run("guide/checkpointing.md")
    for line in ("65536 66176", "bf16[32,64,16] from the argument x"):
        assert line in names["printed"] and line in text_of("guide/checkpointing.md")
    if flax.__version__ == "0.12.8":
        assert "426368" in names["printed"]
    assert names["printed"].count("True") == 2
    # The first update moves the mean by half the way: a division by 32 and a product.
    half = 0.5 * np.asarray(names["x"], np.float64).mean(0)
    np.testing.assert_allclose(names["layer"].mean[...], half, atol=48 * 2.0**-24)


def kept_rows():
    """What the rows of the table measure: a function of jnorm and one of Flax, of x, scale and bias (RMS norm has no bias)."""

    def flax(layer, x, *affine):
        return layer.apply({"params": dict(zip(("scale", "bias"), affine, strict=False))}, x)

    return {
        "layer norm": (jnorm.layer_norm, functools.partial(flax, nn.LayerNorm())),
        "RMS norm": (jnorm.rms_norm, functools.partial(flax, nn.RMSNorm())),
        "group norm, 4 groups": (functools.partial(jnorm.group_norm, num_groups=4), functools.partial(flax, nn.GroupNorm(num_groups=4))),
        "instance norm": (jnorm.instance_norm, functools.partial(flax, nn.InstanceNorm())),
    }


def kept(function, *arguments):
    """The page's `kept` by shapes alone: nothing is compiled."""
    shapes = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments)
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes))


@pytest.mark.parametrize("row", kept_rows())
def test_checkpointing_table(row):
    cells = re.search(rf"^\| {row} \| ([\d,]+) \| ([\d,]+) \|$", text_of("guide/checkpointing.md"), re.M).groups()
    printed = [int(cell.replace(",", "")) for cell in cells]
    x = jnp.ones((32, 64, 16), jnp.bfloat16)
    affine = [jnp.ones(16), jnp.zeros(16)][: 1 if row == "RMS norm" else 2]
    with jax.numpy_dtype_promotion("standard"):  # for Flax
        ours, theirs = (kept(f, x, *affine) for f in kept_rows()[row])
    assert ours == printed[0]
    assert theirs == printed[1] or flax.__version__ != "0.12.8"


def test_own_norm_is_differentiated_right():
    names = run("guide/own_norm.md")
    theirs = jax.grad(names["plain"], argnums=(0, 1, 2))(names["x"], names["power"], names["bias"])
    for a, b in zip(names["gradients"], theirs, strict=True):
        assert differ(a, b) < 1e-5 * float(abs(b).max())
    plain_hessian = jax.hessian(names["plain"], argnums=1)(names["x"], names["power"], names["bias"])
    assert differ(names["hessian_of_power"], plain_hessian) < 1e-4 * float(abs(plain_hessian).max())


def test_coming_from_flax():
    names = run("guide/coming_from.md")
    assert differ(names["y_theirs"], names["y_ours"]) < 1e-5


@functools.cache
def documented():
    """Every name that a directive of an API page documents."""
    found = [re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)(?:\(\))?$", text_of(p), re.M) for p in PAGES if p.startswith("api/")]
    return sum(found, [])


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(module):
    there = importlib.import_module(module)
    names = [n for n in there.__all__ if not hasattr(getattr(there, n), "__path__")]
    assert not [n for n in names if f"{module}.{n}" not in documented()]


def test_what_is_documented_is_public_and_once():
    public = {f"{m}.{n}" for m in MODULES for n in importlib.import_module(m).__all__}
    assert set(documented()) <= public
    assert len(documented()) == len(set(documented()))


def test_every_page_is_in_the_table_of_contents():
    tree = re.findall(r"^((?:guide|api)/\w+|benchmarks|norm_tables)$", text_of("index.md"), re.M)
    assert sorted(f"{p}.md" for p in tree) == [p for p in PAGES if p != "index.md"]
