"""What the experiments on width share: models of any width, and the slope over width."""

import math
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn


class MLP(nn.Module):
    """Three linear layers with ReLU: digits (64 numbers) to 10 classes; torch's own initial values."""

    def __init__(self, width: int, seed: int = 0, inputs: int = 64, outputs: int = 10):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.input = nn.Linear(inputs, width)
            self.hidden = nn.Linear(width, width)
            self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs] -> [batch, outputs]"""
        return self.output(self.hidden(self.input(x).relu()).relu())


def llama(width: int, seed: int = 0, tied: bool = False, std: float = 0.02) -> transformers.LlamaForCausalLM:
    """One layer, vocabulary 64, more heads of size 16 with the width; `std` is the spread of initial weights."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=std,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log(values) over log(widths)."""
    x, y = [math.log(w) for w in widths], [math.log(max(v, 1e-300)) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def check_widths(owner: str, widths: Sequence[int], base_width: int, multiple: int = 1) -> None:
    if len(set(widths)) < 2 or any(w < multiple or w % multiple for w in widths):
        raise ValueError(f"{owner}: widths is {list(widths)} but must be two or more multiples of {multiple}.")
    if base_width < multiple or base_width % multiple:
        raise ValueError(f"{owner}: base_width is {base_width} but must be a multiple of {multiple}.")
