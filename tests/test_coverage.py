"""`python -m fusednorm coverage`: every module that normalises is counted, once."""

import runpy
import sys

import pytest
import torch
from torch import nn

from fusednorm import coverage


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input).abs()


class Block(nn.Module):
    """Normalises on the way, and is no norm by its name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(8), "own": OwnNorm(8)})

    def forward(self, x):
        return nn.functional.layer_norm(x, (8,))


class NormedBlock(Block):
    def forward(self, x):
        return x


def model() -> nn.Module:
    return nn.Sequential(Block(), NormedBlock(), nn.RMSNorm(8), nn.BatchNorm1d(8))


def broken() -> nn.Module:
    raise OSError("no such file")


def test_what_is_counted(capsys):
    assert coverage.main([f"{__name__}:model", f"{__name__}:broken", "torch.nn:Transformer"]) == 0
    printed = capsys.readouterr().out
    first, second, third, *_ = printed.splitlines()
    assert first.endswith("   3 swapped,    2 left")
    assert second.endswith("not built: OSError: no such file")
    assert third.endswith("  32 swapped,    0 left")
    sums = {line.strip() for line in printed.splitlines()}
    assert {
        "1 models not built",
        "2 models built",
        "2 models with norms",
        "1 models with all norms swapped",
        "35 norms swapped",
        "2 norms left",
        "1 NormedBlock: a block around norms, of which 1 of 2 are swapped",
        "35 in bfloat16",
        "2 OwnNorm: its arithmetic is none that fusednorm has",
        f"1 {__name__}.Block",
    } <= sums
    assert f"torch {torch.__version__.partition('+')[0]}" in printed


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fusednorm", "coverage"])
    monkeypatch.delitem(sys.modules, "fusednorm.__main__", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module("fusednorm", run_name="__main__")
    assert left.value.code == 2
    assert "A target is" in capsys.readouterr().out
