"""The rows of `weight_quality`: each makes a config for a model, a width, a group size and calibration rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import quantization as q

DRAWS, TRACE_ROWS = 4, 2


@dataclass(frozen=True)
class Row:
    """What the table calls it, its config, and the widths it is for, where these are not those of the run."""

    title: str
    make: Callable[..., q.WeightConfig]
    average: tuple[float, ...] = ()


def free(config: type[q.WeightConfig], **options: Any) -> Callable[..., q.WeightConfig]:
    """A config that needs no data."""
    return lambda model, bits, group_size, data: config(bits=bits, group_size=group_size, **options)


def calibrated(config: type[q.WeightConfig], **options: Any) -> Callable[..., q.WeightConfig]:
    """A config that gets the calibration rows."""
    return lambda model, bits, group_size, data: config(
        bits=bits, group_size=group_size, dataset=data, **{"batch_size": 1, **options}
    )


def corrected(make: Callable[..., q.WeightConfig], rank: int) -> Callable[..., q.WeightConfig]:
    """Low-rank compensation around another row."""
    return lambda **given: q.LoRCConfig(quantizer=make(**given), rank=rank)


def allocated(config: type[q.WeightConfig], **options: Any) -> Callable[..., q.WeightConfig]:
    """Bits by HAWQ-V2 from {2, 3, 4}; the traces are those of the first calibration rows."""

    def make(model, bits, group_size, data):
        chosen = q.allocate(model, data[:TRACE_ROWS], average_bits=bits, bits=(2, 3, 4), group_size=group_size,
                            max_draws=DRAWS, min_draws=DRAWS)  # fmt: skip
        return calibrated(config, **options)(model, dict(chosen), group_size, data)

    return make


LAYER = {"block_epochs": 0}
BOTH = {"clip": "group", "sweeps": 3, "block_lr": 1e-3}
METHODS: dict[str, Row] = {
    "rtn": Row("RTN, integer zero", free(q.RTNConfig, zero_point="int")),
    "rtn_float": Row("RTN, float zero", free(q.RTNConfig, zero_point="float")),
    "hqq": Row("HQQ", free(q.HQQConfig)),
    "awq": Row("AWQ", calibrated(q.AWQConfig, search_rows=4)),
    "gptq": Row("GPTQ", calibrated(q.GPTQConfig)),
    "gptq_clip": Row("GPTQ, clip search", calibrated(q.GPTQConfig, clip_search=True)),
    "decoupleq_layer": Row("decoupleQ, layer stage", calibrated(q.DecoupleQConfig, **LAYER)),
    "decoupleq": Row(
        "decoupleQ, both stages, clip by group, 3 sweeps, block lr 1e-3", calibrated(q.DecoupleQConfig, **BOTH)
    ),
    "rtn_lorc8": Row("RTN, float zero + LoRC 8", corrected(free(q.RTNConfig, zero_point="float"), 8)),
    "rtn_lorc32": Row("RTN, float zero + LoRC 32", corrected(free(q.RTNConfig, zero_point="float"), 32)),
    "decoupleq_lorc8": Row("decoupleQ, layer stage + LoRC 8", corrected(calibrated(q.DecoupleQConfig, **LAYER), 8)),
    "decoupleq_lorc32": Row("decoupleQ, layer stage + LoRC 32", corrected(calibrated(q.DecoupleQConfig, **LAYER), 32)),
    "decoupleq_mixed": Row(
        "decoupleQ, layer stage, bits by HAWQ-V2", allocated(q.DecoupleQConfig, **LAYER), (2.5, 3.0)
    ),
}
