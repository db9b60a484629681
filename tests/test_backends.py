"""Promise 11: no silent fallback from a request, and `auto` can be asked what it chose and why."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import BACKENDS, DEVICE, INTERPRETED, make_case, run
from spies import kernels_of_package, record_launches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import backends, functional
from fusednorm.backends import Choice
from fusednorm.spec import Operands
from fusednorm.triton_kernels import launch

REQUESTED = "requested by backends.use"
NOT_BUILT = "the compiled extension was not built (FUSEDNORM_BUILD=cpu)"
INSTALLED = backends.available()
ON_CPU = Choice("torch", "a plain layer norm of cpu tensors is one operator of torch")
ALL_ELSE_ON_CPU = Choice("cpu", "this would be several operators of torch")
CACHES = (
    *(backends._triton_missing, backends._interpreted, backends._triton_unfit),
    *(backends.extension_missing, backends.cuda_missing),
)
OF_OTHER_DEVICES = "cuda" if INTERPRETED else "cpu"
needs_extension = pytest.mark.skipif("cpu" not in INSTALLED, reason=NOT_BUILT)


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Detect anew what is installed, and forget it afterwards; the value is a monkeypatch."""
    for cached in CACHES:
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in CACHES:
        cached.cache_clear()


def _cuda_tensor() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, device="cuda:0")


def _python(code: str, **environment: str) -> list[str]:
    """Return what a fresh interpreter prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDNORM", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# What is chosen, and why


def test_auto_on_the_cpu() -> None:
    """Torch: the interpreter is for tests, and slow."""
    x = torch.empty(2, 8)
    assert backends.choose(x) == ON_CPU
    assert str(backends.choose(x)) == f"{ON_CPU.backend}: {ON_CPU.reason}"


@needs_extension
def test_auto_on_the_cpu_where_torch_takes_several_operators() -> None:
    """The compiled kernels, whoever sees the operators, but for a compiler that fuses them."""
    x, w = torch.randn(3, 8), torch.rand(8, requires_grad=True)
    assert backends.choose(x, plain=False) == ALL_ELSE_ON_CPU
    for y in (
        fusednorm.rms_norm(x, 8, w),
        fusednorm.add_layer_norm(x, x, 8, w)[0],
        fusednorm.modulated_layer_norm(x, 8, w, None),
    ):
        assert y.grad_fn.name() == "LayerNormFunctionBackward"
    with FakeTensorMode():
        assert backends.choose(torch.empty(1), plain=False).backend == "cpu"


def _without_extension(detection: pytest.MonkeyPatch) -> None:
    """Let the extension look as if it had not been built."""
    find_spec = importlib.util.find_spec
    detection.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "fusednorm._C" else find_spec(name, *args),
    )


def test_a_request_by_the_environment_for_what_was_not_built(
    detection: pytest.MonkeyPatch,
) -> None:
    """Every call says so."""
    _without_extension(detection)
    detection.setattr(backends, "_requested", "cpu")
    detection.setattr(backends, "_requested_by", "FUSEDNORM_BACKEND")
    x = torch.randn(2, 8)
    for norm in (
        lambda: fusednorm.layer_norm(x, 8),
        lambda: fusednorm.rms_norm(x, 8),
        lambda: fusednorm.add_layer_norm(x, x, 8),
    ):
        with pytest.raises(
            ValueError, match=f"FUSEDNORM_BACKEND: expected.*{re.escape(NOT_BUILT)}"
        ):
            norm()


def test_auto_on_the_cpu_without_the_extension(detection: pytest.MonkeyPatch) -> None:
    """Torch's operator runs all the same, and a request says what is missing."""
    _without_extension(detection)
    x = torch.randn(2, 8)
    assert backends.choose(x) == ON_CPU
    assert backends.choose(x, plain=False) == Choice("torch", NOT_BUILT)
    assert "cpu" not in backends.available()
    assert torch.equal(fusednorm.layer_norm(x, 8), torch.nn.functional.layer_norm(x, (8,)))
    expected = f"got 'cpu': {re.escape(NOT_BUILT)}$"
    with pytest.raises(ValueError, match=expected), backends.use("cpu"):
        pytest.fail("entered")


def test_auto_on_an_unknown_device_is_torch() -> None:
    """The kernels are for cuda; other devices keep torch's operator, and the reason says so."""
    x = torch.empty(2, 8, device="meta")
    reason = "the kernels are built for cuda devices, not meta"
    assert backends.choose(x) == Choice("torch", reason)
    assert fusednorm.layer_norm(x, 8).is_meta


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((9, 0), None, Choice("triton", "cuda tensors run in the fused kernels")),
        ((8, 0), None, Choice("triton", "cuda tensors run in the fused kernels")),
        ((7, 5), None, Choice("torch", "compute capability 7.5 is below 8.0")),
        ((7, 5), "6.4", Choice("triton", "cuda tensors run in the fused kernels")),
    ],
)
def test_auto_on_cuda(
    detection: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: Choice
) -> None:
    """The kernels run where Triton compiles for the device; AMD counts capabilities differently."""
    x = _cuda_tensor()  # before there is a device: a fake mode of torch 2.10 asks for its driver
    detection.setattr(torch.cuda, "is_available", lambda: True)
    detection.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    detection.setattr(torch.version, "hip", hip)
    detection.setattr(backends, "_driver_missing", lambda: None)
    assert backends.choose(x) == expected


def test_triton_is_available_here() -> None:
    """The preferred implementation comes first, and torch is always there."""
    assert backends.NAMES == ("triton", "cuda", "cpu", "torch")
    assert set(backends.NAMES) - set(INSTALLED) <= {"cuda", "cpu"}


def _without_triton() -> tuple[str, ...]:
    return tuple(name for name in INSTALLED if name != "triton")


def _pretend(detection: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    """Let `import triton` give `module`, or fail as if there were none."""
    if module is not None:
        module.__spec__ = importlib.util.spec_from_loader("triton", None)
    detection.setitem(sys.modules, "triton", module)  # None blocks it


def test_triton_that_is_too_old(detection: pytest.MonkeyPatch) -> None:
    """The version found and the one needed are both in the reason."""
    old = ModuleType("triton")
    old.__version__ = "3.5.1"  # type: ignore[attr-defined]
    _pretend(detection, old)
    assert backends.available() == _without_triton()
    reason = "triton 3.5.1 is older than 3.6"
    assert backends.choose(_cuda_tensor()) == Choice("torch", reason)
    with pytest.raises(ValueError, match=f"got 'triton': {reason}$"), backends.use("triton"):
        pytest.fail("entered")


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0+git1234", "3.6.0.post1"])
def test_triton_that_is_new_enough(detection: pytest.MonkeyPatch, version: str) -> None:
    """Versions are compared as numbers, not as text."""
    new = ModuleType("triton")
    new.__version__ = version  # type: ignore[attr-defined]
    _pretend(detection, new)
    assert backends.available() == INSTALLED


def test_triton_that_does_not_import(detection: pytest.MonkeyPatch) -> None:
    """A broken installation is told apart from none."""

    class _Broken:
        def find_spec(self, name: str, *_: object) -> Any:
            return importlib.util.spec_from_loader(name, self) if name == "triton" else None  # type: ignore[arg-type]

        def create_module(self, spec: object) -> None:
            raise ImportError("libtriton.so is missing")

        def exec_module(self, module: ModuleType) -> None:
            """Is never reached."""

    detection.delitem(sys.modules, "triton")
    detection.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    assert backends.available() == _without_triton()
    reason = "triton does not import: libtriton.so is missing"
    assert backends.choose(_cuda_tensor()) == Choice("torch", reason)


ALONE = """
import torch, fusednorm
from fusednorm import backends, ops
x = torch.randn(3, 8, requires_grad=True)
norm = fusednorm.LayerNorm(8)
norm(x).square().sum().backward()
assert x.grad is not None and norm.weight.grad is not None
expected = torch.nn.functional.layer_norm(x, (8,))
torch.testing.assert_close(fusednorm.layer_norm(x, 8), expected)
print(backends.available())
print(backends.choose(x))
print(backends.choose(x.to("meta")))
for name in ("triton", "cpu"):
    try:
        with backends.use(name):
            pass
    except ValueError as error:
        print(error)
"""


def test_torch_alone() -> None:
    """The package needs nothing else: it imports, computes, differentiates and explains."""
    code = "import sys\nsys.modules['triton'] = sys.modules['fusednorm._C'] = None\n" + ALONE
    triton = "triton is not installed (pip install 'fusednorm[triton]')"
    installed = "backends.use: expected an installed backend, got "
    assert _python(code) == [
        "('torch',)",
        f"torch: {ON_CPU.reason}",
        f"torch: {triton}",
        f"{installed}'triton': {triton}",
        f"{installed}'cpu': {NOT_BUILT}",
    ]


@pytest.mark.parametrize(
    ("content", "built"),
    [
        (b"\0built with torch 2.10.0 for linux-aarch64, compiler 12\0", "torch 2.10.0 for linux-a"),
        (b"not a library", "nobody knows what"),
    ],
)
def test_extension_that_does_not_load(tmp_path: Path, content: bytes, built: str) -> None:
    """The import ends with one line that says for what it was built, and what is here."""
    package = tmp_path / "fusednorm"
    shutil.copytree(Path(fusednorm.__file__).parent, package)
    for extension in package.glob("_C.*"):
        extension.unlink()
    (package / "_C.abi3.so").write_bytes(content)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path[:] = [one for one in sys.meta_path if "Editable" not in str(one)]
try:
    import fusednorm
except ImportError as error:
    print(error)
    assert "fusednorm" not in sys.modules
"""
    [line] = _python(code)
    assert line.startswith(
        f"fusednorm {fusednorm.__version__}: the compiled extension does not load: {package}"
    )
    assert f"it was built with {built}" in line
    assert line.endswith(f"this is torch {torch.__version__} for {sysconfig.get_platform()}")


# What ran


def _calls() -> dict[str, Callable[[Tensor], object]]:
    """Return a call of each function that users have, by its name."""
    return {
        "layer_norm": lambda x: fusednorm.layer_norm(x, 8),
        "rms_norm": lambda x: fusednorm.rms_norm(x, 8),
        "add_layer_norm": lambda x: fusednorm.add_layer_norm(x, x, 8),
        "add_rms_norm": lambda x: fusednorm.add_rms_norm(x, x, 8),
        "modulated_layer_norm": lambda x: fusednorm.modulated_layer_norm(x, 8, x[0], None),
    }


@needs_extension
@pytest.mark.parametrize("op", _calls())
def test_explain_says_what_ran(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each call, on the short ways and on the long one: who was called is counted."""
    counts = dict.fromkeys(("cpu", "torch"), 0)

    def count(backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            counts[backend] += 1
            return run(*arguments, **named)

        return counted

    compiled = backends.launchers("cpu")
    spied = compiled._replace(forward=count("cpu", compiled.forward))
    absent = backends._TABLE["cpu"]._replace(launchers=lambda: spied)
    monkeypatch.setitem(backends._TABLE, "cpu", absent)
    monkeypatch.setattr(torch, "layer_norm", count("torch", torch.layer_norm))
    monkeypatch.setattr(torch, "rms_norm", count("torch", torch.rms_norm))
    call = _calls()[op]
    for x in (torch.randn(2, 8), torch.randn(8, 2).T, torch.randn(2, 8, requires_grad=True)):
        for scope in (contextlib.nullcontext(), backends.use("cpu")):
            before = dict(counts)
            with scope, backends.explain() as ran:
                call(x)
            assert [one.op for one in ran] == [op]
            called = [name for name in counts if counts[name] > before[name]]
            assert called == [ran[0].backend]


def test_explain_where_somebody_looks() -> None:
    """A transform, a tracer and a mode see other things, and the answer says which."""
    x = torch.randn(2, 8)
    norm = _calls()["add_layer_norm"]
    with backends.explain() as ran:
        torch.func.vmap(lambda x: fusednorm.add_layer_norm(x, x, 8)[0])(x)
        torch.jit.trace(lambda x: fusednorm.add_layer_norm(x, x, 8)[0], x, check_trace=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            norm(x)
    reasons = [call.reason for call in ran]
    assert reasons[0] == "a transform differentiates or batches plain torch"
    assert "a tracer records torch's operators" in reasons[1:3] or NOT_BUILT in reasons[1:3]
    assert reasons[-1].startswith("as an operator: ") or reasons[-1] == NOT_BUILT


def test_explain_nests_and_ends_with_an_exception() -> None:
    """Each block has a list of its own, and none is left behind."""
    x = torch.randn(2, 8)
    with backends.explain() as outer:
        with contextlib.suppress(KeyError), backends.explain() as inner:
            fusednorm.layer_norm(x, 8)
            raise KeyError
        fusednorm.rms_norm(x, 8)
    assert [call.op for call in inner] == ["layer_norm"]
    assert [call.op for call in outer] == ["rms_norm"]
    assert backends.listener is None
    assert str(inner[0]) == f"layer_norm: torch, {ON_CPU.reason}"


# Requests


@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != OF_OTHER_DEVICES])
def test_a_request_is_in_force_inside_the_block_only(device: torch.device, backend: str) -> None:
    """Before and after, the choice is automatic."""
    x = torch.empty(2, 8, device=device)
    before = backends.choose(x)
    with backends.use(backend):
        assert backends.choose(x) == Choice(backend, REQUESTED)
    assert backends.choose(x) == before


def test_requests_nest(device: torch.device) -> None:
    """The innermost counts, and each restores what it found."""
    x = torch.empty(2, 8, device=device)
    seen = []
    with backends.use("torch"):
        with backends.use("triton"):
            with backends.use("torch"):
                seen.append(backends.choose(x).backend)
            seen.append(backends.choose(x).backend)
        seen.append(backends.choose(x).backend)
    assert seen == ["torch", "triton", "torch"]


def test_a_request_ends_with_an_exception(device: torch.device) -> None:
    """An error inside passes through and leaves no request behind."""
    x = torch.empty(2, 8, device=device)
    before = backends.choose(x)
    with (
        backends.use("torch"),
        contextlib.suppress(KeyError),
        backends.use("triton"),
    ):
        raise KeyError
    assert backends.choose(x) == before
    with pytest.raises(KeyError), backends.use("triton"):
        raise KeyError
    assert backends.choose(x) == before


def test_a_request_reaches_every_thread(device: torch.device) -> None:
    """Autograd and data loaders run in threads of their own."""
    x, seen = torch.empty(2, 8, device=device), list[Choice]()
    with backends.use("triton"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose(x)))
        thread.start()
        thread.join()
    assert seen == [Choice("triton", REQUESTED)]


def test_a_request_as_a_decorator(device: torch.device) -> None:
    """`use` decorates a function, which asks for the backend at every call."""

    @backends.use("triton")
    def chosen() -> str:
        return backends.choose(torch.empty(2, 8, device=device)).backend

    assert (chosen(), chosen()) == ("triton", "triton")


def test_a_choice_cannot_be_changed() -> None:
    """It is an answer, not a setting."""
    with pytest.raises(AttributeError):
        backends.choose(torch.empty(1)).backend = "triton"  # type: ignore[misc]


ENVIRONMENT = """
import torch, fusednorm
from fusednorm import backends, ops
x = torch.randn(2, 8)
for device in ("cpu", "meta"):
    try:
        print(backends.choose(x.to(device)))
    except ValueError as error:
        print(error)
try:
    fusednorm.layer_norm(x, 8)
    print("computed")
except ValueError as error:
    print(error)
with backends.use("torch"):
    print(backends.choose(x))
"""


def test_environment_requests_torch() -> None:
    """The variable is a request for the whole process, named in the reason."""
    assert _python(ENVIRONMENT, FUSEDNORM_BACKEND="torch") == [
        "torch: requested by FUSEDNORM_BACKEND",
        "torch: requested by FUSEDNORM_BACKEND",
        "computed",
        f"torch: {REQUESTED}",
    ]


@needs_extension
def test_environment_requests_the_cpu_kernels() -> None:
    """They serve cpu tensors, and no others."""
    unfit = "FUSEDNORM_BACKEND: expected tensors that the cpu backend can serve, got "
    assert _python(ENVIRONMENT, FUSEDNORM_BACKEND="cpu") == [
        "cpu: requested by FUSEDNORM_BACKEND",
        unfit + "meta: the kernels are built for cpu tensors, not meta",
        "computed",
        f"torch: {REQUESTED}",
    ]


def test_environment_requests_triton() -> None:
    """No fallback from it: what Triton cannot serve is an error that names the variable."""
    unfit = "FUSEDNORM_BACKEND: expected tensors that the triton backend can serve, got "
    interpreter = "cpu: cpu tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    assert _python(ENVIRONMENT, FUSEDNORM_BACKEND="triton") == [
        unfit + interpreter,
        unfit + "meta: the kernels are built for cuda devices, not meta",
        unfit + interpreter,
        f"torch: {REQUESTED}",
    ]


@pytest.mark.parametrize("value", ["", None])
def test_environment_without_a_request(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """An empty variable is none."""
    monkeypatch.setattr(backends, "_requested", None)
    if value is None:
        monkeypatch.delenv("FUSEDNORM_BACKEND", raising=False)
    else:
        monkeypatch.setenv("FUSEDNORM_BACKEND", value)
    backends._read_environment()
    assert backends.choose(torch.empty(1)) == ON_CPU


# What runs


BOTH = ["layer_norm_fwd_kernel", "layer_norm_bwd_kernel", "layer_norm_bwd_finalize_kernel"]


def test_a_request_for_triton_runs_the_kernels(
    monkeypatch: pytest.MonkeyPatch, kernels: torch.device
) -> None:
    """Forward and backward each launch theirs."""
    launches = record_launches(monkeypatch)
    run(fusednorm.layer_norm, make_case(3, 8, torch.float32, kernels))
    assert [launched.kernel for launched in launches] == BOTH


def test_a_request_for_torch_runs_no_kernel(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Neither forward nor backward."""
    launches = record_launches(monkeypatch)
    with backends.use("torch"):
        run(fusednorm.layer_norm, make_case(3, 8, torch.float32, device))
    assert launches == []


@pytest.mark.skipif(not INTERPRETED, reason="tensors of the device under test run in the kernels")
def test_auto_on_the_cpu_runs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is used on request only."""
    launches = record_launches(monkeypatch)
    run(fusednorm.layer_norm, make_case(3, 8, torch.float32, torch.device("cpu")))
    assert launches == []


def test_backward_follows_its_forward(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The request at the time of the forward decides, whichever is in force later."""
    launches = record_launches(monkeypatch)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    results = {}
    for backend in ("triton", "torch"):
        with backends.use(backend):
            results[backend] = fusednorm.layer_norm(x, 8)
    assert [launched.kernel for launched in launches] == BOTH[:1]
    dy = torch.randn_like(x)
    with backends.use("triton"):
        (expected,) = torch.autograd.grad(results["torch"], x, dy)
    assert len(launches) == 1
    with backends.use("torch"):
        (dx,) = torch.autograd.grad(results["triton"], x, dy)
    assert [launched.kernel for launched in launches[1:]] == BOTH[1:2]
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_with_a_bias(backend: str) -> None:
    """Models have it and torch's operator has not: no backend leaves the bias out."""
    x, weight, bias = torch.randn(3, 8, device=DEVICE), *torch.randn(2, 8, device=DEVICE)
    with backends.use(backend):
        y = functional.norm("rms_norm", Operands(x, None, None, weight, bias), (8,), 1e-6, rms=True)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), weight, 1e-6) + bias)


# The device


def test_guard_makes_a_foreign_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device; only a tensor of another one needs the switch."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    switched: list[torch.device] = []

    @contextlib.contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        switched.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", switch)
    for name in ("cpu", "cuda:0"):
        with launch.device_guard(torch.device(name)):
            assert switched == []
    with launch.device_guard(torch.device("cuda", 1)):
        assert switched == [torch.device("cuda", 1)]


class _Guarded:
    """Stands in for a kernel and notes whether the guard was entered when it was launched."""

    def __init__(self, kernel: Any, entered: list[torch.device], launches: list[bool]) -> None:
        self._kernel, self._entered, self._launches = kernel, entered, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._launches.append(bool(self._entered))
        return self._kernel[grid]


@pytest.mark.parametrize(("cols", "expected"), [(8, 3), (8200, 4)], ids=["resident", "split"])
def test_every_kernel_is_launched_inside_the_guard(
    monkeypatch: pytest.MonkeyPatch, kernels: torch.device, cols: int, expected: int
) -> None:
    """Forward, sums, backward and finalize, each on the device of its tensors."""
    entered: list[torch.device] = []
    launches: list[bool] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(launch, "device_guard", guard)
    for name, (module, kernel) in kernels_of_package().items():
        monkeypatch.setattr(module, name, _Guarded(kernel, entered, launches))
    x = torch.randn(2, cols, device=kernels, requires_grad=True)
    weight = torch.randn(cols, device=kernels, requires_grad=True)
    fusednorm.layer_norm(x, cols, weight).backward(torch.randn_like(x))
    assert launches == [True] * expected
    assert entered == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu() -> None:
    """Work on the second device while the first is current, forward and backward."""
    x = torch.randn(5, 100, device="cuda:1", requires_grad=True)
    weight = torch.randn(100, device="cuda:1", requires_grad=True)
    dy = torch.randn_like(x)
    ours = fusednorm.layer_norm(x, 100, weight)
    torchs = torch.nn.functional.layer_norm(x, (100,), weight)
    torch.testing.assert_close(ours, torchs)
    for our, their in zip(
        torch.autograd.grad(ours, (x, weight), dy),
        torch.autograd.grad(torchs, (x, weight), dy),
        strict=True,
    ):
        torch.testing.assert_close(our, their)
    assert torch.cuda.current_device() == 0
