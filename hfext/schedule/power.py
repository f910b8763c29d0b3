"""Power schedule: a learning rate that knows neither the batch size nor the length of training.

    eta(n) = min(lr_max, batch_size * a * n^b),    n tokens seen before the update, batch_size in sequences, b < 0
    warm-up, the first W updates:         s / W * eta(n_W)
    decay, the last D of T updates:       f((s - (T - D)) / D) * eta(n_{T-D})

so that twice the batch at as many tokens has twice the rate, and without a decay phase a schedule is a prefix of every
longer one. f falls from 1 to r = `min_lr_ratio`: 1 - (1 - r) x (linear) or r^x (exp). Both phases are one line,

    eta_s = ramp(s) * eta(m * min(max(s, W), T - D)),    m tokens an update,

and where tokens are counted, m is their mean over the s updates so far: the schedule is continuous then too, and exact
when all updates are alike. The first update has eta(0) = lr_max.

Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler, arXiv 2408.13359.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .._fields import coerce
from ..registry import Method, Result, suggest

logger = logging.get_logger(__name__)

ROWS_READ = 256  # to see whether all rows have one length
_BY_TRAINER = {"warmup": "warmup_steps", "warmup_steps": "warmup_steps", "warmup_tokens": "warmup_steps"}


@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """`lr_scheduler_kwargs` of `lr_scheduler_type="power"`. Warm-up is the `warmup_steps` of the arguments.

    Args:
        a: Amplitude, > 0.
        b: Exponent, < 0.
        lr_max: Upper limit, > 0; `None` takes the `learning_rate` of the arguments. The paper's is 0.02, with muP.
        batch_size: Sequences of an update on all processes, >= 1; `auto` asks the Trainer.
        tokens_per_step: Tokens of an update on all processes, >= 1; `auto` takes `num_input_tokens_seen` where the
            arguments track it, else the length of the rows where all have the same.
        decay_steps: Updates of the decay at the end, >= 0.
        decay: `linear`, `exp` or `none`.
        min_lr_ratio: What the decay ends at, over the rate at its beginning; in [0, 1), not 0 for `exp`.
    """

    a: float = 4.0
    b: float = -0.51
    lr_max: float | None = None
    batch_size: int | Literal["auto"] = "auto"
    tokens_per_step: int | Literal["auto"] = "auto"
    decay_steps: int = 0
    decay: Literal["linear", "exp", "none"] = "none"
    min_lr_ratio: float = 0.0

    def __post_init__(self):
        _check(self, "a", self.a > 0 and math.isfinite(self.a), "finite and > 0")
        _check(self, "b", self.b < 0 and math.isfinite(self.b), "finite and < 0")
        _check(self, "lr_max", self.lr_max is None or 0 < self.lr_max < math.inf, "None or finite and > 0")
        for name in ("batch_size", "tokens_per_step"):
            value = getattr(self, name)
            _check(self, name, value == "auto" or (isinstance(value, int) and value >= 1), "'auto' or >= 1")
        _check(self, "decay_steps", self.decay_steps >= 0, ">= 0")
        _check(self, "decay", self.decay in ("linear", "exp", "none"), "one of linear, exp, none")
        _check(self, "min_lr_ratio", 0 <= self.min_lr_ratio < 1, "in [0, 1)")
        if (self.decay_steps > 0) != (self.decay != "none"):
            raise ValueError(
                f"PowerConfig: decay_steps is {self.decay_steps} with decay {self.decay!r}: give both or neither."
            )
        if self.decay == "exp" and self.min_lr_ratio == 0:
            raise ValueError("PowerConfig: min_lr_ratio is 0 but decay 'exp' never gets there; 0.01 is common.")


def _check(config: Any, field: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{type(config).__name__}: {field} is {getattr(config, field)!r} but must be {allowed}.")


def read_options(options: dict[str, Any] | None) -> PowerConfig:
    """The config from `lr_scheduler_kwargs`, with errors that name the key."""
    kinds = get_type_hints(PowerConfig)
    known = [field.name for field in fields(PowerConfig)]
    for name in options or {}:
        if name in _BY_TRAINER:
            raise ValueError(f"lr_scheduler_kwargs: {name} is set by TrainingArguments({_BY_TRAINER[name]}=...).")
        if name not in known:
            raise ValueError(f"lr_scheduler_kwargs: power has no option {name!r}. {suggest(str(name), known)}")
    return PowerConfig(
        **{name: coerce(f"lr_scheduler_kwargs: {name}", kinds[name], x) for name, x in (options or {}).items()}
    )


def power_rate(tokens: float, batch_size: int, a: float, b: float, lr_max: float) -> float:
    """min(lr_max, batch_size * a * tokens^b); lr_max at no tokens."""
    return min(lr_max, batch_size * a * tokens**b) if tokens > 0 else lr_max


def decay_factor(x: float, decay: str, ratio: float) -> float:
    """f(x) for x in [0, 1]: from 1 to `ratio`."""
    return ratio**x if decay == "exp" else 1 - (1 - ratio) * x


def power_schedule(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    *,
    tokens_seen: Callable[[], int] | None = None,
    learning_rate: float | None = None,
    **options: Any,
) -> LambdaLR:
    """The schedule of an optimizer, as `transformers.get_scheduler("power", ...)` makes it.

    Args:
        optimizer (`torch.optim.Optimizer`): A group whose rate is `learning_rate` gets eta; others keep their
            ratio to it.
        num_warmup_steps (`int`): W.
        num_training_steps (`int`): T, which only the decay looks at.
        tokens_seen (`Callable`, *optional*): Tells the tokens so far, in place of `tokens_per_step`.
        learning_rate (`float`, *optional*): Defaults to the rate of the first group.
        **options: Fields of [`PowerConfig`]; `batch_size` and `tokens_per_step` (or `tokens_seen`) must be numbers.
    """
    config = read_options(options)
    for name in ("batch_size", "tokens_per_step"):
        if getattr(config, name) == "auto" and not (name == "tokens_per_step" and tokens_seen is not None):
            raise ValueError(f"power: {name} is 'auto', which only a Trainer can tell. Pass a number.")
    group = optimizer.param_groups[0]
    base = group.get("initial_lr", group["lr"]) if learning_rate is None else learning_rate
    if not base > 0:
        raise ValueError(f"power: learning_rate is {base} but must be > 0.")
    first, last = num_warmup_steps, num_training_steps - config.decay_steps
    if config.decay_steps and first > last:
        raise ValueError(
            f"power: warmup_steps ({num_warmup_steps}) and decay_steps ({config.decay_steps}) are more than the "
            f"{num_training_steps} updates of the training."
        )
    lr_max = base if config.lr_max is None else config.lr_max
    whole = num_training_steps * (0 if config.tokens_per_step == "auto" else config.tokens_per_step)
    if whole and power_rate(whole, config.batch_size, config.a, config.b, lr_max) == lr_max:
        logger.warning(
            f"power: lr_max={lr_max:g} is below the power law to the end ({whole:.3g} tokens, "
            f"{config.batch_size} sequences an update), so the rate is flat between warm-up and decay. "
            "The paper's lr_max is 0.02."
        )

    def factor(step: int) -> float:
        at = max(step, first)
        if config.decay_steps:
            at = min(at, last)
        if config.tokens_per_step != "auto":
            tokens = config.tokens_per_step * at
        else:
            seen = tokens_seen()
            if step and not seen:
                raise ValueError(
                    f"power: no token was counted in {step} updates; batches without `input_ids`, such as those of "
                    'inputs_embeds, have none. Pass lr_scheduler_kwargs={"tokens_per_step": ...}.'
                )
            tokens = seen * at / step if step else 0
        rate = power_rate(tokens, config.batch_size, config.a, config.b, lr_max)
        if step < first:
            rate *= step / first
        elif config.decay_steps and step > last:
            rate *= decay_factor(min(1.0, (step - last) / config.decay_steps), config.decay, config.min_lr_ratio)
        return rate / base

    return LambdaLR(optimizer, factor)


def for_trainer(trainer: Trainer) -> dict[str, Any]:
    """What `power_schedule` needs of a Trainer: its kwargs with every `auto` resolved."""
    args = trainer.args
    config = read_options(args.lr_scheduler_kwargs)
    options: dict[str, Any] = {**(args.lr_scheduler_kwargs or {}), "learning_rate": args.learning_rate}
    if config.batch_size == "auto":
        options["batch_size"] = trainer.get_total_train_batch_size(args)
    if config.tokens_per_step == "auto":
        if args.include_num_input_tokens_seen != "no":
            options["tokens_seen"] = lambda: trainer.state.num_input_tokens_seen
        else:
            options["tokens_per_step"] = row_length(trainer) * trainer.get_total_train_batch_size(args)
    return options


def row_length(trainer: Trainer) -> int:
    """Tokens of every row of the training data; an error where they differ or cannot be seen. Reads 256 rows."""
    data, lengths = trainer.train_dataset, set()
    advice = (
        "Pass include_num_input_tokens_seen=True, or the tokens of an update in "
        'lr_scheduler_kwargs={"tokens_per_step": ...}.'
    )
    if data is None or not has_length(data) or not len(data):
        raise ValueError(f"power: tokens_per_step is 'auto', but the training data has no rows to count. {advice}")
    count = min(ROWS_READ, len(data))
    for i in range(count):
        row = data[i * (len(data) - 1) // max(1, count - 1)]
        try:
            lengths.add(len(row["input_ids"]))
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                f"power: tokens_per_step is 'auto', but rows have no list 'input_ids'. {advice}"
            ) from None
    if len(lengths) > 1:
        raise ValueError(
            f"power: tokens_per_step is 'auto', but rows have {min(lengths)} to {max(lengths)} tokens. {advice}"
        )
    return lengths.pop()


def check_arguments(args: TrainingArguments) -> None:
    """Refuse bad options when the arguments are made."""
    read_options(args.lr_scheduler_kwargs)
    if not args.learning_rate > 0:
        raise ValueError(f"power: learning_rate is {args.learning_rate} but must be > 0.")


METHOD = Method(
    name="power",
    family="schedule",
    title="Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler",
    authors="Shen et al.",
    arxiv="2408.13359",
    year=2024,
    repo="IBM/dolomite-engine",
    status="faithful",
    target="hfext.schedule.power:power_schedule",
    config=PowerConfig,
    usage='TrainingArguments(lr_scheduler_type="power", learning_rate=0.02, lr_scheduler_kwargs={"a": 4, "b": -0.51})',
    summary="A learning rate that depends on tokens seen and batch size alone, so that it can be tuned on short runs.",
    claim="One amplitude a, tuned on a short run, stays near the best for other batch sizes and token numbers, where "
    "the best peak of a cosine schedule moves.",
    headline=Result(
        metric="loss and downstream scores",
        setting="language models of 1B and 3B parameters, about 1T tokens (as recalled from the paper)",
        value="level with WSD and cosine tuned for each run",
    ),
    recipe="schedule/power-llama-shakespeare.yaml",
    notes="a = 4 and lr_max = 0.02 are for models in muP (`hfext.optim.mup`); batch sizes are in sequences, which the "
    "paper's had 4096 tokens. The recipe does not decide the claim: at 16 x 150 amplitudes from 0.25 to 1 are one "
    "run, flat at lr_max, and a cosine peak of 0.005, second in the first setting, would lose 0.003 where the best "
    "one, 0.02, loses 0.097. Whether the decay should have another shape is left to the user; the open implementation "
    "has none.",
)
