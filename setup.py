"""Builds the compiled extension; all metadata is in pyproject.toml.

FUSEDNORM_BUILD says what to build: none; cpu; cuda, which is cpu and the CUDA kernels; or auto (the
default), which is cuda where torch has CUDA and an nvcc of its major version is found, and cpu
where torch and a C++17 compiler are. TORCH_CUDA_ARCH_LIST names other architectures.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("none", "cpu", "cuda", "auto")
SOURCES = [
    *("csrc/extension.cpp", "csrc/eager.cpp", "csrc/cpu_ops.cpp", "csrc/cpu_launch.cpp"),
    *("csrc/operators.cpp", "csrc/cpu/levels.cpp", "csrc/cpu/portable.cpp"),
]
HEADERS = [
    *("equation.h", "tensors.h", "eager.h", "cpu_ops.h", "cpu_launch.h"),
    *("operators.h", "boxed.h"),
    *("cpu/layer_norm.h", "cpu/levels.h", "cpu/kernels.h", "cpu/simd.h"),
]
CUDA_SOURCES = ["csrc/cuda_ops.cpp", "csrc/cuda/forward.cu", "csrc/cuda/backward.cu"]
CUDA_HEADERS = [
    *("cuda_ops.h", "cuda/layer_norm.h", "cuda/policy.h", "cuda/rows.h", "cuda/gpu/device.h")
]
# Machine code for these runs on all later ones of the same major version; the last one's PTX is
# compiled by the driver for what comes after.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
# No fast math: square roots, divisions, NaN and subnormal numbers are those of torch.
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Icsrc", "-Icsrc/cuda/gpu"),
]
# What each build of the kernels may use; the extension chooses when it is loaded.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *(*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
LEVEL_FLAGS = {
    "csrc/cpu/avx2.cpp": AVX2,
    "csrc/cpu/avx512.cpp": AVX512,
    "csrc/cpu/avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
# A multiplication is fused with an addition where the source says so, and nowhere else.
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += LEVEL_FLAGS


class BuildKernels(build_ext):
    """Compiles each source with the flags of its level, or with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile
        self.compiler.src_extensions.append(".cu")

        def compile_with_flags(obj, source, ext, cc_args, extra, pp_opts):
            if ext == ".cu":
                self.spawn(nvcc_command(source, obj))
                return
            flags = LEVEL_FLAGS.get(Path(source).as_posix(), [])
            compile_one(obj, source, ext, cc_args, [*extra, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extension(ext)


def nvcc() -> str | None:
    """Return the CUDA compiler: that of CUDA_HOME, or the one on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def nvcc_command(source: str, obj: str) -> list[str]:
    """Return the command that compiles one source for every architecture."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    codes = []
    for name in architectures.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        codes += ["-gencode", f"arch=compute_{number},code={code}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    return [nvcc() or "nvcc", *NVCC_FLAGS, *codes, "--threads", jobs, "-c", source, "-o", obj]


def cuda_libraries() -> list[str]:
    """Return the folders in which nvcc looks for CUDA's libraries."""
    done = subprocess.run(
        [nvcc() or "nvcc", "--dryrun", "any.cu"], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("#$ LIBRARIES=")]
    return [folder.removeprefix("-L") for line in lines for folder in shlex.split(line[13:])]


def extension(with_cuda: bool) -> Extension:
    """Return the extension, with the CUDA kernels or without."""
    import torch

    root = Path(torch.__file__).parent
    return Extension(
        "fusednorm._C",
        SOURCES + (CUDA_SOURCES if with_cuda else []),
        depends=[f"csrc/{header}" for header in HEADERS + (CUDA_HEADERS if with_cuda else [])],
        include_dirs=["csrc", str(root / "include")],
        library_dirs=[str(root / "lib"), *(cuda_libraries() if with_cuda else [])],
        # CUDA's runtime is linked in: the same file loads where there is none.
        libraries=["torch", "torch_cpu"] + (["cudart_static", "rt", "dl"] if with_cuda else []),
        define_macros=[
            ("Py_LIMITED_API", "0x030a0000"),
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10
            *([("FUSEDNORM_CUDA", None)] if with_cuda else []),
        ],
        extra_compile_args=FLAGS,
        py_limited_api=True,
        language="c++",
    )


def why_not() -> str | None:
    """Return why the extension cannot be built here, or None where it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed in the environment of the build"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    if sys.platform == "win32":
        return "the kernels are written for GCC and Clang"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler ({compiler[0]})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <optional>\nint main() { return std::optional<int>(0).value(); }"
        )
        command = [*compiler, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return f"{compiler[0]} does not compile C++17"
    return None


def why_not_cuda() -> str | None:
    """Return why the CUDA kernels cannot be built here, or None where they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    compiler = nvcc()
    if compiler is None:
        return "there is no nvcc (CUDA_HOME)"
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    version = ".".join(found.groups()) if found else "of an unknown version"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version} and torch has CUDA {torch.version.cuda}"
    return None


def choose() -> str:
    """Return what to build, none, cpu or cuda, and say why."""
    choice = os.environ.get("FUSEDNORM_BUILD") or "auto"
    if choice not in CHOICES:
        sys.exit(f"FUSEDNORM_BUILD: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        print("fusednorm: no compiled extension (FUSEDNORM_BUILD=none)", file=sys.stderr)
        return "none"
    reason = why_not()
    if reason is not None and choice != "auto":
        sys.exit(
            f"FUSEDNORM_BUILD={choice}: {reason}; install torch>=2.10 and a C++17 compiler and "
            "build with pip's --no-build-isolation, or set FUSEDNORM_BUILD=none"
        )
    cuda_reason = None if reason or choice == "cpu" else why_not_cuda()
    if cuda_reason is not None and choice == "cuda":
        sys.exit(
            f"FUSEDNORM_BUILD=cuda: {cuda_reason}; install a CUDA build of torch and the CUDA "
            "toolkit of the same major version, or set FUSEDNORM_BUILD=cpu"
        )
    chosen = "none" if reason else "cpu" if choice == "cpu" or cuda_reason else "cuda"
    found = reason or "torch and a C++17 compiler were found"
    if cuda_reason:
        found += f"; no CUDA kernels: {cuda_reason}"
    elif chosen == "cuda":
        found += ", and CUDA in both torch and nvcc"
    print(f"fusednorm: building {chosen} (FUSEDNORM_BUILD={choice}): {found}", file=sys.stderr)
    return chosen


if __name__ == "__main__":
    chosen = choose()
    if chosen == "none":
        setup()
    else:
        setup(
            ext_modules=[extension(with_cuda=chosen == "cuda")],
            cmdclass={"build_ext": BuildKernels},
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )
