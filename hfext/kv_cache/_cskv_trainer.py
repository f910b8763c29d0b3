"""Training of CSKV's matrices, layer by layer: only they learn, and every layer sees exact keys and values.

loss = sum over layers of  mean (W_k x - B_k A_k x)^2 + mean (W_v x - B_v A_v x)^2

over tokens that are no padding and all channels. The rotary embedding, put on both sides, would not change it, nor
would a bias; keys are compared before their norm where there is one. With fewer than 16 bits A x goes through the
cache's own quantiser, windows counted from the first column, and the gradient passes it unchanged.
"""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput

from .._packing import check_bits
from ._calibration import Calibration
from ._channel_factors import SIDES, projections
from ._geometry import decoder, geometry, unwrapped
from ._install import capture
from ._quantize import dequantize_minmax, quantize_minmax
from ._state import Step
from .cskv import CSKVConfig


def passed_through(feature: Tensor, side: str, bits: int, window: int, kv_heads: int) -> Tensor:
    """Features [batch, tokens, r] as the cache would return them, with the gradient of the identity.

    Keys ("k") by windows of tokens, of which the last, when it is not finished, stays as it is; values ("v") by token.
    """
    check_bits(bits)
    if bits == 16:
        return feature
    stop = feature.shape[1] if side == "v" else feature.shape[1] // window * window
    group, dim = (window, -2) if side == "k" else (feature.shape[-1] // kv_heads, -1)
    if stop == 0:
        return feature
    with torch.no_grad():
        coded = dequantize_minmax(*quantize_minmax(feature[:, :stop], bits, group, dim), group, dim)
        off = torch.zeros_like(feature)
        off[:, :stop] = coded - feature[:, :stop]
    return feature + off


class ChannelFactors(nn.Module):
    """The matrices of all layers as parameters, float32. `model` is referred to and is no part of this module."""

    accepts_loss_kwargs = True

    def __init__(self, model: PreTrainedModel, config: CSKVConfig):
        super().__init__()
        inner = unwrapped(model)
        self.geometry = config.checked(inner)
        self.options = config
        vars(self)["base"] = inner
        self.layers = nn.ModuleDict(
            {
                str(index): nn.ParameterDict(
                    {
                        f"{side}_{part}": nn.Parameter(config.calibration.layer(index, f"{side}_{part}").clone())
                        for side in SIDES
                        for part in ("down", "up")
                    }
                )
                for index in self.geometry.layers
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_loss: bool = True,
    ) -> ModelOutput:
        """The loss of texts [batch, tokens], over the tokens of an update, `num_items_in_batch`, or its own."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask.bool().to(input_ids.device)
        items = real.sum() if num_items_in_batch is None else num_items_in_batch
        losses: list[Tensor] = []

        def visit(step: Step, index: int, keys: Tensor, values: Tensor) -> None:
            with torch.enable_grad():
                losses.append(self.layer_loss(step.module, index, step.hidden_states, real) / items)

        training = self.base.training
        self.base.eval()
        try:
            with torch.no_grad(), capture(self.base, self.geometry, visit):
                decoder(self.base)(input_ids=input_ids, attention_mask=mask, use_cache=False)
        finally:
            self.base.train(training)
        return ModelOutput(loss=torch.stack(losses).sum())

    def layer_loss(self, module: nn.Module, index: int, hidden: Tensor, real: Tensor) -> Tensor:
        """The sum over real tokens of the mean over channels, of keys and of values."""
        x, pairs, total = hidden.detach().float(), self.layers[str(index)], 0.0
        for side, (weight, _) in projections(module, self.geometry).items():
            if side not in SIDES:
                continue
            feature = x @ pairs[f"{side}_down"].T
            feature = passed_through(feature, side, self.options.bits, self.options.window, self.geometry.num_kv_heads)
            off = x @ weight.T - feature @ pairs[f"{side}_up"].T
            total = total + (off.square().mean(-1) * real).sum()
        return total

    def calibrated(self, tokens: int) -> CSKVConfig:
        """The config with these matrices, learnt from `tokens` tokens."""
        old = self.options.calibration.tensors
        mine = {
            f"{index}.{name}": x.detach().float().cpu().contiguous().clone()
            for index, pairs in self.layers.items()
            for name, x in pairs.items()
        }
        return dataclasses.replace(
            self.options, calibration=Calibration({**old, **mine}, geometry(self.base).facts, tokens)
        )


class CSKVTrainer(Trainer):
    """Trains the matrices of a calibrated `CSKVConfig`: `CSKVTrainer(model, config, args, train_dataset=data)`.

    Rows have `input_ids` and, when padded, `attention_mask`. The loss is averaged over all tokens of an update, so
    that splitting it into accumulated batches changes nothing. The model is frozen, in its evaluation mode while it is
    asked, and moved to the device of training. A checkpoint holds the matrices, as `Trainer` resumes them and as
    `CSKVConfig.from_pretrained` reads them.

    Args:
        model (`PreTrainedModel`): Whose cache is to be compressed. It does not change.
        config (`CSKVConfig`): With the matrices to begin from: `CSKVConfig(...).calibrate(model, data)`.
        *args, **kwargs: Those of `Trainer`.

    `trainer.config` is the config with the matrices as they are now, to be used with `hfext.kv_cache.apply`.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel, config: CSKVConfig, *args: Any, **kwargs: Any):
        if not isinstance(config, CSKVConfig):
            raise TypeError(f"config is a {type(config).__name__} but must be a CSKVConfig.")
        self._tokens = config.calibration.tokens if config.calibration is not None else 0
        super().__init__(ChannelFactors(model, config), *args, **kwargs)
        if self.args.fsdp or self.args.deepspeed or self.args.n_gpu > 1:
            raise NotImplementedError(
                "The model stands outside the trained matrices, so FSDP, DeepSpeed and DataParallel are not "
                "supported. Use DistributedDataParallel."
            )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise NotImplementedError(
                "compute_loss_func and label_smoothing_factor are not supported: the loss is that of CSKV."
            )
        base = self.model.base
        if next(base.parameters()).device != self.args.device:
            base.to(self.args.device)

    @property
    def config(self) -> CSKVConfig:
        return self.accelerator.unwrap_model(self.model).calibrated(self._tokens)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, and how many tokens are in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        masks = [batch.get("attention_mask") for batch in batches]
        counts = [b["input_ids"].numel() if m is None else int(m.sum()) for b, m in zip(batches, masks, strict=True)]
        items = torch.tensor(float(max(1, sum(counts))), device=device)
        if self._over_devices():
            items = self.accelerator.gather(items[None]).sum()
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of `ChannelFactors.forward`."""
        items = num_items_in_batch if model.training else None
        loss = model(inputs["input_ids"], inputs.get("attention_mask"), num_items_in_batch=items).loss
        if items is not None and self._over_devices():
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Also in the form of `CSKVConfig.save_pretrained`."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            self.config.save_pretrained(os.fspath(self.args.output_dir if output_dir is None else output_dir))

    def _over_devices(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1


__all__ = ["CSKVTrainer", "ChannelFactors", "passed_through"]
