"""Every feature of the support matrix with a half, in two real processes under ZeRO-2 and ZeRO-3."""

import features
import pytest
from launching import launch as launch_zero

pytestmark = pytest.mark.deepspeed

REJECTED = {
    "activation_offloading": "activation_offloading is true, .* no GPU is available: set it to false",
    "bf16_full_eval": "bf16_full_eval is true, .* set it to false",
    **dict.fromkeys(("int8", "nf4"), "hft.frozen_quantization is '.*', but DeepSpeed cannot shard"),
}


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def launch(request, base, tmp_path_factory):
    """The name of a launch, and what its processes saw of all features."""
    output = tmp_path_factory.mktemp(f"zero{request.param}")
    launch_zero(request.param, features.__file__, base, output)
    return f"zero{request.param}", features.seen(output)


@pytest.mark.parametrize(("stage", "name"), features.EVERY, ids=lambda value: value)
def test_a_half_trains_with(launch, stage, name):
    how, ranks = launch
    features.check(stage, name, ranks, how, REJECTED)
