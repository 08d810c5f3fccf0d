"""A dense model becomes a mixture of 8 experts that computes the same."""

import moe_compose as mc

dense = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=8, top_k=2))
mc.write(plan, "out/upcycled")
