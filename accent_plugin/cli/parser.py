"""The parser of `accent-plugin`."""

import argparse

import accent_plugin
from accent_plugin.cli.data import run_accents, run_check, run_demo, run_prepare, split_list
from accent_plugin.cli.models import EXPORTS, run_classify, run_evaluate, run_export, run_import, run_push, run_serve
from accent_plugin.cli.runs import run_compare, run_summarise
from accent_plugin.versions import installed_versions


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print("\n".join(f"{name} {version}" for name, version in installed_versions().items()))
        parser.exit()


def make_parser():
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(prog="accent-plugin", description=accent_plugin.__doc__)
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="show the versions to quote in a bug report"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "classify",
        help="classify the accent of audio files",
        epilog="exit codes: 0 on success; 1 if a file could not be classified; 2 for wrong arguments, or an --output "
        "that was written by something else; 130 when interrupted. A second run with the same --output does not try "
        "failed files again: to retry them, remove their lines first.",
    )
    command.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="wav, flac, mp3, ogg, opus, ...")
    command.add_argument("--model", required=True, metavar="BUNDLE_OR_HF", help=_MODEL)
    _add_labels_option(command)
    command.add_argument(
        "--format", choices=("table", "jsonl", "csv"), help="(default: by the output's suffix, or table)"
    )
    command.add_argument(
        "--output", metavar="FILE", help="append results to this file; run again to resume (default: stdout)"
    )
    command.add_argument(
        "--segments",
        metavar="FILE",
        help="answer each segment, and each speaker from all of theirs: RTTM, CSV or TSV (start, end, and optionally "
        "speaker, channel, file), or a Praat TextGrid; --output is then written when all answers are there",
    )
    command.add_argument(
        "--channels",
        choices=("mix", "each"),
        default="mix",
        help="average the channels, or answer each one, as in telephone calls (default: mix)",
    )
    _add_decision_options(command)
    _add_device_options(command)
    _add_workers_option(command)
    command.set_defaults(run_command=run_classify)

    command = commands.add_parser(
        "serve",
        help="serve a web page with a microphone and an HTTP API for a model",
        epilog="Ctrl-C or SIGTERM stops the server once the requests in progress are answered.",
    )
    command.add_argument("--model", required=True, metavar="BUNDLE_OR_HF", help=_MODEL)
    _add_labels_option(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    command.add_argument("--port", type=int, default=7860, help="0 chooses a free port (default: 7860)")
    command.add_argument(
        "--token", help="secret that every request must carry (default: $ACCENT_PLUGIN_TOKEN, or none)"
    )
    command.add_argument("--no_page", action="store_true", help="serve the API only, without Gradio")
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    command.add_argument("--max_bytes", type=int, help="size limit of one request (default: 50000000)")
    command.add_argument("--max_seconds", type=float, help="limit on the length of one file (default: 600)")
    command.add_argument("--max_files", type=int, help="limit on the files in one request (default: 16)")
    command.add_argument("--max_requests", type=int, help="requests answered at the same time (default: 16)")
    command.add_argument("--max_queue", type=int, help="requests that may wait; more are refused (default: 64)")
    command.add_argument("--timeout", type=float, help="time limit of one request in seconds (default: 120)")
    _add_decision_options(command)
    _add_device_options(command)
    command.set_defaults(run_command=run_serve)

    command = commands.add_parser("evaluate", help="evaluate a model on labelled speech, or compare two models")
    command.add_argument(
        "--model", required=True, metavar="BUNDLE_OR_HF", action="append", help=f"{_MODEL}; may be given twice"
    )
    _add_labels_option(command)
    command.add_argument(
        "--data",
        required=True,
        metavar="DATASETDICT_OR_MANIFEST",
        help="labelled speech: the test split of a DatasetDict, or a whole manifest",
    )
    command.add_argument(
        "--split",
        help="splits of the DatasetDict, separated by commas (default: the test split, also if it is called eval)",
    )
    command.add_argument(
        "--mapping", metavar="YAML", help="more accent names, one per line, such as 'Geordie: england'"
    )
    _add_column_options(command, ("audio", "accent", "client", "gender", "age"))
    command.add_argument("--out", default="evaluation", help="folder of the report (default: evaluation)")
    _add_device_options(command)
    _add_workers_option(command)
    command.set_defaults(run_command=run_evaluate)

    command = commands.add_parser(
        "export", help="export a trained model as a bundle, to Hugging Face's transformers or to ONNX"
    )
    command.add_argument(
        "run", metavar="RUN_OR_BUNDLE", help="output folder of a finished run, or a bundle unless --to is bundle"
    )
    command.add_argument(
        "--to",
        default="bundle",
        choices=tuple(EXPORTS),
        help="bundle: exports the run's best checkpoint and executes its YAML, so use it on your own runs only "
        "(default: bundle)",
    )
    command.add_argument(
        "--out", help="folder to write (default: a folder named after the format, in RUN or beside BUNDLE)"
    )
    command.add_argument("--device", help="device for --to bundle, such as cuda:0 (default: cpu)")
    command.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="precision of the ONNX model (default: fp32)",
    )
    command.add_argument(
        "--data", metavar="DATASETDICT_OR_MANIFEST", help="labelled speech to compare a lower precision with fp32"
    )
    command.add_argument("--split", help="splits of that DatasetDict, separated by commas (default: validation)")
    command.add_argument(
        "--unchecked", action="store_true", help="keep a lower precision, however much accuracy it loses"
    )
    command.set_defaults(run_command=run_export)

    command = commands.add_parser("import", help="convert a Hugging Face transformers classifier to a bundle")
    command.add_argument("source", metavar="HF_FOLDER", help="folder, or name on the Hub")
    command.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write")
    _add_labels_option(command)
    command.set_defaults(run_command=run_import)

    command = commands.add_parser("push", help="upload a bundle to the Hugging Face Hub")
    command.add_argument("run", metavar="RUN", help="output folder of a finished run, or a bundle")
    command.add_argument("repo", metavar="USER/NAME")
    command.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    command.set_defaults(run_command=run_push)

    command = commands.add_parser("demo", help="create a synthetic corpus and a tiny encoder to try the recipe with")
    command.add_argument("--out", default="data/demo", help="folder to write (default: data/demo)")
    command.set_defaults(run_command=run_demo)

    command = commands.add_parser(
        "completion", help='print a completion script: eval "$(accent-plugin completion bash)"'
    )
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    command.set_defaults(run_command=_completion)

    command = commands.add_parser("prepare", help="convert a corpus, such as a Common Voice release, to a DatasetDict")
    command.add_argument(
        "source", help="a release folder, a DatasetDict, one folder per accent, a CSV file or a name on the Hub"
    )
    command.add_argument(
        "--out", required=True, help="folder to write; apart from the Hugging Face cache, nothing is written elsewhere"
    )
    command.add_argument(
        "--accents", default="three", help="three, sixteen, or comma-separated labels (default: three)"
    )
    _add_corpus_options(command)
    command.add_argument(
        "--split",
        default="client",
        choices=("client", "official", "random"),
        help="client: no speaker in two splits; official: the splits of the source; random: speakers are in several "
        "splits (default: client)",
    )
    command.add_argument(
        "--seed", type=int, default=1986, help="seed of the splits and of the clips drawn (default: 1986)"
    )
    command.add_argument("--valid_fraction", type=float, default=0.1, help="fraction of the speakers (default: 0.1)")
    command.add_argument("--test_fraction", type=float, default=0.1, help="fraction of the speakers (default: 0.1)")
    command.add_argument(
        "--max_clips_per_client", type=_integer_or_none, default=30, help="clips per speaker, or none (default: 30)"
    )
    command.add_argument("--min_up_votes", type=int, help="votes of Common Voice's listeners")
    command.add_argument("--max_down_votes", type=int, help="votes of Common Voice's listeners")
    command.add_argument("--min_seconds", type=float, help="needs durations in the source")
    command.add_argument("--max_seconds", type=float, help="needs durations in the source")
    command.add_argument(
        "--balance_gender", action="store_true", help="take as many clips of women as of men in each accent"
    )
    command.add_argument(
        "--shared_sentences",
        dest="disjoint_sentences",
        action="store_false",
        help="allow a sentence in several splits: for corpora in which everybody reads the same text",
    )
    command.add_argument(
        "--embed", action="store_true", help="copy the audio into the DatasetDict, so that it can be moved"
    )
    command.add_argument("--workers", type=int, help="threads that copy audio (default: one per core)")
    command.set_defaults(run_command=run_prepare)

    command = commands.add_parser("accents", help="list the accent names in a corpus with their counts and labels")
    command.add_argument("source", help="see prepare")
    _add_corpus_options(command)
    command.add_argument("--format", default="table", choices=("table", "tsv", "json"), help="(default: table)")
    command.set_defaults(run_command=run_accents)

    command = commands.add_parser(
        "check", help="audit a DatasetDict: leaks, duplicates, imbalance, broken files, confounds"
    )
    command.add_argument("data", metavar="DATASETDICT", help="folder of a DatasetDict")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--report", metavar="DIR", help="folder for check.md, check.json and figures")
    command.add_argument(
        "--ignore", metavar="KINDS", action="append", default=[], help="comma-separated kinds of findings to accept"
    )
    command.add_argument("--no_audio", action="store_true", help="check the text only: seconds instead of hours")
    command.add_argument(
        "--permutations", type=int, default=199, help="permutations in the confound test (default: 199)"
    )
    command.add_argument("--seed", type=int, default=1986, help="seed of the confound test (default: 1986)")
    command.add_argument("--workers", type=int, help="decoding processes (default: one per core)")
    command.add_argument(
        "--mapping", metavar="YAML", help="more accent names, one per line, such as 'Geordie: england'"
    )
    _add_column_options(command, ("accent", "client", "sentence", "audio"))
    command.set_defaults(run_command=run_check)

    command = commands.add_parser(
        "compare", help="compare two runs on the same clips: paired differences with confidence intervals"
    )
    command.add_argument(
        "run",
        nargs=2,
        metavar="RUN",
        help="output folder of a finished run; differences are the second minus the first",
    )
    command.add_argument("--out", default="comparison", help="folder for comparison.md and comparison.json")
    command.set_defaults(run_command=run_compare)

    command = commands.add_parser(
        "summarise", help="summarise several runs: mean, standard deviation and each run's metrics"
    )
    command.add_argument("run", nargs="+", metavar="RUN", help="output folder of a finished run")
    command.add_argument("--out", default="summary", help="folder for summary.md and summary.json")
    command.set_defaults(run_command=run_summarise)
    return parser


def _completion(arguments):
    import shtab

    print(shtab.complete(make_parser(), shell=arguments.shell))


_MODEL = "bundle folder, or folder or Hub name of a Hugging Face transformers classifier"


def _add_labels_option(command):
    command.add_argument(
        "--labels",
        metavar="YAML",
        help="accents of the Hugging Face model's classes, one per line, such as 'LABEL_0: us'",
    )


def _add_decision_options(command):
    command.add_argument(
        "--window_seconds", type=float, help="cut longer recordings into windows of this length (default: 10)"
    )
    command.add_argument("--hop_seconds", type=float, help="step from one window to the next (default: half a window)")
    command.add_argument("--batch_seconds", type=float, help="seconds of audio in one forward pass")
    command.add_argument("--min_probability", type=float, help="abstain below this probability")
    command.add_argument(
        "--max_risk", type=float, help="abstain as often as keeps the error rate on the validation set below this"
    )
    command.add_argument(
        "--min_coverage", type=float, help="abstain, but answer this fraction of clips like those of the validation set"
    )


def _add_device_options(command):
    command.add_argument(
        "--backend", choices=("torch", "onnx"), help="(default: the one that the model was exported for)"
    )
    command.add_argument("--device", help="such as cpu or cuda:0 (default: the fastest available)")
    command.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "auto"), help="(default: fp32)")


def _add_workers_option(command):
    command.add_argument("--workers", type=int, help="decoding threads (default: one per core)")


def _add_corpus_options(command):
    command.add_argument(
        "--mapping", metavar="YAML", help="more accent names, one per line, such as 'Geordie: england'"
    )
    command.add_argument(
        "--compound",
        default="drop",
        choices=("drop", "agree"),
        help="what to do with clips that name several accents; agree keeps a clip if all map to the same label "
        "(default: drop)",
    )
    command.add_argument(
        "--files", type=split_list, help="comma-separated tables of a release (default: validated.tsv)"
    )
    command.add_argument(
        "--client_pattern", help="for one folder per accent: regular expression whose group is the speaker"
    )
    command.add_argument("--config", help="configuration of a Hub dataset")
    _add_column_options(command, ("path", "accent", "client", "sentence", "audio"))


def _add_column_options(command, roles):
    for role in roles:
        command.add_argument(f"--{role}_column", metavar="NAME", help="(default: found by name)")


def _integer_or_none(text):
    try:
        return None if text.lower() in ("none", "null") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or none") from None
