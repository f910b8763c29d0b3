"""RMU: forget rows are sent to one random direction inside the model, retain rows stay where they were.

    h    hidden states behind block `layer`, of the scored tokens;   u = r / ||r||, r uniform in [0, 1]^d, drawn once
    forget = mean over rows of the mean over tokens of mean_d (h - c u)^2,     retain the same with h_ref for c u
    loss = gamma * forget + alpha * retain

Only the MLP down projections of the blocks layer - 2 .. layer are trained, and no block behind `layer` is run, which
halves the work. u has no negative entry: it is uniform and not normal. With c = 0 activations shrink to 0.

The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning, arXiv 2403.03218, with the values for
Zephyr-7B; the layer must be chosen for the model.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..registry import Method, Result
from ._down_projections import down_projections
from ._objective import Objective, check, finite, joined
from ._reference import is_peft
from ._terms import rows


@dataclass(frozen=True, kw_only=True)
class RMUConfig:
    """Options of [`RMU`].

    Args:
        layer: The block, counted from 0, behind which states are compared.
        c: Length of the state that forget tokens are sent to, >= 0.
        gamma, alpha: Weights of the forget and the retain loss, >= 0.
        parameters: Regular expression of the parameters to train, in place of the three down projections.
        module: Regular expression of one linear layer of each block, where the down projection is not found.
        seed: Of the direction.
    """

    layer: int = 7
    c: float = 6.5
    gamma: float = 1.0
    alpha: float = 1200.0
    parameters: str | None = None
    module: str | None = None
    seed: int = 0

    def __post_init__(self):
        check(self, "layer", isinstance(self.layer, int) and self.layer >= 0, "an integer >= 0")
        finite(self, "c", "gamma", "alpha")


@dataclass
class States:
    """Hidden states [rows, T, d] and which positions are scored [rows, T]."""

    hidden: Tensor
    mask: Tensor


def direction(size: int, seed: int) -> Tensor:
    """u [size]: uniform entries, of length 1."""
    r = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return r / r.norm()


def distance_rows(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over the scored tokens of each row of mean_d (h - target)^2 [rows], in float32."""
    squared = (hidden.float() - target.float()).square().mean(-1)
    return (squared * mask).sum(1) / mask.sum(1).clamp(min=1)


@contextmanager
def ending_at(blocks: nn.ModuleList, layer: int) -> Iterator[list[Tensor]]:
    """Inside, blocks behind `layer` pass on what they get; the list holds what block `layer` gave."""
    seen: list[Tensor] = []
    kind: list[type] = []

    def note(module, args, out):
        kind.append(type(out))
        seen.append(out[0] if isinstance(out, tuple) else out)

    def passing(hidden, *args, **kwargs):
        return (hidden,) if kind[-1] is tuple else hidden

    later = list(blocks[layer + 1 :])
    hook = blocks[layer].register_forward_hook(note)
    try:
        for block in later:
            block.forward = passing
        yield seen
    finally:
        hook.remove()
        for block in later:
            del block.forward


class RMU(Objective):
    """Representation misdirection: `UnlearningConfig(objective="rmu", objective_args={"layer": 7})`."""

    Config = RMUConfig
    reference = {"retain": "outputs"}

    def prepare(self, model, data):
        c = self.config
        found = down_projections(model, c.module)
        check(c, "layer", c.layer < len(found), f"below {len(found)}, the number of blocks")
        # ("model.layers", "7") from "model.layers.7.mlp.down_proj"
        self.blocks = re.match(rf"(.*?)\.{found[c.layer].layer}\.", found[c.layer].name).group(1)
        self.target = c.c * direction(model.config.get_text_config().hidden_size, c.seed)
        names = {p.weight for p in found[max(0, c.layer - 2) : c.layer + 1]}
        chosen = {n for n, _ in model.named_parameters() if c.parameters and re.search(c.parameters, n)}
        chosen = chosen if c.parameters else names
        if not chosen:
            raise ValueError(f"RMUConfig: parameters is {c.parameters!r} but must match at least one parameter.")
        self.chosen = chosen

    def begin(self, model):
        self.kept = {p: p.requires_grad for p in model.parameters()}
        if not is_peft(model):  # adapters are trained as they are
            for name, p in model.named_parameters():
                p.requires_grad_(name in self.chosen)

    def release(self):
        for p, wanted in self.kept.items():
            p.requires_grad_(wanted)

    def forward(self, model, batch, **kwargs):
        ids, attention, split = joined(batch)
        plain = extract_model_from_parallel(model)
        short = "logits_to_keep" in inspect.signature(plain.forward).parameters
        # A reference without adapters has other names.
        path = self.blocks if is_peft(plain) else self.blocks.removeprefix("base_model.model.")
        with ending_at(plain.get_submodule(path), self.config.layer) as seen:
            model(input_ids=ids, attention_mask=attention, use_cache=False, **({"logits_to_keep": 1} if short else {}))
        return {
            part: States(h[:, : batch[part]["labels"].shape[1]], batch[part]["labels"].to(h.device) != -100)
            for part, h in split(seen[0]).items()
        }

    def with_row_loss(self, now, of_tokens):
        return now  # there is no loss of a token to replace

    def terms(self, now, reference):
        c, f, r = self.config, now["forget"], now["retain"]
        return {
            "forget": rows("forget", distance_rows(f.hidden, self.target.to(f.hidden.device), f.mask), c.gamma),
            "retain": rows("retain", distance_rows(r.hidden, reference["retain"].hidden, r.mask), c.alpha),
        }


METHOD = Method(
    name="rmu",
    family="unlearning",
    title="The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning",
    authors="Li et al.",
    arxiv="2403.03218",
    year=2024,
    repo="centerforaisafety/wmdp",
    status="faithful",
    target="hfext.unlearning.rmu:RMU",
    config=RMUConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="rmu", objective_args={"layer": 7}), f, r)',
    summary="Sends the states of forget rows to a random direction and holds those of retain rows.",
    headline=Result(
        metric="forget quality / model utility",
        setting="TOFU forget10, Llama-3.2-1B, open-unlearning's rerun",
        value="3.2e-15 / 0.59",
    ),
    notes="Compared in recipes/unlearning/ngdiff-llama-tofu.yaml. With PEFT the adapters are trained as they are.",
)
