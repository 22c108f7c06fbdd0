"""Low-rank adapters (LoRA) in a frozen encoder, trained instead of its own weights.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A linear layer with frozen weight W gets
two low-rank matrices and computes (W + alpha / rank * B A) x. A is initialised at random and B with zeros, so that
training starts from the pretrained encoder. Merging adds alpha / rank * B A to W and leaves a plain linear layer.

PEFT makes the adapters. It is imported only on demand: a model with merged adapters does not need it.
"""

from accent_plugin.errors import EncoderError


def require_peft():
    """Import PEFT and return the package; raise an EncoderError if it is not installed or cannot be imported."""
    try:
        import peft
    except ImportError as error:
        raise EncoderError(
            f"adapters need PEFT, which cannot be imported ({error}): pip install 'accent_plugin[lora]'"
        ) from error
    return peft


def inject(blocks, targets, rank, alpha=None, dropout=0.0):
    """Add adapters to transformer blocks, in place, and freeze all other parameters of the blocks.

    Invalid values, missing blocks or targets, and a missing PEFT raise an EncoderError.

    Arguments
    ---------
    blocks : torch.nn.ModuleList
    targets : sequence of str
        Names of the linear layers that get an adapter.
    rank : int
        At least 1.
    alpha : float
        The output of an adapter is scaled by alpha / rank; None for twice the rank.
    dropout : float
        Dropout probability of an adapter's input in training; at least 0 and below 1.

    Returns
    -------
    list of peft.tuners.lora.LoraLayer
        The layers that now have an adapter.
    """
    if rank < 1:
        raise EncoderError(f"lora_rank is {rank}; it should be at least 1, or None for no adapters")
    if not 0 <= dropout < 1:
        raise EncoderError(f"lora_dropout is {dropout}; it should be at least 0 and below 1")
    if not len(blocks):
        raise EncoderError("freeze_layers leaves no layer for the adapters of lora_rank")
    if not targets:
        raise EncoderError("this family of encoders has no lora_targets: set lora_rank to None")
    peft = require_peft()
    alpha = 2 * rank if alpha is None else alpha
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)), blocks
    )
    return [layer for layer in blocks.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]


def merge(model):
    """Merge adapters into the weights, in place; the state dict then has the keys of a model without adapters."""
    peft = require_peft()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())


def parameters(model):
    """List the parameters (torch.nn.Parameter) of a model's adapters, found by name like in PEFT."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
