"""Installs the wheel of dist/ in clean environments and prints what became of it: make matrix.

Each environment is made below build/matrix and kept, so that a second run is quick. A row says what
`python -m fusednorm` reports there and whether a selection of the suite passes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "matrix"
# Small, and about what an installation can break: what loads, what runs, what agrees with torch.
SELECTION = ["tests/test_installed.py", "tests/test_public.py", "tests/test_report.py"]
WITHOUT_NUMPY = "ignore:Failed to initialize NumPy:UserWarning"  # torch's word on it


@dataclass(frozen=True)
class Environment:
    """What is installed beside the wheel, and what is not."""

    name: str
    packages: tuple[str, ...]
    python: str = sys.executable
    without: tuple[str, ...] = ()


def starts(python: str) -> bool:
    """Return whether there is such a Python: what stands on the path may only stand in for one."""
    command = [python, "-c", ""]
    return (
        bool(shutil.which(python)) and subprocess.run(command, capture_output=True).returncode == 0
    )


ENVIRONMENTS = (
    Environment("oldest-torch", ("torch==2.10.0", "numpy<2.4"), without=("triton",)),
    Environment("newest-torch", ("torch", "numpy"), without=("triton",)),
    Environment("triton", ("torch==2.13.0", "triton==3.9.0", "numpy")),
    Environment("no-numpy", ("torch==2.13.0",), without=("numpy", "triton")),
    *(
        Environment(f"python3.{minor}", ("torch==2.13.0", "numpy"), f"python3.{minor}")
        for minor in range(10, 15)
        if minor != sys.version_info.minor and starts(f"python3.{minor}")
    ),
)


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured, and with no compiler on the path."""
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"CXX": "none", "CC": "none", "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command, capture_output=True, text=True, check=False, env=variables, **options
    )


def install(environment: Environment, wheel: Path) -> Path:
    """Return the Python of an environment, made on first use, with the wheel in it."""
    folder = FOLDER / environment.name
    python = folder / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip"]
    steps: list[list[str | Path]] = []
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        steps += [[environment.python, "-m", "venv", folder]]
        steps += [[*pip, "install", "--quiet", "pytest", *environment.packages]]
        if environment.without:
            steps += [[*pip, "uninstall", "--quiet", "--yes", *environment.without]]
    steps += [[*pip, "install", "--quiet", "--force-reinstall", "--no-deps", wheel]]
    for step in steps:
        done = run(step)
        if done.returncode != 0:
            sys.exit(f"matrix: {environment.name}: {' '.join(map(str, step))}:\n{done.stderr}")
    (folder / "ready").touch()
    return python


def row(environment: Environment, wheel: Path) -> tuple[list[str], bool]:
    """Return the cells of an environment, and whether all is well there."""
    python = install(environment, wheel)
    away = FOLDER / environment.name / "away"  # where no source tree can be imported by chance
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir()
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, away / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "toolchain.py"):
        shutil.copy(ROOT / name, away)
    said = run([python, "-m", "fusednorm", "--json"], cwd=away)
    if said.returncode not in (0, 1) or not said.stdout:
        return [environment.name, said.stderr.strip()[-200:].replace("\n", " ")], False
    report = json.loads(said.stdout)
    cpu = report["devices"][0]
    suite = run([python.parent / "pytest", "-q", "-W", WITHOUT_NUMPY, *SELECTION], cwd=away)
    outcome = ((suite.stdout or suite.stderr).splitlines() or ["no word"])[-1].strip("= ")
    cells = [
        environment.name,
        report["python"].split()[0],
        report["torch"].split(",")[0],
        report["extension"].split(";")[0],
        ", ".join(report["backends"]),
        cpu.get("error") or cpu["runs"]["add_layer_norm"].split(":")[0],
        "ok" if said.returncode == 0 else "FAILED",
        outcome,
    ]
    return cells, said.returncode == 0 and suite.returncode == 0


def main() -> int:
    """Print a row for each environment; return 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which environments; all of them by default")
    names = parser.parse_args().names
    wheels = [path for path in (ROOT / "dist").glob("*.whl") if "+" not in path.name]
    if len(wheels) != 1:
        sys.exit(f"matrix: expected one wheel in dist/ (make wheel), got {len(wheels)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    head = run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT).stdout.strip()
    print(f"{wheels[0].name}, {wheels[0].stat().st_size} bytes, at {head}\n")
    cells = ["environment", "python", "torch", "extension", "backends", "runs", "check", "tests"]
    print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}")
    failed = False
    for environment in ENVIRONMENTS:
        if names and environment.name not in names:
            continue
        cells, passed = row(environment, wheels[0])
        print(f"| {' | '.join(cells)} |", flush=True)
        failed |= not passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
