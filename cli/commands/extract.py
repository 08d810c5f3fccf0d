"""`moe-compose extract`: one expert of a mixture as a dense checkpoint."""

from __future__ import annotations

from moe_compose.surgery.extract_options import ExtractOptions

from ..parameters import Moe, Output, with_options
from ._steps import step
from ._surgery import How, carry_out
from ._writing import with_writing


@with_writing()
@with_options(ExtractOptions)
def extract(source: Moe, output: Output, options: ExtractOptions, how: How) -> None:
    """Take one expert out of a mixture, as a dense checkpoint of the family it was grown from.

    The expert answers for every token, and the loss on real text beside the mixture's shows what
    that costs. A config entry that the dense family has no words for is refused by name.
    """
    carry_out(source, output, how, step("extract", options, {}, how))
