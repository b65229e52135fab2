"""DeepSpeed's settings as HFT wants them. What needs DeepSpeed itself is in tests/zero."""

import pytest
import torch
from conftest import tiny_llama
from trl import SFTConfig

from hft_trl import HFTConfig, HFTError, HFTSFTTrainer
from hft_trl.backends import zero
from hft_trl.selection import find_units
from hft_trl.weights import numel


class Plugin:
    """As much of accelerate's DeepSpeedPlugin as is asked for; making a real one imports DeepSpeed."""

    def __init__(self, zero_stage: int, **values) -> None:
        self.zero_stage = zero_stage
        self.values = {"zero_optimization.stage3_gather_16bit_weights_on_model_save": True, **values}
        self.is_set = False

    def get_value(self, key):
        return self.values.get(key)

    def set_deepspeed_weakref(self) -> None:
        self.is_set = True


@pytest.fixture
def args(tmp_path):
    def make(plugin: Plugin, **settings) -> SFTConfig:
        args = SFTConfig(str(tmp_path), use_cpu=True, **settings)
        args.deepspeed_plugin = plugin
        return args

    return make


def test_zero3_makes_checkpointing_reentrant(args):
    """Under both names of the setting, silently where the user said nothing, other keys kept."""
    config = args(Plugin(3), gradient_checkpointing=True, gradient_checkpointing_kwargs={"every_n_layers": 2})
    zero.prepare(config, HFTConfig())
    assert config.activation_checkpointing_kwargs == {"every_n_layers": 2, "use_reentrant": True}
    assert config.gradient_checkpointing_kwargs == config.activation_checkpointing_kwargs


def test_zero3_warns_where_the_user_asked_for_the_other_checkpointing(args, monkeypatch):
    said = []
    monkeypatch.setattr(zero.logger, "warning", said.append)
    config = args(Plugin(3), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    zero.prepare(config, HFTConfig())
    assert config.activation_checkpointing_kwargs["use_reentrant"] is True
    assert "use_reentrant is False" in said[0]


@pytest.mark.parametrize(("stage", "method", "checkpointing"), [(2, "hft", True), (3, "fft", True), (3, "hft", False)])
def test_checkpointing_is_left_alone_where_it_works(args, stage, method, checkpointing):
    config = args(Plugin(stage), gradient_checkpointing=checkpointing)
    zero.prepare(config, HFTConfig(method=method))
    assert not (config.activation_checkpointing_kwargs or {}).get("use_reentrant")


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_zero3_that_would_save_no_model_is_refused_early(args, method):
    plugin = Plugin(3, **{"zero_optimization.stage3_gather_16bit_weights_on_model_save": False})
    with pytest.raises(HFTError, match="zero3_save_16bit_model is false"):
        zero.prepare(args(plugin), HFTConfig(method=method))


def test_a_trainer_without_args_is_refused_under_deepspeed(base, tulu, monkeypatch):
    """Its defaults come too late to be corrected."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(HFTError, match="args is None"):
        HFTSFTTrainer(model=str(base), train_dataset=tulu)


def test_each_trainer_gets_its_own_settings(args):
    """Not those of an earlier trainer of the process, which transformers would keep."""
    plugin = Plugin(2)
    zero.prepare(args(plugin), HFTConfig())
    assert plugin.is_set


def test_models_are_whole_inside_whole_models_only():
    class Config:
        def is_zero3(self):
            return True

    config = Config()
    zero.integration.set_hf_deepspeed_config(config)
    try:
        with zero.whole_models():
            assert not zero.integration.is_deepspeed_zero3_enabled()
        assert zero.integration.is_deepspeed_zero3_enabled()
    finally:
        zero.integration.unset_hf_deepspeed_config()


def test_units_of_a_partitioned_model_are_those_of_the_whole(tokenizer):
    """ZeRO-3 leaves empty tensors that know how large they were."""
    model = tiny_llama(len(tokenizer))
    whole = find_units(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_numel = number, parameter.numel()
        parameter.data = torch.empty(0)
    assert find_units(model) == whole
    assert sum(map(numel, model.parameters())) == sum(unit.size for unit in whole)


def test_casting_tells_the_type_that_deepspeed_would():
    for key, dtype in (("bf16.enabled", torch.bfloat16), ("fp16.enabled", torch.float16), ("none", None)):
        state = type("State", (), {"deepspeed_plugin": Plugin(2, **{key: True})})
        model = torch.nn.Linear(2, 2)
        assert zero.cast(model, state) == (zero.UNCAST if dtype else None)
        assert model.weight.dtype == (dtype or torch.float32)
