"""Start the real ComfyUI in a folder of its own and talk to it over HTTP and the websocket."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import websocket
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120
FOLDERS = ("custom_nodes", "models/diffusion_models", "models/text_encoders", "models/vae", "input", "output", "temp", "user")
PREVIEW, TEXT = 1, 3  # the first four bytes of a binary websocket message

Event = dict[str, Any]
OnEvent = Callable[[Event], object]
Placed = Mapping[str, Path]

PACK: Placed = MappingProxyType({"lance-native": ROOT})

# The harness only ever talks to the loopback: a proxy from the environment must not see it.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class PromptRejectedError(AssertionError):
    """ComfyUI refused a graph before running it; `report` is its answer (`error`, `node_errors`)."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(json.dumps(report, indent=2))
        self.report = report


def find_comfyui() -> Path | None:
    """The ComfyUI to test with: COMFYUI_PATH, else ~/comfy/ComfyUI, else None."""
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
    return path if (path / "main.py").is_file() else None


def comfyui_python(path: Path) -> Path:
    """The Python that ComfyUI runs with: COMFYUI_PYTHON, else the checkout's venv, else this one."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        return Path(chosen).expanduser()
    candidates = (path / venv / "bin" / "python" for venv in (".venv", "venv"))
    return next((python for python in candidates if python.is_file()), Path(sys.executable))


@dataclass(frozen=True)
class Result:
    """One finished run: its websocket events in order, and where its files are."""

    base: Path
    prompt_id: str
    events: list[Event] = field(repr=False)

    def of_type(self, kind: str) -> list[Any]:
        return [event["data"] for event in self.events if event["type"] == kind]

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        return {data["node"]: data["output"] for data in self.of_type("executed")}

    @property
    def previews(self) -> list[bytes]:
        return self.of_type("preview")

    @property
    def error(self) -> dict[str, Any] | None:
        return next(iter(self.of_type("execution_error")), None)

    @property
    def interrupted(self) -> bool:
        return bool(self.of_type("execution_interrupted"))

    def paths(self, node_id: str) -> list[Path]:
        entries = [entry for value in (self.outputs.get(node_id) or {}).values() if isinstance(value, list) for entry in value]
        files = [entry for entry in entries if isinstance(entry, dict) and "filename" in entry]
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in files]

    def path(self, node_id: str, index: int = 0) -> Path:
        return self.paths(node_id)[index]

    def image(self, node_id: str, index: int = 0) -> Image.Image:
        with Image.open(self.path(node_id, index)) as image:
            image.load()
        return image

    def check(self) -> None:
        if self.error:
            message = self.error["exception_message"]
            raise AssertionError(f"node {self.error['node_id']}: {message}\n{''.join(self.error['traceback'])}")
        assert not self.interrupted, f"prompt {self.prompt_id} was interrupted"


class ComfyServer:
    """A running ComfyUI, as a context manager.

    `models` says what lies under models/, `nodes` what lies under custom_nodes/ (this repository unless told
    otherwise). Both are links to the given files and folders.
    """

    def __init__(self, models: Placed = MappingProxyType({}), arguments: Sequence[str] = (), nodes: Placed = PACK) -> None:
        self.models, self.arguments, self.nodes = dict(models), list(arguments), dict(nodes)
        self.start_seconds, self._last_log = 0.0, ""
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        comfyui = find_comfyui()
        assert comfyui, "ComfyUI was not found: set COMFYUI_PATH"
        self._folder = tempfile.TemporaryDirectory(prefix="lance-comfy-", ignore_cleanup_errors=True)
        self.base = Path(self._folder.name).resolve()
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        try:
            self._prepare_folders()
            self._start(comfyui)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def log(self) -> str:
        """What ComfyUI has written so far, without colours; still there after `stop`."""
        file = self.base / "comfyui.log"
        if file.is_file():
            self._last_log = re.sub(r"\x1b\[\d*m", "", file.read_text("utf-8", "replace"))
        return self._last_log

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.log()
        self._folder.cleanup()

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The schemas of all nodes by id, or the schema of one."""
        return self._request(f"/object_info/{node}")[node] if node else self._request("/object_info")

    def upload_image(self, path: Path) -> str:
        """Upload through HTTP as the browser does; returns the name for LoadImage and its like."""
        boundary = uuid.uuid4().hex
        header = f'Content-Disposition: form-data; name="image"; filename="{path.name}"'
        body = f"--{boundary}\r\n{header}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        body += path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}")["name"]

    def queue(self, prompt: Mapping[str, Any], client_id: str = "") -> str:
        """Queue an API-format graph and return its id; raises PromptRejectedError if any output does not validate."""
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            raise PromptRejectedError(json.loads(error.read())) from None
        if answer["node_errors"]:
            self.interrupt(answer["prompt_id"])
            raise PromptRejectedError(answer)
        return answer["prompt_id"]

    def run(
        self, prompt: Mapping[str, Any], *, check: bool = True, timeout: float = 300, on_event: OnEvent | None = None
    ) -> Result:
        """Queue a graph and wait for its end. `on_event` sees each event when it arrives (to interrupt, say).

        With `check`, an execution error or an interrupt raises AssertionError with ComfyUI's message and traceback.
        """
        client_id = uuid.uuid4().hex
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}"
        with closing(websocket.create_connection(address, timeout=timeout)) as feed:
            prompt_id = self.queue(prompt, client_id)
            result = Result(self.base, prompt_id, self._collect(feed, prompt_id, timeout, on_event or (lambda _: None)))
        if check:
            result.check()
        return result

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the running prompt; with an id only that one, or take it off the queue if it still waits."""
        if prompt_id:
            self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Ask ComfyUI to unload all models and empty its caches; it does so soon after, when nothing runs."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def history(self, prompt_id: str = "") -> dict[str, Any]:
        return self._request(f"/history/{prompt_id}" if prompt_id else "/history")

    def get(self, route: str) -> Any:
        return self._request(route)

    def post(self, route: str, value: Any) -> Any:
        return self._request(route, json.dumps(value).encode(), "application/json")

    def _request(self, route: str, body: bytes | None = None, content_type: str = "", timeout: float = 60) -> Any:
        request = urllib.request.Request(self.url + route, body, {"Content-Type": content_type} if content_type else {})
        with _open(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _collect(self, feed: websocket.WebSocket, prompt_id: str, timeout: float, on_event: OnEvent) -> list[Event]:
        events: list[Event] = []
        deadline = time.monotonic() + timeout
        while True:
            event = self._receive(feed, deadline)
            data = event["data"]
            if isinstance(data, dict) and data.get("prompt_id", prompt_id) != prompt_id:
                continue
            events.append(event)
            on_event(event)
            # This comes after execution_success or execution_error, when the history is already written.
            if event["type"] == "executing" and data["node"] is None:
                return events

    def _receive(self, feed: websocket.WebSocket, deadline: float) -> Event:
        try:
            feed.settimeout(max(0.1, deadline - time.monotonic()))
            message = feed.recv()
        except (websocket.WebSocketException, OSError) as error:
            raise AssertionError(f"no end of the run: {error!r}\n{self._log_tail()}") from error
        assert message, f"ComfyUI closed the websocket\n{self._log_tail()}"
        return json.loads(message) if isinstance(message, str) else _binary_event(message)

    def _prepare_folders(self) -> None:
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True)
        for name, source in self.nodes.items():
            _place(source, self.base / "custom_nodes" / name)
        for name, source in self.models.items():
            _place(source, self.base / "models" / name)

    def _start(self, comfyui: Path) -> None:
        # The database is the one thing that does not follow --base-directory.
        command = [str(comfyui_python(comfyui)), str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch"]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}", "--disable-api-nodes"]
        command += ["--preview-method", "latent2rgb", *self.arguments]
        begin = time.monotonic()
        with (self.base / "comfyui.log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self.base, env=_environment(), stdout=log, stderr=log)
        while not self._answers():
            ended = self._process.poll() is not None
            if ended or time.monotonic() - begin > START_SECONDS:
                reason = f"ended with code {self._process.returncode}" if ended else f"was not ready in {START_SECONDS} s"
                raise RuntimeError(f"ComfyUI {reason}\n{self._log_tail()}")
            time.sleep(0.1)
        self.start_seconds = time.monotonic() - begin
        if "(IMPORT FAILED)" in self.log():
            raise RuntimeError(f"a custom node did not import\n{self.log()}")

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self._request("/system_stats", timeout=5))
        return False

    def _log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-60:])


def _environment() -> dict[str, str]:
    # The test runner's Python settings are not ComfyUI's, and no test may reach a network. One thread: the tiny model's
    # tensors are too small to share.
    kept = {"OMP_NUM_THREADS": "1"} | {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve(strict=True)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def _binary_event(message: bytes) -> Event:
    kind, size = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
    if kind == TEXT:
        return {"type": "progress_text", "data": {"node": message[8 : 8 + size].decode(), "text": message[8 + size :].decode()}}
    return {"type": "preview" if kind == PREVIEW else f"binary {kind}", "data": message[8:]}
