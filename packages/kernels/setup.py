"""The wheel's build compiles the C++ kernels into the package; without a compiler there are none in it."""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

kernels = runpy.run_path(str(Path(__file__).parent / "src/cdm_kernels/build.py"))


class BuildKernels(build_ext):
    """One shared object beside the modules, made by `cdm_kernels.build`; it is no Python extension."""

    def get_ext_filename(self, fullname: str) -> str:
        """Under the same name for every Python."""
        return os.path.join(*fullname.split(".")[:-1], "libcdm_kernels.so")

    def build_extension(self, ext: Extension) -> None:
        """Compile; a machine that cannot says so and goes on."""
        try:
            kernels["build"](Path(self.get_ext_fullpath(ext.name)))
        except (kernels["BuildError"], OSError) as error:
            print(f"cdm-kernels: no C++ kernels in this wheel: {error}", file=sys.stderr)


class AnyPython(bdist_wheel):
    """Tagged for one platform, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        return ("py3", "none", super().get_tag()[2])


class WithBinary(Distribution):
    """A distribution that is not pure Python."""

    def has_ext_modules(self) -> bool:
        """Always."""
        return True


setup(
    distclass=WithBinary,
    ext_modules=[Extension("cdm_kernels.libcdm_kernels", [], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
