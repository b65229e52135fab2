"""What a model object remembers of HFT: which of its parameters a selection froze. No file holds it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hft_trl.selection.units import made_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FROZEN_BY_HFT = "_hft_frozen"


def frozen_by_hft(model: "PreTrainedModel") -> frozenset[str]:
    """Return the names of the parameters that a selection froze on this model object."""
    return vars(model).get(FROZEN_BY_HFT, frozenset())


def mark_frozen(model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Note which parameters of a model object a selection froze. The user or the class froze all others."""
    setattr(model, FROZEN_BY_HFT, frozenset(names))


def frozen_by_user(model: "PreTrainedModel") -> frozenset[str]:
    """Return the names of the frozen parameters that neither a selection nor the model's class has frozen."""
    from hft_trl.weights import named_parameters

    frozen = {name for name, parameter in named_parameters(model) if not parameter.requires_grad}
    unexplained = frozen - frozen_by_hft(model)
    return frozenset(unexplained - made_frozen(model)) if unexplained else frozenset()
