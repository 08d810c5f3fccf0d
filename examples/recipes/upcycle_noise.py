"""Copies of the FFN with noise on half of their neurons, so that they can part."""

import moe_compose as mc

dense = mc.Checkpoint.open("examples/models/stories260K")
plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, method="noise", noise_std=0.02))
mc.write(plan, "out/noise")
