"""SpeechBrain's recipe register: every YAML is in it, and every row runs and checks as its own runner would have it.

`python tests/speechbrain_runner.py CHECKOUT` runs SpeechBrain's real runner; here, where no checkout is at hand, the
same register is read, the same words are typed, and the same files and figures are looked for.
"""

import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, register
from speechbrain.utils.run_opts import RunOptions

ROWS = register.rows()
NAMES = [row["Hparam_file"].split("/")[-1].removesuffix(".yaml") for row in ROWS]
# What makes one YAML another than wav2vec2_base.yaml; the first line of comment names the encoder.
ITS_OWN = {"name", "wav2vec2_hub", "batch_seconds", "grad_accumulation_factor"}


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


def test_the_yamls_differ_in_what_makes_them_others_alone():
    base = (ROOT / "hparams/wav2vec2_base.yaml").read_text(encoding="utf-8").splitlines()
    for name in NAMES:
        other = (ROOT / f"hparams/{name}.yaml").read_text(encoding="utf-8").splitlines()
        changed = {a.partition(":")[0] for a, b in zip(base, other, strict=True) if a != b}
        assert changed <= ITS_OWN | {"# Accent classifier"}, name


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
