"""Parsing: files and flags become TRL's own config objects, and every mistake is named with its mend."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import one_line, parse_recipe, started_from
from trl import DPOConfig, KTOConfig, SFTConfig

from hft_trl import HFTConfig, demo
from hft_trl import recipe as trl_recipe
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.recipe import parse_stage

ROOT = Path(__file__).parents[2]
ALL = set((ROOT / "recipes" / "configs").glob("*.yaml"))
SMALL = ROOT / "recipes" / "configs" / "llama3.1-8b-24gb.yaml"
TRACE = ROOT / "recipes" / "configs" / "trace-llama2-7b-chat.yaml"
# Those of sft_then_dpo.py; the others are checked with their recipes
CONFIGS = sorted(path for path in ALL - {SMALL} if not path.name.startswith(("trace-", "frontier-")))


def write(tmp_path, **sections) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return str(path)


def demo_recipe(*argv: str):
    return parse_recipe([*argv], default_config=demo.RECIPE)


def test_without_arguments_it_is_the_embedded_world_with_hft_in_both_stages():
    recipe = demo_recipe()
    assert recipe.stages["sft"].model.model_name_or_path == str(demo.MODEL)
    assert recipe.stages["dpo"].model.model_name_or_path == recipe.stages["sft"].args.output_dir
    assert (recipe.stages["sft"].data.dataset, recipe.stages["dpo"].data.dataset) == (
        str(demo.SFT_DATA),
        str(demo.DPO_DATA),
    )
    assert (recipe.stages["sft"].hft.method, recipe.stages["dpo"].hft.method) == ("hft", "hft")
    assert not recipe.stages["sft"].args.bf16


def test_flags_win_over_the_file_and_keep_their_types(tmp_path):
    config = write(
        tmp_path,
        model="demo",
        output_dir="runs/x",
        hft={"ratio": 0.5},
        sft={
            "dataset": "demo",
            "learning_rate": "2e-5",
            "max_length": None,
            "logging_steps": 5,
            "report_to": ["none"],
        },
        dpo={"dataset": "demo", "split": "train_prefs", "beta": 0.1},
    )
    flags = "--sft.learning_rate 1e-5 --dpo.beta=0.05 --hft.ratio 0.3 --hft.exclude embed lm_head --sft.packing"
    recipe = parse_recipe(["--config", config, *shlex.split(flags)])
    assert isinstance(recipe.stages["sft"].args, SFTConfig)
    assert isinstance(recipe.stages["dpo"].args, DPOConfig)
    assert (recipe.stages["sft"].args.learning_rate, recipe.stages["dpo"].args.beta) == (1e-5, 0.05)
    assert (
        recipe.stages["sft"].args.max_length,
        recipe.stages["sft"].args.logging_steps,
        recipe.stages["sft"].args.packing,
    ) == (None, 5, True)
    assert recipe.stages["sft"].hft == HFTConfig(ratio=0.3, exclude=["embed", "lm_head"])
    assert (recipe.stages["sft"].args.output_dir, recipe.stages["dpo"].args.output_dir) == ("runs/x/sft", "runs/x/dpo")
    assert parse_recipe([f"--config={config}"]).stages["sft"].args.learning_rate == 2e-5


@pytest.mark.parametrize("sft", ["hft", "fft"])
@pytest.mark.parametrize("dpo", ["hft", "fft"])
def test_all_four_combinations_of_initialisation_and_method(sft, dpo):
    recipe = demo_recipe("--sft.method", sft, "--dpo.method", dpo)
    assert (recipe.stages["sft"].hft.method, recipe.stages["dpo"].hft.method) == (sft, dpo)
    recipe = demo_recipe("--method", sft)
    assert (recipe.stages["sft"].hft.method, recipe.stages["dpo"].hft.method) == (sft, sft)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sft.lerning_rate 1", ["unknown key sft.lerning_rate: did you mean sft.learning_rate?"]),
        ("--dpo.betta 1", ["dpo.betta", "did you mean dpo.beta?"]),
        ("--metod fft", ["metod", "did you mean method?"]),
        (
            "--stf.learning_rate 1",
            ["unknown key stf.learning_rate: did you mean sft.learning_rate or dpo.learning_rate?"],
        ),
        ("--method half", ["method", "half", "hft", "fft"]),
        ("--sft.method half", ["sft.method", "half"]),
        ("--hft.method fft", ["hft.method"]),
        ("--hft.ratio 0", ["hft.ratio is 0.0", "(0, 1]"]),
        ("--hft.ratio 1.5", ["hft.ratio is 1.5"]),
        ("--hft.strategy rows", ["hft.strategy", "rows", "category"]),
        ("--hft.exclude (", ["hft.exclude", "regular expression"]),
        ("--sft.learning_rate fast", ["sft.learning_rate", "fast"]),
        ("--sft.num_train_epochs", ["sft.num_train_epochs"]),
        ("--sft", ["--sft is a section", "such as --sft."]),
        ("--sft.output_dir elsewhere", ["sft.output_dir"]),
        ("--sft.drop_equal_pairs true", ["unknown key sft.drop_equal_pairs: did you mean dpo.drop_equal_pairs?"]),
        ("--ratio 0.3", ["unknown key ratio: did you mean hft.ratio?"]),
        ("--learning-rate=1e-5", ["did you mean sft.learning_rate or dpo.learning_rate?"]),
        ("--dataset x", ["did you mean sft.dataset or dpo.dataset?"]),
        ("--dataset_name x", ["did you mean sft.dataset or dpo.dataset?"]),
        ("--model_name_or_path x", ["did you mean model.model_name_or_path?"]),
        ("--sft.dataset_train_split x", ["did you mean sft.split?"]),
        ("--sft.dataset_name x", ["did you mean sft.dataset?"]),
        ("--sft.beta 1", ["did you mean dpo.beta?"]),
        ("--sft.evaluate x", ["did you mean evaluate?"]),
        ("--lerning_rate 1", ["did you mean sft.learning_rate or dpo.learning_rate?"]),
        ("--sft.no_learning_rate", ["unknown key sft.no_learning_rate: did you mean sft.learning_rate?"]),
        ("--sft.no-assistant-only-loss", ["did you mean sft.assistant_only_loss?"]),
        ("--method_ fft", ["unknown key method_: did you mean method?"]),
        (f"--config {SMALL}", ["unknown key", "did you mean model.model_name_or_path?"]),
        (f"--config {TRACE}", ["has the sections lora, which this recipe does not have", "run the recipe that"]),
        ("--sft.bf16 true", ["sft cannot be set up: Your setup doesn't support bf16/gpu", "use_cpu"]),
        ("--sft.eval_strategy sometimes", ["sft", "sometimes"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
        ("--config", ["--config"]),
        ("stray", ["stray"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(flags, words):
    with pytest.raises(HFTError) as error:
        demo_recipe(*shlex.split(flags))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sft": {"lerning_rate": 1}}, ["sft.lerning_rate", "did you mean sft.learning_rate?"]),
        ({"stages": 2}, ["stages"]),
        ({"sft": 3}, ["section sft", "3"]),
        ({"sft": {"learning_rate": [1, 2]}}, ["sft.learning_rate is [1, 2]", "float"]),
        ({"sft": {"eval_strategy": False}}, ["sft.eval_strategy is False", "quote it"]),
        ({"output_dir": None}, ["output_dir"]),
        ({"learning_rate": 1e-5}, ["unknown key learning_rate: did you mean sft.learning_rate or dpo.learning_rate?"]),
        ({"sft.seed": 1}, ["unknown key sft.seed: did you mean seed, indented below sft:?"]),
        (
            {"hft": {"exclude": ["norm", None]}},
            ["hft.exclude cannot be set up: each entry of ['norm', None] must be str"],
        ),
        ({"env": {"CUDA_VISIBLE_DEVICES": None}}, ["env of ", "write variables and their values"]),
        ({"env": {"A=B": 1}}, ["env of ", "illegal environment variable name"]),
        ({"sft": {"datasets": ["demo", None]}}, ["sft.datasets cannot", "['demo', None] must be DatasetConfig"]),
        ({"sft": {"dataset": "demo", "model_init_kwargs": "a=b"}}, ["sft.model_init_kwargs is 'a=b': give keys"]),
    ],
)
def test_a_mistake_in_the_file_is_named_in_one_line(tmp_path, change, words):
    sections = {"model": "demo", "output_dir": "o", "sft": {"dataset": "demo"}, "dpo": {"dataset": "demo"}}
    config = write(tmp_path, **{**sections, **change})
    with pytest.raises(HFTError) as error:
        parse_recipe(["--config", config])
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("missing", ["model", "output_dir", "sft"])
def test_a_missing_key_is_named(tmp_path, missing):
    sections = {"model": "demo", "output_dir": "o", "sft": {"dataset": "demo"}, "dpo": {"dataset": "demo"}}
    sections.pop(missing)
    name = {"model": "model.model_name_or_path", "sft": "sft.dataset"}.get(missing, missing)
    with pytest.raises(HFTError, match=f"^{name} is missing: set it in the file, or with --{name}[.]$"):
        parse_recipe(["--config", write(tmp_path, **sections)])


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "plain"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(HFTError, match=r"broken\.yaml"):
        parse_recipe(["--config", str(tmp_path / "broken.yaml")])


@pytest.mark.parametrize(
    "text", ["env: {WANDB_API_KEY: hunter2, A: }}", "env: {WANDB_API_KEY: hunter2, WANDB_API_KEY: b}"]
)
def test_an_error_of_yaml_has_the_line_and_no_secret_of_it(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(HFTError, match=r"broken\.yaml.*line 1") as error:
        parse_recipe(["--config", str(tmp_path / "broken.yaml")])
    assert "hunter2" not in one_line(error)


@pytest.mark.parametrize("again", ["sft: {dataset: demo}", "hft: {ratio: 0.3, ratio: 0.4}"])
def test_a_key_that_is_there_twice_is_rejected(tmp_path, again):
    """The first value would be lost. A merged mapping may be overridden."""
    config = tmp_path / "config.yaml"
    text = "model: demo\noutput_dir: o\nsft: &sft {dataset: demo, seed: 1}\ndpo: {<<: *sft, seed: 2}\n"
    config.write_text(text)
    assert [stage.args.seed for stage in parse_recipe(["--config", str(config)]).stages.values()] == [1, 2]
    config.write_text(text + again)
    with pytest.raises(HFTError, match=r"(sft|ratio) occurs twice"):
        parse_recipe(["--config", str(config)])


def test_a_copied_recipe_with_fewer_stages_runs_with_the_file_of_its_original():
    stages = trl_recipe.parse_recipe([], {"sft": SFTConfig}, demo.RECIPE).stages
    assert list(stages) == ["sft"]
    with pytest.raises(HFTError, match="has the sections dpo, which this recipe does not have"):
        trl_recipe.parse_recipe(["--config", str(demo.RECIPE)], {"sft": SFTConfig})


def test_the_demos_settings_train_no_other_model_unless_their_file_is_named(tmp_path):
    """Only the word demo is the demo's model; a default file for another model of one's own is no demo."""
    for model in ("Qwen/Qwen3-0.6B", str(demo.MODEL)):
        with pytest.raises(HFTError) as error:
            demo_recipe("--model", model, "--sft.dataset", "mine.jsonl", "--evaluate", "x")
        assert one_line(error).startswith(
            f"model is '{model}', but without --config every setting is the embedded demo"
        )
        assert "--config recipes/configs/qwen3-4b.yaml" in str(error.value)
        with pytest.raises(HFTError, match="but without --config"):
            demo_recipe(f"--model.model-name-or-path={model}")
        assert demo_recipe(*started_from(model)).stages["sft"].model.model_name_or_path == model
    assert demo_recipe("--model", "demo", "--sft.dataset", "mine.jsonl").stages["sft"].data.dataset == "mine.jsonl"
    sections = {"model": "org/mine", "output_dir": "o", "sft": {"dataset": "demo"}, "dpo": {"dataset": "demo"}}
    recipe = parse_recipe(["--model", "org/other"], default_config=write(tmp_path, **sections))
    assert recipe.stages["sft"].model.model_name_or_path == "org/other"


def test_a_home_folder_is_expanded_in_flags_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path, model="~/m", output_dir="~/o", sft={"dataset": "~/s.jsonl"}, dpo={"dataset": "demo"})
    recipe = parse_recipe(["--config", file, "--retention.texts=~/t.txt"])
    sft = recipe.stages["sft"]
    found = sft.model.model_name_or_path, recipe.run.output_dir, sft.data.dataset, sft.retention.texts
    assert found == tuple(f"{tmp_path}/{name}" for name in ("m", "o", "s.jsonl", "t.txt"))


def test_a_recipe_takes_no_checkpoint_to_resume_from(tmp_path):
    with pytest.raises(HFTError, match="resumes from the newest whole checkpoint"):
        parse_recipe(["--output_dir", str(tmp_path), "--sft.resume_from_checkpoint", "x"], default_config=demo.RECIPE)


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_user_error():
        demo_recipe("--sft.lerning_rate", "1")
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: unknown key sft.lerning_rate")
    assert captured.out == ""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_down_to_trl(config, monkeypatch):
    """Each file, and the header's launch line, give the arguments that they state."""
    monkeypatch.setattr("hft_trl.demo.real_model.smollm2_path", lambda: str(demo.MODEL))  # it needs packages
    monkeypatch.setattr("hft_trl.trainers.compatibility.find_spec", lambda _: True)  # so do flash attention and Liger
    use_cpu = ["--sft.use_cpu", "true", "--dpo.use_cpu", "true"]
    recipe = parse_recipe(["--config", str(config), *use_cpu])
    header = config.read_text().split("\nmodel:")[0]
    assert all(word in header for word in ("Machine:", "Memory:", "Launch:"))
    launch = shlex.split(next(line for line in header.splitlines() if "Launch:" in line).split("Launch:")[1])
    assert launch[:2] == ["accelerate", "launch"]
    assert (ROOT / launch[launch.index("--config_file") + 1]).is_file()
    assert (ROOT / launch[launch.index("--config") + 1]) == config
    raw = yaml.safe_load(config.read_text())
    for stage in (recipe.stages["sft"], recipe.stages["dpo"]):
        stated = raw[stage.name]
        if stated.pop("activation_checkpointing", None) == "auto":
            assert stage.auto_checkpointing
        for key, value in stated.items():
            place = (
                stage.data
                if key in ("dataset", "dataset_config", "split", "eval_split", "drop_equal_pairs")
                else stage.args
            )
            found = getattr(place, key)
            assert found == value or str(getattr(found, "value", found)) == str(value), key
        assert stage.args.bf16
    assert recipe.stages["sft"].args.assistant_only_loss


EIGHT_GPUS = [path for path in CONFIGS if path.stem != "smollm2-135m"]


@pytest.mark.parametrize("config", EIGHT_GPUS, ids=lambda path: path.stem)
def test_a_config_for_gpus_evaluates_and_its_commented_keys_are_keys(config, tmp_path, monkeypatch):
    """Both stages have evaluation rows apart from the training rows; what is commented can be uncommented."""
    monkeypatch.setattr("hft_trl.trainers.compatibility.find_spec", lambda _: True)  # it needs flash attention
    text = config.read_text()
    uncommented = re.sub(r"(?m)^  # (\w+: )", r"  \1", text)
    (tmp_path / "all.yaml").write_text(uncommented.replace("wandb", "none"))
    recipe = parse_recipe(["--config", str(tmp_path / "all.yaml"), "--sft.use_cpu", "true", "--dpo.use_cpu", "true"])
    for stage in recipe.stages.values():
        assert stage.auto_checkpointing
        assert stage.args.eval_strategy == "epoch"
        assert stage.data.eval_split not in (None, stage.data.split)
        assert stage.args.per_device_eval_batch_size == stage.args.per_device_train_batch_size
        assert stage.args.ddp_timeout == 7200
        assert stage.args.push_to_hub
        assert f"hft-{stage.name}" in stage.args.run_name
        assert f"hft-{stage.name}" in stage.args.hub_model_id


def test_the_flat_config_for_one_small_gpu_parses_down_to_trl():
    """Every key is where it belongs, and what its settings cannot be with is left out."""
    raw = yaml.safe_load(SMALL.read_text())
    assert all(f"\n# {word}" in SMALL.read_text() for word in ("Machine:", "Memory:", "Launch:"))
    stage, _ = parse_stage("sft", SFTConfig, ["--config", str(SMALL), "--use_cpu", "true"])
    for key, value in raw.items():
        places = [place for place in (stage.hft, stage.args, stage.model) if key in vars(place)]
        found = (
            vars(places[0])[key]
            if places
            else {"dataset_name": stage.data.dataset, "dataset_train_split": stage.data.split}[key]
        )
        assert found == value or str(getattr(found, "value", found)) == str(value), key
    assert stage.args.gradient_accumulation_steps == 1


def test_the_papers_hyper_parameters(tmp_path):
    """Paper: SFT 2e-5, 2 epochs, batch 128, length 4096; DPO 5e-7, batch 32; 8 GPUs."""
    recipe = parse_recipe(
        ["--config", str(ROOT / "recipes/configs/llama2-7b.yaml"), "--sft.use_cpu", "true", "--dpo.use_cpu", "true"]
    )
    sft, dpo = recipe.stages["sft"].args, recipe.stages["dpo"].args
    assert (sft.learning_rate, sft.num_train_epochs, sft.max_length, sft.lr_scheduler_type) == (
        2e-5,
        2,
        4096,
        "linear",
    )
    assert (dpo.learning_rate, dpo.beta) == (5e-7, 0.1)
    for args, batch in ((sft, 128), (dpo, 32)):
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == batch


def test_the_flat_style_is_trls_own(tmp_path):
    config = tmp_path / "trl.yaml"
    config.write_text(
        "model_name_or_path: demo\ndataset_name: demo\ndataset_train_split: train\nlearning_rate: 2e-5\n"
        "output_dir: runs/flat\ndtype: bfloat16\nuse_cpu: true\nattn_implementation: sdpa\nenv:\n  HFT_TRL_TEST: one\n"
    )
    stage, overwrite = parse_stage(
        "sft", SFTConfig, ["--config", str(config), "--learning_rate", "1e-5", "--ratio", "0.3"]
    )
    assert (stage.args.learning_rate, stage.hft, overwrite) == (1e-5, HFTConfig(ratio=0.3), False)
    assert stage.args.model_init_kwargs["dtype"] == "bfloat16"
    assert (stage.model.model_name_or_path, stage.data.dataset) == (str(demo.MODEL), str(demo.SFT_DATA))


def test_one_seed_flag_serves_trainer_and_selection_unless_the_selection_has_its_own():
    flags = "--model_name_or_path demo --dataset_name demo --output_dir o --seed 7"
    stage, _ = parse_stage("dpo", DPOConfig, shlex.split(flags))
    assert (stage.args.seed, stage.hft.seed) == (7, 7)
    stage, _ = parse_stage("dpo", DPOConfig, shlex.split(flags + " --hft_seed 3 --method fft"))
    assert (stage.args.seed, stage.hft.seed, stage.hft.method) == (7, 3, "fft")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lerning_rate 1", ["lerning_rate", "did you mean learning_rate?"]),
        ("--use_peft", ["use_peft", "adapters"]),
        ("--load_in_4bit", ["adapters"]),
        ("--dataset_streaming", ["streaming"]),
        ("--ratio 2", ["ratio is 2.0"]),
        ("--model demo", ["unknown key model: did you mean model_name_or_path?"]),
        ("--dataset demo", ["did you mean dataset_name?"]),
        ("--split train", ["did you mean dataset_train_split?"]),
        ("--sft.learning_rate 1", ["unknown key sft.learning_rate: did you mean learning_rate?"]),
        (f"--config {CONFIGS[-1]}", ["has the sections model, hft, sft, dpo", "which this recipe does not have"]),
    ],
)
def test_a_mistake_in_the_flat_style_is_named(flags, words):
    with pytest.raises(HFTError) as error:
        parse_stage(
            "sft", SFTConfig, shlex.split(f"--model_name_or_path demo --dataset_name demo --output_dir o {flags}")
        )
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_mistake_in_a_flat_file_is_named(tmp_path):
    for key, meant in (("lerning_rate", "learning_rate"), ("model", "model_name_or_path")):
        with pytest.raises(HFTError, match=f"^unknown key {key}: did you mean {meant}[?]$"):
            parse_stage("sft", SFTConfig, ["--config", write(tmp_path, output_dir="o", **{key: "1"})])


def test_the_flat_style_says_what_is_missing():
    with pytest.raises(HFTError, match="model_name_or_path is missing"):
        parse_stage("sft", SFTConfig, ["--dataset_name", "demo", "--output_dir", "o"])
    with pytest.raises(HFTError, match="dataset_name is missing"):
        parse_stage("sft", SFTConfig, ["--model_name_or_path", "demo", "--output_dir", "o"])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_flag_with_its_default_hft_s_first_and_nothing_else_happens(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for parse, first, then in (
        (lambda: parse_recipe([flag], help_text="How to run it."), "--hft.ratio float", "--sft.learning_rate float"),
        (lambda: parse_stage("sft", SFTConfig, [flag], "How to run it."), "--ratio float", "--learning_rate float"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse()
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith("How to run it.\n")
        assert max(map(len, text.splitlines())) <= 100
        assert 0 < text.index(f"  {first}") < text.index(f"  {then}")
        text = " ".join(text.split())
        assert "ratio float Share of the layers' parameters that learn, in (0, 1]. (default: 0.5)" in text
        assert re.search(r"assistant_only_loss bool [^-]*\(default: True\)", text)  # the recipe's, not TRL's
        assert re.search(r"output_dir str [A-Z]", text)
    known = {field.name for field in fields(DPOConfig)} - {"output_dir", "trust_remote_code", "resume_from_checkpoint"}
    with pytest.raises(SystemExit):
        parse_recipe([flag])
    assert set(re.findall(r"--dpo\.(\w+)", capsys.readouterr().out)) >= known


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("torch_dtype", "model.dtype"),
        ("model_name", "model.model_name_or_path"),
        ("base_model", "model.model_name_or_path"),
        ("dataset_mixture", "sft.datasets or dpo.datasets"),
        ("max_seq_length", "sft.max_length or dpo.max_length"),
        ("sequence_len", "sft.max_length or dpo.max_length"),
        ("cutoff_len", "sft.max_length or dpo.max_length"),
        ("micro_batch_size", "sft.per_device_train_batch_size or dpo.per_device_train_batch_size"),
        ("num_epochs", "sft.num_train_epochs or dpo.num_train_epochs"),
        ("finetuning_type", "method"),
    ],
)
def test_a_name_of_another_trainer_s_files_is_answered_with_ours(tmp_path, key, meant):
    """In files with sections and in flat ones."""
    value = {"datasets": []} if key == "dataset_mixture" else "x"
    with pytest.raises(HFTError) as error:
        parse_recipe(["--config", write(tmp_path, model="demo", output_dir="o", **{key: value})])
    assert one_line(error) == f"unknown key {key}: did you mean {meant}?"
    flat = meant.partition(" or ")[0].rpartition(".")[2]
    with pytest.raises(HFTError, match=f"^unknown key {key}: did you mean {flat}[?]$"):
        parse_stage("sft", SFTConfig, ["--config", write(tmp_path, output_dir="o", **{key: value})])


def test_all_unknown_keys_of_a_file_are_named_at_once(tmp_path):
    file = write(tmp_path, base_model="m", stage="sft", output_dir="o", sft={"lerning_rate": 1, "qqq": 2})
    with pytest.raises(HFTError) as error:
        parse_recipe(["--config", file, "--dpo.betta", "1"])
    assert one_line(error) == (
        "unknown key base_model: did you mean model.model_name_or_path? unknown key stage: the recipe and its "
        "sections say which stages are trained, so drop it. unknown key sft.lerning_rate: did you mean "
        "sft.learning_rate? unknown key sft.qqq: --help lists the keys. unknown key dpo.betta: did you mean dpo.beta?"
    )


def test_a_recipe_has_the_stages_that_it_names_each_with_settings_and_data_of_its_own(tmp_path):
    """
    In their order, each from the model before; a mixture in place of a data set, and HFT's settings for one stage
    alone.
    """
    file = write(
        tmp_path,
        model="demo",
        output_dir="o",
        hft={"ratio": 0.4, "exclude": ["norm"]},
        first={"dataset": "demo", "method": "fft"},
        second={"datasets": [{"path": "demo", "split": "train"}, "other"], "hft": {"ratio": 0.3}, "beta": 0.2},
        third={"dataset": "demo", "loss_type": "kto"},
    )
    stages = {"first": SFTConfig, "second": DPOConfig, "third": KTOConfig}
    flags = ["--config", file, "--second.hft.seed", "7", "--third.hft.ratio=0.2"]
    recipe = trl_recipe.parse_recipe(flags, stages)
    first, second, third = recipe.stages.values()
    assert [type(stage.args) for stage in (first, second, third)] == [*stages.values()]
    assert [stage.model.model_name_or_path for stage in (second, third)] == ["o/first", "o/second"]
    assert [stage.base and stage.base.model_name_or_path for stage in (first, second)] == [None, str(demo.MODEL)]
    assert [stage.hft.method for stage in (first, second, third)] == ["fft", "hft", "hft"]
    assert [stage.hft.ratio for stage in (first, second, third)] == [0.4, 0.3, 0.2]
    assert [stage.hft.seed for stage in (second, third)] == [7, 42]
    assert all(stage.hft.exclude == ["norm"] for stage in (first, second, third))
    assert [part.path for part in second.mixture.datasets] == ["demo", "other"]
    assert (second.args.beta, third.args.loss_type) == (0.2, "kto")
    with pytest.raises(HFTError, match=r"unknown key second\.hft\.ratoi: did you mean second\.hft\.ratio[?]"):
        trl_recipe.parse_recipe([*flags, "--second.hft.ratoi", "0.1"], stages)
    with pytest.raises(HFTError, match=r"first has a dataset, .*, and datasets, a mixture"):
        trl_recipe.parse_recipe(["--config", write(tmp_path, model="demo", output_dir="o", first={"dataset": "demo", "datasets": [{"path": "x"}]})], {"first": SFTConfig})  # fmt: skip


def test_what_is_on_by_default_is_turned_off_by_a_flag_and_in_a_file_by_its_own_name(tmp_path):
    assert not demo_recipe("--hft.no_train_embeddings").stages["sft"].hft.train_embeddings
    sft = {"dataset": "demo", "no_bf16": True, "no_train_embeddings": True}
    with pytest.raises(HFTError, match=r"unknown key sft\.no_bf16: did you mean sft\.bf16\?") as error:
        parse_recipe(["--config", write(tmp_path, model="demo", output_dir="x", sft=sft)])
    one_line(error)


@pytest.mark.parametrize("name", ["model", "hft", "env", "method", "base", "history", "", "a.b", "..", "a/b"])
def test_a_stage_has_no_name_of_something_else(tmp_path, name):
    config = write(tmp_path, model="demo", output_dir="x", sft={"dataset": "demo"})
    with pytest.raises(HFTError, match=f"STAGES has a stage named '{re.escape(name)}': give it another name"):
        trl_recipe.parse_recipe(["--config", config], {"sft": SFTConfig, name: SFTConfig})
