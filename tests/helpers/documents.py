"""Code blocks of the README and the documentation, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
LANGUAGES = ("sh", "python", "yaml", "toml", "text", "math", "bibtex")
_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)\n\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language, its code."""

    page: str
    language: str
    code: str


@dataclass(frozen=True)
class Command:
    """One command of a shell block, without its comment."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def coma(self) -> list[str] | None:
        """What follows the word `coma`, also behind torchrun; None for other programs."""
        if self.words[0] == "coma":
            return list(self.words[1:])
        if self.words[0] == "torchrun":
            cut = self.words.index("-m")
            assert self.words[cut + 1] == "coma", self.text
            return list(self.words[cut + 2 :])
        return None


def blocks(pages: tuple[Path, ...] = PAGES) -> Iterator[Block]:
    for page in pages:
        for indent, language, code in _BLOCK.findall(page.read_text()):
            lines = (line.removeprefix(indent) for line in code.splitlines())
            yield Block(str(page.relative_to(ROOT)), language, "\n".join(lines))


def commands(found: list[Block]) -> list[Command]:
    lines = [
        (block.page, line)
        for block in found
        if block.language == "sh"
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    split = [(page, tuple(shlex.split(line, comments=True))) for page, line in lines]
    return [Command(page, words) for page, words in split if words]
