"""The command line: `accent-plugin VERB`; results on stdout, notes on stderr.

Exit code 0, or 2 for a wrong command or files that cannot be used.
"""

import argparse
import sys
from pathlib import Path

import accent_plugin
from accent_plugin.errors import AccentPluginError


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

    verb = verbs.add_parser("compare", help="two runs on the same clips: paired differences with intervals by speaker")
    verb.add_argument("run", nargs=2, metavar="RUN", help="output folder of a finished run; the second minus the first")
    verb.add_argument("--out", default="comparison", help="folder for comparison.md and comparison.json")
    verb.set_defaults(do=_compare)

    verb = verbs.add_parser("summarise", help="several runs: mean and standard deviation, each run listed")
    verb.add_argument("run", nargs="+", metavar="RUN", help="output folder of a finished run")
    verb.add_argument("--out", default="summary", help="folder for summary.md and summary.json")
    verb.set_defaults(do=_summarise)
    return parser


def main(argv=None):
    """Run one verb; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.do(arguments)
    except (AccentPluginError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
