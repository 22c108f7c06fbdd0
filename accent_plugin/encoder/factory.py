"""Make an encoder of any supported family, pretrained or from a description."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING

from accent_plugin.encoder.seq2seq import MoonshineEncoder, WhisperEncoder
from accent_plugin.encoder.sources import NOT_ARCHITECTURE, local_folder, read_config
from accent_plugin.encoder.wav2vec2 import Wav2Vec2Encoder
from accent_plugin.errors import EncoderError


@dataclass(frozen=True)
class Family:
    """Properties of one family of encoders.

    Arguments
    ---------
    encoder : type
        A subclass of `InvariantEncoder`.
    extractor : str
        Hugging Face's class for `preprocessor_config.json`.
    lora_targets : tuple of str
        Linear layers of a transformer block that get an adapter; empty if `lora_rank` is not supported.
    hf_classifier : str
        The transformers class that gives the same scores with the same weights; None if there is none.
    """

    encoder: type
    extractor: str = "Wav2Vec2FeatureExtractor"
    lora_targets: tuple = ()
    hf_classifier: str | None = None


_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

# Hugging Face's model_type -> family. For each listed family, a test shows that a clip has the same frames alone and in
# any batch.
FAMILIES = {
    "wav2vec2": Family(Wav2Vec2Encoder, lora_targets=_ATTENTION, hf_classifier="Wav2Vec2ForSequenceClassification"),
    "hubert": Family(Wav2Vec2Encoder, lora_targets=_ATTENTION, hf_classifier="HubertForSequenceClassification"),
    "wavlm": Family(
        Wav2Vec2Encoder,
        # Its attention passes layer weights to a torch function, which would bypass adapters.
        lora_targets=("intermediate_dense", "output_dense"),
        hf_classifier="WavLMForSequenceClassification",
    ),
    "data2vec-audio": Family(
        Wav2Vec2Encoder, lora_targets=_ATTENTION, hf_classifier="Data2VecAudioForSequenceClassification"
    ),
    "moonshine": Family(MoonshineEncoder, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    # The transformers classifier pads every clip to 30 s. The spectrogram needs complex numbers, which ONNX lacks.
    "whisper": Family(WhisperEncoder, "WhisperFeatureExtractor", lora_targets=_ATTENTION),
}


def make_encoder(source, save_path=None, **options):
    """Load a pretrained encoder from the Hub or a local folder.

    Arguments
    ---------
    source : str
        A local folder (config.json, weights, preprocessor_config.json) or a name on the Hub.
    save_path : str
        Folder for downloads; None uses Hugging Face's cache.
    **options
        As in `accent_plugin.encoder.base.InvariantEncoder`: freeze, num_layers, weighted_layers, lora_rank, ...

    Returns
    -------
    InvariantEncoder
        Its forward pass maps waveforms to frames and a mask of valid frames.

    Raises
    ------
    EncoderError
        If the folder is missing or incomplete, the Hub cannot be reached, the family is not supported, or adapters are
        requested without PEFT installed.
    """
    folder = local_folder(source, save_path)
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise EncoderError(
            f"{source} is of the family {config.model_type!r}, whose output has not been shown to be independent of "
            f"the batch; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    return family.encoder(str(folder), "", lora_targets=family.lora_targets, **options)


def build_encoder(description):
    """Rebuild a frozen encoder from its description, with random weights.

    Arguments
    ---------
    description : dict
        The result of `InvariantEncoder.describe`. Nothing in it is executed; invalid content is an EncoderError.
    """
    summed = {key: description[key] for key in ("weighted_layers", "standardise_layers")}
    return build_from_description(description, freeze=True, **summed)


def build_from_description(description, **options):
    """Build an encoder without pretrained weights; ``options`` as in `InvariantEncoder`."""
    family = description["family"]
    if family not in FAMILIES:
        raise EncoderError(f"the encoder's family {family!r} is unknown; known are {', '.join(FAMILIES)}")
    wanted, extractor = FAMILIES[family].extractor, description["preprocessor"].get("feature_extractor_type")
    if extractor != wanted:
        raise EncoderError(f"the encoder's feature_extractor_type is {extractor!r}, not {wanted}")
    known = CONFIG_MAPPING[family]().to_dict().keys() - set(NOT_ARCHITECTURE)
    if strange := sorted(description["config"].keys() - known):
        # Quoted, because the names are untrusted.
        names = ", ".join(map(repr, strange[:5]))
        raise EncoderError(f"the encoder's configuration has keys that a {family} does not have: {names}")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("config", description["config"]), ("preprocessor_config", description["preprocessor"])):
            text = json.dumps(content | ({"model_type": family} if name == "config" else {}))
            Path(folder, f"{name}.json").write_text(text, encoding="utf-8")
        try:
            targets = FAMILIES[family].lora_targets
            return FAMILIES[family].encoder(folder, "", weights=False, lora_targets=targets, **options)
        except EncoderError:
            raise
        except Exception as error:
            # Hugging Face's constructors check little: a wrong value raises an error somewhere in torch.
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EncoderError(f"the encoder's configuration describes no {family}: {problem}") from error
