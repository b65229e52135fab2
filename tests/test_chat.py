"""Chat templates: set where they are missing, and the loss falls on the answers alone."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hft_trl.chat import check_answers_marked, load_tokenizer, tulu_template
from hft_trl.errors import HFTError


def test_the_tulu_template_is_set_only_where_there_is_none_or_when_asked_for(tmp_path, base, tokenizer):
    assert load_tokenizer(str(base)).chat_template == tulu_template()
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == own.chat_template
    assert load_tokenizer(str(tmp_path), "tulu").chat_template == tulu_template()
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_tokenizer(str(tmp_path), str(tmp_path / "mine.jinja")).chat_template == "mine"
    with pytest.raises(HFTError, match="chat_template is 'llama'"):
        load_tokenizer(str(tmp_path), "llama")
    with pytest.raises(HFTError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_template_without_markers_is_refused_unless_trl_has_a_marked_one(tmp_path, base, tokenizer):
    marked = load_tokenizer(str(base))
    check_answers_marked(marked)
    marked.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(HFTError, match="generation"):
        check_answers_marked(marked)


content = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(content, content), min_size=1, max_size=3), st.booleans())
def test_the_trained_tokens_are_exactly_the_answers_and_their_end(tokenizer, turns, with_system):
    """With Tülu's template the loss falls on each answer and its end-of-sequence token, on nothing else."""
    messages = [{"role": "system", "content": "Be brief."}] if with_system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokens = tokenizer.apply_chat_template(
        messages,
        chat_template=tulu_template(),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [t for t, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "".join(f"{answer}</s>" for _, answer in turns)
