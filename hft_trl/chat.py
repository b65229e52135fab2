"""Tokenizers: their chat templates, Tülu's where one has none, and whether they fit the model."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hft_trl.errors import HFTError, first_line


@cache
def tulu_template(bos: bool = False) -> str:
    """
    Tülu's chat template, with generation markers around each answer and its end-of-sequence token.

    Args:
        bos (`bool`, *optional*, defaults to `False`):
            Whether a chat begins with the beginning-of-sequence token: for tokenizers that put it before plain text.
    """
    template = files("hft_trl").joinpath("tulu.jinja").read_text(encoding="utf-8")
    return "{{- bos_token -}}\n" + template if bos else template


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its beginning-of-sequence token before plain text, as Llama's do and Qwen's don't."""
    return tokenizer.bos_token_id is not None and tokenizer("text")["input_ids"][:1] == [tokenizer.bos_token_id]


def load_tokenizer(
    model: str, template: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer that has a chat template.

    Args:
        model (`str`):
            Folder or hub id of the model.
        template (`str`, *optional*):
            `"tulu"` or the path of a `.jinja` file. By default the tokenizer's own, and Tülu's if it has none. Tülu's writes the
            beginning-of-sequence token where the tokenizer puts one before plain text.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.

    Raises:
        [`HFTError`]: If there is no tokenizer or no such template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        bos = begins_with_bos(tokenizer)
    except Exception as error:  # the tokenizers library raises plain exceptions where a file is damaged
        remedy = "save the one that belongs to the model in this folder" if Path(model).is_dir() else first_line(error)
        raise HFTError(f"no tokenizer was found for {model!r}: {remedy}") from error
    if template is not None and template != "tulu":
        if not Path(template).is_file():
            raise HFTError(f"chat_template is {template!r}: give 'tulu' or the path of a .jinja file.")
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise HFTError(f"chat_template {template!r} can't be read: {first_line(error)}.") from error
    elif template == "tulu" or tokenizer.chat_template is None:
        tokenizer.chat_template = tulu_template(bos)
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """
    A one-turn prompt as token ids, in the tokenizer's chat template, or in Tülu's where it has none.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        prompt (`str`):
            What the user says.

    Raises:
        [`HFTError`]: If the template refuses it, or the sandbox stops the template.
    """
    template = tokenizer.chat_template or tulu_template(begins_with_bos(tokenizer))
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=template,
            add_generation_prompt=True,
            return_dict=False,
        )
    except Exception as error:  # a template is a program, which can fail in any way
        raise HFTError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a prompt ({first_line(error)}): set chat_template to "
            "another one, such as 'tulu'."
        ) from error


def check_answers_marked(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that the loss can be restricted to the assistant's tokens.

    Raises:
        [`HFTError`]: If the chat template has no generation markers and TRL knows no marked version of it.
    """
    if has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError as error:
        raise HFTError(
            f"the chat template of {tokenizer.name_or_path!r} has no {{% generation %}} markers, so the assistant's tokens "
            "can't be told apart: set chat_template to 'tulu', or assistant_only_loss to false."
        ) from error


def check_ids(prepared: Dataset, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: str) -> None:
    """
    Check that a model has an embedding for every token of its rows, and for those that a trainer adds.

    A tokenizer may have more tokens than its model, which are never used (Gemma 3 1B has one for images).

    Args:
        prepared ([`~datasets.Dataset`]):
            Rows that a trainer has tokenized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trainer's tokenizer.
        config ([`~transformers.PretrainedConfig`]):
            The model's config.
        model (`str`):
            What the error calls the model.

    Raises:
        [`HFTError`]: Naming the token.
    """
    rows = config.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values()) < rows:
        return
    largest = max(token or 0 for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))
    columns = [column for column in prepared.column_names if column.endswith("_ids")]
    for batch in prepared.select_columns(columns).with_format("numpy").iter(batch_size=1000):
        largest = max([largest, *(int(ids.max()) for column in columns for ids in batch[column] if len(ids))])
    if largest >= rows:
        raise HFTError(
            f"the tokenizer of {model!r} has the token {tokenizer.convert_ids_to_tokens(largest)!r} as number {largest}, but the "
            f"model has {rows} embeddings: give it the tokenizer that belongs to it, or load the model, call "
            f"resize_token_embeddings({len(tokenizer)}), and save it with the tokenizer."
        )
