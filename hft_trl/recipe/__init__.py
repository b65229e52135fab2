"""What a recipe is made of: stages that are parsed, prepared, trained from where they stand, and reported."""

from hft_trl.recipe.preparation import prepare
from hft_trl.recipe.recipe import Recipe, parse_recipe, parse_stage
from hft_trl.recipe.reporting import report
from hft_trl.recipe.stage import Stage

__all__ = ["Recipe", "Stage", "parse_recipe", "parse_stage", "prepare", "report"]
