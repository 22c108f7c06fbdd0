"""Encoders of every family with random weights, tiny, as Hugging Face saves them."""

# Family -> the values that make it differ from the others; all tiny.
TINY = {
    "wav2vec2-group": ("Wav2Vec2", {"feat_extract_norm": "group"}),
    "wav2vec2-layer": ("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "hubert-group": ("Hubert", {"feat_extract_norm": "group"}),
    "hubert-layer": ("Hubert", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wavlm-group": ("WavLM", {"feat_extract_norm": "group"}),
    "wavlm-layer": ("WavLM", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "data2vec-audio": ("Data2VecAudio", {}),
    "moonshine": ("Moonshine", {}),
    "whisper": ("Whisper", {}),
}


def family_of(name):
    """Hugging Face's model_type of a name in `TINY`."""
    return name.removesuffix("-group").removesuffix("-layer")


def make(name, folder):
    """Write an encoder of `TINY` to a folder, unless it is there; return the folder."""
    import torch
    import transformers

    if folder.exists():
        return folder
    family, values = TINY[name]
    if family == "Moonshine":
        values = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "encoder_num_hidden_layers": 3,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "vocab_size": 16,
        }
    elif family == "Whisper":
        values = {
            "d_model": 32,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "vocab_size": 16,
            "pad_token_id": 0,
        }
    else:
        values = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "conv_dim": [16] * 7,
            "num_conv_pos_embedding_groups": 4,
            **({"num_conv_pos_embeddings": 16} if family != "Data2VecAudio" else {}),
            **values,
        }
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**values))
    model.save_pretrained(folder)
    if family == "Whisper":
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=family != "Moonshine").save_pretrained(folder)
    return folder
