"""Builds the compiled extension; all metadata is in pyproject.toml.

FUSEDNORM_BUILD says what to build: none; cpu; cuda, which is cpu and the CUDA kernels; or auto (the
default), the most that the torch and the compilers at hand allow. TORCH_CUDA_ARCH_LIST names other
architectures, MAX_JOBS the number of compilers at a time.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

sys.path.insert(0, str(Path(__file__).parent))
import toolchain
from toolchain import Torch

JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
# A multiplication is fused with an addition where the source says so, and nowhere else.
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]
# What each build of the kernels may use; the extension chooses when it is loaded.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *(*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
# No fast math: square roots, divisions, NaN and subnormal numbers are those of torch.
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Icsrc", "-Icsrc/cuda/gpu"),
]


class NameVersion(egg_info):
    """Adds the local version, which the setup.cfg of every sdist would take away as an option."""

    local = ""

    def finalize_options(self) -> None:
        """Set the tag last."""
        self.tag_build = self.local
        super().finalize_options()


class BuildKernels(build_ext):
    """Compiles each source with the flags of its level, or with nvcc; then links them."""

    nvcc: list[str]

    def build_extension(self, ext: Extension) -> None:
        """Make the objects first, several at a time, and leave the link to setuptools."""
        with ThreadPoolExecutor(JOBS) as pool:
            jobs = [pool.submit(self.compile, source, ext) for source in ext.sources]
            ext.extra_objects = [job.result() for job in jobs]
        ext.sources = []
        self.force = True  # to link: without sources nothing looks out of date
        super().build_extension(ext)

    def compile(self, source: str, ext: Extension) -> str:
        """Return the object that a source becomes."""
        if source.endswith(".cu"):
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            options = [*NVCC_FLAGS, "--threads", str(JOBS)]
            self.spawn([*self.nvcc, *options, "-c", source, "-o", str(target)])
            return str(target)
        flags = FLAGS + LEVELS.get(Path(source).stem, [])
        where = {"output_dir": self.build_temp, "include_dirs": ext.include_dirs}
        [target] = self.compiler.compile(
            [source], macros=ext.define_macros, extra_postargs=flags, **where
        )
        return target


def extension(torch: Torch, nvcc: list[str]) -> Extension:
    """Return the extension, with the CUDA kernels where there is an nvcc."""
    # A Python for both kinds of Mac compiles each source for both, and the levels are for one.
    is_x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
    sources = [path for path in Path().glob("csrc/cpu/*.cpp") if is_x86 or path.stem not in LEVELS]
    sources += [path for path in Path().glob("csrc/*.cpp") if nvcc or path.stem != "cuda_ops"]
    sources += Path().glob("csrc/cuda/*.cu") if nvcc else []
    cuda = toolchain.cuda_libraries(nvcc[0]) if nvcc else []
    built = f"torch {torch.version} for {sysconfig.get_platform()} {' '.join(nvcc[2::2])}".strip()
    macros = [
        *(("Py_LIMITED_API", "0x030a0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")),
        ("FUSEDNORM_BUILT", f'"{built}"'),
        *([("FUSEDNORM_X86", None)] if is_x86 else []),
        *([("FUSEDNORM_CUDA", None)] if nvcc else []),
    ]
    return Extension(
        "fusednorm._C",
        sorted(path.as_posix() for path in sources),
        include_dirs=["csrc", str(torch.root / "include")],
        library_dirs=[str(torch.root / "lib"), *cuda],
        # CUDA's runtime is linked in: the same file loads where there is none.
        libraries=["torch", "torch_cpu", *(["cudart_static", "rt"] if nvcc else []), "dl"],
        define_macros=macros,
        py_limited_api=True,
        language="c++",
    )


if __name__ == "__main__":
    if "egg_info" in sys.argv:  # an isolated build asks what it has to install first
        setup(setup_requires=toolchain.requirements())
    elif "sdist" in sys.argv:  # the same sources whatever is at hand, and without a local version
        setup()
    elif chosen := toolchain.choose():
        _, BuildKernels.nvcc = chosen
        NameVersion.local = toolchain.local_version(*chosen)
        setup(
            ext_modules=[extension(*chosen)],
            cmdclass={"build_ext": BuildKernels, "egg_info": NameVersion},
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )
    else:
        setup()
