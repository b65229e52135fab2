"""The frozen half held in a smaller type: it trains the same, and is saved with the start model's own bits."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line, tiny_llama
from safetensors.torch import load_file, save_file
from test_recipes import recipe  # noqa: F401, a fixture
from training import dpo_trainer, losses, sft_trainer, weights
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer, Selection, demo, select
from hft_trl.frozen.half import FrozenHalf
from hft_trl.frozen.smaller_type import SmallerType
from hft_trl.trainers.compatibility import check
from hft_trl.weights import fingerprints

AUTOCAST = {"bf16": True}
BF16 = HFTConfig(frozen_dtype="bfloat16")


def start(kind, folder, tokenizer):
    """A start model on disk: float32 or bfloat16, tied, in shards, or of another architecture."""
    if kind == "qwen3":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=4,
                    head_dim=8,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    tie_word_embeddings=True,
                )
            )
    else:
        model = tiny_llama(len(tokenizer), tie_word_embeddings=kind == "tied")
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.ndim == 1):
            parameter.mul_(1 + 1e-3 * number)  # not representable in bfloat16
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50KB" if kind == "shards" else "5GB")
    tokenizer.save_pretrained(folder)
    return folder


def saved(folder):
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "embeddings"),
    [("float32", True), ("bfloat16", False), ("tied", False), ("shards", True), ("qwen3", True), ("qwen3", False)],
)
def test_the_frozen_half_is_held_small_and_saved_with_the_bits_of_the_file(
    tulu, tmp_path, tokenizer, kind, embeddings
):
    """Whatever the file's type, in the final folder as in checkpoints, tied or in shards; and it loads as float32."""
    base = start(kind, tmp_path / "base", tokenizer)
    hft = HFTConfig(frozen_dtype="bfloat16", train_embeddings=embeddings, train_lm_head=embeddings)
    trainer = sft_trainer(
        HFTSFTTrainer, base, tulu, tmp_path / "out", hft, **AUTOCAST, save_strategy="steps", save_steps=2
    )
    for name, parameter in trainer.model.named_parameters():
        small = not parameter.requires_grad and "norm" not in name
        assert parameter.dtype == (torch.bfloat16 if small else torch.float32), name
    trainer.train()
    assert {p.dtype for group in trainer.optimizer.param_groups for p in group["params"]} == {torch.float32}
    trainer.save_model()
    before = saved(base)
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "out"):
        after = saved(folder)
        assert after.keys() == before.keys()
        for name in trainer.hft_selection.frozen:
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
        for name in trainer.hft_selection.trainable:
            assert after[name].dtype == torch.float32
            assert not torch.equal(after[name], before[name].float()), name
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(parameter, after[name].float()) for name, parameter in loaded.items())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "qwen3"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_losses_are_those_of_autocast_alone(tulu, tmp_path, tokenizer, kind, reentrant):
    """To the last bit: autocast rounds the frozen matrices in each step, which is here done once."""
    base = start(kind, tmp_path / "base", tokenizer)
    checkpointing = {
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant} if reentrant is not None else None,
    }
    runs = []
    for name, hft in (("whole", HFTConfig()), ("small", BF16)):
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / name, hft, **AUTOCAST, **checkpointing)
        before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        trainer.train()
        runs.append([before, *losses(trainer), trainer.evaluate(trainer.train_dataset)["eval_loss"]])
    assert runs[0] == runs[1]


def test_what_its_class_keeps_in_float32_stays_so_and_leaves_the_saved_type_alone(
    tulu, tmp_path, tokenizer, monkeypatch
):
    """The routers of many mixtures of experts: in the frozen half, and in one that learns of a bfloat16 model."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["k_proj.weight"])
    base = start("float32", tmp_path / "float32", tokenizer)
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "small", BF16, **AUTOCAST)
    frozen = {name: trainer.model.get_parameter(name).dtype for name in trainer.hft_selection.frozen}
    assert {kind for name, kind in frozen.items() if "k_proj" in name} == {torch.float32}
    assert {kind for name, kind in frozen.items() if "q_proj" in name} == {torch.bfloat16}

    base = start("bfloat16", tmp_path / "bfloat16", tokenizer)
    auto = {"model_init_kwargs": {"dtype": "auto"}}
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", HFTConfig(), **auto)
    types = {trainer.model.get_parameter(name).dtype for name in trainer.hft_selection.trainable}
    assert types == {torch.float32, torch.bfloat16}
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("reentrant", [None, True])
def test_a_frozen_embedding_is_rounded_too(tulu, tmp_path, tokenizer, reentrant):
    """Then what flows between the layers is bfloat16, and the losses agree as far as that goes."""
    base = start("qwen3", tmp_path / "base", tokenizer)
    checkpointing = {
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": True} if reentrant else None,
    }
    runs = []
    for dtype in (None, "bfloat16"):
        hft = HFTConfig(frozen_dtype=dtype, train_embeddings=False)
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / str(dtype), hft, **AUTOCAST, **checkpointing)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=5e-3)


def test_a_stage_after_it_and_a_shared_reference_take_the_mixed_types(tulu, ultrafeedback, tmp_path, tokenizer):
    """SFT from a bfloat16 file leaves both types on disk. DPO from it shares, with the losses of an unshared run."""
    base = start("bfloat16", tmp_path / "base", tokenizer)
    sft = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "sft", BF16, **AUTOCAST)
    sft.train()
    sft.save_model()
    assert {tensor.dtype for tensor in saved(tmp_path / "sft").values()} == {torch.float32, torch.bfloat16}
    runs = []
    for name, share in (("shared", True), ("unshared", False)):
        hft = HFTConfig(frozen_dtype="bfloat16", share_reference=share)
        trainer = dpo_trainer(
            HFTDPOTrainer, tmp_path / "sft", ultrafeedback, tmp_path / name, hft, eval_rows=8, **AUTOCAST
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
        policy, theirs = dict(trainer.model.named_parameters()), dict(trainer.ref_model.named_parameters())
        for key, parameter in policy.items():
            assert (
                theirs[key].dtype
                == parameter.dtype
                == (torch.float32 if parameter.requires_grad or "norm" in key else torch.bfloat16)
            )
            assert torch.equal(theirs[key], parameter)
            assert (theirs[key].data_ptr() == parameter.data_ptr()) == (share and not parameter.requires_grad)
        trainer.train()
        trainer.save_model()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert runs[0][0] == pytest.approx(0.693147, abs=1e-5)
    before, after = weights(tmp_path / "sft"), weights(tmp_path / "shared")
    assert all(torch.equal(before[name], after[name]) for name in trainer.hft_selection.frozen)
    assert {before[name].dtype for name in trainer.hft_selection.frozen} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_a_stage_chained_in_memory_after_it_is_rejected(tulu, tmp_path, tokenizer, dtype):
    """It would train half of the new half in the small type, where small steps are lost, or fail in its first step."""
    base = start("bfloat16", tmp_path / "base", tokenizer)
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "a", BF16, **AUTOCAST)
    with pytest.raises(HFTError, match=r"cast by hft\.frozen_dtype .* save that stage, and pass its folder") as error:
        sft_trainer(HFTSFTTrainer, first.model, tulu, tmp_path / "b", HFTConfig(frozen_dtype=dtype), **AUTOCAST)
    one_line(error)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_resuming_is_identical_to_not_having_stopped(base, tulu, ultrafeedback, tmp_path, kind):
    settings = {**AUTOCAST, "save_strategy": "steps", "save_steps": 2}
    for name, checkpoint in (("a", None), ("b", tmp_path / "a" / "checkpoint-2")):
        if kind == "sft":
            trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / name, BF16, **settings)
        else:
            trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / name, BF16, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_it_is_refused_without_autocast_and_under_deepspeed(base, tulu, tmp_path):
    with pytest.raises(HFTError, match=r"mixed_precision is 'no'.*set bf16 to true"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, BF16)
    sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method="fft", frozen_dtype="bfloat16"))
    with pytest.raises(HFTError, match="set fp16 to true"):
        check(held("bf16", None), HFTConfig(frozen_dtype="float16"))
    with pytest.raises(HFTError, match="DeepSpeed holds a model in one type"):
        check(held("bf16", SimpleNamespace()), BF16)


def test_log_probs_beforehand_would_be_those_of_another_model_so_they_are_refused(base, ultrafeedback, tmp_path):
    """TRL computes them before the frozen half is rounded: the first loss would not be ln 2."""
    with pytest.raises(HFTError, match="precompute_ref_log_probs uses the reference before"):
        dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, BF16, bf16=True, precompute_ref_log_probs=True)


def frozen_half(model):
    """The frozen half of a model under the default settings, not held in another type yet."""
    selection = select(model, HFTConfig())
    selection.apply(model)
    half = FrozenHalf(model, fingerprints((name, model.get_parameter(name)) for name in selection.frozen))
    return half, selection


def hold_in(dtype, half, model):
    trainer = SimpleNamespace(frozen_half=half, is_fsdp_enabled=False, _revision=None)
    SmallerType(dtype).settle(trainer, model, None)


def held(precision, deepspeed):
    return SimpleNamespace(
        mixed_precision=precision,
        deepspeed_plugin=deepspeed,
        parallelism_config=None,
        use_cpu=True,
        fsdp_plugin_args=None,
        optim="adamw_torch",
    )


def test_what_could_not_be_saved_with_its_own_bits_keeps_its_type(tokenizer, tmp_path, monkeypatch, caplog):
    """A model that is in no file, and a value that does not fit; but not what the smaller type holds exactly."""
    monkeypatch.setattr(logging.getLogger("hft_trl"), "propagate", True)
    model = tiny_llama(len(tokenizer))
    exact = next(name for name in frozen_half(model)[1].frozen if "proj" in name)
    with torch.no_grad():
        model.get_parameter(exact).fill_(0.5)
    frozen, selection = frozen_half(model)
    hold_in("bfloat16", frozen, model)
    types = {name: model.get_parameter(name).dtype for name in selection.frozen}
    assert [name for name, kind in types.items() if kind == torch.bfloat16] == [exact]
    assert "in their own type, such as model.layers." in caplog.text
    frozen.check(model)

    model = tiny_llama(len(tokenizer))
    large = next(name for name in selection.frozen if "proj" in name)
    with torch.no_grad():
        model.get_parameter(large)[0, 0] = 1e6
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    frozen, _ = frozen_half(model)
    hold_in("float16", frozen, model)
    types = {name: model.get_parameter(name).dtype for name in selection.frozen}
    assert [name for name, kind in types.items() if kind == torch.float32 and "norm" not in name] == [large]


@pytest.mark.parametrize("embeddings", [True, False])
def test_query_and_key_reach_attention_in_one_type(tulu, tmp_path, tokenizer, monkeypatch, embeddings):
    """Flash attention takes nothing else; a float32 query tells transformers to cast all three."""
    base = start("qwen3", tmp_path / "base", tokenizer)
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda module, query, key, value, *args, **kwargs: (
            seen.append((query.dtype, key.dtype, value.dtype)) or sdpa(module, query, key, value, *args, **kwargs)
        ),
    )
    hft = HFTConfig(frozen_dtype="bfloat16", train_embeddings=embeddings, train_lm_head=embeddings)
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", hft, **AUTOCAST)
    norms = [{f"model.layers.{n}.self_attn.{x}_norm.weight" for x in "qk"} for n in range(4)]
    assert any(len(pair & set(trainer.hft_selection.frozen)) == 1 for pair in norms)
    trainer.train()
    assert seen
    assert {types for types in seen if types[0] != types[1]} == set()


def test_a_layer_norm_keeps_its_type_and_the_model_runs(tulu, tmp_path, tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = sft_trainer(HFTSFTTrainer, tmp_path / "base", tulu, tmp_path / "out", BF16, **AUTOCAST)
    trainer.train()
    trainer.save_model()
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    for name in trainer.hft_selection.frozen:
        assert (trainer.model.get_parameter(name).dtype == torch.float32) == (".ln_" in name)
        assert before[name].dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(before[name], after[name])


def test_a_start_model_that_vanished_or_changed_is_an_error_and_one_that_is_overwritten_is_read_first(
    base, tulu, tmp_path
):
    own = Path(shutil.copytree(base, tmp_path / "own"))
    trainer = sft_trainer(HFTSFTTrainer, own, tulu, tmp_path / "out", BF16, **AUTOCAST)
    trainer.save_model(str(own))
    before, after = weights(base), weights(own)
    assert all(torch.equal(before[name], after[name]) for name in before)
    name = trainer.hft_selection.frozen[0]
    save_file({**before, name: before[name] + 1e-7}, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HFTError, match=r"has changed in .*model\.safetensors"):
        trainer.save_model()
    (own / "model.safetensors").unlink()
    with pytest.raises(HFTError, match="missing"):
        trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_recipe_runs_both_stages_with_it(recipe, tmp_path):  # noqa: F811
    flags = ["--hft.frozen_dtype", "bfloat16", "--sft.max_steps", 2, "--dpo.max_steps", 2]
    autocast = [
        word for stage in ("sft", "dpo") for key in ("bf16", "use_cpu") for word in (f"--{stage}.{key}", "true")
    ]
    refused = recipe("sft_then_dpo", "--output_dir", tmp_path / "out", *flags, *autocast[:4])
    assert refused.returncode == 2
    assert "set bf16 to true" in refused.stderr
    assert not (tmp_path / "out").exists()
    result = recipe("sft_then_dpo", "--output_dir", tmp_path / "out", *flags, *autocast)
    assert result.returncode == 0, result.stderr[-3000:]
    dpo = json.loads((tmp_path / "out" / "report.json").read_text())["stages"][1]
    assert dpo["reference_memory_bytes"] == 4 * dpo["trainable_params"]
    norms = sum("norm" in name for name in Selection.load(tmp_path / "out" / "dpo").frozen)
    assert dpo["shared_reference_bytes"] == 2 * (dpo["total_params"] - dpo["trainable_params"] + 96 * norms)
    for before, after in ((demo.MODEL, "sft"), (tmp_path / "out" / "sft", "dpo")):
        frozen = Selection.load(tmp_path / "out" / after).frozen
        old, new = weights(before), weights(tmp_path / "out" / after)
        assert all(old[name].numpy().tobytes() == new[name].numpy().tobytes() for name in frozen)
