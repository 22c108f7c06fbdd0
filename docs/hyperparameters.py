#!/usr/bin/env python3
"""Write docs/hyperparameters.md and the comments of hparams/wav2vec2_base.yaml from the table of hyperparameters."""

import re
from pathlib import Path

from accent_plugin.experiment.hyperparameters import GROUPS, RENAMED, TABLE

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "hparams/wav2vec2_base.yaml"
PAGE = ROOT / "docs/hyperparameters.md"

HEAD = """# Hyperparameters

This page lists every hyperparameter of the recipe, with its default in
[hparams/wav2vec2_base.yaml](../hparams/wav2vec2_base.yaml). Any of them can be set on the command line, for example
`--pooling attentive`. A value is one word, or a list or mapping in brackets; quote any other. Relative paths start at
the project's root in a YAML, and at the working directory on the command line. SpeechBrain's documentation describes
its run options (`--device`, `--debug`, `--test_only`, `--compile`, ...); `--jit`, `--data_parallel_backend`,
`--auto_mix_prec`, `--bfloat16_mix_prec` and `--remove_vector_weight_decay` are refused.

The other YAML files are overlays: they contain `base: wav2vec2_base.yaml` and the hyperparameters that differ. You can
write your own in the same way; the path in `base` is relative to the overlay. The run folder keeps the complete YAML.

A hyperparameter marked *free* may have another value when a run is resumed. For any other change, the run folder is
refused: it is a different run.

`docs/hyperparameters.py` writes this page from `accent_plugin/experiment/hyperparameters.py`. Edit that table instead.
"""
_LINE = re.compile(r"^(\w+): (.+?)(?:  # .*)?$", re.M)


def commented(text):
    """The YAML's text with the table's comments."""

    def line(match):
        key, default = match.groups()
        return f"{key}: {default}  # {TABLE[key].text}" if key in TABLE else match.group()

    return _LINE.sub(line, text)


def _row(one, default):
    text = one.text.replace("<", "&lt;") + (" *free*" if one.free else "")
    cells = [f"`{one.name}`", f"`{default}`", one.values, text]
    return f"| {' | '.join(cells)} |\n"


def page(text):
    """The page's Markdown, with defaults from the YAML's text."""
    defaults = dict(_LINE.findall(text))
    parts = [HEAD]
    for heading, group in GROUPS.items():
        parts.append(f"\n## {heading}\n\n| name | default | values | |\n|---|---|---|---|\n")
        parts += [_row(one, defaults[one.name]) for one in group]
    parts.append("\n## Renamed since version 0.1.0\n\nThe old names are accepted for one release, with a warning.\n")
    parts.append("\n| old name | name |\n|---|---|\n")
    parts += [f"| `{old}` | `{new}` |\n" for old, new in RENAMED.items()]
    return "".join(parts)


if __name__ == "__main__":
    whole = commented(YAML.read_text(encoding="utf-8"))
    YAML.write_text(whole, encoding="utf-8")
    PAGE.write_text(page(whole), encoding="utf-8")
