"""The embedded world: a small model, its data and its probes, for runs without a network."""

from pathlib import Path

from hft_trl.demo import real_model

ASSETS = Path(__file__).parent / "assets"  # benchmarks/build_demo.py rebuilds them from a seed
MODEL = ASSETS / "model"  # the pre-trained base model and its tokenizer, which has no chat template
SFT_DATA = ASSETS / "data" / "sft"  # chats in the schema of Tülu V2: train.jsonl
DPO_DATA = ASSETS / "data" / "dpo"  # preferences in that of UltraFeedback binarized: {train,test}_prefs.jsonl.gz
PROBES = ASSETS / "probes"  # rows: knowledge, questions and instructions, each a .jsonl.gz file
RECIPE = ASSETS / "recipe.yaml"  # the settings of the demo run
CONTINUAL_RECIPE = ASSETS / "continual.yaml"  # and those of its continual run
TASKS = ASSETS / "tasks"  # eight small tasks in TRACE's layout, which benchmarks/demo_tasks.py rebuilds from a seed
MEANINGS = {
    "knowledge": "facts about people that fine-tuning never mentions, completed exactly",
    "ability": "mean of questions and instructions about people and items that it never mentions, answered right",
    "concise": "questions answered right without a farewell, as the preference data teach",
}
"""What the main scores of the probes are, in percent."""


def model_path(model: str) -> str:
    """Return the folder for the words `demo` and `smollm2`, and another hub id or folder unchanged."""
    if model == real_model.NAME:
        return real_model.smollm2_path()
    return str(MODEL) if model == "demo" else model


def shown(source: str) -> str:
    """Return `demo` or `smollm2` for paths of these models and data, and other sources unchanged."""
    if real_model.is_smollm2(source):
        return real_model.NAME
    return "demo" if source in map(str, (MODEL, SFT_DATA, DPO_DATA)) else source


def address(model: str, revision: str | None) -> str:
    """Return a folder, or a hub id with its revision, `id@revision`, unless this is main."""
    return model if Path(model).is_dir() or revision in (None, "main") else f"{model}@{revision}"


def on_hub(source: str) -> bool:
    """Return whether a name is that of a model or data set on the hub: nothing local has it."""
    return bool(source) and not Path(model_path(source)).exists()
