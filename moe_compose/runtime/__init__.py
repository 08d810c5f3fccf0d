"""Running a checkpoint, or a plan that was never written, layer by layer from its tensor source.

    compat.py      transformers' semi-private functions, the only place that uses them
    skeleton.py    the class on the meta device, as slots for tensors
    loading.py     tensors on disk → tensors in memory, one layer ahead
    dequantise.py  a quantised source as the plain one it stands for
    device.py      devices that are there
    lockstep.py    one batch's forward as a coroutine
    parking.py     activations that wait, in memory or in files
    layer.py       what observers see
    footprint.py   how much memory weights take
    self_test.py   does the installed transformers load as compat.py thinks
    runner.py      all of it together
    single.py      one layer of a model by itself
    whole.py       a model whole in memory, and its tensors back to the disk

Example:
    >>> from moe_compose.runtime import Runner
    >>> runner = Runner(checkpoint)                                    # doctest: +SKIP
    >>> runner.run([ids], logits=lambda batch, logits: ...)            # doctest: +SKIP
"""

from moe_compose.runtime.footprint import Footprint
from moe_compose.runtime.layer import Batch, Layer
from moe_compose.runtime.runner import OnLayer, OnLogits, Runner

__all__ = ["Batch", "Footprint", "Layer", "OnLayer", "OnLogits", "Runner"]
