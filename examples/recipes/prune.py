"""Fewer experts by REAP (arXiv 2510.13999), then the down-projections of those that stay refitted
to what the layers returned before: on other text the second KL is below the first.
"""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text, other = mc.read_texts("README.md"), mc.read_texts("CONTRIBUTING.md")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=8, method="drop", ratio=0.2))
stats = mc.calibrate(moe, text, mc.CalibrateOptions(tokens=2048))
pruned = mc.prune(moe, stats, mc.PruneOptions(keep=6))
plan = mc.refit(pruned, moe, text, mc.RefitOptions(tokens=4096, seq_len=128))
how = mc.EvaluateOptions(tokens=256, greedy=0)
before, after = (mc.evaluate(x, other, against=moe, options=how).overall for x in (pruned, plan))
assert after.kl < before.kl <= 1.5, (before, after)
mc.write(plan, "out/pruned")
