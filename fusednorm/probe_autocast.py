"""What autocast changes in a norm that a model brings along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fusednorm.arithmetic import BFLOAT16, FLOAT16, FLOAT32, HALVES, Mix, Rule
from fusednorm.comparison import ProbeCall
from fusednorm.probe import Probe


def under_autocast(
    probe: Probe, rules: dict[Mix, Rule], places: list[tuple[int, int]]
) -> dict[tuple[str, Mix], Rule]:
    """Return the rules that hold under the autocast of a device, at some ranks and their axes.

    On the CPU the norm is run. For CUDA the operators that it runs on fake tensors are compared,
    with their dtypes, so that no GPU need be there.
    """
    found = {
        ("cpu", mix): rule
        for mix, rule in rules.items()
        if all(_unchanged(probe, next(probe.circumstances(mix, *place))) for place in places)
    }
    traces: dict[Mix, Any] = {}
    for mix, rule in rules.items():
        # Autocast tells half precisions apart by whether they are its own, and both are tried.
        x = BFLOAT16 if mix[0] == FLOAT16 else mix[0]
        weight = BFLOAT16 if mix[1] == FLOAT16 else mix[1]
        single: Mix = (FLOAT32, None if weight is None else FLOAT32)
        try:
            for key in ((x, weight), single):
                if key not in traces:
                    calls = [next(probe.circumstances(key, *place)) for place in places]
                    traces[key] = [
                        [_operators(probe, "cuda", call, dtype) for call in calls]
                        for dtype in (None, *HALVES)
                    ]
        except Exception:  # of code that is not ours: nothing is known of it, nothing is served
            continue
        plain, *others = traces[x, weight]
        if all(other == plain for other in others):
            found["cuda", mix] = rule
        elif all(_computing(other) == _computing(traces[single][0]) for other in others):
            # All of it is run in float32, as torch's own norms are.
            found["cuda", mix] = rule._replace(rounded=FLOAT32, out=FLOAT32)
        elif all(_cast_back(other, x) == _computing(traces[single][0]) for other in others):
            found["cuda", mix] = rule._replace(rounded=FLOAT32, out=mix[0])
    return found


def _unchanged(probe: Probe, call: ProbeCall) -> bool:
    """Whether a forward computes the same under the CPU's autocast."""
    results: list[Any] = []
    try:
        for dtype in (None, *HALVES):
            with torch.autocast("cpu", dtype or BFLOAT16, enabled=dtype is not None):
                results.append(probe.own(call)[0])
    except Exception:  # of code that is not ours: what raises is not known to be unchanged
        return False
    plain, *others = results
    return all(y.dtype == plain.dtype and torch.equal(y, plain) for y in others)


def _operators(
    probe: Probe, device: str, call: ProbeCall, autocast: torch.dtype | None
) -> list[Any]:
    """Return what a forward runs on a device that need not be there."""
    from torch._subclasses import FakeTensorMode  # here, since its import takes a while

    with FakeTensorMode(), torch.no_grad():
        fakes: list[Any] = [
            None
            if t is None
            else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            for t in (call.x, call.weight, call.bias, call.gate)
        ]
        x, weight, bias, gate = fakes
        leaves = call._replace(x=x, weight=weight, bias=bias, gate=gate).leaves()
        stand_in = probe.stand_in(call, leaves)
        with _autocast(device, autocast), _Operators() as seen:
            probe.run(stand_in, call, leaves)
    operators: list[Any] = seen.operators
    return operators


class _Operators(TorchDispatchMode):
    """Records the operators that run, with the dtypes and the numbers that they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Autocast itself asks for the device, which computes nothing; nor does a view.
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if func.namespace != "prim" and not views:
            # It also names the dtype that a reduction has anyway.
            dtypes = [t.dtype for t in args if isinstance(t, Tensor)]
            named = {k: v for k, v in kwargs.items() if (k, [v]) != ("dtype", dtypes[:1])}
            given = tree_map_only(Tensor, lambda t: (t.dtype, t.shape, t.device), (args, named))
            self.operators.append((func, given))
        return func(*args, **kwargs)


def _computing(traces: list[list[Any]]) -> list[list[Any]]:
    """Return the operators without the casts to float32, which lose nothing."""
    return [
        [(func, given) for func, given in operators if given[1].get("dtype") != FLOAT32]
        for operators in traces
    ]


def _cast_back(traces: list[list[Any]], dtype: torch.dtype) -> list[list[Any]]:
    """Return the operators of `_computing` without a cast to a dtype at the end, if all have it."""
    computing = _computing(traces)
    if not all(ops and ops[-1][1][1].get("dtype") == dtype for ops in computing):
        return []
    return [ops[:-1] for ops in computing]


@contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Set the autocast of a device that need not be there, which `torch.autocast` refuses to."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
