"""Searching configurations, using what was found, and the check at first use.

    pytest tests/kernels/test_tune.py

The search runs in Triton's interpreter, in a process of its own; its timings mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_compose.errors import MoeComposeError, OptionError
from moe_compose.kernels import load_configs, reference, selfcheck, tune, tuned
from moe_compose.kernels.configs import HALF, SHARED, config_for, table_entry
from moe_compose.kernels.timing import seconds

ROOT = Path(__file__).parents[2]
COMMAND = ["tune", "--device", "cpu", "--shape", "32,16,4,2", "--tokens", "1,24", "--repeat", "1"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _the_table_again():
    yield
    tuned.unload_configs()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("tune") / "tiles.json"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "moe_compose_cli", *COMMAND, "--output", str(path), "--json"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "timings of Triton's interpreter mean nothing" in done.stderr
    assert json.loads(done.stdout) == json.loads(path.read_text())
    return path


def test_the_search_keeps_what_was_exact_and_fastest(found):
    document = json.loads(found.read_text())
    assert document["arch"] == "interpreter" and {"triton", "torch", "date"} <= document.keys()
    for entry, tokens in zip(document["entries"], (1, 24), strict=True):
        assert entry["tokens"] == tokens and entry["error"] < 2e-6 and entry["tried"] > 2
        assert 0 < entry["seconds"] <= entry["table_seconds"]


def test_what_was_measured_comes_before_the_table(found):
    document = json.loads(found.read_text())
    document["arch"] = "sm_90"
    for entry, rows in zip(document["entries"], (16, 64), strict=True):
        entry["config"]["rows"] = rows
        entry["element_bytes"] = 2
    found.write_text(json.dumps(document))
    before = config_for("sm_90", 0.5, 2, 2048, 768)
    assert load_configs(found) == 2
    rows = [config_for("sm_90", r, 2, 32, 16).rows for r in (0, 0.5, 2, 3, 12, 1000)]
    assert rows == [16, 16, 16, 64, 64, 64]
    assert config_for("sm_90", 0.5, 2, 2048, 768) == before
    assert config_for("sm_80", 0.5, 2, 32, 16) == table_entry("sm_80", 0.5, 2, 32, 16)
    tuned.unload_configs()
    assert config_for("sm_90", 12, 2, 32, 16) == table_entry("sm_90", 12, 2, 32, 16)


GOOD = {
    "kind": tuned.KIND, "format": 1, "arch": "sm_90",
    "entries": [{
        "model": 64, "width": 64, "experts": 4, "top_k": 2, "tokens": 1, "element_bytes": 2,
        "seconds": 1.0, "table_seconds": 1.0, "error": 0.0, "tried": 1,
        "config": {
            "rows": 16, "group": 8, "even": False,
            "first": {"n": 64, "k": 64, "warps": 4, "stages": 3},
            "second": {"n": 64, "k": 64, "warps": 4, "stages": 3},
        },
    }],
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"kind"', '"king"', "holds no kernel configurations"),
        ("sm_90", "sm_75", "an accelerator"),
        ('"k": 64', '"k": 48', "powers of two"),
        ('"stages": 3', '"stages": 0', "positive"),
        ('"rows": 16', '"row": 16', "entries.0"),
        ('"even": false', '"even": true, "rows": 128', ""),
        ("{", "", "cannot be read"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, old, new, message):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(GOOD).replace(old, new))
    if not message:
        assert load_configs(path) == 1
        return
    with pytest.raises(OptionError, match=message):
        load_configs(path)


@pytest.mark.parametrize("arch", SHARED)
def test_candidates_fit_and_include_more_than_the_table(arch):
    for rows in (1, 64, 1024):
        for height in tune.heights(rows):
            start = table_entry(arch, rows, 2, 2048, 768)
            firsts = list(tune.first_tiles(arch, height, 2, start))
            seconds_ = list(tune.second_tiles(arch, height, 2, start))
            assert len(firsts) >= 3 and len(seconds_) >= 3
            for config in firsts:
                tile = config.first
                need = tune.shared_bytes(arch, height, 2 * tile.n, tile.k, tile.stages, 2)
                assert need <= SHARED[arch]
    for _, config in HALF[arch]:
        for tile, matrices in ((config.first, 2), (config.second, 1)):
            columns = matrices * tile.n
            need = tune.shared_bytes(arch, config.rows, columns, tile.k, tile.stages, 2)
            assert need <= SHARED[arch]


def test_without_a_gpu_the_error_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MoeComposeError, match="tuning needs a GPU") as caught:
        tune.check_device(torch.device("cuda"))
    assert caught.value.exit_code == 1 and "NVIDIA or AMD" in caught.value.hint
    with pytest.raises(OptionError, match="K at most E"):
        tune.Shape(model=8, width=8, experts=2, top_k=3)


def test_medians_of_host_timings():
    calls = []
    assert seconds(lambda: calls.append(1), CPU, repeats=5) >= 0
    assert len(calls) == 5


def test_the_probe_passes_the_reference_and_notices_faults():
    probes = selfcheck.PROBES[-1:]
    assert selfcheck.probe(CPU, torch.bfloat16, reference.moe_forward, probes) == ""

    def exchanged(x, weights, layout, experts, gates):
        return reference.moe_forward(x, weights, layout, experts, gates.flip(1))

    def detached(x, weights, layout, experts, gates):
        y = reference.moe_forward(x, weights, layout, experts, gates)
        return y.detach() + 0 * y

    def broken(*_):
        raise RuntimeError("PTX")

    for forward, what in (
        (exchanged, "the output of a layer is off"),
        (detached, "the gradient of x of a layer is off"),
        (broken, "RuntimeError: PTX"),
    ):
        assert what in selfcheck.probe(CPU, torch.bfloat16, forward, probes)


def test_a_device_is_checked_once_and_never_while_a_graph_is_captured(monkeypatch):
    device, dtype, probed, capturing = torch.device("cuda:0"), torch.bfloat16, [], [True]
    monkeypatch.setattr(selfcheck, "_VERDICTS", {})
    monkeypatch.setattr(selfcheck, "arch_of", lambda _: "sm_100")
    monkeypatch.setattr(selfcheck, "probe", lambda *_: probed.append(1) or "wrong")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert "run once before capturing" in selfcheck.obstacle(device, dtype)
    capturing[0] = False
    assert [selfcheck.obstacle(device, dtype) for _ in range(2)] == ["wrong", "wrong"]
    capturing[0] = True
    assert selfcheck.obstacle(device, dtype) == "wrong" and probed == [1]
    monkeypatch.setattr(selfcheck, "arch_of", lambda _: "sm_90")
    assert selfcheck.obstacle(device, torch.float16) == ""
