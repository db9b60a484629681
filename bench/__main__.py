"""`python -m bench`: time every norm against the memory's limit and against every peer.

python -m bench                       two minutes; --full for the whole grid
python -m bench --group host          host time of a small call
python -m bench report RESULTS        the table, plots and page of a results file
python -m bench compare A B           what got faster or slower beyond the spread
python -m bench codegen               what the compilers made of the kernels, without a GPU
python -m bench tune                  search the launch policy on a GPU
python -m bench selfcheck             show that the harness can be trusted
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import compare, excerpt, report, results, selfcheck
from .cases import COMMON, DTYPES, GRID, GROUPS, MODES, NORMS, SILU, Case, cases
from .measure import asymptote, measure, settings_for, threads_of
from .providers import MAKERS, Provider, find

QUICK_MODES = [
    *("layer_norm/inference", *COMMON, "layer_norm/both"),
    *("rms_norm/both", "add/both", "dropout/both", "adaln/both", "frozen/backward"),
]
MODES_OF = {
    "quick": QUICK_MODES,
    "cpu": ["layer_norm/both", "add/both"],
    "uses": [f"{norm}/both" for norm in NORMS if norm != "frozen"],
    "gated": [f"{norm}/{phase}" for norm in SILU for phase in ("inference", "both")],
    "channels": ["channels/inference", "channels/both"],
    "compiled": ["layer_norm/both", "rms_norm/both", "add/both"],
    "host": [f"{norm}/{phase}" for norm in ("layer_norm", "add") for phase in ("forward", "both")],
}
"""What is measured of a group that names no modes; of the others everything."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    parser = _parser()
    # The report has options of its own.
    args, rest = parser.parse_known_args(given[:1] if given[0] == "codegen" else given)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = _codegen(given[1:]) if given[0] == "codegen" else args.command(args)
    except ValueError as error:
        parser.exit(2, f"bench: {error}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        return made

    run = add("run", _run, "measure; the default command")
    run.add_argument("--full", action="store_true", help="every group of the grid, mode and dtype")
    run.add_argument("--group", action="append", choices=GROUPS, help="quick by default")
    run.add_argument("--mode", action="append", choices=MODES)
    _add_device(run)
    run.add_argument("--dtype", action="append", choices=DTYPES)
    run.add_argument("--parameters", choices=DTYPES, help="of weight and bias, if not that of x")
    run.add_argument("--provider", action="append", metavar="NAME", help="one to measure")
    run.add_argument("--without", action="append", metavar="NAME", help="one to leave out")
    run.add_argument("--out", type=Path, help="JSON file, else bench/results/DEVICE-DATE.json")
    run.add_argument(
        "--seconds",
        type=float,
        help="begin no case after these, and go on from the file if it is there; exit code 1 while "
        "cases are left",
    )
    shown = add("report", _report, "print, plot and render results")
    shown.add_argument("results", type=Path)
    for command in (run, shown):
        command.add_argument(
            "--readme",
            action="store_true",
            help="put the common case's table into docs/performance.md",
        )
    both = add("compare", _compare, "show what changed beyond the spread")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    commands.add_parser("codegen", help="registers, instructions and a prediction, without a GPU")
    tune = add("tune", _tune, "search the launch policy on a GPU; print a diff of config.py")
    _add_device(tune)
    tune.add_argument("--dtype", action="append", choices=DTYPES)
    tune.add_argument("--direction", choices=("forward", "backward"))
    tune.add_argument("--seconds", type=float, default=400.0, help="stop searching after these")
    _add_device(add("selfcheck", _selfcheck, "plant faults and see whether the harness shows them"))
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads on the CPU")
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: on a CPU shared with others, one thread, without the time of the others",
    )


def _device(args: argparse.Namespace) -> torch.device:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    chosen = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU that torch can use, found none")
    return torch.device(chosen, 0) if chosen == "cuda" else torch.device(chosen)


def _providers(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[Provider], dict[str, str]]:
    for option in ("provider", "without"):
        for name in getattr(args, option) or ():
            if name not in MAKERS:
                raise ValueError(f"--{option}: expected one of {', '.join(MAKERS)}, got {name!r}")
    found, missing = find(args.provider, device)
    found = [provider for provider in found if provider.name not in (args.without or ())]
    if args.provider and missing:
        name, why = next(iter(missing.items()))
        raise ValueError(f"--provider {name}: {why}")
    return found, missing


def _grid(args: argparse.Namespace, device: torch.device) -> list[Case]:
    half = "bfloat16" if device.type == "cuda" else "float32"
    dtypes = args.dtype or (["bfloat16", "float16", "float32"] if args.full else [half])
    pairs = [(dtype, args.parameters or dtype) for dtype in dtypes]
    return [
        case
        for group in args.group or (GRID if args.full else ["quick"])
        for case in cases([group], args.mode or MODES_OF.get(group, MODES), pairs, device.type)
    ]


def _run(args: argparse.Namespace) -> int:
    if args.full and args.group:
        raise ValueError("--full: expected no --group beside it")
    device = _device(args)
    grid = _grid(args, device)
    known = None
    if args.seconds is not None:
        if args.out is None:
            raise ValueError("--seconds: expected --out as well, the file to go on from")
        known = results.load(args.out) if args.out.exists() else None
        if known and (then := known["environment"]["device"]) != results.device_name(device):
            raise ValueError(f"--out: {args.out} has results of another device, {then}")
    done = {results.case_key(cell) for cell in known["cells"]} if known else set()
    here = {"threads": threads_of(device)}
    left = [case for case in grid if results.case_key(vars(case) | here) not in done]
    settings = settings_for(device, args.clock)
    providers, missing = _providers(args, device)
    versions = {provider.name: provider.version for provider in providers}
    found = {
        "schema": results.SCHEMA,
        "environment": results.environment(device) | {"clock": args.clock},
        "providers": (known["providers"] if known else {}) | versions,
        "missing": missing,
        "copy_gbps": asymptote(device),
        "cells": known["cells"] if known else [],
    }
    path = args.out or results.path_of(found)
    results.save(found, path)
    measured = 0
    for cells in measure(left, providers, device, settings, seconds=args.seconds):
        found["cells"] += cells
        results.save(found, path)  # what is done outlives whoever ends this
        measured += 1
    _show(found, path, args.readme)
    if measured == len(left):
        return 0
    print(f"bench: {len(left) - measured} of {len(grid)} cases are left; run it again for them")
    return 1


def _show(found: results.Results, path: Path, readme: bool) -> None:
    print(report.terminal(found))
    if readme:
        excerpt.write(found, path.stem)
    for written in (path, *report.write(found, path)):
        print(written)


def _report(args: argparse.Namespace) -> int:
    _show(results.load(args.results), args.results, args.readme)
    return 0


def _compare(args: argparse.Namespace) -> int:
    print(compare.describe(results.load(args.before), results.load(args.after)))
    return 0


def _codegen(arguments: Sequence[str]) -> int:
    # The report stands beside the tests that read it.
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    try:
        code: int = importlib.import_module("codegen").main(arguments)
    except ImportError as error:
        raise ValueError(f"codegen: {error}") from None
    return code


def _tune(args: argparse.Namespace) -> int:
    from . import tune

    return tune.main(_device(args), args.dtype, args.direction, args.seconds)


def _selfcheck(args: argparse.Namespace) -> int:
    device = _device(args)
    settings = settings_for(device, args.clock)
    settings = replace(settings, rounds=selfcheck.ROUNDS[device.type], seconds=0.002)
    return 0 if selfcheck.run(device, settings) else 1


if __name__ == "__main__":
    sys.exit(main())
