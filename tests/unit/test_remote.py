"""The reward server and its client: what goes over the wire, and servers that are down, slow, busy or wrong."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save

from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.prompts import Prompt
from hrf_fast.rewards import NotFiniteError, RewardError, build_reward
from hrf_fast.rewards import remote as remote_module
from hrf_fast.rewards.remote import pack, unpack
from hrf_fast.rewards.serve import RewardServer, serve
from tests.runs import assert_equal_runs, train, with_folder

IMAGES = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(text, metadata={"level": number}) for number, text in enumerate(("a", "bä", "ccc", "d", "e"))]


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(function, max_bytes=1 << 20):
    with running(
        RewardServer(build_reward(function), host="127.0.0.1", port=0, max_bytes=max_bytes, device=torch.device("cpu"))
    ) as server:
        yield server.url


@contextmanager
def answering(answer):
    """A server of somebody else's: `answer(number of the request)` gives status and body, or None to say nothing."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = answer(len(requests))
            self.send_response(status)
            self.end_headers()
            for part in body if isinstance(body, list) else [body]:
                self.wfile.write(part)
                self.wfile.flush()
                if isinstance(body, list):
                    time.sleep(0.1)

        def log_message(self, *_):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests


def remote(url, **kwargs):
    return build_reward("remote", kwargs={"url": url, **kwargs})


@pytest.fixture
def waits(monkeypatch):
    """The client's waits, which take no time."""
    seconds = []
    monkeypatch.setattr(remote_module.time, "sleep", seconds.append)
    return seconds


def level(images, prompts, metadata):
    """Brightness, length and metadata."""
    rows = zip(images, prompts, metadata, strict=True)
    return torch.stack([image.mean() + len(text) + 10 * item["level"] for image, text, item in rows])


# --- our own server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 64])
def test_images_prompts_and_metadata_go_over_exactly(batch_size):
    with serving(level) as url:
        answer = remote(url, batch_size=batch_size)(IMAGES, PROMPTS).total
        assert torch.equal(answer, build_reward(level)(IMAGES, PROMPTS).total) and answer.dtype == torch.float32
        # bytes are rounded to 1/255
        rounded = remote(url, images="uint8")(IMAGES, PROMPTS).total
        expected = build_reward(level)((IMAGES * 255).round() / 255, PROMPTS).total
        assert torch.equal(rounded, expected) and not torch.equal(rounded, answer)


def test_an_unconditional_model_sends_no_prompts_and_doubles_stay_doubles():
    asked = []

    def doubles(images, prompts):
        asked.append(prompts)
        return 1e9 + images.double().mean((1, 2, 3))

    with serving(doubles) as url:
        answer = remote(url)(IMAGES).total
    assert asked == [None] and torch.equal(answer, 1e9 + IMAGES.double().mean((1, 2, 3)))


def test_one_request_at_a_time_reaches_the_reward():
    busy, most = [], []

    def slow(images, prompts):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.05)
        busy.pop()
        return [0.0] * len(images)

    with serving(slow) as url:
        threads = [threading.Thread(target=remote(url), args=(IMAGES,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] * 4


def test_a_rewards_failure_is_told_to_the_run_and_a_reward_that_is_not_finite_is_one():
    def fails(images, prompts):
        raise KeyError("no such thing")

    with serving(fails) as url, pytest.raises(RewardError, match="refused .*HTTP 500.*'fails' failed.*no such thing"):
        remote(url)(IMAGES)
    nan = lambda images, prompts: [float("nan")] * len(images)  # noqa: E731
    with serving(nan) as url, pytest.raises(NotFiniteError, match="reward.kwargs.url .*NaN or infinite"):
        remote(url)(IMAGES)


def test_a_request_over_the_limit_is_refused_with_the_way_out():
    with serving(level, max_bytes=1000) as url:
        with pytest.raises(RewardError, match="HTTP 413.*over --max-bytes 1000; lower the client's batch_size"):
            remote(url)(torch.rand(64, 3, 64, 64), [PROMPTS[0]] * 64)
        # and the server goes on
        assert len(remote(url, batch_size=1)(IMAGES[:, :, :2, :2], PROMPTS).total) == 5


@pytest.mark.parametrize(("length", "status"), [("9" * 18, "413"), ("9" * 5000, "411"), ("-1", "411")])
def test_a_length_that_nobody_sends_is_answered_and_not_waited_for(length, status):
    with serving(level) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
            connection.shutdown(socket.SHUT_WR)
            assert connection.makefile("rb").readline().split()[1] == status.encode()


def test_an_error_about_an_address_does_not_repeat_its_query(waits):
    with serving(level) as url, pytest.raises(RewardError) as caught:
        remote(f"{url}/?api_key=hidden")(torch.rand(1, 3, 2, 2), ["a"])
    assert "hidden" not in str(caught.value) and f"reward.kwargs.url {url}/" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no safetensors file"),
        (b"\x80\x04\x95 a pickle", "no safetensors file"),
        (b"\xff" * 64, "no safetensors file"),
        (save({"pictures": torch.zeros(1)}), "no tensor `images`"),
        (save({"images": torch.zeros(1, 3, 2, 2, dtype=torch.float64)}), "uint8 or float32"),
        (save({"images": torch.tensor(1.0)}, {"prompts": '["a"]'}), r"`images` has the shape \[\]; send"),
        (save({"images": torch.zeros(3, 2, 2)}), r"`images` has the shape \[3, 2, 2\]; send"),
        (save({"images": torch.zeros(1, 3, 2, 2)}, {"prompts": "[1]"}), "`prompts` is no list of texts"),
        (save({"images": torch.zeros(1, 3, 2, 2)}, {"prompts": "["}), "JSON"),
        (save({"images": torch.zeros(1, 3, 2, 2)}, {"metadata": "[1]"}), "`metadata` is no list of mappings"),
        (save({"images": torch.zeros(1, 3, 2, 2)}, {"prompts": '["a", "b"]'}), "1 images came with 2 prompts"),
        (save({"images": torch.full((1, 3, 2, 2), 2.0)}), r"images in \[0, 1\]"),
    ],
)
def test_a_body_of_another_kind_is_answered_with_the_reason(body, reason):
    import re
    from urllib.error import HTTPError
    from urllib.request import urlopen

    with serving(level) as url, pytest.raises(HTTPError) as caught:
        urlopen(url, data=body)
    assert caught.value.code == 400 and re.search(reason, json.loads(caught.value.read())["error"])


def test_an_error_of_the_server_itself_is_answered_and_not_asked_for_again(waits, monkeypatch, capsys):
    def broken(body):
        raise RuntimeError("no memory")

    monkeypatch.setattr("hrf_fast.rewards.serve.unpack", broken)
    with serving(level) as url, pytest.raises(RewardError, match="refused .*HTTP 500: RuntimeError: no memory"):
        remote(url)(IMAGES)
    assert waits == [] and "Traceback" in capsys.readouterr().err


def test_packing_and_unpacking_are_inverse():
    images, prompts, metadata = unpack(pack(IMAGES, ["ä", "b"], [{"c": [1]}, {}], as_bytes=False))
    assert torch.equal(images, IMAGES) and prompts == ["ä", "b"] and metadata == [{"c": [1]}, {}]
    assert unpack(pack(IMAGES, None, [], as_bytes=True))[1:] == (None, [])


# --- servers that are down, busy, slow or wrong -----------------------------------------------------------------------


def test_a_server_that_is_down_is_asked_again_after_doubling_waits(waits):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RewardError, match=rf"reward.kwargs.url {url} failed 7 times, last with Connection.*running"):
        remote(url, attempts=7)(IMAGES)
    assert waits == [0.5, 1, 2, 4, 8, 8]


def test_a_busy_server_is_asked_until_it_answers_and_a_refusal_is_final(waits):
    rewards = json.dumps({"rewards": [1, 2, 3.5, -4, 0]}).encode()
    with answering(lambda number: (503, b"loading") if number < 3 else (200, rewards)) as (url, requests):
        assert remote(url)(IMAGES).total.tolist() == [1, 2, 3.5, -4, 0]
    assert waits == [0.5, 1] and len(requests) == 3 and len(set(requests)) == 1
    with answering(lambda number: (404, b'{"error": "not\\nhere"}')) as (url, requests):
        with pytest.raises(RewardError, match="refused the request with HTTP 404: not here"):
            remote(url)(IMAGES)
        assert len(requests) == 1


def test_a_server_that_trickles_or_stalls_meets_the_deadline():
    # a byte every 0.1 s, so that no single wait is long
    with answering(lambda number: (200, [b" "] * 100)) as (url, _):
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"reward.kwargs.deadline 0.5 s .1 attempts.*raise the deadline"):
            remote(url, deadline=0.5)(IMAGES)
        assert time.monotonic() - began < 3
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(RewardError, match="reward.kwargs.deadline 0.3 s .*TimeoutError: the answer did not end in time"),
    ):
        remote(f"http://127.0.0.1:{silent.getsockname()[1]}", deadline=0.3)(IMAGES)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (b"<html>", RewardError, "answered b'<html>'.*as JSON"),
        (b'{"scores": [1]}', RewardError, "KeyError: 'rewards'"),
        (b'{"rewards": 1}', RewardError, "no list"),
        (b'{"rewards": ["a", 1, 1, 1, 1]}', RewardError, "as JSON"),
        (b'{"rewards": [1, 2]}', RewardError, "answered 2 rewards for 5 images"),
        (b'{"rewards": [1, 2, NaN, 4, 5]}', NotFiniteError, r"reward 'remote' returned 1 of 5 values.*index 2"),
        (b'{"rewards": [1, 2, null, 4, 5]}', NotFiniteError, r"reward 'remote' returned 1 of 5 values.*index 2"),
        (b" " * 70_000, RewardError, "an answer of more than 65536 bytes"),
    ],
)
def test_a_wrong_answer_is_one_clear_error(body, error, message, waits):
    with answering(lambda number: (200, body)) as (url, _), pytest.raises(error, match=message):
        remote(url, attempts=2)(IMAGES)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "reward.kwargs.url is '127.0.0.1:8000'; write it as http://host:port"),
        ({"url": "http://host:99999"}, "reward.kwargs.url is"),
        ({"url": 8000}, "reward.kwargs.url is 8000"),
        # and says no password
        ({"url": "http://me:secret@h/x?api_key=K"}, r"reward.kwargs.url http://h/x\?api_key= has a user"),
        ({"url": "ftp://me:secret@h"}, "reward.kwargs.url is 'ftp://h'; write"),
        ({"url": "http://h", "images": "fp16"}, "reward.kwargs.images is 'fp16'; use fp32 or uint8"),
        ({"url": "http://h", "deadline": 0}, "reward.kwargs.deadline is 0"),
        ({"url": "http://h", "attempts": 0}, "reward.kwargs.attempts is 0"),
    ],
)
def test_arguments_that_can_not_work_are_refused_before_the_run(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_reward("remote", kwargs=kwargs)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_by_the_command_learns_what_it_learns_without_a_server(tiny_run, tmp_path):
    command = [sys.executable, "-m", "hrf_fast.cli", "serve-reward", "jpeg_compressibility", "quality=80", "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split("reward.kwargs.url=")[1].strip()
        train([*tiny_run, "reward.kwargs.quality=80"])
        words = with_folder(tiny_run, tmp_path / "remote", "reward.name=remote", f"reward.kwargs.url={url}")
        train(words)
    finally:
        server.terminate()
        server.wait(30)
    assert_equal_runs(tmp_path / "run", tmp_path / "remote")


def test_arguments_of_a_server_are_read_as_those_of_a_configuration(monkeypatch):
    words = ["a=1e-4", "b=[1, 5E3]", "c={d: 2}", "e=text", "f=null", "g=", "h=a=b", "i=${oc.env:HRF_TEST_WORD}"]
    monkeypatch.setenv("HRF_TEST_WORD", "6")

    def build(name, device, kwargs, option_prefix):
        assert kwargs == load_config([f"reward.kwargs.{word}" for word in words]).reward.kwargs
        assert kwargs["a"] == 1e-4 and kwargs["b"] == [1, 5000.0]
        raise ValueError("built")

    monkeypatch.setattr("hrf_fast.rewards.serve.build_reward", build)
    with pytest.raises(ValueError, match="built"):
        serve("jpeg_compressibility", words, host="127.0.0.1", port=0, max_bytes=1, device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port=99999"], "--port is 99999; use 1 to 65535"),
        (["--port=-1"], "--port is -1"),
        (["quality=["], "'quality=\\[' is no YAML"),
        (["quality=${nowhere}"], r"'quality=\$\{nowhere\}' is no YAML of an option: Interpolation key 'nowhere'"),
    ],
)
def test_a_server_that_can_not_be_started_says_why(words, message, capsys):
    assert main(["serve-reward", "jpeg_compressibility", *words]) == 1
    assert re.search(message, capsys.readouterr().err)
