"""Tiny models of many architectures, for the checks of attention implementations against eager attention."""

import torch
import transformers as tf

TEXT = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OWN = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = {
    key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
}
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)


# Causal language models, by the name of their class without "ForCausalLM".
CAUSAL = {
    "Llama": TEXT,
    "Mistral": TEXT | dict(sliding_window=4, head_dim=8),
    "Mixtral": TEXT | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "Qwen2": TEXT,
    "Qwen3": TEXT | dict(head_dim=16),
    "Qwen2Moe": TEXT | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=16),
    "Qwen3Moe": TEXT | EXPERTS | dict(num_experts=4, head_dim=8),
    "Gemma": TEXT | dict(head_dim=8),
    "Gemma2": TEXT | SLIDING | dict(head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "Gemma3": TEXT | SLIDING | dict(head_dim=8, query_pre_attn_scalar=8),
    "VaultGemma": TEXT | SLIDING | dict(head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "GptOss": TEXT | SLIDING | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "Phi": TEXT,
    "Phi3": TEXT,
    "Olmo": TEXT,
    "Olmo2": TEXT,
    "Olmoe": TEXT | dict(num_experts=4, num_experts_per_tok=2),
    "Granite": TEXT,
    "GraniteMoe": TEXT | dict(num_local_experts=4, num_experts_per_tok=2),
    "Cohere": TEXT,
    "Cohere2": TEXT | SLIDING | dict(head_dim=8),
    "Starcoder2": TEXT | dict(sliding_window=4),
    "StableLm": TEXT,
    "GPTNeoX": {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
    "GPT2": OWN | dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "OPT": OWN
    | dict(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "Glm": TEXT | dict(head_dim=8),
    "Glm4": TEXT | dict(head_dim=8),
    "SmolLM3": TEXT,
    "Exaone4": TEXT | SLIDING,
    "Nemotron": TEXT,
    "Helium": TEXT | dict(head_dim=8),
    "Ernie4_5": TEXT | dict(head_dim=8),
    "SeedOss": TEXT | dict(head_dim=8),
    "Arcee": TEXT,
    "Apertus": TEXT,
    "DeepseekV3": TEXT
    | dict(
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "Llama4": TEXT
    | EXPERTS
    | dict(
        head_dim=8,
        attention_chunk_size=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "Persimmon": {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
    "BioGpt": {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
}

# Encoders and encoder-decoders: class, config class, sizes.
OTHERS = {
    "bert": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaModel", "RobertaConfig", BERT),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        dict(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0),
    ),
    "electra": ("ElectraModel", "ElectraConfig", BERT | dict(embedding_size=32)),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        BERT | dict(local_attention=6, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    ),
    "vit": ("ViTModel", "ViTConfig", VISION),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VISION),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "dinov2": ("Dinov2Model", "Dinov2Config", VISION),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(
            vocab_size=96,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        dict(
            vocab_size=96,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(
            vocab_size=96,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=16,
            max_target_positions=32,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        dict(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_stride=(4, 4),
            conv_kernel=(8, 8),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
        ),
    ),
}


def causal(name, implementation):
    config = getattr(tf, name + ("TextConfig" if name in ("Gemma3", "Llama4") else "Config"))(**CAUSAL[name])
    torch.manual_seed(0)
    cls = getattr(tf, {"GPT2": "GPT2LMHeadModel"}.get(name, name + "ForCausalLM"))
    return _noisy(cls._from_config(config, attn_implementation=implementation))


def other(name, implementation):
    cls, config, sizes = OTHERS[name]
    torch.manual_seed(0)
    return _noisy(getattr(tf, cls)._from_config(getattr(tf, config)(**sizes), attn_implementation=implementation))


def _noisy(model):
    """Away from the initial values: larger weights, and sinks and biases that are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
