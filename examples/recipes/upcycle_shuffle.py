"""Shuffled neurons cut into finer experts, half redrawn (Qwen2, arXiv 2407.10671)."""

import moe_compose as mc

dense = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=8, top_k=2, granularity=2, method="shuffle"))
mc.write(plan, "out/shuffle")
