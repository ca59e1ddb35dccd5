"""`cdm-run doctor`: is this installation fit to work, and what to do where it is not."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

import click

from cdm_core.commands.common import Session, json_option

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, how it is, and what to do if it is not well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


@click.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check Python, torch, compilers, plugins and disk; exit with 1 when something must be mended."""
    session: Session = context.obj
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _torch, _libraries, _compilers, _threads, _disk]
    findings = [finding for check in checks for finding in check()]
    findings += _ours(session)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for f in findings:
            click.echo(f"{f.status:4}  {f.name}: {f.detail}" + (f"; {f.advice}" if f.advice else ""))
    context.exit(int(any(finding.status == "fail" for finding in findings)))


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok" if good else "fail", detail, "" if good else "install Python 3.11 or later")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", "reinstall torch with pip")
        return
    yield Finding("torch", "ok", torch.__version__)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("cuda", "ok", f"{torch.version.cuda}: {', '.join(names)}")
    elif torch.version.cuda is None:
        yield Finding("cuda", "ok", "this torch is built for the CPU alone")
    else:
        detail = f"torch is built for CUDA {torch.version.cuda} and sees no device"
        yield Finding("cuda", "warn", detail, "computing on the CPU; for a GPU check `nvidia-smi`")


def _libraries() -> Iterator[Finding]:
    yield _importable("torchvision", "fail", "install a torchvision that matches torch")
    yield _importable("triton", "warn", "only the GPU kernels need it")


def _importable(name: str, otherwise: Literal["warn", "fail"], advice: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a library built for another torch raises RuntimeError or OSError
        return Finding(name, otherwise, f"cannot be imported: {' '.join(str(error).split())}", advice)
    return Finding(name, "ok", str(getattr(module, "__version__", "unknown version")))


def _compilers() -> Iterator[Finding]:
    wanted = {"c++ compiler": (os.environ.get("CXX"), "c++", "g++", "clang++"), "ninja": ("ninja",)}
    for name, programs in wanted.items():
        path = next((found for program in programs if program and (found := shutil.which(program))), None)
        advice = "" if path else "optional: only kernels built from source and torch.compile need it"
        yield Finding(name, "ok" if path else "warn", path or "not found", advice)


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
    except (ImportError, OSError):
        return
    threads = torch.get_num_threads()
    advice = f"set OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding("cpu threads", "warn" if advice else "ok", f"{threads} threads on {cores} cores", advice)


def _disk() -> Iterator[Finding]:
    here = os.getcwd()
    free = shutil.disk_usage(here).free
    advice = "checkpoints need room: free some" if free < GIB else ""
    yield Finding("disk", "warn" if advice else "ok", f"{free / GIB:.1f} GiB free at {here}", advice)
    if not os.access(here, os.W_OK):
        yield Finding("folder", "warn", f"{here} is not writable", "give --out a folder that is")


def _ours(session: Session) -> Iterator[Finding]:
    """Our distributions and every plugin."""
    yield _kernels()
    for plugin in session.registry.plugins:
        name = f"plugin {plugin.name}"
        detail = f"{plugin.distribution} {plugin.version}"
        if plugin.error:
            advice = f"update or uninstall {plugin.distribution}; CDM_RUN_STRICT=1 shows the traceback"
            yield Finding(name, "fail", f"{detail}: {plugin.error}", advice)
        else:
            yield Finding(name, "ok", detail)


def _kernels() -> Finding:
    """The kernels package, and which of its implementations serves here."""
    try:
        version = metadata.version("cdm-kernels")
        cpp = importlib.import_module("cdm_kernels.cpp")
    except metadata.PackageNotFoundError:
        return Finding("cdm-kernels", "ok", "not installed (optional)")
    except ImportError as error:  # torch is missing, which has a line of its own
        return Finding("cdm-kernels", "warn", f"cannot be imported: {error}")
    library = cpp.library()
    if library:
        return Finding("cdm-kernels", "ok", f"{version}, C++ kernels for {library.level} from {library.path}")
    problem = cpp.problem()
    advice = "install a C++ compiler, then run python -m cdm_kernels.build"
    if "CDM_KERNELS_CPP" in problem:
        advice = "unset it to have them"
    return Finding("cdm-kernels", "warn", f"{version} without C++ kernels, slower: {problem}", advice)
