"""The FFN becomes a shared expert, the routed experts start different and silent: exact."""

import moe_compose as mc

dense = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, target="qwen2_moe", method="shared"))
mc.write(plan, "out/shared")
