"""The parser of `accent-plugin`."""

import argparse
import os
import sys

import accent_plugin
from accent_plugin.cli.data import run_accents, run_check, run_demo, run_prepare, split_list
from accent_plugin.cli.models import EXPORTS, run_classify, run_evaluate, run_export, run_import, run_push, run_serve
from accent_plugin.cli.runs import run_compare, run_summarise
from accent_plugin.errors import misspelt_option
from accent_plugin.versions import installed_versions

_MODEL = "bundle folder, or folder or Hub name of a Hugging Face transformers classifier"
_DATA = "DATASETDICT_OR_MANIFEST"


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print("\n".join(f"{name} {version}" for name, version in installed_versions().items()))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Refuses options with other dashes, which argparse would take for files."""

    def parse_known_args(self, args=None, namespace=None):
        names = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        for word in sys.argv[1:] if args is None else args:
            problem = misspelt_option(word, names)
            if problem and not os.path.exists(word):
                self.error(problem)
        return super().parse_known_args(args, namespace)


def make_parser():
    """Make the parser of all commands."""
    parser = _Parser(prog="accent-plugin", description=accent_plugin.__doc__)
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="show the versions to quote in a bug report"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run, name, help, **options):
        parser = commands.add_parser(name, help=help, **options)
        parser.set_defaults(run_command=run)
        return parser.add_argument

    _add_model_commands(command)
    _add_exchange_commands(command)
    _add_data_commands(command)
    _add_run_commands(command)
    add = command(_completion, "completion", 'print a completion script: eval "$(accent-plugin completion bash)"')
    add("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def _add_model_commands(command):
    add = command(
        run_classify,
        "classify",
        "classify the accent of audio files",
        epilog="exit codes: 0 on success; 1 if a file could not be classified; 2 for wrong arguments, or an --output "
        "that another program or model wrote; 130 if interrupted. A second run with the same --output does not try "
        "failed files again; to retry them, remove their lines first.",
    )
    add(
        "files",
        nargs="+",
        metavar="FILE_OR_FOLDER",
        help="audio file, or folder of audio files: wav, flac, mp3, ogg, opus, aiff or au",
    )
    add("--model", required=True, metavar="BUNDLE_OR_HF", help=_MODEL)
    _add_labels_option(add)
    add("--format", choices=("table", "jsonl", "csv"), help="(default: by the output's suffix, or table)")
    add("--output", metavar="FILE", help="append results to this file; run again to resume (default: stdout)")
    add(
        "--segments",
        metavar="FILE",
        help="classify each segment in this file, and each speaker from all their segments: RTTM, CSV or TSV (start, "
        "end, and optionally speaker, channel, file), or a Praat TextGrid; --output is written at the end",
    )
    channels = "average the channels, or classify each one, as in telephone calls (default: mix)"
    add("--channels", choices=("mix", "each"), default="mix", help=channels)
    _add_decision_options(add)
    _add_device_options(add)
    _add_workers_option(add)

    add = command(
        run_serve,
        "serve",
        "serve a web page with a microphone and an HTTP API for a model",
        epilog="Ctrl-C or SIGTERM stops the server once the requests in progress are answered.",
    )
    add("--model", required=True, metavar="BUNDLE_OR_HF", help=_MODEL)
    _add_labels_option(add)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=7860, help="0 chooses a free port (default: 7860)")
    add("--token", help="secret that every request must carry (default: $ACCENT_PLUGIN_TOKEN, or none)")
    add("--no_page", action="store_true", help="serve the API only, without Gradio")
    add("--open", action="store_true", help="open the page in a browser")
    add("--max_bytes", type=int, help="size limit of one request in bytes (default: 50000000)")
    add("--max_seconds", type=float, help="limit on the length of one file in seconds (default: 600)")
    add("--max_files", type=int, help="limit on the files in one request (default: 16)")
    add("--max_requests", type=int, help="requests answered at the same time (default: 16)")
    add("--max_queue", type=int, help="waiting requests; more are refused (default: 64)")
    add("--timeout", type=float, help="time limit of one request in seconds (default: 120)")
    _add_decision_options(add)
    _add_device_options(add)

    add = command(run_evaluate, "evaluate", "evaluate a model on labelled speech, or compare two models")
    add(
        "--model",
        required=True,
        metavar="BUNDLE_OR_HF",
        action="append",
        help=f"{_MODEL}; give the option twice to compare two models",
    )
    _add_labels_option(add)
    add("--data", required=True, metavar=_DATA, help="labelled speech: a DatasetDict's test split, or a whole manifest")
    add("--split", help="comma-separated splits of the DatasetDict (default: the test split, also if called eval)")
    _add_mapping_option(add)
    _add_column_options(add, ("audio", "accent", "client", "gender", "age"))
    add("--out", default="evaluation", help="folder of the report (default: evaluation)")
    _add_device_options(add)
    _add_workers_option(add)


def _add_exchange_commands(command):
    add = command(run_export, "export", "export a trained model as a bundle, to Hugging Face's transformers or to ONNX")
    add("run", metavar="RUN_OR_BUNDLE", help="output folder of a finished run, or a bundle unless --to is bundle")
    add(
        "--to",
        default="bundle",
        choices=tuple(EXPORTS),
        help="bundle: exports the run's best checkpoint and executes its YAML, so use it on your own runs only "
        "(default: bundle)",
    )
    add("--out", help="folder to write (default: a folder named after the format, in RUN or beside BUNDLE)")
    add("--device", help="device for --to bundle, such as cuda:0 (default: cpu)")
    precisions = ("fp32", "fp16", "bf16", "int8")
    add("--precision", default="fp32", choices=precisions, help="precision of the ONNX model (default: fp32)")
    add("--data", metavar=_DATA, help="labelled speech on which to compare a lower precision with fp32")
    add("--split", help="comma-separated splits of that DatasetDict (default: validation)")
    add("--unchecked", action="store_true", help="keep a lower precision, however much accuracy it loses")

    add = command(run_import, "import", "convert a Hugging Face transformers classifier to a bundle")
    add("source", metavar="HF_FOLDER", help="folder, or name on the Hub")
    add("--out", required=True, metavar="BUNDLE", help="folder to write")
    _add_labels_option(add)

    add = command(run_push, "push", "upload a bundle to the Hugging Face Hub")
    add("run", metavar="RUN", help="output folder of a finished run, or a bundle")
    add("repo", metavar="USER/NAME")
    add("--public", action="store_true", help="make the repository public (default: private)")


def _add_data_commands(command):
    add = command(run_demo, "demo", "create a synthetic corpus and a tiny encoder to try the recipe with")
    add("--out", default="data/demo", help="folder to write (default: data/demo)")

    add = command(run_prepare, "prepare", "convert a corpus, such as a Common Voice release, to a DatasetDict")
    add("source", help="a release folder, a DatasetDict, one folder per accent, a CSV file or a name on the Hub")
    add("--out", required=True, help="folder to write; nothing else is written, except the Hugging Face cache")
    add("--accents", default="three", help="three, sixteen, or comma-separated labels (default: three)")
    _add_corpus_options(add)
    add(
        "--split",
        default="client",
        choices=("client", "official", "random"),
        help="client: no speaker in two splits; official: the splits of the source; random: speakers may be in "
        "several splits (default: client)",
    )
    add("--seed", type=int, default=1986, help="seed of the splits and of the choice of clips (default: 1986)")
    add("--valid_fraction", type=float, default=0.1, help="fraction of the speakers (default: 0.1)")
    add("--test_fraction", type=float, default=0.1, help="fraction of the speakers (default: 0.1)")
    add(
        "--max_clips_per_client",
        type=_integer_or_none,
        default=30,
        help="maximum number of clips per speaker, or none (default: 30)",
    )
    add("--min_up_votes", type=int, help="minimum number of Common Voice's up-votes")
    add("--max_down_votes", type=int, help="maximum number of Common Voice's down-votes")
    add("--min_seconds", type=float, help="minimum duration of a clip; needs durations in the source")
    add("--max_seconds", type=float, help="maximum duration of a clip; needs durations in the source")
    add(
        "--max_rate_deviation",
        type=float,
        metavar="DEVIATIONS",
        help="drop clips that are far too long or too short for their sentence (blank, cut, read twice): the limit in "
        "robust standard deviations, usually 3.5",
    )
    add("--balance_gender", action="store_true", help="take as many clips of women as of men in each accent")
    add(
        "--shared_sentences",
        dest="disjoint_sentences",
        action="store_false",
        help="allow a sentence in several splits: for corpora in which everybody reads the same text",
    )
    add("--embed", action="store_true", help="copy the audio into the DatasetDict, so that it can be moved")
    add("--workers", type=int, help="threads that copy audio (default: one per core)")

    add = command(run_accents, "accents", "list the accent names in a corpus with their counts and labels")
    add("source", help="as for prepare")
    _add_corpus_options(add)
    formats = ("table", "tsv", "json", "yaml")
    add("--format", default="table", choices=formats, help="yaml: a file to fill in for --mapping (default: table)")

    add = command(run_check, "check", "audit a DatasetDict: leaks, duplicates, imbalance, broken files, confounds")
    add("data", metavar="DATASETDICT", help="folder of a DatasetDict")
    add("--json", action="store_true", help="print JSON")
    add("--report", metavar="DIR", help="folder for check.md, check.json and figures")
    add("--ignore", metavar="KINDS", action="append", default=[], help="comma-separated kinds of findings to accept")
    add("--no_audio", action="store_true", help="check only the text, which takes seconds instead of hours")
    add("--permutations", type=int, default=199, help="permutations in the confound test (default: 199)")
    add("--seed", type=int, default=1986, help="seed of the confound test (default: 1986)")
    add("--workers", type=int, help="decoding processes (default: one per core)")
    _add_mapping_option(add)
    _add_column_options(add, ("accent", "client", "sentence", "audio"))


def _add_run_commands(command):
    add = command(run_compare, "compare", "compare two runs on the same clips, with confidence intervals")
    run = "output folder of a finished run"
    add("run", nargs=2, metavar="RUN", help=f"{run}; differences are the second minus the first")
    add("--out", default="comparison", help="folder for comparison.md and comparison.json (default: comparison)")

    add = command(run_summarise, "summarise", "summarise several runs: mean, standard deviation and each run's metrics")
    add("run", nargs="+", metavar="RUN", help=run)
    add("--out", default="summary", help="folder for summary.md and summary.json (default: summary)")


def _completion(arguments):
    import shtab

    print(shtab.complete(make_parser(), shell=arguments.shell))


def _add_labels_option(add):
    text = "accents of the Hugging Face model's classes, one per line, such as 'LABEL_0: us'"
    add("--labels", metavar="YAML", help=text)


def _add_decision_options(add):
    add("--window_seconds", type=float, help="cut longer recordings into windows of this length (default: 10)")
    add("--hop_seconds", type=float, help="step from one window to the next (default: half a window)")
    add("--batch_seconds", type=float, help="seconds of audio in one forward pass (default: 20 on a CPU, 60 on a GPU)")
    add("--min_probability", type=float, help="abstain below this probability")
    add("--max_risk", type=float, help="abstain below the threshold that keeps the validation error rate at this value")
    add("--min_coverage", type=float, help="abstain below the threshold that answers this fraction of validation clips")


def _add_device_options(add):
    add("--backend", choices=("torch", "onnx"), help="(default: onnx on a CPU, if the model has a graph)")
    add("--device", help="such as cpu or cuda:0 (default: the fastest available)")
    add("--precision", default="fp32", choices=("fp32", "bf16", "auto"), help="of the torch backend (default: fp32)")


def _add_workers_option(add):
    add("--workers", type=int, help="decoding threads (default: one per core)")


def _add_mapping_option(add):
    add(
        "--mapping",
        metavar="CORPUS_OR_YAML",
        help="more accent names: those of a corpus (commonaccent, edacc, globe, l2arctic, parler, slr83, vctk or "
        "voxprofile), or a file with one per line, such as 'Geordie: england'",
    )


def _add_corpus_options(add):
    _add_mapping_option(add)
    add(
        "--compound",
        default="drop",
        choices=("drop", "agree"),
        help="what to do with clips that name several accents; agree keeps a clip if all map to the same label "
        "(default: drop)",
    )
    add("--files", type=split_list, help="comma-separated tables of a release (default: validated.tsv)")
    add("--client_pattern", help="for one folder per accent: regular expression whose group is the speaker")
    add("--config", help="configuration of a Hub dataset")
    _add_column_options(add, ("path", "accent", "client", "sentence", "audio"))


def _add_column_options(add, roles):
    for role in roles:
        add(f"--{role}_column", metavar="NAME", help="(default: found by name)")


def _integer_or_none(text):
    try:
        return None if text.lower() in ("none", "null") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or none") from None
