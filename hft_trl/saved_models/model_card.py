"""Cards of saved models: what TRL's card lacks, and what HFT trained or a Half-Reset set back."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from hft_trl.demo import on_hub, shown
from hft_trl.selection import SELECTION_FILE, Selection

CITATION = """\
@inproceedings{hui2025hft,
  title     = {{HFT: Half Fine-Tuning for Large Language Models}},
  author    = {Hui, Tingfeng and Zhang, Zhenyu and Wang, Shuohuan and Xu, Weiran and Sun, Yu and Wu, Hua},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
  year      = {2025},
  url       = {https://arxiv.org/abs/2404.18466}
}"""


def complete(
    folder: str, selection: Selection | None, dataset_name: str | Sequence[str] | None, start: str | None = None
) -> None:
    """
    Complete TRL's card in a folder: start model, data, and which half learned.

    Only names on the hub become links. An adapter has no selection, and `start` names what it was trained for.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    datasets = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or ())
    card.data.datasets = [name for name in datasets if on_hub(name)] or None
    data = f" on {' and '.join(_link(name, 'datasets/') for name in datasets)}" if datasets else ""
    start = selection.start_model["name_or_path"] if selection is not None else start
    text = card.text.replace("[None](https://huggingface.co/None)", _link(start) if start else "a model in memory")
    text = text.replace(".\nIt has been trained", f"{data}.\nIt has been trained")
    card.text = text.replace('model="None"', f'model="{folder}"')
    if selection is not None and selection.config.method == "hft":
        card.data.tags = sorted({*(card.data.tags or []), "hft"})
        card.text += f"""
## Half Fine-Tuning

In this stage a part of the parameters learned and the rest kept the bits of the start model
`{shown(start) or "in memory"}` (weights `{selection.start_model["weights_digest"]}`).
{described(selection, "learned")}

Cite HFT as:

```bibtex
{CITATION}
```
"""
    card.save(path)


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if on_hub(name) else f"`{shown(name)}`"


def described(selection: Selection, did: str) -> str:
    """Return a selection's settings and shares in Markdown. `did` is what its trainable parameters did."""
    shares = "\n".join(f"| {category} | {share:.4f} |" for category, share in selection.share.items())
    settings = ", ".join(f"{key} `{value}`" for key, value in selection.config.selecting().items())
    return f"""\
Settings: {settings}. Selection `{selection.digest}`, listed in `{SELECTION_FILE}`.

| category | share that {did} |
|---|---|
{shares}"""
