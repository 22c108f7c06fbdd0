"""Tiny Common Voice releases, with the columns, spellings and paths of each version; and what was made of them."""

import csv
import functools
import os

from accent_plugin.audio.codecs import encode_mp3
from helpers.dataset_dicts import noise

# The folder that each archive unpacks to; a language's folder lies in it, except in version 1.
FOLDERS = {
    1: "cv_corpus_v1",
    2: "cv-corpus-2",
    3: "cv-corpus-3",
    5: "cv-corpus-5.1-2020-06-22",
    6: "cv-corpus-6.1-2020-12-11",
    8: "cv-corpus-8.0-2022-01-19",
    12: "cv-corpus-12.0-2022-12-07",
    13: "cv-corpus-13.0-2023-03-09",
    17: "cv-corpus-17.0-2024-03-15",
    22: "cv-corpus-22.0-2025-06-20",
    25: "cv-corpus-25.0",
    27: "cv-corpus-27.0",
}

# From version 8 on; before, the label itself was written.
FULL_NAMES = {
    "us": "United States English",
    "england": "England English",
    "australia": "Australian English",
    "indian": "India and South Asia (India, Pakistan, Sri Lanka)",
    "scotland": "Scottish English",
}
GENDERS_SINCE_25 = {"male": "male_masculine", "female": "female_feminine"}

V1_COLUMNS = "filename,text,up_votes,down_votes,age,gender,accent,duration".split(",")


def columns(version):
    """Header of a TSV file, as that version has it."""
    if version >= 17:
        names = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant"
    elif version >= 13:
        names = "client_id path sentence up_votes down_votes age gender accents variant"
    elif version >= 8:
        names = "client_id path sentence up_votes down_votes age gender accents"
    else:
        names = "client_id path sentence up_votes down_votes age gender accent"
    return names.split() + (["locale", "segment"] if version >= 5 else [])


def row(client, accent="", clip=0, **cells):
    """One clip. An accent that is a label, or a gender, is written as the version does; other text as it stands."""
    made = {
        "client": client,
        "accent": accent,
        "path": f"common_voice_en_{client}_{clip}.mp3",
        "sentence": f"Sentence {client} {clip}.",
        "up_votes": 2,
        "down_votes": 0,
        "age": "twenties",
        "gender": "",
        "variant": "",
        "seconds": 1.5,
        "present": True,
    }
    if unknown := cells.keys() - made.keys():
        raise TypeError(f"a row has no {', '.join(sorted(unknown))}")
    return made | cells


def people(accent, clients, clips=1, first=0, **cells):
    """Rows of clients us-0, us-1, ... with so many clips each."""
    return [row(f"{accent}-{k}", accent, clip, **cells) for k in range(first, first + clients) for clip in range(clips)]


def pool(clients=40, clips=1, accents=("us", "england", "australia"), **cells):
    """Enough clients of each accent that no split is empty by chance: at 0.3 once in some 300,000 seeds."""
    return [made for accent in accents for made in people(accent, clients, clips, **cells)]


def cells_of(made, version):
    """The cells of a row, in the order of the columns."""
    accent = made["accent"] if version < 8 else FULL_NAMES.get(made["accent"], made["accent"])
    gender = made["gender"] if version < 25 else GENDERS_SINCE_25.get(made["gender"], made["gender"])
    cells = {
        "client_id": made["client"],
        "path": made["path"].removesuffix(".mp3") if version in (2, 3) else made["path"],
        "sentence": made["sentence"],
        "up_votes": str(made["up_votes"]),
        "down_votes": str(made["down_votes"]),
        "age": made["age"],
        "gender": gender,
        # English lost its accents in this one version.
        "accent": accent,
        "accents": "" if version == 12 else accent,
        "variant": made["variant"],
        "locale": "en",
    }
    return [cells.get(name, "") for name in columns(version)]


def line(made, version, eol="\n"):
    """A row as a line of the TSV file."""
    return ("\t".join(cells_of(made, version)) + eol).encode()


def release(parent, version, rows=(), *, distinct=False, seconds=0.6, eol="\n", bom=False, **tables):
    """Write a release and return its folder.

    ``rows`` go to validated.tsv (version 1: cv-valid-train.csv), ``tables`` (train, dev, test, other) to files of their
    names; an entry that is bytes is written as it is, for damaged lines. ``distinct`` gives every clip a sound of its
    own. ``seconds`` is what the sounds last, a row's own "seconds" what clip_durations.tsv says.
    """
    if version == 1:
        return _release_1(parent, {"train": rows, **tables}, distinct, seconds)
    folder = parent / FOLDERS[version] / "en"
    (folder / "clips").mkdir(parents=True)
    durations = {}
    for name, table in {"validated": rows, **tables}.items():
        lines = [made if isinstance(made, bytes) else line(made, version, eol) for made in table]
        header = ("\t".join(columns(version)) + eol).encode()
        (folder / f"{name}.tsv").write_bytes((b"\xef\xbb\xbf" if bom else b"") + header + b"".join(lines))
        for made in table:
            if not isinstance(made, bytes):
                durations[made["path"]] = made["seconds"]
                if made["present"]:
                    (folder / "clips" / made["path"]).write_bytes(sound(made["path"] if distinct else "", seconds))
    if version >= 17:
        known = [f"{path}\t{round(1000 * lasts)}\n" for path, lasts in durations.items() if lasts is not None]
        (folder / "clip_durations.tsv").write_text("clip\tduration[ms]\n" + "".join(known))
    return folder


def _release_1(parent, tables, distinct, seconds):
    folder = parent / FOLDERS[1]
    folder.mkdir(parents=True)
    for split, table in tables.items():
        name = f"cv-valid-{split}" if split in ("train", "dev", "test") else f"cv-{split}"
        (folder / name).mkdir()
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(V1_COLUMNS)
            for number, made in enumerate(table):
                path = f"{name}/sample-{number:06}.mp3"
                votes, rest = [made["up_votes"], made["down_votes"]], [made["age"], made["gender"], made["accent"], ""]
                writer.writerow([path, made["sentence"].lower().rstrip("."), *votes, *rest])
                if made["present"]:
                    (folder / path).write_bytes(sound(path if distinct else "", seconds))
    return folder


@functools.lru_cache(maxsize=1000)
def sound(name="", seconds=0.6):
    """A small MP3 of noise, another for each name."""
    return encode_mp3(noise(seconds, seed=list(name.encode())), 16_000)


# ------------------------------------------------------------------------------------------------- what became of it


def saved(folder):
    """Split -> rows of a DatasetDict on disk, ``audio`` as {bytes, path}."""
    from datasets import Audio, load_from_disk

    return {
        split: data.cast_column("audio", Audio(decode=False)).to_list()
        for split, data in load_from_disk(str(folder)).items()
    }


def flat(folder):
    """All rows of a DatasetDict on disk, without their splits."""
    return [made for rows in saved(folder).values() for made in rows]


def clients_of(folder):
    """Split -> clients."""
    return {split: {made["client_id"] for made in rows} for split, rows in saved(folder).items()}


def kept(built):
    """Accent -> clips in all splits together."""
    found = {}
    for accents in built.counts.values():
        for accent, count in accents.items():
            found[accent] = found.get(accent, 0) + count["clips"]
    return found


def tree(folder):
    """Size and time of change of everything in a folder."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(where, name)
            state = os.stat(path)
            found[os.path.relpath(path, folder)] = (state.st_size, state.st_mtime_ns)
    return found
