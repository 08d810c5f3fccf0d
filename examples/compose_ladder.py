"""The ladder of compositions: what each step of composing small real models is worth, in loss.

    OMP_NUM_THREADS=1 python examples/compose_ladder.py ../shared/data [--json]

The folder holds `models/seed1m` (a small Llama), `models/branch_*` (the seed trained on one domain
each, as BTX has it) and `models/anchored_*` (only FFNs trained, shared parameters untouched, as
FlexOlmo has it), and `text/DOMAIN/{train,valid}.txt`. Router rows follow from the training text,
losses are of the validation text, in nats per token, by domain. With `--steps 50` routers are also
trained, nothing else, on a mix of the domains' training text.

    routers      random, hidden, ridge; on branches and on anchored experts
    shared       the base's parameters against their mean
    opting out   `de` is removed: its own domain pays, the others do not
    adding       `de` comes later, packed by somebody else: the others pay at most the tolerance
    a fifth      a domain that nobody was trained for, with a copy of the base's expert
    training     BTX (branches, averaged) and BAR (anchored experts), routers trained from random
                 and from ridge rows; then one expert of BAR is upgraded and routers trained again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

import moe_compose as mc
from moe_compose.calibration.data import Domain, read_domains

#: Expert → its domain; the seed is the expert for novels.
DOMAINS = {"base": "en", "py": "py", "math": "math", "de": "de"}

#: The fifth domain, of which the models saw next to nothing.
FIFTH = "legal"

Texts = Mapping[str, tuple[Domain, ...]]
Row = dict[str, float]


@dataclass(frozen=True)
class Ladder:
    """Models, text and amounts.

    Attributes:
        data: the folder.
        tokens: of each expert's text.
        held: tokens to evaluate on, of each domain.
        tolerance: nats that old domains may pay for a new one.
        row_scale: length of router rows; searched by default.
    """

    data: Path
    tokens: int = 16_384
    held: int = 8_192
    tolerance: float = 0.02
    row_scale: float | None = None

    @property
    def routing(self) -> mc.RoutingOptions:
        """Sequences as long as the models' context."""
        return mc.RoutingOptions(
            tokens=self.tokens, seq_len=256, tolerance=self.tolerance, row_scale=self.row_scale
        )

    def model(self, name: str) -> mc.Checkpoint:
        """One of the models, by its folder."""
        return mc.Checkpoint.open(self.data / "models" / name)

    def experts(self, kind: str, names: tuple[str, ...] = ("py", "math", "de")) -> dict:
        """Name → model of the `branch` or `anchored` kind."""
        return {n: self.model(f"{kind}_{n}") for n in names}

    def texts(self, part: str, names: tuple[str, ...] = tuple(DOMAINS)) -> Texts:
        """Expert → text of its domain, of which `part` is train or valid."""
        files = {n: self.data / "text" / DOMAINS[n] / f"{part}.txt" for n in names}
        return {n: read_domains({n: [file]}) for n, file in files.items()}

    def loss(self, model: mc.Plan | mc.Checkpoint, held: Texts) -> Row:
        """Validation loss by domain, and their mean."""
        domains = [d for texts in held.values() for d in texts]
        how = mc.EvaluateOptions(tokens=self.held * len(domains), seq_len=256, greedy=0)
        found = mc.evaluate(model, domains, options=how).domains
        losses = {DOMAINS.get(n, n): score.loss for n, score in found.items()}
        return losses | {"mean": sum(losses.values()) / len(losses)}

    def composed(
        self, kind: str, router: str, shared: str = "base", names: tuple[str, ...] = tuple(DOMAINS)
    ) -> mc.Plan:
        """Seed and experts under one router."""
        options = mc.ComposeOptions(shared=shared, router=router)  # type: ignore[arg-type]
        texts = self.texts("train", names) if router in ("hidden", "ridge") else None
        donors = self.experts(kind, tuple(n for n in names if n != "base"))
        return mc.compose(self.model("seed1m"), donors, options, texts, routing=self.routing)


def routers(ladder: Ladder) -> Iterator[tuple[str, Row]]:
    """Every router, under shared parameters of the base and averaged."""
    held = ladder.texts("valid")
    yield "seed1m", ladder.loss(ladder.model("seed1m"), held)
    for kind, shareds in (("branch", ("mean", "base")), ("anchored", ("base",))):
        for shared in shareds:
            for router in ("random", "hidden", "ridge"):
                plan = ladder.composed(kind, router, shared)
                yield f"{kind}, shared {shared}, {router}", ladder.loss(plan, held)


def changes(ladder: Ladder, work: Path) -> Iterator[tuple[str, Row]]:
    """Opting out, adding later, and adding a domain that nobody was trained for."""
    held = ladder.texts("valid")
    four = mc.write(ladder.composed("anchored", "ridge"), work / "four")
    yield "four experts", (before := ladder.loss(four, held))
    yield "de opts out", (after := ladder.loss(opted_out(four), held))
    yield "  change", change(before, after)
    three = mc.write(ladder.composed("anchored", "ridge", names=("base", "py", "math")), work / "3")
    yield "three experts", (before := ladder.loss(three, held))
    yield "de added", (after := ladder.loss(added(ladder, three), held))
    yield "  change", change(before, after)
    packed = mc.write(pack(ladder), work / "packed")
    again = mc.add_expert(three, packed, mc.AddOptions(name="de", rows="all"))
    yield "de from its artifact, all rows", ladder.loss(again, held)
    yield from _fifth(ladder, four, held)


def training(ladder: Ladder, steps: int) -> Iterator[tuple[str, Row]]:
    """Routers trained from random and from ridge rows, and BAR's upgrade of one expert."""
    held = ladder.texts("valid")
    for name, kind, shared in (("BTX", "branch", "mean"), ("BAR", "anchored", "base")):
        for router in ("random", "ridge"):
            plan = routed(ladder, ladder.composed(kind, router, shared), steps)
            yield f"{name}, {router} + {steps} steps", ladder.loss(plan, held)
    donors = {**ladder.experts("anchored"), "de": ladder.model("seed1m")}
    options = mc.ComposeOptions(shared="base", router="ridge")
    first = mc.compose(
        ladder.model("seed1m"), donors, options, ladder.texts("train"), routing=ladder.routing
    )
    first = routed(ladder, first, steps)
    yield "BAR, de not trained yet", (before := ladder.loss(first, held))
    swapped = mc.swap_expert(first, ladder.model("anchored_de"), mc.SwapOptions(expert="de"))
    yield "de upgraded", (after := ladder.loss(routed(ladder, swapped, steps), held))
    yield "  change", change(before, after)


def routed(ladder: Ladder, plan: mc.Plan, steps: int) -> mc.Plan:
    """The routers trained on a mix of the domains, all else frozen."""
    texts = [d for domain in ladder.texts("train").values() for d in domain]
    options = mc.TrainOptions(steps=steps, seq_len=256, eval_every=max(1, steps // 2))
    return mc.train_router(plan, texts, options)


def change(before: Row, after: Row) -> Row:
    """What became of each domain's loss."""
    return {name: after[name] - before[name] for name in before}


def opted_out(four: mc.Checkpoint) -> mc.Plan:
    """Without `de`, and without a trace of its text."""
    return mc.remove_expert(four, mc.RemoveOptions(expert=("de",)))


def added(ladder: Ladder, three: mc.Checkpoint, **options: str) -> mc.Plan:
    """`de` beside three experts: its row from its own text, as long as the others' text allows."""
    return mc.add_expert(
        three,
        ladder.model("anchored_de"),
        mc.AddOptions(name="de", **options),  # type: ignore[arg-type]
        ladder.texts("train"),
        routing=ladder.routing,
    )


def pack(ladder: Ladder) -> mc.Plan:
    """What the owner of the German text sends: an expert and statistics, no text."""
    return mc.pack_expert(
        ladder.model("anchored_de"),
        base=ladder.model("seed1m"),
        name="de",
        texts=ladder.texts("train", ("de",))["de"],
        routing=replace(ladder.routing, row_scale=1.0),
    )


def _fifth(ladder: Ladder, four: mc.Checkpoint, held: Texts) -> Iterator[tuple[str, Row]]:
    """One more expert, a copy of the base's that was trained no further. It has nothing to give;
    what this shows is what the others pay for its being there.
    """
    held = {**held, FIFTH: licence(0)}
    yield "four experts, a fifth domain", (before := ladder.loss(four, held))
    plan = mc.add_expert(
        four,
        mc.Donor.parse("copy:base"),
        mc.AddOptions(name=FIFTH),
        {**ladder.texts("train"), FIFTH: licence(1)},
        routing=ladder.routing,
    )
    yield f"a copy of base added for {FIFTH}", (after := ladder.loss(plan, held))
    yield "  change", change(before, after)


def licence(half: int) -> tuple[Domain, ...]:
    """Every other paragraph of the toolkit's own licence."""
    file = Path(__file__).parents[1] / "LICENSE"
    paragraphs = [p for p in file.read_text().split("\n\n") if p.strip()]
    return (Domain(FIFTH, tuple(paragraphs[half::2])),)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for checkpoints on the way."""
    with TemporaryDirectory(prefix="compose-ladder-") as folder:
        yield Path(folder)


def climb(ladder: Ladder, steps: int = 0) -> Iterator[tuple[str, Row]]:
    """Every rung with its losses; routers are trained for so many steps."""
    yield from routers(ladder)
    with scratch() as work:
        yield from changes(ladder, work)
    if steps:
        yield from training(ladder, steps)


def table_of(steps: Sequence[tuple[str, Row]]) -> Table:
    """Losses, a line for each step; changes with a sign."""
    columns = list(dict.fromkeys(name for _, row in steps for name in row))
    table = Table("", *columns, title="held-out loss, nats per token")
    for name, row in steps:
        style = "+.3f" if name.startswith(" ") else ".3f"
        table.add_row(name, *(format(row[c], style) if c in row else "" for c in columns))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of models and text")
    parser.add_argument("--tokens", type=int, default=Ladder.tokens)
    parser.add_argument("--held", type=int, default=Ladder.held)
    parser.add_argument("--steps", type=int, default=0, help="also train routers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    steps = []
    for name, row in climb(Ladder(args.data, tokens=args.tokens, held=args.held), args.steps):
        steps.append((name, row))
        Console(stderr=True).print(f"{name}: {row['mean']:.3f}", style="dim")
    if args.json:
        print(json.dumps([{"step": name, "loss": row} for name, row in steps], indent=2))
    else:
        Console().print(table_of(steps))


if __name__ == "__main__":
    main()
