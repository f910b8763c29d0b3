"""The first token and inputs of layers in 8 bits, on SmolLM2.

Rows of WikiText-2 begin with the model's first token. Ranges are found on valid.txt and judged on test.txt. For each
layer: the largest |x| of the first token and of all others in the plain model, and the relative squared error of the
others' inputs when ranges hold all tokens, and when they leave out the first. Then perplexity, with int8 simulated.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..quantization import quantize, quantized_layers
from ..quantization._activation_linear import activation_grid, fake_quantized
from ..quantization.bos_aware import METHOD, BOSAwareConfig
from ..quantization.rtn import RTNConfig
from . import _smollm2
from ._data import wikitext2
from .weight_quality import perplexity, window_nll, windows


@dataclass(kw_only=True)
class Config:
    """
    Args:
        activation_bits: Bits of the inputs.
        bits: Bits of a weight.
        samples: Rows of 256 tokens to find ranges on.
        windows: Windows of 512 tokens to judge by.
        data_dir: Folder that holds `wikitext2`; the shared data by default.
    """

    activation_bits: int = 8
    bits: int = 8
    samples: int = 6
    windows: int = 6
    data_dir: str | None = None

    def __post_init__(self):
        for name, least in (("samples", 2), ("windows", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {least}.")


ROW = 256


def run(config: Config, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    plain, tokenizer = _smollm2.load()
    folder, token = wikitext2(config.data_dir), plain.config.bos_token_id
    data = begun(windows(tokenizer, folder / "valid.txt", config.samples)[:, :ROW], token)
    test = begun(windows(tokenizer, folder / "test.txt", config.windows), token)
    nll = {"float32": window_nll(plain, test)}
    shared = {"dataset": data, "sequence_length": ROW}
    rows = {
        "weights alone": {"activation_bits": None},
        "all tokens alike": {"activation_bits": config.activation_bits, "bos_aware": False},
        "first token apart": {"activation_bits": config.activation_bits},
        "first token apart, all layers": {"activation_bits": config.activation_bits, "protected": [r".*_proj"]},
    }
    models = {}
    for name, options in rows.items():
        model, _ = _smollm2.load()
        weights = RTNConfig(bits=config.bits)
        models[name] = quantize(model, BOSAwareConfig(quantizer=weights, **shared, **options))
        nll[name] = window_nll(models[name], test)
    every = models["first token apart, all layers"]
    scales = {
        name: (models["all tokens alike"].get_submodule(name).act_scale.item(), layer.act_scale.item())
        for name, layer in quantized_layers(every).items()
    }
    layers = inputs_of(plain, data, test[:2], config.activation_bits)
    return report(config, nll, layers, scales)


def begun(rows: Tensor, token: int) -> Tensor:
    """Rows [rows, tokens] with the first token in front and their last one left out."""
    return torch.cat([torch.full((len(rows), 1), token), rows[:, :-1]], 1)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, data: Tensor, test: Tensor, bits: int) -> dict[str, dict[str, float]]:
    """For each layer: the largest inputs of the first token and of the others on `test`, and the relative squared
    error of the others' there, by ranges from all tokens of `data` and from all but the first."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    ranges: dict[str, list[tuple[float, float]]] = {}
    found: dict[str, dict[str, float]] = {}

    def learn(name: str, x: Tensor) -> None:
        for part in (x, x[:, 1:]):
            ranges.setdefault(name, []).append((float(part.min()), float(part.max())))

    def judge(name: str, x: Tensor) -> None:
        rest, row = x[:, 1:], {"first": float(x[:, 0].abs().max()), "rest": float(x[:, 1:].abs().max())}
        for key, (low, high) in zip(("all", "apart"), ranges[name], strict=True):
            scale, offset = (torch.tensor([v]) for v in activation_grid(low, high, bits, False))
            off = fake_quantized(rest, scale, offset, bits, False) - rest
            row[key] = float(off.square().sum() / rest.square().sum())
        found[name] = row

    for visit, ids in ((learn, data), (judge, test)):
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n, visit=visit: visit(n, args[0]))
            for n in names
        ]
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
    return found


def report(config: Config, nll, layers, scales) -> dict[str, Any]:
    order = sorted(layers, key=lambda name: -layers[name]["first"] / layers[name]["rest"])
    table = [
        {
            "layer": name.removeprefix("model.layers."),
            "first token": round(layers[name]["first"], 1),
            "others": round(layers[name]["rest"], 1),
            "error, all tokens alike": float(f"{layers[name]['all']:.2e}"),
            "error, first token apart": float(f"{layers[name]['apart']:.2e}"),
            "step, apart over alike": round(scales[name][1] / scales[name][0], 3),
        }
        for name in order[:12]
    ]
    kinds = []
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        of = [layers[name] for name in layers if name.endswith(kind)]
        kinds.append(
            {
                "layer": kind,
                "first token over others, median": round(statistics.median(x["first"] / x["rest"] for x in of), 2),
                "most": round(max(x["first"] / x["rest"] for x in of), 1),
                "error, all tokens alike, mean": float(f"{statistics.mean(x['all'] for x in of):.2e}"),
                "error, first token apart, mean": float(f"{statistics.mean(x['apart'] for x in of):.2e}"),
            }
        )
    n = config.windows
    found = {name: perplexity(values, n) for name, values in nll.items()}
    alike, apart = nll["all tokens alike"], nll["first token apart"]
    gain = [a - b for a, b in zip(alike, apart, strict=True)]
    error = statistics.stdev(gain) / math.sqrt(n)
    harm = found["all tokens alike"] - found["weights alone"]
    taken = (found["all tokens alike"] - found["first token apart"]) / harm if harm > 0 else math.nan
    title = f"W{config.bits}A{config.activation_bits}"
    return {
        "tables": {
            "Layers where the first token stands out most": table,
            "Inputs by kind of layer": kinds,
            f"Perplexity on {n} windows, {title}": [
                {"inputs": name, "perplexity": round(value, 3)} for name, value in found.items()
            ],
        },
        "evidence": {
            "claim": METHOD.claim,
            "paper": f"{METHOD.headline.value} {METHOD.headline.metric} ({METHOD.headline.setting})",
            "metric": f"perplexity on the first {n} windows of 512 tokens of WikiText-2's test text",
            "setting": f"SmolLM2-135M-Instruct, {title}, inputs per tensor (simulated), rows begin with the first "
            f"token; float32 {found['float32']:.2f}, weights alone {found['weights alone']:.2f}",
            "method": "bos_aware",
            "ours": round(found["first token apart"], 3),
            "ours_sd": round(found["first token apart"] * statistics.stdev(apart) / math.sqrt(n), 3),
            "n": n,
            "baseline_name": "all tokens alike",
            "baseline": round(found["all tokens alike"], 3),
            "baseline_sd": round(found["all tokens alike"] * statistics.stdev(alike) / math.sqrt(n), 3),
            "reproduced": bool(taken > 0.5 and statistics.mean(gain) > 2 * error),
            "note": "Standard errors over windows. Reproduced means that more than half of the harm is taken away: "
            f"{taken:.2f}; gain {statistics.mean(gain):.4f} +- {error:.4f} nats a token, paired.",
        },
    }
