"""`huoyan.quantize(model, out, ...)`: a checkpoint's language model in int4. See `huoyan.quantize.run.quantize`.

The package is a function too, so that the call reads as it should; `huoyan.quantize.quantize` is the same.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huoyan.quantize.calibration import CalibrationItem
    from huoyan.quantize.run import QuantizeReport, quantize

_WHERE = {
    "quantize": "huoyan.quantize.run",
    "QuantizeReport": "huoyan.quantize.run",
    "CalibrationItem": "huoyan.quantize.calibration",
}

__all__ = ["CalibrationItem", "QuantizeReport", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> QuantizeReport:
        from huoyan.quantize.run import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
