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
    """Make the parser of all verbs."""
    parser = argparse.ArgumentParser(prog="accent-plugin", description=accent_plugin.__doc__)
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="show versions that matter in a bug report"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser(
        "classify",
        help="which accent files have, by somebody's model",
        epilog="exit code: 0; 1 when a file could not be classified; 2 for a wrong command or an output of something "
        "else; 130 when interrupted. A second run with the same --output does not try failed files again: remove "
        "their lines first.",
    )
    verb.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="wav, flac, mp3, ogg, opus, ...")
    verb.add_argument("--model", required=True, metavar="BUNDLE_OR_HF", help=_MODEL)
    _add_labels(verb)
    verb.add_argument("--format", choices=("table", "jsonl", "csv"), help="(default: by the output's ending, or table)")
    verb.add_argument("--output", metavar="FILE", help="append answers here; a second run goes on (default: stdout)")
    _add_deciding(verb)
    _add_running(verb)
    _add_workers(verb)
    verb.set_defaults(do=run_classify)

    verb = verbs.add_parser(
        "serve",
        help="a page to speak to, and an HTTP API, for somebody's model",
        epilog="A signal (Ctrl-C, SIGTERM) ends it, after what is being answered.",
    )
    verb.add_argument("--model", required=True, metavar="BUNDLE_OR_HF", help=_MODEL)
    _add_labels(verb)
    verb.add_argument("--host", default="127.0.0.1", help="address to bind to (default: 127.0.0.1, this machine alone)")
    verb.add_argument("--port", type=int, default=7860, help="0 for any that is free (default: 7860)")
    verb.add_argument("--token", help="secret that everybody has to give (default: of ACCENT_PLUGIN_TOKEN, or none)")
    verb.add_argument("--no_page", action="store_true", help="the API alone; Gradio is not needed")
    verb.add_argument("--open", action="store_true", help="show the page in a browser")
    verb.add_argument("--max_bytes", type=int, help="of one request (default: 50000000)")
    verb.add_argument("--max_seconds", type=float, help="of audio in one file (default: 600)")
    verb.add_argument("--max_files", type=int, help="in one request (default: 16)")
    verb.add_argument("--max_requests", type=int, help="answered at the same time (default: 16)")
    verb.add_argument("--max_queue", type=int, help="requests that wait; more are refused (default: 64)")
    verb.add_argument("--timeout", type=float, help="seconds for one request (default: 120)")
    _add_deciding(verb)
    _add_running(verb)
    verb.set_defaults(do=run_serve)

    verb = verbs.add_parser("evaluate", help="the full report of a bundle on labelled speech; of two, the difference")
    verb.add_argument(
        "--model", required=True, metavar="BUNDLE_OR_HF", action="append", help=f"{_MODEL}; may be given twice"
    )
    _add_labels(verb)
    verb.add_argument("--data", required=True, metavar="DATASETDICT_OR_MANIFEST", help="its test split, or all of it")
    verb.add_argument("--split", help="of the DatasetDict (default: test)")
    verb.add_argument("--mapping", metavar="YAML", help="more spellings: 'Geordie: england' in each line")
    _add_columns(verb, ("audio", "accent", "client", "gender", "age"))
    verb.add_argument("--out", default="evaluation", help="folder of the report (default: evaluation)")
    _add_running(verb)
    _add_workers(verb)
    verb.set_defaults(do=run_evaluate)

    verb = verbs.add_parser("export", help="write a trained model anew as a bundle, or for Hugging Face's transformers")
    verb.add_argument("run", metavar="RUN_OR_BUNDLE", help="output folder of a finished run, or, with --to, a bundle")
    verb.add_argument(
        "--to",
        default="bundle",
        choices=tuple(EXPORTS),
        help="bundle: from the run's checkpoint; its YAML is run, so it must be your own (default: bundle)",
    )
    verb.add_argument("--out", help="(default: bundle, or the form's name, in RUN or beside BUNDLE)")
    verb.add_argument("--device", help="of a run that is made a bundle, such as cuda:0 (default: cpu)")
    verb.add_argument(
        "--precision", default="fp32", choices=("fp32", "fp16", "bf16", "int8"), help="of ONNX (default: fp32)"
    )
    verb.add_argument(
        "--data", metavar="DATASETDICT_OR_MANIFEST", help="labelled speech, on which a smaller precision is compared"
    )
    verb.add_argument("--unchecked", action="store_true", help="keep a smaller precision whatever it loses")
    verb.set_defaults(do=run_export)

    verb = verbs.add_parser("import", help="write a classifier of Hugging Face's transformers as a bundle")
    verb.add_argument("source", metavar="HF_FOLDER", help="folder or name on the Hub")
    verb.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write")
    _add_labels(verb)
    verb.set_defaults(do=run_import)

    verb = verbs.add_parser("push", help="upload a bundle to the Hugging Face Hub")
    verb.add_argument("run", metavar="RUN", help="output folder of a finished run, or a bundle")
    verb.add_argument("repo", metavar="USER/NAME")
    verb.add_argument("--public", action="store_true", help="for all to see (default: private)")
    verb.set_defaults(do=run_push)

    verb = verbs.add_parser("demo", help="make the built-in corpus of synthetic speech and a tiny encoder")
    verb.add_argument("--out", default="data/demo", help="(default: data/demo)")
    verb.set_defaults(do=run_demo)

    verb = verbs.add_parser("completion", help='print shell completion: eval "$(accent-plugin completion bash)"')
    verb.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    verb.set_defaults(do=_completion)

    verb = verbs.add_parser("prepare", help="a corpus, such as a Common Voice release, into a DatasetDict")
    verb.add_argument(
        "source", help="a release folder, a DatasetDict, a folder per accent, a CSV file, a name on the Hub"
    )
    verb.add_argument(
        "--out",
        required=True,
        help="folder to write; nothing is written elsewhere, but for the cache of the Hub's library",
    )
    verb.add_argument("--accents", default="three", help="three, sixteen, or labels with commas (default: three)")
    _add_reading(verb)
    verb.add_argument(
        "--split",
        default="client",
        choices=("client", "official", "random"),
        help="client: none in two splits; official: the source's own; random: leaky (default: client)",
    )
    verb.add_argument("--seed", type=int, default=1986, help="of splits and draws (default: 1986)")
    verb.add_argument("--valid_fraction", type=float, default=0.1, help="share of clients (default: 0.1)")
    verb.add_argument("--test_fraction", type=float, default=0.1, help="share of clients (default: 0.1)")
    verb.add_argument(
        "--max_clips_per_client", type=_integer_or_none, default=30, help="a number, or none (default: 30)"
    )
    verb.add_argument("--min_up_votes", type=int, help="of Common Voice's listeners")
    verb.add_argument("--max_down_votes", type=int, help="of Common Voice's listeners")
    verb.add_argument("--min_seconds", type=float, help="where the source tells durations")
    verb.add_argument("--max_seconds", type=float, help="where the source tells durations")
    verb.add_argument("--balance_gender", action="store_true", help="as many clips of women as of men in each accent")
    verb.add_argument(
        "--shared_sentences",
        dest="disjoint_sentences",
        action="store_false",
        help="let a sentence be in several splits: where everybody reads the same text",
    )
    verb.add_argument("--embed", action="store_true", help="copy the audio, so that the result can be moved")
    verb.add_argument("--workers", type=int, help="threads that copy audio (default: one per core)")
    verb.set_defaults(do=run_prepare)

    verb = verbs.add_parser("accents", help="what a corpus calls its accents, how often, and what each maps to")
    verb.add_argument("source", help="as for prepare")
    _add_reading(verb)
    verb.add_argument("--format", default="table", choices=("table", "tsv", "json"), help="(default: table)")
    verb.set_defaults(do=run_accents)

    verb = verbs.add_parser("check", help="audit any DatasetDict: leaks, duplicates, balance, broken files, channels")
    verb.add_argument("data", metavar="DATASETDICT", help="folder of a DatasetDict")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--report", metavar="DIR", help="write check.md, check.json and pictures")
    verb.add_argument("--ignore", metavar="KINDS", action="append", default=[], help="findings that are accepted")
    verb.add_argument("--no_audio", action="store_true", help="look at the text only: seconds instead of hours")
    verb.add_argument("--permutations", type=int, default=199, help="of the channel test (default: 199)")
    verb.add_argument("--seed", type=int, default=1986, help="of the channel test (default: 1986)")
    verb.add_argument("--workers", type=int, help="processes that decode (default: one per core)")
    verb.add_argument("--mapping", metavar="YAML", help="more spellings: 'Geordie: england' in each line")
    _add_columns(verb, ("accent", "client", "sentence", "audio"))
    verb.set_defaults(do=run_check)

    verb = verbs.add_parser("compare", help="two runs on the same clips: paired differences with intervals by speaker")
    verb.add_argument("run", nargs=2, metavar="RUN", help="output folder of a finished run; the second minus the first")
    verb.add_argument("--out", default="comparison", help="folder for comparison.md and comparison.json")
    verb.set_defaults(do=run_compare)

    verb = verbs.add_parser("summarise", help="several runs: mean and standard deviation, each run listed")
    verb.add_argument("run", nargs="+", metavar="RUN", help="output folder of a finished run")
    verb.add_argument("--out", default="summary", help="folder for summary.md and summary.json")
    verb.set_defaults(do=run_summarise)
    return parser


def _completion(arguments):
    import shtab

    print(shtab.complete(make_parser(), shell=arguments.shell))


_MODEL = "folder of a bundle, or folder or Hub name of a classifier of Hugging Face's transformers"


def _add_labels(verb):
    verb.add_argument(
        "--labels", metavar="YAML", help="what the Hugging Face model calls its classes: 'LABEL_0: us' in each line"
    )


def _add_deciding(verb):
    verb.add_argument("--window_seconds", type=float, help="cut longer recordings into such windows (default: 10)")
    verb.add_argument("--hop_seconds", type=float, help="from one window to the next (default: half a window)")
    verb.add_argument("--batch_seconds", type=float, help="audio in one call of the network")
    verb.add_argument("--min_probability", type=float, help="abstain below it")
    verb.add_argument("--max_risk", type=float, help="abstain so that at most this share was wrong on validation")
    verb.add_argument("--min_coverage", type=float, help="abstain, but decide this share of clips like validation's")


def _add_running(verb):
    verb.add_argument("--backend", choices=("torch", "onnx"), help="(default: what the model's folder is made for)")
    verb.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")
    verb.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "auto"), help="(default: fp32)")


def _add_workers(verb):
    verb.add_argument("--workers", type=int, help="threads that decode (default: one per core)")


def _add_reading(verb):
    verb.add_argument("--mapping", metavar="YAML", help="more spellings: 'Geordie: england' in each line")
    verb.add_argument(
        "--compound",
        default="drop",
        choices=("drop", "agree"),
        help="clips with several accents; agree: take them where all map to one label (default: drop)",
    )
    verb.add_argument("--files", type=split_list, help="tables of a release, with commas (default: validated.tsv)")
    verb.add_argument("--client_pattern", help="folders per accent: regular expression with the speaker as its group")
    verb.add_argument("--config", help="configuration of a data set on the Hub")
    _add_columns(verb, ("path", "accent", "client", "sentence", "audio"))


def _add_columns(verb, roles):
    for role in roles:
        verb.add_argument(f"--{role}_column", metavar="NAME", help="(default: found)")


def _integer_or_none(text):
    try:
        return None if text.lower() in ("none", "null") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None
