"""Commands that create and check data: prepare, accents, check, demo."""

from pathlib import Path

from accent_plugin.errors import AccentPluginError
from accent_plugin.inference.records import printable


def run_prepare(arguments):
    """Build a DatasetDict from a corpus."""
    from accent_plugin.corpus.build import build_corpus
    from accent_plugin.corpus.card import corpus_card_to_markdown

    built = build_corpus(arguments.source, arguments.out, **_options_of(arguments, ("source", "out")))
    print(corpus_card_to_markdown(built.card))
    print(f"The DatasetDict is in {arguments.out}. To check it: accent-plugin check {arguments.out}")


def run_accents(arguments):
    """List the accents of a corpus."""
    import json

    from accent_plugin.corpus.build import survey_accents

    found = survey_accents(arguments.source, **_options_of(arguments, ("source", "format")))
    if arguments.format == "json":
        print(json.dumps([vars(each) for each in found], indent=1, ensure_ascii=False))
        return
    if arguments.format == "yaml":
        from accent_plugin.data import labels

        print("# Accents without a label: remove the # of a line and write its label after the colon.")
        print(f"# Labels of Common Voice: {', '.join(labels.SPELLINGS)}")
        for each in found:
            if each.reason == labels.UNKNOWN_ACCENT:
                print(f"# {json.dumps(each.raw, ensure_ascii=False)}:   # {each.clips} clips, {each.clients} speakers")
        return
    rows = [("clips", "speakers", "label", "value")]
    rows += [(str(e.clips), str(e.clients), e.label or f"({e.reason})", printable(e.raw)) for e in found]
    if arguments.format == "tsv":
        print("\n".join("\t".join(row) for row in rows))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for clips, clients, label, value in rows:
        print(f"{clips:>{widths[0]}}  {clients:>{widths[1]}}  {label:<{widths[2]}}  {value}")


def run_check(arguments):
    """Audit a DatasetDict."""
    import json

    from accent_plugin.audit.check import check_dataset
    from accent_plugin.audit.findings import require_kinds
    from accent_plugin.audit.report import audit_to_text, write_audit

    ignored = [name for text in arguments.ignore for name in split_list(text)]
    require_kinds(ignored)
    if arguments.report and Path(arguments.report).resolve().is_relative_to(Path(arguments.data).resolve()):
        raise AccentPluginError(
            f"--report {arguments.report} is inside the data folder, which is never changed: choose another folder"
        )
    options = _options_of(arguments, ("data", "json", "report", "ignore", "no_audio"))
    found = check_dataset(arguments.data, with_audio=not arguments.no_audio, **options)
    if arguments.report:
        write_audit(arguments.report, found)
    print(json.dumps(found.as_json(), indent=1, ensure_ascii=False) if arguments.json else audit_to_text(found))
    return 1 if found.wrong(ignored) else 0


def _options_of(arguments, without):
    """The options of a command by name, without those listed."""
    return {name: value for name, value in vars(arguments).items() if name not in ("run_command", "argv", *without)}


def run_demo(arguments):
    """Create the built-in synthetic corpus and a tiny encoder."""
    from accent_plugin.corpus import synthetic

    out = Path(arguments.out)
    synthetic.main(["--out", str(out / "corpus"), "--encoder", str(out / "encoder")])
    print(
        "Created synthetic speech and a tiny encoder. To train on them, run the recipe from a checkout:\n"
        f"  python recipes/CommonVoiceAccent/train.py hparams/wav2vec2_base.yaml --data_folder {out / 'corpus'}"
        f" --wav2vec2_hub {out / 'encoder'} --accents '[us, england, scotland]'"
    )


def split_list(text):
    """Split a comma-separated list."""
    return [name for name in text.split(",") if name]
