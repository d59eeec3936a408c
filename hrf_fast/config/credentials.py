"""Credentials: what a page, a log or a service for others should not show of a configuration."""

from __future__ import annotations

import re
from dataclasses import asdict, is_dataclass
from typing import Any

_SECRET = frozenset(
    [
        "token",
        "secret",
        "secrets",
        "password",
        "passwords",
        "passwd",
        "pwd",
        "credential",
        "credentials",
        "cookie",
        "cookies",
        "key",
        "keys",
        "apikey",
        "auth",
        "authorization",
        "bearer",
        "signature",
        "sig",
    ]
)
_PARAMETER = re.compile(r"([?&;#])([\w.-]+)=[^&;#\s]*")


def without_credentials(value: Any) -> Any:
    """A configuration without the options whose names say that they are secret, and addresses without such parts."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: without_credentials(v) for k, v in value.items() if not _is_secret(str(k))}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return _without_parts(value) if isinstance(value, str) else value


def _is_secret(name: str) -> bool:
    """Whether a word of a name such as api_key, X-Api-Key or accessToken is one for a secret."""
    words = re.split(r"[^a-zA-Z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name)
    return any(word.lower() in _SECRET for word in words)


def _without_parts(text: str) -> str:
    """A text whose addresses have neither a login nor a value of a secret parameter."""
    text = re.sub(r"(\w://)[^/@\s]+@", r"\1", text)
    return _PARAMETER.sub(lambda match: f"{match[1]}{match[2]}=" if _is_secret(match[2]) else match[0], text)
