"""Half of the experts go, and the routers learn to do without them, from what was before."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=8, method="noise"))
small = mc.prune(moe, None, mc.PruneOptions(keep=4, criterion="random"))
options = mc.TrainOptions(
    objective="distill", steps=2, batch_tokens=128, seq_len=64, eval_tokens=128
)
mc.write(mc.train_router(small, text, options, teacher=moe), "out/trained")
