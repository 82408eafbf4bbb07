"""What a state dict does not say: the hyperparameters of PyTorch's norms, and how its convolutions move."""

from collections.abc import Callable
from typing import Any

from ._convolutions import Convolution, convolution, differences, of_flax, reaches
from ._match import some, told
from ._norm import Norm
from ._torch import of_torch
from ._trees import ATTENTION, NORMS, Layer, Model, axes_of

_NORMS_OF = {
    "BatchNorm": ("BatchNorm",),
    "TrackedInstanceNorm": ("TrackedInstanceNorm",),
    "InstanceNorm": ("InstanceNorm",),
    "GroupNorm": ("GroupNorm",),
    "LayerNorm": ("LayerNorm", "AddLayerNorm"),
    "RMSNorm": ("RMSNorm", "AddRMSNorm"),
}
# By the name of PyTorch's class, or of one that it is derived from.
_KINDS_OF = {
    "Linear": ("Linear", "Dense"),
    **{f"Conv{n}d": ("Conv",) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": ("ConvTranspose",) for n in (1, 2, 3)},
    "Embedding": ("Embed",),
    "EmbeddingBag": ("Embed",),
    "PReLU": ("PReLU",),
    "MultiheadAttention": ATTENTION,
}


def set_norms(model: Model, source: Any, name: Callable[[str], str], paths: set[str]) -> None:
    """Sets what the source's norms have on the modules of a model; what cannot be set is refused."""
    _refuse(_problems(model, source, name, paths, set_too=True))


def compare(model: Model, source: Any, name: Callable[[str], str], paths: set[str]) -> None:
    _refuse(_problems(model, source, name, paths, set_too=False))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"the model does not do what the source does: {some(problems)}. Build it so, or pass source.state_dict() for the values alone."
        )


def _problems(model: Model, source: Any, name: Callable[[str], str], paths: set[str], set_too: bool) -> list[str]:
    modules, problems = dict(source.named_modules(remove_duplicate=False)), []
    for path, layer in model.layers.items():
        theirs = modules.get(name(layer.name))
        if path not in paths or theirs is None:
            continue  # a key is missing, which is told with all that are
        kind = type(layer.module).__name__
        if kind in NORMS:
            found = _norm_problems(layer, theirs, set_too)
        elif there := _other_kind(kind, theirs):
            found = [f"{kind} here, {there} there"]
        elif kind in ATTENTION and hasattr(theirs, "add_zero_attn"):
            found = _attention_problems(layer.module, theirs)
        elif kind in ("Conv", "ConvTranspose") and hasattr(theirs, "padding_mode"):
            found = differences(of_flax(layer.module), _convolution(theirs))
        else:
            found = []
        problems += [f"{told(path)}: {problem}" for problem in found]
    return problems


def _other_kind(kind: str, theirs: Any) -> str | None:
    """What a layer is there, if it is not the same; a class of the user's own may be anything."""
    there = next((base.__name__ for base in type(theirs).__mro__ if base.__name__ in _KINDS_OF), None)
    return None if there is None or kind in _KINDS_OF[there] else there


def _convolution(theirs: Any) -> Convolution:
    padding = theirs.padding
    if theirs.transposed:  # around the dilated x
        each = zip(reaches(theirs.kernel_size, theirs.dilation), padding, theirs.output_padding, strict=True)
        padding = [(k - 1 - p, k - 1 - p + more) for k, p, more in each]
    return convolution(theirs.kernel_size, theirs.stride, theirs.dilation, theirs.groups, padding, theirs.padding_mode)


def _attention_problems(ours: Any, theirs: Any) -> list[str]:
    problems = []
    if ours.num_heads != theirs.num_heads:
        problems.append(f"num_heads is {ours.num_heads} here, {theirs.num_heads} there")
    if theirs.add_zero_attn:
        problems.append("add_zero_attn=True there, which Flax's attention does not have")
    if theirs.bias_k is not None:
        problems.append("add_bias_kv=True there, which Flax's attention does not have")
    return problems


def _norm_problems(layer: Layer, theirs: Any, set_too: bool) -> list[str]:
    kind = type(layer.module).__name__
    try:
        norm = of_torch(theirs, ndim=3)
    except ValueError as error:
        return [str(error)]
    if norm.kind == "LayerNorm" and norm.reduction_axes and 0 in norm.reduction_axes:
        return [f"{type(theirs).__name__} without running statistics uses those of the batch always, {kind} does not"]
    return problems_of(layer, norm, type(theirs).__name__, set_too)


def problems_of(layer: Layer, norm: Norm, theirs: str, set_too: bool) -> list[str]:
    """Where a norm of the model does otherwise than that of the source, a `theirs`; what can be set is."""
    ours, kind = layer.module, type(layer.module).__name__
    if kind not in _NORMS_OF[norm.kind]:
        return [f"{kind} here, {theirs} there"]
    wanted: dict[str, Any] = {"epsilon": norm.epsilon}
    if norm.runs:
        if norm.momentum is None and not hasattr(ours, "track_count"):
            return [f"momentum=None is the cumulative average, which {type(ours).__module__.split('.')[0]}'s {kind} does not have"]
        if norm.momentum is None and not ours.track_count:
            return ["momentum=None is the cumulative average, which needs track_count=True"]
        wanted["momentum"] = norm.momentum
        if norm.running_var_correction or hasattr(ours, "running_var_correction"):  # Flax's is 0
            wanted["running_var_correction"] = norm.running_var_correction
    if norm.kind == "GroupNorm" and ours.num_groups != norm.num_groups:
        return [f"num_groups is {ours.num_groups} here, {norm.num_groups} there"]
    problems = _axes_problems(ours, norm)
    for option, value in wanted.items():
        there = hasattr(ours, option)
        if set_too and there:
            setattr(ours, option, value)
        elif not there:
            problems.append(f"{kind} of Flax updates the biased variance; jnorm's has {option}={value}")
        elif not _close(getattr(ours, option), value):
            problems.append(f"{option} is {getattr(ours, option)} here, {value} there")
    return problems


def _axes_problems(ours: Any, norm: Norm) -> list[str]:
    """Axes may count from the other end here, and what is flattened has fewer, but only where all that is reduced is a feature."""
    here, there = axes_of(ours, "reduction_axes"), norm.reduction_axes
    if here is None or there is None:
        return []
    both = all(
        set(features) == set(reduced) for features, reduced in ((axes_of(ours, "feature_axes") or (), here), (norm.feature_axes, there))
    )
    if (len(here) != len(there) and not both) or (len(here) == len(there) and max(*here, *there) < 0 and set(here) != set(there)):
        return [f"reduction_axes is {here} here, {there} there"]
    return []


def _close(a: Any, b: Any) -> bool:
    return a == b if a is None or b is None else abs(a - b) <= 1e-6 * abs(b)  # 1 - momentum is rounded
