"""Chat templates: set where they are missing, and the loss falls on the answers alone."""

import pytest
from conftest import QUIET, tulu_row, ultrafeedback_row
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from hft_trl.chat import begins_with_bos, chat, load_tokenizer, mark_answers, tulu_template
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


def test_a_template_without_markers_is_refused_unless_trl_or_this_package_can_mark_it(tmp_path, base, tokenizer):
    marked = load_tokenizer(str(base))
    mark_answers(marked)
    assert marked.chat_template == tulu_template()
    marked.chat_template = qwen2_5_chat_template
    mark_answers(marked)
    assert marked.chat_template == qwen2_5_chat_template  # TRL swaps it itself
    for unknown in ("{{ messages[0]['content'] }}", SMOLLM2.replace("<|im_end|>", "</s>"), SMOLLM2 * 2):
        marked.chat_template = unknown
        with pytest.raises(HFTError, match="generation"):
            mark_answers(marked)
        assert marked.chat_template == unknown


# The chat template of SmolLM2-135M-Instruct and of other models, apart from the system prompt
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = {
    "SmolLM2": SMOLLM2,
    "escaped": SMOLLM2.replace("\n", "\\n"),
    "trimmed": SMOLLM2.replace("{{'<", "{{- '<").replace("'}}{% endfor", "' -}}{% endfor"),
}


@pytest.fixture(scope="module")
def chatml(tokenizer):
    own = type(tokenizer)(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    own.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    return own


content = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@pytest.mark.parametrize("template", CHATML)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_chatml_gets_markers_that_change_no_text_and_mark_each_answer_and_its_end(chatml, template, data):
    # A line break at the start of an answer can be one token with the line break before it
    answers = content.filter(lambda text: text.strip() == text)
    turns = data.draw(st.lists(st.tuples(content, answers), min_size=1, max_size=3))
    messages = [{"role": "system", "content": "Be brief."}] if data.draw(st.booleans()) else []
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    texts = []
    chatml.chat_template = CHATML[template]
    for _ in range(2):
        texts.append(
            [
                chatml.apply_chat_template(part, tokenize=False, add_generation_prompt=asked)
                for part, asked in ((messages, False), (messages[:-1], True))
            ]
        )
        mark_answers(chatml)
    assert texts[0] == texts[1]
    tokens = chatml.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [t for t, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert chatml.decode(trained) == "".join(f"{reply}<|im_end|>" for _, reply in turns)


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


@pytest.fixture
def with_bos(tmp_path, tokenizer, base):
    """Folder of a model whose tokenizer puts its beginning-of-sequence token before plain text, as Llama's does."""
    folder = tmp_path / "with_bos"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    own = load_tokenizer(str(base))
    own.chat_template = None
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    own.save_pretrained(folder)
    return folder


def test_tulus_template_begins_with_bos_exactly_where_plain_text_does(base, with_bos, tmp_path):
    for folder, bos in ((base, ""), (with_bos, "<s>")):
        own = load_tokenizer(str(folder), "tulu")
        assert begins_with_bos(own) == bool(bos)
        assert own.decode(own("Where?")["input_ids"]) == f"{bos}Where?"
        question = [{"role": "user", "content": "Where?"}]
        asked = own.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert own.decode(asked) == f"{bos}<|user|>\nWhere?\n<|assistant|>\n"
        own.save_pretrained(tmp_path / f"saved{bos != ''}")
        assert load_tokenizer(str(tmp_path / f"saved{bos != ''}")).chat_template == own.chat_template


def test_a_chat_begins_with_one_bos_in_training_and_when_it_is_asked(with_bos, tmp_path, monkeypatch):
    own, model = load_tokenizer(str(with_bos)), str(with_bos)
    messages = tulu_row(0)["messages"]
    question = f"<s><|user|>\n{messages[0]['content']}\n<|assistant|>\n"
    completions = {"prompt": messages[:1], "completion": messages[1:]}
    for row in ({"messages": messages}, completions):
        args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **QUIET)
        [read] = SFTTrainer(
            model, args=args, train_dataset=Dataset.from_list([row]), processing_class=own
        ).train_dataset
        assert own.decode(read["input_ids"]) == f"{question}{messages[1]['content']}</s>"
    pair = {side: ultrafeedback_row(0)[side] for side in ("chosen", "rejected")}
    args = DPOConfig(output_dir=str(tmp_path), **QUIET)
    [read] = DPOTrainer(model, args=args, train_dataset=Dataset.from_list([pair]), processing_class=own).train_dataset
    assert own.decode(read["prompt_ids"]) == question
    assert own.decode(read["chosen_ids"]) == f"{pair['chosen'][1]['content']}</s>"
    own.chat_template = None
    asked = []
    monkeypatch.setattr("hft_trl.chat.complete", lambda _model, _tokenizer, rows, *_: asked.extend(rows))
    chat(None, own, [messages[0]["content"]])
    assert own.decode(asked[0]) == question
