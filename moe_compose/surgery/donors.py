"""Donors: where an expert comes from, when it is not made of the model's own.

PATH            a dense model of the family: its FFNs; a packed expert; of a mixture of two, the
                second (anchor and trainable expert, as FlexOlmo and BAR train them)
PATH#law        an expert of a mixture, by name or number
copy:3          an expert of the model that receives it
ADAPTER         a LoRA adapter (a PEFT folder) on the model that receives the expert
X+ADAPTER       any of the first three with a LoRA adapter on it

PATH and ADAPTER are folders, or `org/name@revision` on the Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_compose.architectures import Architecture, find
from moe_compose.architectures.parts import layout_of
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, OptionError, UnsupportedError
from moe_compose.surgery.expert_names import index_of
from moe_compose.surgery.ffn import FFN, read_expert, read_ffn
from moe_compose.surgery.lora import Adapter, is_adapter
from moe_compose.surgery.transforms import Read, Transform

#: Before an expert of the model itself.
COPY = "copy:"


@dataclass(frozen=True)
class Donor:
    """Where an expert comes from.

    Attributes:
        label: what it is called, for records and messages.
        source: a dense checkpoint, an MoE, or a packed expert; None: the model that receives it.
        expert: of an MoE, which one, by number or name; None: the only one that can be meant.
        adapter: a LoRA adapter put on it.
    """

    label: str
    source: TensorSource | None = None
    expert: str | int | None = None
    adapter: Adapter | None = None

    @classmethod
    def parse(
        cls, text: str, open_source: Callable[[str], TensorSource] = Checkpoint.open
    ) -> Donor:
        """What a command line means.

        Args:
            text: see the module.
            open_source: opens a checkpoint by its path or name.

        Raises:
            OptionError: it means nothing.
            CheckpointError: there is no such checkpoint, or a damaged one.
        """
        label, adapter = text.strip(), None
        if is_adapter(Path(label).expanduser()):
            return cls._adapted(label)
        head, plus, tail = label.rpartition("+")
        if plus and (is_adapter(Path(tail).expanduser()) or not Path(label).expanduser().exists()):
            label, adapter = head, _behind_plus(tail)
        if not label or label == COPY:
            raise OptionError(f"{text!r} names no expert", hint="Write PATH, PATH#3, or copy:3.")
        shown = label if adapter is None else f"{label}+{adapter.label}"
        if label.startswith(COPY):
            return cls(shown, None, label.removeprefix(COPY), adapter)
        path, mark, expert = label.rpartition("#")
        if not mark:
            path, expert = label, ""
        try:
            source = open_source(path)
        except CheckpointError as error:
            if mark or adapter is not None:
                raise
            try:
                return cls._adapted(path)
            except CheckpointError:
                raise error from None  # no adapter either
        named = "".join((source.label, mark, expert, *(["+", adapter.label] if adapter else [])))
        return cls(named, source, expert or None, adapter)

    @classmethod
    def _adapted(cls, path: str) -> Donor:
        """The model that receives the expert, with an adapter on it."""
        adapter = Adapter.open(path)
        return cls(adapter.label, adapter=adapter)


def _behind_plus(path: str) -> Adapter:
    """The adapter of MODEL+ADAPTER."""
    if "/" not in path and not Path(path).expanduser().is_dir():
        raise OptionError(
            f"{path} holds no LoRA adapter (adapter_config.json)",
            hint="MODEL+ADAPTER takes a PEFT folder, or its name on the Hub, behind the plus.",
        )
    return Adapter.open(path)


@dataclass(frozen=True)
class Giver:
    """A donor on whom a plan can draw.

    Attributes:
        key: the plan's word for its source; the adapter's is `key+lora`.
        source: of the tensors.
        form: its family's form, in the layout that it has.
        expert: of an MoE, which; None: a dense model.
        adapter: put on it, if any.
    """

    key: str
    source: TensorSource
    form: Architecture
    expert: int | None
    adapter: Adapter | None

    @classmethod
    def of(cls, donor: Donor, key: str, receiver: TensorSource) -> Giver:
        """A donor made ready.

        Args:
            donor: where the expert comes from.
            key: the plan's word for it.
            receiver: the model that gets it, for donors that mean the model itself.

        Raises:
            UnsupportedError: a family that is not known, or experts that can only be counted.
            OptionError: no such expert, or several could be meant.
        """
        source = receiver if donor.source is None else donor.source
        form = find(source.config)
        if form is None:
            raise UnsupportedError(
                f"{donor.label} is of a family that is not known here "
                f"({source.config.get('model_type')!r})",
                hint="moe-compose ls architectures lists them.",
            )
        form = form.of(source.config)
        if donor.adapter is not None and (lost := donor.adapter.missing(source.tensors)):
            raise UnsupportedError(
                f"{donor.adapter.label} is for another model: {source.label} has no {lost[0]}"
                + (f", nor {len(lost) - 1} more modules that it changes" if lost[1:] else ""),
                hint="An adapter goes on the model it was trained on.",
            )
        if not form.is_moe or not form.moe(source.config).sparse_layers:
            if donor.expert is not None:
                raise OptionError(f"{donor.label} is a dense model: it has no experts to name")
            return cls(key, source, form, None, donor.adapter)
        if form.read_only:
            raise UnsupportedError(f"experts of {donor.label} cannot be taken: {form.read_only}")
        count = form.moe(source.config).num_experts
        if donor.expert is None and count > 2:
            raise OptionError(
                f"{donor.label} has {count} experts: say which",
                hint=f"Write {donor.label}#0 to {donor.label}#{count - 1}, or #NAME.",
            )
        expert = count - 1 if donor.expert is None else index_of(source.config, count, donor.expert)
        return cls(key, source, layout_of(form, source.tensors), expert, donor.adapter)

    @property
    def sources(self) -> dict[str, TensorSource]:
        """Everything that it reads from, under the plan's words."""
        found: dict[str, TensorSource] = {self.key: self.source}
        if self.adapter is not None:
            found[f"{self.key}+lora"] = self.adapter
        return found

    def read(self, read: Read) -> Transform:
        """A tensor with the adapter on it."""
        if self.adapter is None:
            return read
        return self.adapter.applied(read.tensor.name, read, f"{self.key}+lora")

    def ffn(self, layer: int) -> FFN:
        """The expert's three matrices in a layer.

        Raises:
            CheckpointError: one is missing, or has not the size that the config states.
            UnsupportedError: experts that are not three plain matrices, or an adapter on stacked
                ones.
        """
        if self.expert is None:
            return read_ffn(self.source, self.form, layer, self.key, self.read)
        assert self.form.experts is not None
        if self.adapter is not None and self.form.experts.stacked:
            raise UnsupportedError(
                f"{self.source.label} stores its experts in one tensor: no adapter fits one of them"
            )
        return read_expert(self.source, self.form, layer, self.expert, self.key, self.read)
