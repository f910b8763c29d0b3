"""Sums and differences by characters, and small Llamas that learn them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

CHARACTERS = "0123456789+-="
VALIDATION, TEST = 1, 2  # seeds of problems to measure on


def problems(count: int, digits: int, sign: str, seed: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Ids [count, length] of `a+b=c` or `a-b=c` with a >= b, all numbers of fixed width and c backwards, and labels
    that are -100 up to the equals sign. One pair of numbers in eight is held out."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(10**digits, (2, 20 * count), generator=generator)
    if sign == "-":
        a, b = torch.maximum(a, b), torch.minimum(a, b)
    belongs = (((a * 7919 + b * 104729) * 2654435761 >> 13) % 8 == 0) == held_out
    a, b = a[belongs][:count], b[belongs][:count]
    c = a + b if sign == "+" else a - b
    powers = 10 ** torch.arange(digits + 1)
    ids = torch.cat(
        [
            (a[:, None] // powers[:-1].flip(0)) % 10,
            torch.full((len(a), 1), CHARACTERS.index(sign)),
            (b[:, None] // powers[:-1].flip(0)) % 10,
            torch.full((len(a), 1), CHARACTERS.index("=")),
            (c[:, None] // powers) % 10,
        ],
        1,
    )
    labels = ids.clone()
    labels[:, : 2 * digits + 2] = -100
    return ids, labels


def fit(
    model: nn.Module,
    config: Any,
    sign: str,
    steps: int,
    lr: float,
    seed: int,
    before: Callable[[int], None] = lambda step: None,
) -> nn.Module:
    """AdamW on what is trainable; the learning rate rises for a twentieth of the steps and falls along a cosine."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in logging.tqdm(range(steps), desc=f"{sign}, lr {lr:g}", leave=False):
        before(step)
        ids, labels = problems(config.batch, config.digits, sign, 1_000_003 * (seed + 1) + step)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, config: Any, sign: str, seed: int) -> tuple[float, float]:
    """Loss of a character of the answer, and share of right answers, on problems that are not trained on."""
    ids, _ = problems(config.tests, config.digits, sign, seed, held_out=True)
    model.eval()
    answer = model(input_ids=ids, use_cache=False).logits[:, 2 * config.digits + 1 : -1]
    wanted = ids[:, 2 * config.digits + 2 :]
    loss = nn.functional.cross_entropy(answer.flatten(0, 1).float(), wanted.flatten())
    return float(loss), float((answer.argmax(-1) == wanted).all(1).float().mean())


def trained(config: Any, seed: int) -> PreTrainedModel:
    """A model that adds."""
    shape = transformers.LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=config.hidden,
        intermediate_size=3 * config.hidden,
        num_hidden_layers=2,
        num_attention_heads=config.hidden // 16,
        max_position_embeddings=3 * config.digits + 3,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,  # with 0.02 it takes many times as long to learn to add
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(shape)
    return fit(model, config, "+", config.pretraining, 3e-3, seed)
