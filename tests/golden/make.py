"""Make golden files: what this version writes, for later versions to open.

    python tests/golden/make.py tests/golden/VERSION
    .venv-oldest/bin/python tests/golden/make.py tests/golden/oldest layers

runs the recipe on pure tones, with encoders of a few thousand random weights, and keeps

    clips/         recordings to classify, 16 bits
    data/          the DatasetDict that was trained on
    encoder/       the encoder that was fine-tuned, as Hugging Face saves it
    prepared/      clips and manifests
    interrupted/   a run that was stopped within its second epoch
    finished/      the same run, resumed: checkpoints, report, bundle
    bundles/       bundles of other encoders and heads, and of an export to ONNX; or those that are named
    expected.json  versions, the command of the runs, and the probabilities that each bundle gave to the clips

A folder is made once, with the version that it is named after, and never again: with a later version it would prove
nothing. 0.1.0 was made on an x86 CPU with the versions of packages that its expected.json names. `oldest` was made by
version 0.2.0 with torch 2.6 and the packages of constraints-oldest.txt; it holds only what differs from 0.1.0. The same
versions make the same weights; only times differ. Folders of the machine are replaced by the text `PLACEHOLDER`.
Pictures, HTML and the record of the environment are left out.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/CommonVoiceAccent"
# In place of the folder where everything was made.
PLACEHOLDER = "/folder-of-golden-files"
RATE = 16_000
# Accent -> hertz of the tone that stands for it.
TONES = {"us": 300.0, "england": 900.0, "australia": 2700.0}
SPEAKERS = {"train": 3, "validation": 1, "test": 2}
# Optimizer steps after which the run is stopped: three make an epoch.
STOP_AFTER = 4
LEFT_OUT = (".run.holder.json", "*.png", "*.html", "env.log", "log.txt", "train.py", "tensorboard", "*.lock")

# Bundle -> family of its encoder, values of that, and what the command line changes.
BUNDLES = {
    "statistics": (
        "Wav2Vec2",
        {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        ["--pooling", "statistics", "--freeze_wav2vec2", "True", "--whitening_passes", "1"]
        + ["--weighted_layers", "all", "--standardise_layers", "True", "--test_speeds", "[0.9, 1.0, 1.1]"],
    ),
    "layers": (
        "Hubert",
        {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        ["--weighted_layers", "[0, 2]", "--projector_size", "8"],
    ),
    "whitening": ("Hubert", {}, ["--freeze_wav2vec2", "True", "--whitening_passes", "1"]),
    "attentive": (
        "WavLM",
        {"num_buckets": 32},
        ["--pooling", "attentive", "--projector_size", "8", "--projector_activation", "True"],
    ),
    "adapters": ("Data2VecAudio", {}, ["--lora_rank", "2"]),
    "attentive_statistics": ("Moonshine", {}, ["--pooling", "attentive_statistics", "--num_layers", "1"]),
    "whisper": ("Whisper", {}, []),
}


def tone(hertz, seconds, seed):
    """A tone with a little noise, in 16 bits: FLAC makes it small."""
    noise = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    wave = 0.1 * np.sin(2 * np.pi * hertz * np.arange(len(noise)) / RATE) + 0.00005 * noise
    return np.round(wave * 32768).astype(np.int16)


def make_clips(folder):
    """Tones that are none of those that were trained on, and of several lengths."""
    folder.mkdir()
    for name, hertz, seconds in (("low", 450.0, 0.6), ("middle", 1200.0, 1.0), ("high", 2500.0, 0.4)):
        soundfile.write(folder / f"{name}.flac", tone(hertz, seconds, 0), RATE)


def make_data(folder):
    """A DatasetDict of tones."""
    import io

    from datasets import Audio, Dataset, DatasetDict, Features, Value

    sound = {"bytes": Value("binary"), "path": Value("string")}
    texts = ("client_id", "path", "sentence", "accent", "gender", "age")
    features = Features({**dict.fromkeys(texts, Value("string")), "audio": sound})
    tables, number = {}, 0
    for split, speakers in SPEAKERS.items():
        rows = []
        for accent, hertz in TONES.items():
            for speaker in range(speakers):
                for clip in range(2):
                    number += 1
                    name, file = f"{split}-{accent}-{speaker}-{clip}", io.BytesIO()
                    pitch = hertz * (1 + 0.05 * speaker + 0.02 * clip)
                    soundfile.write(file, tone(pitch, 0.5 + 0.1 * clip, number), RATE, format="FLAC")
                    row = {"client_id": f"{split}-{accent}-{speaker}", "path": f"{name}.flac", "sentence": f"{name}."}
                    row |= {"accent": accent, "gender": "female" if speaker else "male", "age": "twenties"}
                    rows.append(row | {"audio": {"bytes": file.getvalue(), "path": row["path"]}})
        tables[split] = Dataset.from_list(rows, features=features).cast_column("audio", Audio())
    DatasetDict(tables).save_to_disk(str(folder))


def make_encoder(folder, family, values):
    """An encoder with random weights, as small as its family allows."""
    import torch
    import transformers

    if family == "Moonshine":
        shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 16}
        shape |= {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1}
        shape |= {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    elif family == "Whisper":
        shape = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
        shape |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
        shape |= {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        shape |= {"decoder_start_token_id": 3, "begin_suppress_tokens": None}
    else:
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16}
        shape |= {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5} if family == "Data2VecAudio" else {}
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**shape | values))
    model.save_pretrained(folder)
    if family == "Whisper":
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=family != "Moonshine").save_pretrained(folder)


def command_line(folder, run, encoder):
    """What `train.py` is given, for files in one folder."""
    return [
        "hparams/wav2vec2_base.yaml",
        *("--data_folder", f"{folder}/data", "--prepared_folder", f"{folder}/prepared"),
        *("--output_folder", str(run), "--wav2vec2_hub", str(encoder)),
        *("--number_of_epochs", "3", "--batch_seconds", "4", "--min_seconds", "0.5", "--max_seconds", "4"),
        *("--num_workers", "0", "--precision", "fp32"),
        *("--lr_encoder", "0.001", "--lr_head", "0.1", "--device", "cpu", "--noprogressbar"),
    ]


def load_recipe():
    """The module train.py."""
    sys.path.insert(0, str(RECIPE))
    spec = importlib.util.spec_from_file_location("accent_recipe", RECIPE / "train.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


@contextlib.contextmanager
def stopping():
    """Send SIGTERM, as a scheduler would, in the midst of an epoch."""
    from accent_plugin.training.brain import AccentBrain

    fit_batch = AccentBrain.fit_batch

    def stopping(self, batch):
        if self.optimizer_step == STOP_AFTER - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return fit_batch(self, batch)

    AccentBrain.fit_batch = stopping
    yield
    AccentBrain.fit_batch = fit_batch


def require(code, wanted=0):
    """End where a command did not end as it should."""
    if code != wanted:
        sys.exit(f"exit code {code}, not {wanted}")


def make_runs(recipe, folder):
    """A run that is stopped, what it left, and its end."""
    make_encoder(folder / "encoder", "Wav2Vec2", {"feat_extract_norm": "group"})
    words = command_line(folder, folder / "finished", folder / "encoder")
    with stopping():
        require(recipe.main(words), 128 + signal.SIGTERM)
    shutil.copytree(folder / "finished", folder / "interrupted")
    require(recipe.main(words))


def make_bundles(recipe, folder, scratch, names):
    """Bundles of finished runs, of which nothing else is kept, and an export to ONNX; or those that are named."""
    from accent_plugin.cli import main as cli_main

    for name in names or BUNDLES:
        family, values, changes = BUNDLES[name]
        encoder, run = scratch / f"tiny_{family.lower()}", scratch / name
        make_encoder(encoder, family, values)
        require(recipe.main([*command_line(folder, run, encoder), "--number_of_epochs", "8", *changes]))
        shutil.copytree(run / "bundle", folder / "bundles" / name)
    if not names:
        out = str(folder / "bundles/onnx")
        require(cli_main.main(["export", str(folder / "finished"), "--to", "onnx", "--out", out]))


def write_expected(folder):
    """Classify the clips with each bundle; refuse those whose answers would say nothing."""
    from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier
    from accent_plugin.inference.classifier import AccentClassifier
    from accent_plugin.versions import installed_versions

    found = {}
    for bundle in (folder / "finished/bundle", *sorted((folder / "bundles").iterdir())):
        kind = OnnxAccentClassifier if bundle.name == "onnx" else AccentClassifier
        classifier = kind.from_bundle(bundle)
        clips = sorted((folder / "clips").iterdir())
        name = bundle.relative_to(folder).as_posix()
        found[name] = {clip.name: classifier.predict_file(clip).probabilities for clip in clips}
        table = np.array([list(answers.values()) for answers in found[name].values()])
        print(name, np.round(table, 3).tolist())
        # Neither saturated, nor the same for all clips: a wrong network shall give other answers.
        if np.ptp(table, axis=0).max() < 0.005 or (table * (1 - table)).max() < 0.005:
            sys.exit(f"{bundle}: these probabilities prove little")
    words = command_line(folder, folder / "finished", folder / "encoder")
    text = json.dumps({"versions": installed_versions(), "command": words, "probabilities": found}, indent=1)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


def hide_folder(folder, where):
    """Replace the folder in all texts by the placeholder."""
    for path in where.rglob("*"):
        if path.suffix in (".yaml", ".json", ".jsonl", ".txt", ".md", ".csv"):
            text = path.read_text(encoding="utf-8")
            text = text.replace(str(folder), PLACEHOLDER).replace(str(ROOT), PLACEHOLDER)
            path.write_text(text, encoding="utf-8")


def main(out, *bundles):
    """Make everything in a temporary folder, and then move it."""
    if out.exists():
        sys.exit(f"{out} exists: golden files are not made again")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(RECIPE)
    with tempfile.TemporaryDirectory() as temporary:
        folder, scratch = Path(temporary, "golden"), Path(temporary, "scratch")
        folder.mkdir()
        recipe = load_recipe()
        make_clips(folder / "clips")
        make_data(folder / "data")
        make_runs(recipe, folder)
        make_bundles(recipe, folder, scratch, bundles)
        write_expected(folder)
        hide_folder(folder, folder)
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*LEFT_OUT))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *sys.argv[2:])
