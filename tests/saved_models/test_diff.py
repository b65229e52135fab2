"""What moved, and whether the frozen half kept its bits: figures, verdict, and what is said of it."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from test_reset import moved
from test_saved import tied_with_both_in_the_file, tiny_moe
from transformers import AutoModelForCausalLM, PreTrainedModel

from hft_trl import HFTConfig, HFTError, HFTSFTTrainer, half_reset, select
from hft_trl.report import tables
from hft_trl.saved_models.diff import compare
from hft_trl.saved_models.diff_view import (
    category_grid,
    check_picture,
    diff_json,
    halves_grid,
    layer_grid,
    verdict,
    write_picture,
)
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.selection import LAYER_CATEGORIES, Selection

YES = "frozen half byte-identical"


def trained(model: PreTrainedModel, tmp_path, config: HFTConfig | None = None, name="tuned") -> str:
    """A model whose trainable parameters moved, saved with its selection."""
    selection = select(model, config or HFTConfig())
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved(model)
    with torch.no_grad():
        for parameter in selection.frozen:
            model.get_parameter(parameter).copy_(kept[parameter])
    model.save_pretrained(tmp_path / name, max_shard_size="30KB")
    selection.save(tmp_path / name)
    return str(tmp_path / name)


@pytest.fixture
def base(tmp_path) -> str:
    tiny_llama(64).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_figures_are_those_of_the_task_vector(base, tmp_path):
    """Unit by unit, by layer and category, and by category: the norm over the base's, and the share that moved."""
    tuned = trained(tiny_llama(64), tmp_path)
    (diff,) = compare(base, [tuned])
    before, after = (dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in (base, tuned))

    def expected(names):
        old = torch.cat([before[name].detach().double().flatten() for name in names])
        new = torch.cat([after[name].detach().double().flatten() for name in names])
        return ((new - old).norm() / old.norm()).item(), (new != old).double().mean().item()

    for unit, found in diff.units:
        assert (found.relative, found.share) == pytest.approx(expected(unit.names))
    cells, totals = diff.grouped()
    for layer, category in cells:
        names = [
            name for unit, _ in diff.units if (unit.layer, unit.category) == (layer, category) for name in unit.names
        ]
        found = cells[layer, category]
        assert (found.relative, found.share) == pytest.approx(expected(names))
    for category, found in totals.items():
        names = [name for unit, _ in diff.units if unit.category == category for name in unit.names]
        assert (found.relative, found.share) == pytest.approx(expected(names))
        assert found.size == sum(before[name].numel() for name in names)
    assert len(cells) == 4 * 3
    assert sum(found.size for found in totals.values()) == tiny_llama(64).num_parameters()


def test_yes_when_every_frozen_bit_is_the_bases(base, tmp_path):
    (diff,) = compare(base, [trained(tiny_llama(64), tmp_path)])
    assert diff.byte_identical is True
    assert YES in verdict(diff)
    assert {found.share for unit, found in diff.units if unit.names[0] in diff.frozen} == {0.0}


def test_no_when_one_frozen_bit_differs(base, tmp_path):
    """The sign of one zero is enough, and the parameter is named."""
    model = tiny_llama(64)
    name = select(model, HFTConfig()).frozen[5]
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = 0.0
    model.save_pretrained(base)
    tuned = trained(model, tmp_path)
    assert compare(base, [tuned])[0].byte_identical is True
    for path in (tmp_path / "tuned").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[3] = -0.0
            save_file(tensors, path, metadata={"format": "pt"})
    (diff,) = compare(base, [tuned])
    assert (diff.byte_identical, diff.touched) == (False, [name])
    assert YES not in verdict(diff)
    assert name in verdict(diff)


def test_what_the_selection_leaves_out_is_frozen_too(base, tmp_path):
    """Excluded parameters did not learn, so they are part of the frozen half that is checked."""
    model = tiny_llama(64)
    tuned = trained(model, tmp_path, HFTConfig(exclude=["o_proj"]))
    (diff,) = compare(base, [tuned])
    assert diff.byte_identical is False
    assert diff.touched == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(4)]


def test_a_wider_type_is_identical_in_value_and_said_to_be_so(tmp_path):
    model = tiny_llama(64).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tuned = trained(model.float(), tmp_path)
    (diff,) = compare(str(tmp_path / "base"), [tuned])
    assert YES in verdict(diff)
    assert "bfloat16 in the base and float32" in verdict(diff)


def test_a_narrower_type_that_rounded_is_not(base, tmp_path):
    tuned = trained(tiny_llama(64).to(torch.bfloat16), tmp_path)
    (diff,) = compare(base, [tuned])
    assert diff.byte_identical is False


def test_without_a_frozen_half_there_is_no_verdict(base, tmp_path):
    """Full fine-tuning, ratio 1, and a model without a selection: said in words, and neither yes nor no."""
    trained(tiny_llama(64), tmp_path, HFTConfig(method="fft"), "fft")
    trained(tiny_llama(64), tmp_path, HFTConfig(ratio=1), "all")
    moved(tiny_llama(64)).save_pretrained(tmp_path / "unknown")
    diffs = compare(base, [str(tmp_path / name) for name in ("fft", "all", "unknown")])
    assert [diff.byte_identical for diff in diffs] == [None, None, None]
    assert [diff.method for diff in diffs] == ["fft", "hft", None]
    assert "everything learned (FFT)" in verdict(diffs[0])
    assert "no hft_selection.json" in verdict(diffs[2])
    assert not any(YES in verdict(diff) for diff in diffs)


@pytest.mark.parametrize(
    "make", [lambda: tiny_llama(300), lambda: tiny_llama(300, tie_word_embeddings=True), tiny_moe]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_trainer_leaves_passes_and_its_start_model_is_recognised(tmp_path, tokenizer, tulu, make, dtype):
    """Also where experts are merged on loading, and where the head is tied; another base is told apart."""
    from trl import SFTConfig

    base, tuned = str(tmp_path / "base"), str(tmp_path / "tuned")
    model = make()
    model.resize_token_embeddings(len(tokenizer))
    model.to(getattr(torch, dtype)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = HFTSFTTrainer(
        model=base,
        args=SFTConfig(
            tuned, max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", learning_rate=1e-2,
            per_device_train_batch_size=2, model_init_kwargs={"dtype": dtype}, disable_tqdm=True,
        ),
        train_dataset=tulu.map(lambda row: {"text": row["messages"][1]["content"]}, remove_columns=tulu.column_names),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    moved(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "other")
    (diff,) = compare(base, [tuned])
    assert (diff.byte_identical, diff.is_start) == (True, True)
    assert any(found.moved for _, found in diff.units)
    (diff,) = compare(str(tmp_path / "other"), [tuned])
    assert (diff.byte_identical, diff.is_start) == (False, False)
    assert "is not the model that its last stage started from" in verdict(diff)
    assert base in verdict(diff)


@pytest.fixture
def after_two_stages(base, tmp_path) -> str:
    """A model after two stages with another half each, of which the first one lies beside it in `first`."""
    first, second = tmp_path / "run" / "first", tmp_path / "run" / "second"
    before = SavedModel(trained(tiny_llama(64), tmp_path / "run", name="first"))
    model = AutoModelForCausalLM.from_pretrained(first)
    trained(model, tmp_path / "run", HFTConfig(seed=7), "second")
    start = {"name_or_path": str(first), "weights_digest": before.digest(before.dtypes)}
    dataclasses.replace(Selection.load(second), start_model=start).save(second)
    return str(second)


def test_after_two_stages_the_last_one_is_shown_beside_the_change_from_the_base(base, after_two_stages):
    """Its frozen half changed in the first stage and not in its own, which is said in place of an alarm."""
    first = after_two_stages.replace("second", "first")
    (diff,) = compare(base, [after_two_stages])
    assert (diff.byte_identical, diff.is_start) == (False, False)
    assert (diff.stage.base, diff.stage.byte_identical, diff.stage.is_start) == (first, True, True)
    text = verdict(diff)
    assert f"in its last stage, from {first}, all {len(diff.frozen)} frozen parameters kept their bits" in text
    assert f"hft-trl diff {first} {after_two_stages} shows that stage alone" in text
    assert "NOT" not in text
    assert YES not in text
    learned, frozen = halves_grid(diff).rows
    assert frozen[2:4] == [tables.change(0.0), tables.percent(0.0)]
    assert frozen[4] != tables.change(0.0)
    assert learned[3] == tables.percent(1.0)
    content = json.loads(json.dumps(diff_json([diff])))["models"][0]
    assert content["last_stage"]["frozen_half_byte_identical"] is True
    assert content["last_stage"]["last_stage"] is None
    assert compare(first, [after_two_stages])[0].stage is None


def test_the_start_of_a_moved_run_is_found_and_a_changed_one_is_not(base, after_two_stages, tmp_path):
    """By its digest; without it, only the command is named."""
    (tmp_path / "run").rename(tmp_path / "moved")
    tuned = str(tmp_path / "moved" / "second")
    (diff,) = compare(base, [tuned])
    assert diff.stage.base == str(tmp_path / "moved" / "first")
    moved(AutoModelForCausalLM.from_pretrained(diff.stage.base)).save_pretrained(diff.stage.base)
    (diff,) = compare(base, [tuned])
    assert diff.stage is None
    assert verdict(diff).endswith(f"hft-trl diff {tmp_path / 'run' / 'first'} {tuned} shows that stage alone")
    assert "NOT" not in verdict(diff)


def test_a_half_that_moved_in_the_last_stage_is_said(base, after_two_stages):
    model = AutoModelForCausalLM.from_pretrained(after_two_stages)
    name = Selection.load(after_two_stages).frozen[0]
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    model.save_pretrained(after_two_stages, max_shard_size="30KB")
    text = verdict(compare(base, [after_two_stages])[0])
    assert "first, 1 of " in text
    assert f"frozen parameters differ, such as {name}" in text


def test_a_half_reset_model_passes_against_its_base(base, tmp_path):
    moved(tiny_llama(64)).save_pretrained(tmp_path / "tuned")
    selection = half_reset(base, str(tmp_path / "tuned"), tmp_path / "out")
    (diff,) = compare(base, [str(tmp_path / "out")])
    assert (diff.byte_identical, diff.is_start, diff.frozen) == (
        True,
        True,
        sorted(diff.frozen, key=diff.frozen.index),
    )
    assert set(diff.frozen) == set(selection.frozen)
    (diff,) = compare(str(tmp_path / "tuned"), [str(tmp_path / "out")])
    assert (diff.byte_identical, diff.is_start) == (False, False)
    assert set(diff.touched) == set(selection.frozen)


def test_a_tied_parameter_that_is_in_the_file_twice_counts_once(tmp_path):
    model = tiny_llama(64, tie_word_embeddings=True)
    tied_with_both_in_the_file(tmp_path / "base")
    (diff,) = compare(str(tmp_path / "base"), [trained(model, tmp_path)])
    assert sum(found.size for _, found in diff.units) == model.num_parameters()
    (diff,) = compare(str(tmp_path / "tuned"), [str(tmp_path / "base")])
    assert sum(found.size for _, found in diff.units) == model.num_parameters()


def test_a_parameter_that_no_file_holds_is_an_error(base, tmp_path):
    """Nothing can be said of it, least of all yes."""
    tuned = trained(tiny_llama(64), tmp_path)
    tiny_llama(64).save_pretrained(base, max_shard_size="30KB")
    name = compare(base, [tuned])[0].frozen[0]
    for folder in (base, tuned):
        tensors = {key: value for path in Path(folder).glob("*.safetensors") for key, value in load_file(path).items()}
        for path in Path(folder).glob("model*"):
            path.unlink()
        del tensors[name]
        save_file(tensors, f"{folder}/model.safetensors")
    with pytest.raises(HFTError, match=f"no file of .* holds {name}"):
        compare(base, [tuned])


def test_the_selection_of_another_model_is_an_error(base, tmp_path):
    tuned = trained(tiny_llama(64), tmp_path)
    select(tiny_llama(64, num_hidden_layers=6), HFTConfig()).save(tuned)
    with pytest.raises(HFTError, match=r"model\.layers\.4\..* lacks"):
        compare(base, [tuned])


def test_models_that_are_not_alike_are_an_error_before_anything_is_compared(base, tmp_path):
    tiny_llama(65).save_pretrained(tmp_path / "other")
    with pytest.raises(HFTError, match="65"):
        compare(base, [trained(tiny_llama(64), tmp_path), str(tmp_path / "other")])


def test_a_tensor_is_read_a_few_times_however_many_there_are(base, tmp_path, monkeypatch):
    """Not once for each frozen parameter: with the experts of a mixture that takes hours."""
    tuned, tensor, reads = trained(tiny_llama(64), tmp_path), SavedModel.tensor, Counter()

    def counted(saved, key):
        reads[saved.name, key] += 1
        return tensor(saved, key)

    monkeypatch.setattr(SavedModel, "tensor", counted)
    (diff,) = compare(base, [tuned])
    assert max(reads.values()) < len(diff.frozen) / 2


def test_json_holds_every_figure_and_no_infinity(base, tmp_path):
    """A change over a base of zeros, or of values that are not finite, has no figure: null."""
    model = tiny_llama(64, attention_bias=True)  # biases start at zero
    model.save_pretrained(base)
    (diff,) = compare(base, [trained(model, tmp_path)])
    found = json.loads(json.dumps(diff_json([diff]), allow_nan=False))
    (row,) = found["models"]
    assert (row["method"], row["frozen_half_byte_identical"], row["selection"]) == ("hft", True, diff.selection.digest)
    assert row["verdict"] == verdict(diff)
    assert len(row["units"]) == len(diff.units)
    assert len(row["layers"]) == 4 * 3
    assert row["units"][0].keys() == {
        "name", "layer", "category", "slot", "trainable", "relative_change", "moved_share", "moved", "parameters",
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(math.inf if "norm" in name else 0.0)
    model.save_pretrained(base)
    (diff,) = compare(base, [str(tmp_path / "tuned")])
    (row,) = json.loads(json.dumps(diff_json([diff]), allow_nan=False))["models"]
    assert {unit["relative_change"] for unit in row["units"]} == {None}


def test_tables_have_a_row_a_layer_and_a_row_a_category(base, tmp_path):
    (diff,) = compare(base, [trained(tiny_llama(64), tmp_path)])
    layers, categories = layer_grid(diff), category_grid(diff)
    assert [row[0] for row in layers.rows] == ["0", "1", "2", "3", "all"]
    assert all(len(row) == len(layers.columns) for row in layers.rows)
    assert [row[0] for row in categories.rows] == [
        *[name for name in LAYER_CATEGORIES if name in ("attention", "feed_forward", "norm")],
        "embedding",
        "lm_head",
        "final_norm",
    ]
    assert layers.rows[-1][1:3] == categories.rows[0][2:]


def test_the_picture_shows_the_models_side_by_side_on_one_scale(base, tmp_path, monkeypatch):
    """White and hatched is what HFT kept; FFT beside it has no such cell. Long paths are cut."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: (drawn.append(figure), save(figure, *args, **more))
    )
    names = [
        trained(tiny_llama(64), tmp_path, HFTConfig(method=method), f"{method}-with-a-long-name")
        for method in ("fft", "hft")
    ]
    write_picture(compare(base, names), tmp_path / "diff.png")
    assert (tmp_path / "diff.png").read_bytes().startswith(b"\x89PNG")
    titles = [part.get_suptitle() for part in drawn[0].subfigs]
    assert [title.endswith(ending) for title, ending in zip(titles, ("name (FFT)", "name (HFT)"), strict=True)] == [
        True
    ] * 2
    assert max(map(len, titles)) <= 45
    hatched = [
        sum(len(each.get_paths()) for each in part.axes[0].collections if each.get_hatch())
        for part in drawn[0].subfigs
    ]
    assert hatched[0] == 0
    assert hatched[1] == sum(
        unit.layer is not None for unit, found in compare(base, names)[1].units if not found.moved
    )
    scales = {tuple(part.axes[1].get_ylim()) for part in drawn[0].subfigs}
    assert len(scales) == 1


@pytest.mark.parametrize("name", ["file/diff.png", "diff.docx"])
def test_a_picture_that_cannot_be_written_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(HFTError, match="plot"):
        check_picture(tmp_path / name)  # which the command asks before it compares
