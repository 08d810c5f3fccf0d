"""What lies in an output folder already, seen from what is to be written there.

Three intentions, and no guessing between them. A plain write takes an empty or new folder. `resume`
continues what this same plan began there: complete shards stay, as their header is the expected one
to the byte and their size is right. `overwrite` replaces a checkpoint, and nothing that does not
look like one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from moe_compose.checkpoint.copying import PART_SUFFIX, part_of
from moe_compose.checkpoint.destination import Destination
from moe_compose.checkpoint.folder import CONFIG_NAME, INDEX_NAME, TEMPLATE_FOLDER
from moe_compose.checkpoint.sharding import DIGEST_KEY, Shard
from moe_compose.checkpoint.write_state import STATE_NAME, WriteState, read_state
from moe_compose.errors import WriteError

WEIGHTS_SUFFIX = ".safetensors"

#: What belongs to a checkpoint beside weights and config: with another one's it is served wrongly,
#: and nobody is told.
_BELONGING = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "sentencepiece*.model", "tekken.json", "*.tiktoken"),
    *("generation_config.json", "chat_template.*", f"{TEMPLATE_FOLDER}/*"),
    *("moe_compose.json", "validation.json"),
)

EITHER_HINT = "Continue with --resume, or start again with --overwrite."
ELSEWHERE_HINT = "Give another folder, or replace what is there with --overwrite."


class Found:
    """What lies in the folder of a destination.

    Args:
        wanted: the write as it would be in an empty folder.
        carried: names of files that travel along with the weights.
    """

    def __init__(self, wanted: Destination, carried: frozenset[str]) -> None:
        self.wanted = wanted
        self.carried = carried
        self.folder = wanted.folder
        self.digest = wanted.state.digest
        self.state = read_state(self.folder)
        own = {part_of(Path(STATE_NAME)).name, *([] if self.state else [STATE_NAME])}
        try:
            self.names = sorted(set(os.listdir(self.folder)) - own)
        except FileNotFoundError:
            self.names = []
        weights = [n for n in self.names if n.endswith(WEIGHTS_SUFFIX) and n not in carried]
        self.digests = {name: _digest_in(self.folder / name) for name in weights}
        self.complete = frozenset(s.name for s in wanted.shards if _is_complete(self.folder, s))

    @property
    def is_checkpoint(self) -> bool:
        """Whether it looks like a checkpoint, or like a write of ours that did not finish."""
        endings = (WEIGHTS_SUFFIX, WEIGHTS_SUFFIX + PART_SUFFIX)
        return any(n in (CONFIG_NAME, STATE_NAME) or n.endswith(endings) for n in self.names)

    @property
    def is_finished(self) -> bool:
        if self.state or len(self.complete) < len(self.wanted.shards):
            return False
        index = self.folder / INDEX_NAME
        return CONFIG_NAME in self.names and (
            self.wanted.index is None
            or (index.is_file() and index.read_bytes() == self.wanted.index)
        )

    def refuse_unless_empty(self) -> None:
        """Raise, with the reason and the ways on, if anything is there."""
        if not self.names:
            return
        here, total = len(self.complete), len(self.wanted.shards)
        same = bool(self.complete) or (self.state and self.state.digest == self.digest)
        if self.is_finished:
            what = f"the finished checkpoint of the same plan, digest {self.digest[:8]}"
            hint = "Nothing is left to do: --resume accepts it, --overwrite writes it again."
        elif same:
            what = f"{here} of {total} shards of the same plan, digest {self.digest[:8]}"
            hint = EITHER_HINT
        elif self.is_checkpoint:
            what, hint = self._other(), ELSEWHERE_HINT
        else:
            what, hint = _listed(self.names), "Give a new or empty folder."
        raise WriteError(f"{self.folder}/ is not empty ({what})", hint=hint)

    def overwritten(self) -> tuple[str, ...]:
        """The files to remove, the index first: what is left then is no checkpoint any more."""
        if self.names and not self.is_checkpoint:
            raise WriteError(
                f"only a checkpoint, or an unfinished write, is overwritten ({self.folder}/ holds"
                f" {_listed(self.names)})",
                hint="Give another folder.",
            )
        indices = [n for n in self.names if n.endswith(".index.json")]
        endings = (WEIGHTS_SUFFIX, PART_SUFFIX, ".bin")
        weights = [n for n in self.names if n.endswith(endings)]
        return (*indices, *weights, *self._left_behind())

    def _left_behind(self) -> Iterator[str]:
        """What belongs to the old checkpoint and would be taken for a part of the new one."""
        templates = self.folder / TEMPLATE_FOLDER
        inside = os.listdir(templates) if templates.is_dir() and not templates.is_symlink() else []
        names = [*self.names, *(f"{TEMPLATE_FOLDER}/{name}" for name in sorted(inside))]
        for name in names:
            ours = any(fnmatchcase(name, pattern) for pattern in _BELONGING)
            if ours and name not in self.carried and not (self.folder / name).is_dir():
                yield name

    def resumed(self) -> Destination:
        """The write that continues what is there.

        Raises:
            WriteError: what is there is not the beginning of this write.
        """
        if not self.names:
            return self.wanted
        if self.state:
            self._refuse_other_state(self.state)
            if self.state.removing:
                return replace(self.wanted, removed=self.overwritten())
        self._refuse_other_weights()
        if not self.state and not self.complete:
            raise WriteError(
                f"there is nothing to resume in {self.folder}/ ({_listed(self.names)})",
                hint="Give a new or empty folder.",
            )
        return replace(self.wanted, kept=self.complete, finished=self.is_finished)

    def _refuse_other_state(self, state: WriteState) -> None:
        if state.digest != self.digest:
            raise self._not_ours(f"digest {state.digest[:8]}")
        wanted = self.wanted.state
        if state.sources != wanted.sources:
            changed = sorted({name for name, *_ in {*state.sources} ^ {*wanted.sources}})
            raise WriteError(
                f"source changed since the interrupted write ({_listed(changed)})",
                hint="Start again with --overwrite.",
            )
        if state.shards != wanted.shards:
            raise self._other_shards(len(state.shards))

    def _refuse_other_weights(self) -> None:
        expected = {shard.name for shard in self.wanted.shards}
        for name, digest in self.digests.items():
            if digest == self.digest and name not in expected:
                raise self._other_shards(len(self.digests))
            if digest == self.digest or (digest is None and self.state and name in expected):
                continue
            raise self._not_ours(f"{name}: {f'digest {digest[:8]}' if digest else 'no digest'}")

    def _not_ours(self, what: str) -> WriteError:
        return WriteError(
            f"{self.folder}/ holds weights of another plan ({what}; this one is {self.digest[:8]})",
            hint=ELSEWHERE_HINT,
        )

    def _other_shards(self, count: int) -> WriteError:
        return WriteError(
            f"{self.folder}/ holds shards of another size ({count} files; --shard-size now gives"
            f" {len(self.wanted.shards)})",
            hint="Resume with the --shard-size it was begun with, or start again with --overwrite.",
        )

    def _other(self) -> str:
        if self.state:
            return f"an unfinished write of another plan, digest {self.state.digest[:8]}"
        return f"a checkpoint: {_listed(self.names)}"


def _is_complete(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    try:
        if path.is_symlink() or path.stat().st_size != shard.size:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header
    except OSError:
        return False


def _digest_in(path: Path) -> str | None:
    """The digest that a file of weights carries; None where it has none, or cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100 << 20)))
        digest = header["__metadata__"][DIGEST_KEY]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) else None


def _listed(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
