"""Credentials: what a page, a log or a service for others must not hold of a configuration."""

from __future__ import annotations

import re
from typing import Any

_NAMES = "(token|secret|password|passwd|credentials?|key|apikey|auth)"
# options of a user's reward, and parts of an address
_CREDENTIAL = re.compile(rf"(^|_){_NAMES}(_|$)", re.IGNORECASE)
_IN_QUERY = re.compile(rf"([?&](?:[\w-]*[_-])?{_NAMES}(?:[_-][\w-]*)?=)[^&#\s]*", re.IGNORECASE)


def without_credentials(value: Any) -> Any:
    """A configuration without the options whose names say that they are secret, and addresses without such parts."""
    if isinstance(value, dict):
        return {k: without_credentials(v) for k, v in value.items() if not _CREDENTIAL.search(str(k))}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return _IN_QUERY.sub(r"\1", re.sub(r"(\w://)[^/@\s]+@", r"\1", value)) if isinstance(value, str) else value
