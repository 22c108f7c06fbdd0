"""The built-in corpus: three English accents, spoken by eSpeak NG, for a first run without any recordings.

Every voice reads the same sentences in every accent, so that only the accent tells them apart; a voice is in one
split only, and so is a sentence, though not its words. The speech is synthetic: it shows that the pipeline works, and
says nothing about accuracy on real speech.

    python -m accent_plugin.corpus.synthetic --out data/synthetic --encoder data/tiny_wav2vec2

Needs `pip install accent_plugin[synthetic]`: `espeakng-loader` carries the library (GPL-3.0) and its voices.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data.dataset_dict import CARD_JSON
from accent_plugin.errors import AccentPluginError, DataError

SECONDS = (2.0, 6.0)  # every clip lies between


ACCENTS = {"us": "gmw/en-US", "england": "gmw/en-GB-x-rp", "scotland": "gmw/en-GB-scotland"}


GENDERS = {
    "female": "f1 f2 f3 f4 f5 Annie belinda linda aunty steph grandma".split(),
    "male": (
        "m1 m2 m3 m4 m5 m6 m7 m8 Alex adam rob max Lee Michael edward Mario quincy robert Denis Gene miguel Reed "
        "norbert benjamin marcelo Mike travis david victor sandro michel pablo Henrique boris zac announcer Nguyen"
    ).split(),
}


RATES = (135, 170)  # words a minute


PITCHES = (35, 65)  # eSpeak's scale of 0 to 100; 50 is the variant's own pitch


RANGES = (35, 65)  # how lively the melody is, same scale


MIN_VOICES = 6


LEVEL = 0.06  # root mean square of every clip, full scale 1


COLUMNS = ("accent", "client_id", "sentence", "gender", "path")


# Content words that the accents say differently: bath, car, lot, goat, water, nurse, face, price, square, goose, ...
WORDS = {
    "adjective": """
        awkward better bitter blue bright broken brown careful central clear cold cool dark dear dirty early fair famous
        fast foreign full funny golden good great happy hard heavy hot important last late lazy little lonely long loud
        lovely merry near new noisy northern odd old poor pretty proud pure quiet rare royal rude short slow smooth soft
        sorry sour southern square sure thirsty tiny tired warm wide wooden young
    """,
    "person": """
        actor artist aunt author baker boy brother captain clerk cousin dancer daughter doctor driver farmer father girl
        guard hunter lawyer master mayor mother neighbour nurse painter partner reporter robber sailor soldier stranger
        student tailor teacher tourist uncle visitor waiter worker writer
    """,
    "verb": """
        admired answered asked borrowed bought burned carried caught chose cleared compared covered discovered dropped
        drove explored feared followed forgot found heard hid hired ignored learned lost loved moved noticed painted
        parked passed poured prepared pulled pushed repaired served shared showed started stole stored tied tore turned
        used wanted washed watched wore worried wrote
    """,
    "thing": """
        apple basket bath bear beer bird boat book boot bottle box branch butter cake calf car card cart castle chain
        chair church cloth clock coat coffee coin corn cup deer dog door drum duck ear fern figure fire floor flower
        fork glass goat guitar hair hammer heart hook horse house jacket kite knife ladder letter light metal money
        motor mouse onion orange oyster paper pattern pear pearl phone picture pipe plant plaster plate pot pudding
        purse road rope ruler sausage scarf shirt shower skirt spoon square stone sugar suit sword tower toy train tune
        tyre water wire word work
    """,
    "place": """
        barn bath border bridge brook castle chapel church circus class coast corner dock fair farm forest
        garden gate grass hall harbour highway home house island kitchen lake mall market mountain office path pier pool
        railway river road rock room school shop shore square stable stairs station store theatre tower town valley wall
        water wood yard
    """,
    "preposition": "above across around before behind beside beyond near outside over past under",
    "day": "Thursday Friday Saturday Sunday March April August October birthday morning afternoon winter summer autumn",
}


WORDS = {kind: tuple(words.split()) for kind, words in WORDS.items()}


TEMPLATES = (
    "The {adjective} {person} {verb} the {thing} {preposition} the {other} {place}.",
    "My {person} {verb} that {adjective} {thing} and the {other} {object} last {day}.",
    "That {day} her {person} {verb} our {thing} and the {object} {preposition} the {place}.",
    "In the {adjective} {place} your {person} {verb} this {thing} after that {other} {day}.",
)


def compose(rng):
    """Make up a sentence of about eleven words: grammatical, sayable, and no more than that."""
    words = {kind: rng.choice(choices) for kind, choices in WORDS.items()}
    words |= {"other": rng.choice(WORDS["adjective"]), "object": rng.choice(WORDS["thing"])}
    return rng.choice(TEMPLATES).format(**words)


class Espeak:
    """eSpeak NG, loaded with ctypes.

    The library keeps one global state per process: take the one object that `espeak()` returns.

    Arguments
    ---------
    library : str
        Path of the shared library.
    data : str
        Path of its `espeak-ng-data` folder.
    """

    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
    SYNCHRONOUS, UTF8, DONT_EXIT = 2, 1, 0x8000
    LONGEST_PATH = 100  # bytes; the library cuts its data folder off at 160, file names included

    def __init__(self, library, data):
        self.lib = ctypes.CDLL(library)
        self.lib.espeak_Info.restype = ctypes.c_char_p
        self.data = Path(data)
        short = self.data
        if len(os.fsencode(data)) > self.LONGEST_PATH:
            self._link = tempfile.TemporaryDirectory(prefix="espeak-")  # files are opened as they are needed
            short = Path(self._link.name) / "data"
            short.symlink_to(self.data, target_is_directory=True)
        self.sample_rate = self.lib.espeak_Initialize(self.SYNCHRONOUS, 0, os.fsencode(short), self.DONT_EXIT)
        if self.sample_rate <= 0:
            raise DataError(
                f"eSpeak NG cannot start with its data in {data}: run pip install --force-reinstall espeakng-loader"
            )
        self.version = self.lib.espeak_Info(None).decode()
        self.lock = threading.Lock()
        self.chunks = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._collect)  # held here, or Python frees it while the library still calls it
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events):
        """Copy one buffer, which the library reuses; 0 means go on."""
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text, voice, variant, rate=165, pitch=50, pitch_range=50):
        """Say one sentence.

        Arguments
        ---------
        text : str
            What to say.
        voice : str
            Name of an accent's voice file, such as "gmw/en-US".
        variant : str
            Name of a variant, such as "f2".
        rate : int
            Words a minute.
        pitch : int
            0 to 100; 50 is the variant's own.
        pitch_range : int
            0 to 100; 0 is a monotone.

        Returns
        -------
        (samples,) np.ndarray
            float32, at `self.sample_rate`.

        Raises
        ------
        DataError
            When the voice, the variant or a parameter does not exist, or nothing was said.
        """
        # An unknown variant is no error to eSpeak: it speaks with the plain voice.
        if not (self.data / "voices/!v" / variant).is_file():
            raise DataError(f"eSpeak NG {self.version} has no variant '{variant}' in {self.data / 'voices/!v'}")
        with self.lock:
            if self.lib.espeak_SetVoiceByName(f"{voice}+{variant}".encode()):
                raise DataError(f"eSpeak NG {self.version} has no voice '{voice}' in {self.data / 'lang'}")
            # Below 100 the louder variants stay clear of clipping inside the library.
            settings = {self.RATE: rate, self.VOLUME: 50, self.PITCH: pitch, self.RANGE: pitch_range}
            for parameter, value in settings.items():
                if self.lib.espeak_SetParameter(parameter, value, 0):
                    raise DataError(f"eSpeak NG {self.version} refuses the value {value} for its parameter {parameter}")
            self.chunks.clear()
            encoded = text.encode()
            size = ctypes.c_size_t(len(encoded) + 1)
            failed = self.lib.espeak_Synth(encoded, size, 0, 1, 0, self.UTF8, None, None)
            if failed or self.lib.espeak_Synchronize() or not self.chunks:
                raise DataError(f"eSpeak NG {self.version} said nothing with voice '{voice}+{variant}': {text}")
            return np.concatenate(self.chunks).astype(np.float32) / 32768


@functools.cache
def espeak():
    """Return this process's one eSpeak NG."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise DataError(
            "the built-in corpus is spoken by eSpeak NG, which is not installed\n"
            "run: pip install accent_plugin[synthetic]"
        ) from error
    return Espeak(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())


def plan(seed=0, voices=48, clips_per_voice=16):
    """List the clips of the corpus: who says what in which split.

    Arguments
    ---------
    seed : int
        Chooses each voice's split, pitch, rate and sentences.
    voices : int
        Different voices over all splits; about two thirds train, one sixth each validate and test.
    clips_per_voice : int
        Sentences that each voice reads, in every accent; no other voice reads them.

    Returns
    -------
    dict
        Split name -> list of dicts: accent, client_id, sentence, gender, path, and eSpeak's variant, rate, pitch and
        pitch_range.
    """
    most = sum(map(len, GENDERS.values()))
    if not MIN_VOICES <= voices <= most:
        raise DataError(
            f"voices is {voices}; choose {MIN_VOICES} to {most}, which is how many eSpeak has for this corpus"
        )
    if clips_per_voice < 1:
        raise DataError(f"clips_per_voice is {clips_per_voice}; choose 1 or more")
    rng = random.Random(seed)
    women = max(3, round(voices * len(GENDERS["female"]) / most))
    clips = {"train": [], "validation": [], "test": []}
    used = set()
    for gender, count in {"female": women, "male": voices - women}.items():
        pool = rng.sample(GENDERS[gender][:count], count)
        size = max(1, round(count / 6))
        members = {"test": pool[:size], "validation": pool[size : 2 * size], "train": pool[2 * size :]}
        for split, variants in members.items():
            for variant in sorted(variants):
                manner = {
                    "variant": variant,
                    "rate": rng.randint(*RATES),
                    "pitch": rng.randint(*PITCHES),
                    "pitch_range": rng.randint(*RANGES),
                }
                for number in range(clips_per_voice):
                    while (sentence := compose(rng)) in used:
                        pass
                    used.add(sentence)
                    for accent in ACCENTS:
                        client = f"{accent}-{variant}"
                        row = {"accent": accent, "client_id": client, "sentence": sentence, "gender": gender}
                        clips[split].append({**row, "path": f"{client}-{number:03d}.flac", **manner})
    return clips


def _speak(clip):
    """Speak one planned clip and encode it: 16 kHz mono FLAC, all clips equally loud."""
    speaker = espeak()
    wave = speaker.speak(
        clip["sentence"], ACCENTS[clip["accent"]], clip["variant"], clip["rate"], clip["pitch"], clip["pitch_range"]
    )
    wave = soxr.resample(wave, speaker.sample_rate, SAMPLE_RATE)
    level = float(np.sqrt(np.mean(wave**2)))
    seconds = len(wave) / SAMPLE_RATE
    if level < 1e-3 or not SECONDS[0] <= seconds <= SECONDS[1]:
        raise DataError(
            f"eSpeak NG {speaker.version} spoke {clip['path']} in {seconds:.2f} s at a level of {level:.4f}: "
            f"a clip must last {SECONDS[0]:g} to {SECONDS[1]:g} s and not be silent"
        )
    # eSpeak speaks Scottish louder than American: without this, loudness alone would tell.
    wave *= min(LEVEL / level, 0.99 / np.abs(wave).max())
    buffer = io.BytesIO()
    sf.write(buffer, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def make_corpus(folder, seed=0, voices=48, clips_per_voice=16, say=None):
    """Make the built-in corpus, a DatasetDict on disk, or find it made.

    Arguments
    ---------
    folder : str or Path
        Where it goes. It appears there whole or not at all.
    seed : int
        See `plan`; the same seed gives the same clips (eSpeak's own noise may differ).
    voices : int
        See `plan`.
    clips_per_voice : int
        See `plan`.
    say : callable, optional
        Takes one line of progress for a person.

    Returns
    -------
    dict
        The card, as in `accent_plugin.json` in the folder.

    Raises
    ------
    DataError
        When the folder holds something else, or eSpeak NG is missing or lacks a voice.

    Example
    -------
    >>> make_corpus("data/synthetic", seed=0)["synthetic"]  # doctest: +SKIP
    True
    """
    say = say or (lambda line: None)
    arguments = {"seed": seed, "voices": voices, "clips_per_voice": clips_per_voice}
    found = _found(folder, arguments)
    if found:
        say(f"{folder} is there already, made with the same arguments: nothing to do")
        return found
    clips = plan(**arguments)
    card = {
        "synthetic": True,
        "name": "built-in synthetic corpus (eSpeak NG)",
        "note": "it shows that the pipeline works, and says nothing about accuracy on real speech",
        **arguments,
        "espeak_version": espeak().version,
    }
    say(f"speaking {sum(map(len, clips.values()))} clips with eSpeak NG {card['espeak_version']}")
    start = time.monotonic()

    from datasets import Audio, Dataset, DatasetDict

    with _publish(folder) as temporary:
        splits = DatasetDict()
        for split, rows in clips.items():
            audio = [{"bytes": _speak(row), "path": row["path"]} for row in rows]
            columns = {name: [row[name] for row in rows] for name in COLUMNS}
            # Given as a plain struct, then cast: encoding an Audio feature would need torchcodec and FFmpeg.
            dataset = Dataset.from_dict({"audio": audio, **columns})
            splits[split] = dataset.cast_column("audio", Audio(sampling_rate=SAMPLE_RATE))
            say(f"{split}: {len(rows)} clips of {len({row['variant'] for row in rows})} voices")
        splits.save_to_disk(temporary)
        (temporary / CARD_JSON).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    say(f"{folder} is ready, made in {time.monotonic() - start:.0f} s; synthetic speech: {card['note']}")
    return card


def _found(folder, arguments):
    """Card of the corpus that is there already, None where there is nothing; anything else is an error."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        card = json.loads((folder / CARD_JSON).read_text(encoding="utf-8"))
        if not card["synthetic"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is there already and is no built-in corpus: choose another folder") from error
    other = [f"{name} was {card.get(name)}, not {new}" for name, new in arguments.items() if card.get(name) != new]
    if other:
        raise DataError(
            f"{folder} was made with other arguments: {', '.join(other)}\n"
            "delete it, choose another folder, or pass the same arguments"
        )
    return card


@contextlib.contextmanager
def _publish(folder):
    """Give a temporary folder beside `folder`, and rename it to `folder` once all went well."""
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as outer:
        inner = Path(outer) / folder.name  # not `outer` itself, which only its owner may read
        inner.mkdir()
        yield inner
        if folder.exists():
            folder.rmdir()  # empty, or _found had raised
        inner.rename(folder)


def main(arguments=None):
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m accent_plugin.corpus.synthetic", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the DatasetDict goes")
    parser.add_argument("--encoder", metavar="FOLDER", help="also make a tiny, random wav2vec2 there")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--voices", type=int, default=48, help="default: %(default)s")
    parser.add_argument("--clips_per_voice", type=int, default=16, help="default: %(default)s")
    options = parser.parse_args(arguments)

    def say(line):
        print(line, file=sys.stderr)

    try:
        make_corpus(options.out, options.seed, options.voices, options.clips_per_voice, say)
        if options.encoder:
            from accent_plugin.encoder.tiny import make_tiny_wav2vec2

            make_tiny_wav2vec2(options.encoder, options.seed, say)
    except AccentPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write: {error}; free some space there, or choose another folder", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
