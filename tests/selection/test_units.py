"""From a model to its units: what is one, in which layer, of which category, and what is none."""

import pytest
import torch
from conftest import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    JambaConfig,
    LagunaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MarianConfig,
    MixtralConfig,
    OlmoConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    ZambaConfig,
)

from hft_trl import HFTError
from hft_trl.selection import Unit, find_units


def on_meta(config: PreTrainedConfig):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def outside(units: list[Unit]) -> dict[str, str]:
    return {unit.slot: unit.category for unit in units if unit.layer is None}


def slots(units: list[Unit], layer: int) -> dict[str, str]:
    return {unit.slot: unit.category for unit in units if unit.layer == layer}


def test_llama():
    units = find_units(tiny_llama(50))
    assert slots(units, 3) == {
        "self_attn.q_proj": "attention",
        "self_attn.k_proj": "attention",
        "self_attn.v_proj": "attention",
        "self_attn.o_proj": "attention",
        "mlp.gate_proj": "feed_forward",
        "mlp.up_proj": "feed_forward",
        "mlp.down_proj": "feed_forward",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    }
    assert outside(units) == {"model.embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "lm_head"}
    k_proj = next(unit for unit in units if unit.layer == 2 and unit.slot == "self_attn.k_proj")
    assert k_proj == Unit(
        ("model.layers.2.self_attn.k_proj.weight",), 32 * 16, "attention", 2, "self_attn.k_proj", tied=False
    )


def test_a_unit_is_a_weight_with_its_bias():
    units = find_units(on_meta(GPT2Config()))
    fused = next(unit for unit in units if unit.slot == "attn.c_attn")
    assert fused.names == ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias")
    assert fused.size == 768 * 3 * 768 + 3 * 768


def test_raw_parameters_of_a_module_are_units_with_their_own_biases():
    units = find_units(on_meta(GptOssConfig(num_hidden_layers=1)))
    names = {unit.slot: [name.rpartition(".")[2] for name in unit.names] for unit in units if unit.layer == 0}
    assert names["mlp.experts.gate_up_proj"] == ["gate_up_proj", "gate_up_proj_bias"]
    assert names["mlp.experts.down_proj"] == ["down_proj", "down_proj_bias"]
    assert names["self_attn.sinks"] == ["sinks"]
    assert slots(units, 0)["self_attn.sinks"] == "attention"


def test_tied_embedding_and_head_are_one_unit():
    units = find_units(tiny_llama(50, tie_word_embeddings=True))
    assert outside(units) == {"model.embed_tokens": "embedding", "model.norm": "final_norm"}
    assert [unit.slot for unit in units if unit.tied] == ["model.embed_tokens"]


def test_hybrid_layers():
    units = find_units(on_meta(JambaConfig()))
    mamba, attention = slots(units, 0), slots(units, 4)
    assert mamba["mamba.in_proj"] == mamba["mamba.A_log"] == mamba["mamba.conv1d"] == "mixer"
    assert mamba["mamba.dt_layernorm"] == "norm"
    assert attention["self_attn.q_proj"] == "attention"
    assert "attention" not in mamba.values()
    assert "mixer" not in attention.values()


def test_mixture_of_experts():
    layer = slots(find_units(on_meta(MixtralConfig())), 5)
    experts = {slot for slot, category in layer.items() if category == "feed_forward"}
    assert experts == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"}


def test_latent_attention_is_attention_and_its_norms_are_norms():
    layer = slots(find_units(on_meta(DeepseekV3Config(num_hidden_layers=4))), 3)
    assert layer["self_attn.kv_a_proj_with_mqa"] == "attention"
    assert layer["self_attn.kv_a_layernorm"] == "norm"


def test_a_category_may_be_empty():
    assert "norm" not in slots(find_units(on_meta(OlmoConfig(num_hidden_layers=2))), 0).values()


def test_parameters_shared_by_layers_count_once():
    model = on_meta(ZambaConfig())
    units = find_units(model)
    shared = [unit for unit in units if unit.slot.startswith("shared_transf.self_attn.q_proj")]
    assert len(shared) == 1
    assert sum(unit.size for unit in units) == sum(parameter.numel() for parameter in model.parameters())


def test_a_layer_may_be_spread_over_parallel_lists():
    units = find_units(on_meta(XLMConfig()))
    assert slots(units, 7) == {
        "attentions.q_lin": "attention",
        "attentions.k_lin": "attention",
        "attentions.v_lin": "attention",
        "attentions.out_lin": "attention",
        "layer_norm1": "norm",
        "ffns.lin1": "feed_forward",
        "ffns.lin2": "feed_forward",
        "layer_norm2": "norm",
    }


def test_layers_of_a_class_that_says_nothing_about_them():
    units = find_units(on_meta(OpenAIGPTConfig()))
    assert {unit.layer for unit in units} == {None, *range(12)}
    assert outside(units) == {"transformer.tokens_embed": "embedding", "transformer.positions_embed": "embedding"}


def test_what_is_added_to_or_normalises_embeddings_is_embedding():
    parts = outside(find_units(on_meta(BloomConfig())))
    assert parts["transformer.word_embeddings_layernorm"] == "embedding"
    assert parts["transformer.ln_f"] == "final_norm"
    assert outside(find_units(on_meta(GPT2Config())))["transformer.wpe"] == "embedding"


def test_what_stands_beside_the_base_model_is_head():
    parts = outside(find_units(on_meta(BertConfig(is_decoder=True))))
    assert parts["cls.predictions.transform.dense"] == parts["cls.predictions.transform.LayerNorm"] == "lm_head"
    assert parts["bert.embeddings.LayerNorm"] == "embedding"


def test_towers_for_pictures_are_left_out():
    names = [name for unit in find_units(on_meta(Gemma3Config())) for name in unit.names]
    assert all(name.startswith("model.language_model.") for name in names)
    assert len({name for name in names if ".layers." in name}) == 26 * 13


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (LagunaConfig(num_hidden_layers=2), "model.layers.1.mlp.gate.e_score_correction_bias"),
        (MarianConfig(), "model.decoder.embed_positions.weight"),
    ],
)
def test_what_the_class_creates_frozen_is_no_unit_unless_it_was_thawed(config, frozen):
    model = on_meta(config)
    assert not dict(model.named_parameters())[frozen].requires_grad
    units = find_units(model)
    assert all(frozen not in unit.names for unit in units)
    model.requires_grad_(False)
    assert find_units(model) == units
    model.requires_grad_(True)
    assert any(frozen in unit.names for unit in find_units(model))


def test_what_was_frozen_since_is_still_a_unit():
    model = tiny_llama(50)
    units = find_units(model)
    model.requires_grad_(False)
    assert find_units(model) == units
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nothing_on_the_model_changes_and_no_global_state():
    model = tiny_llama(50)
    model.model.norm.requires_grad_(False)
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    config, state = model.config.to_dict(), torch.random.get_rng_state()
    find_units(model)
    assert model.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert before[name][:2] == (id(parameter), parameter.requires_grad)
        assert torch.equal(before[name][2], parameter)


def test_meta_and_real_models_have_the_same_units():
    model = tiny_llama(50)
    with torch.device("meta"):
        assert find_units(type(model)(model.config)) == find_units(model)


def test_exclude_leaves_out_by_regular_expression():
    model = tiny_llama(50)
    units = find_units(model, [r"layers\.0\.", "norm"])
    assert {unit.layer for unit in units} == {None, 1, 2, 3}
    assert not any("norm" in name for unit in units for name in unit.names)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [(["layers.0", "lorm"], "holds 'lorm', which matches no parameter"), (["layers"], "no layers to select from")],
)
def test_exclude_that_matches_nothing_or_everything_is_an_error(exclude, message):
    with pytest.raises(HFTError, match=message):
        find_units(tiny_llama(50), exclude)


def classifier():
    return LlamaForSequenceClassification(LlamaConfig(num_hidden_layers=1))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LlamaModel(LlamaConfig(num_hidden_layers=1)),
        classifier,
        lambda: BertForMaskedLM(BertConfig(num_hidden_layers=1)),
        lambda: T5ForConditionalGeneration(T5Config(num_layers=1)),
        lambda: torch.nn.Linear(2, 2),
    ],
    ids=["base", "classifier", "masked", "encoder-decoder", "no-transformer"],
)
def test_other_than_causal_language_models_are_refused_by_class(build):
    with torch.device("meta"):
        model = build()
    with pytest.raises(HFTError, match=f"The model {type(model).__name__} is no .*causal") as caught:
        find_units(model)
    assert "\n" not in str(caught.value)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    for wrapped in (
        peft.get_peft_model(tiny_llama(50), config),
        peft.inject_adapter_in_model(config, tiny_llama(50)),
    ):
        with pytest.raises(HFTError, match="PEFT adapters"):
            find_units(wrapped)


def test_a_quantized_model_is_refused(base):
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    with pytest.raises(HFTError, match=r"is quantized .BitsAndBytesConfig"):
        find_units(model)


def test_a_model_without_layers_is_refused():
    with pytest.raises(HFTError, match="GPT2LMHeadModel has no layers"):
        find_units(GPT2LMHeadModel(GPT2Config(n_layer=0, n_embd=8, n_head=2, vocab_size=10)))


def test_a_class_that_cannot_be_built_from_its_config_is_named():
    model = tiny_llama(50)
    model.requires_grad_(False)
    model.config.hidden_act = "no-such-function"
    with pytest.raises(HFTError, match="LlamaForCausalLM cannot be rebuilt from its own config"):
        find_units(model)


def test_a_class_whose_constructor_needs_more_than_the_config_is_told_so():
    class Extended(type(tiny_llama(50))):
        def __init__(self, config, heads):
            super().__init__(config)
            self.heads = heads

    model = Extended(tiny_llama(50).config, 2).requires_grad_(False)
    with pytest.raises(
        HFTError,
        match=r"Extended cannot be rebuilt.*'heads'\): give its constructor no required argument but the config",
    ):
        find_units(model)
