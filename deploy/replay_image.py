"""Replay the Dockerfile where no container engine runs: its install steps, its user, its start, its health check.

    python -m deploy.replay_image

makes every step of every stage happen in a temporary folder that stands for the image's root, starts what the image
starts with `demo` as its model, waits until the image's own health check passes, asks for a completion, and ends the
server. What cannot be replayed is said: the base image (this machine's Python of the same version stands for it) and
the accounts of the image's user (as root, the server runs with that user's number, and may read but not write what is
others'). It knows the Dockerfile, not the server behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
FOLDERS = ("/src", "/opt/vblora", "/var/lib/vblora", "/var/cache/vblora")
"""The folders of the image that the Dockerfile names; in a replay they lie below another root."""

_FOLDER = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, FOLDERS))})(?![\w-])")
HOST_PATH = "/usr/local/bin:/usr/bin:/bin"
START_SECONDS = 300.0
STOP_SECONDS = 40.0


class ReplayError(Exception):
    """A step failed, or the Dockerfile says something that this script does not know."""


@dataclass(frozen=True)
class Step:
    """One instruction, like ``RUN`` and what stands behind it, continued lines joined."""

    instruction: str
    value: str


@dataclass
class Stage:
    """What ``FROM`` begins."""

    base: str
    name: str
    steps: list[Step] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        """The value in force of an instruction that counts once."""
        values = [step.value for step in self.steps if step.instruction == instruction]
        if not values:
            raise ReplayError(f"the stage {self.name} has no {instruction}")
        return values[-1]

    def command(self, instruction: str) -> list[str]:
        """ENTRYPOINT, CMD or HEALTHCHECK as a list of words; only the JSON form is known."""
        words: list[str] = json.loads(self.last(instruction).rpartition("CMD ")[2])
        return words


def read_stages(dockerfile: Path) -> list[Stage]:
    """The stages of a Dockerfile, the arguments before the first FROM filled in with their defaults."""
    with dockerfile.open(encoding="utf-8") as file:
        structure = DockerfileParser(fileobj=file).structure
    steps = [Step(entry["instruction"], entry["value"]) for entry in structure if entry["instruction"] != "COMMENT"]
    defaults: dict[str, str] = {}
    stages: list[Stage] = []
    for step in steps:
        if step.instruction == "FROM":
            base, _, name = string.Template(step.value).substitute(defaults).partition(" AS ")
            stages.append(Stage(base, name or "final"))
        elif not stages and step.instruction == "ARG":
            defaults |= [_assignment(step.value)]
        else:
            stages[-1].steps.append(step)
    return stages


def _assignment(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def environment_of(stage: Stage, start: Mapping[str, str]) -> dict[str, str]:
    """`start` with what the stage's ENV instructions add."""
    environment = dict(start)
    for step in stage.steps:
        if step.instruction == "ENV":
            _set(environment, step.value)
    return environment


def _set(environment: dict[str, str], assignments: str) -> None:
    """What one ENV does: ``A=1 PATH=/bin:$PATH``."""
    for name, value in map(_assignment, shlex.split(assignments)):
        environment[name] = string.Template(value).substitute(environment)


def below(root: Path, text: str) -> str:
    """`text` with the image's folders moved below `root`."""
    return _FOLDER.sub(lambda match: f"{root}{match[1]}", text)


class Build:
    """The steps of the stages, one after the other, in `folder`/root. A finished stage moves to `folder`/NAME."""

    def __init__(self, folder: Path, context: Path) -> None:
        self.root = folder / "root"
        self._folder = folder
        self._context = context
        lines = (context / ".dockerignore").read_text().split()
        self._sent = {line[1:] for line in lines if line.startswith("!")}
        self._ignored = [line.removeprefix("**/") for line in lines if line.startswith("**/")]

    def run(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            self.root.mkdir()
            self._stage(stage)
            if stage is not stages[-1]:
                self.root.rename(self._folder / stage.name)

    def _stage(self, stage: Stage) -> None:
        print(f"== {stage.name}, from {stage.base}: {_stand_in(stage.base)}", flush=True)
        directory = self.root
        environment = dict(os.environ)
        for step in stage.steps:
            match step.instruction:
                case "ARG":
                    environment |= [_assignment(step.value)]
                case "ENV":
                    _set(environment, below(self.root, step.value))
                case "WORKDIR":
                    directory = Path(below(self.root, step.value))
                    directory.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(shlex.split(step.value), directory)
                case "RUN" if "useradd" in step.value:
                    print(f"-- not replayed, it makes accounts: {step.value}", flush=True)
                case "RUN":
                    _run(below(self.root, step.value), directory, environment)
                case "USER" | "EXPOSE" | "VOLUME" | "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
                    pass  # of the image's start, not of its making
                case other:
                    raise ReplayError(f"this script does not know {other}")

    def _copy(self, words: list[str], directory: Path) -> None:
        print(f"-- COPY {' '.join(words)}", flush=True)
        source_root = self._context
        if words[0].startswith("--from="):
            source_root = self._folder / words.pop(0).removeprefix("--from=")
        elif unsent := set(words[:-1]) - self._sent:
            raise ReplayError(f".dockerignore keeps {', '.join(sorted(unsent))} from the builder")
        *sources, target = words
        for source in (source_root / name.lstrip("/") for name in sources):
            destination = Path(below(self.root, target)) if target.startswith("/") else directory / target
            if source.is_dir():
                ignore = shutil.ignore_patterns(*self._ignored if source_root is self._context else ())
                shutil.copytree(source, destination, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy2(source, destination)


def _stand_in(base: str) -> str:
    wanted = re.match(r"python:(\d+\.\d+)-", base)
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if wanted is None or wanted[1] != ours:
        raise ReplayError(f"run this with the Python of {base}, not {ours}")
    return f"Python {ours} of this machine stands for it"


def _run(command: str, directory: Path, environment: Mapping[str, str]) -> None:
    print(f"-- RUN {command}", flush=True)
    paths = f"{Path(sys.base_prefix) / 'bin'}:{environment['PATH']}"  # `python` is the base image's, not a venv's
    result = subprocess.run(["/bin/sh", "-c", command], cwd=directory, env={**environment, "PATH": paths})
    if result.returncode:
        raise ReplayError(f"status {result.returncode} of: {command}")


@dataclass(frozen=True)
class Container:
    """What the last stage says of its start: to be run below `root`; `programs` is a folder found before its PATH."""

    stage: Stage
    root: Path
    programs: Path | None = None

    @classmethod
    def of(cls, stage: Stage, root: Path, programs: Path | None = None) -> Container:
        """A container over `root`, its volumes made and given to its user."""
        container = cls(stage, root, programs)
        for volume in container.volumes:
            volume.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(volume, *container.user)
        return container

    @property
    def user(self) -> tuple[int, int]:
        """The numbers of its user and group."""
        user, group = map(int, self.stage.last("USER").split(":"))
        return user, group

    @property
    def volumes(self) -> list[Path]:
        return [Path(below(self.root, volume)) for volume in json.loads(self.stage.last("VOLUME"))]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The image's and `given`, nothing of this machine's."""
        image = environment_of(self.stage, {"PATH": HOST_PATH})
        moved = {name: below(self.root, value) for name, value in image.items()}
        path = f"{self.programs}:{moved['PATH']}" if self.programs else moved["PATH"]
        return {**moved, "PATH": path, "HOME": "/nonexistent", **given}

    def start(self, given: Mapping[str, str], before: Sequence[str] = ()) -> subprocess.Popen[str]:
        """ENTRYPOINT and CMD as the image's user, standard error joined to standard output; `before` starts them."""
        return self._popen(self.stage.command("ENTRYPOINT") + self.stage.command("CMD"), given, before)

    def healthy(self, given: Mapping[str, str]) -> bool:
        """Whether HEALTHCHECK passes now."""
        check = self._popen(self.stage.command("HEALTHCHECK"), given)
        check.communicate()
        return check.returncode == 0

    def _popen(
        self, command: Sequence[str], given: Mapping[str, str], before: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        environment = self.environment(given)
        program = shutil.which(command[0], path=environment["PATH"])
        if program is None:
            raise ReplayError(f"the image has no program {command[0]}")
        return subprocess.Popen(
            [*before, *self._as_user(), program, *command[1:]],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _as_user(self) -> list[str]:
        """Root becomes the image's user, who may still read all of this machine's files, for Python lies among them."""
        if os.geteuid() != 0:
            return []
        user, group = self.user
        capabilities = "-all,+dac_read_search"
        return [
            "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs",
            f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}", f"--bounding-set={capabilities}",
        ]  # fmt: skip


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve_one_completion(container: Container, model: str = "demo") -> str:
    """Start the image with `model`, wait for its health check, ask for one completion, and end it with SIGTERM."""
    port = free_port()
    given = {"VBLORA_MODEL": model, "VBLORA_ALLOW_UNAUTHENTICATED": "true", "VBLORA_PORT": str(port)}
    began = time.monotonic()
    with container.start(given) as server:
        try:
            while not container.healthy(given):
                if server.poll() is not None or time.monotonic() - began > START_SECONDS:
                    server.kill()
                    raise ReplayError(f"the server is not healthy; it printed:\n{server.communicate()[0]}")
                time.sleep(1)
            print(f"-- healthy after {time.monotonic() - began:.0f} s", flush=True)
            answer = _complete(port)
            server.send_signal(signal.SIGTERM)
            if server.wait(STOP_SECONDS) != 0:
                raise ReplayError(f"SIGTERM ended the server with status {server.returncode}")
            return answer
        finally:
            server.kill()


def _complete(port: int) -> str:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        base = client.get("/v1/models").json()["data"][0]["id"]
        body = {"model": base, "prompt": "The harbour lies", "max_tokens": 8, "temperature": 0}
        reply = client.post("/v1/completions", json=body)
    if reply.status_code != 200:
        raise ReplayError(f"the server answered {reply.status_code}: {reply.text}")
    return str(reply.json()["choices"][0]["text"])


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    stages = read_stages(ROOT / "Dockerfile")
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the image's user passes through it
        build = Build(folder, ROOT)
        try:
            began = time.monotonic()
            build.run(stages)
            print(f"== installed in {time.monotonic() - began:.0f} s; the start, as USER {stages[-1].last('USER')}")
            answer = serve_one_completion(Container.of(stages[-1], build.root))
        except ReplayError as error:
            print(f"replay_image: {error}", file=sys.stderr)
            return 1
    print(f"== served: {answer!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
