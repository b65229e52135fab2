"""Which parameters of a model learn: units of a model, the choice among them, and the selection that comes of it."""

from hft_trl.selection.categories import LAYER_CATEGORIES, OUTER_CATEGORIES
from hft_trl.selection.choose import choose
from hft_trl.selection.selection import SELECTION_FILE, Selection, select, share_of
from hft_trl.selection.units import Unit, find_units

__all__ = [
    "LAYER_CATEGORIES",
    "OUTER_CATEGORIES",
    "SELECTION_FILE",
    "Selection",
    "Unit",
    "choose",
    "find_units",
    "select",
    "share_of",
]
