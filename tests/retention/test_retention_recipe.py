"""The section `retention` of recipes: parsed and checked before training, measured in every stage, reported."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import one_line, parse_recipe, started_from, tulu_row, ultrafeedback_row
from trl import SFTConfig

from hft_trl import HFTError, demo
from hft_trl.recipe import parse_stage, prepare
from hft_trl.recipe.arguments import RetentionArguments
from hft_trl.retention.meter import BASE_FILE

ROOT = Path(__file__).parents[2]
SINGLE = ["--model_name_or_path", "demo", "--dataset_name", "demo", "--output_dir", "runs/x"]


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Flags of the section for both styles."""
    found = {
        "texts": lines(tmp_path / "texts.jsonl", [{"text": f"Person {n} lives in city {n}."} for n in range(4)]),
        "facts": lines(tmp_path / "facts.jsonl", [{"text": "City 1 is", "answer": "large", "others": ["small"]}] * 2),
        "prompts": lines(tmp_path / "prompts.jsonl", [tulu_row(number) for number in range(3)]),
    }
    return {name: [f"--{{}}{name}", path] for name, path in found.items()}


@pytest.fixture
def run(base, tmp_path):
    """Runs the recipe of both stages on a tiny model inside the test's process."""
    sft = lines(tmp_path / "sft.jsonl", [tulu_row(number) for number in range(32)])
    dpo = lines(tmp_path / "dpo.jsonl", [ultrafeedback_row(number) for number in range(32)])
    common = [
        *started_from(base),
        "--output_dir",
        str(tmp_path / "run"),
        "--dpo.split",
        "train",
        "--sft.max_steps",
        "3",
    ]
    common += ["--sft.dataset", sft, "--dpo.dataset", dpo, "--dpo.max_steps", "2"]
    main = runpy.run_path(str(ROOT / "recipes/sft_then_dpo.py"), run_name="recipe")["main"]

    def run_inside(*flags):
        main(parse_recipe([*common, *map(str, flags)]))
        return json.loads((tmp_path / "run" / "report.json").read_text())["retention"]

    return run_inside


def dotted(files, *names) -> list[str]:
    return [word.format("retention.") for name in names for word in files[name]]


def test_a_file_and_flags_and_flat_flags_give_the_same_section(tmp_path, files):
    config = yaml.safe_load(demo.RECIPE.read_text()) | {"retention": {"texts": "other.txt", "every": 5}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    flags = dotted(files, "texts", "facts")
    stages = parse_recipe(["--config", str(tmp_path / "config.yaml"), *flags, "--retention.max_rows", "7"]).stages
    expected = RetentionArguments(files["texts"][1], files["facts"][1], None, 5, 7)
    assert [stage.retention for stage in stages.values()] == [expected] * 2
    flat = [word.format("retention_") for name in ("texts", "facts") for word in files[name]]
    stage, _ = parse_stage("sft", SFTConfig, [*SINGLE, *flat, "--retention_every", "5", "--retention_max_rows", "7"])
    assert stage.retention == expected


def test_without_a_section_only_the_embedded_model_has_rows_and_max_rows_0_measures_nothing(base):
    def of(*flags):
        return [stage.retention for stage in parse_recipe([*flags], default_config=demo.RECIPE).stages.values()]

    assert of() == [RetentionArguments()] * 2
    assert of("--retention.every", "5") == [RetentionArguments(every=5)] * 2
    assert of("--retention.max_rows", "0") == of(*started_from(base)) == [None, None]
    assert parse_stage("sft", SFTConfig, SINGLE)[0].retention == RetentionArguments()
    with pytest.raises(HFTError, match="retention has no texts, facts or prompts"):
        of(*started_from(base), "--retention.every", "5")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--retention.text x", ["unknown key retention.text", "did you mean retention.texts?"]),
        ("--texts x", ["unknown key texts", "did you mean retention.texts?"]),
        ("--retention.every 0", ["retention.every is 0", "from 1"]),
        ("--retention.max_rows -1", ["retention.max_rows is -1", "from 0"]),
        ("--retention x", ["--retention is a section", "--retention.texts"]),
    ],
)
def test_a_mistake_in_the_section_is_named(flags, words):
    with pytest.raises(HFTError) as error:
        parse_recipe(flags.split(), default_config=demo.RECIPE)
    assert all(word in one_line(error) for word in words)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{}\n", "row 1 of texts")])
def test_a_wrong_file_is_found_before_anything_is_trained_or_removed(tmp_path, content, message):
    path = tmp_path / "wrong.jsonl"
    if content is not None:
        path.write_text(content)
    output = ["--output_dir", str(tmp_path / "run"), "--overwrite"]
    recipe = parse_recipe(["--retention.texts", str(path), *output], default_config=demo.RECIPE)
    with pytest.raises(HFTError, match=message):
        prepare(list(recipe.stages.values()), recipe.run.overwrite)
    assert not (tmp_path / "run").exists()


def test_every_stage_is_measured_against_the_base_of_the_run(run, files, tmp_path):
    found = run(*dotted(files, *files), "--retention.every", 2)
    assert list(found) == ["base", "sft", "dpo", "history"]
    assert {name: [row["step"] for row in rows] for name, rows in found["history"].items()} == {
        "sft": [0, 2, 3],
        "dpo": [0, 2],
    }
    assert found["base"]["base_kl"] == 0
    assert found["sft"]["base_kl"] > 0
    for name, value in found["sft"].items():  # DPO begins where SFT ended
        assert found["history"]["dpo"][0][name] == pytest.approx(value, abs=1e-6)
    assert (tmp_path / "run" / "sft" / BASE_FILE).is_file()
    assert not (tmp_path / "run" / "dpo" / BASE_FILE).exists()
    page = (tmp_path / "run" / "report.md").read_text()
    assert "KL to the base" in page
    assert "retention.png" in page
    assert (tmp_path / "run" / "retention.png").stat().st_size > 500
    before = (tmp_path / "run" / "sft" / "model.safetensors").stat().st_mtime_ns
    assert run() == found  # the report of a finished run, whose history has the figures
    assert (tmp_path / "run" / "sft" / "model.safetensors").stat().st_mtime_ns == before


def test_a_section_that_is_added_after_the_first_stage_has_no_predictions_of_the_runs_base(run, files, tmp_path):
    """SFT is finished without a meter, and DPO is left: a KL to the SFT model would pass for one to the base."""
    assert run() == {}
    for path in (tmp_path / "run" / "dpo").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "_run.lock":
            path.unlink()
    with pytest.raises(HFTError, match=r"does not exist: restore it, start the run again, or leave prompts out"):
        run(*dotted(files, "prompts"))
    found = run(*dotted(files, "texts"))
    assert list(found) == ["dpo", "history"]
