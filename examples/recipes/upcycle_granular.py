"""Finer experts in virtual groups (arXiv 2410.07524): shards of the FFN, exact."""

import moe_compose as mc

dense = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(
    dense, mc.UpcycleOptions(num_experts=8, top_k=4, granularity=2, method="granular")
)
mc.write(plan, "out/granular")
