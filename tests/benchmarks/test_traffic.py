"""benchmarks/traffic.py: what two real processes were counted to send is what the shapes say, to the byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def printed():
    command = [sys.executable, "benchmarks/traffic.py", "--json", "--processes", "2", "--steps", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)  # stdout holds nothing else


def counted(printed, stage):
    rows = [row for row in printed["counted"] if row["stage"] == stage]
    assert {row["processes"] for row in rows} == {2}
    return {row["variant"]: row for row in rows}


def computed(printed, stage, model="demo"):
    return {row["variant"]: row for row in printed["computed"] if (row["stage"], row["model"]) == (stage, model)}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weights_and_gradients_are_counted_as_the_shapes_say(printed, stage):
    """
    A process receives half of them, the other process's.

    Beside the weights only the metrics' few numbers are gathered.
    """
    shapes = computed(printed, stage)
    beside = set()
    for variant, row in counted(printed, stage).items():
        assert row["received"]["reduce-scatter"] == shapes[variant]["gradients"] / 2
        beside.add(row["received"]["all-gather"] - (shapes[variant]["layers"] + shapes[variant]["rest"]) / 2)
        assert row["received"]["all-reduce"] < 1000
        assert row["received"]["broadcast"] == 0
    assert len(beside) == 1
    assert 0 <= beside.pop() < 1000


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_replicated_half_changes_no_loss_and_no_gradient(printed, stage):
    rows = counted(printed, stage)
    assert rows["HFT, replicated"]["losses"] == rows["HFT"]["losses"]
    assert len(rows["HFT"]["losses"]) == 1
    assert rows["HFT, replicated"]["received"]["reduce-scatter"] == rows["HFT"]["received"]["reduce-scatter"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("model", ["demo", "meta-llama/Llama-2-7b-hf"])
def test_it_halves_the_layers_gathers_exactly(printed, stage, model):
    """Both models' layers can be halved exactly; the embedding, the head and the final norm are gathered as ever."""
    shapes = computed(printed, stage, model)
    assert shapes["HFT"]["layers"] == shapes["FFT"]["layers"] == 2 * shapes["HFT, replicated"]["layers"] > 0
    assert shapes["HFT"]["rest"] == shapes["FFT"]["rest"] == shapes["HFT, replicated"]["rest"] > 0
    assert shapes["HFT"]["gradients"] < shapes["FFT"]["gradients"]
