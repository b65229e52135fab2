"""Configs with published hyper-parameters: their headers are true, and their smallest form runs."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from hft_trl import HFTConfig, demo, select
from hft_trl.planning.memory import LAYOUTS, Storage, awaiting_reduction, held, sizes
from hft_trl.skeleton import build_on_meta, shape_of

ROOT = Path(__file__).parents[2]
NAMES = ["tulu3-8b", "smollm3-3b", "olmo3-7b-instruct", "qwen3-0.6b", "qwen3-8b"]
SMALLEST = {
    "dataset": "demo",
    "max_length": 96,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "eval_strategy": "no",
}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A copy of the embedded model, which recipes do not probe as they do the model itself."""
    return shutil.copytree(demo.MODEL, tmp_path_factory.mktemp("embedded") / "model")


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_form_of_a_config_trains_both_stages(tmp_path, monkeypatch, embedded, name):
    """All that is not about size stays: losses, schedules, packing, clipping."""
    config = yaml.safe_load((ROOT / f"recipes/configs/{name}.yaml").read_text())
    config |= {"model": str(embedded), "output_dir": str(tmp_path / "run")}
    for stage, split in (("sft", "train[:8]"), ("dpo", "train_prefs[:8]")):
        given = {key: value for key, value in config[stage].items() if key not in ("dataset_config", "eval_split")}
        config[stage] = {**given, **SMALLEST, "split": split}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["recipes/sft_then_dpo.py", "--config", str(file)])
    runpy.run_path("recipes/sft_then_dpo.py", run_name="__main__")
    stages = json.loads((tmp_path / "run" / "report.json").read_text())["stages"]
    assert [(stage["name"], stage["steps"], stage["frozen_unchanged"]) for stage in stages] == [
        ("sft", 1, True),
        ("dpo", 1, True),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_is_planned_and_where_the_hyper_parameters_come_from(name):
    """State, reference, whole gradients and main memory; activations are not traced here."""
    text = (ROOT / f"recipes/configs/{name}.yaml").read_text()
    said = re.sub(r"\n#\s+", " ", text[: text.index("\nmodel:")])
    assert "Source: " in said
    assert "ours" in said
    (launch,) = re.findall(r"accelerate_configs/(\w+)\.yaml recipes", said)
    skeleton = build_on_meta(shape_of(yaml.safe_load(text)["model"]["model_name_or_path"]))
    found = []
    for method in ("hft", "fft"):
        numbers = sizes(skeleton, select(skeleton, HFTConfig(method=method)))
        parts = held(numbers, LAYOUTS[launch], 1, Storage(), True)
        reference = parts.pop("reference")
        del parts["communication"]
        whole = awaiting_reduction({"gradients": 0}, numbers)["gradients"]
        found.append([f"{number / 1e9:.0f} GB" for number in (sum(parts.values()), reference, whole)])
    half, full = found
    assert f"about {half[0]} of weights (float32), gradients and AdamW state for SFT (FFT: {full[0]})" in said
    assert f"{half[1]} more for the reference" in said
    processes = 8 if launch == "fsdp2" else 1
    assert f"{4 * skeleton.num_parameters() / 1e9 * processes:.0f} GB of main memory" in said
    if launch == "fsdp2":
        assert f"gradients that accumulate are whole in bfloat16, {half[2]} (FFT: {full[2]}) on each" in said
