"""An upcycled model goes on learning: routers and one expert, on the next token, with a balance
loss.
"""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = mc.read_texts("moe_compose/validation/sample.txt")
moe = mc.upcycle(seed, mc.UpcycleOptions(num_experts=4, method="drop"))
options = mc.TrainOptions(
    objective="lm",
    train="router+experts=1",
    steps=2,
    batch_tokens=128,
    seq_len=64,
    eval_tokens=128,
)
mc.write(mc.train_router(moe, text, options), "out/further")
