"""SpeechBrain's recipe register: every YAML is in it, and every row runs and checks as its own runner would have it.

`python tests/speechbrain_runner.py CHECKOUT` runs SpeechBrain's real runner; here, where no checkout is at hand, the
same register is read, the same words are typed, and the same files and figures are looked for.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, register
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.run_opts import RunOptions

from accent_plugin.experiment.settings import _plain, read_overlay

ROWS = register.rows()
NAMES = [row["Hparam_file"].split("/")[-1].removesuffix(".yaml") for row in ROWS]
BASE = ROOT / "hparams/wav2vec2_base.yaml"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    register.make_samples()


def test_every_yaml_is_in_the_register():
    assert sorted(NAMES) == sorted(path.stem for path in (ROOT / "hparams").glob("*.yaml"))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_row_names_files_that_exist(row):
    for field in ("Script_file", "Hparam_file", "Data_prep_file", "Readme_file"):
        assert (ROOT / row[field]).is_file(), row[field]
    readme = (ROOT / row["Readme_file"]).read_text(encoding="utf-8")
    assert all(link in readme for field in ("Result_url", "HF_repo") for link in row[field].split())
    assert row["test_debug_flags"] and re.search(r"file_exists=\[[^ \]]+\]", row["test_debug_checks"])


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_every_key_is_used_by_the_script_or_handed_on(row):
    script = (ROOT / row["Script_file"]).read_text(encoding="utf-8")
    lines = (ROOT / row["Hparam_file"]).read_text(encoding="utf-8").splitlines()
    keys = [line.partition(":")[0] for line in lines if re.match(r"\w+:", line) and "!apply" not in line]
    # A reference counts where it stands after the key.
    for number, line in enumerate(lines):
        for name in re.findall(r"<(\w+)>", line) if "!ref" in line else ():
            if any(earlier.startswith(f"{name}:") for earlier in lines[:number]) and name in keys:
                keys.remove(name)
    options = RunOptions().as_dict()
    unused = [key for key in keys if f'["{key}"]' not in script and key not in options]
    assert unused == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != BASE.stem])
def test_an_overlay_gives_values_other_than_the_bases(name):
    whole, differs = read_overlay(ROOT / f"hparams/{name}.yaml")
    assert Path(whole) == BASE
    defaults = _plain(BASE.read_text(encoding="utf-8"), {})
    assert [key for key, value in differs.items() if value == defaults[key]] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_loads_without_this_packages_reader(name, tiny_encoder, tmp_path):
    """As SpeechBrain's load_yaml_test does, which has the network to load the encoder."""
    overrides = {"data_folder": "data", "output_folder": str(tmp_path)}
    if name == BASE.stem:
        overrides["wav2vec2_hub"] = str(tiny_encoder("wav2vec2-group"))
    with open(ROOT / f"hparams/{name}.yaml", encoding="utf-8") as file:
        assert load_hyperpyyaml(file, overrides)["name"] == name


def test_lines_of_the_yamls_are_short_enough_for_speechbrain():
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "hparams").glob("*.yaml")}
    assert [(name, line) for name, text in texts.items() for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ROWS)), ids=NAMES)
def test_a_row_runs_and_leaves_what_it_promises(samples, number):
    row = ROWS[number]
    environment, words, output = register.command(row, number + 2, sys.executable)
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "2"}
    output.mkdir(parents=True)  # as the runner does, which writes its own files there
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in re.search(r"file_exists=\[(.*?)\]", row["test_debug_checks"]).group(1).split(","):
        assert (output / name).exists(), name
    # What the run folder keeps of an overlay is whole.
    saved = output / "hyperparams.yaml"
    assert read_overlay(saved) == (str(saved), {})
    assert _plain(saved.read_text(encoding="utf-8"), {})["name"] == NAMES[number]
    if check := re.search(r"performance_check=\[(.*?)\]", row["test_debug_checks"]):
        file, variable, bound, epoch = (part.strip() for part in check.group(1).split(","))
        (line,) = [line for line in (output / file).read_text(encoding="utf-8").splitlines() if epoch in line]
        value = float(re.search(rf"{variable}\s*:\s*([-+]?\d*\.\d+(?:[eE][-+]?\d+)?)", line).group(1))
        assert bound.startswith("<=") and value <= float(bound[2:])


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_names_its_encoder(name):
    text = (ROOT / f"hparams/{name}.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(re.search(r"^name: (\S+)", text, re.M).group(1)) == name
    assert re.search(r"^wav2vec2_hub: \S+/\S+", text, re.M)
