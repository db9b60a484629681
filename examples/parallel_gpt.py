"""How train_gpt.py shares its model between processes: data, parameters, or each layer.

python examples/train_gpt.py --processes 2 --parallel fsdp
python examples/train_gpt.py --processes 2 --parallel tp --fused
python examples/train_gpt.py --processes 2 --parallel ddp
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[Callable[..., Tensor], Any, Any], Tensor]


def launch(script: str, arguments: Sequence[str], processes: int) -> int:
    """Run a script in several processes of this machine; return torchrun's exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={processes}", script, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if sys.platform == "linux":  # whatever this machine calls itself
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return subprocess.run(command, env=environment, check=False).returncode


def work_joined(processes: int, work: Callable[[DeviceMesh], int]) -> NoReturn:
    """Let the processes that torchrun started work, and end; the first one alone prints.

    A process ends with its connections and threads as they are, by no step that could wait for
    another: taking them down is where one of some fifty runs stayed.
    """
    try:
        dist.init_process_group("gloo")
        with open(os.devnull, "w") as nothing:
            quiet = contextlib.redirect_stdout(nothing if dist.get_rank() else sys.stdout)
            with quiet:
                code = work(init_device_mesh("cpu", (processes,)))
                dist.barrier()
    except Exception:  # whatever it is: nobody above would print it before the process ends
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parallelize(model: Any, way: str, mesh: DeviceMesh) -> nn.Module:
    """Return a GPT of train_gpt.py whose work the processes of a mesh share."""
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp":
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        return model  # type: ignore[no-any-return]
    return _tensor_parallel(model, mesh)


def _tensor_parallel(model: Any, mesh: DeviceMesh) -> nn.Module:
    """Split matrices by their features, and the residual stream, norms included, by time.

    The stream is a DTensor from the embedding to the head: a norm sees its own part of the time
    steps, with the addition before it, and communicates nothing.
    """
    stream: Any = {"output_layouts": Shard(1), "use_local_output": False}
    plan: Any = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), **stream),
        "positions": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False
        ),
        "norm": SequenceParallel(),
    }
    for i, block in enumerate(model.blocks):
        _sort_heads(block.attention, mesh.size())
        plan |= {
            f"blocks.{i}.attention_norm": SequenceParallel(),
            f"blocks.{i}.attention.qkv": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{i}.attention.out": RowwiseParallel(**stream),
            f"blocks.{i}.mlp_norm": SequenceParallel(),
            f"blocks.{i}.mlp.0": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{i}.mlp.2": RowwiseParallel(**stream),
        }
    return parallelize_module(model, mesh, plan)


@torch.no_grad()
def _sort_heads(attention: Any, processes: int) -> None:
    """Put the rows of query, key and value that one process gets beside one another."""
    for parameter in attention.qkv.parameters():
        rows = parameter.unflatten(0, (3, processes, -1))
        parameter.copy_(rows.transpose(0, 1).flatten(0, 2))
    attention.heads //= processes


def own_part(loss: Loss, way: str) -> Loss:
    """Return a loss that takes what this process has of a batch, or all of its DTensors."""

    def of_samples(forward: Callable[..., Tensor], batch: Tensor, args: Any) -> Tensor:
        return loss(forward, batch.chunk(dist.get_world_size())[dist.get_rank()], args)

    def of_layers(forward: Callable[..., Tensor], batch: Tensor, args: Any) -> Tensor:
        def whole(tokens: Tensor) -> Tensor:
            logits: Any = forward(tokens)
            return logits.full_tensor()  # type: ignore[no-any-return]

        return loss(whole, batch, args)

    return of_layers if way == "tp" else of_samples


def averaged(losses: Sequence[float]) -> list[float]:
    """Return the losses of all samples from those that the processes had."""
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()  # type: ignore[no-any-return]
