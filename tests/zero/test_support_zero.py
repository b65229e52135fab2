"""Every feature of the support matrix with a half, in two real processes under ZeRO-2 and ZeRO-3."""

import features
import pytest
from launching import launch

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def launched(request, base, tmp_path_factory):
    """The name of a launch, and what its processes saw of all features."""
    output = tmp_path_factory.mktemp(f"zero{request.param}")
    launch(request.param, features.__file__, base, output)
    return f"zero{request.param}", features.seen(output)


@pytest.mark.parametrize(("stage", "name"), features.EVERY, ids=lambda value: value)
def test_a_half_trains_with(launched, stage, name):
    features.check(*launched, stage, name)
