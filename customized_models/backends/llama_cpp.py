"""llama.cpp, as a server process of its own on this host, from the wheel `xllamacpp`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen

from ..deploying.templates.chat_template import ChatTemplate
from ..deploying.templates.conversations import Conversation
from ..deploying.templates.live import Server, Tokenizer, prove_on_llama_cpp
from ..deploying.templates.proofs import TemplateProof
from ..errors import (
    AlreadyExistsError,
    DeploymentError,
    InvalidOptionError,
    MissingDependencyError,
    ServerAnswerError,
    ServerUnreachableError,
    shown,
)
from ..models import DeploymentEnvironment, Progress, Served, Status
from ..processes import Process
from .connection import (
    DEFAULT_SECONDS,
    Connection,
    Secrets,
    bearer_token,
    checked_settings,
    environment_variable,
)
from .http import JSONServer
from .openai_api import ANSWER_SECONDS, cards
from .process import end, output_of_start, processes_with
from .protocol import Artifact, Plan, checked_options, chosen_served_name, positive_or_none

__all__ = ["LlamaCpp", "LlamaCppOptions"]

_HOST = "127.0.0.1"
_SERVER = Path(__file__).resolve().with_name("embedded_server.py")
_PORT_SECONDS = 2.0  # the system frees the port of a killed server a moment after it is gone
_START_SECONDS = 600.0  # a large file on a slow disk
_POLL_SECONDS = 0.1


@frozen
class LlamaCppOptions:
    """How a llama.cpp server is started.

    `context`: tokens; None for what the model was made for, or as much of it as memory allows.
    `threads`: None for what llama.cpp finds right.

    Raises:
        InvalidOptionError: a value that is not None and not a positive int.
    """

    context: int | None = field(default=None, validator=positive_or_none)
    threads: int | None = field(default=None, validator=positive_or_none)


class LlamaCpp:
    """A server process for each model, on this host's loopback address.

    The process outlives the one that deployed it and is known by its number and start time, so
    that any process of this host sees its status and can end it. An environment without a port
    gives every model a free one; with a port, it holds one model at a time. The file's own chat
    template is used. With `token_env`, callers must send that token.
    """

    options = LlamaCppOptions

    def __init__(
        self, environment: DeploymentEnvironment, *, secrets: Secrets = environment_variable
    ) -> None:
        if environment.address not in (None, _HOST, "localhost"):
            raise InvalidOptionError(
                f"environment {shown(environment.name)}: llama_cpp starts servers on this "
                f"host only; leave out the address {shown(environment.address)}"
            )
        if environment.scheme != "http" or environment.path:
            raise InvalidOptionError("the backend llama_cpp takes no scheme or path")
        self._environment = environment
        self._timeout = float(checked_settings(environment).get("timeout", DEFAULT_SECONDS))
        self._secrets = secrets

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `Backend.preflight`.

        Raises:
            MissingDependencyError: The wheel is not installed.
            AlreadyExistsError: something listens on the environment's port.
        """
        options = checked_options(options, LlamaCppOptions)
        name = chosen_served_name(artifact, served_name)
        artifact.check_gguf()
        self._refuse_missing_wheel()
        self._token()
        self._refuse_taken_port()
        return Plan(artifact, name, options, details={"mark": uuid.uuid4().hex})

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `Backend.push`. Details: `process`, `port`, and a `mark` in its command."""
        file = plan.artifact.gguf(progress, chat_template=True)
        self._refuse_taken_port()
        command = self._command(os.path.abspath(file.path), plan)
        output = output_of_start(command, _START_SECONDS, progress, self._secret_variables())
        process, port = _reported(output)
        try:
            aliases = list(cards(self._server(port)))
            if plan.served_name not in aliases:
                raise ServerAnswerError(f"llama.cpp serves {shown(aliases)} instead of its model")
            progress("starting", 0, 0)
        except BaseException:
            end(process)
            raise
        details = {**plan.details, "process": asdict(process), "port": port}
        endpoint = f"http://{_HOST}:{port}/v1"
        return Served(plan.served_name, endpoint, "openai", file.digest, details=details)

    def probe(self, served: Served) -> LlamaCppProbe:
        """See `Probing`."""
        return LlamaCppProbe(self._server(served.details["port"]))

    def status(self, served: Served) -> Status:
        """See `Backend.status`."""
        details = served.details
        if Process(**details["process"]).is_gone:
            return Status.ABSENT
        try:
            aliases = cards(self._server(details["port"]))
        except (ServerUnreachableError, ServerAnswerError):
            return Status.UNREACHABLE
        return Status.LOADED if served.name in aliases else Status.CHANGED

    def unload(self, served: Served, seconds: float) -> str:
        """See `Unloading`: `undeploy`, which ends the process, frees the memory."""
        if Process(**served.details["process"]).is_gone:
            return ""
        until = time.monotonic() + seconds
        try:
            server = self._server(served.details["port"])
            while _answers_under_way(server):
                if time.monotonic() > until:
                    return f"an answer was still under way after {seconds:g} seconds, and was cut"
                time.sleep(_POLL_SECONDS)
        except DeploymentError:  # ending the process needs neither an answer nor a token
            return "the server could not be asked whether an answer was under way"
        return ""

    def describe(self) -> Mapping[str, Any]:
        """See `Describing`: the wheel's version, and how models are served."""
        self._refuse_missing_wheel()
        return {
            "version": importlib.metadata.version("xllamacpp"),
            "serves": "each model by a process of its own on this host",
        }

    def undeploy(self, served: Served) -> None:
        """See `Backend.undeploy`."""
        if "process" in served.details:
            end(Process(**served.details["process"]))
        else:  # of a push that was killed
            for process in processes_with(served.details["mark"]):
                end(process)

    def _command(self, model: str, plan: Plan) -> list[str]:
        # -P: the directory of the script, which has modules of other tools' names, is no place
        # to import from.
        command = [sys.executable, "-P", str(_SERVER)]
        command += ["--model", model, "--alias", plan.served_name, "--mark", plan.details["mark"]]
        command += ["--port", str(self._environment.port or 0)]
        command += ["--context", str(plan.options.context or 0)]
        if plan.options.threads is not None:
            command += ["--threads", str(plan.options.threads)]
        if self._environment.token_env is not None:
            command += ["--token-env", self._environment.token_env]
        return command

    def _refuse_missing_wheel(self) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingDependencyError(
                "the backend llama_cpp needs xllamacpp: pip install 'customized-models[llama-cpp]'"
            )

    def _refuse_taken_port(self) -> None:
        if self._environment.port is None:
            return
        until = time.monotonic() + _PORT_SECONDS
        while (error := _bind_error(self._environment.port)) and time.monotonic() < until:
            time.sleep(0.02)
        if error:
            raise AlreadyExistsError(
                f"port {self._environment.port} of this host is taken ({error.strerror}): "
                f"undeploy what it serves, or use an environment without a port"
            ) from error

    def _server(self, port: int) -> JSONServer:
        token = self._token()
        authorization = None if token is None else f"Bearer {token}"
        url = f"http://{_HOST}:{port}"
        return JSONServer("llama.cpp", Connection(url, self._timeout, authorization))

    def _secret_variables(self) -> dict[str, str]:
        """What the server finds the token in, wherever it is kept here."""
        token, name = self._token(), self._environment.token_env
        return {} if token is None or name is None else {name: token}

    def _token(self) -> str | None:
        return bearer_token(self._environment, self._secrets)


@frozen
class LlamaCppProbe:
    """What a llama.cpp server, or a router's model, is asked for its proofs; see `Probe`."""

    server: Server

    def template(
        self, chat: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Conversation]
    ) -> TemplateProof:
        """See `Probe.template`: of the chat template in the file, by `/apply-template`."""
        return prove_on_llama_cpp(self.server, chat, tokenizer, conversations=conversations)

    def tensor_types(self) -> None:
        """See `Probe.tensor_types`: llama.cpp does not tell; it reads our file itself."""

    def greedy(self, prompt: str, count: int) -> str:
        """See `Probe.greedy`."""
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "seed": 0}
        return str(self.server.post("/completion", body, seconds=ANSWER_SECONDS).get("content"))


def _answers_under_way(server: JSONServer) -> int:
    """How many answers a llama.cpp server is at, or has still to begin."""
    text = server.get_text("/metrics")
    found = re.findall(r"^llamacpp:requests_(?:processing|deferred) (\d+)", text, re.MULTILINE)
    if not found:
        raise ServerAnswerError(f"llama.cpp at {server.url} does not say what it is about")
    return sum(map(int, found))


def _bind_error(port: int) -> OSError | None:
    """Why nothing can listen on that port of this host; None if something can."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((_HOST, port))
        except OSError as error:
            return error
    return None


def _reported(output: bytes) -> tuple[Process, int]:
    """The process that `embedded_server` reports, and its port.

    Raises:
        ServerAnswerError: It ended instead; the message has the end of its output.
    """
    try:
        report = json.loads(output.rstrip().rpartition(b"\n")[2])
        pid, port = report["pid"], report["port"]
    except (ValueError, TypeError, KeyError) as error:
        text = output.decode("utf-8", "replace").strip()
        reason = shown(text[-600:], 600) if text else "with no output; possibly out of memory"
        raise ServerAnswerError(f"the llama.cpp server ended before it served: {reason}") from error
    process = Process.of(pid)
    if process is None:
        raise ServerAnswerError("the llama.cpp server ended right after it had started")
    return process, port
