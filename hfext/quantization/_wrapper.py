"""Methods that add something to another quantiser of weights, which stands inside their config."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..compression import PartConfig
from ._affine import Quantized
from ._config import WeightConfig

OWNED = tuple(f.name for f in dataclasses.fields(WeightConfig))


@dataclass(kw_only=True, repr=False)
class WrapperConfig(WeightConfig):
    """Base of configs around `quantizer`: bits, groups, data and the like are those of the config inside.

    Args:
        quantizer (`WeightConfig` or `dict`): The quantiser that the method adds to.

    Raises:
        ValueError: An option of the config inside was given to this one, or `quantizer` is none of ours.
    """

    apart: ClassVar[tuple[str, ...]] = ("quantizer",)
    quantizer: Any

    def __post_init__(self):
        if isinstance(self.quantizer, dict):
            self.quantizer = PartConfig.from_dict(self.quantizer)
        if not isinstance(self.quantizer, WeightConfig):
            raise ValueError(f"quantizer is {self.quantizer!r} but must be a config of hfext.quantization.")
        for f in dataclasses.fields(WeightConfig):
            if getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} belongs to the config inside: set it in quantizer=.")
        self._follow()
        super().__post_init__()

    def _follow(self) -> None:
        for name in OWNED:
            setattr(self, name, getattr(self.quantizer, name))

    @property
    def calibrated(self) -> bool:
        return self.quantizer.calibrated

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "quantizer":
            raise AttributeError(name)
        return getattr(self.quantizer, name)

    def to_dict(self) -> dict[str, Any]:
        own = {key: value for key, value in super().to_dict().items() if key not in OWNED}
        return {**own, "quantizer": self.quantizer.to_dict()}

    def __repr__(self) -> str:
        own = [f for f in dataclasses.fields(self) if f.name not in (*OWNED, *self.apart)]
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in own if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join([repr(self.quantizer), *changed])})"

    def layers(self, model):
        found = self.quantizer.layers(model)
        self._follow()
        return found

    def quantize_weight(self, weight: Tensor, bits: int, group_size: int) -> Quantized:
        return self.quantizer.quantize_weight(weight, bits, group_size)
