"""Build sae_fast._C by calling CMake; CMakeLists.txt describes that build.

With SAE_FAST_NATIVE=0 nothing is compiled, and a marker module records this choice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "sae_fast"
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import NO_TORCH, native_wanted, torch_root  # noqa: E402
from toolchain import NO_COMPILER, find_compiler, find_nvcc, why_no_cuda  # noqa: E402

MARKER = "_reference_install.py"
MARKER_TEXT = '"""Left by `SAE_FAST_NATIVE=0 pip install .`: no compiled module, by choice."""\n'


def replace_file(source: Path, target: Path) -> None:
    """Replace a file by renaming a copy, because a running Python may have the old file mapped."""
    aside = target.with_name(target.name + ".new")
    shutil.copy2(source, aside)
    aside.replace(target)


class BuildPython(build_py):
    """Writes or removes the marker of a reference install, in the wheel and in the checkout."""

    def run(self) -> None:
        # In a checkout, `python -m sae_fast.train` imports the checkout instead of the installed
        # copy, so the checkout gets the same choice as the installation.
        if os.access(PACKAGE, os.W_OK):
            if native_wanted():
                (PACKAGE / MARKER).unlink(missing_ok=True)
            else:
                (PACKAGE / MARKER).write_text(MARKER_TEXT)
                (PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        # Files of an earlier build, for example renamed ones, would be packed into the wheel.
        shutil.rmtree(Path(self.build_lib) / "sae_fast", ignore_errors=True)
        super().run()
        if not native_wanted() and not self.editable_mode:
            (Path(self.build_lib) / "sae_fast" / MARKER).write_text(MARKER_TEXT)


class CMakeBuild(build_ext):
    """Builds the module with CMake and copies it to the build folder and the checkout."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_root()
        if torch is None:
            sys.exit(NO_TORCH)
        if find_compiler() is None:
            sys.exit(NO_COMPILER)
        nvcc, choice = find_nvcc(), os.environ.get("SAE_FAST_CUDA", "auto")
        if choice not in ("0", "1", "auto"):
            sys.exit(f"sae_fast: SAE_FAST_CUDA must be 0, 1 or auto, got {choice!r}")
        refusal = "SAE_FAST_CUDA=0" if choice == "0" else why_no_cuda(torch, nvcc)
        if choice == "1" and refusal:
            sys.exit(f"sae_fast: SAE_FAST_CUDA=1, but {refusal}")
        backends = f"CPU only: {refusal}" if refusal else f"CPU and CUDA with {nvcc}"
        print(f"sae_fast: building for {backends}", flush=True)

        options = [
            f"-DTORCH_ROOT={torch}",
            f"-DSAE_FAST_CUDA={'OFF' if refusal else 'ON'}",
            f"-DSAE_FAST_WHY_NO_CUDA={refusal or ''}",
            *([] if refusal else [f"-DCMAKE_CUDA_COMPILER={nvcc}"]),
        ]
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        built = self.run_cmake(options) / module.name
        module.parent.mkdir(parents=True, exist_ok=True)
        replace_file(built, module)
        if os.access(PACKAGE, os.W_OK):  # for Python started in the checkout
            replace_file(built, PACKAGE / module.name)

    def run_cmake(self, options: list[str]) -> Path:
        """Configure and build; return the build folder, which contains the module."""
        import pybind11  # a requirement of compiled builds only

        build = Path(os.environ.get("SAE_FAST_BUILD_DIR", f"{self.build_temp}/cmake")).resolve()
        configure = [
            *["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"],
            # Given at every build, because an isolated build's ninja is removed after it.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DSAE_FAST_IN_TREE={'ON' if os.access(PACKAGE, os.W_OK) else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build, *jobs], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"sae_fast: the compiled build failed, as CMake says above ({error})")
        return build


setup(
    ext_modules=[Extension("sae_fast._C", sources=[])] if native_wanted() else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
