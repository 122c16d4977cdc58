"""The fused operators `torch.ops.normfuse.*`; importing this package registers them.

`meaning` defines each in plain torch, `kernels` computes it in Triton, `register` makes it a torch operator.
"""

from normfuse.ops import register as register
