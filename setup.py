"""Builds the CPU kernels; everything else about the package is in pyproject.toml.

They are a plain library, loaded by ctypes: an extension module only to setuptools, which finds the compiler and puts the
result in its place. Where it cannot be compiled the package is installed without it.
"""

import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

HERE = Path("compressor/runtime/kernels/cpu")
FLAGS = ["-O3", "-g0", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-unknown-pragmas"]


class BuildKernels(build_ext):
    """Uses OpenMP where the compiler has it; without, the kernels run on one thread."""

    def build_extension(self, ext: Extension) -> None:
        if self._has_openmp():
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        super().build_extension(ext)

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as place:
            source = Path(place, "probe.c")
            source.write_text("#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n")
            try:
                objects = self.compiler.compile([str(source)], place, extra_postargs=["-fopenmp"])
                self.compiler.link_shared_object(objects, str(Path(place, "probe.so")), extra_postargs=["-fopenmp"])
            except (CompileError, LinkError):
                return False
        return True


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "compressor.runtime.kernels.cpu._kernels",
            sorted(map(str, HERE.glob("*.c"))),
            depends=sorted(map(str, HERE.glob("*.h"))),
            extra_compile_args=FLAGS,
            optional=True,
        )
    ],
)
