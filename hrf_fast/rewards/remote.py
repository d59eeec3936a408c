"""The reward `remote`: asks a server over HTTP, such as `hrf serve-reward` (serve.py) or one of your own.

A request is a POST whose body is one safetensors file: the tensor `images` [B, 3, H, W], fp32 in [0, 1] or uint8, and
in its header's metadata `prompts` and `metadata` as JSON (a list of B texts or null; a list of B mappings). The answer
is JSON: {"rewards": [B numbers], "dtype": "float32"} (the default, or float64), or {"error": text} with an HTTP status
of 400 or more. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load, save
from torch import Tensor

from hrf_fast.config.credentials import without_credentials
from hrf_fast.registry import check_count
from hrf_fast.rewards.registry import OPTION_PREFIX, NotFiniteError, RewardError, register_reward

# wait before the second attempt in seconds, which doubles up to the second number
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
# statuses of a server that is busy or being started
BUSY = (429, 502, 503, 504)
# of an answer; a reward takes some 20
BYTES_PER_REWARD, LEAST_ANSWER = 200, 65_536
# status of a reward that is not finite, so that a run may skip the group
NOT_FINITE = 422


@register_reward("remote", needs="a server that answers, see `hrf serve-reward`")
def remote(
    url: str,
    images: str = "fp32",
    batch_size: int = 64,
    attempts: int = 8,
    deadline: float = 300.0,
    *,
    option_prefix: str = OPTION_PREFIX,
) -> Any:
    """The reward of a server over HTTP, for a network that needs a machine or packages of its own.

    Args:
        url: such as http://127.0.0.1:8000.
        images: fp32, exact, or uint8, a quarter of the bytes.
        batch_size: images of a request.
        attempts: requests before a server that is down or busy is given up.
        deadline: seconds for a request with all its attempts.
    """
    _check_url(f"{option_prefix}url", url)
    if images not in ("fp32", "uint8"):
        raise ValueError(f"{option_prefix}images is {images!r}; use fp32 or uint8")
    check_count(f"{option_prefix}batch_size", batch_size)
    check_count(f"{option_prefix}attempts", attempts)
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not 0 < deadline < math.inf:
        raise ValueError(f"{option_prefix}deadline is {deadline!r}; use a finite number of seconds above 0")
    server = _Server(url, attempts, deadline, option_prefix)

    def reward(
        pictures: Tensor, prompts: Sequence[str] | None = None, metadata: Sequence[Mapping[str, Any]] = ()
    ) -> Tensor:
        answers = []
        for start in range(0, len(pictures), batch_size):
            rows = slice(start, start + batch_size)
            body = pack(pictures[rows], prompts and prompts[rows], metadata[rows], as_bytes=images == "uint8")
            count = len(pictures[rows])
            reply = server.ask(body, max(LEAST_ANSWER, BYTES_PER_REWARD * count))
            answers.append(server.numbers(reply, count))
        return torch.cat(answers)

    return reward


def _check_url(option: str, url: Any) -> None:
    try:
        address = urlsplit(url)
        # a port out of range fails when it is read
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except (ValueError, AttributeError, TypeError):
        valid = False
    if not valid:
        raise ValueError(f"{option} is {without_credentials(url)!r}; write it as http://host:port")
    if address.username is not None:
        raise ValueError(
            f"{option} {without_credentials(url)} has a user and a password, which no request would send; leave them "
            "out, and let a proxy of yours add what the server asks for"
        )


def pack(
    images: Tensor, prompts: Sequence[str] | None, metadata: Sequence[Mapping[str, Any]], *, as_bytes: bool
) -> bytes:
    """The body of a request."""
    images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8) if as_bytes else images.float()
    texts = {
        "prompts": json.dumps(prompts and list(prompts)),
        "metadata": json.dumps([dict(item) for item in metadata]),
    }
    return save({"images": images.cpu().contiguous()}, texts)


def unpack(body: bytes) -> tuple[Tensor, list[str] | None, list[dict[str, Any]]]:
    """Images fp32 [B, 3, H, W], prompts and metadata of a request's body.

    Raises:
        ValueError: another body.
    """
    try:
        tensors = load(body)
        length = int.from_bytes(body[:8], "little")
        texts = json.loads(body[8 : 8 + length]).get("__metadata__") or {}
        prompts, metadata = json.loads(texts.get("prompts", "null")), json.loads(texts.get("metadata", "[]"))
    # of safetensors, json and their contents
    except Exception as error:
        raise ValueError(f"the body is no safetensors file with JSON in its metadata ({error})") from error
    images = tensors.get("images")
    if images is None or images.dtype not in (torch.uint8, torch.float32):
        raise ValueError("the body has no tensor `images` of uint8 or float32")
    if images.dim() != 4:
        raise ValueError(f"`images` has the shape {list(images.shape)}; send [B, 3, H, W]")
    if prompts is not None and not (isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)):
        raise ValueError("`prompts` is no list of texts and not null")
    if not (isinstance(metadata, list) and all(isinstance(item, dict) for item in metadata)):
        raise ValueError("`metadata` is no list of mappings")
    return (images.float() / 255 if images.dtype == torch.uint8 else images), prompts, metadata


@dataclass(frozen=True)
class _Server:
    """A server, and how long it is asked."""

    url: str
    attempts: int
    deadline: float
    """Seconds for a request with all its attempts."""
    option_prefix: str
    """Beginning of the options that set the fields above, for errors."""

    @property
    def _name(self) -> str:
        # a query may be a credential
        return f"{self.option_prefix}url {self.url.partition('?')[0]}"

    def ask(self, body: bytes, limit: int) -> bytes:
        """The answer to a request, asked again while the server is down or busy.

        Args:
            limit: bytes of the longest answer that is read.

        Raises:
            NotFiniteError: the server's reward is not finite.
            RewardError: the last attempt failed, the deadline has passed, or the server refuses the request.
        """
        end, wait, problem = time.monotonic() + self.deadline, FIRST_WAIT, ""
        for attempt in range(1, self.attempts + 1):
            try:
                status, reply = _post(self.url, body, end, limit)
            except (OSError, HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return reply
                problem = f"HTTP {status}: {_reason(reply)}"
                if status == NOT_FINITE:
                    raise NotFiniteError(f"{self._name}: {_reason(reply)}")
                if status not in BUSY:
                    raise RewardError(f"{self._name} refused the request with {problem}")
            left = end - time.monotonic()
            if left <= wait:
                raise RewardError(
                    f"{self._name} gave no answer within {self.option_prefix}deadline {self.deadline:g} s ({attempt} "
                    f"attempts; last: {problem}); look at the server, raise the deadline or lower "
                    f"{self.option_prefix}batch_size"
                )
            if attempt < self.attempts:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        raise RewardError(f"{self._name} failed {self.attempts} times, last with {problem}; is the server running?")

    def numbers(self, reply: bytes, count: int) -> Tensor:
        """The rewards of an answer, [count]; NaN where the server says null.

        Raises:
            RewardError: not JSON of this form, or of another count.
        """
        try:
            answer = json.loads(reply)
            rewards, dtype = answer["rewards"], {"float32": torch.float32, "float64": torch.float64}
            kind = dtype[answer.get("dtype", "float32")]
            if not isinstance(rewards, list):
                raise TypeError("`rewards` is no list")
            values = [math.nan if value is None else float(value) for value in rewards]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RewardError(
                f'{self._name} answered {reply[:80]!r}, which is not {{"rewards": [numbers]}} as JSON '
                f"({type(error).__name__}: {error}); ask a server such as `hrf serve-reward`"
            ) from error
        if len(values) != count:
            raise RewardError(f"{self._name} answered {len(values)} rewards for {count} images; it must give one each")
        return torch.tensor(values, dtype=kind)


def _post(url: str, body: bytes, end: float, limit: int) -> tuple[int, bytes]:
    """Status and body of one request's answer, before `end`.

    Raises:
        OSError, HTTPException: no connection, or no whole answer of at most `limit` bytes in time.
    """
    address = urlsplit(url)
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    left = max(0.001, end - time.monotonic())
    connection = kind(str(address.hostname), address.port, timeout=left)
    connection.connect()
    # a timeout of the socket begins anew with every byte
    timer = threading.Timer(max(0.0, end - time.monotonic()), _shut, [connection.sock])
    timer.daemon = True
    timer.start()
    try:
        path = (address.path or "/") + (f"?{address.query}" if address.query else "")
        connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        reply = response.read(limit + 1)
        if time.monotonic() >= end:
            # what was cut off may look like an answer
            raise TimeoutError
        if len(reply) > limit:
            raise HTTPException(f"an answer of more than {limit} bytes")
        return response.status, reply
    except (OSError, HTTPException) as error:
        if time.monotonic() < end:
            raise
        # the timer has broken the connection off, not the server
        raise TimeoutError("the answer did not end in time") from error
    finally:
        timer.cancel()
        connection.close()


def _shut(connection: Any) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _reason(reply: bytes) -> str:
    """The server's own words."""
    text = reply.decode("utf-8", "replace")
    with suppress(ValueError, TypeError, KeyError):
        text = str(json.loads(reply)["error"])
    return " ".join(text.split())[:500] or "no reason given"
