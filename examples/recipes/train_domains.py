"""Routers learn whose text is whose: cross-entropy to the expert of each text's domain."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
texts = mc.read_texts(
    "base=examples/models/stories260K/README.md", "tales=moe_compose/validation/sample.txt"
)
moe = mc.compose(seed, {"tales": seed}, mc.ComposeOptions(shared="base", router="random"))
options = mc.TrainOptions(
    objective="domain", steps=2, batch_tokens=128, seq_len=64, eval_tokens=128
)
mc.write(mc.train_router(moe, texts, options), "out/domains")
