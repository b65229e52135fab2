"""
Rows become prompt, answer and end with the loss on the last two, are cut from the left, and what was cut is counted.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_trl.continual.tasks import Row, encode, encode_prompts
from hft_trl.errors import HFTError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def encoded(tokenizer, prompt, answer, max_length=None):
    rows, cut = encode([Row(prompt, answer)], tokenizer, max_length)
    return rows[0]["input_ids"], rows[0]["labels"], cut


@settings(deadline=None, max_examples=25)
@given(prompt=TEXT, answer=TEXT)
def test_the_text_is_prompt_and_answer_and_the_loss_is_on_the_answer_and_the_end(tokenizer, prompt, answer):
    ids, labels, cut = encoded(tokenizer, prompt, answer)
    assert tokenizer.decode(ids) == f"{prompt}{answer}</s>"
    trained = [label for label in labels if label != -100]
    assert trained == ids[len(ids) - len(trained) :]
    assert tokenizer.decode(trained).endswith(f"{answer}</s>")
    assert labels[-1] == tokenizer.eos_token_id
    assert cut == 0


def test_without_a_token_over_the_border_exactly_the_answer_is_trained(tokenizer):
    ids, labels, _ = encoded(tokenizer, "Where does Ada live?\n", "Rome.")
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("Where does Ada live?\n", "Rome."))
    assert ids == [*prompt, *answer, tokenizer.eos_token_id]
    assert labels == [-100] * len(prompt) + [*answer, tokenizer.eos_token_id]


@pytest.mark.parametrize("max_length", [3, 7, 40])
def test_a_long_row_is_cut_from_the_left_and_keeps_its_end(tokenizer, max_length):
    whole, labels, _ = encoded(tokenizer, "Where does Ada live? " * 2, "Rome.")
    cut = encoded(tokenizer, "Where does Ada live? " * 2, "Rome.", max_length)
    assert cut == (whole[-max_length:], labels[-max_length:], int(len(whole) > max_length))


def test_prompts_are_cut_from_the_left_and_counted(tokenizer):
    short, long = "Ada", "Where does Ada live? " * 4
    whole, none = encode_prompts([short, long], tokenizer, None)
    assert none == 0
    rows, cut = encode_prompts([short, long], tokenizer, 9)
    assert cut == 1
    assert rows == [whole[0][-9:], whole[1][-9:]]


@settings(deadline=None, max_examples=25)
@given(prompt=TEXT, spaces=st.text(" ", max_size=2), answer=TEXT)
def test_what_is_asked_is_the_beginning_of_what_was_learned(tokenizer, prompt, spaces, answer):
    """Also where a prompt ends in spaces, which tokenizers put before the next word."""
    ids, labels, _ = encoded(tokenizer, prompt + spaces, answer)
    ((asked,), _) = encode_prompts([prompt + spaces], tokenizer, None)
    learned = labels.count(-100)
    assert ids[:learned] == asked[:learned]
    if prompt.endswith("\n"):  # where no token reaches over the border
        assert learned == len(asked)


def test_a_prompt_that_ends_in_a_space_is_asked_as_it_was_learned(tokenizer):
    ids, labels, _ = encoded(tokenizer, "Answer: ", "Rome.")
    ((asked,), _) = encode_prompts(["Answer: "], tokenizer, None)
    assert asked == ids[: labels.count(-100)]
    assert tokenizer.decode(ids[len(asked) :]) == " Rome.</s>"


def test_an_end_that_the_tokenizer_puts_behind_every_text_comes_once_and_never_behind_a_prompt(tokenizer, base):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    with_end = AutoTokenizer.from_pretrained(base)
    with_end.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", with_end.eos_token_id)]
    )
    assert encoded(with_end, "Where?\n", "Rome.") == encoded(tokenizer, "Where?\n", "Rome.")
    assert encode_prompts(["Where?\n"], with_end, None) == encode_prompts(["Where?\n"], tokenizer, None)


def test_a_tokenizer_without_an_end_is_refused(base):
    from transformers import AutoTokenizer

    endless = AutoTokenizer.from_pretrained(base)
    endless.eos_token = None
    with pytest.raises(HFTError, match="has no end-of-sequence token"):
        encode([Row("Where?", "Rome.")], endless, None)


def test_special_tokens_in_front_are_the_tokenizers_own(tokenizer, base):
    """Llama's tokenizer puts its first token in front of every text; an answer is no text of its own."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    with_bos = AutoTokenizer.from_pretrained(base)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    ids, labels, _ = encoded(with_bos, "Where?\n", "Rome.")
    assert ids[0] == with_bos.bos_token_id
    assert ids.count(with_bos.bos_token_id) == 1
    assert labels[0] == -100


def test_answers_that_look_like_dates_or_numbers_are_text(tokenizer):
    rows, _ = encode([Row("When?\n", answer) for answer in ("2024-01-01", "2024-01-02")], tokenizer, None)
    assert tokenizer.decode(rows[1]["input_ids"]) == "When?\n2024-01-02</s>"
