"""Held-out loss and distance to a reference, against transformers and closed forms.

pytest tests/evaluation
"""

import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutants import mutant
from transformers import AutoModelForCausalLM

import moe_compose as mc
from moe_compose.calibration.data import domains_of
from moe_compose.calibration.texts import tokens_of
from moe_compose.errors import OptionError, WriteError
from moe_compose.evaluation import measure
from moe_compose.evaluation import rounds as rounds_module
from moe_compose.evaluation.measure import evaluate
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.evaluation.rows import compare_rows, losses

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
TEXTS = {
    "story": [
        "Once upon a time there was a little dog who liked to run in the park with his friend.",
        "Lily went to the shop. She saw a big red ball and she wanted it very much.",
        "One day, a cat sat on a mat.",
    ],
    "sums": ["2 + 2 = 4, and 4 + 4 = 8.", "If Tom has 3 apples and eats one, two are left."],
}
SMALL = EvaluateOptions(tokens=200, seq_len=24, batch=3, greedy=6)


@pytest.fixture(scope="module")
def dense():
    return mc.Checkpoint.open(STORIES)


@pytest.fixture(scope="module")
def other(dense, tmp_path_factory):
    """The same model with one matrix disturbed."""

    def change(tensors):
        w = tensors["model.layers.2.mlp.down_proj.weight"]
        torch.manual_seed(0)
        tensors["model.layers.2.mlp.down_proj.weight"] = w + w.std() * torch.randn_like(w)

    return mutant(dense, tmp_path_factory.mktemp("other") / "m", tensors=change)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


def test_loss_is_the_cross_entropy_that_transformers_computes(dense, model):
    found = evaluate(dense, TEXTS, options=SMALL)
    tokens = tokens_of(dense, TEXTS, SMALL)
    total = count = 0.0
    for index, name in enumerate(tokens.domains):
        loss = predicted = 0.0
        for s in tokens.sequences:
            if s.domain == index:
                ids = torch.tensor([s.ids])
                with torch.no_grad():
                    loss += float(model(ids, labels=ids).loss) * (len(s.ids) - 1)
                predicted += len(s.ids) - 1
        assert found.domains[name].loss == pytest.approx(loss / predicted, rel=1e-6)
        assert found.domains[name].predicted == predicted
        total, count = total + loss, count + predicted
    assert found.overall.loss == pytest.approx(total / count, rel=1e-6)
    assert found.overall.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.overall.tokens == sum(tokens.tokens.values())


def test_batches_do_not_change_the_figures(dense, other):
    """Padded positions never count: alone, no sequence is padded."""
    alone = evaluate(other, TEXTS, against=dense, options=replace(SMALL, batch=1))
    together = evaluate(other, TEXTS, against=dense, options=replace(SMALL, batch=9))
    for name in TEXTS:
        a, b = alone.domains[name], together.domains[name]
        assert (a.tokens, a.predicted) == (b.tokens, b.predicted)
        for figure in ("loss", "reference_loss", "kl", "top1", "overlap"):
            assert getattr(a, figure) == pytest.approx(getattr(b, figure), rel=1e-4, abs=1e-9)
    for a, b in zip(alone.layers, together.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-4)


def test_a_model_beside_itself(dense):
    found = evaluate(dense, TEXTS, against=dense, options=SMALL)
    assert found.overall.kl == 0 and found.overall.top1 == 1
    assert found.overall.overlap == pytest.approx(1)
    assert found.overall.loss == found.overall.reference_loss
    assert [x.error for x in found.layers] == [0.0] * 5
    assert [g.first for g in found.greedy] == [None, None]


def test_a_disturbed_layer_shows_where_it_is(dense, other):
    found = evaluate(other, TEXTS, against=dense, options=SMALL)
    errors = [x.error for x in found.layers]
    assert errors[:2] == [0.0, 0.0] and min(errors[2:]) > 1e-2
    assert found.overall.kl > 1e-3 and found.overall.top1 < 1
    own = evaluate(other, TEXTS, options=SMALL)
    assert own.overall.loss == found.overall.loss


def test_greedy_decoding_parts_where_generate_does(dense, other, model):
    options = replace(SMALL, greedy=12)
    found = evaluate(other, TEXTS, against=dense, options=options)
    theirs = AutoModelForCausalLM.from_pretrained(other.path, dtype=torch.float32).eval()
    tokens = tokens_of(other, TEXTS, options)
    for index, got in enumerate(found.greedy):
        longest = max((s for s in tokens.sequences if s.domain == index), key=lambda s: len(s.ids))
        prompt = torch.tensor([longest.ids[: got.prompt]])
        a, b = (
            m.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=12,
                max_new_tokens=12,
                eos_token_id=None,
                pad_token_id=0,
            )[0, got.prompt :]
            for m in (model, theirs)
        )
        differs = (a != b).nonzero().flatten().tolist()
        assert got.first == (differs[0] if differs else None)


def test_a_plan_is_evaluated_without_a_byte_written(dense, tmp_path):
    plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, method="drop"))
    before = evaluate(plan, TEXTS, against=dense, options=SMALL)
    written = evaluate(mc.write(plan, tmp_path / "moe"), TEXTS, against=dense, options=SMALL)
    assert before.overall == written.overall and before.layers == written.layers
    assert before.overall.kl > 1e-3


def test_measures_have_their_closed_forms():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    rows = compare_rows(p.log()[None], q.log()[None] + 3, torch.tensor([1]))
    assert rows.kl_N.item() == pytest.approx(0.25 * math.log(2))
    assert rows.overlap_N.item() == pytest.approx(0.75)
    assert rows.loss_N.item() == pytest.approx(math.log(2))
    assert rows.reference_loss_N.item() == pytest.approx(math.log(4))
    assert not rows.same_N.item()
    assert losses(p.log()[None], torch.tensor([-1])).item() == 0
    masked = torch.tensor([[0.0, -math.inf]])
    assert compare_rows(masked, torch.zeros(1, 2), torch.tensor([0])).kl_N.item() == pytest.approx(
        math.log(2)
    )


def test_an_interrupted_evaluation_goes_on(dense, other, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds_module, "ROUND", 40)
    whole = evaluate(other, TEXTS, against=dense, options=SMALL)
    keep = tmp_path / "kept.json"

    def stop(done: int, total: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(other, TEXTS, against=dense, options=SMALL, keep=keep, progress=stop)
    with pytest.raises(WriteError, match="--resume"):
        evaluate(other, TEXTS, against=dense, options=SMALL, keep=keep)
    changed = replace(SMALL, seed=1)
    with pytest.raises(WriteError, match="other options"):
        evaluate(other, TEXTS, against=dense, options=changed, keep=keep, resume=True)
    ran, once = [], measure._Pair.round
    monkeypatch.setattr(
        measure._Pair, "round", lambda pair, part: ran.append(part) or once(pair, part)
    )
    resumed = evaluate(other, TEXTS, against=dense, options=SMALL, keep=keep, resume=True)
    rounds = list(rounds_module.rounds_of(tokens_of(other, TEXTS, SMALL)))
    assert 0 < len(ran) < len(rounds), "finished rounds are not run again"
    assert resumed == whole
    assert not keep.exists()
    keep.write_text("{")
    with pytest.raises(WriteError, match="damaged"):
        evaluate(other, TEXTS, against=dense, options=SMALL, keep=keep, resume=True)


def test_models_that_cannot_be_compared_are_refused(dense, other, tmp_path):
    odd = mutant(dense, tmp_path / "odd", config=lambda c: c.update(vocab_size=500))
    with pytest.raises(OptionError, match="vocabularies differ"):
        evaluate(dense, TEXTS, against=odd, options=SMALL)
    with pytest.raises(OptionError) as caught:
        EvaluateOptions(tokens=1, batch=0, dtype="int8")
    assert len(caught.value.problems) == 3


def test_a_failure_leaves_no_thread_behind(dense, other, monkeypatch):
    from moe_compose.evaluation.sums import Sums

    def fail(self, layer, *rest):
        if layer == 3:
            raise RuntimeError("of a test")

    monkeypatch.setattr(Sums, "add_layer", fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="of a test"):
        evaluate(other, TEXTS, against=dense, options=SMALL)
    assert threading.active_count() == before


def test_texts_may_be_a_list_or_domains(dense):
    whole = evaluate(dense, TEXTS["story"], options=SMALL)
    assert list(whole.domains) == ["text"]
    again = evaluate(dense, domains_of(TEXTS["story"]), options=SMALL)
    assert again == whole


def test_what_is_no_list_of_texts_is_refused(dense):
    for odd in ("Once upon a time", ["Once", 3], {"a": "Once"}, [*domains_of(["Once"]), "Once"]):
        with pytest.raises(OptionError):
            evaluate(dense, odd, options=SMALL)


def test_nan_is_told(dense, tmp_path):
    def change(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = math.nan

    broken = mutant(dense, tmp_path / "nan", tensors=change)
    found = evaluate(broken, TEXTS, against=dense, options=SMALL)
    assert not found.finite and math.isnan(found.overall.perplexity)
    assert evaluate(dense, TEXTS, options=SMALL).finite


def test_a_device_that_is_not_here_is_named(dense):
    for name in ("quantum", "meta", "cuda:99"):
        with pytest.raises(OptionError, match=name):
            evaluate(dense, TEXTS, options=replace(SMALL, device=name))
