"""torch's exporter reads the source of some 500 ONNX functions anew for each model: half of the time of a small one."""

import contextlib
import functools
from typing import Any

with contextlib.suppress(ImportError, AttributeError, KeyError):  # other versions of torch keep them elsewhere
    from torch.onnx._internal.exporter import _registration

    onnxscript_apis: Any = vars(_registration)["onnxscript_apis"]
    onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)
