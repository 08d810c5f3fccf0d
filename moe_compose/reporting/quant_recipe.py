"""A quantisation plan as files: `quant-plan.json`, and `recipe.yaml` for llm-compressor.

Modules are named by regular expressions that hold whatever the parent of the experts and their
matrices are called: `model.layers.3.mlp.experts.7.down_proj`, as transformers 5 and llm-compressor
0.14 have it, and `model.layers.3.block_sparse_moe.experts.7.w2`, as on the disk.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from moe_compose.calibration.quantisation import LayerBits, QuantPlan
from moe_compose.checkpoint.copying import write_file
from moe_compose.errors import WriteError
from moe_compose.reporting.documents import encode

PLAN_NAME, RECIPE_NAME = "quant-plan.json", "recipe.yaml"

_MODIFIERS = {"gptq": "GPTQModifier", "rtn": "QuantizationModifier"}

_HEAD = """\
# Made by moe-compose quant-plan for {source}.
# {what}
# Sensitivity: {formula}.
#
#   from llmcompressor import oneshot
#   from llmcompressor.modeling.moe.linearize import load_quantizable_moe
#   from transformers import AutoModelForCausalLM
#
#   with load_quantizable_moe():
#       model = AutoModelForCausalLM.from_pretrained("MODEL")
#   oneshot(model=model, recipe="{name}"{data})
#   model.save_pretrained("OUT", save_compressed=True)
"""


def recipe_of(plan: QuantPlan) -> str:
    """The recipe of a plan: YAML that llm-compressor (0.14) reads, with how to use it on top.

    Only routed experts are quantised: what no group targets keeps its dtype.
    """
    options = plan.options
    groups: dict[str, Any] = {}
    for bits in (options.bits_low, options.bits_high):
        targets = [t for layer in plan.layers for t in _target(plan.stem, layer, bits)]
        if targets:
            groups[f"experts_{bits}_bits"] = {
                "targets": targets,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if plan.group_size else "channel",
                    **({"group_size": plan.group_size} if plan.group_size else {}),
                },
            }
    modifier = {_MODIFIERS[options.method]: {"ignore": ["lm_head"], "config_groups": groups}}
    text: str = yaml.safe_dump(
        {"quant_stage": {"quant_modifiers": modifier}}, sort_keys=False, width=99
    )
    data = ', dataset="TEXT"' if options.method == "gptq" else ""
    what = (
        f"{plan.count(options.bits_low)} experts at {options.bits_low} bits, "
        f"{plan.count(options.bits_high)} at {options.bits_high}: {plan.mean_bits:.2f} on average."
    )
    source = " ".join(plan.source.split())
    return (
        _HEAD.format(source=source, what=what, formula=options.formula, name=RECIPE_NAME, data=data)
        + text
    )


def _target(stem: str, layer: LayerBits, bits: int) -> list[str]:
    """The expression for a layer's experts of so many bits; none where it has none."""
    experts = [e for e, b in enumerate(layer.bits) if b == bits]
    if not experts:
        return []
    word = re.escape(stem.rpartition(".")[2])
    which = r"\d+" if len(experts) == len(layer.bits) else f"(?:{'|'.join(map(str, experts))})"
    return [rf"re:.*\b{word}\.{layer.layer}\..*\bexperts\.{which}\.\w+$"]


def check_quant_folder(folder: str | Path, *, overwrite: bool = False) -> None:
    """Whether both files may be written there; asked before anything takes long.

    Raises:
        WriteError: one of them is there.
    """
    folder = Path(folder).expanduser()
    there = [n for n in (PLAN_NAME, RECIPE_NAME) if (folder / n).exists()]
    if there and not overwrite:
        raise WriteError(f"{folder}/ has a {there[0]} already", hint="Replace it with --overwrite.")


def write_quant_plan(plan: QuantPlan, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write both files into a folder; returns it.

    Args:
        plan: what to write.
        folder: is made where it is not there.
        overwrite: replace the files that are there.

    Raises:
        WriteError: one of them is there, or they cannot be written.
    """
    folder = Path(folder).expanduser()
    check_quant_folder(folder, overwrite=overwrite)
    write_file(folder / PLAN_NAME, encode(plan.to_json()))
    write_file(folder / RECIPE_NAME, recipe_of(plan).encode())
    return folder
