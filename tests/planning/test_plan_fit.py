"""Which plan is taken: it fits, nothing that computes less does, and its parts follow the launch configuration."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from hft_trl import HFTConfig, HFTError
from hft_trl.planning.fit import CHECKPOINTING, RESERVED, Planner, operations_ratios
from hft_trl.planning.memory import LAYOUTS, Storage, Task, held, sizes
from hft_trl.planning.show import what_helps

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def skeleton():
    """A Llama of a billion parameters in four layers, without weights."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape))


@pytest.fixture(scope="module")
def planners(skeleton):
    return {method: Planner(skeleton, HFTConfig(method=method)) for method in ("hft", "fft")}


def task(gigabytes, stage="sft", gpus=1, length=2048, batch=16, **others):
    return Task(stage, gpus, int(gigabytes * 1e9) + RESERVED, length, batch, **others)


@pytest.mark.parametrize("method", ["hft", "fft"])
@pytest.mark.parametrize("gigabytes", [20, 24, 28, 40])
def test_the_plan_fits_and_is_the_largest_of_those_that_compute_least(planners, method, gigabytes):
    """Every way with less recomputation, and every larger micro-batch with the same, does not fit."""
    planner, asked = planners[method], task(gigabytes)
    plan = planner.plan(asked)
    assert plan.fits
    assert plan.total == sum(plan.memory.values()) <= gigabytes * 1e9
    assert plan.micro_batch * plan.accumulation == 16
    order = CHECKPOINTING["sft"]
    for less in order[: order.index(plan.checkpointed)]:
        assert not planner.one(asked, "single", 1, less).fits
    larger = [size for size in asked.micro_batches if size > plan.micro_batch]
    assert not any(planner.one(asked, "single", size, plan.checkpointed).fits for size in larger)


def test_more_checkpointing_takes_less_and_computes_more(planners):
    """None, every fourth, third and second layer, all. Of FFT, in which all layers are alike."""
    plans = [planners["fft"].one(task(80), "single", 2, checkpointed) for checkpointed in CHECKPOINTING["sft"]]
    assert [plan.operations for plan in plans] == sorted(plan.operations for plan in plans)
    assert [plan.saved for plan in plans] == sorted((plan.saved for plan in plans), reverse=True)
    assert len({plan.operations for plan in plans}) == 4  # of four layers every third is as many as every second


def test_half_takes_less_than_full_in_every_part_that_it_halves(planners):
    """At the same settings; what a reference shares is not held twice."""
    for stage in ("sft", "dpo"):
        half, full = (planners[method].one(task(80, stage), "single", 1, 1) for method in ("hft", "fft"))
        for part in ("gradients", "optimizer", "weight_copies"):
            assert half.memory[part] < 0.75 * full.memory[part]
        assert half.memory["weights_trainable"] + half.memory["weights_frozen"] == full.memory["weights_trainable"]
        assert half.memory["reference"] == (half.memory["weights_trainable"] if stage == "dpo" else 0)
        assert full.memory["reference"] == (full.memory["weights_trainable"] if stage == "dpo" else 0)


def test_dpo_is_planned_with_what_trl_can_checkpoint(planners):
    """`every_n_layers` stops TRL's DPO trainer at its first step, so a plan has none or all."""
    found = {planners["fft"].plan(task(gigabytes, "dpo")).checkpointed for gigabytes in (22, 24, 28, 32, 40, 60)}
    assert found <= {0, 1}


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_the_whole_batch_is_planned_where_its_parts_do_not_fit(planners, method):
    """Without accumulation a forward pass holds no gradients, so a small batch at once takes less than row by row."""
    planner, asked = planners[method], task(80, length=2048, batch=2)
    rows, whole = (planner.one(asked, "single", size, 1).total for size in (1, 2))
    assert whole < rows
    between = task((rows + whole) / 2e9, length=2048, batch=2)
    plan = planner.plan(between)
    assert plan.fits
    assert (plan.micro_batch, plan.accumulation) == (2, 1)
    assert planner.plan(task(1, length=2048, batch=2)).total == whole  # the smallest, where nothing fits


def test_a_short_row_alone_does_not_keep_a_gpu_busy(planners):
    """With rows of 64 tokens, layers are rather computed again than taken one row at a time."""
    plan = planners["fft"].plan(task(24, length=64, batch=512))
    assert plan.micro_batch * 64 >= 2048


@pytest.mark.parametrize(("stage", "method"), [("sft", "hft"), ("dpo", "hft"), ("dpo", "fft")])
def test_a_sharded_backend_holds_each_part_once_among_its_gpus(skeleton, planners, stage, method):
    """Weights, gradients, optimizer and reference of all GPUs together are those of one that holds everything."""
    counted = sizes(skeleton, planners[method].selection)
    alone = held(counted, LAYOUTS["single"], 1, Storage(), stage == "dpo", share_reference=False)
    shared = held(counted, LAYOUTS["fsdp2"], 8, Storage(), stage == "dpo")
    for part in ("weights_trainable", "weights_frozen", "reference", "gradients", "optimizer"):
        assert 8 * shared[part] == pytest.approx(alone[part], rel=1e-6)
    assert alone["communication"] == 0 < shared["communication"]


def test_fsdp2_trains_in_float32_whatever_the_model_is_loaded_in(skeleton, planners):
    """accelerate upcasts what learns; what is frozen, and the reference, keep their type."""
    counted = sizes(skeleton, planners["hft"].selection)
    wide, narrow = (held(counted, LAYOUTS["fsdp2"], 2, Storage(dtype), True) for dtype in ("float32", "bfloat16"))
    for part in ("weights_trainable", "gradients", "optimizer"):
        assert narrow[part] == wide[part]
    for part in ("weights_frozen", "reference"):
        assert 2 * narrow[part] == wide[part]


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_fsdp2_holds_whole_gradients_between_micro_batches_unless_each_is_synced(planners, method):
    """
    As real processes do (`tests/processes`).

    2 bytes for each trained number, in place of 4 divided among the GPUs.
    """
    planner, asked = planners[method], task(80, gpus=8, layouts=("fsdp2",))
    whole, synced = (planner.one(asked, "fsdp2", 1, 1, sync) for sync in (False, True))
    assert (whole.sync_each_batch, synced.sync_each_batch) == (False, True)
    assert whole.memory["gradients"] == 2 * planner._sizes.trainable
    assert synced.memory["gradients"] == 4 * planner._sizes.trainable // 8
    assert whole.total - synced.total == whole.memory["gradients"] - synced.memory["gradients"]
    at_once = [planner.one(asked, "fsdp2", 2, 1, sync) for sync in (False, True)]
    assert at_once[0] == at_once[1]  # without accumulation there is nothing to wait for
    for name in ("ddp", "zero2", "zero3"):  # DDP's are whole anyway, DeepSpeed reduces each micro-batch
        assert planner.one(asked, name, 1, 1, True) == planner.one(asked, name, 1, 1)


def test_whole_gradients_are_taken_where_they_fit_and_divided_before_more_is_computed_again(planners):
    """They cost least traffic; with a byte less there is `sync_each_batch`, and as little recomputation."""
    planner = planners["hft"]
    whole, synced = (planner.one(task(80, gpus=8, layouts=("fsdp2",)), "fsdp2", 1, 0, sync) for sync in (False, True))
    for total, expected in ((whole.total, whole), (whole.total - 1, synced), (synced.total, synced)):
        plan = planner.plan(Task("sft", 8, total + RESERVED, 2048, 16, layouts=("fsdp2",)))
        assert (plan.sync_each_batch, plan.micro_batch, plan.checkpointed) == (expected.sync_each_batch, 1, 0)
        assert plan.memory == expected.memory


def test_ddp_is_taken_where_it_fits_and_fsdp2_where_it_does_not(planners):
    assert planners["hft"].plan(task(60, gpus=8)).layout == "ddp"
    assert planners["hft"].plan(task(15, gpus=8)).layout == "fsdp2"


def test_both_stages_have_one_launch_configuration(planners):
    """DPO's reference does not fit beside what SFT alone could hold under DDP."""
    sft, dpo = (task(26, stage, gpus=8) for stage in ("sft", "dpo"))
    assert planners["fft"].plan(sft).layout == "ddp"
    stages = planners["fft"].both_stages(sft, dpo)
    assert {plan.layout for _, plan in stages.values()} == {"fsdp2"}
    assert all(plan.fits for _, plan in stages.values())


def test_the_ratio_of_operations_is_one_for_a_half_that_is_all(skeleton, planners):
    """And less the more is frozen: at most a sixth less than FFT at one half."""
    asked = task(60)
    ratios = {}
    for ratio in (0.25, 0.5, 1.0):
        planner = Planner(skeleton, HFTConfig(ratio=ratio))
        ratios[ratio] = operations_ratios({"fft": planners["fft"], "hft": planner}, asked, [planner.plan(asked)])[
            "equal_settings"
        ]
    assert ratios[1.0] == 1
    assert 5 / 6 < ratios[0.5] < 1
    assert ratios[0.25] < ratios[0.5]


def test_where_nothing_fits_the_plan_is_the_smallest_and_says_what_helps(planners):
    """Each way out holds what it says: those that are said to fit do, by the same arithmetic."""
    asked = task(6)
    plan = planners["hft"].plan(asked)
    assert not plan.fits
    assert (plan.micro_batch, plan.checkpointed) == (1, 1)
    helps = dict(what_helps(planners["hft"], asked, plan))
    assert {
        "--optim adamw_bnb_8bit",
        "--frozen-dtype bfloat16",
        "--frozen-dtype bfloat16 --optim adamw_bnb_8bit",
    } <= helps.keys()
    assert all(other.total < plan.total for other in helps.values())
    (gpus,) = [flags for flags, other in helps.items() if flags.startswith("--gpus") and other.fits]
    more = dataclasses.replace(asked, gpus=int(gpus.split()[1]), layouts=())
    assert planners["hft"].plan(more).fits
    assert helps[gpus].sync_each_batch  # the smallest way, as all of them


@pytest.mark.parametrize(
    "storage", [Storage("bfloat16"), Storage(frozen_dtype="bfloat16"), Storage(optim="paged_adamw_8bit")]
)
def test_a_flag_that_saves_nothing_is_not_said_to_help(planners, storage):
    """Weights that are bfloat16 already, and a state that is in 8 bits already."""
    asked = task(4, storage=storage)
    plan = planners["hft"].plan(asked)
    helps = what_helps(planners["hft"], asked, plan)
    totals = [plan.total, *(other.total for _, other in helps)]
    assert not plan.fits
    assert len(set(totals)) == len(totals) > 1


def test_the_smallest_way_on_one_gpu_is_named_with_the_batch_that_fits(planners):
    """It is what `optimizer_in_backward` asks for: all rows of a step at once."""
    asked = task(9)
    helps = dict(what_helps(planners["hft"], asked, planners["hft"].plan(asked)))
    (flags,) = [flags for flags in helps if "--optimizer-in-backward" in flags]
    assert helps[flags].fits
    size = int(flags.split()[-1])
    storage = Storage("bfloat16", None, "adamw_bnb_8bit", "nf4", True)
    larger = dataclasses.replace(asked, storage=storage, global_batch=2 * size)
    assert not planners["hft"].one(larger, "single", 2 * size, 1).fits
    (only,) = [f for f, other in what_helps(planners["hft"], larger, planners["hft"].plan(larger)) if other.fits]
    assert only == f"--global-batch {size}"


def test_an_optimizer_that_steps_together_has_one_more_copy_of_what_learns(planners):
    """torch's AdamW on a GPU, if it is not the fused one; that of a CPU goes one by one."""
    fused, together, cpu = (
        planners["hft"].one(task(80, length=64, storage=Storage(optim=optim), device=device), "single", 1, 1)
        for optim, device in (("adamw_torch_fused", "cuda"), ("adamw_torch", "cuda"), ("adamw_torch", "cpu"))
    )
    assert fused.memory["optimizer"] == cpu.memory["optimizer"]
    assert together.memory["optimizer"] == fused.memory["optimizer"] + together.memory["gradients"]
    assert together.total > fused.total


def test_only_types_that_keep_the_frozen_half_s_bits_are_planned_for(planners, monkeypatch):
    """Full fine-tuning freezes nothing, and of a config that tells no type nothing is said."""
    asked = task(9)
    plan = planners["hft"].plan(asked)
    narrow, zero = task(9, storage=Storage("bfloat16")), task(9, gpus=2, layouts=("zero2",))
    for published, refused in (
        (None, ()),
        (torch.bfloat16, ()),
        (torch.float16, (narrow, zero)),
        (torch.float32, (narrow, zero)),
    ):
        for planner in planners.values():
            monkeypatch.setattr(planner, "_published", published)
            planner.check_types(asked)
        for other in (narrow, zero):
            planners["fft"].check_types(other)
            with pytest.raises(HFTError, match="keep its bits") if other in refused else nullcontext():
                planners["hft"].check_types(other)
        helps = dict(what_helps(planners["hft"], asked, plan))
        assert any("--dtype bfloat16" in flags for flags in helps) == (not refused)
        assert any("--frozen-dtype bfloat16" in flags for flags in helps)  # whose bits are saved from the file


def test_full_fine_tuning_is_not_told_to_freeze(planners):
    asked = task(6)
    helps = what_helps(planners["fft"], asked, planners["fft"].plan(asked))
    assert not any("frozen" in flags for flags, _ in helps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 3}, "--global-batch is 16, which is not divisible by 3 GPUs: use a multiple, such as 15"),
        ({"gpus": 0}, "--gpus is 0: it must be at least 1"),
        ({"length": 1}, "--sequence-length is 1: it must be at least 2"),
        ({"batch": 0}, "--global-batch is 0"),
        ({"layouts": ("fsdp3",)}, "--launch is 'fsdp3': it must be one of single, ddp, fsdp2, zero2, zero3"),
        ({"layouts": ("ddp",)}, "--launch is ddp, but --gpus is 1: use single"),
        ({"layouts": ("single",), "gpus": 2}, "--launch is single, but --gpus is 2"),
        (
            {"layouts": ("zero3",), "gpus": 2, "storage": Storage(frozen_dtype="bfloat16")},
            "--launch is zero3, which stores",
        ),
        ({"layouts": ("fsdp2",), "gpus": 2, "storage": Storage(optim="adamw_bnb_8bit")}, "not tested with fsdp2"),
        (
            {"layouts": ("fsdp2",), "gpus": 2, "storage": Storage(frozen_quantization="nf4")},
            "--launch is fsdp2, which cannot shard quantized matrices: use single or ddp",
        ),
        (
            {"layouts": ("ddp",), "gpus": 2, "storage": Storage("bfloat16", replicate_frozen=True)},
            "--replicate-frozen needs fsdp2, but --launch is ddp",
        ),
        ({"storage": Storage("bfloat16", replicate_frozen=True)}, "--replicate-frozen needs fsdp2"),
        ({"gpus": 2, "storage": Storage(replicate_frozen=True)}, "also set frozen_dtype to bfloat16"),
        (
            {"gpus": 2, "storage": Storage(frozen_dtype="float16", replicate_frozen=True)},
            "also set frozen_dtype to bfloat16",
        ),
        ({"gpus": 2, "storage": Storage(optimizer_in_backward=True)}, "--optimizer-in-backward needs one GPU"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_named(change, message):
    with pytest.raises(HFTError, match=message.replace("(", r"\(")):
        task(80, **change)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "int4"), ("optim", "sgd")],
)
def test_a_storage_that_is_not_known_is_named(name, value):
    with pytest.raises(HFTError, match=f"{name} is {value!r}: a plan supports"):
        Storage(**{name: value})


def test_a_whole_frozen_half_takes_its_bytes_on_every_gpu_and_none_to_gather(planners):
    """In DPO the reference has it from the policy, unless they share nothing; full fine-tuning has no such half."""
    sharded = {"gpus": 8, "layouts": ("fsdp2",), "storage": Storage(frozen_dtype="bfloat16")}
    whole = {**sharded, "storage": Storage(frozen_dtype="bfloat16", replicate_frozen=True)}
    counted = planners["hft"]._sizes
    for stage in ("sft", "dpo"):
        before, after = (planners["hft"].one(task(80, stage, **how), "fsdp2", 1, 0) for how in (sharded, whole))
        assert before.memory["weights_frozen"] == 2 * counted.frozen // 8
        assert after.memory["weights_frozen"] == 2 * counted.frozen
        assert after.memory["reference"] == (0 if stage == "sft" else 4 * counted.trainable // 8)
        assert after.memory["communication"] == before.memory["communication"] - 4 * (
            counted.layer - counted.layer_trainable
        ) - 2 * (counted.outside - counted.outside_trainable)
        assert after.operations == before.operations
        apart = Planner(planners["hft"]._skeleton, HFTConfig(share_reference=False))
        assert apart.one(task(80, stage, **whole), "fsdp2", 1, 0).memory["reference"] == before.memory["reference"]
        full = (planners["fft"].one(task(80, stage, **how), "fsdp2", 1, 0) for how in (sharded, whole))
        assert len({str(plan) for plan in full}) == 1
    assert Task("sft", 2, 10**11, 128, 16, Storage("bfloat16", replicate_frozen=True)).layouts == ("fsdp2",)


def test_updates_inside_the_backward_pass_take_the_whole_batch_at_once_and_one_gradient(planners):
    """And a quantized half is smaller yet; full fine-tuning has none."""
    smaller = Storage(optimizer_in_backward=True, frozen_quantization="nf4")
    for method, planner in planners.items():
        asked = task(60, batch=2)
        plan, other = planner.plan(asked), planner.plan(dataclasses.replace(asked, storage=smaller))
        assert (other.micro_batch, other.accumulation) == (2, 1)
        assert other.operations == planner.one(asked, "single", 2, other.checkpointed).operations
        assert other.memory["gradients"] <= max(size for size, _ in planner._sizes.tensors) * 4
        assert other.memory["weights_trainable"] == plan.memory["weights_trainable"]
        smaller_half = other.memory["weights_frozen"] < 0.16 * plan.memory["weights_frozen"]
        assert smaller_half if method == "hft" else other.memory["weights_frozen"] == 0


def test_the_selection_is_that_of_the_config():
    """A seed that draws other matrices of other sizes leads to its own bytes."""
    model = tiny_llama(300)
    shares = {sizes(model, Planner(model, HFTConfig(ratio=ratio)).selection).trainable for ratio in (0.25, 0.5, 1.0)}
    assert len(shares) == 3
