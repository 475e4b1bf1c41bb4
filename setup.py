"""Builds e2cm_ext._native by driving csrc/CMakeLists.txt; everything else is said in pyproject.toml.

E2CM_CUDA        1: build the CUDA part, 0: leave it out, unset: build it if there is an nvcc that works
E2CM_CUDA_ARCHS  compute capabilities to build it for, such as "80;90" or "80-real,90-virtual"

nvcc is the one that CUDACXX names, else the one in CUDA_HOME, else the one on the PATH.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\nerror: e2cm_ext: {message}")


def tool(name: str, folder: str) -> str:
    """The program that the build requirement of this name brings along, else the one on the PATH."""
    try:
        path = getattr(importlib.import_module(name), folder)
    except (ImportError, AttributeError):
        path = None
    found = shutil.which(name, path=path) or shutil.which(name)
    return found or fail(f"{name} is missing; `pip install {name}`, or build without --no-build-isolation")


def find_nvcc() -> str | None:
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))


def no_nvcc() -> str:
    if named := os.environ.get("CUDACXX"):
        return f"E2CM_CUDA=1, but there is no nvcc at CUDACXX={named}; correct or unset CUDACXX"
    advice = "install the CUDA toolkit, put nvcc on the PATH or set CUDA_HOME"
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        advice = "set CUDA_HOME=/usr/local/cuda"
    return f"E2CM_CUDA=1, but there is no nvcc on the PATH; {advice}, or set E2CM_CUDA=0 for a CPU build"


def cuda_options() -> list[str]:
    wish = os.environ.get("E2CM_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"E2CM_CUDA={wish!r}; it can be 0 (without CUDA), 1 (with CUDA) or unset (with CUDA if nvcc is found)")
    archs = [arch.strip() for arch in re.split("[;,]", os.environ.get("E2CM_CUDA_ARCHS", "")) if arch.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", arch):
            fail(f"E2CM_CUDA_ARCHS holds {arch!r}; wanted: compute capabilities, as in '80;90' or '80-real,90-virtual'")
    nvcc = None if wish == "0" else find_nvcc()
    if nvcc is None:
        if wish == "1":
            fail(no_nvcc())
        return ["-DE2CM_CUDA=OFF"]
    os.environ["CUDACXX"] = nvcc
    return [f"-DE2CM_CUDA={'ON' if wish else 'AUTO'}", f"-DE2CM_CUDA_ARCHS={';'.join(archs)}"]


def generator() -> list[str]:
    # Outside a developer prompt Windows has no compiler on the PATH, but CMake's own choice, Visual Studio, finds it.
    if os.name == "nt" and not os.environ.get("CXX") and not shutil.which("cl"):
        return []
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            fail("pybind11 is missing; `pip install pybind11`, or build without --no-build-isolation")
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        build = Path(self.build_temp).resolve() / "native"
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DE2CM_VERSION={self.distribution.get_version()}",
            *cuda_options(),
            *generator(),
        ]
        # How pip and cibuildwheel ask for another architecture on macOS.
        if archs := re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", "")):
            options.append(f"-DCMAKE_OSX_ARCHITECTURES={';'.join(archs)}")
        self.mkpath(str(build))
        # --fresh: an isolated build finds its tools in another place each time.
        run("configure", [cmake, "--fresh", "-S", str(ROOT / "csrc"), "-B", str(build), *options])
        run("compile", [cmake, "--build", str(build), "--config", "Release", "--target", "_native"])
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        run("install", [cmake, "--install", str(build), "--config", "Release", "--strip", "--prefix", str(target)])


def run(step: str, command: list[str]) -> None:
    sys.stdout.flush()
    if subprocess.run(command).returncode:
        fail(f"could not {step} the C++ part; the messages above say why")


setup(ext_modules=[Extension("e2cm_ext._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
