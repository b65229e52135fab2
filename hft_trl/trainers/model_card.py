"""The model card's section on what HFT trained."""

from pathlib import Path

from huggingface_hub import ModelCard

from hft_trl.demo import shown
from hft_trl.selection import SELECTION_FILE, Selection

CITATION = """\
@inproceedings{hui2025hft,
  title     = {{HFT: Half Fine-Tuning for Large Language Models}},
  author    = {Hui, Tingfeng and Zhang, Zhenyu and Wang, Shuohuan and Xu, Weiran and Sun, Yu and Wu, Hua},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
  year      = {2025},
  url       = {https://arxiv.org/abs/2404.18466}
}"""


def add_section(path: Path, selection: Selection) -> None:
    """Add to TRL's model card, in place, which half of the model learned and how to cite the method."""
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), "hft"})
    shares = "\n".join(f"| {category} | {share:.4f} |" for category, share in selection.share.items())
    settings = ", ".join(f"{key} `{value}`" for key, value in selection.config.selecting().items())
    card.text += f"""
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
    card.save(path)
