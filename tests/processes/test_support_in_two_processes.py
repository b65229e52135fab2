"""Every feature of the support matrix with a half, in two real processes under DDP and under FSDP2."""

import features
import pytest
from launch import finish, on_cpu, start

pytestmark = pytest.mark.long

CONFIGS = {"ddp": "cpu2.yaml", "fsdp2": "fsdp2.yaml"}


@pytest.fixture(scope="module", params=CONFIGS)
def launched(request, base, tmp_path_factory):
    """The name of a launch, and what its processes saw of all features."""
    output = tmp_path_factory.mktemp(request.param)
    finish(start(on_cpu(CONFIGS[request.param], output), features.__file__, base, output))
    return request.param, features.seen(output)


@pytest.mark.parametrize(("stage", "name"), features.EVERY, ids=lambda value: value)
def test_a_half_trains_with(launched, stage, name):
    features.check(*launched, stage, name)
