"""Training of a `KVPredictor`: the auxiliary model and the maps learn, the base is only asked."""

from typing import Any

import torch
from transformers import Trainer

from .kv_prediction import PARTS, KVPredictor, target_mask


class KVPredictionTrainer(Trainer):
    """`Trainer` for a [`KVPredictor`]: `KVPredictionTrainer(predictor, args, train_dataset=data)`.

    Rows have `input_ids`, `labels` (-100 where nothing counts) and, when padded, `attention_mask`. The losses are
    averaged over all labels, and the distance over all tokens, of an update, so that splitting it into accumulated
    batches changes nothing. Beside `loss` its parts are logged: `loss_base`, `loss_aux`, `loss_z` and `loss_kv`. The
    base is moved to the device of training and comes out as it went in. A checkpoint holds the auxiliary model and
    the maps, twice: as `Trainer` resumes them and as `KVPredictor.from_pretrained` reads them.

    Args:
        model (`KVPredictor`): What to train.
        *args, **kwargs: Those of `Trainer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: KVPredictor, *args: Any, **kwargs: Any):
        if not isinstance(model, KVPredictor):
            raise TypeError(f"model is a {type(model).__name__} but must be a KVPredictor.")
        mine = {id(p) for p in model.parameters()}
        if any(id(p) in mine for p in model.base.parameters()):
            raise ValueError("aux and base share parameters: give a copy of the base as the auxiliary model.")
        self._sums, self._updates = torch.zeros(len(PARTS)), 0
        self._tokens_in_batch = None
        super().__init__(model, *args, **kwargs)
        if self.args.fsdp or self.args.deepspeed or self.args.n_gpu > 1:
            raise NotImplementedError(
                "The base stands outside the trained model, so FSDP, DeepSpeed and DataParallel are not supported. "
                "Use DistributedDataParallel."
            )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise NotImplementedError(
                "compute_loss_func and label_smoothing_factor are not supported: the loss is the predictor's own."
            )
        if model.base.device != self.args.device:
            model.base.to(self.args.device)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, and how many labels count in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if any("labels" not in batch for batch in batches):
            raise ValueError("The batches have no labels: set them to input_ids, with -100 where nothing counts.")
        pairs = [(batch, batch.get("attention_mask")) for batch in batches]
        items = sum(target_mask(batch["labels"], mask).sum() for batch, mask in pairs)
        tokens = sum((torch.ones_like(b["input_ids"]) if mask is None else mask).sum() for b, mask in pairs)
        counts = torch.stack([items, tokens]).to(device)
        if self._over_devices():
            counts = self.accelerator.gather(counts[None]).sum(0)
        items, self._tokens_in_batch = counts.clamp(min=1).unbind()
        self._updates += 1
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of `KVPredictor.forward`."""
        if "labels" not in inputs:
            raise ValueError("The batch has no labels: set them to input_ids, with -100 where nothing counts.")
        counts = {}
        if model.training and num_items_in_batch is not None:
            counts = {"num_items_in_batch": num_items_in_batch, "num_tokens_in_batch": self._tokens_in_batch}
        outputs = model(**inputs, **counts)
        loss, parts = outputs.loss, outputs.parts
        if counts:
            if self._over_devices():
                loss, parts = loss * self.accelerator.num_processes, parts * self.accelerator.num_processes
            self._sums = self._sums.to(parts.device) + parts
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean parts of the loss since the last log."""
        if "loss" in logs and self._updates:
            mean = self.accelerator.gather(self._sums[None]).mean(0) / self._updates
            logs = {**logs, **dict(zip(PARTS, mean.tolist(), strict=True))}
            self._sums, self._updates = torch.zeros_like(self._sums), 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Also in the form of `KVPredictor.save_pretrained`."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            self.model.save_pretrained(self.args.output_dir if output_dir is None else output_dir)

    def _over_devices(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1
