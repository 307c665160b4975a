"""Packages what CMake builds; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures and builds with CMake; CMAKE_ARGS adds arguments, CXX and CUDACXX choose the compilers."""

    def build_extensions(self) -> None:
        source, build = Path(__file__).parent.resolve(), Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        # --fresh: the cache of an earlier build names tools of pip's build environment, which is gone.
        configure = [
            *("cmake", "--fresh", "-S", source, "-B", build, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)


MODULES = [
    Extension("grokcurv._cpu", sources=[]),
    Extension("grokcurv._cuda", sources=[], optional=True),  # where there is an nvcc
    Extension("grokcurv._emulator", sources=[], optional=True),  # for tests
]
setup(ext_modules=MODULES, cmdclass={"build_ext": CMakeBuild})
