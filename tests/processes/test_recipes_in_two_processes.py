"""The recipes as they are launched in several processes: both stages in one launch, one report, whole models."""

import json

import pytest
from conftest import PATIENCE, started_from, tulu_row, ultrafeedback_row
from launch import RECIPES, ROOT, finish, free_port, on_cpu, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.long

QUICK = ["--sft.max_steps", 2, "--dpo.max_steps", 2]


def rows(folder, stage) -> str:
    path = folder / f"{stage}.jsonl"
    row = {"sft": tulu_row, "dpo": ultrafeedback_row}[stage]
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(32)))
    return str(path)


def both_stages(base, folder) -> list[str]:
    model = [*started_from(base), "--model.chat_template", "tulu", "--output_dir", folder / "both", *QUICK]
    data = ["--sft.dataset", rows(folder, "sft"), "--dpo.dataset", rows(folder, "dpo"), "--dpo.split", "train"]
    return ["recipes/sft_then_dpo.py", *model, *data]


def single_stage(stage, base, folder) -> list[str]:
    flags = ["--model_name_or_path", base, "--dataset_name", rows(folder, stage), "--output_dir", folder / stage]
    return [f"recipes/{stage}.py", *flags, "--max_steps", 2, "--chat_template", "tulu"]


def check_run(output, start, stages) -> list[dict]:
    """Two processes did the stages, each from its start's bits, and each left a whole model."""
    report = json.loads((output / "report.json").read_text())
    assert report["num_processes"] == 2
    assert [stage["name"] for stage in report["stages"]] == stages
    for record in report["stages"]:
        folder = output if len(stages) == 1 else output / record["name"]
        assert record["frozen_unchanged"] is True
        before, after = load_file(start / "model.safetensors"), load_file(folder / "model.safetensors")
        frozen = json.loads((folder / "hft_selection.json").read_text())["frozen"]
        assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in frozen)
        assert any((before[name] != after[name]).any() for name in before)
        AutoModelForCausalLM.from_pretrained(folder)
        # Each process has compared its share of the units
        assert {name for name in frozen if name.endswith("weight")} < {unit["name"] for unit in record["moved"]}
        assert all((unit["relative_change_from_start"] > 0) == unit["trainable"] for unit in record["moved"])
        if record["name"] == "dpo":
            assert record["first_loss"] == pytest.approx(0.6931, abs=1e-3)
        start = folder
    return report["stages"]


def test_all_recipes_under_the_shipped_configuration_for_two_cpu_processes(base, tmp_path):
    output = finish(
        start(
            ROOT / "accelerate_configs/cpu2.yaml",
            *(RECIPES, *both_stages(base, tmp_path), "+"),
            *(*single_stage("sft", base, tmp_path), "+"),
            *(*single_stage("dpo", base, tmp_path), "--precompute_ref_log_probs", "true"),
        )
    )
    check_run(tmp_path / "both", base, ["sft", "dpo"])
    check_run(tmp_path / "sft", base, ["sft"])
    check_run(tmp_path / "dpo", base, ["dpo"])
    assert output.count("reference: shares") == 1  # said once, not by every process
    assert output.count("reference: its log-probs were computed before training") == 1


def test_a_mistake_is_said_once_by_two_processes(base, tmp_path):
    launch = start(
        ROOT / "accelerate_configs/cpu2.yaml", *both_stages(base, tmp_path), "--sft.resume_from_checkpoint", "x"
    )
    said = launch.communicate(timeout=PATIENCE)[0]
    assert launch.returncode == 1  # the launcher's, whatever its processes' codes are
    assert said.count("error: unknown key sft.resume_from_checkpoint") == 1


@pytest.mark.parametrize("config", ["ddp_multi_node.yaml", "fsdp2_multi_node.yaml"])
def test_all_recipes_on_two_machines(base, tmp_path, config):
    """As shipped, apart from the CPU: one process on each machine, here on loopback."""
    flags = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
    recipes = [*both_stages(base, tmp_path), "+", *single_stage("sft", base, tmp_path), "+"]
    command = (on_cpu(config, tmp_path), RECIPES, *recipes, *single_stage("dpo", base, tmp_path))
    output = finish(*(start(*command, flags=[*flags, str(rank)]) for rank in range(2)))
    check_run(tmp_path / "both", base, ["sft", "dpo"])
    check_run(tmp_path / "sft", base, ["sft"])
    check_run(tmp_path / "dpo", base, ["dpo"])
    assert ("sharded by FSDP2" in output) == config.startswith("fsdp2")


def test_all_recipes_under_fsdp2_with_sharded_state_dicts(base, tmp_path):
    """
    Both stages in one launch: DPO starts from what SFT saved. Here with a frozen half that is whole in every process,
    and with FSDP's activation checkpointing, whose wrappers rename parameters: the report has the plain names.
    """
    changes = {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_activation_checkpointing": True}
    output = finish(
        start(
            on_cpu("fsdp2.yaml", tmp_path, **changes),
            *(RECIPES, *both_stages(base, tmp_path), "--dpo.precompute_ref_log_probs", "true"),
            *("--hft.replicate_frozen", "true", "+"),
            *(*single_stage("sft", base, tmp_path), "--gradient_checkpointing", "false", "+"),
            *(*single_stage("dpo", base, tmp_path), "--gradient_checkpointing", "false"),
        )
    )
    _, dpo = check_run(tmp_path / "both", base, ["sft", "dpo"])
    assert dpo["reference_memory_bytes"] is None
    check_run(tmp_path / "sft", base, ["sft"])
    check_run(tmp_path / "dpo", base, ["dpo"])
    assert output.count("reference: its log-probs were computed before training") == 1
    assert output.count("sharded by FSDP2") == 1
    assert output.count("bytes are whole in each process, FSDP2 shards the rest") == 2  # the first run's stages
    assert list(tmp_path.glob("both/sft/checkpoint-*/pytorch_model_fsdp_0"))  # FSDP it was, not DDP
