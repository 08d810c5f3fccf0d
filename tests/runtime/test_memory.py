"""A run holds a layer or two, whatever the size of the model. Makes a gigabyte or two of disk:

    pytest tests/runtime/test_memory.py -m slow

Figures are of a process of its own, from after the class was built to the end of the run.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hand_made import plan_of

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc"),
]

#: Runs tokens through a checkpoint, and prints what it was told and what it took, in bytes.
PROGRAM = """
import json, sys
import torch
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.runtime import Runner

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) for l in lines if l.startswith(field)) * 1024

folder, options, length, batches = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:5])
torch.set_num_threads(1)
runner = Runner(Checkpoint.open(folder), **options)
ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0))
runner.run([ids[:, :8]])
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = status("VmRSS")
logits = []
runner.run([ids] * batches, logits=lambda i, found: logits.append(float(found.float().sum())))
print(json.dumps({
    "peak": status("VmHWM") - before,
    "layer": runner.footprint.layer,
    "bound": runner.footprint.peak,
    "logits": logits,
}))
"""


def measured(folder: Path, length: int = 16, batches: int = 2, **options: object) -> dict:
    """What a run took beyond the process itself, in bytes."""
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(options)]
    done = subprocess.run(
        [*command, str(length), str(batches)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A Mixtral of twelve layers of 78 MiB in bf16, two of them in fp32 not half of the whole."""
    make_dense = runpy.run_path(str(ROOT / "examples/benchmarks/upcycle_speed.py"))["make_dense"]
    folder = tmp_path_factory.mktemp("memory")
    shape = {"hidden_size": 768, "intermediate_size": 1024, "num_hidden_layers": 12}
    make_dense(folder / "dense", shape)
    write(plan_of(Checkpoint.open(folder / "dense"), num_experts=16, method="copy"), folder / "moe")
    return folder / "moe"


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_stay_within_the_footprint(moe, dtype, prefetch):
    found = measured(moe, dtype=dtype, prefetch=prefetch)
    print(dtype, prefetch, {k: round(found[k] / MIB) for k in ("peak", "layer", "bound")})
    whole = sum(t.nbytes for t in Checkpoint.open(moe).tensors.values())
    whole *= 2 if dtype == "float32" else 1
    assert found["bound"] < whole / 3
    assert found["peak"] < found["bound"] + 48 * MIB


def test_activations_are_filed_away(moe):
    """24 batches of 2048 tokens hold 144 MiB of hidden states, and as much of embeddings."""
    options = {"dtype": "float32", "prefetch": False, "length": 2048, "batches": 24}
    filed, kept = measured(moe, activations=16 * MIB, **options), measured(moe, **options)
    print({k: round(found["peak"] / MIB) for k, found in (("filed", filed), ("kept", kept))})
    assert filed["logits"] == kept["logits"]
    assert filed["peak"] < kept["peak"] - 100 * MIB
