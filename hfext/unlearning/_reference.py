"""The frozen model that an objective compares with, at the least cost.

| mode | for | extra parameters |
|---|---|---|
| `disable` | an adapter that is fresh: the base model is the reference | 0 |
| `adapter` | an adapter that was trained: a frozen copy of it, under the name `reference` | one adapter |
| `precompute` | objectives that need likelihoods of whole rows only | 8 bytes a row |
| `copy` | everything else | one model |

`auto` takes the first that is right. Disabling an adapter that was trained would give a base model that never learnt
the forget rows, and is refused.
"""

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ._data import PairedDataset, collate
from ._objective import Objective, scored

logger = logging.get_logger(__name__)
MODES = ("auto", "disable", "adapter", "precompute", "copy")
ADAPTER = "reference"


def is_peft(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_fresh(model: nn.Module) -> bool:
    """Whether the active adapters change nothing yet: every LoRA B is zero, and nothing else is an adapter's."""
    names = model.active_adapters
    found = []
    for name, parameter in model.named_parameters():
        if any(part in names for part in name.split(".")):
            if "lora_A" in name or "lora_embedding_A" in name:
                continue
            if "lora_B" not in name and "lora_embedding_B" not in name:
                return False
            found.append(not parameter.detach().any())
    return bool(found) and all(found)


def moves_base(model: nn.Module) -> bool:
    """Whether training changes weights that belong to no adapter, such as biases, which disabling does not undo."""
    names = model.active_adapters
    return any(
        p.requires_grad and not any(part in names for part in key.split(".")) for key, p in model.named_parameters()
    )


def chosen_mode(mode: str, model: nn.Module, objective: Objective, given: nn.Module | None) -> str:
    """What `auto` means for a model and an objective; `ValueError` for a choice that would be wrong.

    Raises:
        ValueError: `disable` on an adapter that was trained or without one; `adapter` without one; `precompute` for an
            objective that needs more than likelihoods; a mode beside a model.
    """
    if mode not in MODES:
        raise ValueError(f"reference is {mode!r} but must be one of {', '.join(MODES)}.")
    if given is not None:
        if mode != "auto":
            raise ValueError(f"reference is {mode!r} but must be 'auto' beside ref_model.")
        if given is model:
            raise ValueError("ref_model is the model that is trained: pass a copy, or leave it out.")
        return "given"
    likelihoods = set(objective.reference.values()) <= {"nll"}
    if is_peft(model):
        if ADAPTER in model.peft_config:
            raise ValueError(f"The model has an adapter called {ADAPTER!r}, a name that is used here: rename it.")
        fresh = is_fresh(model)
        if moves_base(model):
            if mode in ("disable", "adapter"):
                raise ValueError(
                    f"reference is {mode!r}, but weights outside of the adapter are trained too (bias, or base "
                    "weights that require gradients): use 'precompute' or 'copy'."
                )
            if mode == "auto":
                return "precompute" if likelihoods else "copy"
        if mode == "disable" and not fresh:
            raise ValueError(
                "reference is 'disable', but the adapter was trained: without it the model never learnt the forget "
                "rows. Use reference='adapter', which keeps a frozen copy of it."
            )
        if mode == "auto":
            return "disable" if fresh else "adapter"
    elif mode in ("disable", "adapter"):
        raise ValueError(f"reference is {mode!r}, but the model has no adapter of PEFT: use 'copy' or 'precompute'.")
    if mode == "precompute" and not likelihoods:
        raise ValueError(
            f"reference is 'precompute', but {type(objective).__name__} needs whole distributions: use 'copy'."
        )
    if mode == "auto":
        return "precompute" if likelihoods else "copy"
    return mode


class Reference:
    """Asked with a batch, says of each part what the objective names; made before any training."""

    def __init__(self, mode: str, model: nn.Module, objective: Objective, given: nn.Module | None = None):
        self.mode, self.objective = mode, objective
        self.model: nn.Module | None = None
        self.known: dict[str, Tensor] = {}
        self.adapter: dict[str, Tensor] = {}
        self.mark = ""
        if mode == "given":
            self.model = given
        elif mode == "copy":
            logger.warning_once("The reference is a second copy of the model: LoRA would need none.")
            self.model = copy.deepcopy(model)
        elif mode == "adapter":
            self.attach(model)
            self.mark = digest(self.adapter)
        if self.model is not None:
            self.model.eval().requires_grad_(False)
            self.mark = digest(self.model.state_dict())

    def attach(self, model: nn.Module) -> None:
        """Give the model its frozen adapter, the one of the first time, unless it has it."""
        if self.mode != "adapter" or ADAPTER in model.peft_config:
            return
        add_reference_adapter(model)
        own = {key: p for key, p in model.named_parameters() if ADAPTER in key.split(".")}
        for key, p in own.items():
            p.data.copy_(self.adapter.get(key, p).to(p.device))
        self.adapter = {key: p.detach().cpu().clone() for key, p in own.items()}

    def detach(self, model: nn.Module) -> None:
        """Take it away again."""
        if self.mode == "adapter" and ADAPTER in model.peft_config:
            model.delete_adapter(ADAPTER)

    def precompute(self, model: nn.Module, data: PairedDataset, batch_size: int, accelerator: Any) -> None:
        """Likelihoods of all rows once, divided among the processes; float32 sums, eval mode."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        ids = hashlib.sha256()
        for part in self.objective.reference:
            rows = self._rows(part, data)
            ids.update(repr([(row["input_ids"], row["labels"]) for row in rows]).encode())
            own = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
            found = torch.zeros(len(rows), device=accelerator.device)
            for start in range(0, len(own), batch_size):
                at = own[start : start + batch_size]
                batch = collate([{part: {"index": i, **rows[i]}} for i in at])[part]
                batch = {key: value.to(accelerator.device) for key, value in batch.items()}
                with torch.no_grad(), accelerator.autocast():
                    found[at] = scored(model, {part: batch})[part].nll.float()
            self.known[part] = accelerator.reduce(found, reduction="sum").cpu()
        self.mark = ids.hexdigest()
        for module, training in modes.items():
            module.training = training

    def _rows(self, part: str, data: PairedDataset) -> list:
        if part == "alternate":
            return [data.alternate(i) for i in range(len(data.parts["forget"]))]
        return [{k: v for k, v in row.items() if k != "alternate"} for row in data.parts[part]]

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        """What the reference says of the parts of a batch that the objective names."""
        asked = {part: batch[part] for part in self.objective.reference if part in batch}
        if not asked:
            return {}
        if self.mode == "precompute":
            return {
                part: Known(self.known[part][one["index"].cpu()].to(one["index"].device))
                for part, one in asked.items()
            }
        if self.model is not None:
            device = next(iter(asked.values()))["input_ids"].device
            if next(self.model.parameters()).device != device:
                self.model.to(device)
            return self.objective.forward(self.model, asked)
        with frozen_view(model, self.mode):
            return self.objective.forward(model, asked)

    def about(self) -> dict[str, str]:
        """Of what kind the reference is, and a digest of its weights or rows, to notice another one after a resume."""
        return {"mode": self.mode, "fingerprint": self.mark}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Known:
    """Likelihoods of rows that were computed before: `nll` [rows]."""

    def __init__(self, nll: Tensor):
        self.nll = nll


def add_reference_adapter(model: nn.Module) -> None:
    """A frozen copy of the active adapter under the name `reference`.

    Raises:
        ValueError: Several adapters are active, or one of a kind that cannot be held twice.
    """
    other = "use reference='precompute' or 'copy', or pass ref_model."
    if len(model.active_adapters) != 1:
        raise ValueError(f"{len(model.active_adapters)} adapters are active, but only one can be copied: {other}")
    (name,) = model.active_adapters
    config = copy.deepcopy(model.peft_config[name])
    if vars(config).get("target_parameters"):
        raise ValueError(f"A LoRA with target_parameters cannot be held twice: {other}")
    if vars(config).get("bias", "none") != "none":
        raise ValueError(f"A LoRA with bias={config.bias!r} cannot be held twice: {other}")
    config.inference_mode = True
    if "init_lora_weights" in vars(config):
        config.init_lora_weights = False  # others (pissa, olora) would change the base weights
    model.add_adapter(ADAPTER, config)
    own = dict(model.named_parameters())
    for key, parameter in own.items():
        if ADAPTER in key.split("."):
            source = own[f".{name}".join(key.rsplit(f".{ADAPTER}", 1))]
            parameter.data.copy_(source.data)
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        if ADAPTER in key.split("."):
            parameter.requires_grad_(False)


@contextlib.contextmanager
def frozen_view(model: nn.Module, mode: str) -> Iterator[None]:
    """Inside, a PEFT model is its reference, in eval mode; afterwards all is as before."""
    modes = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    active = list(model.active_adapters)
    model.eval()
    try:
        if mode == "disable":
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(ADAPTER)
            yield
    finally:
        if mode != "disable":
            model.set_adapter(active[0])
        for module, training in modes.items():
            module.training = training
        for parameter, grad in wanted.items():
            parameter.requires_grad_(grad)
