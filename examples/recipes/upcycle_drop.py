"""Drop-Upcycling (arXiv 2502.19261): half of each expert's neurons are redrawn."""

import moe_compose as mc

dense = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, method="drop", ratio=0.5))
mc.write(plan, "out/drop")
