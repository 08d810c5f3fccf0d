"""What `validate` says of checkpoints, plans, texts and histories; damage is in test_mutants.py.

pytest tests/validation/test_checks.py
"""

import json

import pytest
import torch
from dense import dense_llama
from mutants import mutant

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write
from moe_compose.errors import CheckpointError, OptionError, PlanError
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions
from moe_compose.validation import preflight, validate
from moe_compose.validation.text import read_text, sequences

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    dense = dense_llama(tmp_path_factory.mktemp("dense"))
    plan = upcycle(dense, UpcycleOptions(num_experts=4, top_k=2))
    return write(plan, tmp_path_factory.mktemp("out") / "moe")


def found(report, name):
    return next(c for c in report.checks if c.name == name)


def test_a_whole_checkpoint_passes(moe):
    report = validate(moe)
    assert report.ok
    assert found(report, "tensors").status == "pass"
    assert found(report, "values").status == "pass"
    assert found(report, "portability").status == "pass"
    assert found(report, "tokenizer").status == "warn", "the toy has none"
    json.dumps(report.to_json())


def fill(name, value, at=...):
    return lambda t: t[name].__setitem__(at, value)


def test_a_norm_left_at_its_initial_value_is_noticed(moe, tmp_path):
    name = "model.layers.0.input_layernorm.weight"
    fresh = mutant(moe, tmp_path / "m", tensors=fill(name, 1.0))
    check = found(validate(fresh), "values")
    assert check.status == "warn"
    assert f"{name} is 1 throughout" in check.problems
    assert found(validate(fresh, against=fresh), "values").status == "pass", "so it was before"


def edit(**changes):
    return lambda c: c.update(changes)


def without(*keys):
    return lambda c: [c.pop(k) for k in keys]


PORTABILITY = {
    "other dtype": (edit(dtype="bfloat16", torch_dtype="bfloat16"), "dtypes"),
    "no dtype": (without("dtype", "torch_dtype"), "dtypes"),
    "one dialect of rope": (without("rope_theta", "rope_scaling"), "portability"),
    "one dialect of dtype": (without("torch_dtype"), "portability"),
    "sliding window": (edit(sliding_window=64), "portability"),
}


@pytest.mark.parametrize("name", PORTABILITY)
def test_configs_that_work_here_only_are_noticed(moe, tmp_path, name):
    change, check = PORTABILITY[name]
    report = validate(mutant(moe, tmp_path / "m", config=change))
    assert found(report, check).status == "warn"
    assert report.ok


def test_portability_names_the_engines(moe, tmp_path):
    report = validate(mutant(moe, tmp_path / "m", config=edit(sliding_window=64)))
    assert "llama.cpp" in found(report, "portability").detail
    narrow = mutant(moe, tmp_path / "n", config=without("rope_theta"))
    assert "transformers 4" in found(validate(narrow), "portability").detail


def test_tokenizers(moe, tmp_path):
    broken = mutant(moe, tmp_path / "m")
    (broken.path / "tokenizer.json").write_text("{")
    check = found(validate(Checkpoint.open(broken.path)), "tokenizer")
    assert check.status == "fail"
    (broken.path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    details = [c.detail for c in validate(Checkpoint.open(broken.path)).checks]
    assert any("TokenizersBackend" in d for d in details)


def test_remote_code_is_never_run(moe, tmp_path):
    """A config that points at a module of its own: refused, and the module is not imported."""
    trap = mutant(
        moe,
        tmp_path / "m",
        config=edit(model_type="trap", auto_map={"AutoConfig": "trap.TrapConfig"}),
    )
    (trap.path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    report = validate(Checkpoint.open(trap.path))
    assert found(report, "config").status == "fail"
    assert not (tmp_path / "sprung").exists()


def test_a_model_too_large_to_compare_is_said_not_measured(moe, monkeypatch):
    monkeypatch.setattr("moe_compose.validation.memory.memory_available", lambda: 1000)
    report = validate(moe, against=moe)
    assert report.receipt is None
    assert "NOT MEASURED" in found(report, "receipt").detail


def test_other_vocabularies_cannot_be_compared(moe, tmp_path):
    other = dense_llama(tmp_path / "other", vocab_size=64)
    report = validate(moe, against=other)
    assert found(report, "receipt").status == "fail"


def test_text_files(tmp_path):
    assert read_text(None)[0] == "the bundled sample"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    for name in ("empty.txt", "latin.txt", "missing.txt"):
        with pytest.raises(OptionError, match=name):
            read_text(tmp_path / name)


def test_damaged_history_is_an_error(moe, tmp_path):
    broken = mutant(moe, tmp_path / "m")
    (broken.path / "moe_compose.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must be a list of records"):
        validate(Checkpoint.open(broken.path))


def test_records_of_other_versions_are_an_error(moe, tmp_path):
    broken = mutant(moe, tmp_path / "m")
    record = [{"preservation": {"kind": "exact", "why": "x", "since": "v9"}}]
    (broken.path / "moe_compose.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="states no preservation class"):
        validate(Checkpoint.open(broken.path), against=moe)


def test_text_without_a_tokenizer_is_refused(moe, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time")
    with pytest.raises(OptionError, match="no tokenizer that loads"):
        validate(moe, against=moe, data=tmp_path / "text.txt")


def test_names_and_dtypes_that_torch_finds_odd(moe, tmp_path):
    def odd(t):
        t["a b.weight"] = torch.zeros(3, 3)
        t["codes"] = torch.tensor([1, 2, 65535], dtype=torch.uint16)
        t["flags"] = torch.tensor([True, False])

    check = found(validate(mutant(moe, tmp_path / "m", tensors=odd)), "values")
    assert check.problems == ("a b.weight is 0 throughout",)


def test_pinned_tensors_keep_their_precision(tmp_path):
    """GLM's correction bias stays fp32 in a bf16 checkpoint; rounded, it chooses other experts."""
    dense = dense_llama(tmp_path / "dense", torch.bfloat16)
    plan = upcycle(dense, UpcycleOptions(num_experts=4, top_k=2, target="glm4_moe"))
    checkpoint = write(plan, tmp_path / "moe")
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert checkpoint.tensors[name].dtype == "F32"
    assert found(validate(checkpoint), "dtypes").status == "pass"

    def rounded(t):
        t[name] = t[name].bfloat16()

    check = found(validate(mutant(checkpoint, tmp_path / "m", tensors=rounded)), "dtypes")
    assert check.status == "fail"


def test_a_plan_is_validated_before_it_is_written(tmp_path):
    dense = dense_llama(tmp_path)
    plan = upcycle(dense, UpcycleOptions(num_experts=4, top_k=2))
    report = validate(plan, against=dense)
    assert report.ok
    assert report.receipt.met and report.receipt.agreements[0].relative_error < 1e-6
    assert not (tmp_path / "moe").exists()
    preflight(plan)


def test_a_source_with_tensors_missing_or_to_spare_is_refused_before_writing(tmp_path):
    dense = dense_llama(tmp_path / "dense")

    def change(t):
        t["model.extra.weight"] = t.pop("model.norm.weight")

    plan = upcycle(mutant(dense, tmp_path / "m", tensors=change), UpcycleOptions(num_experts=4))
    with pytest.raises(PlanError) as caught:
        preflight(plan)
    assert "model.norm.weight is missing" in str(caught.value)
    assert "model.extra.weight is unexpected" in str(caught.value)


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [1] * min(len(text.split()), max_length)}


@pytest.mark.parametrize(("documents", "words"), [(5000, 300), (3, 4000), (40, 10)])
def test_text_is_sampled_evenly_and_not_more_than_asked_for(tmp_path, documents, words):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(["word " * words] * documents))
    got = sequences(Words(), read_text(path), 1024, 256, 100)
    assert got.tokens <= 1024 + 256
    assert got.tokens >= min(1024, documents * words) * 0.25
    assert min(x.numel() for x in got.ids) >= min(words, 60)


def test_router_without_deviation_is_zero_on_purpose(tmp_path):
    dense = dense_llama(tmp_path / "dense")
    plan = upcycle(dense, UpcycleOptions(num_experts=4, top_k=2, router_std=0.0))
    assert plan.constants() == ("model.layers.*.block_sparse_moe.gate.weight",)
    assert validate(plan).ok


def test_dialects_of_rope_that_contradict_each_other(moe, tmp_path):
    report = validate(mutant(moe, tmp_path / "m", config=edit(rope_theta=123.0)))
    assert any("rope_theta is 123" in c.detail for c in report.checks)


def test_widths_that_default_experts_refuse_are_said(moe, tmp_path):
    odd = dense_llama(tmp_path / "dense", torch.bfloat16, intermediate_size=44)
    plan = upcycle(odd, UpcycleOptions(num_experts=4, top_k=2))
    assert any('experts_implementation="eager"' in c.detail for c in validate(plan).checks)
    assert not any("eager" in c.detail for c in validate(moe).checks)
