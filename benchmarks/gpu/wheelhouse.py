"""Downloads the wheels that a GPU machine without a network lacks.

`python -m benchmarks.gpu.wheelhouse FOLDER` takes the requirements of `pyproject.toml` with their
own requirements, and other implementations of deformable attention without theirs. The machine has
Linux on x86-64, Python 3.12, and PyTorch with what that needs.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PRESENT = ("torch", "torchvision", "triton", "numpy", "pillow", "typing-extensions")
"""With PyTorch and torchvision."""
PEERS = ("deformops==3.0.1", "libreyolo==1.6.0")
MAX_MEGABYTES = 60
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_MACHINE = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}


def project_requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """What the package and its tests require."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    names = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [Requirement(name) for name in names]


def needed(requirements: Iterable[Requirement], present: Iterable[str]) -> dict[str, str]:
    """The requirements that apply to the machine and that it lacks, by canonical name."""
    has = set(map(canonicalize_name, present))
    return {
        name: f"{requirement.name}{requirement.specifier}"
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(_MACHINE)
        if (name := canonicalize_name(requirement.name)) not in has
    }


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel requires."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    return list(map(Requirement, metadata.get_all("Requires-Dist", ())))


def download(folder: Path, present: Iterable[str]) -> None:
    """Download all wheels into an empty folder."""
    _download(folder, PEERS)
    done = set(present) | {Requirement(peer).name for peer in PEERS}
    wanted = needed(project_requirements(), done)
    while wanted:
        before = set(folder.glob("*.whl"))
        _download(folder, wanted.values())
        done |= wanted.keys()
        new = set(folder.glob("*.whl")) - before
        wanted = needed((x for wheel in new for x in requirements_of(wheel)), done)


def _download(folder: Path, requirements: Iterable[str]) -> None:
    platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--dest"]
    subprocess.run([*command, str(folder), *requirements], check=True)


def main() -> int:
    """Download, and list the sizes; the exit status is 1 if they are too large together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--present", nargs="*", default=[], help="further packages it has")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for wheel in options.folder.glob("*.whl"):
        wheel.unlink()
    download(options.folder, (*PRESENT, *options.present))
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in options.folder.glob("*.whl")}
    for name, size in sorted(sizes.items()):
        print(f"{size:6.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total:6.2f} MB  in {options.folder}, at most {MAX_MEGABYTES}")
    return int(total > MAX_MEGABYTES)


if __name__ == "__main__":
    raise SystemExit(main())
