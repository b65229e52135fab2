"""Two real processes, under DDP, FSDP2 and on two machines, train what one process trains on the same global batch."""

import json
import shutil

import pytest
import torch
from conftest import PATIENCE
from launch import TRAIN, finish, free_port, on_cpu, seen, start
from safetensors.torch import load_file
from train import train
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.long

TRAININGS = {
    "ddp": [
        *("sft", "sft-resumed", "sft-mixed", "sft-mixed-resumed"),
        *("dpo", "dpo-resumed", "dpo-mixed", "dpo-precomputed", "dpo-compiled"),
    ],
    "fsdp2": [
        *("sft", "sft-resumed", "sft-mixed", "sft-mixed-resumed"),
        *("sft-sharded", "sft-sharded-resumed", "sft-sharded-mixed", "sft-checkpointing"),
        *("dpo", "dpo-resumed", "dpo-mixed", "dpo-precomputed"),
        *("dpo-sharded", "dpo-sharded-resumed", "dpo-sharded-mixed"),
        *("sft-replicated", "sft-replicated-resumed", "sft-mixed-replicated", "sft-checkpointing-replicated"),
        *("sft-sharded-replicated", "sft-sharded-replicated-resumed"),
        *("sft-accumulated-mixed", "sft-accumulated-synced"),
        *("dpo-replicated", "dpo-replicated-resumed", "dpo-mixed-replicated"),
        *("sft-wrapped", "dpo-wrapped", "dpo-wrapped-resumed"),
    ],
    "machines": ["sft", "sft-resumed", "sft-mixed", "dpo", "dpo-resumed", "dpo-precomputed"],
}
EVERY = [(backend, training) for backend, trainings in TRAININGS.items() for training in trainings]
every_training = pytest.mark.parametrize(("backend", "training"), EVERY)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The trainings in one process: what it saw, and where its models are."""
    output = tmp_path_factory.mktemp("alone")
    return {name: train(name, base, output) for name in ("sft", "sft-mixed", "dpo", "dpo-mixed")}, output


@pytest.fixture(scope="module")
def together(base, tmp_path_factory):
    """The folder of a backend's trainings, launched once each."""
    folders = {}

    def launched(backend):
        if backend not in folders:
            output = folders[backend] = tmp_path_factory.mktemp(backend)
            command = (TRAIN, base, output, *TRAININGS[backend])
            if backend == "machines":
                config = on_cpu("ddp_multi_node.yaml", output)
                flags = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
                finish(*(start(config, *command, flags=[*flags, str(rank)]) for rank in range(2)))
            else:
                finish(start(on_cpu({"ddp": "cpu2.yaml", "fsdp2": "fsdp2.yaml"}[backend], output), *command))
        return folders[backend]

    return launched


@every_training
def test_both_processes_take_part_in_one_training(together, backend, training):
    """No silent fall-back to one process, or from FSDP to DDP; one selection."""
    ranks = seen(together(backend), training)
    assert [rank["processes"] for rank in ranks] == [2, 2]
    assert {rank["backend"] for rank in ranks} == {"FSDP" if backend == "fsdp2" else "MULTI_CPU"}
    assert ranks[0]["digest"] == ranks[1]["digest"]


@every_training
def test_losses_and_weights_are_those_of_one_process(together, alone, backend, training):
    what_one_saw, its_folder = alone
    mixed = "mixed" in training
    name = training.partition("-")[0] + ("-mixed" if mixed else "")
    ranks = seen(together(backend), training)
    assert ranks[0]["digest"] == what_one_saw[name]["digest"]
    # In bfloat16 numbers have 8 bits, and FSDP2 rounds to it in other places than autocast does
    assert ranks[0]["losses"] == pytest.approx(what_one_saw[name]["losses"], abs=0.03 if mixed else 1e-5)
    one, two = weights(its_folder / name), weights(together(backend) / training)
    assert one.keys() == two.keys()
    if not mixed:  # a hundredth of a step of AdamW, whose length is the learning rate
        assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-4) for n in one)


@every_training
def test_the_saved_model_is_whole_and_its_frozen_half_the_bases_bit_for_bit(together, base, backend, training):
    """With sharded state dicts too, where transformers itself writes no model files."""
    folder = together(backend) / training
    frozen = json.loads((folder / "hft_selection.json").read_text())["frozen"]
    before, after = weights(base), weights(folder)
    assert len(frozen) > 10
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in frozen)
    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@every_training
def test_only_what_learns_has_gradients_that_are_reduced_and_optimizer_state(together, backend, training):
    for rank in seen(together(backend), training):
        assert rank["with_gradient"] == rank["with_optimizer_state"] == rank["trainable"]
        if backend == "fsdp2":  # a matrix is padded to a multiple of the processes
            reductions = {"resumed": 2, "synced": 4 * 4}.get(training.rpartition("-")[2], 4)
            assert (
                0
                <= rank["reduced_numbers"] / reductions - rank["trainable_numbers"]
                < 0.01 * rank["trainable_numbers"]
            )
        else:
            assert rank["ddp_bytes"] == 4 * rank["trainable_numbers"]


@pytest.mark.parametrize(("backend", "training"), [pair for pair in EVERY if pair[1].endswith("resumed")])
def test_a_resumed_training_ends_in_the_same_bytes(together, backend, training):
    output = together(backend)
    through = training.removesuffix("-resumed")
    assert seen(output, training)[0]["losses"] == seen(output, through)[0]["losses"]
    file = "model.safetensors"
    assert (output / training / file).read_bytes() == (output / through / file).read_bytes()


def test_four_processes_go_on_from_fsdp2_checkpoints_of_two(together, base, alone, tmp_path):
    """
    From whole and from sharded state dicts, of SFT and DPO: on the same batches to one process's losses and weights.

    The frozen half may have been whole in every process or not.
    """
    what_one_saw, its_folder = alone
    trainings = {
        **{name: name for name in ("sft", "sft-sharded", "dpo", "dpo-sharded", "sft-replicated")},
        "sft-sharded-replicated": "sft-sharded",
    }
    for training, saved in trainings.items():
        shutil.copytree(together("fsdp2") / saved / "checkpoint-2", tmp_path / training / "checkpoint-2")
    config = on_cpu("fsdp2.yaml", tmp_path, num_processes=4)
    output = finish(start(config, TRAIN, base, tmp_path, *(f"{training}-resumed" for training in trainings)))
    assert "was saved by 2 processes, this run has 4" in output
    for training in trainings:
        stage = training.partition("-")[0]
        ranks = seen(tmp_path, f"{training}-resumed")
        assert [rank["processes"] for rank in ranks] == [4] * 4
        assert {rank["backend"] for rank in ranks} == {"FSDP"}
        assert ranks[0]["losses"] == pytest.approx(what_one_saw[stage]["losses"], abs=1e-5)
        one, four = weights(its_folder / stage), weights(tmp_path / f"{training}-resumed")
        assert all(torch.allclose(one[name], four[name], rtol=0, atol=1e-4) for name in one)


def test_fsdp2_and_ddp_refuse_each_others_checkpoints(together, base, tmp_path):
    """Both ways, with real checkpoints, before a step is trained."""
    for there, training, here, words in (
        (
            "fsdp2",
            "sft",
            "cpu2.yaml",
            "was saved by FSDP with FULL_STATE_DICT, whose files one process or DDP cannot read",
        ),
        (
            "ddp",
            "sft",
            "fsdp2.yaml",
            "was saved by one process or DDP, whose files FSDP with FULL_STATE_DICT cannot read",
        ),
    ):
        output = tmp_path / f"from-{there}"
        shutil.copytree(together(there) / training / "checkpoint-2", output / "sft" / "checkpoint-2")
        launch = start(on_cpu(here, tmp_path), TRAIN, base, output, "sft-resumed")
        said = launch.communicate(timeout=PATIENCE)[0]
        assert launch.returncode != 0
        assert words in said.replace("\n", " ")
        assert not (output / "sft-resumed" / "model.safetensors").exists()


def test_fsdp2_keeps_gradients_whole_between_micro_batches_unless_each_is_synced(together):
    """What a plan counts on: every process has all of them in bfloat16, or its shards of them in float32."""
    for rank in seen(together("fsdp2"), "sft-accumulated-mixed"):
        assert (rank["waiting_whole"], rank["waiting_sharded"]) == (2 * rank["trainable_numbers"], 0)
    for rank in seen(together("fsdp2"), "sft-accumulated-synced"):
        assert rank["waiting_whole"] == 0
        assert rank["waiting_sharded"] == pytest.approx(4 * rank["trainable_numbers"] / 2, rel=0.01)


def test_fsdp2_gathers_the_reference_layer_by_layer(together):
    """The largest gather in its forward is one layer, or the embedding; afterwards only shards are left."""
    for rank in seen(together("fsdp2"), "dpo"):
        parts_of_policy, parts_of_reference = rank["parts"]
        assert parts_of_reference == parts_of_policy > 4  # the test model's layers
        assert 0 < rank["gathered_by_reference"] <= max(rank["largest_layer"], rank["embedding"]) < 0.2 * rank["bytes"]
        assert rank["reference_is_sharded"]


def test_the_frozen_half_is_stored_once_under_ddp_and_on_each_machine(together):
    for backend in ("ddp", "machines"):
        for rank in seen(together(backend), "dpo"):
            assert rank["shared_reference_bytes"] == rank["frozen_bytes"] > 0
    for rank in seen(together("fsdp2"), "dpo"):
        assert rank["shared_reference_bytes"] == 0


REPLICATED = [pair[1] for pair in EVERY if "replicated" in pair[1]]


@pytest.mark.parametrize("training", REPLICATED)
def test_a_replicated_frozen_half_is_never_gathered_and_changes_no_bit(together, training):
    """
    Each layer is gathered for the forward and for the backward pass, and by the reference.

    Exactly its trained half now.
    """
    output = together("fsdp2")
    as_ever, gathers = training.replace("-replicated", ""), 3 if training.startswith("dpo") else 2
    for whole, sharded in zip(seen(output, training), seen(output, as_ever), strict=True):
        assert not set(whole["whole"]) & set(whole["trainable"])
        assert len(whole["whole"]) == whole["frozen_parameters"] > 10
        assert sharded["whole"] == []
        steps = 2 if training.endswith("resumed") else 4
        saved = sharded["gathered_bytes"] - whole["gathered_bytes"]
        assert saved == steps * gathers * whole["frozen_bytes"] > 0
        assert whole["losses"] == sharded["losses"]
    file = "model.safetensors"
    assert (output / training / file).read_bytes() == (output / as_ever / file).read_bytes()


def test_a_replicated_frozen_half_is_stored_once_for_policy_and_reference(together):
    for training in ("dpo-replicated", "dpo-mixed-replicated"):
        for rank in seen(together("fsdp2"), training):
            assert rank["shared_reference_bytes"] == rank["frozen_bytes"] > 0


def test_sharded_checkpoints_hold_shards_only(together):
    folder = together("fsdp2") / "sft-sharded" / "checkpoint-2"
    assert any((folder / "pytorch_model_fsdp_0").iterdir())
    assert not list(folder.glob("*.safetensors"))


def test_precomputed_log_probs_of_rows_in_memory_are_found_by_every_process(together):
    """TRL caches them beside the rows' file, and each process has one of its own for rows in memory."""
    for backend in TRAININGS:
        assert (together(backend) / "dpo-precomputed" / "_reference_log_probs" / "train" / "state.json").is_file()
        assert all(rank["parts"][1] == 0 for rank in seen(together(backend), "dpo-precomputed"))
