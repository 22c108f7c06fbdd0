"""Low-rank adapters (LoRA) in a frozen encoder, trained in place of its own weights.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Beside the frozen weight W of a linear
layer stand two thin matrices, and the layer computes (W + alpha / rank * B A) x. A is drawn at random and B is zero, so
that training starts from the pretrained encoder. Merged, B A is part of W, and the layer is a plain one again.

PEFT makes the adapters. It is imported only where they are asked for: what has them merged does not need it.
"""

from accent_plugin.errors import EncoderError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


# Hugging Face's model_type -> linear layers of a transformer block that get an adapter.
TARGETS = {
    "wav2vec2": _ATTENTION,
    "hubert": _ATTENTION,
    # WavLM's attention gives the weights of its layers to a function of torch, which would go past the adapters.
    "wavlm": ("intermediate_dense", "output_dense"),
    "data2vec-audio": _ATTENTION,
    "moonshine": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "whisper": _ATTENTION,
}


def require_peft():
    """Import PEFT and give back the package.

    Raises
    ------
    EncoderError
        If it is not installed, or does not go with what is.
    """
    try:
        import peft
    except ImportError as error:
        raise EncoderError(
            f"adapters need PEFT, which cannot be imported ({error}): pip install 'accent_plugin[lora]'"
        ) from error
    return peft


def inject(blocks, family, rank, alpha=None, dropout=0.0):
    """Put adapters into transformer blocks, in place, and freeze everything else in these.

    Arguments
    ---------
    blocks : torch.nn.ModuleList
    family : str
        A key of `TARGETS`.
    rank : int
        At least 1.
    alpha : float
        The adapters' share of a layer's output is scaled by alpha / rank; None for twice the rank.
    dropout : float
        Share of an adapter's input that is dropped in training; at least 0 and below 1.

    Returns
    -------
    list of peft.tuners.lora.LoraLayer
        The layers that now have an adapter.

    Raises
    ------
    EncoderError
        If a value is out of its range, there are no blocks, or PEFT is not installed.
    """
    if rank < 1:
        raise EncoderError(f"lora_rank is {rank}; it should be at least 1, or None for no adapters")
    if not 0 <= dropout < 1:
        raise EncoderError(f"lora_dropout is {dropout}; it should be at least 0 and below 1")
    if not len(blocks):
        raise EncoderError("freeze_layers leaves no layer that adapters could be put into")
    peft = require_peft()
    alpha = 2 * rank if alpha is None else alpha
    targets = list(TARGETS[family])
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets), blocks
    )
    return [layer for layer in blocks.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]


def merge(model):
    """Make adapters part of the weights beside them, in place; the state has the keys of a model without adapters."""
    peft = require_peft()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())


def parameters(model):
    """Parameters of a model's adapters, found as PEFT finds them, by name: a list of torch.nn.Parameter."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
