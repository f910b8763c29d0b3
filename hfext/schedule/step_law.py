"""Step Law: peak learning rate and batch size of a pretraining run, from its model size and its number of tokens.

    lr = 1.79 N^-0.713 D^0.307,    batch = 0.58 D^0.571 tokens      (`mode="rounded"`, as printed)

N are the parameters without embeddings, D the tokens of the whole run. The law is the mean of 1000 fits to bootstrap
samples of the authors' runs; `mode="mean"`, the default, takes their mean unrounded, which is 2 % higher, and
`mode="quantiles"` adds 90 % intervals: log-normal with the covariance of the same 1000 fits (within 1 % of their own
quantiles). They say how well the runs fix the law, not how much a rate near it loses. Valid for AdamW, a cosine
down to the fixed rate 1e-5 and decoder language models in pretraining.

Predictable Scale: Part I, Step Law -- Optimal Hyperparameter Scaling Law in Large Language Model Pretraining,
arXiv 2503.04715.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from ..compat import was_loaded
from ..registry import Method, Result

logger = logging.get_logger(__name__)

MIN_LR = 1e-5  # what the cosine of the authors' runs ends at
# Of the fitted runs, parameters without embeddings and tokens.
RANGES = {"N": (6e7, 1.1e9), "D": (2e9, 1e11)}
ROUNDED = ((math.log(1.79), -0.713, 0.307), (math.log(0.58), 0.571))
# Mean and covariance, over the 1000 fits published at step-law/steplaw, of ln lr = (1, ln N, ln D) . c and of
# ln batch = (1, ln D) . c.
LR_MEAN = (0.5863077907399264, -0.7129222911869909, 0.30749095041206964)
LR_COVARIANCE = (
    (0.389062111487745, -0.013558938970776155, -0.005132493532093748),
    (-0.013558938970776155, 0.0008914857372464492, -0.00017433178852566716),
    (-0.005132493532093748, -0.00017433178852566716, 0.00036631184290429863),
)
BATCH_MEAN = (-0.543542173610334, 0.5709443646895052)
BATCH_COVARIANCE = (
    (0.1911796358740655, -0.008151572248019929),
    (-0.008151572248019929, 0.00034851793949566254),
)
NORMAL_95 = 1.6448536269514722  # leaves 5 % on each side


@dataclass(frozen=True)
class StepLaw:
    """What the law says.

    Attributes:
        lr: Peak learning rate.
        batch_tokens: Tokens of an update on all processes.
        batch_sequences: The same in rows of `seq_len` tokens, not rounded; `None` without `seq_len`.
        interval: 90 % of the fitted laws have `lr` in it; `None` unless asked for.
        batch_interval: The same of `batch_tokens`.
        parameters: N.
        tokens: D.
    """

    lr: float
    batch_tokens: float
    batch_sequences: float | None
    interval: tuple[float, float] | None
    batch_interval: tuple[float, float] | None
    parameters: float
    tokens: float


@dataclass(frozen=True)
class AppliedStepLaw:
    """What `apply_step_law` wrote into the arguments.

    Attributes:
        law: What the law says.
        learning_rate, per_device_train_batch_size, gradient_accumulation_steps: The new values.
        batch_sequences: Rows of an update that result, on all processes.
        updates: Of a run over all tokens.
    """

    law: StepLaw
    learning_rate: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    batch_sequences: int
    updates: int


def log_value(x: tuple[float, ...], mean: tuple[float, ...]) -> float:
    """x . mean"""
    return math.fsum(a * b for a, b in zip(x, mean, strict=True))


def log_interval(
    x: tuple[float, ...], mean: tuple[float, ...], covariance: tuple[tuple[float, ...], ...]
) -> tuple[float, float]:
    """x . mean -+ 1.645 sqrt(x C x)"""
    deviation = math.sqrt(log_value(x, tuple(log_value(x, row) for row in covariance)))
    middle = log_value(x, mean)
    return middle - NORMAL_95 * deviation, middle + NORMAL_95 * deviation


def non_embedding_parameters(model: nn.Module) -> int:
    """Parameters of a model, wrapped or not, without its embeddings and without its output matrix, each once."""
    outputs = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    left_out = {id(p) for m in [*outputs, *embeddings] if m is not None for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


def _check_model(model: nn.Module) -> None:
    """Refuse adapters, and warn of what the law was not fitted on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "model_or_params has adapters, but Step Law is for pretraining, where all weights are trained. Pass the "
            "model without them."
        )
    if was_loaded(model):
        logger.warning(
            "Step Law is for pretraining: these weights were loaded, and fine-tuning wants other, mostly far "
            "smaller, learning rates."
        )
    if any("expert" in f"{name} {type(m).__name__}".lower() for name, m in model.named_modules()):
        logger.warning("Step Law was fitted on dense models; here all experts are counted, the idle ones too.")


def step_law(
    model_or_params: nn.Module | float,
    tokens: float,
    seq_len: int | None = None,
    mode: Literal["mean", "rounded", "quantiles"] = "mean",
) -> StepLaw:
    """Peak learning rate and batch size for pretraining a model on a number of tokens.

    Args:
        model_or_params (`nn.Module` or `float`): The model, or its parameters without embeddings.
        tokens (`float`): Of the whole run.
        seq_len (`int`, *optional*): Tokens of a row, for the batch in rows.
        mode (`str`, *optional*, defaults to `"mean"`): `mean`, `rounded` (the printed constants) or `quantiles`
            (`mean` with 90 % intervals).
    """
    if mode not in ("mean", "rounded", "quantiles"):
        raise ValueError(f"mode is {mode!r} but must be one of mean, rounded, quantiles.")
    if isinstance(model_or_params, nn.Module):
        _check_model(model_or_params)
        parameters = non_embedding_parameters(model_or_params)
    else:
        parameters = model_or_params
    for name, value in (("model_or_params", parameters), ("tokens", tokens), ("seq_len", seq_len)):
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf
        if wrong and not (name == "seq_len" and value is None):
            raise ValueError(f"{name} is {value!r} but must be a finite number > 0.")
    for name, value, words in (("N", parameters, "parameters without embeddings"), ("D", tokens, "tokens")):
        low, high = RANGES[name]
        if not low <= value <= high:
            logger.warning(f"Step Law was fitted on {low:.2g} to {high:.2g} {words} and is asked for {value:.3g}.")
    x_lr, x_batch = (1.0, math.log(parameters), math.log(tokens)), (1.0, math.log(tokens))
    lr_mean, batch_mean = ROUNDED if mode == "rounded" else (LR_MEAN, BATCH_MEAN)
    batch = math.exp(log_value(x_batch, batch_mean))
    interval = batch_interval = None
    if mode == "quantiles":
        low, high = log_interval(x_lr, lr_mean, LR_COVARIANCE)
        interval = math.exp(low), math.exp(high)
        low, high = log_interval(x_batch, batch_mean, BATCH_COVARIANCE)
        batch_interval = math.exp(low), math.exp(high)
    return StepLaw(
        lr=math.exp(log_value(x_lr, lr_mean)),
        batch_tokens=batch,
        batch_sequences=None if seq_len is None else batch / seq_len,
        interval=interval,
        batch_interval=batch_interval,
        parameters=parameters,
        tokens=tokens,
    )


def split_batch(sequences: float, per_device: int, devices: int) -> tuple[int, int]:
    """Rows of a device and accumulation steps whose product with `devices` is near `sequences`; rows are at most
    `per_device`."""
    accumulation = max(1, math.ceil(sequences / (per_device * devices)))
    return max(1, round(sequences / (accumulation * devices))), accumulation


def apply_step_law(
    args: TrainingArguments, model: nn.Module | float, tokens: float, seq_len: int | None = None
) -> AppliedStepLaw:
    """Write the law's learning rate, batch and schedule (cosine to 1e-5) into `args`, in place.

    The batch per device stays what it is where it fits and is never made larger; accumulation does the rest.

    Args:
        args (`TrainingArguments`): Changed.
        model (`nn.Module` or `float`): As in [`step_law`].
        tokens (`float`): Of the whole run.
        seq_len (`int`, *optional*): Tokens of a row; defaults to `args.max_length` where there is one (TRL).
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__} but must be TrainingArguments: apply_step_law(args, model, ...)."
        )
    seq_len = vars(args).get("max_length") if seq_len is None else seq_len
    if seq_len is None:
        raise ValueError("seq_len is missing: a batch in tokens says nothing without the tokens of a row.")
    if "adamw" not in args.optim.value:
        logger.warning(
            f"Step Law was fitted on AdamW; its learning rate may be far off for optim={args.optim.value!r}."
        )
    law = step_law(model, tokens, seq_len)
    devices = args.world_size * max(1, args.n_gpu)
    rows, accumulation = split_batch(law.batch_sequences, args.per_device_train_batch_size, devices)
    args.learning_rate = law.lr
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, accumulation
    args.lr_scheduler_type = SchedulerType.COSINE_WITH_MIN_LR
    args.lr_scheduler_kwargs = {"min_lr": MIN_LR}
    batch = rows * accumulation * devices
    if not 0.9 <= batch / law.batch_sequences <= 1.1:
        logger.warning(f"Step Law: {devices} devices make {batch} rows an update of {law.batch_sequences:.1f} wanted.")
    updates = math.ceil(tokens / (batch * seq_len))
    if 0 < args.max_steps != updates:
        logger.warning(
            f"Step Law: all tokens take {updates} updates, and max_steps={args.max_steps} stays what it is."
        )
    if args.get_warmup_steps(updates) >= updates:
        logger.warning(f"Step Law: the run has {updates} updates, which warmup_steps={args.warmup_steps} takes up.")
    return AppliedStepLaw(law, law.lr, rows, accumulation, batch, updates)


METHOD = Method(
    name="step_law",
    family="schedule",
    title="Predictable Scale: Part I, Step Law -- Optimal Hyperparameter Scaling Law in Large Language Model "
    "Pretraining",
    authors="Li et al.",
    arxiv="2503.04715",
    year=2025,
    repo="step-law/steplaw",
    status="faithful",
    target="hfext.schedule.step_law:step_law",
    usage="hfext.optim.apply_step_law(args, model, tokens=20e9, seq_len=2048)",
    summary="Peak learning rate and batch size of a pretraining run from model size and tokens.",
    claim="The law's learning rate and batch size lose next to nothing against the best pair found by search.",
    headline=Result(
        metric="loss above the best of an exhaustive search, %",
        setting="pretraining of language models up to 1B parameters and 100B tokens",
        value="0.094",
    ),
    recipe="schedule/step_law-published-grids.yaml",
    notes="For dense models, AdamW and a cosine whose final rate is 1e-5 whatever the peak; not for fine-tuning. The "
    "range that is warned about (60M to 1.1B parameters, 2B to 100B tokens) is as recalled from the paper; the "
    "published dense runs have 215M to 1.07B parameters and 4B to 100B tokens.",
)
