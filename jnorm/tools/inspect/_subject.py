"""What is looked at, in one form: a tree of states, and functions of it; whether the model is one of NNX or not."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ... import nnx as jnx
from ..._pipeline.marks import STATISTICS
from .._layers import NORMS_NNX, RUNNING_NNX, is_state, nnx_norms, path_text
from .._nnx_states import read_states, write_states
from ._variables import check_prefix, of_variables

_APART = (jnx.GhostBatchNorm, jnx.TrackedInstanceNorm)
MOMENTUM = 0.9  # where none is told: of the usual ones that with the most noise in its averages


class Subject(NamedTuple):
    state: Any  # the tree
    step: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Any] | None  # both compiled, of a tree and a batch
    paths: list[str]  # of all norms
    running: Mapping[str, Mapping[str, Any]]  # the states in the tree
    scales: dict[str, np.ndarray]
    kinds: dict[str, str]
    epsilons: dict[str, float]
    momentums: dict[str, float | None]
    called: Mapping[str, int] = {}  # the modules as a trace of the step calls them, and how many examples each gets
    group_sizes: Mapping[str, int | None] = {}  # of those that do not normalize a whole batch together; None: each example by itself
    # The loss with the norms at some paths in training mode, and the state after it: where the modules are known.
    training_loss: Callable[[list[str]], Callable[[Any, Any], Any]] | None = None

    def memory(self, path: str) -> tuple[float | None, float]:
        """How many batches the running average remembers, if that is known; and its variance, in those of a single batch."""
        if "count" in self.running[path]:
            count = max(float(np.max(self.running[path]["count"])), 1.0)
            return count, 1 / count
        momentum = self.momentums[path]
        known = momentum is not None and momentum < 1
        kept = min(max(momentum, 0.0), 1.0) if momentum is not None else MOMENTUM
        return 1 / (1 - momentum) if known and momentum is not None else None, (1 - kept) / (1 + kept)

    def groups(self, path: str) -> int | None:
        """How many parts of a batch are normalized by themselves, as far as that is known; None: it is each example."""
        if path not in self.group_sizes:
            return 1
        size = self.group_sizes[path]
        return None if size is None else max(-(-self.called.get(path, size) // size), 1)


def of_tree(step: Any, state: Any, loss: Any, params: Any, epsilon: float, momentum: float | None) -> Subject:
    step, state, loss, params = of_variables(jax.jit(step), state, None if loss is None else jax.jit(loss), params)
    running = {path_text(p): node for p, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state) if is_state(node)}
    scales = _scales(params)
    for path in running.keys() & scales.keys():
        _check_shape(path, scales[path], running[path])
    check_prefix(running, scales)
    if not running and not scales:
        raise ValueError(
            "there are no norms: no running statistics, such as a dict of 'mean' and 'var', in the state, and no 'scale' in params."
        )
    arrays = jax.tree.map(jnp.asarray, state)
    return Subject(
        arrays,
        step,
        loss,
        list(dict.fromkeys([*running, *scales])),
        running,
        scales,
        {},
        # A state of standard deviations has epsilon in it.
        {path: 0.0 if "std" in node else epsilon for path, node in running.items()},
        dict.fromkeys(running, momentum),
    )


def _scales(params: Any) -> dict[str, np.ndarray]:
    """Of what has a scale beside nothing but a bias: a layer's weights would be there too."""
    found: dict[str, np.ndarray] = {}

    def is_affine(node: Any) -> bool:
        return isinstance(node, Mapping) and "scale" in node and set(node) <= {"scale", "bias"}

    for path, node in jax.tree_util.tree_leaves_with_path({} if params is None else params, is_leaf=is_affine):
        if is_affine(node):
            found[path_text(path)] = np.asarray(jax.tree.leaves(node["scale"])[0])
    return found


def _check_shape(path: str, scale: np.ndarray, state: Mapping[str, Any]) -> None:
    if scale.size != np.size(state["mean"]):
        raise ValueError(
            f"the scale of {path!r} has the shape {scale.shape}, and its running mean {np.shape(state['mean'])}: are params of this model?"
        )


# --- NNX --------------------------------------------------------------------------------------------------------------------


def of_module(step: Any, model: nnx.Module, loss: Any, params: Any, epsilon: float, momentum: float | None) -> Subject:
    if params is not None:
        raise ValueError("params are for a state; an NNX model has its own.")
    norms = nnx_norms(model, NORMS_NNX)
    classes = (*RUNNING_NNX, nnx.BatchNorm)
    with_state = {path: norm for path, norm in norms.items() if isinstance(norm, classes)}
    training, evaluating = nnx.clone(model), nnx.clone(model)
    training.eval()
    evaluating.eval()
    for norm in nnx_norms(training, NORMS_NNX).values():
        if isinstance(norm, classes):
            norm.use_running_average = False

    called: dict[str, int] = {}

    def training_loss(paths: list[str]) -> Callable[[Any, Any], Any]:
        some = nnx.clone(evaluating)
        for path, norm in nnx_norms(some, NORMS_NNX).items():
            if path in paths:
                norm.use_running_average = False
        return _on_copy(loss, some)

    state = read_states(with_state)
    scales = {path: np.asarray(norm.scale[...]) for path, norm in norms.items() if getattr(norm, "scale", None) is not None}
    return Subject(
        state,
        _on_copy(_noting(step, called), training, returns=1),
        None if loss is None else _on_copy(loss, evaluating, returns=0),
        list(norms),
        state,
        scales,
        {path: type(norm).__name__ for path, norm in norms.items()},
        {path: 0.0 if "std" in state[path] else float(getattr(norm, "epsilon", 0.0)) for path, norm in with_state.items()},
        {path: momentum if norm.momentum is None else float(norm.momentum) for path, norm in with_state.items()},
        called,
        {path: getattr(norm, "group_size", None) for path, norm in norms.items() if isinstance(norm, _APART)},
        None if loss is None else training_loss,
    )


def _on_copy(function: Any, model: nnx.Module, returns: int | None = None) -> Callable[[Any, Any], Any]:
    """As a function of a tree of states and a batch, to the result and the state after it, or to one of them.

    The other arrays are arguments: as constants they would be compiled in.
    """
    definition, arrays = nnx.split(model)

    @jax.jit
    def run(arrays: Any, state: Any, batch: Any) -> Any:
        copy = nnx.merge(definition, arrays)
        norms = nnx_norms(copy)
        write_states(norms, state)
        result = function(copy, batch)
        both = result, read_states({path: norms[path] for path in state})
        return both if returns is None else both[returns]

    return lambda state, batch: run(arrays, state, batch)


def _noting(step: Any, called: dict[str, int]) -> Any:
    """The step of a copy, whose norms note their calls: of classes made here, which no cache of what the step compiles has seen."""
    made: dict[type, type] = {}

    def noting(cls: type) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            shape = jnp.shape((*args, *kwargs.values())[0])
            called.setdefault(self.inspected_path, shape[0] if shape else 1)
            return cls.__call__(self, *args, **kwargs)

        return made.setdefault(cls, type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__}))

    def run(copy: Any, batch: Any) -> Any:
        for path, norm in nnx_norms(copy, NORMS_NNX).items():
            norm.inspected_path = path
            object.__setattr__(norm, "__class__", noting(type(norm)))
        return step(copy, batch)

    return run


def in_order(subject: Subject, paths: list[str], batch: Any) -> list[str]:
    """As a step calls them, and then what it does not call; of a tree as they lie in it."""
    if subject.kinds:
        jax.eval_shape(subject.step, subject.state, batch)  # what is traced here is what runs
    order = {path: i for i, path in enumerate(subject.called)}
    return sorted(paths, key=lambda path: order.get(path, len(order)))


def is_frozen(state: Mapping[str, Any]) -> bool:
    """Its running statistics normalize in training too."""
    return STATISTICS in state
