"""Every pair of families through the front door: upcycle, write, validate, as a user would.

`tests/surgery/test_pairs.py` compares logits itself; here it is `validate` that must call the
result exact, in fp32 and with weights rounded to bf16. pytest tests/e2e/test_every_pair.py
"""

import pytest
from dense_models import VARIANTS, dense_checkpoint

import moe_compose as mc
from moe_compose.architectures import all_architectures

PAIRS = [(t.dense, a) for a in all_architectures().values() for t in a.twins]
CASES = [
    (dense, form.model_type, {"method": method, **options})
    for dense, form in PAIRS
    for method, options, possible in (
        ("copy", {}, not form.parallel_mlp),
        ("granular", {"granularity": 2, "dtype": "bfloat16"}, not form.parallel_mlp),
        ("shared", {}, form.shared is not None or form.parallel_mlp),
    )
    if possible
]


@pytest.mark.parametrize(
    ("dense", "target", "options"), CASES, ids=[f"{d}-{t}-{o['method']}" for d, t, o in CASES]
)
def test_validate_calls_it_exact(dense, target, options, tmp_path):
    dense_checkpoint(dense, tmp_path / "dense", **VARIANTS.get((dense, target), {}))
    source = mc.Checkpoint.open(tmp_path / "dense")
    plan = mc.upcycle(source, mc.UpcycleOptions(num_experts=4, top_k=2, target=target, **options))
    report = mc.validate(mc.write(plan, tmp_path / "moe"), against=source, tokens=128)
    assert plan.preservation.kind == "exact"
    assert report.receipt is not None, report.checks
    assert report.receipt.met, report.receipt.verdict
    assert report.ok
