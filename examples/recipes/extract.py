"""An expert of a mixture as a dense model again."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(seed, mc.UpcycleOptions(num_experts=4, method="noise"))
mc.write(mc.extract(plan, mc.ExtractOptions(expert="2")), "out/extracted")
