"""Compiled parts; each is optional, and without any of them the PyTorch paths of `ctt.ops` serve.

ctt._cpu            csrc/cpu/*.cpp, C++17 with pybind11 and OpenMP where the compiler has it
ctt/libctt_cuda.so  csrc/cuda/*.cu, where nvcc is found; a C ABI with the CUDA runtime inside

Neither links torch, so one build fits every torch version. Both are built by ninja: all sources at
once, and again only what has changed (`python setup.py build_ext --inplace`, which needs the
packages setuptools, ninja and pybind11). `pip install .` compiles all of it each time, because the
headers of pybind11 lie elsewhere in each isolated build; with --no-build-isolation it does not.
Environment variables:

CTT_CPU, CTT_CUDA   0: do not build; 1: a build that cannot be done or fails ends the installation
CTT_CUDA_ARCHS      "80;90": the cards to compile for; PTX of the last one serves later cards
CTT_SANITIZE        "address,undefined": ctt._cpu with these sanitizers, for developers; see
                    tests/slow/test_sanitizers.py, which builds it and runs the tests on it
"""

import os
import runpy
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU, CUDA = "ctt._cpu", "ctt.libctt_cuda"
SETTING = {CPU: "CTT_CPU", CUDA: "CTT_CUDA"}
WITH_CHECKSUM = ("bindings", "library")  # the sources that hold the checksum of all of them
digest = runpy.run_path(str(Path("ctt", "ops", "_sources.py")))["digest"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--extended-lambda", "-Xcompiler", "-fPIC"]


def setting(name: str) -> str:
    return os.environ.get(SETTING[name], "auto")


def extension(name: str, pattern: str) -> list[Extension]:
    sources = sorted(str(path) for path in Path("csrc").glob(pattern))
    if setting(name) == "0" or not sources:
        return []
    optional = setting(name) != "1"
    return [Extension(name, sources, optional=optional, language="c++")]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home, "bin", "nvcc"))] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def gencode_flags() -> list[str]:
    archs = os.environ.get("CTT_CUDA_ARCHS", "80;90").split(";")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class Build(build_ext):
    """Two kinds of extension; one that fails is reported and left out."""

    def build_extension(self, ext: Extension) -> None:
        build = self.build_cuda if ext.name == CUDA else self.build_cpu
        try:
            build(ext)
        except Exception as error:
            # setuptools turns this class of error into a warning where the extension is optional
            advice = (
                f". The installation goes on without it; the other backends of ctt.ops serve. "
                f"{SETTING[ext.name]}=1 makes this an error."
                if ext.optional
                else f", and {SETTING[ext.name]}=1 asks for it."
            )
            raise CompileError(f"{ext.name} was not built ({error}){advice}") from error

    def get_ext_filename(self, fullname: str) -> str:
        # a library that is opened by its name and holds no Python module carries no ABI tag
        if fullname.rpartition(".")[2] == CUDA.rpartition(".")[2]:
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_cpu(self, ext: Extension) -> None:
        import pybind11

        if self.compiler.compiler_type == "msvc":
            raise NotImplementedError("it needs gcc or clang, whose vector types it uses")
        ext.include_dirs.append(pybind11.get_include())
        sanitize = os.environ.get("CTT_SANITIZE")
        openmp = ["-fopenmp"] if self.compiles("-fopenmp") else []
        checked = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
        debug = "-g" if sanitize else "-g0"  # Python's own flags ask for debug information
        # Nobody reads floating-point exceptions, for whose sake gcc leaves loops with a choice in
        # them scalar: info_nce takes a fifth less time with AVX2, and a tenth with AVX-512.
        exact = [flag for flag in ["-fno-trapping-math"] if self.compiles(flag)]
        options = ["-std=c++17", "-O3", *exact, "-fvisibility=hidden", debug, *openmp, *checked]
        # the names for C++ are as old as setuptools 72.2
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        linker = getattr(self.compiler, "linker_so_cxx", self.compiler.linker_so)
        include = [f"-I{folder}" for folder in (*ext.include_dirs, *self.compiler.include_dirs)]
        self.run_ninja(ext, [*compiler, *include, *options], [*linker, *openmp, *checked])

    def compiles(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=[flag])
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=[flag]
                )
            except Exception:
                return False
        return True

    def build_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise FileNotFoundError("no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda")
        link = [nvcc, "-shared", "-cudart", "static", *gencode_flags()]
        self.run_ninja(ext, [nvcc, *NVCC_FLAGS, *gencode_flags()], link)

    def run_ninja(self, ext: Extension, compiler: Sequence[str], linker: Sequence[str]) -> None:
        """Build an extension by these commands; objects stay in build_temp for the next time."""
        import ninja
        from ninja.ninja_syntax import Writer, escape

        folder = Path(self.build_temp, ext.name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        file = folder / "build.ninja"
        with file.open("w", encoding="utf-8") as text:
            out = Writer(text)
            out.variable("builddir", str(folder))
            compiling = escape(shlex.join(compiler)) + " $flags -MD -MF $out.d -c $in -o $out"
            out.rule("compile", compiling, depfile="$out.d", deps="gcc")
            out.rule("link", escape(shlex.join(linker)) + " $in -o $out")
            objects = [str(folder / f"{Path(source).stem}.o") for source in ext.sources]
            checksum = {"flags": f"-DCTT_SOURCES='\"{digest(Path(ext.sources[0]).parent.name)}\"'"}
            for source, item in zip(ext.sources, objects, strict=True):
                own = checksum if Path(source).stem in WITH_CHECKSUM else None
                out.build(item, "compile", str(Path(source).absolute()), variables=own)
            out.build(str(target), "link", objects)
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(file), "-v"]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
        if done.returncode:
            raise RuntimeError(f"ninja ended with {done.returncode}: {done.stdout.strip()[-2000:]}")


setup(
    packages=[*find_packages(include=["ctt", "ctt.*"]), "ctt_kernels"],
    ext_modules=extension(CPU, "cpu/*.cpp") + extension(CUDA, "cuda/*.cu"),
    cmdclass={"build_ext": Build},
)
