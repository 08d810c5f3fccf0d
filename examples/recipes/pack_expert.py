"""An expert for somebody who has the base: packed with statistics of its text, never the text."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
moe = mc.write(mc.upcycle(seed, mc.UpcycleOptions(num_experts=4)), "out/moe")
packed = mc.pack_expert(
    seed,
    base=seed,
    name="tales",
    texts=mc.read_texts("moe_compose/validation/sample.txt"),
    routing=mc.RoutingOptions(tokens=256),
)
tales = mc.write(packed, "out/tales")
plan = mc.add_expert(moe, tales, mc.AddOptions(name="tales", router="copy"))
mc.write(plan, "out/with_tales")
