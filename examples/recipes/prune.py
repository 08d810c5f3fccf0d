"""Fewer experts by REAP (arXiv 2510.13999), held to a condition, those that stay refitted."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=8, method="noise"))
stats = mc.calibrate(moe, text, mc.CalibrateOptions(tokens=1024))
plan = mc.prune(moe, stats, mc.PruneOptions(keep=6))
found = mc.evaluate(plan, text, against=moe, options=mc.EvaluateOptions(tokens=256, greedy=0))
assert found.overall.kl <= 0.5, found.overall
refit = mc.RefitOptions(tokens=1024, held_out=2, seq_len=128)
mc.write(mc.refit(plan, moe, text, refit), "out/pruned")
