"""
Measure what a model keeps of its base.

- `text_loss`: mean loss per token on held-out general text, in nats.
- `base_kl`: mean KL(base || model) per token on prompts of the task, in nats. The most likely tokens of the base are
  compared one by one, and all others as one, so it is a lower bound, which is tight where the others are unlikely.
- `facts`: percent of cloze facts whose right answer is more likely than all wrong ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft_trl.chat import begins_with_bos, most_tokens
from hft_trl.errors import HFTError, first_line
from hft_trl.retention.retention_rows import Rows, choose, read_facts, read_prompts, read_texts

LONGEST = 256  # tokens of a text block, and at most of a prompt
BATCH = 8 * LONGEST  # tokens in a forward pass, with padding
LIKELIEST = 128  # tokens of the base that are compared one by one
SMALLEST = 1e-10  # probability below which the rest of the tokens counts as this

Base = list[tuple[torch.Tensor, torch.Tensor]]
"""For each prompt, the numbers and log-probabilities of the base's likeliest tokens, `(positions, LIKELIEST)`."""


@dataclass(frozen=True)
class Candidate:
    """Store a fact with one of its answers: the token ids, and how many of them are the answer."""

    ids: list[int]
    answer: int


class Meter:
    """
    Measure retention on the same rows for every model.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of all models, with a chat template if
            prompts are messages.
        texts (`str`, `Path` or sequence, *optional*): Text file, `.jsonl` rows with a `text`, or strings.
        facts (`str`, `Path` or sequence, *optional*): `.jsonl` file, or rows with `text`, `answer` and `others`.
        prompts (`str`, `Path` or sequence, *optional*): `.jsonl` file, or rows with `messages` or a `prompt`.
        max_rows (`int`, *optional*, defaults to 128): Largest number of text blocks (of 256 tokens), of facts and of
            prompts. It bounds the cost.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Rows | None = None,
        facts: Rows | None = None,
        prompts: Rows | None = None,
        max_rows: int = 128,
    ) -> None:
        if texts is None and facts is None and prompts is None:
            raise HFTError("texts, facts and prompts are all missing: give at least one to measure retention on.")
        if max_rows < 1:
            raise HFTError(f"max_rows is {max_rows}: it must be at least 1.")
        self.texts = _blocks(tokenizer, read_texts(texts), max_rows) if texts is not None else []
        chosen = choose(read_facts(facts), max_rows) if facts is not None else []
        self.facts = [_candidates(tokenizer, fact) for fact in chosen]
        chosen = choose(read_prompts(prompts), max_rows) if prompts is not None else []
        self.prompts = [_prompt_ids(tokenizer, prompt) for prompt in chosen]

    def check(self, model: PreTrainedModel) -> None:
        """Reject rows that are longer than the model's positions. A model without weights is enough."""
        candidates = [candidate.ids for fact in self.facts for candidate in fact]
        for rows in (self.texts, candidates, self.prompts):
            _check_fit(model, max(map(len, rows), default=0))

    def base(self, model: PreTrainedModel) -> Base:
        """Return the base's predictions on the prompts. All processes must call it."""
        found = {}
        for number, logits in _logits(model, self.prompts):
            ids = logits.topk(min(LIKELIEST, logits.shape[-1] - 1)).indices
            found[number] = (ids.to("cpu", torch.int32), _log_probs(logits, ids).cpu())
        found = _gathered(found)
        return [found[number] for number in range(len(self.prompts))]

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
        losses = {}
        for number, logits in _logits(model, self.texts):
            losses[number] = -_of_last_tokens(logits, self.texts[number], len(logits) - 1).sum().item()
        losses = _gathered(losses)
        return sum(losses[number] for number in sorted(losses)) / sum(len(ids) - 1 for ids in self.texts)

    def _base_kl(self, model: PreTrainedModel, base: Base) -> float:
        sums = {}
        for number, logits in _logits(model, self.prompts):
            ids, before = (tensor.to(logits.device) for tensor in base[number])
            after = _log_probs(logits, ids)
            rest_before, rest_after = (_rest(likeliest) for likeliest in (before, after))
            divergence = (before.exp() * (before - after)).sum(-1) + rest_before * (rest_before / rest_after).log()
            sums[number] = divergence.sum().item()
        sums = _gathered(sums)
        return sum(sums[number] for number in sorted(sums)) / sum(map(len, self.prompts))

    def _facts(self, model: PreTrainedModel) -> float:
        rows = [(fact, candidate) for fact, candidates in enumerate(self.facts) for candidate in candidates]
        scores = {}
        for number, logits in _logits(model, [candidate.ids for _, candidate in rows]):
            candidate = rows[number][1]
            scores[number] = _of_last_tokens(logits, candidate.ids, candidate.answer).sum().item()
        scores = _gathered(scores)
        of_fact: list[list[float]] = [[] for _ in self.facts]
        for number, (fact, _) in enumerate(rows):
            of_fact[fact].append(scores[number])
        # The first candidate is the right one; an equal score is no knowledge
        return 100 * sum(right > max(wrong) for right, *wrong in of_fact) / len(self.facts)


def _blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int) -> list[list[int]]:
    start = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    size = LONGEST - len(start)
    blocks = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        blocks += [start + ids[i : i + size] for i in range(0, len(ids), size)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise HFTError("texts have no text of at least two tokens: give longer ones.")
    return choose(blocks, most)


def _candidates(tokenizer: PreTrainedTokenizerBase, fact: dict) -> list[Candidate]:
    start, found = tokenizer(fact["text"])["input_ids"], []
    for answer in dict.fromkeys([fact["answer"], *fact["others"]]):
        ending = tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
        found.append(Candidate(start + ending, len(ending)))
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


def _logits(model: PreTrainedModel, rows: Sequence[list[int]]) -> Iterator[tuple[int, torch.Tensor]]:
    """
    Yield the number and the logits `(positions, vocabulary)` of each row of this process.

    Every process makes the same number of forward passes, as FSDP2 and ZeRO-3 need it.
    """
    state = PartialState()
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), number))  # little padding
    batches: list[list[int]] = [[]]
    for number in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(rows[number]) > BATCH:
            batches.append([])
        batches[-1].append(number)
    _check_fit(model, len(rows[order[-1]]))
    with measuring(model):
        for first in range(0, len(batches), state.num_processes):
            mine = first + state.process_index
            batch = batches[min(mine, len(batches) - 1)]
            width = max(len(rows[number]) for number in batch)
            # Right padding does not affect a causal model's earlier positions
            ids = [rows[number] + [0] * (width - len(rows[number])) for number in batch]
            mask = [[1] * len(rows[number]) + [0] * (width - len(rows[number])) for number in batch]
            logits = model(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                use_cache=False,
            ).logits
            if mine < len(batches):
                for number, row in zip(batch, logits, strict=True):
                    yield number, row[: len(rows[number])].float()


def _check_fit(model: PreTrainedModel, longest: int) -> None:
    positions = most_tokens(model)
    if positions is not None and longest > positions:
        raise HFTError(f"a row of {longest} tokens is longer than the model's {positions} positions: remove it.")


@contextmanager
def measuring(model: PreTrainedModel) -> Iterator[None]:
    """Run a model in eval mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        # Inference mode would leave tensors that a later backward pass rejects. Compiled code would be compiled again
        # for these shapes, and then also for those of training.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def _log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of some tokens, `(positions, tokens)`."""
    return logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)


def _of_last_tokens(logits: torch.Tensor, ids: list[int], number: int) -> torch.Tensor:
    """Return the log-probability of each of the last `number` tokens of a row."""
    return _log_probs(logits[-number - 1 : -1], torch.tensor(ids[-number:], device=logits.device)[:, None])


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    return (1 - log_probs.exp().sum(-1)).clamp_min(SMALLEST)


def _gathered(found: dict) -> dict:
    return {key: value for part in gather_object([found]) for key, value in part.items()}
