"""Experts added, upgraded, taken out and repeated, nothing written between."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(seed, mc.UpcycleOptions(num_experts=4))
plan = mc.add_expert(plan, seed, mc.AddOptions(name="tales"))
plan = mc.swap_expert(plan, mc.Donor.parse("copy:0"), mc.SwapOptions(expert="tales"))
plan = mc.remove_expert(plan, mc.RemoveOptions(expert=("tales",)))
plan = mc.expand(plan, mc.ExpandOptions(factor=2))
mc.write(plan, "out/expanded")
