"""`python -m bench`: time every norm against the memory's limit and against every peer.

python -m bench                       two minutes; --full for the whole grid
python -m bench report RESULTS        the table, plots and page of a results file
python -m bench compare A B           what got faster or slower beyond the spread
python -m bench scaling               how time grows with M, N and threads
python -m bench codegen               what the compilers made of the kernels, without a GPU
python -m bench tune                  search the launch policy on a GPU
python -m bench selfcheck             show that the harness can be trusted
python -m bench host-time             host time of a small call
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import results
from .cases import DTYPES, GROUPS, MODES, Case, cases

QUICK_MODES = [
    *("layer_norm/inference", "layer_norm/forward", "layer_norm/backward", "layer_norm/both"),
    *("rms_norm/both", "add/both", "dropout/both", "adaln/both", "frozen/backward"),
]
FULL_GROUPS = [group for group in GROUPS if group != "quick"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    if given[0] == "codegen":
        return _codegen(given[1:])
    parser = _parser()
    args = parser.parse_args(given)
    try:
        code: int = args.command(args)
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

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> Any:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        return made

    run = add("run", _run, "measure; the default command")
    size = run.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few shapes, the default")
    size.add_argument("--full", action="store_true", help="every group, mode and dtype")
    run.add_argument("--group", action="append", choices=GROUPS)
    run.add_argument("--mode", action="append", choices=MODES)
    _add_device(run)
    run.add_argument("--dtype", action="append", choices=DTYPES)
    run.add_argument(
        "--parameters", choices=DTYPES, help="dtype of weight and bias, if not that of x"
    )
    _add_providers(run)
    run.add_argument("--out", type=Path, help="JSON file, else bench/results/DEVICE-DATE.json")
    _add_readme(run)
    run.add_argument(
        "--seconds",
        type=float,
        help="begin no case after these, and go on from the file if it is there; exit code 1 while "
        "cases are left",
    )

    report = add("report", _report, "print, plot and render results")
    report.add_argument("results", type=Path)
    report.add_argument("--metric", choices=results.METRICS)
    _add_readme(report)

    compare = add("compare", _compare, "show what changed beyond the spread")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--metric", choices=results.METRICS)

    scaling = add("scaling", _scaling, "fit how time grows with M, N and threads")
    scaling.add_argument("results", type=Path, nargs="?", help="fit these; else measure")
    _add_device(scaling)
    _add_providers(scaling)
    scaling.add_argument("--dtype", choices=DTYPES)
    scaling.add_argument("--out", type=Path, help="JSON file of what was measured")

    tune = add("tune", _tune, "search the launch policy on a GPU; print a diff of config.py")
    tune.add_argument("--dtype", action="append", choices=DTYPES)
    tune.add_argument("--direction", choices=("forward", "backward"))
    tune.add_argument("--seconds", type=float, default=400.0, help="stop searching after these")

    check = add("selfcheck", _selfcheck, "plant faults and see whether the harness shows them")
    _add_device(check)
    add("host-time", _host_time, "host time of a small call against nn.LayerNorm")
    return parser


def _add_readme(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--readme", action="store_true", help="put the common case's table into README.md"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads on the CPU")
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: on a CPU shared with others, one thread, without the time of the others",
    )


def _add_providers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provider", action="append", metavar="NAME", help="one of those to measure; repeatable"
    )
    parser.add_argument(
        "--without", action="append", metavar="NAME", help="one to leave out; repeatable"
    )


def _device(args: argparse.Namespace) -> torch.device:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    chosen = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda":
        _require_gpu("--device cuda")
    return torch.device(chosen, 0) if chosen == "cuda" else torch.device(chosen)


def _require_gpu(what: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"{what}: expected a GPU that torch can use, found none")


def _providers(args: argparse.Namespace, device: torch.device) -> tuple[list[Any], dict[str, str]]:
    from .providers import MAKERS, find

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


def _collect(
    chosen: Sequence[Case], args: argparse.Namespace, device: torch.device
) -> results.Results:
    """Measure the cases and return the results."""
    from .measure import asymptote, measure, settings_for

    providers, missing = _providers(args, device)
    seconds = getattr(args, "seconds", None)
    settings = settings_for(device, args.clock)
    return {
        "schema": results.SCHEMA,
        "environment": results.environment(device) | {"clock": args.clock},
        "providers": {provider.name: provider.version for provider in providers},
        "missing": missing,
        "copy_gbps": asymptote(device),
        "cells": list(measure(chosen, providers, device, settings, seconds=seconds)),
    }


def _grid(args: argparse.Namespace, device: torch.device) -> list[Case]:
    half = "bfloat16" if device.type == "cuda" else "float32"
    dtypes = args.dtype or (["bfloat16", "float16", "float32"] if args.full else [half])
    pairs = [(dtype, args.parameters or dtype) for dtype in dtypes]
    groups = args.group or (FULL_GROUPS if args.full else ["quick"])
    modes = args.mode or (list(MODES) if args.full else QUICK_MODES)
    return list(cases(groups, modes, pairs, device.type))


def _run(args: argparse.Namespace) -> int:
    from .measure import threads_of

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
    threads = threads_of(device)
    left = [
        case for case in grid if results.case_key(vars(case) | {"threads": threads}) not in done
    ]
    found = _collect(left, args, device)
    measured = len(results.by_case(found))
    if known:
        found["cells"] = known["cells"] + found["cells"]
    path = args.out or results.path_of(found)
    results.save(found, path)
    _show(found, path, args.readme)
    if measured == len(left):
        return 0
    print(f"bench: {len(left) - measured} of {len(grid)} cases are left; run it again for them")
    return 1


def _show(
    found: results.Results, path: Path, readme: bool = False, metric: str | None = None
) -> int:
    from . import excerpt, report

    print(report.table(found, metric) if metric else report.terminal(found))
    if readme:
        excerpt.write(found, path.stem)
    for written in (path, *report.write(found, path)):
        print(written)
    return 0


def _report(args: argparse.Namespace) -> int:
    found = results.load(args.results)
    if args.metric and args.metric not in results.metrics(found):
        raise ValueError(f"--metric: {args.results} has {', '.join(results.metrics(found))}")
    return _show(found, args.results, args.readme, args.metric)


def _compare(args: argparse.Namespace) -> int:
    from .compare import describe

    print(describe(results.load(args.before), results.load(args.after), args.metric))
    return 0


def _scaling(args: argparse.Namespace) -> int:
    from . import scaling

    if args.results is not None:
        print(scaling.describe(results.load(args.results)))
        return 0
    device = _device(args)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.provider is None:
        args.provider = [p.name for p in _providers(args, device)[0] if "compile" not in p.name]
    found = _collect(scaling.cases(dtype), args, device)
    if device.type == "cpu":
        most = torch.get_num_threads()
        largest = [c for c in scaling.cases(dtype) if c.rows == max(scaling.ROWS)]
        for threads in range(1, most):
            torch.set_num_threads(threads)
            found["cells"] += _collect(largest, args, device)["cells"]
        torch.set_num_threads(most)
    if args.out:
        results.save(found, args.out)
    print(scaling.describe(found))
    return 0


def _codegen(arguments: Sequence[str]) -> int:
    # The report stands beside the tests that read it.
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    try:
        report = importlib.import_module("codegen")
        code: int = report.main(arguments)
    except (ImportError, ValueError) as error:
        sys.exit(f"bench: codegen: {error}")
    return code


def _tune(args: argparse.Namespace) -> int:
    _require_gpu("tune")
    from . import tune

    return tune.main(args.dtype, args.direction, args.seconds)


def _selfcheck(args: argparse.Namespace) -> int:
    from . import selfcheck
    from .measure import settings_for

    device = _device(args)
    settings = settings_for(device, args.clock)
    settings = replace(settings, rounds=selfcheck.ROUNDS[device.type], seconds=0.002)
    return 0 if selfcheck.run(device, settings) else 1


def _host_time(args: argparse.Namespace) -> int:
    from . import host_time

    host_time.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
