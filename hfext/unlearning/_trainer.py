"""`UnlearningTrainer`: the stock Trainer over pairs of forget and retain rows, with any objective and any `optim=`.

What differs from `Trainer`: the batch (parts by name), the loss (sums over the items of the whole update), and for
objectives with two gradients the training step. Everything else is the stock loop.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging

from ..compat import (
    CheckpointMixin,
    quantized_weights_only,
    set_optimizer_mode,
    train_batch_size,
    two_pass_optimizer,
)
from ..optim._driver import training_step as two_pass_step
from ..optim.bisam import BiSAM, bisam_rows
from ._auto_lr import AutoLR, AutoLRConfig
from ._config import UnlearningConfig
from ._data import PairedDataset, collate, evaluation_rows, overlap, refusal_ids, token_rows
from ._objective import PARTS, Objective, TwoGradientObjective, objective
from ._reference import Reference, chosen_mode, is_peft
from ._run_callback import RunCallback
from ._terms import UPDATE, Term
from ._two_gradients import UNSUPPORTED, Pass, gradient_angles, two_gradient_step

logger = logging.get_logger(__name__)
STATE = "unlearning_state"


class UnlearningTrainer(CheckpointMixin, Trainer):
    """Trainer that makes a causal language model forget rows of text and keep others.

    Rows are tokenised already (`input_ids` and `labels`, -100 where nothing is scored) or text: `question` and
    `answer`, `prompt` and `completion`, `messages`, or `text`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model that learnt the rows.
        args (`UnlearningConfig`): Settings; its `objective` names the method.
        forget_dataset (sequence of rows): What to forget.
        retain_dataset (sequence of rows, *optional*): What to keep; most objectives need it.
        decouple_dataset (sequence of rows, *optional*): Prompts like those of forget rows that must still be answered.
        objective (`Objective`, *optional*): An object in place of `args.objective`.
        ref_model (`PreTrainedModel`, *optional*): The reference; by default the cheapest that is right, see
            `args.reference`.
        evaluators (sequence of callables, *optional*): Each is called by `evaluate` in every process with `(model,
            processing_class)` and returns numbers by name, which join its metrics, so that `metric_for_best_model` can
            name them. The retain rows are the `eval_dataset` beside them where none is given.
        **kwargs: As for `Trainer`: `processing_class`, `eval_dataset`, `callbacks`, `optimizers`, ....

    Raises:
        ValueError: A data set that the objective needs is missing or empty; a reference that would be wrong.
        NotImplementedError: DeepSpeed, FSDP or DataParallel with an objective of two gradients.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: UnlearningConfig,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        decouple_dataset: Any = None,
        *,
        objective: Objective | None = None,
        ref_model: nn.Module | None = None,
        evaluators: Sequence[Any] = (),
        processing_class: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, UnlearningConfig):
            raise TypeError(f"args is {type(args).__name__} but must be an UnlearningConfig.")
        if "train_dataset" in kwargs:
            raise TypeError("UnlearningTrainer takes forget_dataset and retain_dataset in place of train_dataset.")
        if vars(model.config).get("is_encoder_decoder"):
            raise NotImplementedError(
                f"{type(model).__name__} is an encoder-decoder: only causal models are unlearned."
            )
        self.objective = _objective(objective, args)
        args.adapt(type(self.objective))
        self.evaluators = list(evaluators)
        self.window: list[dict] = []
        self.window_counts: dict[str, Tensor] = {}
        self.gradient_pass: Pass | None = None
        self._metrics: dict[str, tuple[Any, int]] = {}
        _refuse_quantised(model, self.objective)
        data = self._pairs(args, processing_class, forget_dataset, retain_dataset, decouple_dataset)
        mode = chosen_mode(args.reference, model, self.objective, ref_model) if self.objective.reference else None
        self.reference = Reference(mode, model, self.objective, ref_model) if mode else None
        self.objective.prepare(model, data)
        kwargs.setdefault("data_collator", collate)
        if eval_dataset is None and args.eval_strategy != "no" and self.evaluators:
            eval_dataset = data.parts.get("retain", data.parts.get("forget"))
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=evaluation_rows(eval_dataset, processing_class, args.template, args.max_length),
            processing_class=processing_class,
            **kwargs,
        )
        if isinstance(self.objective, TwoGradientObjective):
            kind = self.accelerator.distributed_type
            if kind in UNSUPPORTED or self.args.n_gpu > 1:
                reason = UNSUPPORTED.get(kind, "DataParallel splits the batch")
                raise NotImplementedError(
                    f"{type(self.objective).__name__} combines two gradients, which does not run here: {reason}. Use "
                    "DistributedDataParallel (torchrun), one process, or an objective with one gradient."
                )
        options = self.objective.config
        if isinstance(options, AutoLRConfig) and options.auto_lr:
            self.add_callback(AutoLR(self, options))
        self.add_callback(RunCallback(self))
        if mode == "precompute":
            self.reference.precompute(self.model, data, args.per_device_eval_batch_size, self.accelerator)

    def _pairs(self, args, tokenizer, forget, retain, decouple) -> PairedDataset:
        needs, name = self.objective.needs, type(self.objective).__name__
        parts = {}
        for part, given in (("forget", forget), ("retain", retain), ("decouple", decouple)):
            if given is None and part in needs:
                raise ValueError(f"{name} needs {part}_dataset, which is None.")
            if given is not None and part not in needs:
                logger.warning(f"{part}_dataset is not used: {name} with these options does not look at it.")
            if given is not None and part in needs:
                parts[part] = token_rows(f"{part}_dataset", given, tokenizer, args.template, args.max_length)
        anchor = args.anchor or next(part for part in ("forget", "retain") if part in needs)
        if anchor not in parts:
            raise ValueError(f"anchor is {anchor!r}, but {name} does not look at {anchor} rows: leave it out.")
        shared = overlap(parts.get("forget", ()), parts.get("retain", ()))
        if shared:
            logger.warning(
                f"{shared} of {len(parts['forget'])} forget rows are retain rows too: forgotten and kept at once."
            )
        refusals = None
        if "alternate" in needs:
            refusals = refusal_ids(args.refusals, tokenizer, parts["forget"])
        seed = args.seed if args.data_seed is None else args.data_seed
        return PairedDataset(parts, anchor, seed, refusals, args.max_length)

    # ---- data -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Pairs of rows, the same for any number of workers and processes and after a resume."""
        args = self.args
        if args.train_sampling_strategy != "random":
            raise ValueError(f"train_sampling_strategy is {args.train_sampling_strategy!r} but must be 'random'.")
        loader = DataLoader(
            self.train_dataset,
            batch_size=train_batch_size(self),
            sampler=self.train_dataset.sampler,
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an update, and the items of all of them, of all processes, by name."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.window, totals = batches, {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                totals[name] = totals.get(name, 0) + count.to(device)
        if totals and self.accelerator.num_processes > 1:
            joined = self.accelerator.reduce(torch.stack([*totals.values()]).double(), reduction="sum")
            totals = dict(zip(totals, joined, strict=True))
        self.window_counts = totals
        return batches, totals or None

    def floating_point_ops(self, inputs):
        """Of all parts of a batch together."""
        parts = [inputs[part] for part in PARTS if part in inputs]
        return sum(super(UnlearningTrainer, self).floating_point_ops(part) for part in parts or [inputs])

    # ---- loss -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective on parts by name; the model's own loss on a plain batch, as in evaluation."""
        if not any(part in inputs for part in PARTS):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            whole = self.state.num_train_epochs if self.args.max_steps > 0 else self.args.num_train_epochs
            self.objective.epoch, self.objective.epochs = self.state.epoch or 0.0, whole
        now = self.objective.forward(model, inputs)
        known = {}
        if self.reference is not None:
            with self.accelerator.autocast():
                known = self.reference(self.accelerator.unwrap_model(model), inputs)
        terms = self.objective.terms(now, known)
        loss = self._weighed(terms, inputs, num_items_in_batch)
        if not torch.isfinite(loss) and self.args.abort_on_nonfinite:
            raise RuntimeError(
                f"The loss is {float(loss.detach())} in update {self.state.global_step + 1}. Take a smaller "
                "learning_rate or a bounded objective (npo, simnpo), or set abort_on_nonfinite=False."
            )
        if model.training:
            self._note_terms(model, terms, inputs, num_items_in_batch)
        return (loss, {"now": now, "reference": known}) if return_outputs else loss

    def _weighed(self, terms: dict[str, Term], inputs: Any, counts: dict[str, Tensor] | None) -> Tensor:
        return sum(term.weight * self._mean(term, inputs, counts) for term in terms.values())

    def _mean(self, term: Term, inputs: Any, counts: dict[str, Tensor] | None) -> Tensor:
        """A term such that the sum over micro-batches and the mean over processes are that of the whole update."""
        steps = self.current_gradient_accumulation_steps
        if term.per == UPDATE:
            return term.total / steps
        if counts is None or self.args.loss_normalization == "micro":
            return self._own_mean(term, inputs) / steps
        return term.total * self.accelerator.num_processes / counts[term.per].to(term.total).clamp(min=1)

    def _first_objective(self, trainer, model, inputs, outputs, num_items) -> Tensor:
        """BiSAM's first pass: its bound of the 0-1 loss of a token in place of the likelihood, in every term."""
        config = two_pass_optimizer(self).config

        def q(logits: Tensor, labels: Tensor) -> Tensor:
            mu = two_pass_optimizer(self)._mu(logits.shape[-1])
            return bisam_rows(logits, labels, config.surrogate, mu, config.alpha, config.topk)

        now = self.objective.with_row_loss(outputs["now"], q)
        return self._weighed(self.objective.terms(now, outputs["reference"]), inputs, num_items)

    def create_optimizer(self, *args, **kwargs):
        made = super().create_optimizer(*args, **kwargs)
        two_pass = two_pass_optimizer(self)
        if two_pass is not None and isinstance(self.objective, TwoGradientObjective):
            if two_pass.own_driver is not None or two_pass.config.scope == "micro":
                raise NotImplementedError(
                    f"{type(self.objective).__name__} makes its gradient at the end of an update, which "
                    f"{type(two_pass).__name__} does not wait for. Use optim='sam' with scope=update."
                )
        if isinstance(two_pass, BiSAM) and two_pass.rows is None:
            two_pass.first_objective = self._first_objective
        return made

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The stock step, or that of two gradients."""
        if isinstance(self.objective, TwoGradientObjective):
            return two_pass_step(two_gradient_step, self, model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def train(self, *args, **kwargs):
        if self.reference is not None:
            self.reference.attach(self.model)
        self.objective.begin(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.gradient_pass, self.window = None, []
            self.objective.release()
            if self.reference is not None:
                self.reference.detach(self.model)

    # ---- what is logged and saved -----------------------------------------------------------------------------

    def note(self, values: dict[str, Any]) -> None:
        """Add numbers of one update to those whose mean the next log reports."""
        for name, value in values.items():
            total, count = self._metrics.get(name, (0.0, 0))
            self._metrics[name] = total + value, count + 1

    def _note_terms(self, model: nn.Module, terms: dict[str, Term], inputs: Any, counts: Any) -> None:
        means = {name: self._mean(term, inputs, counts) for name, term in terms.items()}
        for name, mean in means.items():
            total, _ = self._metrics.get(f"{name}_loss", (0.0, 0))
            # Parts of one update: the count is that of updates, which `log` knows.
            self._metrics[f"{name}_loss"] = total + mean.detach(), 0
        step = self.state.global_step + 1
        logged = self.args.log_gradients and step % max(int(self.args.logging_steps), 1) == 0
        if logged and self.accelerator.sync_gradients and not isinstance(self.objective, TwoGradientObjective):
            own = {name: self._own_mean(term, inputs) for name, term in terms.items()}
            self.note(gradient_angles(model, {name: mean for name, mean in own.items() if mean.requires_grad}))

    def _own_mean(self, term: Term, inputs: Any) -> Tensor:
        """A term over the items of this micro-batch alone."""
        if term.per == UPDATE:
            return term.total
        return term.total / self.objective.counts(inputs)[term.per].to(term.total.device).clamp(min=1)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._metrics:
            noted, self._metrics = self._metrics, {}
            updates = max(self.state.global_step - self._noted_until, 1)
            self._noted_until = self.state.global_step
            for name, (total, count) in noted.items():
                value = torch.as_tensor(total, device=self.args.device).float() / (count or updates)
                logs[f"unlearn/{name}"] = float(self.accelerator.reduce(value, reduction="mean"))
        return super().log(logs, *args, **kwargs)

    _noted_until = 0
    _found: dict[str, float] | None = None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """What the evaluators say, and the stock evaluation where there are rows for it, in one log and one result."""
        if self._found is not None:  # one of several data sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._asked().items()}
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            self.log(dict(found))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found
        args = self.args
        rows = evaluation_rows(eval_dataset, self.processing_class, args.template, args.max_length)
        self._found = found
        try:
            return super().evaluate(rows, ignore_keys, metric_key_prefix) | found
        finally:
            self._found = None

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.update(self._found or {})  # callbacks see everything together
        return output

    def _asked(self) -> dict[str, float]:
        """The numbers of every evaluator, from the weights that are saved, in eval mode."""
        model = self.accelerator.unwrap_model(self.model)
        modes = {module: module.training for module in model.modules()}
        if self.optimizer is not None:
            set_optimizer_mode(self.optimizer, train=False)
        model.eval()
        try:
            found = {}
            for evaluator in self.evaluators:
                for name, value in evaluator(model, self.processing_class).items():
                    single = isinstance(value, int | float) or (isinstance(value, Tensor | np.generic) and value.size)
                    if single and not (isinstance(value, Tensor) and value.numel() != 1):
                        found[name] = float(value)
            return found
        finally:
            for module, training in modes.items():
                module.training = training

    def save_more(self, folder):
        super().save_more(folder)
        if self.reference is not None and self.args.should_save:
            about = self.reference.about()
            path = os.path.join(folder, f"{STATE}.safetensors")
            save_file(dict(self.reference.known), f"{path}.partial", metadata={"hfext": json.dumps(about)})
            os.replace(f"{path}.partial", path)

    def load_more(self, folder):
        super().load_more(folder)
        path = os.path.join(folder, f"{STATE}.safetensors")
        if self.reference is None or not os.path.isfile(path):
            return
        known = load_file(path)
        sizes = [{part: len(x) for part, x in values.items()} for values in (known, self.reference.known)]
        if _about(path) != self.reference.about() or sizes[0] != sizes[1]:
            raise ValueError(
                f"The reference of the checkpoint {folder} is another one: give UnlearningTrainer the model and rows "
                "that the run began with, and then resume_from_checkpoint."
            )
        self.reference.known = known


def _about(path: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hfext"])


def _objective(given: Objective | None, args: UnlearningConfig) -> Objective:
    if given is None:
        return objective(args.objective, args.objective_kwargs())
    if not isinstance(given, Objective):
        raise TypeError(f"objective is {type(given).__name__} but must be an Objective; names go into the config.")
    return given


def _refuse_quantised(model: nn.Module, objective: Objective) -> None:
    floats = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    if not floats or (quantized_weights_only(model) and not is_peft(model)):
        raise ValueError(
            f"{type(objective).__name__} follows gradients of the weights, but the model's are quantised or frozen. "
            "Add an adapter (peft.get_peft_model), or load it without quantization_config."
        )
