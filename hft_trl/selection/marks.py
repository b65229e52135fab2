"""What a model object remembers of HFT: the selection that it was trained with, and what a selection froze."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hft_trl.selection.units import made_frozen
from hft_trl.weights import named_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hft_trl.selection.selection import Selection

# Attributes of the model object. They are in no file: a saved model has its selection beside it, and loads unfrozen.
TRAINED_WITH, FROZEN_BY_HFT = "_hft_trained_with", "_hft_frozen"


def remember(model: "PreTrainedModel", selection: "Selection") -> None:
    """Note the selection that a model was trained with, so that the next stage on the same object draws another one."""
    setattr(model, TRAINED_WITH, selection)


def remembered(model: "PreTrainedModel") -> "Selection | None":
    """The selection that this model object was trained with, `None` if it was not trained with HFT since it was loaded."""
    return vars(model).get(TRAINED_WITH)


def frozen_by_hft(model: "PreTrainedModel") -> frozenset[str]:
    """Names of the parameters that a selection froze on this model object."""
    return vars(model).get(FROZEN_BY_HFT, frozenset())


def mark_frozen(model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Note which parameters of a model object a selection froze. All others that are frozen are so by the user or the class."""
    setattr(model, FROZEN_BY_HFT, frozenset(names))


def frozen_by_user(model: "PreTrainedModel") -> frozenset[str]:
    """
    Names of the parameters that the user froze before a selection is drawn.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, before any wrapper renames its parameters.

    Returns:
        `frozenset[str]`: What has `requires_grad=False`, and was frozen neither by a selection nor by the model's class.
    """
    frozen = {name for name, parameter in named_parameters(model) if not parameter.requires_grad}
    unexplained = frozen - frozen_by_hft(model)
    return frozenset(unexplained - made_frozen(model)) if unexplained else frozenset()
