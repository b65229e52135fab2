"""Shapes of well-known models that come with the package, so that they can be planned for without a network."""

from pathlib import Path

from hft_trl import demo

SHAPES = Path(__file__).parents[1] / "shapes"
"""
Folders `OWNER/NAME` with a `config.json` of the numbers that decide sizes, and the type of the published weights; there are no
weights and no tokenizer.
"""


def built_in() -> list[str]:
    """Hub ids of the built-in shapes, sorted."""
    return sorted(str(path.parent.relative_to(SHAPES)) for path in SHAPES.glob("*/*/config.json"))


def shape_of(model: str) -> str:
    """Where a model's config is: the package's own folder for a built-in shape or `demo`, else the folder or hub id itself."""
    if model in built_in() and not Path(model).is_dir():
        return str(SHAPES / model)
    return demo.model_path(model)
