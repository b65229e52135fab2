"""A frozen half that is whole in every process, in models of other kinds than the one that every backend trains."""

import json

import pytest
import torch
from launch import TRAIN, finish, on_cpu, start
from replicated import PAIRS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def launched(base, tmp_path_factory):
    """The folder of all trainings, and what each of the two processes saw."""
    output = tmp_path_factory.mktemp("replicated")
    finish(start(on_cpu("fsdp2.yaml", output), TRAIN.with_name("replicated.py"), base, output))
    return output, [json.loads((output / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_saved_weights_are_those_of_a_sharded_half(launched, name):
    output, ranks = launched
    for rank in ranks:
        sharded, replicated = rank["seen"][name]
        assert sharded["whole"] == sharded["of_reference"] == []
        assert len(replicated["losses"]) == 2
        assert replicated["losses"] == sharded["losses"]
    one, two = (load_file(output / f"{name}-{kind}" / "model.safetensors") for kind in ("sharded", "replicated"))
    # Sharded, a head is gathered and saved beside the embedding that it is tied to.
    assert one.keys() - two.keys() == ({"lm_head.weight"} if name == "layers" else set())
    for parameter, tensor in two.items():
        assert tensor.dtype == one[parameter].dtype
        assert torch.equal(tensor.view(torch.uint8), one[parameter].view(torch.uint8)), parameter
    _, loading = AutoModelForCausalLM.from_pretrained(output / f"{name}-replicated", output_loading_info=True)
    assert not loading["missing_keys"]


@pytest.mark.parametrize("name", PAIRS)
def test_all_that_is_frozen_is_whole_and_nothing_that_learns(launched, name):
    """
    Whole layers, a tied embedding and one of two parameters of a module too; only an `nn.LayerNorm` stays sharded.
    """
    for rank in launched[1]:
        replicated = rank["seen"][name][1]
        norms = {n for n in replicated["frozen"] if name.startswith("norms") and ".ln_" in n}
        assert bool(norms) == name.startswith("norms")
        assert replicated["whole"] == sorted(set(replicated["frozen"]) - norms)
        assert len(replicated["types"]) == 1


@pytest.mark.parametrize("name", [name for name in PAIRS if name.endswith("-dpo")])
def test_the_reference_has_the_policys_own_frozen_half(launched, name):
    for rank in launched[1]:
        replicated = rank["seen"][name][1]
        assert replicated["stored_once"] == replicated["of_reference"] == replicated["whole"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "uncast",
            "is float32, and FSDP2, which computes in bfloat16, casts only what it shards: set hft.frozen_dtype",
        ),
        ("ignored-sft", "fsdp_ignored_modules is 'model.norm'"),
        ("ignored-dpo", "fsdp_ignored_modules is 'model.norm'"),
        ("different", "the processes have different frozen halves"),
    ],
)
def test_what_does_not_fit_is_refused_in_every_process_before_training(launched, name, words):
    assert all(words in rank["said"][name] for rank in launched[1])
