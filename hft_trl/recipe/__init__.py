"""Parse recipes, and prepare, train, resume and report their stages."""

from hft_trl.recipe.recipe import Recipe, parse_recipe, parse_stage, prepare, report
from hft_trl.recipe.stage import Stage

__all__ = ["Recipe", "Stage", "parse_recipe", "parse_stage", "prepare", "report"]
