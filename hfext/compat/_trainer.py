"""Private parts of the Trainer, its arguments and its optimizer tables."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.state
import accelerate.utils.dataclasses
import torch
import transformers.trainer_pt_utils
import transformers.trainer_utils
import transformers.training_args
from transformers import Trainer, TrainingArguments, optimization, trainer_optimizer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames


def add_enum_member(enum: type, value: str) -> Any:
    """Make `enum(value)` valid. Returns the member; a stock member of that value is refused."""
    if value in enum._value2member_map_:
        member = enum._value2member_map_[value]
        if not getattr(member, "_hfext_", False):
            raise ValueError(f"{enum.__name__} already has {value!r}; the name belongs to {enum.__module__}.")
        return member
    name = value.upper()
    member = str.__new__(enum, value)
    member._name_, member._value_, member.__objclass__ = name, value, enum
    member._sort_order_ = len(enum._member_names_)
    member._hfext_ = True
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    # Python 3.12 keeps the values that can be hashed in a list of their own.
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.append(value)
    type.__setattr__(enum, name, member)
    return member


def register_optimizer(name: str, handler: Callable) -> None:
    """Make `TrainingArguments(optim=name)` valid; `handler(context) -> (class or factory, kwargs)`."""
    trainer_optimizer._OPTIMIZER_HANDLERS[add_enum_member(OptimizerNames, name)] = handler


_SCHEDULE_CHECKS: dict[str, Callable[[TrainingArguments], None]] = {}


def register_scheduler(name: str, factory: Callable, check: Callable[[TrainingArguments], None]) -> None:
    """Make `TrainingArguments(lr_scheduler_type=name)` valid: `check(args)` runs when such arguments are made, and
    `factory(optimizer, num_warmup_steps=, num_training_steps=, **lr_scheduler_kwargs)` when training begins."""
    optimization.TYPE_TO_SCHEDULER_FUNCTION[add_enum_member(SchedulerType, name)] = factory
    _SCHEDULE_CHECKS[name] = check
    original = TrainingArguments.__post_init__
    if hasattr(original, "_hfext_schedules"):
        return

    @functools.wraps(original)
    def post_init(self):
        original(self)
        if self.lr_scheduler_type in _SCHEDULE_CHECKS:
            _SCHEDULE_CHECKS[self.lr_scheduler_type](self)

    post_init._hfext_schedules = True
    TrainingArguments.__post_init__ = post_init


class _Noted(dict):
    """A dict that notes which keys were looked up: a stock handler ignores what it does not know."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = set()

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def pop(self, key, *default):
        self.seen.add(key)
        return super().pop(key, *default)

    def __contains__(self, key):
        self.seen.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)


def stock_optimizer(context: Any, name: str, optim_args: dict[str, str]) -> tuple[Any, dict[str, Any], set[str]]:
    """What the stock handler of `name` returns for `context`, and the keys of `optim_args` that it looked up."""
    args = copy.copy(context.args)
    args.optim = OptimizerNames(name)
    noted = _Noted(optim_args)
    context = dataclasses.replace(
        context,
        args=args,
        optimizer_kwargs=dict(context.optimizer_kwargs),
        adam_kwargs=dict(context.adam_kwargs),
        optim_args=noted,
    )
    cls, kwargs = trainer_optimizer._OPTIMIZER_HANDLERS[args.optim](context)
    return cls, kwargs, noted.seen


def patch_method(cls: type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace `cls.name` by `wrapper(original)`, once."""
    original = cls.__dict__[name]
    if not hasattr(original, "_hfext_original"):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped._hfext_original = original
        setattr(cls, name, wrapped)


@contextlib.contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[Any]:
    """Inside, `instance.name` is `value`; afterwards the instance is as it was."""
    own = vars(instance)
    had, old = name in own, own.get(name)
    setattr(instance, name, value)
    try:
        yield value
    finally:
        if had:
            setattr(instance, name, old)
        else:
            delattr(instance, name)


def two_pass_optimizer(trainer: Trainer) -> Any | None:
    """The two-pass optimizer of a Trainer, below accelerate's wrapper, or None."""
    return _optimizer_with(trainer, "hfext_two_pass")


def zeroth_order_optimizer(trainer: Trainer) -> Any | None:
    """The zeroth-order optimizer of a Trainer, below accelerate's wrapper, or None."""
    return _optimizer_with(trainer, "hfext_zeroth_order")


def _optimizer_with(trainer: Trainer, flag: str) -> Any | None:
    optimizer = getattr(trainer, "optimizer", None)
    while optimizer is not None and not getattr(optimizer, flag, False):
        optimizer = vars(optimizer).get("optimizer")
    return optimizer


@contextlib.contextmanager
def without_data_parallel(trainer: Trainer, place: bool) -> Iterator[None]:
    """Inside, accelerate gives the model mixed precision but no DistributedDataParallel; `place` also moves it."""
    prepare = trainer.accelerator.prepare_model

    def prepare_model(model, device_placement=None, evaluation_mode=False):
        return prepare(model, device_placement=device_placement if place else False, evaluation_mode=True)

    with replaced(trainer.accelerator, "prepare_model", prepare_model):
        yield


def plain_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer that makes the step, below accelerate's wrapper and a second pass."""
    two_pass = two_pass_optimizer(trainer)
    if two_pass is not None:
        return two_pass.base
    return vars(trainer.optimizer).get("optimizer", trainer.optimizer)


# What TRL's trainers count in `compute_loss`, which a second evaluation of the same batch must not count again.
_COUNTERS = ("_metrics", "_total_train_tokens")


@contextlib.contextmanager
def counters_kept(trainer: Trainer) -> Iterator[None]:
    """Metrics that a Trainer subclass gathers in `compute_loss` are as before afterwards."""
    saved = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTERS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(saved)


def train_batch_size(trainer: Trainer) -> int:
    """Rows of a batch on one process, which `auto_find_batch_size` makes smaller."""
    return trainer._train_batch_size


def loss_is_scaled(trainer: Trainer, num_items: Any) -> bool:
    """Whether `compute_loss` has divided by the items of the whole update, as `Trainer.training_step` decides it."""
    explicit = getattr(trainer, "loss_is_scaled_for_ga", None)
    if explicit is not None:
        return explicit
    return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None


def loss_shifts_labels(trainer: Trainer) -> bool:
    """Whether position i of the logits predicts label i+1.

    The Trainer's own answer, and yes for language models such as GPT-2 whose class names no loss: they take the
    default, which shifts, and the Trainer says no.
    """
    if trainer._loss_shifts_labels:
        return True
    encodes = getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False)
    return not encodes and getattr(trainer.model, "loss_function", None) is ForCausalLMLoss


def undivided_modules(model: torch.nn.Module) -> set[str]:
    """Class names of the layers that a transformers model wants on one device, its adapters and parts included."""
    return {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}


def was_loaded(model: torch.nn.Module) -> bool:
    """Whether `from_pretrained` filled any parameter: transformers marks those."""
    return any(vars(p).get("_is_hf_initialized") for p in model.parameters())


def quantized_weights_only(model: torch.nn.Module) -> bool:
    """Whether a model's weights are quantised, have no adapters, and its quantiser lets no gradient reach them."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(model, "_hf_peft_config_loaded", False):
        return False
    return bool(getattr(model, "is_quantized", False)) and not quantizer.is_qat_trainable


def decayed_parameters(model: torch.nn.Module) -> set[str]:
    """Names of the parameters to which a Trainer gives weight decay. The method reads nothing of the Trainer."""
    return set(Trainer.get_decay_parameter_names(None, model))


def keep_column(trainer: Trainer, column: str) -> None:
    """Keep a dataset column that the model's forward does not name."""
    trainer._set_signature_columns_if_needed()
    if column not in trainer._signature_columns:
        trainer._signature_columns = [*trainer._signature_columns, column]


def read_training_args(path: Any) -> dict[str, Any]:
    """The fields of a `training_args.bin`, which is a pickle: only the kinds that the Trainer writes are let in."""
    allowed = [TrainingArguments, OptimizerNames]
    owners = [transformers.trainer_utils, transformers.trainer_pt_utils, transformers.training_args]
    for module in (*owners, accelerate.state, accelerate.utils.dataclasses):
        allowed += [
            kind
            for name, kind in vars(module).items()
            if isinstance(kind, type) and (name.endswith(("Strategy", "Config", "Type", "State")))
        ]
    with torch.serialization.safe_globals(allowed):
        args = torch.load(path, weights_only=True, map_location="cpu")
    return {field.name: getattr(args, field.name, None) for field in dataclasses.fields(args) if field.init}


class CheckpointMixin:
    """A Trainer whose checkpoints hold more. `save_more` runs in every process, `load_more` after the model's load."""

    def save_more(self, folder: str) -> None:
        """Write into the folder of a checkpoint; ends with `super().save_more(folder)`."""

    def load_more(self, folder: str) -> None:
        """Read it back; ends with `super().load_more(folder)`."""

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self.save_more(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_more(checkpoint)


def read_items(dataset: Any, indices: list[int]) -> list[Any]:
    """Items of a map-style dataset, by its own batched read where it has one, as torch's loader reads them."""
    read = getattr(dataset, "__getitems__", None)
    return read(indices) if read else [dataset[i] for i in indices]
