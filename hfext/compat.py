"""The one file that touches private parts of transformers, accelerate and torch.

Each function says what it reaches into. `CHECKS` lists them with the versions they were checked for; `hfext doctor`
runs the checks, and a test fails when upstream moves one. Everything here is idempotent and leaves users of stock
names with stock behaviour, bit for bit.
"""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.state
import accelerate.utils.dataclasses
import torch
import transformers.trainer_pt_utils
import transformers.trainer_utils
import transformers.training_args
from transformers import GenerationConfig, GenerationMixin, Trainer, TrainingArguments, trainer_optimizer
from transformers.training_args import OptimizerNames

CHECKED_TRANSFORMERS = "5.17 to 5.23"
CHECKED_TORCH = "2.11 to 2.13"

# ---- names in enums -------------------------------------------------------------------------------------------------


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


# ---- the Trainer ----------------------------------------------------------------------------------------------------


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
    optimizer = getattr(trainer, "optimizer", None)
    while optimizer is not None and not getattr(optimizer, "hfext_two_pass", False):
        optimizer = vars(optimizer).get("optimizer")
    return optimizer


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


def loss_is_scaled(trainer: Trainer, num_items: Any) -> bool:
    """Whether `compute_loss` has divided by the items of the whole update, as `Trainer.training_step` decides it."""
    explicit = getattr(trainer, "loss_is_scaled_for_ga", None)
    if explicit is not None:
        return explicit
    return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None


def loss_shifts_labels(trainer: Trainer) -> bool:
    """Whether position i of the logits predicts label i+1."""
    return trainer._loss_shifts_labels


def was_loaded(model: torch.nn.Module) -> bool:
    """Whether `from_pretrained` filled any parameter: transformers marks those."""
    return any(vars(p).get("_is_hf_initialized") for p in model.parameters())


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


# ---- generate -------------------------------------------------------------------------------------------------------


def let_callables_refuse(given_streamer: contextvars.ContextVar) -> None:
    """Ask a `custom_generate` callable before `generate` prepares anything.

    `generate` keeps `streamer`, `assistant_model` and `tokenizer` from a callable and puts the prompt into the
    streamer, whose reader then waits for ever. A callable with an attribute `hfext_before_generate` is called there
    with `streamer`, `assistant_model` and the other arguments, and may raise. Nobody else notices. Inside any callable
    `given_streamer` holds the streamer, for one that hides behind another function.
    """

    def wrapper(original):
        signature = inspect.signature(original)

        def extract(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            callable_ = given.get("custom_generate")
            if callable(callable_):
                given_streamer.set(given.get("streamer"))
            while isinstance(callable_, functools.partial):
                callable_ = callable_.func
            ask = getattr(callable_, "hfext_before_generate", None)
            if ask is not None:
                ask(given.get("streamer"), given.get("assistant_model"), **given.get("kwargs", {}))
            return original(self, *args, **kwargs)

        return extract

    patch_method(GenerationMixin, "_extract_generation_mode_kwargs", wrapper)


def on_logits_processors(wrapper: Callable[[Callable], Callable]) -> None:
    """Replace the method by which `generate` builds its list of processors by `wrapper(method)`, once."""
    patch_method(GenerationMixin, "_get_logits_processor", wrapper)


def given_processors(args: tuple, kwargs: dict[str, Any]) -> list:
    """The user's processors among the arguments of that method, which come behind the generation config."""
    names = list(inspect.signature(GenerationMixin._get_logits_processor).parameters)[2:]
    return list({**dict(zip(names, args, strict=False)), **kwargs}.get("logits_processor") or [])


def attention_implementation(model: torch.nn.Module) -> str:
    """Name of the attention that a model runs with."""
    return model.config.get_text_config()._attn_implementation or "eager"


def keep_unknown_fields(config: GenerationConfig) -> None:
    """A generation config made from a model's config is marked so, and drops unknown fields when it is loaded."""
    config._from_model_config = None


class _OwnCache:
    """Stands for `_prepare_cache_for_generation` on one model; copied and pickled with it."""

    def __init__(self, model: torch.nn.Module, make: Callable[[Any, Any, dict], Any]):
        self.model, self.make = model, make

    def __call__(self, generation_config, model_kwargs, *args, **kwargs):
        cache = self.make(self.model, generation_config, model_kwargs)
        if cache is not None:
            model_kwargs["past_key_values"] = cache
            return None
        stock = type(self.model)._prepare_cache_for_generation
        return stock(self.model, generation_config, model_kwargs, *args, **kwargs)


def own_cache(model: torch.nn.Module, make: Callable[[Any, Any, dict], Any] | None) -> None:
    """Let `make(model, generation_config, model_kwargs)` give `generate` its cache; `None` from it: the stock one.

    Set on the instance alone; `make=None` takes it off again.
    """
    name = "_prepare_cache_for_generation"
    if isinstance(vars(model).get(name), _OwnCache):
        del vars(model)[name]
    if make is not None:
        vars(model)[name] = _OwnCache(model, make)


# ---- torch ----------------------------------------------------------------------------------------------------------


def optimizer_hook_tables(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tables in which `torch.optim.Optimizer.register_*_hook` writes, to be shared with a wrapper."""
    return {name: table for name, table in vars(optimizer).items() if name.startswith("_optimizer_")}


def set_optimizer_mode(optimizer: torch.optim.Optimizer, train: bool) -> None:
    """`train()` or `eval()` of optimizers that have modes (schedule-free)."""
    switch = getattr(optimizer, "train" if train else "eval", None)
    if callable(switch):
        switch()


def cpu_kernels() -> tuple[Any, Any, Any]:
    """torch's CPU operators for packed weights: pack 4 bits, multiply by 4 bits, by 8. AttributeError without them."""
    aten = torch.ops.aten
    return aten._convert_weight_to_int4pack_for_cpu, aten._weight_int4pack_mm_for_cpu, aten._weight_int8pack_mm


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; without it such products are slower than fp32."""
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()


def full_tensor(x: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; other tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ---- what `hfext doctor` looks at -----------------------------------------------------------------------------------


def _has(owner: Any, *names: str) -> Callable[[], None]:
    def check():
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise RuntimeError(f"{getattr(owner, '__name__', owner)} has no {', '.join(missing)}")

    return check


CHECKS: list[tuple[str, str, Callable[[], None]]] = [
    (
        "optimizer names",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(OptimizerNames, "_value2member_map_", "_member_map_"),
    ),
    (
        "optimizer handlers",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(trainer_optimizer, "_OPTIMIZER_HANDLERS", "OptimizerContext"),
    ),
    (
        "Trainer hooks",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(
            Trainer,
            "training_step",
            "compute_loss",
            "_prepare_inputs",
            "log",
            "evaluate",
            "save_model",
            "_save_optimizer_and_scheduler",
            "_load_optimizer_and_scheduler",
            "_load_best_model",
            "_set_signature_columns_if_needed",
        ),
    ),
    (
        "TrainingArguments hooks",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(TrainingArguments, "__post_init__", "set_optimizer"),
    ),
    (
        "callables of generate",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(GenerationMixin, "_extract_generation_mode_kwargs"),
    ),
    (
        "processors of generate",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(GenerationMixin, "_get_logits_processor"),
    ),
    (
        "the cache of generate",
        f"transformers {CHECKED_TRANSFORMERS}",
        _has(GenerationMixin, "_prepare_cache_for_generation"),
    ),
    ("CPU kernels of packed weights", f"torch {CHECKED_TORCH}", cpu_kernels),
    ("optimizer hook tables", f"torch {CHECKED_TORCH}", _has(torch.optim.Optimizer, "register_step_pre_hook")),
    (
        "foreach kernels",
        f"torch {CHECKED_TORCH}",
        _has(torch, "_foreach_norm", "_foreach_add_", "_foreach_copy_", "_foreach_sub"),
    ),
]


# ---- checkpoints and data -------------------------------------------------------------------------------------------


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
