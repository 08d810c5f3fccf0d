"""REAM (arXiv 2604.04356): each layer is grouped by what it does behind the merged ones before."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=6, method="noise"))
plan = mc.merge_in_sequence(
    moe,
    mc.read_texts("stories=moe_compose/validation/sample.txt"),
    mc.MergeOptions(keep=4, method="ream"),
    mc.CalibrateOptions(tokens=512, sample=64),
)
mc.write(plan, "out/ream")
