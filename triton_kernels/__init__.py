"""Triton kernels of fusednorm and their launchers; installed as ``fusednorm.triton_kernels``."""

if __name__ == "triton_kernels":  # the repository root is on sys.path
    raise ImportError(
        "this folder is fusednorm.triton_kernels; it must not shadow the triton_kernels package "
        "of triton-lang: install fusednorm (pip install -e .) and import it from there"
    )
