"""Everything that waits for a GPU, in one call of at most ten minutes.

    python bench/gpu.py [--official PATH] [--out bench/results/gpu.json]

First the training and the sampling step of the official CIFAR-10 net at batch 128 (`training_step.py`:
milliseconds, images a second, peak memory, beside the official code where PATH has a checkout of
shaharYadin/CDM); then the bandwidth of every kernel beside that of a large copy; then DDIM sampling; then the
tests that need a device. Each part is a process of its own: one that fails, or has no time left, is recorded
as failed with its last lines, and stops no other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import about
from torch import Tensor

BENCH = Path(__file__).parent
Case = tuple[str, Callable[[], Any], int]


def seconds(function: Callable[[], Any], rounds: int = 30) -> float:
    """Median seconds of a call on the device, each timed by events behind a flushed cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    found = []
    for _ in range(rounds):
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # the host gets ahead, so that launches are not what is timed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[rounds // 2]


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def norm_cases() -> list[Case]:
    """GroupNorm and SiLU in three directions, with the bytes that each must move at least."""
    from cdm_kernels.triton import group_norm_silu as kernels

    cases: list[Case] = []
    for shape in ((128, 128, 32, 32), (128, 256, 16, 16), (512, 128, 32, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x, dy, v = (
                    torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
                    for _ in range(3)
                )
                weight = torch.randn(shape[1], device="cuda")
                _, mean, rstd = kernels.forward(x, weight, weight, 32, 1e-6, True)
                saved = (dy, x, mean, rstd, weight, weight, 32, True)
                name = f"{shape} {dtype} {layout}".replace("torch.", "")
                one = size(x)
                cases += [
                    (f"forward {name}", _call(kernels.forward, x, weight, weight, 32, 1e-6, True), 2 * one),
                    (f"backward {name}", _call(kernels.backward, *saved), 3 * one),
                    (
                        f"double backward {name}",
                        _call(kernels.double_backward, v, None, None, *saved),
                        5 * one,
                    ),
                ]
    return [(f"group_norm_silu {name}", function, moved) for name, function, moved in cases]


def head_cases() -> list[Case]:
    """The head's forward and backward pass."""
    from cdm_kernels import noise_level_cross_entropy

    cases: list[Case] = []
    for rows, levels in ((128, 1002), (4096, 1002), (4096, 4098)):
        o = torch.randn(rows, levels, device="cuda", requires_grad=True)
        t = torch.randint(levels, (rows,), device="cuda")

        def both(o: Tensor = o, t: Tensor = t) -> Tensor:
            return torch.autograd.grad(noise_level_cross_entropy(o, t).sum(), o)[0]

        cases.append((f"head forward and backward ({rows}, {levels})", both, 3 * size(o)))
    return cases


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def bandwidth() -> list[dict[str, Any]]:
    """Every kernel's bytes a second beside those of a copy of 512 MiB, far past the cache."""
    big = torch.empty(512 * 2**20, dtype=torch.int8, device="cuda")
    target = torch.empty_like(big)
    copy = 2 * size(big) / seconds(lambda: target.copy_(big))
    rows: list[dict[str, Any]] = [{"kernel": "copy of 512 MiB", "gigabytes_per_second": round(copy / 1e9)}]
    for name, function, moved in norm_cases() + head_cases():
        took = seconds(function)
        rows.append(
            {
                "kernel": name,
                "microseconds": round(took * 1e6, 1),
                "gigabytes_per_second": round(moved / took / 1e9),
                "share_of_copy": round(moved / took / copy, 3),
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


def sampling(batch: int = 128, steps: int = 50) -> list[dict[str, Any]]:
    """DDIM with the official CIFAR-10 net: eager float32 by PyTorch's operators, ours, ours compiled."""
    from training_step import Setting

    import cdm_kernels
    from cdm_core import schedules
    from cdm_core.compiled import CompiledModel
    from cdm_core.samplers import ddim

    setting = Setting("cifar10", torch.device("cuda"))
    sigmas = schedules.grid(setting.model.sigmas, steps, "t").to("cuda")
    noise = torch.randn(batch, *setting.shape, device="cuda")
    compiled = CompiledModel(setting.model, hint="")

    def draw(model: Any, half: bool, backend: str | None = None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with setting.autocast(half), torch.no_grad():
                if backend is None:
                    return ddim(model.denoise, noise * 30, sigmas)
                with cdm_kernels.use(backend):
                    return ddim(model.denoise, noise * 30, sigmas)

        return run

    rows = []
    for name, run in {
        "plain float32": draw(setting.model, False, "reference"),
        "ours float32": draw(setting.model, False),
        "ours bfloat16": draw(setting.model, True),
        "ours float32 compiled": draw(compiled, False),
        "ours bfloat16 compiled": draw(compiled, True),
    }.items():
        took = seconds(run, rounds=3)
        rows.append({"variant": name, "seconds": round(took, 4), "images_per_second": round(batch / took, 1)})
        print(*rows[-1].values(), flush=True)
    return rows


def part(arguments: list[str], deadline: float) -> dict[str, Any]:
    """Run one part in a process of its own until `deadline`; its last lines."""
    left = deadline - time.monotonic()
    if left < 5:
        return {"failed": "no time left"}
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=left, cwd=BENCH.parent)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode() if isinstance(output, bytes) else output
        return {"failed": f"took more than {left:.0f} s", "output": text.splitlines()[-20:]}
    print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    outcome = "passed" if done.returncode == 0 else "failed"
    return {outcome: done.stdout.strip().splitlines()[-3:], "stderr": done.stderr[-600:]}


def parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Arguments of each part, in the order of what is wanted most."""
    checkout = ["--official", str(options.official.resolve())] if options.official else []
    step = [str(BENCH / "training_step.py"), "--device", "cuda", "--case", "cifar10", "--compile"]
    tests = ["-m", "pytest", "-q", "packages/kernels/tests", "packages/core/tests/test_compiled.py"]
    return {
        "step": [*step, *checkout],
        "bandwidth": [__file__, "--part", "bandwidth"],
        "sampling": [__file__, "--part", "sampling"],
        "tests": tests,
    }


def main() -> None:
    """All parts, written as they come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path)
    parser.add_argument("--out", type=Path, default=BENCH / "results/gpu.json")
    parser.add_argument("--part", choices=["bandwidth", "sampling"], help="Only this one, printed as JSON.")
    parser.add_argument("--minutes", type=float, default=9.0, help="For all parts together.")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    if options.part:
        rows = {"bandwidth": bandwidth, "sampling": sampling}[options.part]()
        options.out.write_text(json.dumps(rows))
        return
    deadline = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"about": about()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in parts(options).items():
            target = Path(folder) / f"{name}.json"
            output = ["--out", str(target)] if name != "tests" else []
            found[name] = part([sys.executable, *arguments, *output], deadline)
            if target.exists():
                found[name] = {"rows": json.loads(target.read_text())} | found[name]
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
