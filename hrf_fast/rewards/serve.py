"""`hrf serve-reward`: a reward behind HTTP, for runs whose reward is `remote`; remote.py has the format.

Requests come in parallel and are rewarded one after the other. Who can reach the port can ask; listen on 127.0.0.1, or
on an interface of a network that you trust.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import yaml

from hrf_fast.devices import choose_device
from hrf_fast.prompts import Prompt
from hrf_fast.rewards.build import CombinedReward, build_reward
from hrf_fast.rewards.registry import NotFiniteError, RewardError
from hrf_fast.rewards.remote import NOT_FINITE, unpack

# seconds after which a client that sends nothing more is dropped
_STALLED = 60
_CHUNK = 1 << 20
# of a Content-Length
_DIGITS = 18


class RewardServer(ThreadingHTTPServer):
    """Serves a reward; `serve_forever` until `shutdown`."""

    daemon_threads = True

    def __init__(self, reward: CombinedReward, *, host: str, port: int, max_bytes: int, device: torch.device) -> None:
        """Listen, on any free port for `port` 0.

        Args:
            max_bytes: of a request; larger ones are refused and not kept.
            device: the images' when they are rewarded.

        Raises:
            OSError: the address is in use, or not this machine's.
        """
        super().__init__((host, port), _Handler)
        self.reward, self.max_bytes, self.device = reward, max_bytes, device
        self.one_at_a_time = threading.Lock()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{str(host)}:{port}"


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: RewardServer
    timeout = _STALLED

    def do_POST(self) -> None:
        """Reward the images of a body."""
        status, answer = self._answer()
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self) -> tuple[int, dict[str, Any]]:
        length, limit = self.headers.get("Content-Length", ""), self.server.max_bytes
        # an unread body must not be taken for the next request
        self.close_connection = True
        # int refuses texts of thousands of digits
        if not length.isdecimal() or len(length) > _DIGITS:
            return 411, {"error": "the request has no Content-Length, or none that is a size"}
        if int(length) > limit:
            # who is cut off while it sends does not read the answer
            for read in range(0, int(length), _CHUNK):
                if not self.rfile.read(min(_CHUNK, int(length) - read)):
                    break
            return 413, {
                "error": f"the request has {length} bytes, over --max-bytes {limit}; lower the client's batch_size"
            }
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return 400, {"error": f"the body ended after {len(body)} of {length} bytes"}
        try:
            images, prompts, metadata = unpack(body)
            with self.server.one_at_a_time:
                if self.server.device.type == "cuda":
                    # CUDA starts every thread on the first
                    torch.cuda.set_device(self.server.device)
                rewards = self.server.reward(images.to(self.server.device), _with_metadata(images, prompts, metadata))
        except NotFiniteError as error:
            return NOT_FINITE, {"error": str(error)}
        except RewardError as error:
            return 500, {"error": str(error)}
        except ValueError as error:
            return 400, {"error": str(error)}
        except Exception as error:
            # without an answer the client would ask again and again
            traceback.print_exc()
            return 500, {"error": f"{type(error).__name__}: {error}"}
        return 200, {"rewards": rewards.total.tolist(), "dtype": str(rewards.total.dtype).removeprefix("torch.")}

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say only what was refused; a run asks thousands of times."""
        if len(arguments) > 1 and str(arguments[1]) != "200":
            print(f"{self.client_address[0]}: {format % arguments}", file=sys.stderr)


def _with_metadata(images: Any, prompts: list[str] | None, metadata: list[dict[str, Any]]) -> list[Any] | None:
    if prompts is None:
        return None
    # one mapping for each, or none at all
    if metadata and len(metadata) != len(prompts) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts and {len(metadata)} metadata")
    return [Prompt(text, metadata=item) for text, item in zip(prompts, metadata or [{}] * len(prompts), strict=True)]


def serve(reward: str, words: Sequence[str], *, host: str, port: int, max_bytes: int, device: str) -> None:
    """Serve a reward until Ctrl-C.

    Args:
        reward: a name of the registry, or module:function; words: its arguments, as name=value in YAML.

    Raises:
        ValueError: no such reward or argument, a limit below 1, or no port.
        OSError: the address is in use.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if max_bytes < 1:
        raise ValueError(f"--max-bytes is {max_bytes}; use at least 1")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; use 1 to 65535, or 0 for any that is free")
    kwargs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is no argument of a reward; write name=value")
        try:
            # as configurations are read: 1e-4 is a number
            read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            # what follows OmegaConf's blank names its classes
            reason = " ".join(str(error).partition("\n    full_key:")[0].split())
            raise ValueError(
                f"{word!r} is no YAML of an option: {reason}; write name=value as in reward.kwargs"
            ) from error
        kwargs[name] = read["value"]
    chosen = choose_device(device)
    server = RewardServer(
        # arguments are words after the reward's name
        build_reward(reward, chosen, kwargs, option_prefix=f"{reward} "),
        host=host,
        port=port,
        max_bytes=max_bytes,
        device=chosen,
    )
    with server:
        print(f"{reward} on {server.url}: hrf train reward.name=remote reward.kwargs.url={server.url}", flush=True)
        server.serve_forever()
