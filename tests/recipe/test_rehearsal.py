"""Mistakes in any stage are found before the first one trains, and looking for them leaves nothing behind."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import one_line, parse_recipe
from datasets import Dataset, is_caching_enabled
from transformers import AutoConfig
from transformers.utils import logging
from trl import KTOConfig, KTOTrainer, SFTConfig

from hft_trl import HFTError, demo
from hft_trl.chat import check_ids
from hft_trl.recipe import recipe, rehearsal
from hft_trl.recipe.rehearsal import LONGEST, check_halves, rehearse
from hft_trl.recipe.rows import untrained_rows

REFUSING = (
    "{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('no system turns') }}{%- endif -%}"
    "[{{ m.role }}]{% generation %}{{ m.content + eos_token }}{% endgeneration %}{%- endfor -%}"
)


BEST = "--sft.eval_strategy epoch --sft.save_strategy epoch --sft.split train[5%:] --sft.eval_split train[:5%]"
BEST += " --sft.load_best_model_at_end true"
LENGTHS = "word " * 200, "word"


@pytest.fixture
def stages_of(tmp_path):
    """The stages of a demo run with their data."""

    def parse(*flags):
        recipe = parse_recipe(["--output_dir", str(tmp_path / "run"), *flags], default_config=demo.RECIPE)
        stages = list(recipe.stages.values())
        for stage in stages:
            stage.load_data()
        return stages

    return parse


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(demo.MODEL, tmp_path / "model")


def state_of_the_process():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        dict(os.environ),
        signal.getsignal(signal.SIGTERM),
        logging.get_verbosity(),
        is_caching_enabled(),
        dict(PartialState._shared_state),
        dict(AcceleratorState._shared_state),
    )


def test_a_rehearsal_leaves_nothing_behind(stages_of, tmp_path, capfd, monkeypatch):
    """State of the process and arguments are as before, nothing is printed, no folder or file of a cache is made."""
    # Other tests may write into the usual cache meanwhile
    monkeypatch.setattr("hft_trl.recipe.loading.HF_DATASETS_CACHE", tmp_path / "cache")
    flags = "--sft.report_to tensorboard --dpo.loss_type ipo --sft.max_length 64 --dpo.max_length 64"
    stages = stages_of(*flags.split())
    caches = {Path(file["filename"]).parent for stage in stages for file in stage.train_dataset.cache_files}
    cached = [sorted(cache.iterdir()) for cache in caches]
    arguments = [str(vars(stage.args)) for stage in stages]
    before = state_of_the_process()
    capfd.readouterr()
    rehearse(stages)
    assert state_of_the_process() == before
    assert [str(vars(stage.args)) for stage in stages] == arguments
    assert not (tmp_path / "run").exists()
    assert cached
    assert all(cache.is_relative_to(tmp_path) for cache in caches)
    assert [sorted(cache.iterdir()) for cache in caches] == cached
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dpo.loss_type sigmoidd", "dpo: no loss .* loss_type .*sigmoidd.*Should be one of"),
        ("--dpo.f_divergence_type jsd", "dpo: no loss .* f_divergence_type 'jsd'"),
        ("--dpo.loss_type exo_pair", "dpo: .*Label smoothing must be greater than 0"),
        ("--dpo.lr_scheduler_type cosine_with_min_lr", "dpo: no scheduler .* lr_scheduler_type 'cosine_with_min_lr'"),
        ("--dpo.optim grokadamw", "dpo: no optimizer .* optim 'grokadamw'.*pip install"),
        ("--dpo.report_to wandb", "dpo: no trackers .* report_to .*pip install wandb"),
        ("--dpo.pad_token [NOPE]", r"dpo: .*`pad_token` \('\[NOPE\]'\)"),
        ("--sft.eos_token [NOPE]", r"sft: .*`eos_token` \('\[NOPE\]'\)"),
        (
            f"{BEST} --sft.metric_for_best_model eval_accuracy",
            "sft: metric_for_best_model is 'eval_accuracy'.*eval_loss",
        ),
        (
            f"{BEST} --sft.metric_for_best_model retention/text_loss --retention.max_rows 0",
            "sft: metric_for_best_model is 'retention/text_loss'.*need a section retention",
        ),
        (
            "--sft.dataloader_drop_last true --sft.split train[:3]",
            "sft: dataloader_drop_last .* 3 rows .* batch of 32",
        ),
        ("--dpo.max_length 2", "none of the .* rows of .*, split train_prefs has a token .* max_length 2: raise"),
    ],
)
def test_a_mistake_in_any_stage_is_one_line_that_names_it(stages_of, flags, said):
    with pytest.raises(HFTError, match=said) as error:
        rehearse(stages_of(*flags.split()))
    one_line(error)


def test_rows_that_max_length_cuts_to_nothing_are_found_before_any_training(stages_of, tmp_path):
    """Also those to evaluate on. It is no mistake if it cuts every row of the sample that is tried first."""
    long, short = ([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in LENGTHS)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [long, short] * 9 + [long] * 9))
    flags = ["--sft.dataset", str(data), "--sft.max_length", "30", "--sft.eval_strategy", "epoch"]
    rehearse(stages_of(*flags, "--sft.split", "train[:16]", "--sft.eval_split", "train[16:18]"))
    with pytest.raises(HFTError, match=r"none of the 9 rows of .*, split train\[18:\] has a token to train on"):
        rehearse(stages_of(*flags, "--sft.split", "train[:17]", "--sft.eval_split", "train[18:]"))


@pytest.mark.parametrize(
    "flags",
    [
        "--sft.packing true --dpo.precompute_ref_log_probs true",
        "--sft.max_length 40 --dpo.max_length 40 --dpo.precompute_ref_log_probs true",
        "--dpo.sync_ref_model true --dpo.torch_compile true --sft.torch_compile true",
        "--sft.eval_strategy epoch --sft.split train[5%:] --sft.eval_split train[:5%]",
        f"{BEST} --sft.metric_for_best_model retention/text_loss",
        f"{BEST} --sft.metric_for_best_model mean_token_accuracy",
        "--sft.router_aux_loss_coef 0.1 --dpo.router_aux_loss_coef 0.1 --sft.dataset_num_proc 2",
    ],
)
def test_settings_that_are_the_real_model_s_or_the_backend_s_are_no_mistakes(stages_of, flags):
    rehearse(stages_of(*flags.split()))


def test_it_is_one_process_without_a_backend_whatever_launched_it(stages_of, monkeypatch):
    stages = stages_of()
    for name, value in (
        ("ACCELERATE_USE_FSDP", "true"),
        ("FSDP_VERSION", "2"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "2"),
    ):
        monkeypatch.setenv(name, value)
    before = state_of_the_process()
    rehearse(stages)
    assert state_of_the_process() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sft.hft.strategy element --dpo.hft.frozen_quantization int8", "after strategy element, .* leave it out"),
        ("--sft.hft.exclude norm", "but the start model's selection and .* differ in .*: keep hft.exclude"),
        (
            "--sft.hft.ratio 1 --dpo.hft.train_embeddings false --dpo.hft.train_lm_head false "
            "--dpo.hft.train_final_norm false",
            "nothing learns with hft.reselect 'complement'",
        ),
    ],
)
def test_a_half_that_cannot_follow_the_one_before_is_found_before_that_is_trained(tmp_path, flags, said):
    asked = ["--output_dir", str(tmp_path), "--dpo.hft.reselect", "complement"]
    recipe = parse_recipe([*asked, *flags.split()], default_config=demo.RECIPE)
    with pytest.raises(HFTError, match=rf"^dpo: .*{said}") as error:
        rehearse(list(recipe.stages.values()))
    one_line(error)
    check_halves(list(parse_recipe(asked, default_config=demo.RECIPE).stages.values()))


def test_a_template_that_refuses_turns_is_named_with_the_row(stages_of, tmp_path):
    """Of every order of roles one row is rendered, wherever it stands, with the template of each stage."""
    template = tmp_path / "refusing.jinja"
    template.write_text(REFUSING)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    rows = [{"messages": chat}] * 17 + [{"messages": [{"role": "system", "content": "Be brief."}, *chat]}]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = stages_of("--sft.dataset", str(data), "--model.chat_template", str(template))
    with pytest.raises(HFTError, match=r"row 17 of .*chats.jsonl.*no system turns"):
        rehearse(stages)
    words = ["--model", "demo", "--one.dataset", "demo", "--two.dataset", str(data), "--output_dir", str(tmp_path)]
    words += ["--two.chat_template_path", str(template)]
    own = list(recipe.parse_recipe(words, {"one": SFTConfig, "two": SFTConfig}).stages.values())
    for stage in own:
        stage.load_data()
    with pytest.raises(HFTError, match=r"row 17 of .*chats.jsonl.*no system turns"):
        rehearse(own)


def test_a_start_model_that_could_not_be_saved_is_found_before_training(stages_of, model):
    """
    The rehearsal saves the start model's generation config as training leaves it; `temperature` alone is put right.
    """
    stages = stages_of()
    stages[0].model.model_name_or_path = str(model)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9}')
    rehearse(stages)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "num_beams": 1, "num_return_sequences": 3}')
    with pytest.raises(HFTError, match=r"sft: .*num_return_sequences"):
        rehearse(stages)


def test_tokens_without_an_embedding_are_refused_only_where_they_are_used(stages_of, model):
    """Gemma 3 1B's tokenizer has a token more than its model, which no text brings about."""
    stages = stages_of()
    tokenizer = stages[0].load_tokenizer()
    config = AutoConfig.from_pretrained(demo.MODEL)
    plain = Dataset.from_dict({"input_ids": [[1, 2, config.vocab_size - 1], []]})
    tokenizer.add_tokens(["<one more>"])
    added = tokenizer.convert_tokens_to_ids("<one more>")
    check_ids(plain, tokenizer, config, "m")
    tokenizer.save_pretrained(model)
    stages[0].model.model_name_or_path = str(model)
    rehearse(stages)
    with pytest.raises(HFTError, match=r"token number 768, '<one more>', but .*resize_token_embeddings"):
        check_ids(Dataset.from_dict({"chosen_ids": [[1], [added]]}), tokenizer, config, "m")
    tokenizer.pad_token = "<one more>"  # which trainers add to rows
    with pytest.raises(HFTError, match="'<one more>'"):
        check_ids(plain, tokenizer, config, "m")


@pytest.mark.parametrize(
    ("token", "said"),
    [(99999, "a row has the token number 99999 but the model has"), (-100, "a row has the token number -100: ")],
)
def test_rows_of_another_tokenizer_s_tokens_are_refused(stages_of, tmp_path, token, said):
    data = tmp_path / "tokens.jsonl"
    data.write_text(json.dumps({"input_ids": [1, token]}) + "\n")
    with pytest.raises(HFTError, match=said) as error:
        rehearse(stages_of("--sft.dataset", str(data)))
    one_line(error)


def test_long_texts_are_cut_for_the_trainer_and_not_for_the_template(stages_of, tmp_path):
    long = [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "yes " * 5000}]
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"messages": long}) + "\n")
    first, *_ = stages_of("--sft.dataset", str(data))
    sample = rehearsal._sample(first.train_dataset, "long", first.load_tokenizer())
    assert [len(turn["content"]) for turn in sample[0]["messages"]] == [LONGEST, LONGEST]


def test_chats_after_plain_text_get_the_marks_that_their_template_lacks(tmp_path):
    """The first stage's tokenizer is rehearsed with, and loading marks only a stage of chats."""
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    )
    template += " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    (tmp_path / "chatml.jinja").write_text(template)
    Dataset.from_dict({"text": [f"City {n} is large." for n in range(40)]}).to_json(tmp_path / "text.jsonl")
    words = ["--model", "demo", "--model.chat_template", str(tmp_path / "chatml.jinja"), "--cpt.dataset"]
    words += [str(tmp_path / "text.jsonl"), "--sft.dataset", "demo", "--output_dir", str(tmp_path / "run")]
    stages = list(recipe.parse_recipe(words, {"cpt": SFTConfig, "sft": SFTConfig}).stages.values())
    for stage in stages:
        stage.load_data()
    rehearse(stages)


def test_kto_counts_the_single_answers_of_its_pairs(tmp_path):
    """Three pairs fill a batch of four, and a pair that `max_length` drops is two rows."""
    texts = ("Where?", "Where? " * 50, "Who?")
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Here."}] for text in texts]
    pairs = [{"chosen": row, "rejected": [row[0], {**row[1], "content": "There."}]} for row in rows]
    data, config = tmp_path / "pairs.jsonl", tmp_path / "config.yaml"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"dataset": str(data), "max_length": 40, "per_device_train_batch_size": 4, "dataloader_drop_last": True}
    config.write_text(json.dumps({"model": "demo", "output_dir": str(tmp_path / "run"), "kto": settings}))
    [stage] = recipe.parse_recipe(["--config", str(config)], {"kto": KTOConfig}).stages.values()
    stage.load_data()
    rehearse([stage])
    given = {"train_dataset": stage.train_dataset, "processing_class": stage.load_tokenizer()}
    prepared = KTOTrainer(str(demo.MODEL), args=stage.args, **given).train_dataset
    assert untrained_rows(stage.count(stage.train_dataset), prepared, "pairs", 40) == 2
