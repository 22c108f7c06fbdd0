"""What the documents say can be typed: every option in their commands exists, and every file they name is there."""

import argparse
import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT

from accent_plugin.cli.parser import make_parser
from accent_plugin.experiment import run_options
from accent_plugin.experiment.hyperparameters import TABLE

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes/CommonVoiceAccent/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def options_of_the_command():
    """Options of every verb of accent-plugin."""
    verbs = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {name[2:] for verb in verbs.choices.values() for name in verb._option_string_actions if name[:2] == "--"}


def torchruns_options():
    from torch.distributed.run import get_args_parser

    return {option for action in get_args_parser()._actions for option in action.option_strings if len(option) > 2}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_exist(page):
    # The options of pip, Slurm and torchrun are their own affair.
    text = re.sub(
        r"^ *(pip |docker |#SBATCH |srun ).*$|`--(signal|requeue)\S*`", "", page.read_text(encoding="utf-8"), flags=re.M
    )
    text = re.sub("|".join(sorted(torchruns_options(), key=len, reverse=True)), "", text)
    known = {*TABLE, *run_options.NAMES, *options_of_the_command()}
    given = set(re.findall(r"--([a-z0-9_]+)", text))
    assert given - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_page_of_hyperparameters_and_the_comments_of_the_yaml_are_those_of_the_table():
    spec = importlib.util.spec_from_file_location("hyperparameters", ROOT / "docs/hyperparameters.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.YAML.read_text(encoding="utf-8")
    assert text == script.commented(text), "run docs/hyperparameters.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(text), "run docs/hyperparameters.py"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)\b", page.read_text(encoding="utf-8"))) <= targets | {"it"}


def test_every_commands_folder_has_the_hyperparameters():
    # Both ways of typing it: from the recipe's folder through the link, and from the root.
    assert (ROOT / "recipes/CommonVoiceAccent/hparams/wav2vec2_base.yaml").samefile(ROOT / "hparams/wav2vec2_base.yaml")
    assert Path(ROOT / "recipes/CommonVoiceAccent/train.py").is_file()
