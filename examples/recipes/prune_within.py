"""As few experts as a KL allows, found by bisection; ranked by the weights alone (AIMER, arXiv
2603.18492), so that no calibration is needed.
"""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=4, method="noise"))
options = mc.PruneOptions(criterion="aimer")
found = mc.fewest(moe, mc.rank_by_weights(moe), text, 0.5, options)
mc.write(found.plan, "out/within")
