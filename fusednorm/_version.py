"""The version, and the check that the torch beside it is one that it runs with."""

import torch

__version__ = "0.1.0"

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"fusednorm {__version__} needs torch 2.10 or newer, got {torch.__version__}")
