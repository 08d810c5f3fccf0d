"""What two prunings of one model cost, and what can be said of the better one."""

import json
from pathlib import Path

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=6, method="noise"))
stats = mc.calibrate(moe, text, mc.CalibrateOptions(tokens=512), output="out/stats")
how = mc.EvaluateOptions(tokens=256)
asked = mc.SweepOptions(ratios=(0.3, 0.5), criteria=("reap",))
found = mc.sweep(moe, stats, text, asked, evaluation=how).to_json()
bits = mc.plan_quantisation(moe, stats, mc.QuantPlanOptions(share=0.25))
mc.write_quant_plan(bits, "out/quant")
small = mc.write(mc.prune(moe, stats, mc.PruneOptions(keep=4)), "out/measured")
figures = mc.evaluate(small, text, against=moe, options=how)
Path("out/figures.json").write_text(json.dumps(figures.to_json()))
mc.write_report(small, "out/page.html", sweep=found)
