"""The command line: `accent-plugin VERB`; results on stdout, notes on stderr.

Exit code 0; 1 where `check` finds something wrong, or where `classify` or `evaluate` had to leave out a file, which is
named; 2 for a wrong command or files that cannot be used; 130 when interrupted.
"""

import argparse
import io
import logging
import os
import re
import sys
from pathlib import Path

import accent_plugin
from accent_plugin.errors import AccentPluginError
from accent_plugin.predictions import printable


def _prepare(arguments):
    from accent_plugin import corpus

    built = corpus.build(arguments.source, arguments.out, **_given(arguments, ("source", "out")))
    print(corpus.describe(built.card))
    print(f"The DatasetDict is in {arguments.out}; check it: accent-plugin check {arguments.out}")


def _accents(arguments):
    import json

    from accent_plugin import corpus

    found = corpus.survey(arguments.source, **_given(arguments, ("source", "format")))
    if arguments.format == "json":
        print(json.dumps([vars(each) for each in found], indent=1, ensure_ascii=False))
        return
    rows = [("clips", "clients", "label", "value")]
    rows += [(str(e.clips), str(e.clients), e.label or f"({e.reason})", printable(e.raw)) for e in found]
    if arguments.format == "tsv":
        print("\n".join("\t".join(row) for row in rows))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for clips, clients, label, value in rows:
        print(f"{clips:>{widths[0]}}  {clients:>{widths[1]}}  {label:<{widths[2]}}  {value}")


def _check(arguments):
    import json

    from accent_plugin import audit

    ignored = [name for text in arguments.ignore for name in _listed(text)]
    audit.require_kinds(ignored)
    if arguments.report and Path(arguments.report).resolve().is_relative_to(Path(arguments.data).resolve()):
        raise AccentPluginError(f"--report {arguments.report} is inside the data, which are only read: choose another")
    given = _given(arguments, ("data", "json", "report", "ignore", "no_audio"))
    found = audit.check(arguments.data, with_audio=not arguments.no_audio, **given)
    if arguments.report:
        audit.write_report(arguments.report, found)
    print(json.dumps(found.as_json(), indent=1, ensure_ascii=False) if arguments.json else audit.text(found))
    return 1 if found.wrong(ignored) else 0


def _given(arguments, without):
    """Arguments of a verb by name, apart from what all verbs have."""
    return {name: value for name, value in vars(arguments).items() if name not in ("do", "typed", *without)}


def _classify(arguments):
    from accent_plugin import classify

    format = arguments.format or _format_of(arguments.output)
    sources = list(classify.find(arguments.files))
    reading = {"workers": arguments.workers, "batch_seconds": arguments.batch_seconds}
    _require_use_of_labels(arguments, [arguments.model])
    classifier = _classifier(arguments, arguments.model, **_cutting(arguments))
    _, failed = classify.run(classifier, sources, format, arguments.output, **reading)
    return 1 if failed else 0


def _serve(arguments):
    from accent_plugin import serve, service

    _require_use_of_labels(arguments, [arguments.model])
    named = vars(arguments)
    limits = service.Limits(**{name: named[name] for name in vars(service.Limits()) if named[name] is not None})
    serving = {"host": arguments.host, "port": arguments.port, "page": not arguments.no_page}
    token = os.environ.get(serve.TOKEN_VARIABLE) if arguments.token is None else arguments.token
    serve.require(limits, token)
    classifier = _classifier(arguments, arguments.model, batch_seconds=arguments.batch_seconds, **_cutting(arguments))
    card = "" if arguments.no_page else _card(arguments.model)
    serve.run(classifier, card, limits, token=token, open=arguments.open, **serving)


def _card(model):
    # Of all that is served, the page alone needs Matplotlib, for its colours.
    from accent_plugin import page

    return page.read_card(model)


def _cutting(arguments):
    """Of `accent_plugin.recordings.Options`, what is given; with a window alone, its half is the hop."""
    window, hop = arguments.window_seconds, arguments.hop_seconds
    if hop is None and window is not None:
        hop = window / 2
    return {name: value for name, value in (("window_seconds", window), ("hop_seconds", hop)) if value is not None}


def _evaluate(arguments):
    import json
    import shlex

    from accent_plugin import disk, evaluation, metrics, report

    if len(arguments.model) > 2:
        raise AccentPluginError("give one bundle, or two to compare")
    _require_use_of_labels(arguments, arguments.model)
    classifiers = [_classifier(arguments, model, **evaluation.WHOLE_CLIPS) for model in arguments.model]
    rows, left_out = _rows(arguments, classifiers)
    out, command, found, failed = Path(arguments.out), shlex.join(["accent-plugin", *arguments.typed]), [], 0
    with disk.writing(out, "--out"):
        pass
    for number, (model, classifier) in enumerate(zip(arguments.model, classifiers, strict=True), 1):
        predictions, failures = evaluation.evaluate(classifier, rows, sys.stderr.isatty(), workers=arguments.workers)
        if number == 1:
            evaluation.remove_earlier(out)
        folder = out if len(classifiers) == 1 else evaluation.folder_of(out, number)
        metrics_of = evaluation.write(folder, classifier, predictions, arguments.data, left_out + failures, command)
        found.append(predictions)
        failed += failures.total()
        print(f"{model}: {folder / report.MARKDOWN_FILE}")
        print(json.dumps({scope: metrics_of[scope] for scope in ("clip", "speaker")}, indent=1))
    if len(found) == 2:
        report.write_comparison(out, *_short_names(arguments.model), metrics.compare(*evaluation.both(*found)))
        print((out / "comparison.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


def _rows(arguments, classifiers):
    """What `evaluation.read` finds for classifiers that have the same labels."""
    from accent_plugin import evaluation, labels

    if len({frozenset(each.labels) for each in classifiers}) > 1:
        first, second = (", ".join(each.labels) for each in classifiers)
        raise AccentPluginError(f"bundles with different labels cannot be compared: {first}; and {second}")
    mapping = labels.read_mapping(arguments.mapping) if arguments.mapping else None
    columns = {role: getattr(arguments, f"{role}_column") for role in evaluation.ROLES}
    return evaluation.read(
        arguments.data, classifiers[0].labels, mapping=mapping, split=arguments.split, columns=columns
    )


def _export(arguments):
    print(_EXPORTS[arguments.to](arguments))


def _export_bundle(arguments):
    from accent_plugin import experiment

    return experiment.export(arguments.run, arguments.out, arguments.device or "cpu")


def _export_huggingface(arguments):
    from accent_plugin import exchange

    folder = _bundle_of(arguments.run)
    return exchange.to_hugging_face(folder, arguments.out or folder.absolute().parent / arguments.to)


def _export_onnx(arguments):
    from accent_plugin import onnx_export

    folder = _bundle_of(arguments.run)
    name = "onnx" if arguments.precision == "fp32" else f"onnx_{arguments.precision}"
    out = arguments.out or folder.absolute().parent / name
    return onnx_export.export(folder, out, arguments.precision, arguments.data, arguments.unchecked)


# Form -> what writes it and returns its path.
_EXPORTS = {"bundle": _export_bundle, "huggingface": _export_huggingface, "onnx": _export_onnx}


def _bundle_of(run):
    """A run's output folder holds its bundle; the bundle's own folder is understood too."""
    run = Path(run)
    return run / "bundle" if (run / "bundle").is_dir() else run


def _import(arguments):
    from accent_plugin import exchange

    print(exchange.import_hugging_face(arguments.source, arguments.out, _names_of_classes(arguments)))


def _names_of_classes(arguments):
    """The table of `--labels`, or None."""
    from accent_plugin import labels

    return labels.read_mapping(arguments.labels) if arguments.labels else None


def _push(arguments):
    from accent_plugin import hub

    print(hub.push(_bundle_of(arguments.run), arguments.repo, private=not arguments.public))


def _demo(arguments):
    from accent_plugin import synthetic

    out = Path(arguments.out)
    synthetic.main(["--out", str(out / "corpus"), "--encoder", str(out / "encoder")])
    print(
        "Synthetic speech and a tiny encoder are made. Train on them with the recipe of a checkout:\n"
        f"  python recipes/CommonVoiceAccent/train.py hparams/wav2vec2_base.yaml --data_folder {out / 'corpus'}"
        f" --wav2vec2_hub {out / 'encoder'} --accents '[us, england, scotland]'"
    )


def _classifier(arguments, model, **options):
    for name in ("min_probability", "max_risk", "min_coverage"):
        if getattr(arguments, name, None) is not None:
            options[name] = getattr(arguments, name)
    if _backend(arguments, model) == "onnx":
        from accent_plugin.onnx import OnnxAccentClassifier

        return OnnxAccentClassifier.from_bundle(model, **options)

    from accent_plugin.inference import AccentClassifier

    if not _is_hugging_face(model):
        return AccentClassifier.from_bundle(model, arguments.device, precision=arguments.precision, **options)

    from accent_plugin import devices, exchange

    if arguments.device:
        devices.require_device(arguments.device)
    loaded = exchange.from_hugging_face(model, _names_of_classes(arguments))
    run_opts = {"device": arguments.device} if arguments.device else None
    return AccentClassifier(loaded.modules, loaded.hparams, run_opts=run_opts, precision=arguments.precision, **options)


def _backend(arguments, model):
    """What runs a model: as asked for, or what its folder is made for."""
    from accent_plugin import bundle_config

    found = "onnx" if Path(model, bundle_config.ONNX_FILE).is_file() else "torch"
    if (arguments.backend or found) == "onnx" and (arguments.device or arguments.precision != "fp32"):
        raise AccentPluginError("--device and --precision are torch's: an export to ONNX has its own precision")
    return arguments.backend or found


def _is_hugging_face(model):
    """Whether a model is a classifier of transformers, in a folder or by its name on the Hub."""
    from accent_plugin import bundle_config

    if Path(model).exists():
        return bundle_config.is_hugging_face(model)
    # USER/NAME; a path that is mistyped below a folder that exists is none, or the Hub would be asked for it.
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).parent.exists()


def _require_use_of_labels(arguments, models):
    if arguments.labels and not any(map(_is_hugging_face, models)):
        raise AccentPluginError(
            f"--labels is for the classes of a Hugging Face model, and {' and '.join(models)} is none"
        )


def _format_of(output):
    suffix = Path(output).suffix.lower() if output else ""
    return {".jsonl": "jsonl", ".csv": "csv"}.get(suffix, "jsonl" if output else "table")


def _versions():
    """Versions that matter in a bug report, without importing anything heavy."""
    import importlib.metadata
    import platform

    lines = [f"accent_plugin {accent_plugin.__version__}", f"Python {platform.python_version()}, {platform.platform()}"]
    for package in ("speechbrain", "transformers", "torch", "torchaudio", "datasets", "numpy", "soundfile"):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(_versions())
        parser.exit()


def _compare(arguments):
    from accent_plugin import metrics, report

    first, second = arguments.run
    names = _short_names(arguments.run)
    comparison = metrics.compare(_predictions(first), _predictions(second))
    report.write_comparison(arguments.out, *names, comparison)
    print((Path(arguments.out) / "comparison.md").read_text(encoding="utf-8"))


def _summarise(arguments):
    import json

    from accent_plugin import metrics, report

    runs = {}
    for run in arguments.run:
        path = _report_folder(run) / report.METRICS_FILE
        try:
            runs[run] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AccentPluginError(
                f"{path} cannot be read: {error}; give the output folders of finished runs"
            ) from None
    report.write_summary(arguments.out, metrics.summarise(list(runs.values()), list(runs)))
    print((Path(arguments.out) / "summary.md").read_text(encoding="utf-8"))


def _report_folder(run):
    """A run's output folder holds its report; the report's own folder is understood too."""
    run = Path(run)
    return run / "report" if (run / "report").is_dir() else run


def _predictions(run):
    from accent_plugin import report

    return report.read_predictions(_report_folder(run))


def _short_names(runs):
    names = [Path(run).name for run in runs]
    return names if len(set(names)) == len(names) else list(map(str, runs))


def _parser():
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
    verb.set_defaults(do=_classify)

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
    verb.set_defaults(do=_serve)

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
    verb.set_defaults(do=_evaluate)

    verb = verbs.add_parser("export", help="write a trained model anew as a bundle, or for Hugging Face's transformers")
    verb.add_argument("run", metavar="RUN_OR_BUNDLE", help="output folder of a finished run, or, with --to, a bundle")
    verb.add_argument(
        "--to",
        default="bundle",
        choices=tuple(_EXPORTS),
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
    verb.set_defaults(do=_export)

    verb = verbs.add_parser("import", help="write a classifier of Hugging Face's transformers as a bundle")
    verb.add_argument("source", metavar="HF_FOLDER", help="folder or name on the Hub")
    verb.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write")
    _add_labels(verb)
    verb.set_defaults(do=_import)

    verb = verbs.add_parser("push", help="upload a bundle to the Hugging Face Hub")
    verb.add_argument("run", metavar="RUN", help="output folder of a finished run, or a bundle")
    verb.add_argument("repo", metavar="USER/NAME")
    verb.add_argument("--public", action="store_true", help="for all to see (default: private)")
    verb.set_defaults(do=_push)

    verb = verbs.add_parser("demo", help="make the built-in corpus of synthetic speech and a tiny encoder")
    verb.add_argument("--out", default="data/demo", help="(default: data/demo)")
    verb.set_defaults(do=_demo)

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
    verb.set_defaults(do=_prepare)

    verb = verbs.add_parser("accents", help="what a corpus calls its accents, how often, and what each maps to")
    verb.add_argument("source", help="as for prepare")
    _add_reading(verb)
    verb.add_argument("--format", default="table", choices=("table", "tsv", "json"), help="(default: table)")
    verb.set_defaults(do=_accents)

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
    verb.set_defaults(do=_check)

    verb = verbs.add_parser("compare", help="two runs on the same clips: paired differences with intervals by speaker")
    verb.add_argument("run", nargs=2, metavar="RUN", help="output folder of a finished run; the second minus the first")
    verb.add_argument("--out", default="comparison", help="folder for comparison.md and comparison.json")
    verb.set_defaults(do=_compare)

    verb = verbs.add_parser("summarise", help="several runs: mean and standard deviation, each run listed")
    verb.add_argument("run", nargs="+", metavar="RUN", help="output folder of a finished run")
    verb.add_argument("--out", default="summary", help="folder for summary.md and summary.json")
    verb.set_defaults(do=_summarise)
    return parser


def _completion(arguments):
    import shtab

    print(shtab.complete(_parser(), shell=arguments.shell))


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
    verb.add_argument("--files", type=_listed, help="tables of a release, with commas (default: validated.tsv)")
    verb.add_argument("--client_pattern", help="folders per accent: regular expression with the speaker as its group")
    verb.add_argument("--config", help="configuration of a data set on the Hub")
    _add_columns(verb, ("path", "accent", "client", "sentence", "audio"))


def _add_columns(verb, roles):
    for role in roles:
        verb.add_argument(f"--{role}_column", metavar="NAME", help="(default: found)")


def _listed(text):
    return [name for name in text.split(",") if name]


def _integer_or_none(text):
    try:
        return None if text.lower() in ("none", "null") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def _log_to_stderr():
    """Show this package's notes only: others speak for themselves."""
    logger = logging.getLogger("accent_plugin")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())


class _ToStderr(logging.Handler):
    """To what is stderr at the time: a handler with a stream of its own would keep one that was since replaced."""

    def emit(self, record):
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _prepare_streams():
    """Make the standard streams fit for any name; False where there is no stdout."""
    if sys.stderr is None:
        # Or else print would write notes among the results.
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        print("stdout is closed: results would be lost; open it, or use /dev/null", file=sys.stderr)
        return False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return True


def _goes_on(arguments):
    """Whether the same command takes up what an interrupted one has left."""
    if arguments.do is _classify:
        return bool(arguments.output) and (arguments.format or _format_of(arguments.output)) != "table"
    return arguments.do is _prepare


def main(argv=None):
    """Run one verb; return the exit code."""
    if not _prepare_streams():
        return 2
    arguments = _parser().parse_args(argv)
    arguments.typed = sys.argv[1:] if argv is None else list(argv)
    _log_to_stderr()
    try:
        code = arguments.do(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AccentPluginError, OSError) as error:
        print("\n".join(map(printable, f"{type(error).__name__}: {error}".split("\n"))), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted" + ": the same command goes on from here" * _goes_on(arguments), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
