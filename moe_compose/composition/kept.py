"""Statistics of routers beside a checkpoint, in a folder of its own: engines take every safetensors
file that lies next to the weights for weights.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.history import EXTRA_FOLDER, document
from moe_compose.surgery.plan import Plan

if TYPE_CHECKING:
    from moe_compose.composition.statistics import RouterStats

#: Where the statistics lie in a checkpoint.
STATS_PLACE = f"{EXTRA_FOLDER}/router_stats.safetensors"

#: How the lengths of router rows were searched, beside the result.
SEARCH_NAME = "routing_search.json"


def stats_of(source: TensorSource) -> RouterStats | None:
    """The statistics that came with a model; None where there are none.

    Raises:
        CheckpointError: they are damaged.
    """
    from moe_compose.composition.statistics import RouterStats

    path = document(source, STATS_PLACE)
    return None if path is None else RouterStats.load(path)


def with_stats(plan: Plan, stats: RouterStats) -> Plan:
    """The plan with statistics that are written beside its result."""
    return replace(plan, files={**plan.files, STATS_PLACE: stats.save(work_folder())})


def work_folder() -> Path:
    """A temporary folder that lasts as long as this process: plans read from it when written."""
    folder = Path(tempfile.mkdtemp(prefix="moe-compose-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
