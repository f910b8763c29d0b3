"""AdaQuant against rounding to nearest on SmolLM2: errors of layers and perplexity, on text that tuned nothing.

Some blocks of the model, evenly spaced, are quantised and the others stay as they are, so that it takes minutes.
Rounding to nearest has the same clip search from which AdaQuant starts. The relative error of a layer is the mean
squared error of its outputs over their mean square, for inputs of the plain model on the test windows. The weights of
this model come rounded to 4 bits in blocks of 32, so 3 bits are shown.
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..quantization import quantize, quantized_layers
from ..quantization.adaquant import METHOD, AdaQuantConfig
from ..quantization.rtn import RTNConfig
from . import _smollm2
from ._data import wikitext2
from .weight_quality import WINDOW, perplexity, window_nll, windows


@dataclass(kw_only=True)
class Config:
    """
    Args:
        bits: Bits of a weight.
        group_size: Inputs that share a scale and an offset.
        blocks: Blocks that are quantised.
        samples: Calibration rows of 512 tokens of valid.txt.
        windows: Windows of 512 tokens of test.txt.
        inputs: As of `AdaQuantConfig`.
        iterations: Steps of a layer.
        seed: Of the random tokens.
        data_dir: Folder that holds `wikitext2`; the shared data by default.
    """

    bits: int = 3
    group_size: int = 64
    blocks: int = 6
    samples: int = 8
    windows: int = 8
    inputs: Literal["parallel", "sequential"] = "sequential"
    iterations: int = 100
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self):
        for name, least in (("blocks", 1), ("samples", 1), ("windows", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {least}.")


def run(config: Config, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    plain, tokenizer = _smollm2.load()
    folder = wikitext2(config.data_dir)
    data = windows(tokenizer, folder / "valid.txt", config.samples)
    test = windows(tokenizer, folder / "test.txt", config.windows)
    count = plain.config.num_hidden_layers
    if config.blocks > count:
        raise ValueError(f"blocks is {config.blocks} but must be at most {count}.")
    chosen = [i * count // config.blocks for i in range(config.blocks)]
    left = [rf"model\.layers\.{i}\." for i in range(count) if i not in chosen]
    shared = {"bits": config.bits, "group_size": config.group_size, "modules_to_not_convert": left or None}
    configs = {
        "RTN, clip search": RTNConfig(**shared, clip_search=True),
        "AdaQuant": AdaQuantConfig(
            **shared, dataset=data, sequence_length=WINDOW, inputs=config.inputs, iterations=config.iterations,
            seed=config.seed,
        ),
    }  # fmt: skip
    nll = {"float32": window_nll(plain, test)}
    seconds, weights = {}, {}
    for name, made in configs.items():
        model, _ = _smollm2.load()
        start = time.process_time()
        quantize(model, made)
        seconds[name] = time.process_time() - start
        weights[name] = {key: layer.weight.data for key, layer in quantized_layers(model).items()}
        nll[name] = window_nll(model.dequantize(), test)
    errors = layer_errors(plain, weights, test[: min(4, len(test))])
    return report(config, nll, errors, seconds, chosen)


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, weights: dict[str, dict[str, Tensor]], test: Tensor
) -> dict[str, dict[str, float]]:
    """Relative errors of each layer by method."""
    sums: dict[tuple[str, str], float] = {}
    hooks = []
    for name in next(iter(weights.values())):
        layer = model.get_submodule(name)

        def seen(module, args, out, name=name):
            x = args[0].flatten(0, 1)
            sums["", name] = sums.get(("", name), 0.0) + float(out.square().sum())
            for method, of in weights.items():
                off = float((x @ (of[name] - module.weight).T).square().sum())
                sums[method, name] = sums.get((method, name), 0.0) + off

        hooks.append(layer.register_forward_hook(seen))
    for row in test:
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {m: {name: sums[m, name] / sums["", name] for name in of} for m, of in weights.items()}


def report(config: Config, nll, errors, seconds, chosen) -> dict[str, Any]:
    rtn, ours = errors["RTN, clip search"], errors["AdaQuant"]
    kinds = sorted({name.rpartition(".")[2] for name in ours})
    layers = []
    for kind in kinds:
        names = [name for name in ours if name.endswith(kind)]
        layers.append(
            {
                "layer": kind,
                "RTN, clip search": round(statistics.mean(rtn[n] for n in names), 5),
                "AdaQuant": round(statistics.mean(ours[n] for n in names), 5),
                "lower": f"{sum(ours[n] < rtn[n] for n in names)} of {len(names)}",
            }
        )
    n = config.windows
    whole = [
        {
            "weights": name,
            "perplexity": round(perplexity(values, n), 3),
            "CPU s": round(seconds[name], 1) if name in seconds else None,
        }
        for name, values in nll.items()
    ]
    found = {name: perplexity(values, n) for name, values in nll.items()}
    base, mine = nll["RTN, clip search"], nll["AdaQuant"]
    gain = [a - b for a, b in zip(base, mine, strict=True)]
    error = statistics.stdev(gain) / math.sqrt(n)
    title = f"{config.bits} bits in groups of {config.group_size}, blocks {', '.join(map(str, chosen))}"
    return {
        "tables": {f"Relative error of outputs, {title}": layers, f"Perplexity on {n} windows, {title}": whole},
        "evidence": {
            "claim": METHOD.claim,
            "paper": f"{METHOD.headline.value} {METHOD.headline.metric} ({METHOD.headline.setting})",
            "metric": f"perplexity on the first {n} windows of 512 tokens of WikiText-2's test text",
            "setting": f"SmolLM2-135M-Instruct, {config.blocks} of 30 blocks at {title.split(', blocks')[0]}, "
            f"{config.samples} calibration rows of 512; float32 {found['float32']:.2f}",
            "method": "adaquant",
            "ours": round(found["AdaQuant"], 3),
            "ours_sd": round(found["AdaQuant"] * statistics.stdev(mine) / math.sqrt(n), 3),
            "n": n,
            "baseline_name": "rounding to nearest with clip search",
            "baseline": round(found["RTN, clip search"], 3),
            "baseline_sd": round(found["RTN, clip search"] * statistics.stdev(base) / math.sqrt(n), 3),
            "reproduced": statistics.mean(gain) > 2 * error,
            "note": "Standard errors over windows. Reproduced means a paired gain above two standard errors: "
            f"{statistics.mean(gain):.4f} +- {error:.4f} nats a token. The relative error of outputs is lower in "
            f"{sum(ours[k] < rtn[k] for k in ours)} of {len(ours)} layers, {statistics.mean(ours.values()):.4f} for "
            f"{statistics.mean(rtn.values()):.4f}.",
        },
    }
