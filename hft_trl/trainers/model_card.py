"""What TRL's model card lacks: the names of what is not on the hub, and what HFT trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from hft_trl.demo import on_hub, shown
from hft_trl.selection import SELECTION_FILE, Selection

if TYPE_CHECKING:
    from hft_trl.trainers.mixin import HFTMixin

CITATION = """\
@inproceedings{hui2025hft,
  title     = {{HFT: Half Fine-Tuning for Large Language Models}},
  author    = {Hui, Tingfeng and Zhang, Zhenyu and Wang, Shuohuan and Xu, Weiran and Sun, Yu and Wu, Hua},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
  year      = {2025},
  url       = {https://arxiv.org/abs/2404.18466}
}"""


def complete(trainer: "HFTMixin", dataset_name: str | Sequence[str] | None) -> None:
    """
    Complete TRL's model card in place: what the model started from, its data, and which half of it learned.

    Only names on the hub become links. Local ones are written as they were given.
    """
    path, selection = Path(trainer.args.output_dir) / "README.md", trainer.hft_selection
    card = ModelCard.load(path)
    datasets = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or ())
    card.data.datasets = [name for name in datasets if on_hub(name)] or None
    data = f" on {' and '.join(_link(name, 'datasets/') for name in datasets)}" if datasets else ""
    start = selection.start_model["name_or_path"]
    text = card.text.replace("[None](https://huggingface.co/None)", _link(start) if start else "a model in memory")
    text = text.replace(".\nIt has been trained", f"{data}.\nIt has been trained")
    card.text = text.replace('model="None"', f'model="{trainer.args.output_dir}"')
    if selection.config.method == "hft":
        card.data.tags = sorted({*(card.data.tags or []), "hft"})
        card.text += _section(selection)
    card.save(path)


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if on_hub(name) else f"`{shown(name)}`"


def _section(selection: Selection) -> str:
    shares = "\n".join(f"| {category} | {share:.4f} |" for category, share in selection.share.items())
    settings = ", ".join(f"{key} `{value}`" for key, value in selection.config.selecting().items())
    return f"""
## Half Fine-Tuning

In this stage a part of the parameters learned and the rest kept the bits of the start model
`{shown(selection.start_model["name_or_path"])}` (weights `{selection.start_model["weights_digest"]}`).
Settings: {settings}. Selection `{selection.digest}`, listed in `{SELECTION_FILE}`.

| category | share that learned |
|---|---|
{shares}

Cite HFT as:

```bibtex
{CITATION}
```
"""
