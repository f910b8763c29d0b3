"""TokenFormer: a language model whose linear maps are attention over learnable tokens, so that it grows by appending.

    A = X K'      S = gelu(A tau / ||A||_2)      O = S V       Pattention: norms over the n tokens of a row, exact GELU
    x <- x + o(attention(q(norm(x)), k(norm(x)), v(norm(x))));  x <- x + f(norm(x))       q, k, v, o, f are Pattention
    growth: K <- [K; 0], V <- [V; V'], tau as it was, so O is as it was

tau is sqrt(n) of the first size. norm has no parameters, the last one has; rotary positions on a quarter of a head.
Keys begin with N(0, 0.02^2), values with deviation 2 / (layers sqrt(width)). Scores and norms in float32 at least, row
statistics in float64 in the kernels (package `hfext_pattention`; plain torch without a GPU).

TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters, arXiv 2410.23168. The authors' code sets
tau = sqrt(n) after growth and leaves new keys random, which changes the function at once: `grow(..., keep_tau=False,
key_init="normal")`. A row whose scores are all 0 gives 0 (NaN there).
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..registry import Method, Result
from ._pattention import Pattention, TauWarmup, grow

__all__ = ["Pattention", "TauWarmup", "TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel", "grow"]


@strict
class TokenFormerConfig(PreTrainedConfig):
    """Options of [`TokenFormerForCausalLM`]; the defaults are those of the 150M model.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads: Sizes.
        num_qkv_tokens, num_proj_tokens, num_ffn_tokens: Of the Pattention layers; `grow` changes them.
        mode: Of Pattention: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
        pattention_dropout, attention_dropout, hidden_dropout: Of Pattention's scores, of attention weights and of
            what is added to the residual.
        rope_theta, rotary_pct: Base of the rotary positions, and which part of a head they turn.
        initializer_range: Deviation of keys and embeddings.
    """

    model_type = "hfext_tokenformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_qkv_tokens: int = 768
    num_proj_tokens: int = 768
    num_ffn_tokens: int = 3072
    mode: str = "l2_norm_gelu"
    pattention_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    max_position_embeddings: int = 2048
    rope_theta: float | int = 10000.0
    rotary_pct: float | int = 0.25
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        head, over = divmod(self.hidden_size, self.num_attention_heads)
        if over:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which num_attention_heads={self.num_attention_heads} does not "
                "divide."
            )
        from hfext_pattention import MODES

        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r} but must be one of {', '.join(MODES)}.")
        if not 0 <= self.rotary_pct <= 1 or int(head * self.rotary_pct) % 2:
            raise ValueError(
                f"rotary_pct is {self.rotary_pct} but must be in [0, 1] and turn an even part of heads of {head}."
            )


def rotary(positions: Tensor, dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [batch, 1, tokens, dims] in float32, from positions [batch, tokens]."""
    steps = torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * theta ** (-steps / max(dims, 1))
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of heads [batch, heads, tokens, head] by their positions."""
    dims = cos.shape[-1]
    first, rest = x[..., :dims], x[..., dims:]
    one, two = first.chunk(2, -1)
    turned = first * cos.to(x.dtype) + torch.cat([-two, one], -1) * sin.to(x.dtype)
    return torch.cat([turned, rest], -1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, -1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TokenFormerAttention(nn.Module):
    def __init__(self, config: TokenFormerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (_layer(config, config.num_qkv_tokens) for _ in range(3))
        self.o_proj = _layer(config, config.num_proj_tokens)

    def forward(self, x, positions, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        shape = x.shape[:-1]
        q, k, v = (
            f(x).view(*shape, -1, self.head_dim).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turn(q, *positions), turn(k, *positions)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights


class TokenFormerLayer(GradientCheckpointingLayer):
    def __init__(self, config: TokenFormerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = TokenFormerAttention(config, layer_idx)
        self.mlp = _layer(config, config.num_ffn_tokens)

    def forward(self, x, positions, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        out, _ = self.self_attn(self._norm(x), positions, attention_mask, past_key_values, **kwargs)
        x = x + F.dropout(out, self.config.hidden_dropout, self.training)
        return x + F.dropout(self.mlp(self._norm(x)), self.config.hidden_dropout, self.training)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)


def _layer(config: TokenFormerConfig, tokens: int) -> Pattention:
    d, std = config.hidden_size, 2 / (config.num_hidden_layers * config.hidden_size**0.5)
    return Pattention(d, d, tokens, config.mode, config.pattention_dropout, config.initializer_range, std)


class TokenFormerPreTrainedModel(PreTrainedModel):
    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"tau"}
    _can_record_outputs = {"hidden_states": TokenFormerLayer, "attentions": TokenFormerAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Pattention):
            module.reset_parameters(missing_only=True)


class TokenFormerModel(TokenFormerPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: TokenFormerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([TokenFormerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        head = self.config.hidden_size // self.config.num_attention_heads
        positions = rotary(position_ids, int(head * self.config.rotary_pct), self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, positions, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """A TokenFormer that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TokenFormerConfig):
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig, exist_ok=True)
AutoModel.register(TokenFormerConfig, TokenFormerModel, exist_ok=True)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM, exist_ok=True)


METHOD = Method(
    name="tokenformer",
    family="modules",
    title="TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
    authors="Wang et al.",
    arxiv="2410.23168",
    year=2024,
    repo="Haiyang-W/TokenFormer",
    status="faithful",
    target="hfext.modules.tokenformer:TokenFormerForCausalLM",
    usage="grow(AutoModelForCausalLM.from_config(TokenFormerConfig()), 768)",
    summary="A language model of attention over learnable tokens that grows without changing what it computes.",
    claim="A model that grows by appending tokens ends no worse than one of the final size trained from scratch for "
    "as many steps, and its loss does not jump when it grows.",
    headline=Result(
        metric="perplexity on OpenWebText",
        setting="124M grown to 1.4B in steps, against training from scratch",
        value="about the same at a fraction of the training cost",
    ),
    recipe="modules/tokenformer-char-growth.yaml",
    notes="Growth is exact only while tau keeps the value of the first size, which the checkpoint stores; the "
    "authors' code recomputes it from the new size and draws new keys. In the recipe's small models that jumps by "
    "0.046 nats and yet ends lower by 0.025 than exact growth (seeds spread by 0.035): where a jump does not matter, "
    'try `grow(model, n, key_init="normal", keep_tau=False)`. `from_pretrained(dtype=...)` keeps tau in float32, '
    "`model.to(torch.bfloat16)` rounds it by at most 0.4 %. Softmax layers cannot grow without a change. GPU numbers "
    "of the fused kernels are not measured; they save the memory of the scores and make these again for every block "
    "of columns.",
)
