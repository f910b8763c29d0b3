"""Private parts of huggingface_hub, and of how a Trainer publishes."""

import json

import huggingface_hub.utils._http as client
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.utils.hub import PushInProgress


def hub_failures() -> tuple[type[Exception], ...]:
    """What its calls raise when the Hub says no or cannot be reached; the HTTP library below differs by version."""
    library = getattr(client, "httpx2", None) or getattr(client, "httpx", None)
    unreadable = (json.JSONDecodeError, UnicodeDecodeError)
    return (HfHubHTTPError, OSError, RuntimeError, *unreadable, *((library.HTTPError,) if library else ()))


def pushes_of(trainer: Trainer) -> PushInProgress:
    """The uploads of a Trainer that are on their way, to which more can be added."""
    if vars(trainer).get("push_in_progress") is None:
        trainer.push_in_progress = PushInProgress([])
    return trainer.push_in_progress


def wait_for_pushes(trainer: Trainer) -> None:
    """Until none is on its way."""
    pushes_of(trainer).wait_until_done()


def line_failed(error: BaseException) -> bool:
    """Whether an error says that the line broke, and not that the Hub said no."""
    library = getattr(client, "httpx2", None) or getattr(client, "httpx", None)
    return library is not None and isinstance(error, library.TransportError)
