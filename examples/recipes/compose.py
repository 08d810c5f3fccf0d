"""Models of one ancestor become the experts of one; router rows follow from each expert's text."""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
text = "moe_compose/validation/sample.txt"
plan = mc.compose(
    seed,
    {"stories": seed, "tales": seed},
    mc.ComposeOptions(shared="base"),
    {name: mc.read_texts(f"{name}={text}") for name in ("base", "stories", "tales")},
    routing=mc.RoutingOptions(tokens=256, row_scale=1.0),
)
mc.write(plan, "out/composed")
