"""Sources of encoders: local folders and the Hub.

PyTorch, transformers and the Hub's client are imported where they are used, because the recipe looks for its encoder
before anything else.
"""

import contextlib
import json
import warnings
from pathlib import Path

from accent_plugin.errors import EncoderError
from accent_plugin.files import require_downloaded

# Files with weights, in the order in which transformers looks for them.
WEIGHTS_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# Configuration keys that describe the origin or the use of a model, not its architecture.
NOT_ARCHITECTURE = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"),
    *("return_dict", "output_hidden_states", "output_attentions"),
)


def find_source(source):
    """Check an encoder's source without loading anything; return its folder, or None for a well-formed name on the Hub.

    Anything else raises an EncoderError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EncoderError(f"the encoder's folder {source} has no config.json; give a Hugging Face model folder")
        if not (folder / "preprocessor_config.json").is_file():
            raise EncoderError(f"the encoder's folder {source} has no preprocessor_config.json beside its config.json")
        if not (list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))):
            raise EncoderError(f"the encoder's folder {source} has no weights (*.safetensors or *.bin)")
        for path in (folder / "config.json", folder / "preprocessor_config.json", *weights_files(folder)):
            require_downloaded(path, EncoderError)
        return folder
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1 or folder.exists()
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        looks_local = True
    if looks_local:
        raise EncoderError(f"there is no folder {source}; give a Hugging Face model folder, or a name on the Hub")
    return None


def weights_files(folder):
    """Return the files from which transformers loads weights: an index before its parts."""
    name = next((name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if name is None:
        return []
    try:
        parts = json.loads((folder / name).read_bytes())["weight_map"].values() if name.endswith(".json") else ()
    except (ValueError, LookupError, TypeError, AttributeError):
        # Not an index; transformers says so.
        parts = ()
    return [folder / name, *(folder / part for part in sorted(set(map(str, parts))))]


def require_finite(state, where, error_class):
    """Raise an error of a class that names the tensors of a state dict with NaN or infinity."""
    import torch

    names = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if names:
        others = f" and {len(names) - 3} others" if len(names) > 3 else ""
        raise error_class(f"{where} has NaN or infinity in {', '.join(names[:3])}{others}: the weights are damaged")


def local_folder(source, save_path=None):
    """Return the folder of an encoder; a name on the Hub is downloaded to `save_path`, or an EncoderError is raised."""
    folder = find_source(source)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source, cache_dir=save_path, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin"]
            )
        )
    except Exception as error:
        # huggingface_hub raises its own errors, httpx's and OSError; for a user, all mean the same.
        raise EncoderError(
            f"{source} is no local folder and cannot be downloaded from the Hugging Face Hub ({type(error).__name__}); "
            f"without a network, give its folder, or download it elsewhere first: hf download {source}"
        ) from error


def read_config(folder):
    """Read Hugging Face's configuration from a model's folder without executing its code; errors are EncoderErrors."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def quiet_transformers():
    """Silence Hugging Face's loading report and SpeechBrain's deprecation warning; errors are still shown."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
