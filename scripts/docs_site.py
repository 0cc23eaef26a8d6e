"""What mkdocs builds beside the pages of docs/: the reference, and files of the repository.

mkdocs calls the functions ``on_...``. The reference of Python comes from the docstrings of all
public names, the reference of the command line from its parser, so neither can lag behind the code.
A link of a page to a file outside docs/ leads to a copy of that file under ``repository/``.
"""

from __future__ import annotations

import importlib
import json
import posixpath
import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
COPIES = "repository/"
"""Folder of the site for files outside docs/."""

PACKAGES = (
    *("tinyvit", "tinyvit.sam", "tinyvit.inference", "tinyvit.modules", "tinyvit.checkpoints"),
    *("tinyvit.train", "tinyvit.evaluate", "tinyvit.embed", "tinyvit.export", "tinyvit.serve"),
)
"""Packages with public names, each a page of the reference."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files outside docs/ which pages link to."""
    for package in PACKAGES:
        text = _python_page(package)
        files.append(File.generated(config, f"reference/{package}.md", content=text))
    files.append(File.generated(config, "reference/commands.md", content=_commands_page()))
    wanted = [
        ROOT / "docs" / page.src_uri
        for page in files.documentation_pages()
        if (ROOT / "docs" / page.src_uri).exists()
    ]
    wanted += [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/*.md")]
    seen = set()
    while wanted:
        page = wanted.pop()
        if page in seen:
            continue
        seen.add(page)
        uri = _site_uri(page)
        if uri.startswith(COPIES):
            files.append(File.generated(config, uri, abs_src_path=str(page)))
        if page.suffix == ".md":
            targets = LINK.findall(_prose(page.read_text(encoding="utf-8")))
            paths = [(page.parent / link.partition("#")[0]).resolve() for _, link, _ in targets]
            wanted += [path for path in paths if path.is_file() and ROOT in path.parents]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of a page lead to the places that files have on the site."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    source = ROOT / uri.removeprefix(COPIES) if uri.startswith(COPIES) else ROOT / "docs" / uri

    def on_site(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        file, hash_sign, anchor = link.partition("#")
        target = (source.parent / file).resolve()
        if "://" in link or not file or not target.exists() or ROOT not in target.parents:
            return match.group()
        relative = posixpath.relpath(_site_uri(target), posixpath.dirname(uri) or ".")
        return f"{before}{relative}{hash_sign}{anchor}{after}"

    parts = re.split(r"(^```.*?^```\s*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(on_site, part) for part in parts)


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```\s*$", "", text, flags=re.DOTALL | re.MULTILINE)


def _site_uri(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return relative[len("docs/") :] if relative.startswith("docs/") else COPIES + relative


def _python_page(package: str) -> str:
    module = importlib.import_module(package)
    blocks = [f"# {package}", str(module.__doc__)]
    for name in sorted(name for name in module.__all__ if not name.startswith("__")):
        defined = getattr(module, name)
        own = getattr(defined, "__name__", name)
        home = getattr(defined, "__module__", "")
        if own == name or not home.startswith("tinyvit."):
            blocks.append(f"::: {package}.{name}")
        else:  # a second name for something: shown once, where it is defined
            first = f"{home.rpartition('.')[0]}.{own}"
            blocks.append(f"## {name} {{ #{package}.{name} }}\n\nThe same as [`{first}`][{first}].")
    return "\n\n".join(blocks) + "\n"


def _commands_page() -> str:
    from tinyvit.cli.main import app

    command = typer.main.get_command(app)
    lines = ["# Command line", "", "Made from the parser: what `tinyvit VERB --help` says.", ""]
    context = typer.Context(command, info_name="tinyvit")
    lines += ["```text", command.get_help(context).strip(), "```", ""]
    verbs = json.loads((ROOT / "tests/data/snapshots/flags.json").read_text(encoding="utf-8"))
    for name in verbs:
        sub, sub_context = command, context
        for word in name.split():
            sub = sub.commands[word]
            sub_context = typer.Context(sub, info_name=word, parent=sub_context)
        lines += [f"## tinyvit {name}", "", "```text", sub.get_help(sub_context).strip(), "```", ""]
    return "\n".join(lines)
