"""`calibrate` in two processes, as torchrun starts them.

Run: pytest tests/cli/test_processes.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_checkpoint

import moe_compose as mc

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
SMALL = ("--tokens", "300", "--seq-len", "32", "--batch", "4", "--dtype", "float64")

#: Seconds after which a run counts as hanging.
PATIENCE = 60


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "moe"
    tiny_checkpoint("qwen3_moe", folder, vocab_size=512, decoder_sparse_step=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, folder / name)
    (folder / "a.txt").write_text("Once upon a time there was a little dog. " * 40)
    return folder


def torchrun(*words: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A command line in several processes on this machine."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *start, "-m", "moe_compose_cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )


def test_two_processes_measure_what_one_does(moe: Path, tmp_path: Path) -> None:
    texts = ("--domain", f"en={moe / 'a.txt'}")
    done = torchrun("calibrate", moe, tmp_path / "two", *texts, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout), "one document, from the first process"
    domains = {"en": [(moe / "a.txt").read_text()]}
    options = mc.CalibrateOptions(tokens=300, seq_len=32, batch=4, dtype="float64")
    one = mc.calibrate(mc.Checkpoint.open(moe), domains, options)
    two = mc.ExpertStats.load(tmp_path / "two")
    assert two.record.tokens == one.record.tokens
    for layer, stats in one.layers.items():
        for name, table in stats.tensors.items():
            found = two.layers[layer].tensors[name]
            torch.testing.assert_close(found, table, rtol=1e-9, atol=1e-11)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_all_end_with_one_message(moe: Path, tmp_path: Path) -> None:
    """One sequence does not make two parts: the second process has nothing to run."""
    (moe / "short.txt").write_text("Once upon a time there was a dog.")
    texts = ("--domain", f"en={moe / 'short.txt'}")
    done = torchrun("calibrate", moe, tmp_path / "stats", *texts, *SMALL)
    assert done.returncode != 0
    assert done.stderr.count("do not make 2 parts") == 1, done.stderr
    assert not (tmp_path / "stats").exists()
