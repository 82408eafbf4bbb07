"""What was folded, what not, and why."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Folding:
    """What became of one norm.

    Args:
      norm: its path.
      layer: the path of the layer that it was folded into, "" for a parameter of the model itself; None where it was kept.
      direction: "previous" or "next", where that layer is; None where it was kept.
      reason: why it was kept; empty where it was folded.
    """

    norm: str
    layer: str | None
    direction: str | None
    reason: str

    def __str__(self) -> str:
        if self.layer is None:
            return f"kept because {self.reason}"
        layer = repr(self.layer) if self.layer else "the model itself"
        return f"folded into {layer}, {'before' if self.direction == 'previous' else 'after'} it"


class Report(tuple[Folding, ...]):
    """An entry for each norm of a model; as text a table."""

    @property
    def folded(self) -> dict[str, str]:
        """The layer of each norm that was folded."""
        return {entry.norm: entry.layer for entry in self if entry.layer is not None}

    @property
    def kept(self) -> dict[str, str]:
        """Why, of each norm that was not."""
        return {entry.norm: entry.reason for entry in self if entry.layer is None}

    def __str__(self) -> str:
        width = max((len(entry.norm) for entry in self), default=0)
        lines = [f"{entry.norm:<{width}}  {entry}" for entry in self]
        return "\n".join([f"{len(self.folded)} of {len(self)} norms folded", *lines])
