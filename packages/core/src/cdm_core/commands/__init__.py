"""The commands of `cdm-run`, one module each, imported only when invoked."""

from __future__ import annotations

# Name -> (target, the line that `cdm-run --help` shows). Kept here as text so that help imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("cdm_core.commands.train:train", "Train a recipe; the same command again resumes."),
    "sample": ("cdm_core.commands.sample:sample", "Draw images from a trained run."),
    "evaluate": ("cdm_core.commands.evaluate:evaluate", "Compute every metric that a run allows."),
    "likelihood": ("cdm_core.commands.likelihood:likelihood", "Score images: nats and bits/dim."),
    "classify": ("cdm_core.commands.classify:classify", "Classify images and report the accuracy."),
    "report": ("cdm_core.commands.report:report", "Write a run's self-contained HTML report."),
    "plugins": ("cdm_core.commands.plugins:plugins", "List the plugins, failed ones too."),
    "recipes": ("cdm_core.commands.recipes:recipes", "List the recipes, or print one in full."),
    "doctor": ("cdm_core.commands.doctor:doctor", "Check this installation and say what to mend."),
    "convert": ("cdm_core.commands.convert:convert", "Turn a foreign checkpoint into safetensors."),
    "new-plugin": ("cdm_core.commands.new_plugin:new_plugin", "Write a new, installable plugin."),
}
