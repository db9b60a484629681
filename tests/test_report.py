"""`python -m fusednorm` says what is there and whether it computes right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import fusednorm
from fusednorm import __main__, _version, backends


def serving() -> set[str]:
    """Return what runs on the CPU, all of which is checked."""
    cpu = torch.device("cpu")
    return {name for name in backends.available() if backends.serves(name, cpu)}


def test_as_json() -> None:
    """All of it, alone on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "fusednorm", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["fusednorm"] == fusednorm.__version__
    assert report["torch"].startswith(torch.__version__)
    assert report["backends"] == list(backends.available())
    assert report["devices"][0]["device"].startswith("cpu")
    for device in report["devices"]:
        assert set(device) == {"device", "runs", "self-check"}
        for check in device["self-check"]:
            assert 0 < check["error"] <= check["allowed"]
    checked = {check["backend"] for check in report["devices"][0]["self-check"]}
    assert checked == serving()


def test_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a fact, with the variables that may have changed what runs."""
    monkeypatch.setenv("FUSEDNORM_SOMETHING", "7")
    assert __main__.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"fusednorm {fusednorm.__version__}"
    assert any(line.startswith("variables") and "FUSEDNORM_SOMETHING=7" in line for line in lines)
    if not torch.cuda.is_available():
        assert sum(line.endswith(": ok") for line in lines) == 3 * len(serving())


def test_wrong_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen, named and counted."""
    right = fusednorm.layer_norm
    monkeypatch.setattr(fusednorm, "layer_norm", lambda x, *rest: right(x, *rest) + 1e-2)
    assert __main__.main([]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_device_that_nothing_serves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps the requested backend from it stands in the report."""

    def fail(*arguments: object, **named: object) -> backends.Choice:
        raise ValueError("FUSEDNORM_BACKEND: expected something else")

    monkeypatch.setattr(backends, "choose", fail)
    assert __main__.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    expected = "ValueError: FUSEDNORM_BACKEND: expected something else"
    assert report["devices"][0]["error"] == expected


@pytest.mark.parametrize("backend", sorted(serving()))
def test_wrong_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Those of any backend, not only of the one that a plain layer norm takes."""
    right = fusednorm.layer_norm

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        with backends.explain() as ran:
            y = right(x, *rest)
        return y + (1e-2 if ran[0].backend == backend else 0.0)

    monkeypatch.setattr(fusednorm, "layer_norm", wrong)
    assert __main__.main(["--json"]) == 1
    [cpu, *_] = json.loads(capsys.readouterr().out)["devices"]
    failed = {one["backend"] for one in cpu["self-check"] if one["error"] > one["allowed"]}
    assert failed == {backend}


@pytest.mark.skipif(backends.extension_missing() is not None, reason="there is no extension")
def test_what_the_extension_was_built_with() -> None:
    """Torch, platform and compiler."""
    built = importlib.import_module("fusednorm._C").built
    assert built.startswith("built with torch ")
    assert ", compiler " in built
    assert built in __main__._extension()


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.1"])
def test_older_torch(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The import ends with one line that names both versions."""
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError) as caught:
        importlib.reload(_version)
    assert str(caught.value) == (
        f"fusednorm {fusednorm.__version__} needs torch 2.10 or newer, got {version}"
    )
