"""Routers brought back to the original's layers, one layer of both models in memory."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=4, method="noise"))
small = mc.prune(moe, None, mc.PruneOptions(keep=2, criterion="random"))
options = mc.TrainOptions(
    objective="layer",
    lr=0.01,
    layer_tokens=256,
    steps=2,
    batch_tokens=128,
    seq_len=64,
    eval_tokens=128,
)
mc.write(mc.train_router(small, text, options, teacher=moe), "out/layers")
