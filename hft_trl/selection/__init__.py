"""Which parameters of a model learn: units of a model, the choice among them, and the selection that comes of it."""

from hft_trl.selection.categories import LAYER_CATEGORIES, OUTER_CATEGORIES
from hft_trl.selection.choose import choose
from hft_trl.selection.elements import Masks
from hft_trl.selection.importance import Squares
from hft_trl.selection.selection import SELECTION_FILE, Selection, select
from hft_trl.selection.shares import learning_elements, share_of
from hft_trl.selection.units import Unit, find_units

__all__ = [
    "LAYER_CATEGORIES",
    "OUTER_CATEGORIES",
    "SELECTION_FILE",
    "Masks",
    "Selection",
    "Squares",
    "Unit",
    "choose",
    "find_units",
    "learning_elements",
    "select",
    "share_of",
]
