"""What a recipe is made of: stages that are parsed, prepared, trained from where they stand, and reported."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hft_trl.recipe.preparation import prepare
    from hft_trl.recipe.recipe import Recipe, parse_recipe, parse_stage
    from hft_trl.recipe.reporting import report
    from hft_trl.recipe.stage import Stage

__all__ = ["Recipe", "Stage", "parse_recipe", "parse_stage", "prepare", "report"]

# Loaded when first asked for: what only reads rows, say, needs no stages.
_HOMES = {
    "Recipe": "recipe",
    "Stage": "stage",
    "parse_recipe": "recipe",
    "parse_stage": "recipe",
    "prepare": "preparation",
    "report": "reporting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
