"""The licence of an artifact: what its base's card says, with the terms of a restricted base; never a guess.

It is looked for in this order: what the user says, the card in the folder the base was loaded from, the Hub, the card
in the cache of `huggingface_hub` where the Hub could not be asked. What a restricted base asks of its readers is kept
also beside a licence that the user states. Where none says one, it is `unknown`, which the Hub knows as a licence.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..compat import hub_failures
from ._fetch import patient, reason

logger = logging.get_logger(__name__)

UNKNOWN = "unknown"
TERMS = "extra_gated_"  # fields of a card: what a restricted repository asks of its readers

_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def licence_of(
    base_model: str | None,
    given: str | Mapping[str, Any] | None = None,
    base_folder: str | Path | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """`license`, and as far as they are known `license_name`, `license_link`, `gated` and the terms of the base.

    Args:
        base_model (`str`, *optional*): Hub id of the base.
        given (`str` or mapping, *optional*): The licence as its owner says it, which is then not looked for.
        base_folder (`str` or `Path`, *optional*): A folder of the base with its `README.md`.
        token (*optional*): As in `huggingface_hub`.

    Raises:
        `ValueError`: `given` is no licence.
        `OSError`: The Hub was asked and did not answer: a licence must not be unknown for that reason.
    """
    if given is not None:
        found = _read({"license": given} if isinstance(given, str) else given, base_model, "its owner")
        if found is None:
            raise ValueError(f"license is {given!r} but must be an id such as 'apache-2.0', or a mapping with one.")
        if isinstance(given, Mapping) and isinstance(given.get("license_source"), str):
            found["license_source"] = given["license_source"]
        # Whoever may choose a licence may not take back what the base asks of its readers.
        return {**_terms(_of_base(base_model, base_folder, token, patiently=False)), **found}
    return _of_base(base_model, base_folder, token)


def _of_base(
    base_model: str | None, base_folder: str | Path | None, token: str | bool | None, patiently: bool = True
) -> dict[str, Any]:
    """What is known of a base. When the Hub does not answer, this is an error, or (not `patiently`) is said."""
    beside: dict[str, Any] = {}
    if base_folder is not None and (Path(base_folder) / "README.md").is_file():
        card = _metadata(Path(base_folder) / "README.md")
        found, beside = _read(card, base_model, "the card beside the base"), _terms(card)
        if found is not None:
            return found
    if base_model is None:
        return {"license": UNKNOWN, **beside}
    try:
        found = _on_hub(base_model, token)
    except OSError as error:
        if patiently:
            raise
        logger.warning(f"{error} If it asks something of its readers, the card must say so.")
        found = None
    # The card in the cache may be an old one: it counts where the Hub could not be asked.
    return {**beside, **(found or _in_cache(base_model) or {"license": UNKNOWN})}


def _terms(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a restricted repository asks of its readers."""
    found = {"gated": str(card["gated"]).lower()} if card.get("gated") else {}
    return found | {key: value for key, value in card.items() if str(key).startswith(TERMS) and value is not None}


def is_on_hub(base_model: str, token: str | bool | None = None) -> bool:
    """Whether a name that a config gives is that of a repository: it may be that of a folder which is gone."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        return patient(lambda: HfApi(token=token).repo_exists(base_model))
    except hub_failures() as error:
        raise OSError(f"The base {base_model} could not be looked up: {reason(error)} Try again.") from error


def check_licence(about: Any) -> None:
    """`ValueError` unless a record's `license` is what `licence_of` makes."""
    if about is not None and (not isinstance(about, Mapping) or _read(about, None, "") is None):
        raise ValueError(f"license is {about!r} but must be a mapping with the id of a licence under 'license'.")


def _read(card: Mapping[str, Any], base_model: str | None, source: str) -> dict[str, Any] | None:
    """The fields of a card that bind what is made from it; None where it names no licence."""
    license = card.get("license")
    ids = license if isinstance(license, list) else [license]
    # SPDX writes Apache-2.0, the Hub apache-2.0.
    if not ids or not all(isinstance(name, str) and _ID.fullmatch(name.lower()) for name in ids):
        return None
    license = [name.lower() for name in ids] if isinstance(license, list) else license.lower()
    found = {"license": license}
    for field in ("license_name", "license_link"):
        if isinstance(card.get(field), str) and card[field].strip():
            found[field] = card[field].strip()
    link = found.get("license_link", "")
    if link and base_model and "://" not in link:
        found["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link.lstrip('./')}"
    if license == "other":
        found.setdefault("license_name", UNKNOWN)
    return found | _terms(card) | ({"license_source": source} if source else {})


def _metadata(path: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path)
    except Exception:  # a card whose YAML cannot be read says nothing; PyYAML's errors have no common base with ours
        return {}
    return found if isinstance(found, Mapping) else {}


def _on_hub(base_model: str, token: str | bool | None) -> dict[str, Any] | None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = patient(lambda: HfApi(token=token).model_info(base_model, timeout=30))
    except (RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled):
        return None
    except hub_failures() as error:
        raise OSError(
            f"The licence of {base_model} could not be read: {reason(error)} Try again, or pass license=."
        ) from error
    card = {} if info.card_data is None else info.card_data.to_dict()
    gated = {"gated": info.gated} if info.gated else {}
    card = {**card, **gated}
    return _read(card, base_model, "the base's card on the Hub") or {"license": UNKNOWN, **_terms(card)}


def _in_cache(base_model: str) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(base_model, "README.md")
    except HFValidationError:
        return None
    if not isinstance(path, str | os.PathLike):
        return None
    card = _metadata(Path(path))
    return _read(card, base_model, "the base's card") or {"license": UNKNOWN, **_terms(card)}
