"""A llama.cpp server as a process of its own, outliving whoever started it.

Run by its path in a fresh interpreter; it imports nothing of this package. It puts itself into the
background, loads the model, prints `{"pid": ..., "port": ...}` as its last line and is silent
from then on. Whatever else it prints is the reason why it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import Any
from urllib.parse import urlsplit


def main() -> None:
    """Serve what the command line names until a signal ends the process."""
    arguments = _arguments()
    if os.fork():
        os._exit(0)  # the rest is an orphan, and no zombie to anyone
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    try:
        server = _serving(arguments)
    except RuntimeError as error:  # llama.cpp has said why
        sys.exit(str(error))
    port = urlsplit(server.listening_address).port
    print(json.dumps({"pid": os.getpid(), "port": port}), flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while True:
        signal.pause()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--mark", required=True, help="by which its command is found again")
    parser.add_argument("--port", type=int, required=True, help="0: any free one")
    parser.add_argument("--context", type=int, required=True, help="tokens; 0: the model's own")
    parser.add_argument("--threads", type=int, help="as many as llama.cpp sees fit")
    parser.add_argument("--token-env", help="the variable with the bearer token to ask for")
    return parser.parse_args()


def _serving(arguments: argparse.Namespace) -> Any:
    """A server that has loaded its model and answers."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.model_alias = {arguments.alias}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.n_ctx = arguments.context
    if arguments.threads is not None:
        parameters.cpuparams.n_threads = arguments.threads
        parameters.cpuparams_batch.n_threads = arguments.threads
    if arguments.token_env is not None:
        parameters.api_keys = [os.environ[arguments.token_env]]
    parameters.use_jinja = True  # the chat template in the file, exactly
    parameters.offline = True
    parameters.ui = False
    # Any web page open on this host could otherwise talk to it, and read what others sent.
    parameters.cors_origins = ""
    parameters.cors_credentials = False
    parameters.endpoint_slots = False
    parameters.endpoint_metrics = True  # how many answers are under way, and not what is in them
    parameters.verbosity = 1  # errors
    return xllamacpp.Server(parameters)


if __name__ == "__main__":
    main()
