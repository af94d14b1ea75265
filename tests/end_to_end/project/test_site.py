"""Documents: the README is short, links and files exist, the site needs no network."""

import os
import re
import subprocess
import sys

import pytest
from documents import PAGES, ROOT

from coma import cli


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_and_files_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_files_that_documents_name_exist():
    for page in PAGES:
        for path in re.findall(
            r"(?:benchmarks|coma|export|downstream|tests)/[\w/]+\.(?:py|json|md)", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.relative_to(ROOT)}: {path}"


@pytest.mark.slow
def test_the_site_builds_without_a_network(tmp_path):
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, **dead, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(https?:)?//|<link[^>]+href="https?://', page.read_text()
        )
        assert not loaded, page
    commands_page = (tmp_path / "site" / "reference" / "cli.html").read_text()
    assert all(f"coma {name}" in commands_page for name in cli.find_commands())
