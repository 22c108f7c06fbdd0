"""Low-rank adapters (LoRA) in a frozen encoder, trained in place of its own weights.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Beside the frozen weight W of a linear
layer stand two thin matrices, and the layer computes (W + alpha / rank * B A) x. A is drawn at random and B is zero, so
that training starts from the pretrained encoder. Merged, B A is part of W, and the layer is a plain one again.

PEFT makes the adapters. It is imported only where they are asked for: what has them merged does not need it.
"""

from accent_plugin.errors import EncoderError


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


def inject(blocks, targets, rank, alpha=None, dropout=0.0):
    """Put adapters into transformer blocks, in place, and freeze everything else in these.

    Arguments
    ---------
    blocks : torch.nn.ModuleList
    targets : sequence of str
        Names of the linear layers that get an adapter.
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
        If a value is out of its range, there are no blocks or targets, or PEFT is not installed.
    """
    if rank < 1:
        raise EncoderError(f"lora_rank is {rank}; it should be at least 1, or None for no adapters")
    if not 0 <= dropout < 1:
        raise EncoderError(f"lora_dropout is {dropout}; it should be at least 0 and below 1")
    if not len(blocks):
        raise EncoderError("freeze_layers leaves no layer that adapters could be put into")
    if not targets:
        raise EncoderError("this family of encoders has no lora_targets: set lora_rank to None")
    peft = require_peft()
    alpha = 2 * rank if alpha is None else alpha
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)), blocks
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
