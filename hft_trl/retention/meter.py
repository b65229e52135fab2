"""
Measure what a model keeps of its base.

- `text_loss`: mean loss per token on held-out general text, in nats.
- `base_kl`: mean KL(base || model) per token on prompts of the task, in nats. The most likely tokens of the base are
  compared one by one, and all others as one, so it is a lower bound, which is tight where the others are unlikely.
- `facts`: percent of cloze facts whose right answer is more likely than all wrong ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft_trl.chat import begins_with_bos, evaluating, most_tokens
from hft_trl.errors import HFTError, first_line
from hft_trl.files import replacing, writing
from hft_trl.retention.retention_rows import Rows, choose, read_facts, read_prompts, read_texts
from hft_trl.weights import combined_digest

LONGEST = 256  # tokens of a text block, and at most of a prompt
BATCH = 8 * LONGEST  # tokens in a forward pass, with padding
PIECE = 16 * LONGEST  # characters of a piece, where texts are too long to be tokenized whole
LIKELIEST = 128  # tokens of the base that are compared one by one
SMALLEST = 1e-10  # probability below which the rest of the tokens counts as this
BASE_FILE = "retention_base.safetensors"
MEASURED = {"texts": "text_loss", "prompts": "base_kl", "facts": "facts"}  # figures by the rows that they need

Result = TypeVar("Result")

Base = list[tuple[torch.Tensor, torch.Tensor]]
"""For each prompt, the numbers and log-probabilities of the base's likeliest tokens, `(positions, LIKELIEST)`."""


class Meter:
    """
    Measure retention on the same rows for every model.

    The arguments are those of [`~hft_trl.RetentionCallback`], and the tokenizer of all models, with a chat template if
    prompts are messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Rows | None = None,
        facts: Rows | None = None,
        prompts: Rows | None = None,
        max_rows: int = 128,
    ) -> None:
        self.texts = _blocks(tokenizer, read_texts(texts), max_rows) if texts is not None else []
        chosen = choose(read_facts(facts), max_rows) if facts is not None else []
        self.facts = [_candidates(tokenizer, fact) for fact in chosen]
        chosen = choose(read_prompts(prompts), max_rows) if prompts is not None else []
        self.prompts = [_prompt_ids(tokenizer, prompt) for prompt in chosen]

    def base(self, model: PreTrainedModel) -> Base:
        """Return the base's predictions on the prompts. All processes must call it."""

        def likeliest(_: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ids = logits.topk(min(LIKELIEST, logits.shape[-1] - 1)).indices
            return ids.to("cpu", torch.int32), _log_probs(logits, ids).cpu()

        return _of_each(model, self.prompts, likeliest)

    def measure(self, model: PreTrainedModel, base: Base | None = None) -> dict[str, float]:
        """
        Return the figures whose rows were given. All processes must call it and share the work.

        Without the predictions of a `base`, `base_kl` is left out. The model's mode and all random states stay.
        """
        figures = {}
        if self.texts:
            figures["text_loss"] = self._text_loss(model)
        if self.prompts and base is not None:
            figures["base_kl"] = self._base_kl(model, base)
        if self.facts:
            figures["facts"] = self._facts(model)
        return figures

    def _text_loss(self, model: PreTrainedModel) -> float:
        def loss(number: int, logits: torch.Tensor) -> float:
            return -_of_last_tokens(logits, self.texts[number], len(logits) - 1).sum().item()

        return sum(_of_each(model, self.texts, loss)) / sum(len(ids) - 1 for ids in self.texts)

    def _base_kl(self, model: PreTrainedModel, base: Base) -> float:
        def divergence(number: int, logits: torch.Tensor) -> float:
            ids, before = (tensor.to(logits.device) for tensor in base[number])
            after = _log_probs(logits, ids)
            rest_before, rest_after = ((1 - some.exp().sum(-1)).clamp_min(SMALLEST) for some in (before, after))
            likeliest = (before.exp() * (before - after)).sum(-1)
            return (likeliest + rest_before * (rest_before / rest_after).log()).sum().item()

        return sum(_of_each(model, self.prompts, divergence)) / sum(map(len, self.prompts))

    def _facts(self, model: PreTrainedModel) -> float:
        rows, answers = zip(*(candidate for candidates in self.facts for candidate in candidates), strict=True)

        def score(number: int, logits: torch.Tensor) -> float:
            return _of_last_tokens(logits, rows[number], answers[number]).sum().item()

        scores = iter(_of_each(model, rows, score))
        # The first candidate is the right one; an equal score is no knowledge
        known = [next(scores) > max(next(scores) for _ in wrong) for _, *wrong in self.facts]
        return 100 * sum(known) / len(self.facts)


def _blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int) -> list[list[int]]:
    start = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    size = LONGEST - len(start)
    blocks, pieces = [], max(512, most)
    if sum(map(len, texts)) > pieces * PIECE:
        texts = choose([text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)], pieces)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        blocks += [start + ids[i : i + size] for i in range(0, len(ids), size)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise HFTError("texts have no text of at least two tokens: give longer ones.")
    return choose(blocks, most)


def _candidates(tokenizer: PreTrainedTokenizerBase, fact: dict) -> list[tuple[list[int], int]]:
    """Return the token ids of a fact with each of its answers, and how many of them are the answer."""
    start, found = tokenizer(fact["text"])["input_ids"], []
    for answer in dict.fromkeys([fact["answer"], *fact["others"]]):
        ending = tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
        found.append((start + ending, len(ending)))
    return found


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"][:LONGEST]
    if tokenizer.chat_template is None:
        raise HFTError("prompts are messages, but the tokenizer has no chat template: set one, or give strings.")
    ends = prompt[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=not ends, return_dict=False)[:LONGEST]
    except Exception as error:  # a template can raise any exception
        raise HFTError(f"the chat template rejects a row of prompts: {first_line(error)}.") from error


def _of_each(
    model: PreTrainedModel, rows: Sequence[list[int]], result: Callable[[int, torch.Tensor], Result]
) -> list[Result]:
    """
    Return the result of each row, given its number and its logits `(positions, vocabulary)`.

    All processes must call it. Each makes the same number of forward passes, as FSDP2 and ZeRO-3 need it.
    """
    state = PartialState()
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), number))  # little padding
    batches: list[list[int]] = [[]]
    for number in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(rows[number]) > BATCH:
            batches.append([])
        batches[-1].append(number)
    longest, positions = len(rows[order[-1]]), most_tokens(model)
    if positions is not None and longest > positions:
        raise HFTError(f"a row of {longest} tokens is longer than the model's {positions} positions: remove it.")
    found = {}
    with evaluating(model):
        for first in range(0, len(batches), state.num_processes):
            mine = first + state.process_index
            batch = batches[min(mine, len(batches) - 1)]
            # Right padding does not affect a causal model's earlier positions
            ids = pad_sequence([torch.tensor(rows[number]) for number in batch], batch_first=True)
            lengths = torch.tensor([len(rows[number]) for number in batch])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            logits = model(**given, use_cache=False).logits[:, -ids.shape[1] :]  # prompt tuning adds some before them
            if mine < len(batches):
                for number, row in zip(batch, logits, strict=True):
                    found[number] = result(number, row[: len(rows[number])].float())
    gathered = {number: value for part in gather_object([found]) for number, value in part.items()}
    return [gathered[number] for number in range(len(rows))]


def _log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of some tokens, `(positions, tokens)`."""
    return logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)


def _of_last_tokens(logits: torch.Tensor, ids: list[int], number: int) -> torch.Tensor:
    """Return the log-probability of each of the last `number` tokens of a row."""
    return _log_probs(logits[-number - 1 : -1], torch.tensor(ids[-number:], device=logits.device)[:, None])


def write_base(path: Path, base: Base, meter: Meter) -> None:
    """Write the predictions completely or not at all, with a digest of the prompts."""
    tensors = {
        name: torch.cat(parts) for name, parts in zip(("ids", "log_probs"), zip(*base, strict=True), strict=True)
    }
    with writing(path.parent), replacing(path) as new:
        save_file(tensors, new, metadata={"prompts": combined_digest([LIKELIEST, meter.prompts])})


def read_base(path: Path, meter: Meter) -> Base:
    """Read the predictions. A missing file and one of other prompts are rejected."""
    remedy = "restore it, start the run again, or leave prompts out"
    if not path.is_file():
        raise HFTError(f"{str(path)!r}, the base's predictions for retention/base_kl, does not exist: {remedy}.")
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("prompts")
            tensors = [file.get_tensor(name) for name in ("ids", "log_probs")]
    except (OSError, SafetensorError) as error:
        raise HFTError(f"{str(path)!r}, the base's predictions, cannot be read ({error}): {remedy}.") from error
    if digest != combined_digest([LIKELIEST, meter.prompts]):
        raise HFTError(
            f"{str(path)!r} has the base's predictions on other prompts: give the prompts, max_rows and tokenizer "
            "that it was made with, or start the run again."
        )
    lengths = [len(ids) for ids in meter.prompts]
    return list(zip(*(tensor.split(lengths) for tensor in tensors), strict=True))
