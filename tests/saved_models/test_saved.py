"""A saved model under its parameters' names: whatever transformers renames, splits or merges on loading."""

import json
import re

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    HrmTextConfig,
    HrmTextForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hft_trl import HFTConfig, demo, half_reset
from hft_trl.errors import HFTError
from hft_trl.saved_models.diff import check_alike, compare
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.weights import combined_digest, fingerprints


def tiny_moe() -> Qwen3MoeForCausalLM:
    """A mixture whose experts are a tensor each in the file, and one parameter for all in the model."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def llama(folder):
    tiny_llama(64).save_pretrained(folder, max_shard_size="20KB")


def tied(folder):
    tiny_llama(64, tie_word_embeddings=True).save_pretrained(folder)


def tied_with_both_in_the_file(folder):
    tied(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors"
    )


def half_precision(folder):
    tiny_llama(64).to(torch.bfloat16).save_pretrained(folder)


def without_prefix(folder):
    """As GPT-2 lies on the hub: names begin with `h.0`, not with `transformer.h.0`, and there is a buffer."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, folder / "model.safetensors")


def experts(folder):
    tiny_moe().save_pretrained(folder, max_shard_size="10KB")


def experts_as_in_the_model(folder):
    tiny_moe().save_pretrained(folder, save_original_format=False)


@pytest.mark.parametrize(
    "save",
    [llama, tied, tied_with_both_in_the_file, half_precision, without_prefix, experts, experts_as_in_the_model],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_is_that_of_the_loaded_model(tmp_path, save, dtype):
    """So a selection's start model is recognised from its files alone, in the type that training held it in."""
    save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    saved = SavedModel(str(tmp_path))
    parameters = dict(loaded.named_parameters())
    assert {place.parameter for place in saved.places.values()} == parameters.keys()
    found = saved.digest({name: parameter.dtype for name, parameter in parameters.items()})
    assert found == combined_digest(fingerprints(parameters.items()))


def test_demo_is_the_embedded_model():
    assert SavedModel("demo").files == SavedModel(str(demo.MODEL)).files


def test_experts_saved_in_two_ways_are_told_apart(tmp_path):
    experts(tmp_path / "a")
    experts_as_in_the_model(tmp_path / "b")
    with pytest.raises(HFTError, match=r"experts\..* corresponds.* saved in the same way"):
        check_alike(SavedModel(str(tmp_path / "a")), SavedModel(str(tmp_path / "b")))


def test_a_tensor_that_holds_several_parameters_is_refused(tmp_path):
    """And saved the way that the message says, the model is taken."""
    config = HrmTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    model = HrmTextForCausalLM(config)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(HFTError, match=r"gqkv_proj|gate_up_proj") as error:
        SavedModel(str(tmp_path / "a"))
    assert "save_original_format=False" in str(error.value)
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    found = {place.parameter for place in SavedModel(str(tmp_path / "b")).places.values()}
    assert found == {name for name, _ in model.named_parameters()}


def quantized(folder):
    llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    return r"is quantized \(gptq\)"


def quantized_and_not_said_so(folder):
    tiny_llama(64).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {
        key: value.to(torch.float8_e4m3fn) if "q_proj" in key else value for key, value in load_file(path).items()
    }
    save_file(tensors, path)
    return r"q_proj.weight is float8_e4m3fn, .* quantized"


def pickled(folder):
    model = tiny_llama(64)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return r"holds no model\.safetensors but pytorch_model\.bin.*save_pretrained"


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return r"is an adapter, no whole model: merge it"


@pytest.mark.parametrize("save", [quantized, quantized_and_not_said_so, pickled, adapter])
def test_what_is_no_whole_model_in_safetensors_is_refused(tmp_path, save):
    """In one sentence that says what to do instead."""
    words = save(tmp_path)
    with pytest.raises(HFTError, match=words):
        SavedModel(str(tmp_path))


def test_a_revision_that_is_too_long_for_a_path_is_an_error():
    with pytest.raises(HFTError, match="neither a folder nor in the local cache"):
        SavedModel(f"model@{'y' * 300}")


def other_architecture(folder):
    tiny_moe().save_pretrained(folder)


def other_vocabulary(folder):
    tiny_llama(65).save_pretrained(folder)


def other_depth(folder):
    tiny_llama(64, num_hidden_layers=3).save_pretrained(folder)


def other_width(folder):
    tiny_llama(64, intermediate_size=48).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (other_architecture, "LlamaForCausalLM.*Qwen3MoeForCausalLM"),
        (other_vocabulary, r"\(64, 32\).*\(65, 32\)"),
        (other_depth, r"model\.layers\.3\."),
        (other_width, r"mlp.*\(64, 32\).*\(48, 32\)|mlp.*\(32, 64\).*\(32, 48\)"),
    ],
)
def test_models_that_are_not_alike_are_told_apart(tmp_path, save, words):
    """Architecture, vocabulary, parameters and shapes, each with both values; in either order."""
    llama(tmp_path / "a")
    save(tmp_path / "b")
    first, second = SavedModel(str(tmp_path / "a")), SavedModel(str(tmp_path / "b"))
    with pytest.raises(HFTError, match=words):
        check_alike(first, second)
    with pytest.raises(HFTError):
        check_alike(second, first)
    check_alike(first, SavedModel(str(tmp_path / "a")))


def test_an_index_that_names_a_tensor_which_is_not_there_is_an_error(tmp_path):
    llama(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(HFTError, match=re.escape("model.layers.9.mlp.up_proj.weight")):
        SavedModel(str(tmp_path))


def test_a_revision_in_the_local_cache_is_told_from_the_others(tmp_path, monkeypatch):
    """Two revisions of one repository, laid out as the hub's client does; and one that is not there."""
    repository = tmp_path / "models--org--base"
    for revision, value in (("v1", 1), ("v2", 2)):
        commit, model = str(value) * 40, tiny_llama(64)
        model.lm_head.weight.data.fill_(value)
        model.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, value in (("v1", 1), ("v2", 2), ("2" * 40, 2)):
        assert SavedModel(f"org/base@{revision}").tensor("lm_head.weight").unique().tolist() == [value]
    (diff,) = compare("org/base@v1", ["org/base@v2"])
    assert (diff.base, diff.tuned) == ("org/base@v1", "org/base@v2")
    half_reset("org/base@v1", "org/base@v2", tmp_path / "out", HFTConfig())
    assert "- org/base\n" in (tmp_path / "out" / "README.md").read_text()
    assert compare("org/base@v1", [str(tmp_path / "out")])[0].byte_identical
    with pytest.raises(HFTError, match="org/base@v3' is neither a folder nor in the local cache"):
        SavedModel("org/base@v3")
