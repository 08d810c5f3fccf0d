"""How exact is every pair of families? Prints a table of what validation measures, one row a pair.

Each dense family is built small by transformers, with weights scaled so that the FFN, norms, biases
and rope matter, upcycled (`copy` where the family allows it, else `shared`; 4 experts, 2 chosen),
written, and compared with its source by the same `validate` that users run.

    python examples/benchmarks/pair_accuracy.py > pairs.md
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import moe_compose as mc
from moe_compose.architectures import all_architectures

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/support"))
from dense_models import VARIANTS, dense_checkpoint


def measure(dense: str, target: str, method: str) -> mc.ValidationReport:
    """Upcycle one pair in a temporary folder and validate the result."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        dense_checkpoint(dense, source, **VARIANTS.get((dense, target), {}))
        checkpoint = mc.Checkpoint.open(source)
        options = mc.UpcycleOptions(num_experts=4, top_k=2, method=method, target=target)
        plan = mc.upcycle(checkpoint, options)
        moe = mc.write(plan, Path(folder) / "moe")
        return mc.validate(moe, against=checkpoint, preservation=plan.preservation, tokens=256)


def main() -> None:
    print("| dense | MoE | method | relative error | max error | KL (nats) | top-1 | class met |")
    print("|---|---|---|---|---|---|---|---|")
    for form in all_architectures().values():
        for twin in form.twins:
            method = "shared" if form.parallel_mlp else "copy"
            report = measure(twin.dense, form.model_type, method)
            if report.receipt is None:
                print(f"| {twin.dense} | {form.model_type} | {method} | not measured | | | | no |")
                continue
            a = report.receipt.agreements[0]
            print(
                f"| {twin.dense} | {form.model_type} | {method} | {a.relative_error:.1e} "
                f"| {a.max_error:.1e} | {a.kl:.1e} | {a.top1:.1%} "
                f"| {'yes' if report.ok else 'no'} (limit {twin.accuracy:.0e}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
