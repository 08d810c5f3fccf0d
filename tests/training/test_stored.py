"""From memory back to the disk: every tensor that a class is given, in the layouts that families
have there.

pytest tests/training/test_stored.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_compose.runtime.whole import Whole

#: One by one and stacked on disk, fused, transposed, interleaved, flat, renamed, with leading ones.
FAMILIES = (
    *("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "dbrx", "llama4_text", "ernie4_5_moe"),
    *("jamba", "nemotron_h", "longcat_flash", "deepseek_v4", "aria_text", "phimoe", "zaya"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tiny: Any, family: str) -> None:
    source = tiny(family)
    whole = Whole(source, dtype="float32")
    weights = [name for name, t in whole.tensors().items() if t.is_floating_point()]
    values = {name: whole.exact(name) for name in weights}
    found: set[str] = set()
    for part in whole.stored(values, {}):
        assert not part.rows
        for name, tensor in part.tensors.items():
            assert torch.equal(tensor, source.read(name)), name
            assert tensor.dtype == source.read(name).dtype
            found.add(name)
    tables = {name for name, info in source.tensors.items() if info.dtype == "I64"}
    assert found == set(source.tensors) - set(whole._loader.unused) - tables


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_rows_find_their_tensors(tiny: Any, family: str) -> None:
    """One expert's rows, doubled: nothing but its values on disk is touched."""
    source = tiny(family)
    whole = Whole(source, dtype="float32")
    name = next(n for n in whole.tensors() if ("layers.1" in n and "down" in n) or "mlp.w2" in n)
    each = whole.exact(name).shape[0] // 6
    rows = tuple(range(2 * each, 3 * each))
    (part,) = whole.stored({name: 2 * whole.exact(name)[list(rows)]}, {name: rows})
    (on_disk,) = part.tensors
    old, new = source.read(on_disk), part.tensors[on_disk]
    if part.rows:
        assert part.rows[on_disk] == rows
        assert torch.equal(new, 2 * old[list(rows)])
    else:
        assert ".2." in on_disk and torch.equal(new, 2 * old)
