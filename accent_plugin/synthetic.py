"""The built-in corpus: three English accents, spoken by eSpeak NG, for a first run without any recordings.

Every voice reads the same sentences in every accent, so that only the accent tells them apart; a voice is in one
split only, and so is a sentence. The speech is synthetic: it proves the machinery, not accuracy on people.

    python -m accent_plugin.synthetic --out data/synthetic --encoder data/tiny_wav2vec2

Needs `pip install accent_plugin[synthetic]`: `espeakng-loader` carries the library (GPL-3.0) and its voices.
"""

import argparse
import ctypes
import functools
import io
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from accent_plugin.errors import AccentPluginError, DataError

CARD = "accent_plugin.json"
SAMPLE_RATE = 16000  # hertz
SECONDS = (2.0, 6.0)  # every clip lies between
ACCENTS = {"us": "gmw/en-US", "england": "gmw/en-GB-x-rp", "scotland": "gmw/en-GB-scotland"}
GENDERS = {
    "female": "f1 f2 f3 f4 f5 Annie belinda linda aunty Alicia steph grandma".split(),
    "male": (
        "m1 m2 m3 m4 m5 m6 m7 m8 Alex adam rob max Lee Michael edward Mario quincy robert Denis Gene miguel Reed "
        "norbert benjamin marcelo Mike travis david victor sandro michel pablo Henrique boris zac Nguyen"
    ).split(),
}
RATES = (130, 170)  # words a minute
PITCHES = (35, 65)  # eSpeak's scale of 0 to 100; 50 is the variant's own pitch
RANGES = (35, 65)  # how lively the melody is, same scale
MIN_VOICES = 6
LEVEL = 0.06  # root mean square of every clip, full scale 1
COLUMNS = ("accent", "client_id", "sentence", "gender", "path")

# Written for this package. Each holds several words which the accents say differently: bath, dance, lot, car, nurse,
# water, goat, face, price, goose, ... About ten words: 2 to 6 seconds with the voices and rates above.
SENTENCES = """
    The bath water was hot, so she opened the door a little.
    My father parked the car near the harbour after dark.
    They danced in the barn until the farmer turned off the light.
    A lot of people stop at the corner shop for butter.
    The nurse heard the first bird singing early in the morning.
    Nobody knows whether the old goat ate the boat rope.
    I can't ask my aunt to laugh at that bad answer.
    The price of rice is higher on the other side of town.
    Her face was pale after waiting eight days for the train.
    We shared a pair of chairs in the market square.
    The north wind tore the last poster from the wall.
    Put the good book back by the foot of the stairs.
    The cloth was soft, long, and dyed the colour of coffee.
    Two new students moved into the blue house in June.
    Daughters and fathers walk across the grass to the castle.
    The poor doctor cured a hundred people of the fever.
    Every Thursday a girl in a purple shirt works at the church.
    Take the fast road past the farm and turn left after the bridge.
    Peter had bought a bottle of water and a better battery.
    Our neighbour's old motor car is slower than a tired horse.
    The choir enjoyed the noise of coins in the oyster box.
    Half of the class passed the chance to plant an orange tree.
    He fought hard and caught the ball in the autumn storm.
    Show me the road home, it snowed and I am cold.
    The mouse ran out of the house and down the brown tower.
    My brother loves the funny young cousin who comes on Sunday.
    Here is the beer that we cheered about last year.
    There were bears and hares asleep beneath the square table.
    The matter is better settled later by letter, not today.
    Mary will marry a merry sailor from a ferry in February.
    A rotten log rolled off the dock and got lost in the fog.
    The artist started a large chart of stars and Mars.
    Would you look at the wolf that pushed through the woods.
    Bring the master a basket, a glass, and a half pint of milk.
    The third person in the circle was certain of the word.
    Eight great snakes came to the lake in May and stayed.
    Nine white kites fly high in the bright blue sky.
    Thought and talk are small beer when the law is broken.
    Going slowly over the frozen road, Joan broke her toe.
    The water in the garden was warmer than the river.
    A few of the usual tunes were too rude for school.
    Father's sharp scissors are in the dark drawer under the stairs.
    My daughter bought four more doors for the storehouse.
    Ask for a card at the bar, and start with the tart.
    Robert got a copper pot and a hot sausage from the shop.
    Worse words were heard when the nurse burned her shirt.
    Fair hair, rare pears, and careful stairs are all I want.
    The captain ordered his daughter to alter the course at once.
    We can't advance the dance class by half an hour.
    Butter and jam taste better on a little hot bread.
    The author walked all morning along the tall garden wall.
    Do you suppose that the coach is going to the coast?
    Later that day the waiter placed a plate on the table.
    I might ride my bike for five miles on Friday night.
    Tired drivers hire a fire engine for an hour or more.
    The pure water of our river cured the poor farmer.
    Boys avoid the noisy toys and point at the royal coin.
    The brown cow found a mouth of flowers around the house.
    Young Duncan cut the sun from a dozen coloured covers.
    The cook took a good look at the sugar and the pudding.
    Rude Sue knew that the moon would soon be full and blue.
    Laughing aunts can pass the glass vase after the bath.
    The bird in the dirty fur turned over the world's first pearl.
    More sport before four o'clock is a bore, or so I thought.
    Clear your ears, dear, and hear the deer near the pier.
    Odd dogs jog across the rocks and stop on the cold coast.
    Charles remarked that the park guard's heart was hard.
    Later editions of the city letter were written by Betty.
    The path to the castle is faster than the road past the farm.
    Thirty thirsty workers turned towards the northern shore.
    Arthur's sister remembers the winter weather in Manchester.
    The doctor's daughter thought about the water bottle a lot.
    Grandmother baked eight small cakes for the Easter party.
    The quarrel over a foreign orange started in the forest.
    It is not fair to leave the mayor there without a chair.
    The loud crowd on the ground shouted about the power tower.
    Put more powder on the floor before the visitors arrive.
    Nothing was better than hot buttered toast by the fire.
    The clerk asked whether the castle had a laundry or a bath.
    A sparkling star far above the garden marked the hour.
    Tomorrow the squirrel will borrow a sorry little carrot.
    Several hours later the waiter brought a hotter pot of coffee.
    My own phone rolled over the stone and broke below the road.
    The tailor's place is eight miles away by the railway gate.
    Half of the garden path is covered in dark, wet grass.
    The sailors saw four swords and a horse on board the ship.
    Don't go home alone, Joe, the boat is slow and the hole is low.
    She heard that her turn at the circus came on the thirteenth.
    Last winter an army of ants marched over our plaster wall.
    The writer might find a nicer title for his final line.
    A pocket watch and a box of socks were lost on the rocks.
    Our hearts are lighter after an hour of poetry and water.
    Bert's shirt is dirty, but the birthday skirt is worse.
    Care for the mare and share your pear with the young heir.
    The answer to the last task was passed under the glass.
    You could see the full moon through the wool of the wood.
""".strip().splitlines()
SENTENCES = tuple(line.strip() for line in SENTENCES)
TEST_SENTENCES = 20
VALID_SENTENCES = 12


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

    def __init__(self, library, data):
        self.lib = ctypes.CDLL(library)
        self.lib.espeak_Info.restype = ctypes.c_char_p
        self.lib.espeak_Synth.argtypes = (
            [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
            + [ctypes.c_void_p] * 2
        )
        self.sample_rate = self.lib.espeak_Initialize(self.SYNCHRONOUS, 0, str(data).encode(), self.DONT_EXIT)
        if self.sample_rate <= 0:
            raise DataError(f"eSpeak NG cannot start: espeak_Initialize gave {self.sample_rate} with the data in {data}")
        self.data = Path(data)
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
            failed = self.lib.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, self.UTF8, None, None)
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
        Chooses each voice's split, pitch, rate and sentences, and each sentence's split.
    voices : int
        Different voices over all splits; about two thirds train, one sixth each validate and test.
    clips_per_voice : int
        Sentences that each voice of the training split reads in each accent; the others read as many of their own.

    Returns
    -------
    dict
        Split name -> list of dicts: accent, client_id, sentence, gender, path, and eSpeak's variant, rate, pitch and
        pitch_range.
    """
    most = sum(map(len, GENDERS.values()))
    if not MIN_VOICES <= voices <= most:
        raise DataError(f"voices is {voices}; choose {MIN_VOICES} to {most}, which is how many eSpeak has for this corpus")
    if clips_per_voice < 1:
        raise DataError(f"clips_per_voice is {clips_per_voice}; choose 1 or more")
    rng = random.Random(seed)
    order = rng.sample(range(len(SENTENCES)), len(SENTENCES))
    held_out = TEST_SENTENCES + VALID_SENTENCES
    texts = {"train": order[held_out:], "validation": order[TEST_SENTENCES:held_out], "test": order[:TEST_SENTENCES]}
    women = max(3, round(voices * len(GENDERS["female"]) / most))
    chosen = {"female": women, "male": voices - women}
    clips = {split: [] for split in texts}
    for gender, count in chosen.items():
        pool = rng.sample(GENDERS[gender][:count], count)
        held = max(1, round(count / 6))
        members = {"test": pool[:held], "validation": pool[held : 2 * held], "train": pool[2 * held :]}
        for split, variants in members.items():
            for variant in sorted(variants):
                manner = {
                    "variant": variant,
                    "rate": rng.randint(*RATES),
                    "pitch": rng.randint(*PITCHES),
                    "pitch_range": rng.randint(*RANGES),
                }
                for index in sorted(rng.sample(texts[split], min(clips_per_voice, len(texts[split])))):
                    for accent in ACCENTS:
                        client = f"{accent}-{variant}"
                        row = {"accent": accent, "client_id": client, "sentence": SENTENCES[index], "gender": gender}
                        clips[split].append({**row, "path": f"{client}-{index:03d}.flac", **manner})
    return clips


def _clip(clip):
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
    return buffer.getvalue(), seconds


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
    folder = Path(folder).absolute()
    arguments = {"seed": seed, "voices": voices, "clips_per_voice": clips_per_voice}
    found = _found(folder, arguments)
    if found:
        say(f"{folder} is there already, made with the same arguments: nothing to do")
        return found
    clips = plan(**arguments)
    version = espeak().version
    say(f"speaking {sum(map(len, clips.values()))} clips with eSpeak NG {version}")
    start = time.monotonic()

    from datasets import Audio, Dataset, DatasetDict

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        splits, spoken = DatasetDict(), {}
        for split, rows in clips.items():
            cells = [_clip(row) for row in rows]
            columns = {name: [row[name] for row in rows] for name in COLUMNS}
            audio = [{"bytes": data, "path": row["path"]} for row, (data, _) in zip(rows, cells, strict=True)]
            # Given as a plain struct, then cast: encoding an Audio feature would need torchcodec and FFmpeg.
            splits[split] = Dataset.from_dict({"audio": audio, **columns}).cast_column("audio", Audio(SAMPLE_RATE))
            spoken[split] = round(sum(seconds for _, seconds in cells), 1)
            say(f"{split}: {len(rows)} clips, {spoken[split] / 60:.1f} minutes")
        splits.save_to_disk(temporary / "corpus")
        card = {
            "synthetic": True,
            "name": "built-in synthetic corpus (eSpeak NG)",
            "note": "proves the machinery, says nothing about accuracy on people",
            **arguments,
            "espeak_version": version,
            "seconds": spoken,
        }
        (temporary / "corpus" / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # empty, or _found had raised
        (temporary / "corpus").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{folder} is ready, made in {time.monotonic() - start:.0f} s: synthetic speech, {card['note']}")
    return card


def _found(folder, arguments):
    """Return the card of a corpus that is there already, None where there is nothing; raise for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is there already and is no built-in corpus: choose another folder") from error
    other = [f"{name} {card.get(name)}, not {value}" for name, value in arguments.items() if card.get(name) != value]
    if other:
        raise DataError(
            f"{folder} was made with other arguments: {', '.join(other)}\n"
            "delete it, choose another folder, or pass the same arguments"
        )
    return card


def main(arguments=None):
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m accent_plugin.synthetic", description=__doc__.split("\n")[0])
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
            from accent_plugin.tiny import make_tiny_wav2vec2

            make_tiny_wav2vec2(options.encoder, options.seed, say)
    except AccentPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
