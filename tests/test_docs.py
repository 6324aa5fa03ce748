"""Tests of the documentation: links resolve, and the tree of files in it matches the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def heading_anchors(page):
    """The anchors that GitHub generates from headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in heading_anchors(linked), f"{page.name}: {target}"


def test_the_page_of_the_package_index_has_no_relative_link():
    page = (ROOT / "docs" / "package_index.md").read_text(encoding="utf-8")
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)\s]+)\)", page))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_the_tree_in_the_docs_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("```")[1]
    named = {match for match in re.findall(r"^([a-z_]+\.py)", tree, flags=re.MULTILINE)}
    packages = {match for match in re.findall(r"^  ([a-z_]+)/", tree, flags=re.MULTILINE)}
    assert named == {path.name for path in ROOT.glob("*.py")}
    assert packages == {path.parent.name for path in ROOT.glob("ieft/*/__init__.py")}
