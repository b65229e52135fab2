"""Parse recipes, and prepare, train, resume and report their stages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hft_trl.recipe.recipe import Recipe, parse_recipe, parse_stage, prepare, report
    from hft_trl.recipe.stage import Stage

__all__ = ["Recipe", "Stage", "parse_recipe", "parse_stage", "prepare", "report"]


def __getattr__(name: str) -> Any:
    """Load a name when it is first used: modules that only read rows do not need stages."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "stage" if name == "Stage" else "recipe"
    return getattr(import_module(f"{__name__}.{module}"), name)
