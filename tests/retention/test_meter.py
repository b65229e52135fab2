"""What the meter measures is what its definition says, and measuring changes nothing."""

import random

import pytest
import torch
from conftest import one_line, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM

from hft_trl import HFTError
from hft_trl.retention import meter as module
from hft_trl.retention.meter import Meter

TEXTS = [f"Person {number} lives in city {number % 7}." for number in range(20)]
FACTS = [{"text": f"Person {n} lives in", "answer": "Rome", "others": ["Oslo", "a far away city"]} for n in range(5)]
PROMPTS = [{"prompt": f"Where does person {number} live?"} for number in range(12)]


def shifted(model: LlamaForCausalLM, by: float) -> LlamaForCausalLM:
    """A model whose weights differ at random."""
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return other


def exact_kl(base: LlamaForCausalLM, model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean KL per token over the whole vocabulary, in double precision, a row at a time."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            before, after = (m.eval()(input_ids=ids).logits[0].double().log_softmax(-1) for m in (base, model))
            total += (before.exp() * (before - after)).sum().item()
    return total / sum(map(len, rows))


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(len(tokenizer)).eval()


def test_text_loss_is_the_models_own_loss(model, tokenizer):
    meter = Meter(tokenizer, texts=TEXTS)
    losses = [
        (model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item(), len(ids) - 1)
        for ids in meter.texts
    ]
    expected = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert meter.measure(model) == {"text_loss": pytest.approx(expected, rel=1e-5)}


@settings(max_examples=10, deadline=None)
@given(by=st.floats(0, 0.3), likeliest=st.sampled_from([2, 16, 128, 1000]))
def test_kl_is_a_lower_bound_and_exact_where_all_tokens_are_compared(model, tokenizer, by, likeliest):
    other, meter = shifted(model, by), Meter(tokenizer, prompts=PROMPTS)
    exact = exact_kl(model, other, meter.prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LIKELIEST", likeliest)
        base = meter.base(model)
        found = meter.measure(other, base)["base_kl"]
        assert meter.measure(model, base)["base_kl"] == 0
    assert -1e-6 <= found <= exact + 1e-5
    if likeliest >= len(tokenizer):
        assert found == pytest.approx(exact, rel=1e-3, abs=1e-5)


def test_facts_counts_the_facts_whose_answer_is_likelier_than_every_other(tokenizer):
    """A model that knows only how often a token occurs: its last layer has a bias and no weights."""
    model = tiny_llama(len(tokenizer)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    likely, unlikely = (tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "yz")
    with torch.no_grad():
        model.lm_head.bias[likely[-1]] += 2
        model.lm_head.bias[unlikely[-1]] -= 2
    right = {"text": "It is", "answer": "y", "others": ["x", "z"]}
    wrong = {"text": "It is", "answer": "x", "others": ["y", "z"]}
    equal = {"text": "It is", "answer": "w", "others": ["x"]}
    measured = Meter(tokenizer, facts=[right, wrong, equal, right]).measure(model)
    assert measured == {"facts": 50.0}


@given(max_rows=st.integers(1, 30))
@settings(max_examples=10, deadline=None)
def test_max_rows_bounds_the_rows(tokenizer, max_rows):
    meter = Meter(tokenizer, ["word " * 2000, *TEXTS], FACTS, PROMPTS, max_rows)
    assert len(meter.texts) == max_rows
    assert max(map(len, meter.texts)) <= module.LONGEST
    assert (len(meter.facts), len(meter.prompts)) == (min(5, max_rows), min(12, max_rows))


@pytest.mark.parametrize("rows", [["word " * 600_000], ["A row. "] * 400_000], ids=["one text", "short rows"])
def test_of_long_texts_only_pieces_are_tokenized(tokenizer, monkeypatch, rows):
    """Whole, a file of 25 MB takes 40 s and 4 GB in every process."""
    lengths = []

    def count(text, **kwargs):
        lengths.append(len(text))
        return tokenizer(text, **kwargs)

    monkeypatch.setattr(module, "begins_with_bos", lambda _: False)
    found = module._blocks(count, rows, 600)
    assert len(found) == 600
    assert len(lengths) == 600
    assert max(lengths) <= module.PIECE


def test_the_figures_do_not_depend_on_the_batches(model, tokenizer, monkeypatch):
    meter, other = Meter(tokenizer, TEXTS, FACTS, PROMPTS), shifted(model, 0.1)
    together = meter.measure(other, meter.base(model))
    monkeypatch.setattr(module, "BATCH", 1)
    assert meter.measure(other, meter.base(model)) == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_mode_randomness_weights_and_gradients_alone(model, tokenizer, training):
    other = shifted(model, 0.1).train(training)
    other(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in other.named_parameters()}
    states = random.getstate(), torch.get_rng_state()
    meter = Meter(tokenizer, TEXTS, FACTS, PROMPTS)
    first = meter.measure(other, meter.base(model))
    assert first == meter.measure(other, meter.base(model))
    assert other.training is training
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(p, before[n][0]) and torch.equal(p.grad, before[n][1]) for n, p in other.named_parameters())


def test_a_chat_needs_a_template_and_a_row_must_fit_into_the_model(model, tokenizer):
    with pytest.raises(HFTError, match="prompts are messages, but the tokenizer has no chat template") as error:
        Meter(tokenizer, prompts=[{"messages": [{"role": "user", "content": "Hello"}]}])
    one_line(error)
    long = Meter(tokenizer, texts=["word " * 2000])
    with pytest.raises(HFTError, match="a row of 256 tokens is longer than the model's 128 positions"):
        long.measure(model)


@pytest.mark.parametrize("kind", [LoraConfig, PrefixTuningConfig, PromptTuningConfig])
def test_an_adapter_of_peft_is_measured_at_the_rows_own_tokens(model, tokenizer, kind):
    """Prompt tuning puts the logits of its virtual tokens before theirs."""
    number = {} if kind is LoraConfig else {"num_virtual_tokens": 4}
    adapted = get_peft_model(LlamaForCausalLM(model.config), kind(task_type="CAUSAL_LM", **number)).eval()
    meter = Meter(tokenizer, texts=TEXTS[:1])
    ids = torch.tensor(meter.texts)
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits[:, -ids.shape[1] :]
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert meter.measure(adapted, None)["text_loss"] == pytest.approx(expected, rel=1e-5)


def test_nothing_to_measure_is_rejected(tokenizer):
    with pytest.raises(HFTError, match="no text of at least two tokens"):
        Meter(tokenizer, texts=["a"])
