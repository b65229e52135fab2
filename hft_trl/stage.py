"""The data and the tokenizer of a stage as functions, for scripts that look at what a stage would train on."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hft_trl.recipe import Stage


def load_data(stage: Stage) -> tuple[Dataset, Dataset | None]:
    """
    Load and check the rows of a stage.

    Args:
        stage ([`~hft_trl.recipe.Stage`]):
            The stage, which keeps them as its `train_dataset` and `eval_dataset`.

    Returns:
        `tuple[Dataset, Dataset | None]`: Rows to train on, and rows to evaluate on if there is an `eval_strategy`.

    Raises:
        [`HFTError`]: See [`~hft_trl.recipe.Stage.load_data`].
    """
    stage.load_data()
    return stage.train_dataset, stage.eval_dataset


def load_tokenizer(stage: Stage) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a stage's start model, see [`~hft_trl.recipe.Stage.load_tokenizer`]."""
    return stage.load_tokenizer()
