"""Stage `noise` of the quickstart: a small ViT learns digits with wrong labels, with one optimizer after another."""

import time
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from ._digits import CLASSES, Digits, accuracy, corrupt, load_digits
from ._plots import lines
from ._quiet_trainer import train

if TYPE_CHECKING:
    from .quickstart import Config, State


def noise(state: "State") -> None:
    c = state.config
    clean, test = (Digits(part.pixel_values.view(-1, 1, 8, 8), part.labels) for part in load_digits())
    noisy = Digits(clean.pixel_values, corrupt(clean.labels, c.noise, c.seed))
    rows, series = [], {}
    for name in c.noise_methods:
        model, observer = make_vit(c), Accuracy(test)
        two_pass = {"optim": name, "optim_args": f"rho={c.noise_rho},base=adamw"}
        start = time.perf_counter()
        train(
            model,
            noisy,
            f"noise: {name}",
            callbacks=[observer],
            learning_rate=c.noise_learning_rate,
            num_train_epochs=c.noise_epochs,
            per_device_train_batch_size=c.noise_batch_size,
            seed=c.seed,
            **({"optim": "adamw_torch"} if name == "adamw" else two_pass),
        )
        curve = [100 * value for value in observer.values]
        series[name] = (list(range(1, len(curve) + 1)), curve, None)
        rows.append(
            {
                "optim": name,
                "best epoch, %": max(curve),
                "last epoch, %": curve[-1],
                "last - best": curve[-1] - max(curve),
                "fits the noisy labels, %": 100 * accuracy(model, noisy),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    title = f"digits, {c.noise:.0%} of the training labels wrong, one seed"
    state.tables[f"noise: clean test accuracy of a ViT on {title}"] = rows
    lines(state.out / "noise.png", series, "epoch", "clean test accuracy, %", title)
    state.artifacts.append("noise.png")


def make_vit(config: "Config") -> ViTForImageClassification:
    size = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=config.noise_hidden,
        intermediate_size=2 * config.noise_hidden,
        num_hidden_layers=config.noise_layers,
        num_attention_heads=4,
        num_labels=CLASSES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ViTForImageClassification(size)


class Accuracy(TrainerCallback):
    """Accuracy on clean digits after each epoch."""

    def __init__(self, test: Digits):
        self.test, self.values = test, []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.values.append(accuracy(model, self.test))
