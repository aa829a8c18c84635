"""Training: the plan of a run, the engine of a step, the loop, evaluation, logging.

The package can be called: `ctt.train(...)` is `ctt.train.api.train`.
"""

import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    def __call__(self, **settings: Any) -> dict[str, Any]:
        from ctt.train.api import train

        return train(**settings)


sys.modules[__name__].__class__ = _Train
