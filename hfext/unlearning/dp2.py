"""DP2Unlearning: train the base with differential privacy once, and unlearn by fine-tuning it on what may stay.

    g = (sum_i min(1, C / ||g_i||) g_i + sigma C N(0, I)) / B        each row is drawn with probability q = B / N
    unlearned(F) = plain fine-tuning of the kept base on R            the served model of all rows is thrown away

`g_i` is the gradient of row i's own loss, over all trained parameters; norms and sums are float32. What the base
knows of one row is bounded by (epsilon, delta), and so is what the unlearned model knows: that is post-processing. The
bound of k rows together is that of group privacy, (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)).

DP2Unlearning: An Efficient and Guaranteed Unlearning Framework for LLMs, doi 10.1016/j.neunet.2025.107879. Its other
base, trained on text rewritten word by word under privacy, is not here.
"""

import copy
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .._fields import in_range, one_of
from ..compat import two_pass_optimizer
from ..registry import Method, Result
from ._data import collate
from ._dp_guarantee import FILE, noise_for, privacy_spent, read_guarantee

logger = logging.get_logger(__name__)

WEIGHT = "dp_weight"
# From fast to general.
HOW = ("batch", "lengths", "rows")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class DPConfig:
    """Options of [`DPTrainer`].

    Args:
        epsilon: Of the guarantee for one row added or removed, > 0. The paper tries 0.5 to 100 and more.
        delta: Of the guarantee, in (0, 1), well below 1 / N.
        max_grad_norm: C > 0, to which each row's gradient is clipped. `TrainingArguments.max_grad_norm` is not used.
        noise_multiplier: sigma; found for epsilon when left out. With 0 there is no guarantee.
        accountant: "rdp" or "pld", which is tighter and slower.
        microbatch_size: Rows whose gradients are in memory at once; all of a batch by default.
        seed: Of sampling and noise. By default they are secret and new in every run, as the guarantee needs; a fixed
            seed is for experiments, and makes resumed runs equal straight ones. The generators are PyTorch's, which
            are not made to withstand cryptanalysis.
    """

    epsilon: float = 10.0
    delta: float = 1e-12
    max_grad_norm: float = 1.0
    noise_multiplier: float | None = None
    accountant: str = "rdp"
    microbatch_size: int | None = None
    seed: int | None = None

    def __post_init__(self):
        in_range("epsilon", self.epsilon, 0, math.inf, low_open=True)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta} but must be in (0, 1).")
        in_range("max_grad_norm", self.max_grad_norm, 0, math.inf, low_open=True)
        in_range("noise_multiplier", self.noise_multiplier or 0, 0, math.inf)
        if self.max_grad_norm == math.inf and self.noise_multiplier != 0:
            raise ValueError("max_grad_norm is inf but must be finite unless noise_multiplier is 0.")
        one_of("accountant", self.accountant, ("rdp", "pld"))
        in_range("microbatch_size", self.microbatch_size or 1, 1, math.inf)


def clipped_sum(grads: Mapping[str, Tensor], max_norm: float, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """sum_i w_i min(1, C / ||g_i||) g_i of gradients [rows, ...], and the norms [rows], in float32.

    A row whose gradient is not finite counts nothing, which keeps the bound.
    """
    norms = torch.stack([g.float().flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    finite = norms.isfinite()
    scale = torch.where(finite, (max_norm / norms.clamp(min=1e-30)).clamp(max=1), 0.0) * weights.float()
    summed = {}
    for name, g in grads.items():
        kept = torch.where(finite.view(-1, *[1] * (g.ndim - 1)), g.float(), 0.0)
        summed[name] = torch.einsum("r...,r->...", kept, scale)
    return summed, norms


def add_noise(summed: Mapping[str, Tensor], std: float, generator: torch.Generator) -> None:
    """Add N(0, std^2) to every entry in place."""
    for total in summed.values():
        total += std * torch.randn(total.shape, generator=generator, device=generator.device).to(total.device)


def by_length(batch: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Row numbers and rows of each length, cut to it and without a mask, which would be all ones.

    Masks of padded rows are read while a model runs, which vmap forbids. Padding must be on the right.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return [(torch.arange(len(next(iter(batch.values())))), dict(batch))]
    lengths, width = mask.sum(1), mask.shape[1]
    if not torch.equal(mask.bool(), torch.arange(width, device=mask.device) < lengths[:, None]):
        raise NotImplementedError("rows are not padded on the right")
    found = []
    for n in lengths.unique().tolist():
        rows = (lengths == n).nonzero()[:, 0]
        part = {name: x[rows] for name, x in batch.items() if name != "attention_mask"}
        cut = {name: x[:, :n] if x.ndim > 1 and x.shape[1] == width else x for name, x in part.items()}
        found.append((rows, cut))
    return found


def per_sample_gradients(
    model: nn.Module, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], how: str
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Row numbers, their gradients [rows, ...] and losses [rows], each row's of its own loss.

    `how` is "batch" (all rows in one vmap), "lengths" (one for each length) or "rows" (one after the other).
    """

    def loss_of(values: Mapping[str, Tensor], row: Mapping[str, Tensor]) -> Tensor:
        return functional_call(model, values, kwargs={name: x[None] for name, x in row.items()}).loss

    count = len(next(iter(batch.values())))
    if how == "rows":
        for i in range(count):
            loss = model(**{name: x[i : i + 1] for name, x in batch.items()}).loss
            found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True, allow_unused=True)
            grads = {name: g[None] for name, g in zip(params, found, strict=True)}
            yield torch.tensor([i]), grads, loss.detach()[None]
        return
    values = {name: p.detach() for name, p in params.items()}
    for rows, part in by_length(batch) if how == "lengths" else [(torch.arange(count), dict(batch))]:
        yield rows, *vmap(grad_and_value(loss_of), in_dims=(None, 0), randomness="different")(values, part)


class PoissonSampler(Sampler):
    """Batches of which every row is a member with probability `rate`, perhaps none: a function of (seed, step)."""

    def __init__(self, rows: int, rate: float, steps: int, seed: int):
        self.rows, self.rate, self.steps, self.seed, self.step = rows, rate, steps, seed, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            drawn = torch.rand(self.rows, generator=_generator(self.seed, self.step, 0), dtype=torch.float64)
            self.step += 1
            yield (drawn < self.rate).nonzero()[:, 0].tolist()


def _generator(seed: int, step: int, stream: int, device: Any = "cpu") -> torch.Generator:
    # The CPU's generator reads 32 bits of a seed; counting up keeps all steps of a run apart, which a hash would not.
    return torch.Generator(device).manual_seed((seed * 2_654_435_761 + 2 * step + stream) % (1 << 63))


class _Collator:
    """Adds the weight of each row; a batch without rows is one row of weight 0."""

    def __init__(self, inner: Callable[[list], dict], example: Any):
        self.inner, self.example = inner, example

    def __call__(self, rows: list) -> dict[str, Any]:
        batch = self.inner(rows or [self.example])
        return {**batch, WEIGHT: torch.ones(len(rows)) if rows else torch.zeros(1)}


class _Begin(TrainerCallback):
    def __init__(self, trainer: "DPTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin(state)


class DPTrainer(Trainer):
    """`Trainer` by DP-SGD: `DPTrainer(model, args, train_dataset=rows, dp=DPConfig(epsilon=8))`.

    `per_device_train_batch_size` is B, the mean size of a batch, which is drawn anew every step; an epoch is N / B
    steps. Any optimizer may take the private gradient (the paper's is plain SGD). The guarantee is saved as `dp.json`
    beside the model. It covers the weights; the logged training loss and evaluations are not private. A model is
    trained once: the steps of another `train()` would not be counted, so it must resume from a checkpoint.

    Args:
        dp (`DPConfig`, *optional*): Options.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, dp: DPConfig | None = None, **kwargs):
        self.dp = DPConfig() if dp is None else dp
        if args.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {args.gradient_accumulation_steps} but must be 1: noise belongs to "
                "the whole batch. Use a larger per_device_train_batch_size, and DPConfig(microbatch_size=) for memory."
            )
        if args.auto_find_batch_size:
            raise NotImplementedError(
                "auto_find_batch_size changes the sampling rate: use DPConfig(microbatch_size=)."
            )
        if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp or args.fp16:
            raise NotImplementedError("DPTrainer runs in one process on one device, in float32 or bfloat16.")
        if args.label_smoothing_factor or kwargs.get("compute_loss_func") is not None:
            raise NotImplementedError("DPTrainer takes the loss that the model returns for each row.")
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS):
                raise NotImplementedError(f"{name} mixes the rows of a batch: none has a gradient of its own.")
        rows = kwargs.get("train_dataset")
        if kwargs.get("data_collator") is None and rows is not None and set(rows[0]) == {"input_ids", "labels"}:
            kwargs["data_collator"] = collate
        args = copy.copy(args)
        args.max_grad_norm, args.ignore_data_skip = 0.0, True
        super().__init__(model, args, **kwargs)
        if rows is not None and not 0 < args.per_device_train_batch_size <= len(rows):
            raise ValueError(
                f"per_device_train_batch_size is {args.per_device_train_batch_size} but must be in [1, {len(rows)}], "
                "the number of rows."
            )
        self.add_callback(_Begin(self))
        self.noise_multiplier: float | None = self.dp.noise_multiplier
        self._how, self._sampler, self._resumed, self._begun = HOW[0], None, None, False

    @property
    def sampling_rate(self) -> float:
        return self.args.per_device_train_batch_size / len(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        rows = super().get_train_dataloader()
        seed = secrets.randbits(62) if self.dp.seed is None else self.dp.seed
        self._sampler = PoissonSampler(len(rows.dataset), self.sampling_rate, math.ceil(1 / self.sampling_rate), seed)
        loader = DataLoader(
            rows.dataset,
            batch_sampler=self._sampler,
            collate_fn=_Collator(rows.collate_fn, rows.dataset[0]),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        path = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if self._begun and not path:
            raise ValueError("This model was already trained here: resume from a checkpoint, or start from the base.")
        self._resumed = read_guarantee(path) if path else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _begin(self, state: Any) -> None:
        self._begun, self._sampler.step = True, state.global_step
        c, rate = self.dp, self.sampling_rate
        self.noise_multiplier = c.noise_multiplier
        if self.noise_multiplier is None:
            self.noise_multiplier = noise_for(c.epsilon, rate, state.max_steps, c.delta, c.accountant)
        if self._resumed is not None:
            for name, value in self._setting().items():
                if not math.isclose(self._resumed[name], value, rel_tol=1e-9):
                    raise ValueError(
                        f"The checkpoint was trained with {name} {self._resumed[name]}, this run has {value}: steps "
                        "of two kinds have no guarantee here. Keep the epochs, the rows and DPConfig."
                    )

    def _setting(self) -> dict[str, float]:
        return {
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "max_grad_norm": self.dp.max_grad_norm,
            "delta": self.dp.delta,
        }

    def guarantee(self) -> dict[str, Any]:
        """What the steps so far have spent, as saved in `dp.json`."""
        steps, c = self.state.global_step, self.dp
        if self.noise_multiplier is None:
            raise ValueError("The guarantee is known when training has begun.")
        epsilon = privacy_spent(self.noise_multiplier, self.sampling_rate, steps, c.delta, c.accountant)
        return {
            "epsilon": None if epsilon == math.inf else epsilon,
            **self._setting(),
            "steps": steps,
            "rows": len(self.train_dataset),
            "accountant": c.accountant,
            "neighbours": "one row added or removed",
            "secret_seed": c.seed is None,
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if two_pass_optimizer(self) is not None:
            raise NotImplementedError("A two-pass optimizer asks each row twice; the guarantee counts one question.")
        model.train()
        weights = inputs.pop(WEIGHT).to(self.args.device)
        batch = {name: x.to(self.args.device) for name, x in inputs.items() if isinstance(x, Tensor)}
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in params.items()}
        losses, size = [], self.dp.microbatch_size or len(weights)
        for start in range(0, len(weights), size):
            part = {name: x[start : start + size] for name, x in batch.items()}
            losses.append(self._add_clipped(model, params, part, weights[start : start + size], total))
        deviation = self.noise_multiplier * self.dp.max_grad_norm if self.noise_multiplier else 0.0
        if deviation:
            add_noise(total, deviation, _generator(self._sampler.seed, self.state.global_step, 1, self.args.device))
        for name, p in params.items():
            p.grad = (total[name] / self.args.per_device_train_batch_size).to(p.dtype)
        return torch.cat(losses).mean() if weights.any() else torch.zeros((), device=self.args.device)

    def _add_clipped(self, model, params, batch, weights, total) -> Tensor:
        """Add the clipped gradients of a part of the batch to `total`; the losses of its rows."""
        made = {name: torch.zeros_like(x) for name, x in total.items()}
        losses = []
        try:
            for rows, grads, loss in per_sample_gradients(model, params, batch, self._how):
                part, _ = clipped_sum(grads, self.dp.max_grad_norm, weights[rows.to(weights.device)])
                for name, value in part.items():
                    made[name] += value
                losses.append(loss.detach().float())
        except (RuntimeError, NotImplementedError) as error:
            if self._how == "rows" or isinstance(error, torch.OutOfMemoryError):
                raise
            self._how = HOW[HOW.index(self._how) + 1]
            logger.info(f"DPTrainer: gradients by {self._how} from now on, since {str(error).splitlines()[0]}")
            return self._add_clipped(model, params, batch, weights, total)
        for name, value in made.items():
            total[name] += value
        return torch.cat(losses)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.noise_multiplier is not None:
            path = Path(output_dir or self.args.output_dir, FILE)
            path.write_text(json.dumps(self.guarantee(), indent=2) + "\n", encoding="utf-8")


def unlearn_from_dp_base(
    base: str | Path, retain_rows: Sequence[Mapping[str, Any]], args: TrainingArguments, model: Any = None, **kwargs
) -> Trainer:
    """Fine-tune a DP base, as saved by [`DPTrainer`], on the rows that stay, and save the result in `args.output_dir`.

    The base is left as it is for the next request. Where `model` is given it is the base, already loaded, and changes.
    `dp.json` is saved with the result: what it says of a forgotten row holds for the unlearned model, and nothing
    bounds what it knows of the retained ones, so that it is no base itself. Other arguments go to the `Trainer`, which
    is returned trained.
    """
    known = read_guarantee(base)
    if Path(args.output_dir).resolve() == Path(base).resolve():
        raise ValueError("args.output_dir is the base's own folder, but the base must be kept for the next request.")
    if len(retain_rows) == 0:
        raise ValueError("retain_rows is empty: without rows to keep, the base itself is the unlearned model.")
    if kwargs.get("data_collator") is None and set(retain_rows[0]) == {"input_ids", "labels"}:
        kwargs["data_collator"] = collate
    if model is None and Path(base, "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(base, is_trainable=True)
    elif model is None:
        model = AutoModelForCausalLM.from_pretrained(base)
    trainer = Trainer(model, args, train_dataset=retain_rows, **kwargs)
    trainer.train()
    trainer.save_model()
    known |= {"base": False, "covers": "rows that are not among the retain rows"}
    Path(args.output_dir, FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return trainer


METHOD = Method(
    name="dp2",
    family="unlearning",
    title="DP2Unlearning: An Efficient and Guaranteed Unlearning Framework for LLMs",
    authors="Al Mahmud et al.",
    arxiv=None,
    year=2025,
    repo="tamimalmahmud/DP2Unlearning",
    status="variant",
    difference="The DP-SGD base alone, without the base trained on privately rewritten text; sampling and noise are "
    "secret by default; the guarantee of several rows is stated by group privacy.",
    target="hfext.unlearning.dp2:DPTrainer",
    config=DPConfig,
    usage="hfext.unlearning.DPTrainer(model, args, train_dataset=rows, dp=DPConfig(epsilon=8, delta=1e-12)).train()",
    summary="A base trained with differential privacy is kept, and unlearning is fine-tuning it on what may stay.",
    claim="Fine-tuning a DP base on the retained rows gives a guarantee at a fraction of the cost of retraining.",
    headline=Result(
        metric="cost of unlearning",
        setting="against retraining from scratch (abstract)",
        value="about one half",
    ),
    notes="No arXiv id: published in Neural Networks, doi 10.1016/j.neunet.2025.107879. Needs dp-accounting. The "
    "guarantee is of one row; for k forgotten rows see `group_guarantee`, which is weak when k epsilon is large. No "
    "recipe: a base that learns under a useful epsilon needs more rows than a CPU reads in minutes.",
)
