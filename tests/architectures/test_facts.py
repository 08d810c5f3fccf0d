"""What a dense family's class assumes where `config.json` is silent, held to the class itself.

    pytest tests/architectures/test_facts.py

Both ways: every stated fact is the class's default, and every default by which a pair's two classes
differ is stated, set or known not to matter.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from dense_models import SILENT, STATED, dense_config
from transformers import AutoConfig, PreTrainedConfig

from moe_compose.architectures import Architecture, Twin, all_architectures
from moe_compose.architectures.base import Key
from moe_compose.architectures.dialects import both_dialects, state_facts
from moe_compose.surgery.pairing import stated_config
from moe_compose.surgery.target import target_config
from moe_compose.surgery.upcycle_options import UpcycleOptions

FORMS = all_architectures()
DENSE = [form for form in FORMS.values() if not form.is_moe]
PAIRS = [(t, a) for a in FORMS.values() for t in a.twins if t.dense != a.model_type]

#: Entries that every config states: a checkpoint that does not is refused or does not load.
SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
}
#: Entries that training, and no result, depends on; and the halves of others.
NO_MATTER = {
    *("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop"),
    *("initializer_range", "embedding_initializer_range", "pretraining_tp", "use_cache"),
    *("rope_parameters", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("full_attn_idxs", "block_multiple_of", "block_ffn_dim_multiplier"),
    "block_auto_adjust_ff_dim",
}
#: Entries of every class that say what is computed.
COMMON = {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
#: Entries of a target's own that `upcycle` leaves to its class: no dense config has them.
LEFT = {"sep_token_id", "moe_norm_min", "rope_scaling", "num_mtp_layers", "mtp_layer_types"}
LEFT |= {"mtp_mlp_layer_types"}


def config_class(model_type: str) -> type[PreTrainedConfig]:
    return type(AutoConfig.for_model(model_type))


def defaults(model_type: str) -> dict[str, Any]:
    """The class's own entries, without what every config has and nothing depends on."""
    own = {f.name: f.default for f in fields(config_class(model_type))}
    general = {f.name for f in fields(PreTrainedConfig)} - COMMON
    return {k: v for k, v in own.items() if k not in general | NO_MATTER | SIZES}


def ids(value: object) -> str:
    return value.dense if isinstance(value, Twin) else getattr(value, "model_type", str(value))


@pytest.mark.parametrize("form", DENSE, ids=ids)
def test_facts_are_the_defaults_of_the_class(form: Architecture) -> None:
    config = config_class(form.model_type)()
    silent = {name: getattr(config, name) for name in SIZES}
    for name, fact in form.facts.items():
        if name in ("rope_theta", "partial_rotary_factor"):
            found = config.rope_parameters[name]
        elif not hasattr(config, name):
            assert isinstance(fact, Key), f"{name} is no entry of the class"
            continue
        else:
            found = getattr(config, name)
        if name == "sliding_window" and getattr(config, "use_sliding_window", True) is False:
            found = 4096  # the class drops a window that is not in use
        if isinstance(fact, Key):
            assert found is None or fact.get(silent) == found, name
        else:
            assert fact == found, name


@pytest.mark.parametrize(("twin", "target"), PAIRS, ids=ids)
def test_defaults_by_which_a_pair_differs_are_stated(twin: Twin, target: Architecture) -> None:
    dense, moe = defaults(twin.dense), defaults(target.model_type)
    known = {*FORMS[twin.dense].facts, *twin.config, *twin.drop}
    differing = {k for k, v in dense.items() if k not in moe or moe[k] != v}
    assert differing <= known
    theta = (config_class(t).default_theta for t in (twin.dense, target.model_type))
    assert len(set(theta)) == 1 or "rope_theta" in FORMS[twin.dense].facts


@pytest.mark.parametrize(("twin", "target"), PAIRS, ids=ids)
def test_an_entry_that_only_the_target_knows_does_not_slip_through(
    twin: Twin, target: Architecture
) -> None:
    """Checkpoints carry entries of families they once were; the new class would heed them."""
    known = set(defaults(twin.dense)) | {"head_dim"}
    stray = {name: "stray" for name in defaults(target.model_type) if name not in known | LEFT}
    source = dense_config(twin.dense, silent=True).to_dict()
    refused = {r.key.name for r in twin.requires}
    stray = {k: v for k, v in stray.items() if k not in refused}
    form = FORMS[twin.dense]
    stated = stated_config(source | stray, form)
    config = target_config(stated, form, target, twin, UpcycleOptions(num_experts=4))
    assert {k for k, v in config.items() if v == "stray"} == set()


@pytest.mark.parametrize(("twin", "target"), PAIRS, ids=ids)
def test_the_target_states_everything_its_class_would_assume(
    twin: Twin, target: Architecture
) -> None:
    """A config that names only its sizes comes out with every fact of its family in it."""
    sizes = {k: getattr(dense_config(twin.dense, silent=True), k) for k in SIZES}
    form = FORMS[twin.dense]
    stated = stated_config({"model_type": twin.dense, **sizes, **SILENT[twin.dense]}, form)
    config = target_config(stated, form, target, twin, UpcycleOptions(num_experts=4))
    assert set(form.facts) <= {*config, *twin.drop}
    assert target.per_layer_rope or config["rope_parameters"]["rope_theta"] == config["rope_theta"]


@pytest.mark.parametrize("dense", ["mistral", "qwen2", "qwen3", "seed_oss", "ernie4_5", "lfm2"])
def test_null_is_as_many_key_value_heads_as_heads(dense: str) -> None:
    config = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    absent, null = config, {**config, "num_key_value_heads": None}
    assert state_facts(null, FORMS[dense])["num_key_value_heads"] == 4
    assert state_facts(absent, FORMS[dense])["num_key_value_heads"] == (
        config_class(dense)().num_key_value_heads
    )


def test_a_null_that_means_something_stays() -> None:
    stated = state_facts(
        {"sliding_window": None, "num_attention_heads": 4, "hidden_size": 32}, FORMS["mistral"]
    )
    assert stated["sliding_window"] is None


def test_rope_scaling_goes_before_rope_parameters() -> None:
    """As in transformers, where a config has both."""
    config = {
        "rope_theta": 5e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    read = AutoConfig.for_model(
        "llama", **{k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    )
    both_dialects(config, FORMS["llama"])
    assert config["rope_parameters"]["rope_theta"] == read.rope_parameters["rope_theta"] == 5e4
    assert config["rope_parameters"]["rope_type"] == read.rope_parameters["rope_type"] == "linear"
    assert config["rope_theta"] == 5e4


def test_every_dense_family_is_built() -> None:
    built = {form.model_type for form in DENSE} | {"granitemoehybrid", "gemma4_text"}
    assert set(STATED) == set(SILENT) == built
