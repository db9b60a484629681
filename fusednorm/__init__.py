"""Fused norms for torch: LayerNorm, RMSNorm and the terms around them, on Triton kernels."""

from fusednorm import _version, backends  # noqa: F401  (the first refuses an old torch)
from fusednorm._version import __version__
from fusednorm.functional import (
    add_layer_norm,
    add_rms_norm,
    gated_layer_norm,
    gated_rms_norm,
    layer_norm,
    layer_norm2d,
    modulated_layer_norm,
    modulated_rms_norm,
    rms_norm,
    rms_norm2d,
)
from fusednorm.modules import (
    AdaLayerNorm,
    AdaRMSNorm,
    AddLayerNorm,
    AddRMSNorm,
    GatedRMSNorm,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
    RMSNorm2d,
)
from fusednorm.replace import replace_norms, restore_norms
from fusednorm.torch_operators import disable, enable, read_environment

__all__ = [
    "AdaLayerNorm",
    "AdaRMSNorm",
    "AddLayerNorm",
    "AddRMSNorm",
    "GatedRMSNorm",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "RMSNorm2d",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "backends",
    "disable",
    "enable",
    "gated_layer_norm",
    "gated_rms_norm",
    "layer_norm",
    "layer_norm2d",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "replace_norms",
    "restore_norms",
    "rms_norm",
    "rms_norm2d",
]

backends.extension_missing()  # refuses one that does not load
read_environment()
