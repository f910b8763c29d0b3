"""The ids of licences that the Hub lists, so that a slip in one is seen before it is published."""

import difflib
from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# https://huggingface.co/docs/hub/repositories-licenses; the Hub takes others too, and shows them as unknown.
IDS = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 "
    "grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 "
    "llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 "
    "other pddl postgresql unknown unlicense wtfpl zlib"
).split()


def warn_of_licence(license: Any) -> None:
    """Warn of ids that the Hub does not list, with the nearest one; nothing is refused, as its list grows."""
    license = license.get("license") if isinstance(license, Mapping) else license
    for name in license if isinstance(license, list | tuple) else [license]:
        if not isinstance(name, str) or name.lower() in IDS:
            continue
        near = difflib.get_close_matches(name.lower(), IDS, n=1, cutoff=0.7)
        also = f" Did you mean {near[0]!r}?" if near else " For one of your own say {'license': 'other', ...}."
        logger.warning(f"license is {name!r}, which the Hub does not list.{also}")
