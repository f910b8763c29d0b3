"""Binds the records of this family to `TrainingArguments(optim=...)`."""

import importlib
import inspect
import json
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_optimizer import OptimizerContext, is_optimizer_factory
from transformers.training_args import OptimizerNames

from .. import compat
from ..registry import Method, suggest
from . import _args, _driver, _zeroth_driver

# Keys by which a stock handler replaces the parameter groups; the Trainer must see them beside our own.
_GROUP_KEYS = ("params", "model", "optimizer_dict")
_TWO_PASS: dict[str, type] = {}
_ONE_PASS: dict[str, type] = {}


class _Built(torch.optim.Optimizer):
    """What the Trainer is given: a class that it calls with parameter groups and that makes the wrapped optimizer."""

    def __new__(cls, params, *, hfext_method, hfext_base, hfext_model, hfext_options, **base_kwargs):
        if is_optimizer_factory(hfext_base):
            base = hfext_base()(hfext_model, **base_kwargs)
        else:
            base = hfext_base(params, **base_kwargs)
        return hfext_method(base, model=hfext_model, **hfext_options)


def check_arguments(args: TrainingArguments) -> None:
    """Refuse bad `optim_args` when the arguments are made, not when training starts."""
    if args.optim in _ONE_PASS:
        _args.typed(_args.split(args.optim_args), _ONE_PASS[args.optim].Config)
        _ONE_PASS[args.optim].check_arguments(args)
    method = _TWO_PASS.get(args.optim)
    if method is None:
        return
    _config, base, _ = _args.parse(args.optim_args, method.Config)
    _stock_base(base)
    if args.deepspeed is not None:
        raise NotImplementedError(
            f"optim={args.optim.value!r} does not run with DeepSpeed, which partitions gradients during the backward "
            "pass. Use DistributedDataParallel or one process."
        )
    if args.fsdp:
        raise NotImplementedError(
            f"optim={args.optim.value!r} does not run with FSDP yet: the second pass was not shown to be exact on "
            "sharded parameters. Use DistributedDataParallel or one process."
        )


def _stock_base(name: str) -> str:
    own = [*_TWO_PASS, *_zeroth_driver.CLASSES]
    return _args.base_name(name, [member.value for member in OptimizerNames], own)


def handler(method: type):
    def handle(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
        config, base, base_options = _args.parse(context.args.optim_args, method.Config)
        name = _stock_base(base)
        try:
            cls, kwargs, read = compat.stock_optimizer(context, name, base_options)
        except ValueError as error:
            given = ", ".join(f"base.{key}={text}" for key, text in base_options.items())
            raise ValueError(f"optim_args: base={name!r} with {given or 'no options'}: {error}") from error
        accepted = set() if is_optimizer_factory(cls) else set(inspect.signature(cls.__init__).parameters)
        for key, text in base_options.items():
            if key in read and key in kwargs:
                continue
            if key in accepted - {"self", "params"}:
                kwargs[key] = _args.yaml_value(text)
            elif key not in read:
                known = sorted(accepted - {"self", "params"})
                raise ValueError(f"optim_args: {name} has no option {key!r}. {suggest(key, known)}")
        kwargs |= {"hfext_method": method, "hfext_base": cls, "hfext_model": context.model}
        kwargs["hfext_options"] = {name: getattr(config, name) for name in config.__dataclass_fields__}
        kwargs |= method.trainer_kwargs(context, name, config)
        return _Built, kwargs

    return handle


def one_pass_handler(method: type):
    """A class with `Config`, `check_arguments(args)` and `trainer_kwargs(context, config)`, and its options."""

    def handle(context: OptimizerContext) -> tuple[Any, dict[str, Any]]:
        # As a base of a two-pass optimizer it reads the options behind `base.`, else those of the arguments.
        config = _args.typed(context.optim_args, method.Config)
        kwargs = {"lr": context.args.learning_rate, **method.trainer_kwargs(context, config)}
        return method, kwargs | {name: getattr(config, name) for name in config.__dataclass_fields__}

    return handle


def install(methods: list[Method]) -> None:
    """Register every optimizer of `methods` by name and patch the Trainer; idempotent."""
    for method in methods:
        target = getattr(importlib.import_module(method.target.partition(":")[0]), method.target.partition(":")[2])
        if getattr(target, "hfext_two_pass", False):
            _TWO_PASS[method.name] = target
            compat.register_optimizer(method.name, handler(target))
        elif getattr(target, "hfext_one_pass", False):
            _ONE_PASS[method.name] = target
            compat.register_optimizer(method.name, one_pass_handler(target))
            if getattr(target, "hfext_zeroth_order", False):
                _zeroth_driver.CLASSES[method.name] = target
    _driver.install()

    def checked(original):
        def post_init(self):
            original(self)
            check_arguments(self)

        return post_init

    def checked_set(original):
        def set_optimizer(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            check_arguments(self)
            return result

        return set_optimizer

    compat.patch_method(TrainingArguments, "__post_init__", checked)
    compat.patch_method(TrainingArguments, "set_optimizer", checked_set)


def portable_training_args(path: str) -> dict[str, Any]:
    """The fields of a checkpoint's `training_args.bin` as JSON types.

    The file is a pickle that names the optimizer by value, so it loads only where `hfext` was imported. This reads it
    without running anything it holds; write the result as JSON to take it elsewhere.
    """
    fields = compat.read_training_args(path)
    return json.loads(json.dumps(fields, default=lambda x: x.to_dict() if hasattr(x, "to_dict") else str(x)))
