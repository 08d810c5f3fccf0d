"""FlexOlmo (arXiv 2507.07024): experts that were trained beside a frozen anchor are put together;
what they share must be equal, bit for bit. Train out/tales and out/facts in between.
"""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
tales = mc.write(mc.anchor(seed, mc.AnchorOptions(name="tales")), "out/tales")
facts = mc.write(mc.anchor(seed, mc.AnchorOptions(name="facts")), "out/facts")
plan = mc.compose(seed, {"tales": tales, "facts": facts}, mc.ComposeOptions(preset="flexolmo"))
mc.write(plan, "out/flexolmo")
