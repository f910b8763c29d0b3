"""SAM: step with the gradient at the worst point of a small ball around the weights.

    g = grad L(w);  e = rho * g / (||g|| + eps);  step at w with grad L(w + e)

||.|| is one 2-norm over all trained parameters together. Weight decay and gradient clipping belong to the base
optimizer and the Trainer and act on the second gradient only.

Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
"""

from torch import Tensor

from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer
from ._wrapper import total_norm


def sam_direction(grads: list[Tensor]) -> Tensor:
    """d = g, which `grads` holds already; returns n = ||g||, a scalar."""
    return total_norm(grads)


class SharpnessAware(AscentOptimizer):
    """SAM around any optimizer: `SharpnessAware(torch.optim.AdamW(model.parameters()), rho=0.05)`.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step.
        **options: Fields of [`AscentConfig`].
    """

    def direction(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        return sam_direction(grads)


METHOD = Method(
    name="sam",
    family="optim",
    title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
    authors="Foret et al.",
    arxiv="2010.01412",
    year=2020,
    repo="google-research/sam",
    status="faithful",
    target="hfext.optim.sam:SharpnessAware",
    config=AscentConfig,
    usage='TrainingArguments(optim="sam", optim_args="rho=0.05,base=adamw")',
    summary="Steps with the gradient at the worst point of a ball of radius rho around the weights.",
    claim="SAM generalises better than its base optimizer, above all under label noise.",
    headline=Result(
        metric="test error, %",
        setting="CIFAR-100, WRN-28-10, 200 epochs, basic augmentation",
        value="16.5 (as recalled)",
        baseline="18.8",
    ),
    recipe="optim/sam-mlp-digits.yaml",
)
