"""M-SMoE (arXiv 2310.01334): the most frequent experts take in those that routers like alike."""

import tempfile
from pathlib import Path

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=6, method="noise"))
options = mc.CalibrateOptions(tokens=512, similarity=True, sample=64)
with tempfile.TemporaryDirectory() as folder:
    stats = mc.calibrate(moe, text, options, output=Path(folder) / "stats")
    plan = mc.merge(moe, stats, mc.MergeOptions(keep=4, method="m-smoe"))
    mc.write(plan, "out/m_smoe")
