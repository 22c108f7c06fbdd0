"""An audit as text for the terminal, Markdown, JSON and pictures."""

import json
from collections import Counter
from pathlib import Path

from accent_plugin import files
from accent_plugin.audit import confounds
from accent_plugin.audit.findings import medians_by_accent
from accent_plugin.report.markdown import escape_markdown, to_markdown
from accent_plugin.report.text import count_in_words

MARKDOWN_FILE = "check.md"


JSON_FILE = "check.json"


_MOST_ROWS = 30  # accents in tables and pictures


_COLUMNS = {"clips": "clips", "clients": "clients", "hours": "seconds"}  # of tables -> key of counts


# ----------------------------------------------------------------------------------------------------- what is said


def audit_to_text(audit):
    """What the command prints: findings, the table of accents and splits, the channel test, notes."""
    lines = [_title(audit), ""]
    width = max((len(found.kind) for found in audit.findings), default=0)
    for found in audit.findings:
        lines.append(f"{found.severity:7}  {found.kind:{width}}  {found.message}")
        lines += [f"{'':{width + 11}}{example.text}" for example in found.examples]
    lines += ["", *_aligned(audit), ""]
    if audit.confound and audit.confound.possible:
        lines.append("channel: " + _tested(audit.confound))
    lines += [f"note: {note}" for note in audit.notes]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def write_audit(folder, audit):
    """Write check.md, check.json and pictures.

    Arguments
    ---------
    folder : str or Path
        Made where it is absent; files of the same names are replaced.
    audit : Audit

    Raises
    ------
    DataError
        When the folder cannot be written.
    """
    # Workers that decode import this module, and have no use for matplotlib.
    from accent_plugin.audit.figures import composition, permutations, recording_conditions

    folder = Path(folder)
    with files.writable_folder(folder, "report"):
        shown = []
        most = sorted(_totals(audit), key=lambda accent: -_totals(audit)[accent])[:_MOST_ROWS]
        if most:
            counts = {split: {a: cell[a] for a in sorted(most) if a in cell} for split, cell in audit.counts.items()}
            composition(folder / "composition.png", counts)
            shown.append(("composition.png", "clips, clients and hours of each accent in each split"))
        if audit.measured:
            values = {}
            for accent, measured in audit.measured:
                for name in confounds.UNITS:
                    values.setdefault(name, {}).setdefault(accent, []).append(getattr(measured, name))
            recording_conditions(folder / "nuisance.png", values, confounds.UNITS)
            shown.append(("nuisance.png", "what the recordings of each accent are like"))
        if audit.confound and audit.confound.possible:
            c = audit.confound
            permutations(folder / "channel.png", c.permuted, c.uar, c.p)
            shown.append(("channel.png", "accents told apart by the recording alone, against chance"))
        with files.atomic_write(folder / MARKDOWN_FILE) as file:
            file.write(to_markdown(_blocks(audit, shown)))
        # Last, since it is what other programs look for.
        with files.atomic_write(folder / JSON_FILE) as file:
            file.write(json.dumps(audit.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _title(audit):
    errors = len(audit.wrong())
    return f"{audit.name}: {count_in_words(errors, 'error')}, {count_in_words(len(audit.findings) - errors, 'warning')}"


def _blocks(audit, shown):
    """Yield the blocks of check.md, as `accent_plugin.report.markdown.to_markdown` wants them."""
    columns, rows = _counted(audit)
    yield "heading", 1, f"Check of {_title(audit)}"
    yield "markdown", "\n".join(_findings(audit)) or "Nothing was found."
    yield "heading", 2, "Accents and splits"
    yield "table", ["accent", *(f"{split} {c}" for split in audit.counts for c in columns)], rows
    c = audit.confound
    if c:
        yield "heading", 2, "Recording conditions"
        yield "text", f"{_tested(c)[0].upper()}{_tested(c)[1:]}." if c.possible else f"Not tested: {c.reason}."
    if medians := medians_by_accent(audit.measured):
        units = (f"{_spaced(name)}{f' ({unit})' if unit else ''}" for name, unit in confounds.UNITS.items())
        rows = [[accent, *map(_plain, cells.values())] for accent, cells in medians.items()]
        if c.possible:
            rows.append(["average recall alone", *(f"{c.by_feature[name]:.2f}" for name in confounds.UNITS)])
        yield "table", ["median", *units], rows
    for name, words in shown:
        yield "picture", name, words
    if audit.notes:
        yield "heading", 2, "Notes"
        yield "list", audit.notes


def _findings(audit):
    for found in audit.findings:
        yield f"* **{found.severity}, {found.kind}**: {escape_markdown(found.message)}"
        yield from (f"    * {escape_markdown(example.text)}" for example in found.examples)


def _counted(audit):
    """Names of columns, and rows of the table of accents and splits with as many cells per split, the largest first."""
    known = [cell for cells in audit.counts.values() for cell in cells.values()]
    columns = [c for c, key in _COLUMNS.items() if any(cell[key] is not None for cell in known)]
    totals = _totals(audit)
    shown = sorted(totals, key=lambda accent: (-totals[accent], accent))
    rows = []
    for accent in shown[:_MOST_ROWS]:
        rows.append([accent, *(_cell(cells.get(accent), c) for cells in audit.counts.values() for c in columns)])
    for name, accents in ((f"{len(shown) - _MOST_ROWS} others", shown[_MOST_ROWS:]), ("all", shown)):
        if len(accents) > 1:
            sums = [_sum([cells[a] for a in accents if a in cells]) for cells in audit.counts.values()]
            rows.append([name, *(_cell(total, c) for total in sums for c in columns)])
    return columns, rows


def _sum(cells):
    total = {key: [cell[key] for cell in cells] for key in _COLUMNS.values()}
    return {key: None if None in values else sum(values) for key, values in total.items()}


def _cell(cell, column):
    if cell is None:
        return "-"
    value = cell[_COLUMNS[column]]
    return "" if value is None else f"{value / 3600:.2f}" if column == "hours" else f"{value:,}"


def _aligned(audit):
    """The table for the terminal, each split's name above its columns."""
    columns, rows = _counted(audit)
    if not rows:
        return []
    heads = ["accent", *columns * len(audit.counts)]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [" " * widths[0]] + [f"{row[0]:{widths[0]}}" for row in (heads, *rows)]
    for k, split in enumerate(audit.counts):
        places = range(1 + k * len(columns), 1 + (k + 1) * len(columns))
        cells = [" ".join(f"{row[i]:>{widths[i]}}" for i in places) for row in (heads, *rows)]
        wide = max(len(split), len(cells[0]))
        lines = [f"{line}    {cell:>{wide}}" for line, cell in zip(lines, [f"{split:<{wide}}", *cells], strict=True)]
    return [line.rstrip() for line in lines]


def _tested(confound):
    told = sorted(confound.by_feature.items(), key=lambda item: -item[1])
    alone = ", ".join(f"{_spaced(name)} {uar:.2f}" for name, uar in told)
    return (
        f"average recall of {len(confound.accents)} accents from the recording alone {confound.uar:.2f}, by chance"
        f" {confound.chance:.2f}, p = {confound.p:.3f}; each alone: {alone}"
    )


def _totals(audit):
    totals = Counter()
    for cells in audit.counts.values():
        totals.update({accent: cell["clips"] for accent, cell in cells.items()})
    return totals


def _plain(value):
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _spaced(name):
    return name.replace("_", " ")
