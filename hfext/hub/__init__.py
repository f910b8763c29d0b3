"""Artifacts: the record `hfext.json` beside saved weights, the model card made from it, and the way to the Hub."""

from ._card import TRAINING_ONLY, model_card
from ._fetch import fetch
from ._files import Refused, files_of
from ._push import push_to_hub
from ._record import FORMAT, RECORD, RELATIONS, read_record, save_record

__all__ = [
    "FORMAT",
    "RECORD",
    "RELATIONS",
    "TRAINING_ONLY",
    "Refused",
    "fetch",
    "files_of",
    "model_card",
    "push_to_hub",
    "read_record",
    "save_record",
]
