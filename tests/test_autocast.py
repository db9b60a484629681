"""Under autocast a norm has the dtypes that nn.LayerNorm has there, without a cast of x."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, Case, Result, assert_accurate, make_case, run
from spies import Launch
from torch import Tensor, nn

import fusednorm
from fusednorm import backends, functional, layer_norm

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Dispatch keys of the devices that torch has an autocast for, by device type.
AUTOCAST_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "xpu": "AutocastXPU",
    "mps": "AutocastMPS",
    "maia": "AutocastMAIA",
    "mtia": "AutocastMTIA",
    "ipu": "AutocastIPU",
    "hpu": "AutocastHPU",
    "xla": "AutocastXLA",
}


@pytest.fixture
def autocast(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An autocast that runs layer norm in float32: CUDA's, elsewhere the CPU in its place."""
    monkeypatch.setattr(
        functional, "AUTOCAST_FLOAT32", functional.AUTOCAST_FLOAT32 | {kernels.type}
    )
    with torch.autocast(kernels.type, BF16):
        yield


def mixed(dtype: torch.dtype, parameters: torch.dtype, device: torch.device) -> Case:
    """Draw a case with the parameters in a dtype of their own."""
    case = make_case(3, 40, dtype, device)
    assert case.weight is not None
    assert case.bias is not None
    return Case(case.x, case.weight.to(parameters), case.bias.to(parameters), case.dy)


def dtypes(result: Result) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor of a result."""
    return {name: tensor.dtype for name, tensor in result.items()}


def test_devices_whose_autocast_runs_layer_norm_in_float32() -> None:
    """Our table says what torch's dispatcher says."""
    registered = {
        device
        for device, key in AUTOCAST_KEYS.items()
        if torch._C._dispatch_has_kernel_for_dispatch_key("aten::layer_norm", key)
    }
    assert registered == functional.AUTOCAST_FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parameters", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_as_nn_layer_norm(
    device: torch.device, backend: str, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    """Values, gradients and all dtypes are those of nn.LayerNorm, wherever it takes the mix."""
    case = mixed(dtype, parameters, device)
    with backends.use(backend), torch.autocast(device.type, BF16):
        ours = run(layer_norm, case)
        try:
            torchs = run(F.layer_norm, case)
        except RuntimeError:
            # On CPU torch refuses parameters of another dtype, but for float32 beside a half.
            assert device.type == "cpu"
            assert dtypes(ours) == {"y": dtype, "dx": dtype} | dict.fromkeys(
                ("dweight", "dbias"), parameters
            )
        else:
            assert dtypes(ours) == dtypes(torchs)
            assert_accurate(lambda: mixed(dtype, parameters, device), draws=4)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_from_half_precision(
    launches: list[Launch], autocast: None, kernels: torch.device, dtype: torch.dtype
) -> None:
    """The result is float32's from x as it is, and each gradient has the dtype of its tensor."""

    def float32(x: Tensor, *rest: object) -> Tensor:
        with torch.autocast(kernels.type, enabled=False):
            return F.layer_norm(x.float(), *rest)

    def draw() -> Case:
        case = mixed(dtype, F32, kernels)
        case.dy = torch.randn_like(case.dy, dtype=F32)
        return case

    assert dtypes(run(layer_norm, draw())) == {"y": F32, "dx": dtype, "dweight": F32, "dbias": F32}
    assert {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"} <= {
        launch.kernel for launch in launches
    }
    assert_accurate(draw, theirs=float32, draws=4)


def test_no_cast_of_x(launches: list[Launch], autocast: None, kernels: torch.device) -> None:
    """The kernels read x itself; no copy of it is made and none is saved."""
    x, weight, bias = (
        torch.randn(shape, dtype=BF16, device=kernels, requires_grad=True)
        for shape in ((3, 8), (8,), (8,))
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer_norm(x, 8, weight, bias)
    y.backward(torch.ones_like(y))
    forward, backward = (
        launch for launch in launches if launch.kernel != "layer_norm_bwd_finalize_kernel"
    )
    for launch, read in ((forward, "x_ptr"), (backward, "h_ptr")):
        assert launch.arguments[read].dtype == BF16
        assert launch.arguments[read].data_ptr() == x.data_ptr()
        assert launch.arguments["weight_ptr"].data_ptr() == weight.data_ptr()
    assert forward.arguments["z_ptr"].dtype == F32
    assert backward.arguments["dx_ptr"].dtype == BF16
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in (x, weight, bias)) + 2 * 3 * 4


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_wider_inputs_keep_their_dtype(
    autocast: None, kernels: torch.device, dtype: torch.dtype
) -> None:
    """Autocast never narrows: float32 and float64 come back as they are, with the same bits."""
    case = make_case(3, 8, dtype, kernels)
    ours = run(layer_norm, case)
    with torch.autocast(kernels.type, enabled=False):
        plain = run(layer_norm, case)
    assert set(dtypes(ours).values()) == {dtype}
    for name, tensor in ours.items():
        assert torch.equal(tensor, plain[name]), name


def test_disabled_region(autocast: None, kernels: torch.device) -> None:
    """A region that switches autocast off gets the dtype of x again."""
    x = torch.randn(3, 8, dtype=BF16, device=kernels)
    assert layer_norm(x, 8).dtype == F32
    with torch.autocast(kernels.type, enabled=False):
        assert layer_norm(x, 8).dtype == BF16


def test_autocast_of_another_device(autocast: None, kernels: torch.device) -> None:
    """Only the autocast of the device that x lies on counts."""
    x = torch.randn(3, 8, dtype=BF16, device=kernels)
    other = "cuda" if kernels.type == "cpu" else "cpu"
    # torch.autocast("cuda") does nothing without a GPU.
    torch.set_autocast_enabled(other, True)
    try:
        with torch.autocast(kernels.type, enabled=False):
            assert layer_norm(x, 8).dtype == BF16
    finally:
        torch.set_autocast_enabled(other, False)
    assert layer_norm(x, 8).dtype == F32


def test_model(autocast: None, kernels: torch.device) -> None:
    """In a model, matrix products run in bfloat16 around a norm that gives float32."""
    model = nn.Sequential(nn.Linear(4, 8), fusednorm.LayerNorm(8), nn.Linear(8, 2)).to(kernels)
    seen = []
    model[1].register_forward_hook(lambda module, args, y: seen.extend((args[0].dtype, y.dtype)))
    y = model(torch.randn(3, 4, device=kernels))
    y.float().square().sum().backward()
    assert seen == [BF16, F32]
    assert y.dtype == BF16
    assert {parameter.grad.dtype for parameter in model.parameters()} == {F32}
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_compiled(autocast: None, kernels: torch.device) -> None:
    """A compiled norm follows autocast, and notices when it is switched off."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *rest: layer_norm(x, *rest), fullgraph=True, backend="eager")
    case = make_case(3, 8, BF16, kernels)
    case.dy = case.dy.float()
    for enabled, dtype in ((True, F32), (False, BF16), (True, F32)):
        with torch.autocast(kernels.type, BF16, enabled=enabled):
            ours, expected = run(compiled, case), run(layer_norm, case)
        assert ours["y"].dtype == dtype
        assert dtypes(ours) == dtypes(expected)
        for name, tensor in ours.items():
            assert torch.equal(tensor, expected[name]), name
    torch._dynamo.reset()


def test_under_transforms(autocast: None, kernels: torch.device) -> None:
    """Both vmap and forward mode give the dtype that a plain call gives."""
    x, tangent = (torch.randn(2, 3, 8, dtype=BF16, device=kernels) for _ in range(2))
    assert torch.func.vmap(lambda x: layer_norm(x, 8))(x).dtype == F32
    y, dy = torch.func.jvp(lambda x: layer_norm(x, 8), (x,), (tangent,))
    assert (y.dtype, dy.dtype) == (F32, F32)
