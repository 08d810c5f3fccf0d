"""How much memory the weights of a run take, known before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from moe_compose.runtime.loading import Loader
from moe_compose.runtime.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of weights that a run holds at most. Activations and logits are not counted.

    Attributes:
        layer: the largest decoder layer.
        outside: what lies outside of the layers: what stays, and the most that comes and goes.
        peak: what stays, and the larger of what comes and goes and of the layers: the one that
            runs, the one being read ahead (if it is), and a third of one on top, since experts are
            stacked from single matrices, kind after kind.
    """

    layer: int
    outside: int
    peak: int

    @classmethod
    def of(cls, skeleton: Skeleton, loader: Loader, small: int, prefetch: bool) -> Footprint:
        """The footprint of a model.

        Args:
            skeleton: its tensors by layer.
            loader: their sizes.
            small: tensors outside of the layers up to this many bytes stay.
            prefetch: whether the next layer is read while one runs.
        """
        sizes = loader.sizes
        layer = max(sum(sizes[n] for n in names) for names in skeleton.of_layer)
        outside = [sizes[n] for names in skeleton.outside.values() for n in names]
        staying = sum(s for s in outside if s <= small)
        going = sum(s for s in outside if s > small)
        layers = (2 if prefetch else 1) * layer + -(-layer // 3)
        return cls(layer, staying + going, staying + max(going, layers))
