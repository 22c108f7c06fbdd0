"""The command line: `accent-plugin VERB`; results on stdout, notes on stderr.

Exit code 0; 1 where `check` finds something wrong; 2 for a wrong command or files that cannot be used; 130 when
interrupted.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import accent_plugin
from accent_plugin.errors import AccentPluginError


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
    rows += [(str(e.clips), str(e.clients), e.label or f"({e.reason})", _printable(e.raw)) for e in found]
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


def _printable(text):
    """One line without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _given(arguments, without):
    """Arguments of a verb by name, apart from what all verbs have."""
    return {name: value for name, value in vars(arguments).items() if name not in ("do", "typed", *without)}


def _classify(arguments):
    from accent_plugin import classify

    format = arguments.format or _format_of(arguments.output)
    sources = list(classify.find(arguments.files))
    reading = {"workers": arguments.workers, "batch_seconds": arguments.batch_seconds}
    _, failed = classify.run(_classifier(arguments, arguments.model), sources, format, arguments.output, **reading)
    return 1 if failed else 0


def _evaluate(arguments):
    import json
    import shlex

    from accent_plugin import evaluation, labels, metrics, report

    if len(arguments.model) > 2:
        raise AccentPluginError("give one bundle, or two to compare")
    mapping = labels.read_mapping(arguments.mapping) if arguments.mapping else None
    out, found = Path(arguments.out), []
    for number, model in enumerate(arguments.model, 1):
        classifier = _classifier(arguments, model, **evaluation.WHOLE_CLIPS)
        rows, left_out = evaluation.read(arguments.data, classifier.labels, mapping=mapping, split=arguments.split)
        predictions, failures = evaluation.evaluate(classifier, rows, sys.stderr.isatty(), workers=arguments.workers)
        folder = out if len(arguments.model) == 1 else out / f"model_{number}"
        command = shlex.join(["accent-plugin", *arguments.typed])
        metrics_of = evaluation.write(folder, classifier, predictions, arguments.data, left_out + failures, command)
        found.append(predictions)
        print(f"{model}: {folder / report.MARKDOWN_FILE}")
        print(json.dumps({scope: metrics_of[scope] for scope in ("clip", "speaker")}, indent=1))
    if len(found) == 2:
        report.write_comparison(out, *_short_names(arguments.model), metrics.compare(*found))
        print((out / "comparison.md").read_text(encoding="utf-8"))
    return 1 if failures else 0


def _export(arguments):
    from accent_plugin import experiment

    print(experiment.export(arguments.run, arguments.out, arguments.device or "cpu"))


def _push(arguments):
    from accent_plugin import hub

    run = Path(arguments.run)
    folder = run / "bundle" if (run / "bundle").is_dir() else run
    print(hub.push(folder, arguments.repo, private=not arguments.public))


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
    from accent_plugin.inference import AccentClassifier

    for name in ("min_probability", "max_risk", "min_coverage"):
        if getattr(arguments, name, None) is not None:
            options[name] = getattr(arguments, name)
    return AccentClassifier.from_bundle(model, arguments.device, precision=arguments.precision, **options)


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

    verb = verbs.add_parser("classify", help="which accent files have, by somebody's model")
    verb.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="wav, flac, mp3, ogg, opus, ...")
    verb.add_argument("--model", required=True, metavar="BUNDLE", help="folder of a bundle")
    verb.add_argument("--format", choices=("table", "jsonl", "csv"), help="(default: by the output's ending, or table)")
    verb.add_argument("--output", metavar="FILE", help="append answers here; a second run goes on (default: stdout)")
    verb.add_argument("--batch_seconds", type=float, help="audio in one call of the network")
    verb.add_argument("--min_probability", type=float, help="abstain below it")
    verb.add_argument("--max_risk", type=float, help="abstain so that at most this share was wrong on validation")
    verb.add_argument("--min_coverage", type=float, help="abstain, but decide this share of clips like validation's")
    _add_running(verb, "threads that decode (default: one per core)")
    verb.set_defaults(do=_classify)

    verb = verbs.add_parser("evaluate", help="the full report of a bundle on labelled speech; of two, the difference")
    verb.add_argument("--model", required=True, metavar="BUNDLE", action="append", help="may be given twice")
    verb.add_argument("--data", required=True, metavar="DATASETDICT_OR_MANIFEST", help="its test split, or all of it")
    verb.add_argument("--split", help="of the DatasetDict (default: test)")
    verb.add_argument("--mapping", metavar="YAML", help="more spellings: 'Geordie: england' in each line")
    verb.add_argument("--out", default="evaluation", help="folder of the report (default: evaluation)")
    _add_running(verb, "threads that decode (default: one per core)")
    verb.set_defaults(do=_evaluate)

    verb = verbs.add_parser("export", help="write the bundle of a finished run anew")
    verb.add_argument("run", metavar="RUN", help="its output folder; its YAML is run, so it must be your own")
    verb.add_argument("--out", help="(default: RUN/bundle)")
    verb.add_argument("--device", help="such as cpu or cuda:0 (default: cpu)")
    verb.set_defaults(do=_export)

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


def _add_running(verb, workers):
    verb.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")
    verb.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "auto"), help="(default: fp32)")
    verb.add_argument("--workers", type=int, help=workers)


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
        logger.addHandler(logging.StreamHandler())


def main(argv=None):
    """Run one verb; return the exit code."""
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
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
