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
    rows += [(str(e.clips), str(e.clients), e.label or f"({e.reason})", e.raw) for e in found]
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
    given = _given(arguments, ("data", "json", "report", "ignore", "no_audio"))
    found = audit.check(arguments.data, with_audio=not arguments.no_audio, **given)
    if arguments.report:
        audit.write_report(arguments.report, found)
    print(json.dumps(found.as_json(), indent=1, ensure_ascii=False) if arguments.json else audit.text(found))
    return 1 if found.wrong(ignored) else 0


def _given(arguments, without):
    """Arguments of a verb by name, apart from what all verbs have."""
    return {name: value for name, value in vars(arguments).items() if name not in ("do", *without)}


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
    parser.add_argument("--version", action="version", version=f"accent_plugin {accent_plugin.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("prepare", help="a corpus, such as a Common Voice release, into a DatasetDict")
    verb.add_argument(
        "source", help="a release folder, a DatasetDict, a folder per accent, a CSV file, a name on the Hub"
    )
    verb.add_argument("--out", required=True, help="folder to write; nothing is written elsewhere")
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
    return None if text.lower() in ("none", "null") else int(text)


def _log_to_stderr():
    """Show this package's notes only: others speak for themselves."""
    logger = logging.getLogger("accent_plugin")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def main(argv=None):
    """Run one verb; return the exit code."""
    arguments = _parser().parse_args(argv)
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
