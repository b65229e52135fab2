"""Which parameters of a model learn: its units, the choice among them, and the selection that results."""

from hft_trl.selection.categories import LAYER_CATEGORIES, OUTER_CATEGORIES
from hft_trl.selection.selection import SELECTION_FILE, Selection, select
from hft_trl.selection.units import Unit, find_units

__all__ = ["LAYER_CATEGORIES", "OUTER_CATEGORIES", "SELECTION_FILE", "Selection", "Unit", "find_units", "select"]
