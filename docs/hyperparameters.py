#!/usr/bin/env python3
"""Write docs/hyperparameters.md from the comments of hparams/wav2vec2_base.yaml; a test holds both equal."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "hparams/wav2vec2_base.yaml"
PAGE = ROOT / "docs/hyperparameters.md"

HEAD = """# Hyperparameters

Every key of [hparams/wav2vec2_base.yaml](../hparams/wav2vec2_base.yaml), with its default and what the YAML says of it.
The other YAMLs have the same keys. Each can be given on the command line: `--pooling attentive`. Paths in the YAML
start at the project's root, paths on the command line at the working directory. SpeechBrain's own run options
(`--device`, `--debug`, `--test_only`, `--compile`, ...) come on top: its documentation has them.

This page is written by `docs/hyperparameters.py`: edit the YAML's comments.
"""
_KEY = re.compile(r"(\w+): (.+?)(?:  # (.+))?$")


def sections(text):
    """Heading -> rows of (key, default, comment), of the YAML's part that holds plain values."""
    found, heading, before = {}, "Names", "-"
    for line in text.partition("\n# What each part of the recipe is handed\n")[0].splitlines():
        if line.startswith("# ") and not before:
            heading = line.removeprefix("# ")
        elif match := _KEY.match(line):
            key, default, comment = match.groups()
            if not key.startswith("__"):
                found.setdefault(heading, []).append((key, default, comment or ""))
        elif not line.startswith("#"):
            assert not line.strip(), f"not understood: {line}"
        before = line
    return found


def _escaped(comment):
    return comment.replace("|", "\\|").replace("<", "&lt;")


def page(text):
    """The Markdown of the page."""
    parts = [HEAD]
    for heading, rows in sections(text).items():
        parts.append(f"\n## {heading}\n\n| key | default | |\n|---|---|---|\n")
        parts += [f"| `{key}` | `{default}` | {_escaped(comment)} |\n" for key, default, comment in rows]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(YAML.read_text(encoding="utf-8")), encoding="utf-8")
