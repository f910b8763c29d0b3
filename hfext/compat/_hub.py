"""Private parts of huggingface_hub."""

import huggingface_hub.utils._http as client
from huggingface_hub.errors import HfHubHTTPError


def hub_failures() -> tuple[type[Exception], ...]:
    """What its calls raise when the Hub says no or cannot be reached; the HTTP library below differs by version."""
    library = getattr(client, "httpx2", None) or getattr(client, "httpx", None)
    return (HfHubHTTPError, OSError, RuntimeError, *((library.HTTPError,) if library else ()))
