"""Every feature of the support matrix with a half, in two real processes under DDP and under FSDP2."""

import features
import pytest
from launch import finish, on_cpu, start

pytestmark = pytest.mark.long

CONFIGS = {"ddp": "cpu2.yaml", "fsdp2": "fsdp2.yaml"}
BACKENDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
REJECTED = {
    "ddp": {
        "activation_offloading": "activation_offloading is true, .* no GPU is available: set it to false",
        "bf16_full_eval": "bf16_full_eval is true, .* set it to false",
    },
}
REJECTED["fsdp2"] = {
    **REJECTED["ddp"],
    **dict.fromkeys(("int8", "nf4"), "hft.frozen_quantization is '.*', but FSDP cannot shard"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def launch(request, base, tmp_path_factory):
    """The name of a launch, and what its processes saw of all features."""
    output = tmp_path_factory.mktemp(request.param)
    finish(start(on_cpu(CONFIGS[request.param], output), features.__file__, base, output))
    return request.param, features.seen(output)


@pytest.mark.parametrize(("stage", "name"), features.EVERY, ids=lambda value: value)
def test_a_half_trains_with(launch, stage, name):
    how, ranks = launch
    features.check(stage, name, ranks, BACKENDS[how], REJECTED[how])
