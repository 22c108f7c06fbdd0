"""Make an encoder of any supported family, pretrained or from its description."""

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
    """What this package knows of one family of encoders.

    Arguments
    ---------
    encoder : type
        A subclass of `InvariantEncoder`.
    extractor : str
        Hugging Face's class of `preprocessor_config.json`.
    lora_targets : tuple of str
        Linear layers of a transformer block that get an adapter; none where `lora_rank` is not supported.
    hf_classifier : str
        The class of transformers whose scores are the same with the same weights; None where there is none.
    onnx : bool
        Whether torch's exporter can follow the encoder.
    """

    encoder: type
    extractor: str = "Wav2Vec2FeatureExtractor"
    lora_targets: tuple = ()
    hf_classifier: str | None = None
    onnx: bool = False


_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


# Hugging Face's model_type -> family. A family is listed only where a test shows that a clip's frames are the same
# alone and in any batch.
FAMILIES = {
    "wav2vec2": Family(
        Wav2Vec2Encoder, lora_targets=_ATTENTION, hf_classifier="Wav2Vec2ForSequenceClassification", onnx=True
    ),
    "hubert": Family(
        Wav2Vec2Encoder, lora_targets=_ATTENTION, hf_classifier="HubertForSequenceClassification", onnx=True
    ),
    "wavlm": Family(
        Wav2Vec2Encoder,
        # Its attention gives the weights of its layers to a function of torch, which would bypass adapters.
        lora_targets=("intermediate_dense", "output_dense"),
        hf_classifier="WavLMForSequenceClassification",
        onnx=True,
    ),
    "data2vec-audio": Family(
        Wav2Vec2Encoder, lora_targets=_ATTENTION, hf_classifier="Data2VecAudioForSequenceClassification", onnx=True
    ),
    "moonshine": Family(MoonshineEncoder, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"), onnx=True),
    # transformers' classifier pads every clip to 30 s. The spectrogram needs complex numbers, which ONNX does not have.
    "whisper": Family(WhisperEncoder, "WhisperFeatureExtractor", lora_targets=_ATTENTION),
}


def make_encoder(
    source,
    save_path=None,
    freeze=False,
    freeze_feature_extractor=True,
    freeze_layers=0,
    num_layers=None,
    weighted_layers=None,
    standardise_layers=False,
    config_overrides=None,
    attn_implementation=None,
    lora_rank=None,
    lora_alpha=None,
    lora_dropout=0.0,
    gradient_checkpointing=False,
):
    """Load a pretrained encoder, from the Hub or a local folder, as the class of its family.

    Arguments
    ---------
    source : str
        A local folder (config.json, weights, preprocessor_config.json) or a name on the Hub.
    save_path : str
        Where downloads are kept; None for Hugging Face's own cache.
    freeze : bool
        Train nothing of the encoder (but the weights of `weighted_layers`).
    freeze_feature_extractor : bool
        Do not train the convolutions on the waveform, and do no backward work in them.
    freeze_layers : int
        Do not train the lowest so many transformer blocks, nor what stands before them.
    num_layers : int
        Keep only the lowest so many transformer blocks; None keeps all.
    weighted_layers : list of int, or "all"
        Return a learned weighted sum of these hidden states (0 enters the first block) instead of the last one.
    standardise_layers : bool
        Bring each frame of each summed state to zero mean and unit variance first (layer norm without parameters).
    config_overrides : dict
        Values of the Hugging Face configuration to change, such as `layerdrop` or `attention_dropout`.
    attn_implementation : str
        "sdpa", "eager" or "flash_attention_2", as in Hugging Face; None for
        `accent_plugin.encoder.fast_dropout.attend`, which is the first of them but where that is slow.
    lora_rank : int
        Freeze the encoder's own weights and train low-rank adapters of this rank in its transformer blocks, but for
        the `freeze_layers` lowest (Hu et al. 2021); None for no adapters.
    lora_alpha : float
        The adapters are scaled by lora_alpha / lora_rank; None for twice the rank.
    lora_dropout : float
        Share of the adapters' input that is dropped in training.
    gradient_checkpointing : bool
        Keep only what enters each transformer block, and compute the rest again in the backward pass (Chen et al.
        2016): less memory, the same gradients, a slower step.

    Returns
    -------
    InvariantEncoder
        Its forward pass maps waveforms to frames and a mask of valid frames.

    Raises
    ------
    EncoderError
        If the folder is missing or incomplete, the Hub cannot be reached, the family is not supported, or adapters are
        asked for and PEFT is not installed.
    """
    options = {
        "freeze": freeze,
        "freeze_feature_extractor": freeze_feature_extractor,
        "freeze_layers": freeze_layers,
        "num_layers": num_layers,
        "weighted_layers": weighted_layers,
        "standardise_layers": standardise_layers,
        "config_overrides": config_overrides,
        "attn_implementation": attn_implementation,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "gradient_checkpointing": gradient_checkpointing,
    }
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
    """Build an encoder again, with random weights.

    Arguments
    ---------
    description : dict
        What `InvariantEncoder.describe` gave. Nothing in it is run; a family, or a key of the configuration, that is
        not known is refused.

    Returns
    -------
    InvariantEncoder
        Frozen.

    Raises
    ------
    EncoderError
        If it describes no encoder.
    """
    summed = {key: description[key] for key in ("weighted_layers", "standardise_layers")}
    return build_from_description(description, freeze=True, **summed)


def build_from_description(description, **options):
    """Build an encoder without weights; ``options`` as in `make_encoder`."""
    family = description["family"]
    if family not in FAMILIES:
        raise EncoderError(f"the encoder's family {family!r} is unknown; known are {', '.join(FAMILIES)}")
    wanted, extractor = FAMILIES[family].extractor, description["preprocessor"].get("feature_extractor_type")
    if extractor != wanted:
        raise EncoderError(f"the encoder's feature_extractor_type is {extractor!r}, not {wanted}")
    known = CONFIG_MAPPING[family]().to_dict().keys() - set(NOT_ARCHITECTURE)
    if strange := sorted(description["config"].keys() - known):
        # Quoted, since a stranger chose them.
        names = ", ".join(map(repr, strange[:5]))
        raise EncoderError(f"the encoder's configuration has keys that a {family} has not: {names}")
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
            # Hugging Face's constructors check little: a wrong value fails somewhere in torch.
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EncoderError(f"the encoder's configuration describes no {family}: {problem}") from error
