"""Two processes that measure together, what happens when one of them fails, and similarities.

Both start once, and go through all scenarios: whoever was told of an error can go on.

Run: pytest tests/calibration/test_ranks.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_source import contents

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet

#: Seconds after which a run counts as hanging.
PATIENCE = 100

#: Joins by a file, runs every scenario, and says how each ended.
PROGRAM = """
import hashlib, sys
from torch import distributed
import moe_compose as mc
from moe_compose.calibration import observe
from moe_compose.calibration.tokens import TokenSet
rank, folder, source, ids, scenarios = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank,
                               world_size=2)
weight = observe.token_weight

def run(place, options, fail="", resume=False, ids=eval(ids)):
    told = []
    def stop(p):
        told.append(p)
        if fail == f"first {len(told)}":
            raise RuntimeError("somebody pulled the plug")
    def broken(*given):
        raise RuntimeError("out of memory")
    observe.token_weight = broken if fail == "second" and rank else weight
    stats = mc.calibrate(mc.Checkpoint.open(source), TokenSet.of_ids(ids),
                         mc.CalibrateOptions(**options), output=f"{folder}/{place}",
                         resume=resume, progress=stop)
    hashed = hashlib.sha256()
    for layer, found in sorted(stats.layers.items()):
        for name, table in sorted(found.tensors.items()):
            hashed.update(f"{layer}.{name} {tuple(table.shape)}".encode())
            hashed.update(table.contiguous().numpy().tobytes())
    total = float(stats.layers[1].sums_HCME.sum())
    return f"done {sorted(stats.layers)} {hashed.hexdigest()} {total.hex()} {len(told)}"

for scenario in eval(scenarios):
    try:
        print(run(**scenario))
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""

FAST = {"batch": 3, "dtype": "float64"}
SIMILAR = {**FAST, "similarity": True, "sample": 20, "loo_tokens": 20}
SCENARIOS = {
    "whole": {"place": "whole", "options": SIMILAR},
    "cut": {"place": "cut", "options": SIMILAR, "fail": "first 3"},
    "resumed": {"place": "cut", "options": SIMILAR, "resume": True},
    "there already": {"place": "whole", "options": SIMILAR},
    "second": {"place": "second", "options": FAST, "fail": "second"},
    "short": {"place": "short", "options": FAST, "ids": {"a": [[3, 4, 5]]}},
    "options": {"place": "options", "options": {"batch": 0}},
}


@pytest.fixture(scope="module")
def source(tiny: Any) -> mc.Checkpoint:
    return tiny("qwen3_moe", decoder_sparse_step=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def said(source: mc.Checkpoint, tokens: TokenSet, folder: Path) -> dict[str, tuple[str, str]]:
    """Scenario → what each of two processes says of it."""
    ids: dict[str, list[list[int]]] = {d: [] for d in tokens.domains}
    for s in tokens.sequences:
        ids[tokens.domains[s.domain]].append(list(s.ids))
    words = [str(folder), str(source.path), repr(ids), repr(list(SCENARIOS.values()))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **pipes,
        )
        for rank in (0, 1)
    ]
    try:
        ended = [p.communicate(timeout=PATIENCE) for p in running]
    finally:
        for p in running:
            p.kill()
    lines = [out.splitlines() for out, _ in ended]
    assert [len(x) for x in lines] == [len(SCENARIOS)] * 2, [err for _, err in ended]
    return dict(zip(SCENARIOS, zip(*lines, strict=True), strict=True))


def test_two_measure_what_one_does(
    said: dict[str, tuple[str, str]], source: mc.Checkpoint, tokens: TokenSet, folder: Path
) -> None:
    first, second = (line.rpartition(" ") for line in said["whole"])
    assert first[0].startswith("done [0, 1, 2]")
    assert first[0] == second[0], "the same bits, and the same sums of them"
    assert second[2] == "0" != first[2], "the first one tells of progress"
    found = mc.ExpertStats.load(folder / "whole")
    one = mc.calibrate(source, tokens, mc.CalibrateOptions(**FAST))
    assert found.record.tokens == one.record.tokens and found.record.text == one.record.text
    for layer, stats in one.layers.items():
        for name, table in stats.tensors.items():
            other = found.layers[layer].tensors[name]
            torch.testing.assert_close(other, table, rtol=1e-9, atol=1e-12)
            assert bool(table.any())
    half = mc.calibrate(source, tokens.part(0, 2), mc.CalibrateOptions(**FAST))
    assert not torch.allclose(half.layers[1].sums_HCME, one.layers[1].sums_HCME)


def test_the_sample_is_of_the_first_part(
    said: dict[str, tuple[str, str]], source: mc.Checkpoint, tokens: TokenSet, folder: Path
) -> None:
    place, options = folder / "alone", mc.CalibrateOptions(**SIMILAR)
    alone = mc.calibrate(source, tokens.part(0, 2), options, output=place)
    found = mc.ExpertStats.load(folder / "whole").similarity(1)
    torch.testing.assert_close(found.inputs_SD, alone.similarity(1).inputs_SD)
    torch.testing.assert_close(found.cosine_EE, alone.similarity(1).cosine_EE)


def test_an_interrupted_run_continues_to_the_same_bytes(
    said: dict[str, tuple[str, str]], folder: Path
) -> None:
    stopped = "RuntimeError somebody pulled the plug"
    told = "MoeComposeError process 0 of 2: RuntimeError: somebody pulled the plug"
    assert said["cut"] == (stopped, told)
    left, whole = (int(said[name][0].split()[-1]) for name in ("resumed", "whole"))
    assert 0 < left < whole, "the layers that are finished are not measured again"
    assert contents(folder / "cut") == contents(folder / "whole")


def test_one_that_fails_ends_all(said: dict[str, tuple[str, str]]) -> None:
    told = "MoeComposeError process 1 of 2: RuntimeError: out of memory"
    assert said["second"] == (told, "RuntimeError out of memory")
    assert all("is there already" in line for line in said["there already"])
    assert all("1 sequences do not make 2 parts" in line for line in said["short"])
    assert all(line.startswith("OptionError") for line in said["options"])
