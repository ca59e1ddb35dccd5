"""Building and finding the C++ kernels, in copies of the package and in processes of their own."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cdm_kernels import build, cpp

NAME = "libcdm_kernels.so"
NO_COMPILER = "no C++ compiler (looked for $CXX, c++, g++, clang++)"
SCRIPT = """
import torch
from cdm_kernels import cpp, ddpm_embedding, group_norm_silu
values = {}
print(cpp.library() and cpp.library().path, cpp.problem(), values.flatten().tolist(), sep="|")
"""
EMBEDDING = "ddpm_embedding(torch.tensor([2.0]), 4, 1.0)", [math.sin(2)] * 2 + [math.cos(2)] * 2
NORM = (
    "group_norm_silu(torch.tensor([[[1.0, 3.0]]]), 1, *torch.ones(2, 1), 0.0)",
    [0.0, 2 / (1 + math.exp(-2))],
)
COPY = shutil.which("cp")


class Package:
    """A copy of the package with one small kernel's source and no binary; a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.path, self.cache = folder / "cdm_kernels", folder / "cache"
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(Path(build.__file__).parent, self.path, ignore=ignored)
        self.environment = {"CDM_KERNELS_CACHE": str(self.cache), "PATH": "", "CXX": ""}
        for source in self.path.glob("cpp/*.cpp"):
            if source.stem not in ("info", "timestep_embedding"):
                source.unlink()

    def run(self, *arguments, **environment):
        """Python with `arguments`, no compiler to be found: exit code, output, lines on the error stream."""
        merged = os.environ | {"PYTHONPATH": str(self.path.parent)} | self.environment | environment
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=merged)
        return done.returncode, done.stdout.strip(), done.stderr.splitlines()

    def serve(self, operator, **environment):
        """The operator's values are right: path of the library, problem, lines on the error stream."""
        expression, expected = operator
        code, output, errors = self.run("-c", SCRIPT.format(expression), **environment)
        assert code == 0, errors
        path, problem, values = output.split("|")
        assert json.loads(values) == pytest.approx(expected, abs=1e-6)
        return path, problem, errors


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A package whose cache `python -m cdm_kernels.build` filled, and what that said."""
    try:
        build.compiler(), build.ninja()
    except build.BuildError as error:
        pytest.skip(str(error))
    package = Package(tmp_path_factory.mktemp("built"))
    compiler = {name: os.environ.get(name, "") for name in ("PATH", "CXX")}
    return package, *package.run("-m", "cdm_kernels.build", **compiler)


@pytest.fixture
def binary(built):
    return next(built[0].cache.glob(f"*/{NAME}"))


def script(path, text):
    """A program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_command_builds_into_the_cache(built):
    package, code, output, errors = built
    assert (code, errors) == (0, [])
    (library,) = (path for path in package.cache.rglob("*") if path.is_file())  # and nothing else stays
    assert output == f"wrote {library}"
    assert package.serve(EMBEDDING) == (str(library), "", [])


def test_packaged_library_serves_until_a_source_changes(package, binary):
    shutil.copy(binary, package.path)
    assert package.serve(EMBEDDING) == (str(package.path / NAME), "", [])
    with open(package.path / "cpp" / "common.h", "a") as header:
        header.write("// other\n")
    assert package.serve(EMBEDDING)[0] == "None"


def test_without_a_compiler_the_reference_serves_and_one_line_says_so(package):
    path, problem, errors = package.serve(NORM)
    assert (path, problem) == ("None", NO_COMPILER)
    assert errors == [f"cdm-kernels: without C++ kernels, slower: {NO_COMPILER}"]


def test_kernels_can_be_switched_off(package, binary):
    shutil.copy(binary, package.path)
    assert package.serve(NORM, CDM_KERNELS_CPP="0") == ("None", "switched off by CDM_KERNELS_CPP=0", [])


def test_command_without_a_compiler(package):
    assert package.run(package.path / "build.py") == (2, "", [f"cdm-kernels: {NO_COMPILER}"])


def test_command_with_a_compiler_that_fails(package, tmp_path):
    broken = script(tmp_path / "compiler", "echo a.cpp:1: error: no such thing >&2; exit 1")
    expected = "cdm-kernels: the C++ compiler failed: a.cpp:1: error: no such thing"
    assert package.run(package.path / "build.py", CXX=broken) == (2, "", [expected])
    assert not [path for path in package.cache.rglob("*") if path.is_file()]


def test_command_into_a_cache_that_cannot_be_written(package, tmp_path):
    package.cache.write_text("a file")
    code, output, errors = package.run(package.path / "build.py", CXX=script(tmp_path / "compiler", "exit 1"))
    assert (code, output, len(errors)) == (2, "", 1)
    assert errors[0].startswith("cdm-kernels: ")


@pytest.fixture
def find(package, monkeypatch):
    """`cpp.library` of the copy, in this process and not remembered: the path that it finds, the problem."""
    for name, value in package.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "SOURCES", package.path / "cpp")
    monkeypatch.setattr(build, "PACKAGED", package.path / NAME)

    def look():
        monkeypatch.setattr(cpp, "_problem", "")
        found = cpp.library.__wrapped__()
        return found and found.path, cpp.problem()

    return look


def test_first_use_builds_once(package, binary, find, tmp_path, monkeypatch, capfd):
    copy = f'while [ "$1" != -o ]; do shift; done; {COPY} {binary} "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", copy))
    assert find() == (package.cache / binary.parent.name / NAME, "")
    assert capfd.readouterr().err == "cdm-kernels: building the C++ kernels, once (half a minute)\n"
    monkeypatch.setenv("CXX", "")
    assert find() == (package.cache / binary.parent.name / NAME, "")
    assert capfd.readouterr() == ("", "")


def test_two_processes_build_once(binary, tmp_path, monkeypatch):
    """Started together, the second waits and finds it built; by itself it builds again."""
    count = f'echo >> {tmp_path / "calls"}; while [ "$1" != -o ]; do shift; done; {COPY} {binary} "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", count))
    target, both, alone = tmp_path / "cache" / NAME, threading.Barrier(2), build._alone

    def together(folder):
        both.wait()
        return alone(folder)

    monkeypatch.setattr(build, "_alone", together)
    threads = [threading.Thread(target=build.build, args=(target,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = len((tmp_path / "calls").read_text())
    monkeypatch.setattr(build, "_alone", alone)
    build.build(target)
    assert len((tmp_path / "calls").read_text()) == 2 * once
    assert [path.name for path in target.parent.iterdir()] == [NAME]


def test_first_use_with_a_compiler_that_fails(find, tmp_path, monkeypatch, capfd):
    broken = script(tmp_path / "compiler", "echo a.cpp:1: error: no such thing >&2; exit 1")
    monkeypatch.setenv("CXX", broken)
    problem = "the C++ compiler failed: a.cpp:1: error: no such thing"
    assert find() == (None, problem)
    assert capfd.readouterr().err.splitlines()[1:] == [f"cdm-kernels: without C++ kernels, slower: {problem}"]


def test_library_that_does_not_load_is_passed_over(package, binary, find):
    (package.path / NAME).write_bytes(b"no library")
    shutil.copytree(binary.parents[1], package.cache)
    assert find() == (package.cache / binary.parent.name / NAME, "")


@pytest.mark.parametrize("change", ["header", "source", "name", "flag", "level"])
def test_hash_changes_with_whatever_makes_the_binary(change, tmp_path, monkeypatch):
    sources = shutil.copytree(build.SOURCES, tmp_path / "cpp")
    monkeypatch.setattr(build, "SOURCES", sources)
    before = build.source_hash()
    assert build.source_hash() == before
    if change == "header":
        sources.joinpath("common.h").write_text(sources.joinpath("common.h").read_text() + "\n")
    elif change == "source":
        sources.joinpath("info.cpp").write_text(sources.joinpath("info.cpp").read_text() + "\n")
    elif change == "name":
        sources.joinpath("info.cpp").rename(sources / "information.cpp")
    elif change == "flag":
        monkeypatch.setattr(build, "FLAGS", build.FLAGS + " -g")
    else:
        monkeypatch.setattr(build, "LEVELS", {})
        monkeypatch.setattr(build.platform, "machine", lambda: "other")
    assert build.source_hash() != before


def test_notes_beside_the_sources_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "cpp"))
    before = build.source_hash()
    build.SOURCES.joinpath("notes.txt").write_text("not compiled")
    assert build.source_hash() == before
