"""Builds the compiled extension; all metadata is in pyproject.toml.

FUSEDNORM_BUILD says what to build: none; cpu; cuda; or auto (the default), which is cpu where torch
and a C++17 compiler are found.
"""

from __future__ import annotations

import os
import platform
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
    *("csrc/extension.cpp", "csrc/cpu_ops.cpp", "csrc/cpu/levels.cpp", "csrc/cpu/portable.cpp")
]
HEADERS = [
    *("equation.h", "arguments.h", "cpu_ops.h"),
    *("cpu/layer_norm.h", "cpu/levels.h", "cpu/kernels.h", "cpu/simd.h"),
]
# What each build of the kernels may use; the extension chooses when it is loaded.
LEVEL_FLAGS = {
    "csrc/cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
# A multiplication is fused with an addition where the source says so, and nowhere else.
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += LEVEL_FLAGS


class BuildLevels(build_ext):
    """Compiles each source with the flags of its level."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, source, ext, cc_args, extra, pp_opts):
            flags = LEVEL_FLAGS.get(Path(source).as_posix(), [])
            compile_one(obj, source, ext, cc_args, [*extra, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extension(ext)


def extension() -> Extension:
    """Return the extension for CPUs."""
    import torch

    root = Path(torch.__file__).parent
    return Extension(
        "fusednorm._C",
        SOURCES,
        depends=[f"csrc/{header}" for header in HEADERS],
        include_dirs=["csrc", str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch", "torch_cpu"],
        define_macros=[
            ("Py_LIMITED_API", "0x030a0000"),
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10
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


def choose() -> bool:
    """Return whether to build the extension, and say why."""
    choice = os.environ.get("FUSEDNORM_BUILD") or "auto"
    if choice not in CHOICES:
        sys.exit(f"FUSEDNORM_BUILD: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "cuda":
        sys.exit("FUSEDNORM_BUILD=cuda: there are no CUDA kernels yet; use cpu, none or auto")
    if choice == "none":
        print("fusednorm: no compiled extension (FUSEDNORM_BUILD=none)", file=sys.stderr)
        return False
    reason = why_not()
    if reason is not None and choice == "cpu":
        sys.exit(
            f"FUSEDNORM_BUILD=cpu: {reason}; install torch>=2.10 and a C++17 compiler and build "
            "with pip's --no-build-isolation, or set FUSEDNORM_BUILD=none"
        )
    found = reason or "torch and a C++17 compiler were found"
    chosen = "none" if reason else "cpu"
    print(f"fusednorm: building {chosen} (FUSEDNORM_BUILD={choice}): {found}", file=sys.stderr)
    return reason is None


if choose():
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildLevels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup()
