"""Two processes train what one trains.

pytest tests/training/test_processes.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from few_steps import few_steps

from moe_compose.calibration.tokens import TokenSet
from moe_compose.training import train_router

PROGRAM = """
import json, sys
from torch import distributed
import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.training import TrainOptions, train_router
folder, ids, options = sys.argv[1:]
distributed.init_process_group("gloo")
for shard in (False, True):
    o = TrainOptions(**json.loads(options), shard=shard)
    plan = train_router(mc.Checkpoint.open(folder), TokenSet.of_ids(json.loads(ids)), o)
    report = plan.reports["training.json"]
    shape = [report["processes"], report["sharded"]]
    print(json.dumps([shape, report["losses"], report["evaluations"], plan.digest()]))
distributed.destroy_process_group()
"""

CHANGES = {"dtype": "float64", "train": "router+experts=2", "balance": "switch", "steps": 4}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_processes(words: list[str], size: int) -> list[Any]:
    """What each process printed: of copies, and of shards."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(size):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *words],
                env={**os.environ, **where, **mine},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    found = []
    for process in running:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        found.append([json.loads(line) for line in out.splitlines()[-2:]])
    return found


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs moe-compose[train]")
def test_two_are_as_one(tiny: Any, tokens: TokenSet) -> None:
    source = tiny("granitemoe", dtype=torch.float64)
    one = train_router(source, tokens, few_steps(**CHANGES)).reports["training.json"]
    by_domain = {
        name: [list(s.ids) for s in tokens.sequences if s.domain == i]
        for i, name in enumerate(tokens.domains)
    }
    few = {"batch_tokens": 200, "eval_every": 2, "eval_tokens": 200, "device": "cpu"}
    words = [
        str(source.path),
        json.dumps(by_domain),
        json.dumps({**few, **CHANGES}),
    ]
    found = in_processes(words, 2)
    assert found[0] == found[1], "both processes come to the same"
    for shape, (seen, losses, evaluations, _) in zip(
        [[2, False], [2, True]], found[0], strict=True
    ):
        assert seen == shape
        assert losses == pytest.approx(one["losses"], rel=1e-7)
        for mine, theirs in zip(evaluations, one["evaluations"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-7)
            loads = [[[*x["load"]] for x in e["layers"].values()] for e in (mine, theirs)]
            assert loads[0] == loads[1]
