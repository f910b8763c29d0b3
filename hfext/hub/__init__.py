"""Artifacts: the record `hfext.json` beside saved weights, the model card made from it, and the way to the Hub."""

from . import _trainer
from ._card import TRAINING_ONLY, model_card, plots_of, problems_of
from ._fetch import fetch
from ._files import Refused, files_of
from ._kinds import kind_of
from ._licence import licence_of
from ._push import push_to_hub
from ._record import FORMAT, RECORD, RELATIONS, read_record, save_record
from ._trainer import methods_of_trainer

_trainer.install()

__all__ = [
    "FORMAT",
    "RECORD",
    "RELATIONS",
    "TRAINING_ONLY",
    "Refused",
    "fetch",
    "files_of",
    "kind_of",
    "licence_of",
    "methods_of_trainer",
    "model_card",
    "plots_of",
    "problems_of",
    "push_to_hub",
    "read_record",
    "save_record",
]
