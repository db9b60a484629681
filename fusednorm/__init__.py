"""Fused LayerNorm for torch: a drop-in for ``nn.LayerNorm`` on Triton kernels."""

from fusednorm import backends
from fusednorm._version import __version__
from fusednorm.functional import layer_norm
from fusednorm.modules import LayerNorm
from fusednorm.replace import replace_norms, restore_norms

__all__ = [
    "LayerNorm",
    "__version__",
    "backends",
    "layer_norm",
    "replace_norms",
    "restore_norms",
]
