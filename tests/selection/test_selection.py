"""What learns in a stage: shares, settings, the selection of the stage before, applying, saving and loading."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

from hft_trl import HFTConfig, HFTError, Selection, select


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
)
QWEN_25_05B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("config", "share"),
    [(LlamaConfig(), 0.519), (LLAMA_3_8B, 0.565), (QWEN_25_05B, 0.638)],
    ids=["llama-2-7b", "llama-3-8b", "qwen-2.5-0.5b"],
)
def test_half_of_every_category_and_the_known_share_of_the_whole_model(config, share):
    selection = select(on_meta(config), HFTConfig())
    halves = {key: value for key, value in selection.share.items() if key != "model"}
    assert halves == {"attention": 0.5, "feed_forward": 0.5, "norm": 0.5, "layers": 0.5}
    assert selection.share["model"] == pytest.approx(share, abs=5e-4)


def test_trainable_and_frozen_are_sorted_and_together_all_that_can_learn():
    model = tiny_llama(50)
    selection = select(model, HFTConfig())
    assert list(selection.trainable) == sorted(selection.trainable)
    assert list(selection.frozen) == sorted(selection.frozen)
    assert not set(selection.trainable) & set(selection.frozen)
    assert sorted(selection.trainable + selection.frozen) == sorted(name for name, _ in model.named_parameters())


def test_share_is_the_share_of_parameters_that_learn_once_applied():
    model = tiny_llama(50)
    selection = select(model, HFTConfig(ratio=0.3))
    selection.apply(model)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert selection.share["model"] == learning / model.num_parameters()


@pytest.mark.parametrize("flag", ["train_embeddings", "train_lm_head", "train_final_norm"])
def test_flags_freeze_what_is_outside_of_the_layers(flag):
    name = {
        "train_embeddings": "model.embed_tokens.weight",
        "train_lm_head": "lm_head.weight",
        "train_final_norm": "model.norm.weight",
    }[flag]
    model = tiny_llama(50)
    assert name in select(model, HFTConfig()).trainable
    without = select(model, HFTConfig(**{flag: False}))
    assert name in without.frozen
    assert set(select(model, HFTConfig()).trainable) - set(without.trainable) == {name}


OUTSIDE_FROZEN = {"train_embeddings": False, "train_lm_head": False, "train_final_norm": False}


@pytest.mark.parametrize("strategy", ["category", "model", "element"])
def test_a_selection_in_which_nothing_learns_is_refused(strategy):
    """
    Training would end inside of autograd, or save the start model.

    One parameter outside of the layers is enough.
    """
    model, few = tiny_llama(50), HFTConfig(ratio=1e-7, strategy=strategy, **OUTSIDE_FROZEN)
    with pytest.raises(
        HFTError, match=r"nothing learns with hft\.ratio 1e-07 and nothing outside .*: raise hft\.ratio"
    ):
        select(model, few)
    assert select(model, replace(few, train_final_norm=True)).trainable[-1] == "model.norm.weight"


def test_the_complement_of_everything_is_refused_where_nothing_outside_learns():
    model = tiny_llama(50)
    everything = select(model, HFTConfig(ratio=1.0))
    with pytest.raises(HFTError, match=r"nothing learns with hft\.reselect 'complement'.*set hft\.reselect to fresh"):
        select(model, HFTConfig(reselect="complement", **OUTSIDE_FROZEN), previous=everything)


@pytest.mark.parametrize("flag", ["train_embeddings", "train_lm_head"])
def test_a_tied_embedding_learns_only_if_both_may(flag):
    model = tiny_llama(50, tie_word_embeddings=True)
    assert "model.embed_tokens.weight" in select(model, HFTConfig()).trainable
    assert "model.embed_tokens.weight" in select(model, HFTConfig(**{flag: False})).frozen


def test_excluded_parameters_are_frozen_and_count_nowhere():
    model = tiny_llama(50)
    selection = select(model, HFTConfig(exclude=[r"\.mlp\.", "embed"]))
    names = selection.trainable + selection.frozen
    assert not any(re.search(r"\.mlp\.|embed", name) for name in names)
    assert "feed_forward" not in selection.share
    selection.apply(model)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_fft_selects_all_that_the_user_did_not_freeze_and_changes_nothing():
    model = tiny_llama(50)
    model.model.norm.weight.requires_grad_(False)
    selection = select(model, HFTConfig(method="fft", ratio=0.2, exclude=["mlp"], train_lm_head=False))
    assert selection.frozen == ()
    assert set(selection.share.values()) == {1.0}
    assert sorted(selection.trainable) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    selection.apply(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_apply_sets_every_parameter_of_the_model():
    model = tiny_llama(50)
    select(model, HFTConfig(seed=1)).apply(model)
    selection = select(model, HFTConfig(exclude=["q_proj"]))
    selection.apply(model)
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == list(selection.trainable)


def test_apply_to_another_model_is_refused_and_leaves_it_alone():
    selection = select(tiny_llama(50), HFTConfig())
    other = tiny_llama(50, num_hidden_layers=3)
    with pytest.raises(HFTError, match=r"names 'model\.layers\.3\..* LlamaForCausalLM does not have"):
        selection.apply(other)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_second_selection_sees_the_same_units():
    model = tiny_llama(50)
    first = select(model, HFTConfig())
    first.apply(model)
    assert select(model, HFTConfig()) == first
    second = select(model, HFTConfig(seed=1))
    assert second.trainable != first.trainable
    assert sorted(second.trainable + second.frozen) == sorted(first.trainable + first.frozen)


def test_fresh_draws_another_one_than_before_and_always_the_same():
    model = tiny_llama(50)
    first = select(model, HFTConfig())
    second = select(model, HFTConfig(), previous=first)
    assert first.seed == 42
    assert 0 <= second.seed < 2**63
    assert second.seed != 42
    assert second.trainable != first.trainable
    assert second == select(model, HFTConfig(), previous=first)
    assert select(model, HFTConfig(), previous=second).seed not in (42, second.seed)


def layers_of(names):
    return {name for name in names if ".layers." in name}


def test_same_keeps_the_layers_and_follows_its_own_flags():
    model = tiny_llama(50)
    first = select(model, HFTConfig())
    again = select(model, HFTConfig(seed=7, reselect="same", train_lm_head=False), previous=first)
    assert layers_of(again.trainable) == layers_of(first.trainable)
    assert "lm_head.weight" in again.frozen


def test_complement_trains_what_was_frozen_whatever_the_ratio():
    model = tiny_llama(50)
    first = select(model, HFTConfig(ratio=0.25))
    other = select(model, HFTConfig(ratio=0.25, reselect="complement"), previous=first)
    assert layers_of(other.trainable) == layers_of(first.frozen)
    assert other.share["layers"] == pytest.approx(1 - first.share["layers"])
    assert "model.embed_tokens.weight" in other.trainable


@pytest.mark.parametrize("reselect", ["fresh", "same", "complement"])
def test_after_full_fine_tuning_or_nothing_the_draw_is_the_plain_one(reselect):
    model = tiny_llama(50)
    config = HFTConfig(reselect=reselect)
    full = select(model, HFTConfig(method="fft"))
    plain = select(model, replace(config, reselect="fresh"))
    assert select(model, config, previous=full).trainable == select(model, config).trainable == plain.trainable
    assert select(model, config, previous=full).seed == 42


@pytest.mark.parametrize("reselect", ["same", "complement"])
@pytest.mark.parametrize("layers", [3, 5])
def test_a_previous_selection_of_another_model_is_refused(reselect, layers):
    previous = select(tiny_llama(50), HFTConfig())
    with pytest.raises(HFTError, match=rf"reselect is '{reselect}'.* differ in model\.layers\.{min(layers, 4)}\."):
        select(tiny_llama(50, num_hidden_layers=layers), HFTConfig(reselect=reselect), previous=previous)


def test_save_and_load_give_the_same_selection(tmp_path):
    start = {"name_or_path": "base", "weights_digest": "ab" * 32}
    selection = replace(select(tiny_llama(50), HFTConfig(ratio=0.4, exclude=["v_proj"])), start_model=start)
    path = selection.save(tmp_path / "run")
    loaded = Selection.load(tmp_path / "run")
    assert path == tmp_path / "run" / "hft_selection.json"
    assert loaded == selection
    assert loaded.start_model == start
    assert loaded.digest == selection.digest
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == [
        "version", "config", "seed", "share", "digest", "start_model", "trainable", "frozen",
    ]  # fmt: skip


def test_the_digest_says_what_learns_and_with_which_settings():
    model = tiny_llama(50)
    selection = select(model, HFTConfig())
    assert re.fullmatch("[0-9a-f]{64}", selection.digest)
    assert selection.digest == select(model, HFTConfig()).digest
    assert selection.digest == replace(selection, start_model={"name_or_path": "x", "weights_digest": "y"}).digest
    assert selection.digest != select(model, HFTConfig(seed=43)).digest
    assert selection.digest != select(model, HFTConfig(reselect="same")).digest


def test_changing_the_settings_later_does_not_change_the_selection():
    config = HFTConfig()
    selection = select(tiny_llama(50), config)
    config.ratio = 0.1
    assert selection.config.ratio == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["trainable"].pop(), "changed after it was saved"),
        (lambda content: content.update(seed=1), "changed after it was saved"),
        (lambda content: content["config"].update(ratio=0.6), "changed after it was saved"),
        (lambda content: content.update(version=2), "has version 2"),
        (lambda content: content.pop("frozen"), "cannot be read: KeyError"),
        (lambda content: content["config"].update(ratio=7), "cannot be read: .*hft.ratio is 7"),
    ],
)
def test_a_file_that_was_changed_is_refused_by_name(tmp_path, change, message):
    path = select(tiny_llama(50), HFTConfig()).save(tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(HFTError, match=message) as caught:
        Selection.load(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_file_that_is_no_selection_is_refused_by_name(tmp_path, text):
    (tmp_path / "hft_selection.json").write_text(text, encoding="utf-8")
    with pytest.raises(HFTError, match=r"hft_selection\.json"):
        Selection.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HFTError, match=r"There is no .*nowhere/hft_selection\.json"):
        Selection.load(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HFTError, match=r"file/hft_selection\.json cannot be written"):
        select(tiny_llama(50), HFTConfig()).save(tmp_path / "file")


def test_global_random_state_is_neither_read_nor_written():
    model = on_meta(Gemma3TextConfig())
    states = []
    selections = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        selections.append(select(model, HFTConfig()))
        states.append(before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()))
    assert states == [True, True]
    assert selections[0] == selections[1]


SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hft_trl import HFTConfig, select
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5))
print(select(model, HFTConfig()).digest, select(model, HFTConfig(strategy="model", ratio=0.3)).digest)
"""


def test_the_digest_does_not_hang_on_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "4711")
    }
    assert len(outputs) == 1


def test_the_settings_load_without_torch():
    code = "import sys; from hft_trl import HFTConfig; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert run.stdout == "[]\n"
