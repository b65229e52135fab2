"""
The embedded world: a small model, its data and its probes, so that the whole method can be watched without a network.

Importing this module loads nothing heavy: it only says where the shipped files lie.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""Folder of the shipped files, which `python -m hft_trl.demo.build` rebuilds from a seed."""

MODEL = ASSETS / "model"
"""The pre-trained base model and its tokenizer, which has no chat template."""

SFT_DATA = ASSETS / "data" / "sft"
"""Chat data in the schema of Tülu V2: `train.jsonl`."""

DPO_DATA = ASSETS / "data" / "dpo"
"""Preferences in the schema of UltraFeedback binarized: `train_prefs.jsonl` and `test_prefs.jsonl`."""

PROBES = ASSETS / "probes"
"""What the probes ask: `knowledge`, `questions` and `instructions`, each a `.jsonl.gz` file."""

RECIPE = ASSETS / "recipe.yaml"
"""The settings of the demo run."""

CONTINUAL_RECIPE = ASSETS / "continual.yaml"
"""The settings of the demo's continual run."""


def model_path(model: str) -> str:
    """The embedded model's folder for the word `demo`, every other hub id or folder as it is."""
    return str(MODEL) if model == "demo" else model


def shown(source: str) -> str:
    """The word `demo` for the embedded model and data, which lie where the package is installed; else as it is."""
    return "demo" if source in map(str, (MODEL, SFT_DATA, DPO_DATA)) else source


__all__ = ["ASSETS", "CONTINUAL_RECIPE", "DPO_DATA", "MODEL", "PROBES", "RECIPE", "SFT_DATA", "model_path", "shown"]
