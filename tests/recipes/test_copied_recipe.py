"""A recipe that was copied out of the repository and edited as the documentation shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE
from typer.testing import CliRunner

from hft_trl.cli import app
from hft_trl.selection import Selection

ROOT = Path(__file__).parents[2]


def edited(text: str, diff: str) -> str:
    """Apply the documentation's edit: lines that go, lines that come, and those that stay, after which lines come."""
    lines, place = text.splitlines(), 0
    for line in diff.splitlines():
        mark, content = line[0], line[1:]
        if mark == "+":
            lines.insert(place, content)
            place += 1
        else:
            place = lines.index(content, place)
            if mark == "-":
                del lines[place]
            else:
                place += 1
    return "\n".join(lines) + "\n"


@pytest.mark.e2e
def test_the_documented_third_stage_runs_from_another_folder(tmp_path):
    """
    SFT, DPO, then KTO.

    Each from the model before, with a fresh half and settings of its own, and all in one report.
    """
    (diff,) = re.findall(r"```diff\n(.+?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    assert CliRunner().invoke(app, ["recipe", "copy", "sft_then_dpo", str(tmp_path)]).exit_code == 0
    mine = tmp_path / "sft_then_dpo.py"
    mine.write_text(edited(mine.read_text(), diff))
    flags = "--kto.dataset demo --kto.split train_prefs[:64] --kto.max_length 96 --kto.hft.ratio 0.3 --output_dir run"
    flags += " --sft.split train[:64] --dpo.split train_prefs[:64]"
    for stage in ("sft", "dpo", "kto"):
        flags += f" --{stage}.max_steps 2 --{stage}.per_device_train_batch_size 4 --{stage}.report_to none"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(mine), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["sft", "dpo", "kto"]
    assert report["settings"]["kto"]["model"]["model_name_or_path"] == "../dpo"
    halves = [Selection.load(tmp_path / "run" / stage) for stage in ("sft", "dpo", "kto")]
    assert [half.config.ratio for half in halves] == [0.5, 0.5, 0.3]
    assert len({half.digest for half in halves}) == 3
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert again.stdout.count("is finished with these settings") == 3, again.stderr[-3000:]
