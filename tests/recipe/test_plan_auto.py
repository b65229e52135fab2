"""
`activation_checkpointing:

auto`: the least recomputation that fits the machine, in every stage, and the same run everywhere.
"""

import dataclasses

import pytest
from conftest import QUIET, parse_recipe
from training import ResumableSFTTrainer
from trl import DPOConfig, SFTConfig

from hft_trl import HFTError
from hft_trl.chat import load_tokenizer
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.planning.fit import CHECKPOINTING, RESERVED, Planner
from hft_trl.recipe import activation_checkpointing, parse_stage
from hft_trl.recipe.activation_checkpointing import settle_checkpointing
from hft_trl.recipe.folder import _differences, settings
from hft_trl.recipe.parsing import leaves_checkpointing
from hft_trl.recipe.rows import sft_dataset
from hft_trl.selection import select
from hft_trl.skeleton import build_on_meta

AUTO = "--activation_checkpointing"


@pytest.fixture
def stage_of(base, tmp_path):
    """A stage of one of the single-stage recipes, with flags of its own."""

    def parse(name, *flags):
        config = {"sft": SFTConfig, "dpo": DPOConfig}[name]
        given = ("--model_name_or_path", str(base), "--dataset_name", "demo", "--output_dir", str(tmp_path / name))
        stage, _ = parse_stage(name, config, [*given, "--max_length", "96", AUTO, "auto", *flags])
        return stage

    return parse


def ways(stage, base):
    """What each way takes, from no recomputation to all."""
    skeleton = build_on_meta(str(base))
    planner, task = Planner(skeleton, stage.hft), activation_checkpointing._task(stage, skeleton, 10**12)
    rows = stage.args.per_device_train_batch_size
    return {way: planner.one(task, "single", rows, way).total for way in CHECKPOINTING[stage.kind]}


@pytest.mark.parametrize(("name", "flags"), [("sft", ()), ("sft", ("--method", "fft")), ("dpo", ())])
def test_the_least_recomputation_that_fits_is_taken(stage_of, base, monkeypatch, capsys, name, flags):
    """
    With exactly the memory that a way takes (none, every second layer, all), it or one with less recomputation is
    taken.
    """
    totals = ways(stage_of(name, *flags), base)
    for total in (totals[0], totals.get(2, totals[1]), totals[1]):
        monkeypatch.setattr(activation_checkpointing, "_memory", lambda total=total: total + RESERVED)
        stage = stage_of(name, *flags)
        settle_checkpointing(stage)
        expected = next(other for other, needed in totals.items() if needed <= total)
        args = stage.args
        assert args.activation_checkpointing is args.gradient_checkpointing is (expected > 0)
        assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs
        assert (args.activation_checkpointing_kwargs or {}).get("every_n_layers", min(expected, 1)) == expected
        assert f"{name}: activation checkpointing" in capsys.readouterr().out
    assert len(set(totals.values())) > 1


def test_the_stage_s_own_sync_each_batch_is_planned_with(stage_of, monkeypatch):
    """Under FSDP2 it decides whether gradients wait whole for the last micro-batch."""
    seen, one = [], Planner.one
    monkeypatch.setattr(Planner, "one", lambda self, *given: seen.append(given[-1]) or one(self, *given))
    for flags in ((), ("--accelerator_config", '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}')):
        settle_checkpointing(stage_of("sft", *flags))
    assert seen == [False, True]


def test_what_fits_in_no_way_is_said_and_trained_with_all_layers_checkpointed(stage_of, monkeypatch, caplog):
    monkeypatch.setattr(activation_checkpointing, "_memory", lambda: RESERVED + 1)
    stage = stage_of("dpo")
    settle_checkpointing(stage)
    assert stage.args.activation_checkpointing
    assert "GB are missing, even with every layer" in caplog.text


def test_a_later_stage_has_the_shapes_of_the_first_one_s_model(tmp_path, monkeypatch):
    """Its own start model is not there yet."""
    flags = ("--sft.activation_checkpointing", "false", "--dpo.activation_checkpointing", "auto")
    recipe = parse_recipe(["--output_dir", str(tmp_path), *flags], default_config="hft_trl/demo/assets/recipe.yaml")
    settle_checkpointing(recipe.stages["sft"], recipe.stages["dpo"])
    assert recipe.stages["sft"].args.activation_checkpointing is False
    assert (recipe.stages["sft"].auto_checkpointing, recipe.stages["dpo"].auto_checkpointing) == (False, True)


@pytest.mark.parametrize(("reselect", "shares"), [("complement", (0.25, 0.75, 0.25)), ("same", (0.25, 0.25, 0.25))])
def test_each_stage_is_planned_with_the_half_that_it_will_have(stage_of, base, reselect, shares):
    """
    A complement is the rest of what the last stage trained, whatever `ratio` says, and the same half stays as it is:
    even a stage's that is not planned itself. A stage from the first start model goes by that one. Equal halves are
    traced once.
    """
    stages = [stage_of("sft", "--ratio", "0.25", "--reselect", reselect) for _ in range(4)]
    for number, stage in enumerate(stages):
        stage.args.output_dir = f"round-{number}"
        if number and number < 3:
            stage.model = dataclasses.replace(stage.model, model_name_or_path=f"round-{number - 1}")
    skeleton = build_on_meta(str(base))
    planners = activation_checkpointing._planners(stages, skeleton)
    assert [planner.selection.share["layers"] for planner in planners[:3]] == pytest.approx(shares, abs=0.03)
    assert planners[0] is planners[2] is planners[3]  # of the last one nothing says what it was trained with
    assert planners[1].selection.trainable == select(skeleton, stages[1].hft, planners[0].selection).trainable


def test_a_stage_of_any_name_is_planned_as_what_it_trains(stage_of, capsys):
    stage = stage_of("dpo")
    stage.name = "align"
    settle_checkpointing(stage)
    assert capsys.readouterr().out.startswith("align: activation checkpointing none")


def test_rounds_of_continual_learning_have_it_too(tmp_path):
    recipe = parse_continual(
        ["--output_dir", str(tmp_path), "--sft.activation_checkpointing", "auto"], "hft_trl/demo/assets/continual.yaml"
    )
    assert recipe.auto_checkpointing


def test_a_run_goes_on_where_there_is_more_memory(stage_of, monkeypatch):
    """The settings say what it came to, and a rerun may have come to another way."""
    found, recorded = [], []
    for memory in (RESERVED + 1, 10**12):
        monkeypatch.setattr(activation_checkpointing, "_memory", lambda memory=memory: memory)
        stage = stage_of("sft")
        settle_checkpointing(stage)
        recorded.append(settings(stage))
        found.append(stage.args.activation_checkpointing)
        assert recorded[-1]["sft"]["activation_checkpointing"] is found[-1]
    assert found == [True, False]
    assert _differences(stage, *recorded) == []


@pytest.mark.parametrize(
    ("values", "flags", "expected", "values_left", "flags_left"),
    [
        ({"activation_checkpointing": "auto", "bf16": True}, [], True, {"bf16": True}, []),
        ({"gradient_checkpointing": "auto"}, [], True, {}, []),
        ({"gradient_checkpointing": True}, ["--activation_checkpointing=auto", "--seed", "1"], True, {}, ["--seed", "1"]),
        ({"gradient_checkpointing": True}, ["--activation-checkpointing", "auto"], True, {}, []),
        ({}, ["--gradient_checkpointing", "false", "--gradient_checkpointing", "auto"], True, {}, []),
        ({"gradient_checkpointing": "auto"}, ["--activation_checkpointing", "auto", "--activation_checkpointing=false"], False, {}, ["--activation_checkpointing=false"]),
        ({"activation_checkpointing": False}, ["--seed", "1"], False, {"activation_checkpointing": False}, ["--seed", "1"]),
        ({"activation_checkpointing": "auto"}, ["--no_gradient_checkpointing"], False, {}, ["--activation_checkpointing=false"]),
        ({"gradient_checkpointing": True}, ["--gradient_checkpointing"], False, {}, ["--activation_checkpointing=true"]),
    ],
)  # fmt: skip
def test_the_last_word_decides(values, flags, expected, values_left, flags_left):
    """A flag before the file, under either name; what is no `auto` is left to transformers."""
    assert leaves_checkpointing(values, flags) is expected
    assert (values, flags) == (values_left, flags_left)


@pytest.mark.parametrize(
    "flags", [["--sft.no_activation_checkpointing=true"], ["--sft.no_activation_checkpointing", "true"]]
)
def test_a_flag_that_turns_off_takes_no_value(flags):
    """It turned checkpointing on."""
    with pytest.raises(HFTError, match=r"takes no value|'true' belongs to no flag"):
        parse_recipe(
            ["--model", "demo", "--sft.dataset", "demo", "--dpo.dataset", "demo", "--output_dir", "out", *flags]
        )


@pytest.mark.parametrize("flag", ["false", "true"])
def test_a_flag_wins_over_auto_in_the_file(tmp_path, flag):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: demo\noutput_dir: out\nsft:\n  dataset: demo\n  activation_checkpointing: auto\ndpo:\n  dataset: "
        "demo\n"
    )
    recipe = parse_recipe(["--config", str(path), "--sft.activation_checkpointing", flag])
    assert not recipe.stages["sft"].auto_checkpointing
    assert recipe.stages["sft"].args.activation_checkpointing is (flag == "true")
    assert parse_recipe(["--config", str(path)]).stages["sft"].auto_checkpointing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--strategy", "element"), "the masks of strategy element"),
        (("--label_smoothing_factor", "0.1"), "does not cover sft.label_smoothing_factor"),
        (("--optim", "sgd"), "does not cover sft.optim sgd: set it to true or false"),
        (("--max_length", "none"), "sft.max_length is None"),
    ],
)
def test_what_no_plan_knows_is_named(stage_of, flags, message):
    with pytest.raises(HFTError, match=message):
        settle_checkpointing(stage_of("sft", *flags))


def test_under_fsdp_it_is_computed_for_the_shipped_file(stage_of, monkeypatch):
    stage = stage_of("sft")
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)  # as accelerate's launcher does
    with pytest.raises(HFTError, match="covers fsdp2 only with bf16, but mixed_precision is 'no'"):
        settle_checkpointing(stage)


def test_adapters_and_gem_are_refused(stage_of, tmp_path):
    words = ["--output_dir", str(tmp_path), "--approach", "gem", "--sft.activation_checkpointing", "auto"]
    with pytest.raises(HFTError, match="gem"):
        parse_continual(words, "hft_trl/demo/assets/continual.yaml")
    stage = stage_of("sft")
    stage.hft = None
    with pytest.raises(HFTError, match="adapters"):
        settle_checkpointing(stage)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
    alone = activation_checkpointing._memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert activation_checkpointing._memory() == alone // 4


def test_recomputing_changes_no_bit(base, tulu, tmp_path):
    """So a run that goes on with another way ends in the same model."""
    saved = []
    for way in (0, 2, 1):
        kwargs = {"gradient_checkpointing_kwargs": {"every_n_layers": way}} if way > 1 else {}
        arguments = {**QUIET, "gradient_checkpointing": way > 0, **kwargs}
        trainer = ResumableSFTTrainer(
            model=str(base),
            args=SFTConfig(str(tmp_path / str(way)), **arguments),
            train_dataset=sft_dataset(tulu, "tulu"),
            processing_class=load_tokenizer(str(base)),
        )
        trainer.train()
        trainer.save_model()
        saved.append((tmp_path / str(way) / "model.safetensors").read_bytes())
    assert saved[0] == saved[1] == saved[2]
