"""The README and docs: their Python blocks run, and the files, links and recipes that they name exist."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from documentation import PAGES, ROOT, fenced_lines, prose

from meshpipe.version import __version__

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")

SLOW = {"generation.md", "patterns.md", "graphs.md", "use.md", "coming_from.md"}
"""Pages whose Python blocks compile several models."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_source(text: str) -> str:
    """The Python blocks at the lines where they stand in the page, so that a traceback names the page's own line."""
    return "\n".join(line if language == "python" else "" for language, line in fenced_lines(text))


def anchors(text: str) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree_paths(text: str) -> list[str]:
    """The paths in the block after the marker `<!-- tree -->`, whose folders are two spaces deeper each."""
    block = text.split("<!-- tree -->\n```text\n")[1].split("```")[0]
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ()) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    source = python_source(page.read_text())
    if not source.strip():
        pytest.skip("no Python blocks")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    script = tmp_path / f"{page.stem}.py"
    script.write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{page.name} stops at the line shown (lines are the page's own):\n{result.stderr}"


@pages
def test_relative_links_resolve(page: Path) -> None:
    for match in LINK.finditer(prose(page.read_text())):
        target = match[1] or match[2]
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file.read_text()), f"{page.name} links to {target}: no such heading"


@pages
def test_recipes_named_in_commands_exist(page: Path) -> None:
    for file, function in re.findall(r"\b(recipes/\w+\.py):(\w+)", page.read_text()):
        body = ast.parse((ROOT / file).read_text()).body
        functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{page.name} names {file}:{function}; the file has {sorted(functions)}"


def test_readme_tree_names_what_exists() -> None:
    missing = [path for path in tree_paths((ROOT / "README.md").read_text()) if not (ROOT / path).exists()]
    assert not missing


def test_readme_tree_leaves_no_folder_out() -> None:
    named = set(tree_paths((ROOT / "README.md").read_text()))
    modules = [path for path in (ROOT / "meshpipe").glob("*") if not path.name.startswith("__")]
    paths = {str(path.relative_to(ROOT)) + "/" * path.is_dir() for path in modules}
    unnamed = {path for path in paths - named if not path.endswith("py.typed")}
    assert not unnamed


def test_architecture_shows_the_folders_in_the_order_that_is_checked() -> None:
    contract, *_ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    block = (ROOT / "docs" / "architecture.md").read_text().split("## Imports")[1].split("```text\n")[1].split("```")[0]
    assert [set(line.split()) for line in block.splitlines()] == [set(line.split(" | ")) for line in contract["layers"]]


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert citation["license"] == project["license"]
    assert "version" not in citation, "the version stands in one place"


def test_the_changelog_begins_with_the_present_version() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "docs" / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1].rstrip(",") == __version__
