"""Run every kernel once on small inputs: what compute-sanitizer watches.

compute-sanitizer python -m bench.every_kernel
"""

from __future__ import annotations

import torch

from .cases import Case, draw
from .measure import check
from .providers import Provider, find

# One N for each form of the kernels, and one that leaves no vector aligned.
COLS = (17, 256, 1025, 4096, 12288, 40000)


def main() -> None:
    """Check each norm of our provider for the device on each N.

    Raises:
        ValueError: A result is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours: list[Provider] = [p for p in find(None, device)[0] if p.name.startswith("fusednorm-")]
    generator = torch.Generator(device).manual_seed(0)
    for provider in ours:
        for norm in provider.norms:
            for cols in COLS:
                case = Case(f"{norm}/both", 37, cols, "bfloat16", "bfloat16")
                with provider.scope():
                    if problem := check(case, provider, draw(case, device, generator)):
                        raise ValueError(f"{provider.name}, {case}: {problem}")
        print(f"{provider.name}: {len(provider.norms) * len(COLS)} cases are right")


if __name__ == "__main__":
    main()
