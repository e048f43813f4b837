"""Runs steps one after the other within a time limit, and keeps a log.

A step that fails, or that exceeds its time, does not stop the others. `gpu_COMMAND.json` has a row
per step, written when it ends, and `gpu_COMMAND.log` all that the steps print.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.steps import Step

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0
"""Seconds that a step has after an interrupt, in which pytest lists its failures."""
MIN_SECONDS = 15.0
"""With less time, no step begins."""


class Driver:
    """The steps of a command: where they write, and the time that they have."""

    def __init__(
        self,
        command: str,
        out: Path,
        work: Path,
        seconds: float,
        *,
        published: Path | None = None,
        rehearse: bool = False,
    ) -> None:
        """The time starts now."""
        self.out, self.work = out.resolve(), work
        self.packages = work / "packages"
        """Folder of packages that the steps can import."""
        self._end = time.monotonic() + seconds
        self._published = published and published.resolve()
        self._rehearse = rehearse
        self._report = self.out / f"gpu_{command}.json"
        self._log = self.out / f"gpu_{command}.log"

    def run(self, steps: Sequence[Step]) -> int:
        """Run the steps; 1 if one failed or was stopped."""
        self.out.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        with self._log.open("wb") as log:
            for place, step in enumerate(steps):
                left = self._end - time.monotonic()
                later = sum(x.seconds for x in steps[place + 1 :] if self.why_skipped(x) is None)
                share = max(step.seconds, left - later) if step.takes_spare else step.seconds
                limit = min(share, left)
                seconds, status = self._take(step, limit, log)
                rows.append(
                    {
                        "step": step.name,
                        "limit": round(limit),
                        "seconds": seconds,
                        "status": status,
                    }
                )
                lines = ",\n".join(map(json.dumps, rows))
                self._report.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        for row in rows:
            print("{step:<20}{seconds:>7.1f} of {limit:>4} s  {status}".format(**row))
        return int(any(row["status"].startswith(("failed", "stopped")) for row in rows))

    def why_nothing_runs(self) -> str | None:
        """Why no benchmark can run here, or None: a package or a GPU is missing."""
        command = [sys.executable, "-c", "import torch, tyro; torch.cuda.init()"]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
        return done.stderr.strip().splitlines()[-1] if done.returncode else None

    def why_skipped(self, step: Step) -> str | None:
        """Why a step cannot run here, or None."""
        if "{published}" in step.command and self._published is None:
            return "the folder of the published code was not given"
        if step.program and not self._rehearse and shutil.which(step.program) is None:
            return f"{step.program} is not on the PATH"
        return None

    def words(self, step: Step, limit: float) -> list[str]:
        """The command of a step that has `limit` seconds."""
        words = shlex.split(step.command)
        if step.program is None:
            words.insert(0, "{python}")
        if self._rehearse:
            words = [*words[words.index("{python}") :], *shlex.split(step.rehearsal)]
        places = {
            "python": sys.executable,
            "out": self.out,
            "work": self.work,
            "published": self._published,
            "budget": max(round(limit - step.reserve), 1),
        }
        for name, value in places.items():
            words = [word.replace(f"{{{name}}}", str(value)) for word in words]
        return words

    def _take(self, step: Step, limit: float, log: IO[bytes]) -> tuple[float, str]:
        """Run a step, unless it cannot run; its seconds and its status."""
        begin = time.monotonic()
        reason = self.why_skipped(step)
        if reason is None and limit < MIN_SECONDS:
            reason = "no time left"
        if reason is not None:
            return 0.0, f"skipped: {reason}"
        words = self.words(step, limit)
        _tee(f"== {step.name}, {limit:.0f} s: {shlex.join(words)}\n".encode(), log)
        try:
            status = _run(words, limit, self._environment(), log)
        except OSError as error:
            status = f"failed: {error}"
        writes = not self._rehearse or (step.program is None and step.rehearsal != "--help")
        missing = [x for x in step.outputs if writes and not (self.out / x).is_file()]
        if status == "ok" and missing:
            status = f"failed: it wrote no {', '.join(missing)}"
        seconds = round(time.monotonic() - begin, 1)
        _tee(f"== {step.name}: {status} after {seconds} s\n".encode(), log)
        return seconds, status

    def _environment(self) -> dict[str, str]:
        paths = [str(self.packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }
        if self._rehearse:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        return environment


def _run(words: Sequence[str], limit: float, environment: dict[str, str], log: IO[bytes]) -> str:
    """Run a program with its children; its status."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output = process.stdout
    assert output is not None

    def copy() -> None:
        for line in output:
            _tee(line, log)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    status = "ok"
    try:
        code = process.wait(limit - GRACE)
        if code:
            status = f"failed: exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGINT)
        reader.join(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it left running
        # A process that waits for a broken GPU does not end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    reader.join(GRACE)
    return status


def _tee(line: bytes, log: IO[bytes]) -> None:
    for stream in (log, sys.stdout.buffer):
        stream.write(line)
        stream.flush()


def install(wheelhouse: Path, target: Path) -> None:
    """Install the wheels of packages that are missing here into a folder, and nothing else."""
    options = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
    options += ["--no-index", "--no-deps", "--no-compile", "--target", str(target)]

    def works(wheels: Sequence[Path]) -> bool:
        command = [sys.executable, "-m", "pip", "install", *options, *map(str, wheels)]
        return subprocess.run(command).returncode == 0

    missing = [wheel for wheel in sorted(wheelhouse.glob("*.whl")) if not _is_installed(wheel)]
    if not missing or works(missing):
        return
    for wheel in missing:  # so that one that does not fit keeps no other out
        if not works([wheel]):
            print(f"not installed: {wheel.name}", flush=True)


def _is_installed(wheel: Path) -> bool:
    try:
        importlib.metadata.distribution(wheel.name.partition("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
