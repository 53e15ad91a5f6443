"""The wheel, built and installed into an environment of its own that sees the packages of this one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installed:
    """folder: of the environment; project: a folder of the user's, first on the path of every process."""

    folder: Path
    project: Path

    @property
    def packages(self) -> Path:
        """The folder that packages are installed into."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of a process in it: no setting of this process's servers, the user's folder first."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        path = f"{self.folder / 'bin'}:{kept['PATH']}"
        return {**kept, "PATH": path, "PYTHONPATH": str(self.project), "HF_HUB_OFFLINE": "1", **more}

    def command(self, *words: str | Path) -> list[str]:
        """A program of the environment as a command."""
        return [str(self.folder / "bin" / words[0]), *map(str, words[1:])]

    def run(self, *words: str | Path, more: Mapping[str, str] | None = None) -> str:
        """What a program of the environment prints; raises AssertionError with all of it where it fails."""
        done = subprocess.run(
            self.command(*words), cwd=self.project, env=self.environment(**(more or {})), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def fails(self, *words: str | Path) -> str:
        """What a program of the environment prints while it fails; raises AssertionError where it does not."""
        done = subprocess.run(
            self.command(*words), cwd=self.project, env=self.environment(), capture_output=True, text=True
        )
        assert done.returncode != 0, done.stdout
        return done.stdout + done.stderr

    def install(self, wheel: Path) -> None:
        """Install a wheel, without looking for what it needs: that is there."""
        self.run("python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)


def built_wheel(source: Path, folder: Path) -> Path:
    """The wheel of the project in `source`, written into `folder`."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(folder: Path) -> Installed:
    """An environment with our wheel in it. The packages of this environment are on its path, but not our checkout:
    an editable install is a .pth file, and these are read in an environment's own folder only."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
    project = folder / "project"
    project.mkdir()
    environment = Installed(folder / "environment", project)
    (environment.packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment.install(built_wheel(REPOSITORY, folder / "dist"))
    return environment
