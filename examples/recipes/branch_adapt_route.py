"""BAR (arXiv 2604.18473) without its training: a pair to train an expert in, and the trained pair
among other experts. Train out/pair in between: `moe_compose.training.freeze`.
"""

import moe_compose as mc

seed = mc.Checkpoint.open("examples/models/stories260K")
pair = mc.write(mc.anchor(seed, mc.AnchorOptions(name="tales")), "out/pair")
mc.write(mc.compose(seed, {"tales": pair}, mc.ComposeOptions(preset="bar")), "out/bar")
