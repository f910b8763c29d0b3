"""Task vector: the model is moved away from what further training on the forget set would make of it.

    theta = theta_0 - alpha (theta_reinforced - theta_0)          alpha = 0: theta_0, alpha = -1: theta_reinforced

theta_reinforced is theta_0 trained further on the forget set. If that training was LoRA's, alpha scales its adapter by
-alpha, which is the same. Integer buffers are left alone. Computed in float64. As an objective the Trainer makes
theta_reinforced by plain training on the forget rows, and moves the weights when that has ended.

Editing Models with Task Arithmetic, arXiv 2212.04089. MUSE (arXiv 2407.06460) chose alpha by a sweep over powers of 2.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..registry import Method, Result
from ._edit import Dense, Edit, refuse_quantized
from ._objective import Objective, check
from ._terms import tokens


def negated(theta_0: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """theta_0 - alpha (reinforced - theta_0), in the type of theta_0."""
    start = theta_0.double()
    return (start - alpha * (reinforced.to(theta_0.device).double() - start)).to(theta_0.dtype)


def negate(theta_0: Mapping[str, Tensor], theta_reinforced: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state dict that is moved away from `theta_reinforced`; both stay as they are.

    Raises:
        KeyError: A tensor is in one alone.
        ValueError: The two are equal, shapes differ, or alpha is not finite.
    """
    _check(theta_0, theta_reinforced, alpha)
    return {
        name: negated(tensor, theta_reinforced[name], alpha) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in theta_0.items()
    }


def _check(theta_0: Mapping[str, Tensor], reinforced: Mapping[str, Tensor], alpha: float) -> None:
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha} but must be finite.")
    alone = sorted(set(theta_0) ^ set(reinforced))
    if alone:
        raise KeyError(f"{alone[0]} is in one of the two models alone ({len(alone)} such tensors).")
    for name, tensor in theta_0.items():
        if tensor.shape != reinforced[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)} and {list(reinforced[name].shape)}.")
    if not any(t.is_floating_point() and (t != reinforced[n].to(t)).any() for n, t in theta_0.items()):
        raise ValueError("The task vector is zero: the reinforced model equals the model.")


def task_vector(model: nn.Module, reinforced: nn.Module | Mapping[str, Tensor] | str, alpha: float = 1.0) -> Edit:
    """Move `model`, in place, away from its reinforced self.

    Args:
        model (`nn.Module`): The model to unlearn.
        reinforced: The model, or its state dict, after further training on the forget set; or the name of a LoRA
            adapter of `model` that was trained so, which is then scaled by -alpha.
        alpha (`float`, *optional*, defaults to 1.0): How far.
    """
    if isinstance(reinforced, str):
        return Edit.make(model, _scaled_adapter(model, reinforced, alpha), {"alpha": alpha, "adapter": reinforced})
    refuse_quantized(model)
    theirs = reinforced.state_dict() if isinstance(reinforced, nn.Module) else reinforced
    ours = model.state_dict(keep_vars=True)
    _check(ours, theirs, alpha)
    # Tied weights stand under several names and are moved once.
    once = {id(tensor): name for name, tensor in reversed(ours.items())}
    changes = (
        (name, Dense(negated(ours[name].detach(), theirs[name].detach(), alpha)))
        for name in reversed(once.values())
        if ours[name].is_floating_point()
    )
    return Edit.make(model, changes, {"alpha": alpha})


def _scaled_adapter(model: nn.Module, adapter: str, alpha: float) -> Iterator[tuple[str, Dense]]:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        known = ", ".join(model.peft_config) if isinstance(model, PeftModel) else "none: it is no PeftModel"
        raise ValueError(f"The model has no adapter {adapter!r} (it has {known}).")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha} but must be finite.")
    config = model.peft_config[adapter]
    plain = isinstance(config, LoraConfig) and config.bias == "none" and not config.use_dora
    if not plain or config.modules_to_save or config.trainable_token_indices:
        raise NotImplementedError(
            f"{adapter!r} is more than a plain LoRA (bias, DoRA, or modules trained in full), which scaling does not "
            "negate: merge it into a copy of the model and give that as `reinforced`."
        )
    if any(isinstance(m, BaseTunerLayer) and adapter in m.merged_adapters for m in model.modules()):
        raise ValueError(f"{adapter!r} is merged into the weights: unmerge it first (`model.unmerge_adapter()`).")
    ends = (f".lora_B.{adapter}.weight", f".lora_embedding_B.{adapter}")
    found = {name: p.detach() for name, p in model.named_parameters() if name.endswith(ends)}
    if not any(p.any() for p in found.values()):
        raise ValueError(f"The task vector is zero: the adapter {adapter!r} was never trained.")
    for name, p in found.items():
        yield name, Dense((-alpha * p.double()).to(p.dtype))


@dataclass(frozen=True, kw_only=True)
class TaskVectorConfig:
    """Options of [`TaskVector`].

    Args:
        alpha: How far the weights are moved; 0 undoes the training, -1 keeps it.
    """

    alpha: float = 1.0

    def __post_init__(self):
        check(self, "alpha", math.isfinite(self.alpha), "finite")


class TaskVector(Objective):
    """Training on the forget rows, then its negation: `UnlearningConfig(objective="task_vector")`.

    Checkpoints on the way are reinforced models; the negation is the last thing that `train` does. A resumed run needs
    the model that the first one began with.
    """

    Config = TaskVectorConfig
    needs = ("forget",)

    def prepare(self, model, data):
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        lora = {name for name in self.start if ".lora_B." in name or ".lora_embedding_B" in name}
        if lora and any(self.start[name].any() for name in lora):
            raise ValueError(
                "task_vector needs a fresh adapter: scaling one that was trained negates all that it has learnt. "
                "Merge it, and add a new one."
            )
        others = [name for name in self.start if lora and ".lora_" not in name]
        if others or any("magnitude" in name for name in self.start):
            raise NotImplementedError(
                f"{others[0] if others else 'DoRA'} is trained beside LoRA's A and B, which scaling does not negate: "
                "train a plain LoRA, or the whole model."
            )
        self.adapter = lora

    def terms(self, now, reference):
        return {"forget": tokens("forget", now["forget"].token_nll)}

    def finish(self, trainer):
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            if name in self.adapter:  # B begins at 0
                p.data.copy_(-self.config.alpha * p.detach())
            elif name in self.start and not self.adapter:
                p.data.copy_(negated(self.start[name], p.detach(), self.config.alpha))


METHOD = Method(
    name="task_vector",
    family="unlearning",
    title="Editing Models with Task Arithmetic",
    authors="Ilharco et al.",
    arxiv="2212.04089",
    year=2022,
    repo="mlfoundations/task_vectors",
    status="faithful",
    target="hfext.unlearning.task_vector:TaskVector",
    config=TaskVectorConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="task_vector"), forget_dataset=rows)',
    summary="Subtracts what further training on the forget set adds to the weights.",
    claim="Negating a task vector makes the model forget the task and keeps others.",
    headline=Result(metric="target and control accuracy", setting="CLIP, eight tasks", value="not re-checked"),
    notes="`hfext.unlearning.task_vector(model, reinforced, alpha)` edits a model by one that was trained "
    "so already. Compared in recipes/unlearning/ngdiff-llama-tofu.yaml.",
)
