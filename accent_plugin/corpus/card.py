"""The card of a corpus: how it was made, what it holds, and what was left out."""

from collections import Counter, defaultdict

import accent_plugin
from accent_plugin.data import splits
from accent_plugin.data.provenance import show_value
from accent_plugin.report.markdown import to_markdown

FORMAT_VERSION = 1


# What a split is called in a DatasetDict.
REASON_NAMES = {splits.TRAIN: "train", splits.VALID: "validation", splits.TEST: "test"}


_EXAMPLES = 20


_SPELLINGS_LISTED = 20


def corpus_card_to_markdown(card):
    """A card as Markdown: what it is, tables of clips and of what was left out."""
    return to_markdown(_blocks(card))


def _blocks(card):
    source = card["source"]
    yield "heading", 1, card["name"]
    yield "text", f"Made by {card['made_by']} from {source['name']} ({source['kind']})."
    yield "table", ["split", "accent", "clips", "speakers", "hours"], [
        [REASON_NAMES[split], accent, n["clips"], n["clients"],
         "unknown" if n["seconds"] is None else f"{n['seconds'] / 3600:.2f}"]
        for split, by_accent in card["counts"].items() for accent, n in by_accent.items()
    ]  # fmt: skip
    disjoint = {True: "No speaker is in two splits.", False: "Split by clip: speakers may be in several splits."}
    yield "text", disjoint.get(card["clients_disjoint"], "The source does not tell speakers apart.")
    for warning in card["warnings"]:
        yield "text", f"Note: {warning}."
    yield "text", "Left out:"
    yield "table", ["reason", "clips"], list(card["dropped"].items()) or [["nothing", 0]]
    yield "text", "Values of the source that became each label:"
    yield "table", ["label", "values, with clips"], [
        [label, "; ".join(f"{value or '(empty)'} {n}" for value, n in values.items())]
        for label, values in card["labels"].items()
    ]  # fmt: skip
    given = {key: value for key, value in card["arguments"].items() if value not in (None, {})}
    if "mapping" in given:
        given["mapping"] = f"of {len(given['mapping'])} spellings"
    yield "text", f"Arguments: {', '.join(f'{key} {show_value(value)}' for key, value in given.items())}."


def make_corpus_card(reader, parts, lost, choices, header, notes):
    """Make the content of accent_plugin.json."""
    spellings = defaultdict(Counter)
    for rows in parts.values():
        for row in rows:
            spellings[row.accent][row.raw_accent] += 1
    origin = header["source"].get("card", {})
    disjoint = None if not reader.has_clients else choices.split != "random"
    return {
        "format_version": FORMAT_VERSION,
        "name": reader.name,
        "synthetic": bool(origin.get("synthetic", False)),
        "made_by": f"accent_plugin {accent_plugin.__version__}",
        **header,
        "clients_disjoint": disjoint,
        "sentences_disjoint": choices.disjoint_sentences,
        "counts": {split: _count(rows) for split, rows in parts.items()},
        "dropped": {reason: n for reason, n in notes.dropped.most_common() if n},
        "lost_sentences": lost,
        "labels": {label: dict(spellings[label].most_common(_SPELLINGS_LISTED)) for label in sorted(spellings)},
        "examples": notes.examples[:_EXAMPLES],
        "warnings": notes.warnings,
    }


def _count(rows):
    by_accent = defaultdict(list)
    for row in rows:
        by_accent[row.accent].append(row)
    return {
        accent: {
            "clips": len(members),
            "clients": len({row.speaker for row in members} - {""}),
            "seconds": None if any(r.seconds is None for r in members) else round(sum(r.seconds for r in members), 2),
        }
        for accent, members in sorted(by_accent.items())
    }
