"""A DatasetDict on disk -> 16 kHz clips, CSV manifests and ``prepare.json``; and back.

What is made, in ``prepared_folder``::

    audio/3f/3f...e1.flac    one clip: 16 kHz, mono, 16 bit
    train.csv valid.csv test.csv, or with folds fold_1/train.csv ... fold_5/test.csv
    prepare.json             arguments, source, counts, what was left out and why; written last
    audio.jsonl              what became of each clip that was decoded; lets an interrupted run go on

The columns of the CSV files are ``COLUMNS``; ``wav`` begins with ``$data_root/``, which stands for ``prepared_folder``.
SpeechBrain would replace any other ``$word``: so ``%``, ``$``, line breaks and NUL in other cells are written as ``%``
and two hexadecimal digits, and ``read`` undoes it.

Nothing here imports torch, and ``datasets`` only when there is something to do.
"""

import dataclasses
import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data import dataset_dict, provenance, selection, splits
from accent_plugin.data.decode_clips import JOURNAL_FILE, Journal, decode_clips
from accent_plugin.data.manifests import (
    AUDIO_FOLDER,
    FORMAT_VERSION,
    PREPARE_JSON,
    escape_cell,
    load_prepared,
    manifest_paths,
    write_manifest,
)
from accent_plugin.errors import ConfigError, DataError, ManifestError

logger = logging.getLogger(__name__)


BALANCES = ("downsample", "sampler", "none")


SPLIT_KINDS = ("speaker", "random", "all")


_EXAMPLES = 20


@dataclass(frozen=True)
class PreparationChoices:
    """What a preparation is asked to make; together with the source it decides every byte of the result.

    Arguments
    ---------
    accents : sequence of str
        Canonical labels to keep. Names outside ``labels`` are taken as they are.
    seed : int
        Decides every draw.
    balance : str
        "downsample": each accent of train has as many clips as the rarest; "sampler" and "none" keep all.
    max_clips_per_client : int or None
        Cap in every split.
    min_seconds, max_seconds : float
        Shorter and longer clips are left out.
    max_unreadable_share : float
        Above this share of undecodable, empty or non-finite clips, preparation stops.
    split : str
        "speaker": no client in two splits; "random": by clip, ignoring the source's splits, leaky on purpose; "all":
        every clip in test, for speech that is only to be scored.
    n_folds : int
        0, or the number of folds that the pooled source is cut into.
    valid_fraction, test_fraction : float
        Share of clients taken for splits that the source lacks; in folds, share of training clients for valid.
    disjoint_sentences : bool
        Leave sentences of test out of train and valid, and those of valid out of train.
    source_splits : sequence of str or None
        Splits of the source to use; None uses all.
    accent_column, client_column, sentence_column, audio_column : str or None
        Names of columns; None finds them.
    """

    accents: tuple[str, ...]
    seed: int
    balance: str = "downsample"
    max_clips_per_client: int | None = 30
    min_seconds: float = 1.0
    max_seconds: float = 30.0
    max_unreadable_share: float = 0.05
    split: str = "speaker"
    n_folds: int = 0
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    disjoint_sentences: bool = True
    source_splits: tuple[str, ...] | None = None
    accent_column: str | None = None
    client_column: str | None = None
    sentence_column: str | None = None
    audio_column: str | None = None

    def __post_init__(self):
        """Refuse values that cannot be meant, all at once."""
        accents, cap, valid, test = self.accents, self.max_clips_per_client, self.valid_fraction, self.test_fraction
        listed = not isinstance(accents, str) and all(isinstance(a, str) and a and escape_cell(a) == a for a in accents)
        shortest, longest, share = self.min_seconds, self.max_seconds, self.max_unreadable_share
        checks = (
            (
                listed and 0 < len(accents) == len(set(accents)),
                f"accents is {accents!r}; give a list of distinct names",
            ),
            (self.balance in BALANCES, f"balance {self.balance!r} is unknown; choose {', '.join(BALANCES)}"),
            (self.split in SPLIT_KINDS, f"split {self.split!r} is unknown; choose {' or '.join(SPLIT_KINDS)}"),
            (cap is None or cap >= 1, f"max_clips_per_client is {cap}; give 1 or more, or None for no cap"),
            (0 <= shortest < longest, f"min_seconds {shortest} and max_seconds {longest} leave no clip"),
            (0 <= share <= 1, f"max_unreadable_share is {share}; give 0 to 1"),
            (self.n_folds == 0 or self.n_folds > 1, f"n_folds is {self.n_folds}; give 0 for none, or 2 or more"),
            (0 < valid < 1, f"valid_fraction is {valid}; give more than 0 and less than 1"),
            (0 < test < 1 - valid, f"test_fraction is {test}; give more than 0, and less than 1 with valid_fraction"),
        )
        if problems := [text for right, text in checks if not right]:
            raise ConfigError("\n".join(problems))

    def as_json(self):
        """Plain values, accents sorted: their order decides indices in the model, nothing here."""
        plain = dataclasses.asdict(self) | {"accents": sorted(self.accents)}
        return json.loads(json.dumps(plain))


def prepare_data(data_folder, prepared_folder, *, workers=None, progress=True, **choices):
    """Turn a DatasetDict on disk into clips and manifests; when they are there already, do nothing.

    An interrupted run goes on where it was. With other arguments than those in ``prepared_folder`` it is refused.

    Arguments
    ---------
    data_folder : str or Path
        A DatasetDict saved with ``save_to_disk``; splits that it lacks are made here, by client. Only read.
    prepared_folder : str or Path
        Where to write; see ``default_folder``.
    workers : int, optional
        Processes that decode; None takes the machine's cores, or none for a few clips.
    progress : bool
        Whether to draw a progress bar on stderr.
    **choices
        Fields of ``Choices``; ``accents`` and ``seed`` are required.

    Returns
    -------
    Prepared

    Raises
    ------
    DataError
        When the data cannot be used.
    ManifestError
        When ``prepared_folder`` was made from something else.
    """
    choices, data_folder, folder, header = _begin(data_folder, prepared_folder, choices)
    if done := _finished(folder, header):
        return done
    with files.writable_folder(folder, "prepared_folder"), files.lock(folder):
        if done := _finished(folder, header):
            return done
        return _prepare(data_folder, folder, choices, header, workers, progress)


def check_preparation(data_folder, prepared_folder, **choices):
    """Refuse what ``prepare`` with the same arguments would refuse, before it writes anything.

    Raises
    ------
    DataError
        When the data cannot be used.
    ManifestError
        When ``prepared_folder`` was made from something else.
    """
    choices, data_folder, folder, header = _begin(data_folder, prepared_folder, choices)
    if not _finished(folder, header):
        _plan(data_folder, choices, selection.DropLog())


def _begin(data_folder, prepared_folder, choices):
    """Checked choices, absolute folders, and what prepare.json says of them."""
    choices = PreparationChoices(**choices)
    data_folder, folder = Path(data_folder).absolute(), Path(prepared_folder).absolute()
    source = dataset_dict.fingerprint(data_folder)
    if folder.resolve().is_relative_to(data_folder.resolve()):
        raise DataError(f"prepared_folder {folder} is inside data_folder, which is only read: choose another")
    header = {"arguments": choices.as_json(), "source": source, "data_folder": str(data_folder)}
    return choices, data_folder, folder, header


def preparation_fingerprint(data_folder, **choices):
    """Digest of a source and the arguments, from the names, sizes and times of files, not their contents."""
    return selection.digest(
        {"arguments": PreparationChoices(**choices).as_json(), "source": dataset_dict.fingerprint(Path(data_folder))}
    )


def default_prepared_folder(data_folder, root="data/prepared", **choices):
    """Where ``prepare`` with these arguments writes unless told otherwise."""
    return Path(root) / preparation_fingerprint(data_folder, **choices)


# ------------------------------------------------------------------------------------------------- the way through


def _prepare(data_folder, folder, choices, header, workers, progress):
    notes = selection.DropLog()
    loaded, columns, layouts, has_clients = _plan(data_folder, choices, notes)
    logger.info("columns of %s: %s", data_folder, next(iter(columns.values())))
    if not has_clients:
        notes.warnings.append(selection.NO_CLIENT_IDS)
    if choices.split == "random":
        notes.warnings.append(selection.RANDOM_SPLIT)
    for warning in notes.warnings:
        logger.warning(warning)

    journal = Journal(folder / JOURNAL_FILE, header)
    wanted = {row.id: row for layout in layouts for items in layout.values() for row in items}
    with journal:
        outcomes = decode_clips(wanted, loaded, columns, data_folder, folder, choices, journal, workers, progress)
    layouts = _without_failures(layouts, outcomes, choices, notes)
    _require_filled(layouts, choices, notes)
    return _write(folder, data_folder, layouts, outcomes, choices, header, columns, notes, has_clients)


def _plan(data_folder, choices, notes):
    """Choose clips by what the table says of them: all that can be refused before a file is read or written."""
    loaded, unused = dataset_dict.open_splits(data_folder, choices.source_splits)
    notes.warnings += unused
    given = {role: getattr(choices, f"{role}_column") for role in ("audio", "accent", "client", "sentence")}
    columns = {split: dataset_dict.find_columns(split, data, data_folder, given) for split, data in loaded.items()}
    rows, has_clients = _rows(data_folder, loaded, columns, choices, notes)
    layouts = _lay_out(rows, list(loaded), choices, notes)
    _require_filled(layouts, choices, notes)
    return loaded, columns, layouts, has_clients


def _rows(data_folder, loaded, columns, choices, notes):
    """Clips of the wanted accents, without duplicates and doubtful clients."""

    def table():
        for split, data in loaded.items():
            for number, cells in enumerate(dataset_dict.read_cells(data, columns[split])):
                yield cells | {"split": split, "row": number}

    def content_of(row):
        return dataset_dict.content_digest(loaded[row.split], columns[row.split], row.row)

    return selection.select(table(), choices.accents, notes, data_folder, content_of=content_of, precedence=_precedence)


def _lay_out(rows, names, choices, notes):
    """One dictionary of splits, or one for each fold; train balanced."""
    given = {dataset_dict.canonical(name): [row for row in rows if row.split == name] for name in names}
    keep_given = len(given) > 1 and choices.split == "speaker" and not choices.n_folds
    if keep_given:
        splits.require_disjoint(given)
    capped = splits.cap(rows, choices.max_clips_per_client, choices.seed)
    notes.drop(selection.CLIENT_CAP, len(capped.dropped))
    fractions = {"valid_fraction": choices.valid_fraction, "test_fraction": choices.test_fraction}
    if choices.n_folds:
        by = "client" if choices.split == "speaker" else "clip"
        fraction = choices.valid_fraction
        layouts = splits.folds(capped.kept, choices.n_folds, valid_fraction=fraction, seed=choices.seed, by=by)
    elif choices.split == "all":
        layouts = ({splits.TRAIN: (), splits.VALID: (), splits.TEST: capped.kept},)
    elif choices.split == "random":
        layouts = (splits.at_random(capped.kept, seed=choices.seed, **fractions),)
    elif not keep_given:
        layouts = (splits.by_client(capped.kept, seed=choices.seed, **fractions),)
    else:
        parts = {name: tuple(r for r in capped.kept if dataset_dict.canonical(r.split) == name) for name in given}
        for name in {splits.VALID, splits.TEST} - parts.keys():
            only = {"valid_fraction": 0, "test_fraction": 0} | {f"{name}_fraction": fractions[f"{name}_fraction"]}
            parts |= splits.by_client(parts[splits.TRAIN], seed=choices.seed, **only)
        layouts = (parts,)

    made = []
    for number, parts in enumerate(layouts, 1):
        fold = number if choices.n_folds else None
        if choices.split == "speaker":
            splits.require_disjoint(parts)
            if choices.disjoint_sentences:
                parts, lost = splits.drop_sentences(parts)
                for (split, because), items in lost.items():
                    notes.drop(f"sentence in {because}", len(items), fold=fold)
                    if items:
                        logger.info("%d of %s's clips read a sentence of %s: left out", len(items), split, because)
        made.append(_balanced(parts, choices, notes, fold))
    return made


def _balanced(parts, choices, notes, fold):
    if choices.balance != "downsample":
        return parts
    choice = splits.downsample(parts[splits.TRAIN], choices.seed)
    notes.drop(selection.BALANCE, len(choice.dropped), fold=fold)
    return parts | {splits.TRAIN: choice.kept}


def _without_failures(layouts, outcomes, choices, notes):
    """Take out what could not be decoded and what sounds the same as another clip, then trim train again."""
    # In folds every clip is tested once, so none has precedence.
    place_of = {r.id: len(layouts) == 1 and _PLACES[name] for parts in layouts for name in parts for r in parts[name]}
    out, heard, failures = set(), {}, []
    # Test before valid before train: a clip that is heard twice stays where it is tested.
    for id_ in sorted(place_of, key=lambda id_: (place_of[id_], id_)):
        outcome = outcomes[id_]
        if outcome.reason:
            out.add(id_)
            notes.dropped[outcome.reason] += 1
            failures.append({"reason": outcome.reason, "id": id_, "message": outcome.message})
        elif outcome.digest in heard:
            out.add(id_)
            notes.drop(
                selection.DUPLICATE, example={"id": id_, "message": f"sounds exactly like {heard[outcome.digest]}"}
            )
        else:
            heard[outcome.digest] = id_
    notes.examples = (failures + notes.examples)[:_EXAMPLES]
    if not out:
        return layouts
    kept = [{name: tuple(r for r in items if r.id not in out) for name, items in parts.items()} for parts in layouts]
    return [_balanced(p, choices, notes, k if choices.n_folds else None) for k, p in enumerate(kept, 1)]


def _write(folder, data_folder, layouts, outcomes, choices, header, columns, notes, has_clients):
    counts, sizes = {}, {}
    for number, parts in enumerate(layouts, 1):
        below = f"fold_{number}" if choices.n_folds else ""
        (folder / below).mkdir(exist_ok=True)
        for split, path in manifest_paths(folder / below).items():
            write_manifest(path, parts[split], outcomes)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        counts[below] = {split: _count(parts[split], outcomes) for split in splits.SPLITS}
    card = dataset_dict.card(data_folder)
    made = {
        "format_version": FORMAT_VERSION,
        "name": str(card.get("name") or data_folder.name),
        "synthetic": bool(card.get("synthetic", False)),
        "speakers_disjoint": False if choices.split == "random" else True if has_clients else None,
        "fingerprint": selection.digest({key: header[key] for key in ("arguments", "source")}),
        **header,
        "columns": columns,
        "counts": counts if choices.n_folds else counts[""],
        "dropped": {reason: n for reason, n in notes.dropped.most_common() if n},
        "dropped_in_folds": {f"fold_{k}": {r: n for r, n in c.items() if n} for k, c in sorted(notes.folds.items())},
        "examples": notes.examples[:_EXAMPLES],
        "warnings": notes.warnings,
        "files": sizes,
        "audio_files": len({row.id for parts in layouts for items in parts.values() for row in items}),
    }
    with files.atomic_write(folder / PREPARE_JSON) as file:
        json.dump(made, file, indent=1)
    done = load_prepared(folder)
    logger.info("prepared %s in %s: %s", done.name, folder, _in_words(layouts))
    logger.info("left out: %s", selection.in_words(done.dropped) or "nothing")
    return done


def _require_filled(layouts, choices, notes):
    """Refuse a split without a clip of one of the accents."""
    for number, parts in enumerate(layouts, 1):
        where = f" of fold {number}" if choices.n_folds else ""
        wanted = splits.SPLITS if choices.split != "all" else (splits.TEST,)
        selection.require_filled(parts, choices.accents, wanted, notes.dropped + notes.folds[number], where)


# ------------------------------------------------------------------------------------------------------------ files


def _finished(folder, header):
    """The prepared folder when it is what is asked for, None when there is work to do; refused when it is another."""
    finished, started = folder / PREPARE_JSON, folder / JOURNAL_FILE
    if finished.is_file():
        made = dataset_dict.read_json(finished)
    elif started.is_file():
        made = dataset_dict.read_json(started, first_line=True)
    elif any((folder / name).exists() for name in (AUDIO_FOLDER, "train.csv", "fold_1")):
        raise ManifestError(f"{folder} holds audio or manifests made by something else: choose another prepared_folder")
    else:
        return None
    provenance.require_same(folder, made, header, option="prepared_folder", in_part=not finished.is_file())
    if not finished.is_file():
        return None
    try:
        return load_prepared(folder)
    except ManifestError as error:
        logger.warning("%s: mending it", error)
        return None


def _count(rows, outcomes):
    by_accent = defaultdict(list)
    for row in rows:
        by_accent[row.accent].append(row)
    return {
        accent: {
            "clips": len(members),
            "speakers": len({row.client for row in members} - {""}),
            "seconds": round(sum(outcomes[row.id].frames for row in members) / SAMPLE_RATE, 2),
        }
        for accent, members in sorted(by_accent.items())
    }


def _in_words(layouts):
    sizes = [", ".join(f"{name} {len(items)}" for name, items in parts.items()) for parts in layouts]
    return "; ".join(f"fold {k}: {size}" for k, size in enumerate(sizes, 1)) if len(sizes) > 1 else f"clips: {sizes[0]}"


def _precedence(row):
    return _PLACES.get(dataset_dict.canonical(row.split), 0), row.accent, row.gender, row.age, row.split, row.row


_PLACES = {splits.TEST: 0, splits.VALID: 1, splits.TRAIN: 2, "": 0}
