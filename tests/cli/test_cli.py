"""The command line as a user runs it: what it prints where, and its exit codes."""

import io
import json
import logging
import subprocess
import sys

import pytest
from helpers.dataset_dicts import rows, save, shared_data, three_splits
from helpers.releases import pool, release, row

from accent_plugin.cli import main, parser
from accent_plugin.corpus import build as corpus_build
from accent_plugin.corpus.build import load_corpus, survey_accents
from accent_plugin.corpus.card import corpus_card_to_markdown
from accent_plugin.corpus.choices import CorpusChoices

TWO = ("us", "england")


def run(*arguments):
    """Exit code, stdout and stderr of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "accent_plugin.cli", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_prepare_writes_and_says_what_it_did(tmp_path):
    source, out = release(tmp_path, 6, pool(accents=TWO)), tmp_path / "out"
    code, stdout, stderr = run(
        "prepare", source, "--out", out, "--accents", "us,england", "--max_clips_per_client", "none"
    )
    assert code == 0, stderr
    built = load_corpus(out)
    assert corpus_card_to_markdown(built.card) in stdout
    assert built.card["arguments"]["max_clips_per_client"] is None


def test_prepare_twice_with_other_arguments_is_refused(tmp_path):
    source, out = release(tmp_path, 6, pool(accents=TWO)), tmp_path / "out"
    assert main.main(["prepare", str(source), "--out", str(out), "--accents", "us,england"]) == 0
    code, stdout, stderr = run("prepare", source, "--out", out, "--accents", "us,england", "--seed", "7")
    assert (code, stdout) == (2, "")
    assert "seed: 1986 -> 7" in stderr


def test_every_choice_of_python_is_one_of_the_command(tmp_path, monkeypatch):
    """A field that the parser lacks would be there for Python only."""
    seen = {}

    def build(source, out, **given):
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_build, "build_corpus", build)
    assert main.main(["prepare", "x", "--out", "y"]) == 130
    names = {*CorpusChoices.__dataclass_fields__, *corpus_build.readers.Reading.__dataclass_fields__, "workers"}
    assert seen.keys() == names
    assert CorpusChoices(**{n: seen[n] for n in CorpusChoices.__dataclass_fields__}) == CorpusChoices()


@pytest.mark.parametrize("form", ["table", "tsv", "json"])
def test_accents(tmp_path, form):
    table = [row("a", "us"), row("a", "us", 1), row("b", "Kentish"), row("c")]
    code, stdout, _ = run("accents", release(tmp_path, 17, table), "--format", form)
    assert code == 0
    if form == "json":
        found = {each["raw"]: (each["clips"], each["clients"], each["label"]) for each in json.loads(stdout)}
        assert found == {"United States English": (2, 1, "us"), "Kentish": (1, 1, None), "": (1, 1, None)}
    elif form == "tsv":
        lines = [line.split("\t") for line in stdout.splitlines()]
        assert lines[:2] == [["clips", "clients", "label", "value"], ["2", "1", "us", "United States English"]]
    else:
        assert ["2", "1", "us", "United", "States", "English"] in [line.split() for line in stdout.splitlines()]


def test_accents_with_a_mapping(tmp_path):
    (tmp_path / "more.yaml").write_text("Kentish: england\n", encoding="utf-8")
    source = release(tmp_path, 17, [row("b", "Kentish")])
    _, stdout, _ = run("accents", source, "--format", "json", "--mapping", tmp_path / "more.yaml")
    assert json.loads(stdout)[0]["label"] == "england"


def test_output_that_nobody_reads_to_the_end(tmp_path):
    source = release(tmp_path, 17, [row("a", f"Town {number} {'x' * 200}", number) for number in range(2000)])
    command = f"{sys.executable} -m accent_plugin.cli accents {source} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_check_finds_nothing_wrong(tmp_path):
    data = save(tmp_path / "data", **three_splits())
    code, stdout, stderr = run("check", data, "--no_audio")
    assert (code, stderr) == (0, "")
    assert "data: 0 errors" in stdout


def test_check_exits_with_1_unless_the_kind_is_ignored(tmp_path):
    tables = three_splits()
    tables["test"] += rows("us", 1)
    data = save(tmp_path / "data", **tables)
    code, stdout, _ = run("check", data, "--no_audio", "--json")
    assert code == 1
    assert [f["kind"] for f in json.loads(stdout)["findings"] if f["severity"] == "error"] == ["client", "sentence"]
    assert run("check", data, "--no_audio", "--ignore", "client,sentence")[0] == 0
    assert run("check", data, "--no_audio", "--ignore", "client")[0] == 1


def test_check_writes_a_report(tmp_path):
    data = save(tmp_path / "data", **three_splits())
    assert run("check", data, "--report", tmp_path / "report", "--workers", "1", "--permutations", "100")[0] in (0, 1)
    assert {"check.md", "check.json", "composition.png"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_an_unknown_kind_is_refused_before_the_work(tmp_path):
    code, _, stderr = run("check", tmp_path, "--ignore", "gossip")
    assert code == 2
    assert "gossip" in stderr and "client, sentence" in stderr


@pytest.mark.parametrize("verb", ["accents", "prepare", "check"])
def test_what_is_not_there(tmp_path, verb):
    """A mistyped path below a folder that exists is not looked for on the Hub, which would take half a minute."""
    out = ["--out", tmp_path / "out"] if verb == "prepare" else []
    code, stdout, stderr = run(verb, tmp_path / "nowhere", *out)
    assert (code, stdout) == (2, "")
    assert "there is no folder" in stderr and "Hub:" not in stderr
    assert not (tmp_path / "out").exists()


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from accent_plugin.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'datasets', 'numpy', 'speechbrain', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_real_release(tmp_path):
    source = shared_data("common_voice_6_1_sample") / "en"
    found = {each.raw: each.clips for each in survey_accents(source)}
    assert found == {"": 50, "us": 35, "indian": 5, "england": 4, "australia": 3, "newzealand": 2, "ireland": 1}
    code, _, stderr = run("prepare", source, "--out", tmp_path / "out")
    assert code == 2
    assert "us 34, england 4, australia 3" in stderr


def test_check_takes_a_mapping(tmp_path):
    """It was once given the path in place of the table."""
    (tmp_path / "more.yaml").write_text("Kentish: england\n", encoding="utf-8")
    data = save(tmp_path / "data", **three_splits(("us", "Kentish")))
    code, stdout, stderr = run("check", data, "--no_audio", "--mapping", tmp_path / "more.yaml")
    assert code == 0, stderr
    assert "england" in stdout and "Kentish" not in stdout


@pytest.mark.parametrize("verb", ["prepare", "check"])
def test_workers_below_one(tmp_path, verb):
    data = save(tmp_path / "data", **three_splits())
    out = ["--out", tmp_path / "out", "--accents", "us,england"] if verb == "prepare" else []
    code, _, stderr = run(verb, data, "--workers", "-1", *out)
    assert code == 2 and "workers is -1; give 1 or more" in stderr


def test_a_report_inside_the_data_is_refused(tmp_path):
    data = save(tmp_path / "data", **three_splits())
    code, _, stderr = run("check", data, "--no_audio", "--report", data / "report")
    assert code == 2 and "only read" in stderr
    assert not (data / "report").exists()


def test_values_that_a_terminal_would_obey(tmp_path):
    table = tmp_path / "clips.csv"
    table.write_text('path,accent\na.wav,"Bell\x07\tand\nline"\n', encoding="utf-8")
    _, stdout, _ = run("accents", table, "--format", "tsv")
    assert stdout.splitlines()[1] == "1\t0\t(unknown accent)\tBell\\x07\\tand\\nline"


def test_a_number_that_is_none(tmp_path):
    code, _, stderr = run("prepare", tmp_path, "--out", tmp_path / "out", "--max_clips_per_client", "many")
    assert code == 2 and "'many' is neither a number nor none" in stderr


def test_a_closed_stdout(tmp_path):
    command = f"{sys.executable} -m accent_plugin.cli summarise {tmp_path} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "stdout is closed: results would be lost; open it, or use /dev/null\n")


def test_a_closed_stderr(tmp_path):
    """Notes must not end up among the results."""
    command = f"{sys.executable} -m accent_plugin.cli summarise {tmp_path} 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["classify", "x", "--model", "m"], "interrupted"),
        (["classify", "x", "--model", "m", "--output", "o", "--format", "table"], "interrupted"),
        (["classify", "x", "--model", "m", "--output", "o"], "interrupted: the same command goes on from here"),
        (["prepare", "x", "--out", "o"], "interrupted: the same command goes on from here"),
        (["summarise", "x"], "interrupted"),
    ],
)
def test_an_interrupt_promises_what_is_true(arguments, said, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    for module in (main, parser):
        monkeypatch.setattr(module, f"run_{arguments[0]}", interrupted, raising=False)
    assert main.main(arguments) == 130
    assert capsys.readouterr().err == f"{said}\n"


def test_errors_name_files_that_a_terminal_would_obey(tmp_path, capsys):
    assert main.main(["summarise", str(tmp_path / "\x1b[2J")]) == 2
    assert "\\x1b[2J" in capsys.readouterr().err


def test_help_of_classify_lists_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main.main(["classify", "--help"])
    printed = capsys.readouterr().out
    assert "exit code: 0" in printed and "remove their lines" in printed


def test_notes_go_to_the_stderr_of_the_time(monkeypatch):
    """Called from a program that replaces and closes it, as tests do."""
    first, second = io.StringIO(), io.StringIO()
    for stream in (first, second):
        monkeypatch.setattr(sys, "stderr", stream)
        main._log_to_stderr()
        logging.getLogger("accent_plugin.somewhere").info("a note")
    assert (first.getvalue(), second.getvalue()) == ("a note\n", "a note\n")
