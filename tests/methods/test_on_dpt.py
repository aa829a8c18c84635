"""Methods on a network whose cells are spread over whole patches, of images that end within one."""

import pytest

from ctt import methods
from ctt.settings import Settings, update
from tests.methods.test_contract import in_last_round, settings_of
from tests.train.steps import make, run


@pytest.mark.parametrize("name", methods.names())
def test_a_step_of_every_method(tiny: Settings, name: str) -> None:
    dpt = {"model": {"name": "dpt", "backbone": ["test_vit"], "features": 8}}
    engine = in_last_round(make(update(settings_of(name, tiny), dpt, "test")))
    for terms in run(engine, 4, 2):
        assert all(bool(x.isfinite()) for x in terms.values())
