"""Upstream's own conversion of a model, for comparison: `convert_hf_to_gguf.py`, `llama-quantize`.

The converter's modules are imported once, in a process of their own that converts one model after
the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

CONVERT = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf as converter
from conversion import ModelBase, TextModel

logging.disable(logging.WARNING)
known = TextModel.get_vocab_base_pre
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    asked = json.loads(line)
    pre = asked.pop("pre")
    TextModel.get_vocab_base_pre = known if pre is None else lambda self, tokenizer: pre
    sys.argv[1:] = asked.pop("arguments")
    try:
        converter.main()
        answer = None
    except (Exception, SystemExit) as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), file=out, flush=True)
"""


class OracleError(Exception):
    """Upstream does not convert the model; the message is its own."""


@frozen
class Oracle:
    """The running converter. `directory`: where `build_llama_cpp.py` has put all of it."""

    directory: Path
    process: subprocess.Popen[str]

    def convert(
        self, model: Path, to: Path, outtype: str, *options: str, name: str, pre: str | None = None
    ) -> Path:
        """The file that upstream makes of the model directory; returns `to`.

        `outtype`: "f32", "f16" or "bf16". `pre`: the name to give the pre-tokenizer of a vocabulary
        that nobody has listed, which upstream knows by a hash alone.

        Raises:
            OracleError: it is not converted.
        """
        arguments = [str(model), "--outfile", str(to), "--outtype", outtype, "--model-name", name]
        asked = {"pre": pre, "arguments": [*arguments, *options]}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        error = json.loads(answer) if answer else "the converter has ended"
        if error is not None:
            raise OracleError(error)
        return to

    def quantize(self, file: Path, to: Path, mode: str) -> Path:
        """What `llama-quantize` makes of a converted file; returns `to`."""
        command = [self.directory / "llama-quantize", file, to, mode]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise OracleError(run.stderr[-2000:])
        return to


@contextmanager
def oracle(directory: Path, log: Path) -> Iterator[Oracle]:
    """The converter in `directory`, while the block lasts; what it says goes to `log`."""
    command = [sys.executable, "-c", CONVERT, directory]
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield Oracle(directory, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
