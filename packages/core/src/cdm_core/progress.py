"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere, all on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import click
from tqdm import tqdm

_HIDDEN = {"seconds"}  # figures that are in metrics.jsonl and would only fill the line


class Progress:
    """`total` steps; enabled=False says nothing at all."""

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        self.total, self.enabled = total, enabled
        self._bar: tqdm | None = None

    def start(self, done: int) -> None:
        """`done` steps are behind us."""
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=done, unit="step", dynamic_ncols=True)
        elif done:
            self.say(f"resuming after step {done}")

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        """Figures of a log line: beside the bar, or a line of their own."""
        texts = {name: format_figure(value) for name, value in figures.items() if name not in _HIDDEN}
        if self._bar is not None and split == "train":
            self._bar.set_postfix(texts)
        else:
            line = "  ".join(f"{name} {text}" for name, text in texts.items())
            self.say(f"step {step}/{self.total}  {split:5}  {line}")

    def say(self, text: str) -> None:
        """A line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self.enabled:
            click.echo(text, err=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"
