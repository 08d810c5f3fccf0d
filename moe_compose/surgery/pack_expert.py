"""Pack one expert as a small checkpoint of its own: to be sent to somebody who has the base.

It is an MoE of one expert, without anything that experts share: the expert's tensors in the
family's own layout and dtypes, its router rows, and a config that says what it is made for. No
text, and nothing of the other experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures import Architecture, MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.expert_names import index_of, names_of, set_names
from moe_compose.surgery.indices import Rows
from moe_compose.surgery.plan import OutputTensor, Plan, Preservation
from moe_compose.surgery.roles import Role, Roles
from moe_compose.surgery.selected_config import with_count, with_top_k
from moe_compose.surgery.selection import moe_form
from moe_compose.surgery.shared_tensors import natural
from moe_compose.surgery.transforms import Read, Take, Transform

#: What an artifact is, beside its tensors.
ARTIFACT_NAME = "expert.json"

#: Raised when an artifact comes to mean something else.
FORMAT = 1


def pack_expert(
    source: TensorSource, expert: str | int, about: Mapping[str, Any] | None = None
) -> Plan:
    """Plan an artifact of one expert. Reads no weights.

    Args:
        source: an MoE, or a plan of one.
        expert: by name or number.
        about: what else its `expert.json` says.

    Returns:
        A plan of a checkpoint that no engine runs: it has no shared tensors.

    Raises:
        OptionError: there is no such expert.
        UnsupportedError: experts of this family cannot be selected, or it lacks tensors of it.
    """
    form, moe = moe_form(source)
    index = index_of(source.config, moe.num_experts, expert)
    name = names_of(source.config, moe.num_experts)[index]
    config = with_top_k(with_count(source.config, form, 1), form, 1)
    config.pop("quantization_config", None)
    set_names(config, [name])
    outputs = [
        OutputTensor(new, value)
        for info in source.tensors.values()
        for new, value in _packed(Read("source", info), form, moe, index)
    ]
    if not outputs:
        raise UnsupportedError(f"no tensor of {source.label} belongs to expert {index}")
    used = {r.tensor.name for o in outputs for r in o.value.leaves()}
    said = {
        "format": FORMAT,
        "name": name,
        "family": form.model_type,
        "layers": list(moe.sparse_layers),
        "expert_width": moe.expert_width,
        "hidden_size": moe.hidden,
        "experts_of_origin": moe.num_experts,
        **(about or {}),
    }
    return Plan(
        operation="pack-expert",
        options={"expert": str(expert)},
        config=config,
        outputs=tuple(sorted(outputs, key=lambda o: natural(o.name))),
        sources={"source": source},
        preservation=Preservation("none", f"one expert of {source.label}, and nothing it shares"),
        dropped={f"source:{n}": "not of this expert" for n in source.tensors if n not in used},
        notes=("an artifact for moe-compose add-expert and swap-expert; no engine runs it",),
        decided={"expert": index},
        reports={ARTIFACT_NAME: said},
    )


def _packed(read: Read, form: Architecture, moe: MoE, expert: int) -> list[tuple[str, Transform]]:
    """What an artifact has of one tensor: nothing, or one."""
    roles = Roles(form)
    role = roles.of(read.tensor.name)
    if role is None or role.block not in {roles.block(i) for i in moe.sparse_layers}:
        return []
    if role.kind == "expert":
        return [(role.renamed(0), read)] if role.expert == expert else []
    value = _rows(read, role, moe, expert)
    return [] if value is None else [(read.tensor.name, value)]


def _rows(read: Read, role: Role, moe: MoE, expert: int) -> Transform | None:
    """The expert's rows of a tensor that has some for each."""
    line, shape = role.router, read.tensor.shape
    dim = line.dim if line is not None else 0
    if line is not None and line.kind in ("other", "table"):
        return None
    if len(shape) <= dim or (shape[dim] % moe.num_experts and line is None):
        return None
    each = shape[dim] // moe.num_experts if line is None else 1
    return Take(read, Rows(expert * each, (expert + 1) * each), dim)
