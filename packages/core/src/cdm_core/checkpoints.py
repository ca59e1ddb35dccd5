"""The run folder: what it holds, and how nothing in it is ever half-written.

    config.toml  environment.json  plugins.json  metrics.jsonl  tensorboard/  samples/  report.html
    checkpoints/step-00001000/{model.safetensors, ema.safetensors, optimizer.pt, manifest.json}

A checkpoint is written into a folder beside its own, every file synced to the disk, the manifest with their
SHA-256 last, and then renamed: it is there and whole, or it is not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cdm_core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
# What tells the better of two checkpoints, by preference; the less the better.
CRITERIA = ("bits_per_dim", "loss")


@dataclass(frozen=True)
class Checkpoint:
    """One folder under `checkpoints/`, named after the number of steps taken."""

    path: Path
    step: int

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """step, files (name -> SHA-256), config (SHA-256), seconds of training, valid (figures or {})."""
        return json.loads((self.path / MANIFEST).read_text())

    def problem(self) -> str | None:
        """What is wrong with it, in a few words; None when every file is as its manifest says."""
        try:
            files = dict(self.manifest["files"])
            for name, digest in files.items():
                with (self.path / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return f"{name} is not what was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} is not a manifest"
        return None

    def weights(self, which: Literal["model", "ema"] = "ema") -> dict[str, Tensor]:
        """The state dict of the model (`model`) or of its moving average (`ema`), on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{which}.safetensors")

    def state(self) -> dict[str, Any]:
        """Optimizer state and the sums of the metrics that are not logged yet."""
        import torch

        return torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)


class RunFolder:
    """The folder of one run. Making the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.toml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self.samples_path = self.path / "samples"
        self.tensorboard_path = self.path / "tensorboard"
        self.report_path = self.path / "report.html"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def check(self) -> bool:
        """Whether it is a run already; `UserError` when a run cannot live there."""
        if self.config_path.is_file():
            return True
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name another folder with --out")
        if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise UserError(
                f"{self.path} has files but no config.toml, so it is no run: name another with --out"
            )
        return False

    def write_text(self, name: str, text: str) -> None:
        """Write `name` in the folder, whole or not at all."""
        path = self.path / name
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.writing")
            write_synced(aside, text.encode())
            aside.replace(path)

    # -- metrics -------------------------------------------------------------------------------------------

    def log(self, step: int, scalars: Mapping[str, float], split: str = "train") -> None:
        """Add a line to `metrics.jsonl`. JSON has no infinity: a figure that is not finite is left out."""
        line = json.dumps({"step": step, "split": split, **finite(scalars)}) + "\n"
        with disk(self.metrics_path), self.metrics_path.open("a") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, in order; a last line cut short by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text().split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(
                f"{self.metrics_path} has a line that is no JSON ({error}): mend or remove it"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, and remains of interrupted writes: as if never interrupted."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.write_text(self.metrics_path.name, "".join(json.dumps(line) + "\n" for line in kept))
        with disk(self.checkpoints_path):
            for remains in self.checkpoints_path.glob(".step-*"):
                shutil.rmtree(remains)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint, whole or damaged, newest first."""
        folders = self.checkpoints_path.glob("step-*")
        found = [Checkpoint(f, int(f.name[5:])) for f in folders if f.is_dir() and f.name[5:].isdigit()]
        return sorted(found, key=lambda checkpoint: -checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None without one. Warns, once, of newer ones that are damaged."""
        damaged = []
        good = None
        for checkpoint in self.checkpoints():
            problem = checkpoint.problem()
            if problem is None:
                good = checkpoint
                break
            damaged.append(f"{checkpoint.path.name} ({problem})")
        if damaged:
            instead = f"using {good.path.name}" if good else "and there is no other"
            warnings.warn(f"damaged checkpoint in {self.path}: {', '.join(damaged)}; {instead}", stacklevel=2)
        return good

    def best(self) -> Checkpoint | None:
        """The whole checkpoint with the least validation figure; None when none was validated."""
        return next((c for c in self._ranked() if c.problem() is None), None)

    def _ranked(self) -> list[Checkpoint]:
        """The validated checkpoints, whole or damaged, best first; the newer of equals first."""
        figures = {}
        for checkpoint in self.checkpoints():
            # A damaged manifest ranks nowhere; `latest` is who tells of it.
            with suppress(OSError, ValueError, KeyError, TypeError):
                figures[checkpoint] = dict(checkpoint.manifest["valid"])
        for name in CRITERIA:
            ranked = [checkpoint for checkpoint in figures if name in figures[checkpoint]]
            if ranked:
                return sorted(ranked, key=lambda checkpoint: figures[checkpoint][name])
        return []

    def save(self, step: int, files: Mapping[str, bytes], **manifest: Any) -> Checkpoint:
        """Write a checkpoint atomically; `manifest` adds entries to its manifest.

        A full or read-only disk is a `UserError`; earlier checkpoints stay until this one is whole.
        """
        target = self.checkpoints_path / f"step-{step:08d}"
        aside = self.checkpoints_path / f".{target.name}.writing"
        record = {
            "step": step,
            "files": {name: _sha256(content) for name, content in files.items()},
            **manifest,
        }
        with disk(target, "earlier checkpoints are intact; make room and run the same command again"):
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                for name, content in files.items():
                    write_synced(aside / name, content)
                write_synced(aside / MANIFEST, (json.dumps(record, indent=2) + "\n").encode())
                _sync_folder(aside)
                _put(aside, target)
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        return Checkpoint(target, step)

    def prune(self, keep: int, newest: Checkpoint) -> None:
        """Delete all but the best and the `keep` newest checkpoints up to `newest`, the one just written.

        Later ones are damaged ones that training has gone back behind: they are left until it passes them.
        """
        past = [checkpoint for checkpoint in self.checkpoints() if checkpoint.step <= newest.step]
        spared = {checkpoint.step for checkpoint in [*past[: max(keep, 1)], *self._ranked()[:1]]}
        with disk(self.checkpoints_path):
            for checkpoint in past:
                if checkpoint.step not in spared:
                    shutil.rmtree(checkpoint.path)


def _put(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; what is there already (a damaged checkpoint) gives way."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write `content` and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if sys.platform == "win32":  # folders cannot be opened there, and renames are durable
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk(
    path: Path, advice: str = "check the disk's free space and rights, or name another --out"
) -> Iterator[None]:
    """Turn an `OSError` of writing `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def safetensors_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the content of a safetensors file; equal states give equal bytes."""
    from safetensors.torch import save

    # Cloned, as tied weights share memory, which the format refuses.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})


def torch_bytes(state: Any) -> bytes:
    """Nested dicts, lists, numbers and tensors as `torch.save` writes them; equal states give equal bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(_canonical(state), buffer)
    return buffer.getvalue()


def _canonical(value: Any) -> Any:
    """A copy that pickles the same whatever it went through.

    Pickle refers back to strings and tuples that are the same object, so that a state that was loaded would
    give other bytes than one that was not.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
