"""The command line: stdout, stderr and exit codes."""

import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from helpers.dataset_dicts import rows, save, shared_data, three_splits
from helpers.releases import pool, release, row

from accent_plugin.cli import main, parser
from accent_plugin.corpus import build as corpus_build
from accent_plugin.corpus.build import load_corpus, survey_accents
from accent_plugin.corpus.card import corpus_card_to_markdown
from accent_plugin.corpus.choices import CorpusChoices

TWO = ("us", "england")


def as_a_user(*arguments):
    """Exit code, stdout and stderr of the command, in a process of its own."""
    command = [sys.executable, "-m", "accent_plugin.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(capsys):
    """Function: the command's arguments -> exit code, stdout and stderr of its main, in this process."""

    def call(*arguments):
        try:
            code = main.main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_prepare_writes_a_dataset_dict_and_prints_its_card(tmp_path):
    source, out = release(tmp_path, 6, pool(accents=TWO)), tmp_path / "out"
    options = ("--accents", "us,england", "--max_clips_per_client", "none")
    code, stdout, stderr = as_a_user("prepare", source, "--out", out, *options)
    assert code == 0, stderr
    built = load_corpus(out)
    assert corpus_card_to_markdown(built.card) in stdout
    assert built.card["arguments"]["max_clips_per_client"] is None


def test_prepare_twice_with_other_arguments_is_refused(run, tmp_path):
    source, out = release(tmp_path, 6, pool(accents=TWO)), tmp_path / "out"
    assert run("prepare", source, "--out", out, "--accents", "us,england")[0] == 0
    code, stdout, stderr = run("prepare", source, "--out", out, "--accents", "us,england", "--seed", "7")
    assert (code, stdout) == (2, "")
    assert "seed: 1986 -> 7" in stderr


def test_every_python_option_of_prepare_is_a_command_line_option(tmp_path, monkeypatch):
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
def test_accents_lists_names_with_counts_and_labels(run, tmp_path, form):
    table = [row("a", "us"), row("a", "us", 1), row("b", "Kentish"), row("c")]
    code, stdout, _ = run("accents", release(tmp_path, 17, table), "--format", form)
    assert code == 0
    if form == "json":
        found = {each["raw"]: (each["clips"], each["clients"], each["label"]) for each in json.loads(stdout)}
        assert found == {"United States English": (2, 1, "us"), "Kentish": (1, 1, None), "": (1, 1, None)}
    elif form == "tsv":
        lines = [line.split("\t") for line in stdout.splitlines()]
        assert lines[:2] == [["clips", "speakers", "label", "value"], ["2", "1", "us", "United States English"]]
    else:
        assert ["2", "1", "us", "United", "States", "English"] in [line.split() for line in stdout.splitlines()]


def test_accents_with_a_mapping(run, tmp_path):
    (tmp_path / "more.yaml").write_text("Kentish: england\n", encoding="utf-8")
    source = release(tmp_path, 17, [row("b", "Kentish")])
    _, stdout, _ = run("accents", source, "--format", "json", "--mapping", tmp_path / "more.yaml")
    assert json.loads(stdout)[0]["label"] == "england"


def test_a_closed_pipe_is_not_an_error(tmp_path):
    source = release(tmp_path, 17, [row("a", f"Town {number} {'x' * 200}", number) for number in range(2000)])
    command = f"{sys.executable} -m accent_plugin.cli accents {source} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_check_of_a_clean_dataset_exits_with_0(tmp_path):
    data = save(tmp_path / "data", **three_splits())
    code, stdout, stderr = as_a_user("check", data, "--no_audio")
    assert (code, stderr) == (0, "")
    assert "data: 0 errors" in stdout


def test_check_exits_with_1_unless_the_kind_is_ignored(run, tmp_path):
    tables = three_splits()
    tables["test"] += rows("us", 1)
    data = save(tmp_path / "data", **tables)
    code, stdout, _ = run("check", data, "--no_audio", "--json")
    assert code == 1
    assert [f["kind"] for f in json.loads(stdout)["findings"] if f["severity"] == "error"] == ["client", "sentence"]
    assert run("check", data, "--no_audio", "--ignore", "client,sentence")[0] == 0
    assert run("check", data, "--no_audio", "--ignore", "client")[0] == 1


def test_check_writes_a_report(run, tmp_path):
    data = save(tmp_path / "data", **three_splits())
    assert run("check", data, "--report", tmp_path / "report", "--workers", "1", "--permutations", "100")[0] in (0, 1)
    assert {"check.md", "check.json", "composition.png"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_an_unknown_kind_to_ignore_is_an_error(run, tmp_path):
    code, _, stderr = run("check", tmp_path, "--ignore", "gossip")
    assert code == 2
    assert "gossip" in stderr and "client, sentence" in stderr


def test_unknown_accents_are_counted_and_printed_as_a_mapping_to_fill_in(run, tmp_path):
    table = pool(accents=TWO) + [row(f"n{k}", "NorthernIrish") for k in range(12)] + [row("o", "Oz: a b")]
    source = release(tmp_path, 6, table)
    code, stdout, _ = run("accents", source, "--format", "yaml")
    assert code == 0
    lines = [line for line in stdout.splitlines() if line.startswith('# "')]
    assert lines == ['# "NorthernIrish":   # 12 clips, 12 speakers', '# "Oz: a b":   # 1 clips, 1 speakers']
    filled = stdout.replace('# "NorthernIrish":', '"NorthernIrish": england')
    (tmp_path / "filled.yaml").write_text(filled, encoding="utf-8")
    for mapping, england in ((tmp_path / "filled.yaml", 52), ("vctk", 40)):
        out = tmp_path / f"out_{england}"
        code, stdout, _ = run("prepare", source, "--out", out, "--accents", "us,england", "--mapping", mapping)
        assert code == 0
        assert "Note: unknown accents left out: 'Oz: a b' 1;" in stdout
        assert sum(n["england"]["clips"] for n in load_corpus(out).counts.values()) == england


@pytest.mark.parametrize("command", ["accents", "prepare", "check"])
def test_a_missing_folder_is_an_error(run, tmp_path, command):
    """A mistyped path below an existing folder is not looked up on the Hub, which would take half a minute."""
    out = ["--out", tmp_path / "out"] if command == "prepare" else []
    code, stdout, stderr = run(command, tmp_path / "nowhere", *out)
    assert (code, stdout) == (2, "")
    assert "there is no folder" in stderr and "Hub:" not in stderr
    assert not (tmp_path / "out").exists()


def imported(*words):
    """The packages that a process has imported in which the command has run."""
    code = (
        "import sys; from accent_plugin.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("words", [["--help"], ["classify", "--help"], ["serve", "--help"]])
def test_help_imports_no_heavy_packages(words):
    assert not imported(*words) & {"torch", "datasets", "numpy", "speechbrain", "yaml", "onnxruntime"}


def test_each_backend_imports_only_its_own_packages(tiny_bundle, tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.zeros(16000) + 0.1, 16000)
    words = ["classify", tmp_path / "clip.wav", "--model", tiny_bundle, "--backend"]
    never = {"datasets", "pandas", "matplotlib", "sklearn", "peft", "onnx", "gradio", "fastapi"}
    onnx, torch = imported(*words, "onnx"), imported(*words, "torch")
    assert "onnxruntime" in onnx and "torch" in torch
    assert not onnx & {*never, "torch", "speechbrain", "transformers", "scipy", "sympy"}
    assert not torch & {*never, "onnxruntime"}


def test_a_sample_of_common_voice(run, tmp_path):
    source = shared_data("common_voice_6_1_sample") / "en"
    found = {each.raw: each.clips for each in survey_accents(source)}
    assert found == {"": 50, "us": 35, "indian": 5, "england": 4, "australia": 3, "newzealand": 2, "ireland": 1}
    assert run("prepare", source, "--out", tmp_path / "out")[0] == 0
    speakers = {split: n["australia"]["clients"] for split, n in load_corpus(tmp_path / "out").counts.items()}
    assert speakers == {"train": 1, "valid": 1, "test": 1}


def test_check_reads_a_mapping(run, tmp_path):
    (tmp_path / "more.yaml").write_text("Kentish: england\n", encoding="utf-8")
    data = save(tmp_path / "data", **three_splits(("us", "Kentish")))
    code, stdout, stderr = run("check", data, "--no_audio", "--mapping", tmp_path / "more.yaml")
    assert code == 0, stderr
    assert "england" in stdout and "Kentish" not in stdout


@pytest.mark.parametrize("command", ["prepare", "check"])
def test_fewer_than_one_worker_is_an_error(run, tmp_path, command):
    data = save(tmp_path / "data", **three_splits())
    out = ["--out", tmp_path / "out", "--accents", "us,england"] if command == "prepare" else []
    code, _, stderr = run(command, data, "--workers", "-1", *out)
    assert code == 2 and "workers is -1; give 1 or more" in stderr


def test_a_report_inside_the_data_is_refused(run, tmp_path):
    data = save(tmp_path / "data", **three_splits())
    code, _, stderr = run("check", data, "--no_audio", "--report", data / "report")
    assert code == 2 and "inside the data folder" in stderr
    assert not (data / "report").exists()


def test_control_characters_in_values_are_escaped(run, tmp_path):
    table = tmp_path / "clips.csv"
    table.write_text('path,accent\na.wav,"Bell\x07\tand\nline"\n', encoding="utf-8")
    _, stdout, _ = run("accents", table, "--format", "tsv")
    assert stdout.splitlines()[1] == "1\t0\t(unknown accent)\tBell\\x07\\tand\\nline"


def test_a_limit_that_is_not_a_number_is_an_error(run, tmp_path):
    code, _, stderr = run("prepare", tmp_path, "--out", tmp_path / "out", "--max_clips_per_client", "many")
    assert code == 2 and "'many' is not a whole number or none" in stderr


def test_a_closed_stdout_is_an_error(tmp_path):
    command = f"{sys.executable} -m accent_plugin.cli summarise {tmp_path} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    message = "stdout is closed, so results would be lost: open it, or redirect it to /dev/null\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_with_stderr_closed_no_message_goes_to_stdout(tmp_path):
    command = f"{sys.executable} -m accent_plugin.cli summarise {tmp_path} 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "x", "--model", "m"], "interrupted"),
        (["classify", "x", "--model", "m", "--output", "o", "--format", "table"], "interrupted"),
        (["classify", "x", "--model", "m", "--output", "o"], "interrupted: run the same command again to resume"),
        (["prepare", "x", "--out", "o"], "interrupted: run the same command again to resume"),
        (["summarise", "x"], "interrupted"),
    ],
)
def test_an_interrupted_command_says_whether_it_can_be_resumed(arguments, message, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    for module in (main, parser):
        monkeypatch.setattr(module, f"run_{arguments[0]}", interrupted, raising=False)
    assert main.main(arguments) == 130
    assert capsys.readouterr().err == f"{message}\n"


def test_control_characters_in_errors_are_escaped(tmp_path, capsys):
    assert main.main(["summarise", str(tmp_path / "\x1b[2J")]) == 2
    assert "\\x1b[2J" in capsys.readouterr().err


def test_help_of_classify_lists_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main.main(["classify", "--help"])
    printed = capsys.readouterr().out
    assert "exit codes: 0" in printed and "remove their lines" in printed


def test_log_messages_go_to_the_current_stderr(monkeypatch):
    """A program that calls `main` may replace and close `sys.stderr` between two calls."""
    # Training in the same process gives the root logger handlers of SpeechBrain's.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    first, second = io.StringIO(), io.StringIO()
    for stream in (first, second):
        monkeypatch.setattr(sys, "stderr", stream)
        main._log_to_stderr()
        logging.getLogger("accent_plugin.somewhere").info("a message")
    assert (first.getvalue(), second.getvalue()) == ("a message\n", "a message\n")


@pytest.mark.parametrize("word", ["\u2014model", "-model", "\u2013\u2013model=x", "model=x"])
def test_an_option_with_other_dashes_is_an_error(word, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["classify", "clip.wav", "--model", "y", word, "x"])
    assert ended.value.code == 2
    assert f"{word!r} does not begin with two hyphens: type --model" in capsys.readouterr().err


def test_a_file_whose_name_looks_like_an_option_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model=x").touch()
    arguments = parser.make_parser().parse_args(["classify", "model=x", "--model", "y"])
    assert arguments.files == ["model=x"]
