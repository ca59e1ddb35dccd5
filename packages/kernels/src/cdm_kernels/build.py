"""Builds the C++ kernels: one shared object with a plain C interface, no header of torch or Python.

    python -m cdm_kernels.build

Run by the wheel's build, by hand, or on first use where no binary fits. Every source is compiled once for
each architecture level (`LEVELS`) under its own function names, and the processor picks at run time: a binary
built anywhere runs everywhere at full speed. Standard library alone: the wheel's build imports this file
without torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SOURCES = Path(__file__).parent / "cpp"
PACKAGED = Path(__file__).parent / "libcdm_kernels.so"
# No -ffast-math: it sets the whole process to flush denormals, and exp must keep its order of operations.
FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wno-psabi"
LEVELS = {
    "x86_64": {
        "v4bf16": "-march=x86-64-v4 -mavx512bf16",
        "v4": "-march=x86-64-v4",
        "v3": "-march=x86-64-v3",
        "base": "",
    }
}


class BuildError(RuntimeError):
    """There is no compiler, or it failed; one line says which."""


def levels() -> dict[str, str]:
    """Architecture levels of this machine's kind and their compiler flags, highest first."""
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return LEVELS.get(machine, {"base": ""})


def source_hash() -> str:
    """16 hex digits that change with any source, flag or kind of machine."""
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    text = b"".join(file.name.encode() + file.read_bytes() for file in files)
    return hashlib.sha256(text + f"{FLAGS}{levels()}{platform.system()}".encode()).hexdigest()[:16]


def cached() -> Path:
    """Where a library built on this machine is kept: a folder named by `source_hash`."""
    base = os.environ.get("CDM_KERNELS_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cdm_kernels"
    )
    return Path(base) / source_hash() / "libcdm_kernels.so"


def compiler() -> str:
    """The C++ compiler: $CXX, c++, g++ or clang++; BuildError when there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):  # CXX may be "ccache g++"
            return name
    raise BuildError("no C++ compiler (looked for $CXX, c++, g++, clang++)")


def ninja() -> str:
    """The ninja program, of the package or on the path; BuildError when there is none."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise BuildError("no ninja (pip install ninja)")
    return found


def ninja_file(target: str) -> str:
    """build.ninja for every source at every level."""
    rules = [
        f"cxx = {compiler()}",
        f"flags = {FLAGS}",
        "rule compile\n  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        "rule link\n  command = $cxx -shared -fopenmp $in -o $out",
    ]
    objects = ["info.o"]
    rules.append(
        f"build info.o: compile {_escaped(SOURCES / 'info.cpp')}\n  extra = -DCDM_SOURCE_HASH={source_hash()}"
    )
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name == "info.cpp":
            continue
        for level, march in levels().items():
            objects.append(f"{source.stem}_{level}.o")
            rules.append(
                f"build {objects[-1]}: compile {_escaped(source)}\n  extra = {march} -DCDM_ARCH={level}"
            )
    return "\n".join([*rules, f"build {target}: link {' '.join(objects)}", ""])


def _escaped(path: Path) -> str:
    """As ninja reads a path."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def build(target: Path) -> None:
    """Compile into `target`, written aside and renamed; BuildError with the compiler's first complaint.

    One process at a time: who had to wait for another to build it finds it built.
    """
    program, text, before = ninja(), ninja_file("library.so"), _made(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if _made(target) not in (None, before):
            return
        Path(folder, "build.ninja").write_text(text)
        done = subprocess.run([program, "-C", folder], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            complaint = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
            raise BuildError(f"the C++ compiler failed: {complaint.strip()}")
        os.replace(Path(folder, "library.so"), target)


def _made(path: Path) -> int | None:
    """When a file was made; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where the system has such locks; they end with their process."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def main() -> int:
    """Build into the cache; 2 and one line where that cannot be done."""
    try:
        build(cached())
    except (BuildError, OSError) as error:
        print(f"cdm-kernels: {error}", file=sys.stderr)
        return 2
    print(f"wrote {cached()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
