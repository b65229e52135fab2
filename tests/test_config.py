"""Settings: what cannot be right is refused when it is written, and TrlParser takes the dataclass as it is."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import TrlParser

from hft_trl import HFTConfig, HFTError

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# Settings: `HFTConfig`

Written from the docstring of [`HFTConfig`](../hft_trl/config.py) by `python tests/test_config.py`. In Python they are
arguments of `HFTConfig`. In `sft.py` and `dpo.py` they are flags (`--ratio 0.3`; the seed is `--hft_seed`), in recipes
with sections keys of `hft` (`--hft.ratio 0.3`), where `method` is outside the sections.
"""


def written_page() -> str:
    """The page of the settings, a section for each entry of the docstring."""
    entries = inspect.getdoc(HFTConfig).partition("Args:\n")[2]
    found = re.findall(r"^ {4}(\w+) \((.*)\):\n((?: {8}.*\n?)+)", entries, re.MULTILINE)
    sections = [f"## {name}\n\n*{kind.replace('*', '')}*\n\n{inspect.cleandoc(text)}\n" for name, kind, text in found]
    assert [name for name, _, _ in found] == [field.name for field in dataclasses.fields(HFTConfig)]
    return "\n".join([HEAD, *sections])


def test_the_page_of_settings_is_the_docstring():
    assert PAGE.read_text(encoding="utf-8") == written_page()


@given(st.floats(0, 1, exclude_min=True))
def test_every_ratio_above_0_and_up_to_1_is_taken(ratio):
    assert HFTConfig(ratio=ratio).ratio == ratio


@given(
    st.one_of(st.floats(max_value=0), st.floats(1, exclude_min=True), st.just(float("nan")), st.text(), st.booleans())
)
def test_every_other_ratio_is_refused(ratio):
    with pytest.raises(HFTError, match=r"hft\.ratio is"):
        HFTConfig(ratio=ratio)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("method", "lora"),
        ("strategy", "row"),
        ("importance", "size"),
        ("importance", "gradient_norm"),
        ("importance", "wanda"),
        ("importance", "snr"),
        ("importance_order", "least"),
        ("calibration_samples", 0),
        ("calibration_samples", 64),
        ("calibration_samples", True),
        ("reselect", "never"),
        ("frozen_quantization", "int4"),
        ("seed", 1.5),
        ("seed", True),
        ("train_embeddings", "False"),
        ("share_reference", None),
        ("optimizer_in_backward", "no"),
        ("exclude", "a string"),
        ("exclude", ["("]),
        ("exclude", [1]),
    ],
)
def test_a_value_out_of_range_is_named(setting, value):
    with pytest.raises(HFTError, match=rf"hft\.{setting}"):
        HFTConfig(**{setting: value})


def test_a_half_chosen_by_importance_has_settings_of_the_same_shares_without_weights():
    importance = HFTConfig(strategy="importance", importance="gradient_norm", importance_order="least", ratio=0.3)
    assert importance.by_shape() == HFTConfig(ratio=0.3)
    assert HFTConfig(strategy="element", seed=7).by_shape() == HFTConfig(seed=7)
    assert HFTConfig(strategy="layer").by_shape() == HFTConfig(strategy="layer")


def test_trl_parser_takes_it():
    (config,) = TrlParser((HFTConfig,)).parse_args_and_config(
        ["--method", "fft", "--ratio", "0.3", "--exclude", "a", "b.*", "--no_train_embeddings", "--reselect", "same"]
    )
    assert config == HFTConfig("fft", 0.3, exclude=["a", "b.*"], train_embeddings=False, reselect="same")


if __name__ == "__main__":
    PAGE.write_text(written_page(), encoding="utf-8")
