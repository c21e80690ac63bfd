"""The pages agree with the checkout: links and pictures, anchors, commands, and the menu of the web site."""

import functools
import os
import re
import shlex
from pathlib import Path

import pytest
from test_house import ROOT

from util.cluster.launch import add_cluster_flags
from util.flags import parser

PAGES = [
    *(ROOT / "docs").glob("*.md"),
    *ROOT.glob("*.md"),
    ROOT / "benchmarks" / "README.md",
    ROOT / "recipes" / "LOG.md",
]
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python|torchrun)\b.*?\b((?:main|submitit)_\w+|checkpoints|visualize)\.py\s+(.*)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower().strip()).replace(" ", "-")
        number = sum(anchor == re.sub(r"-\d+$", "", other) for other in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def broken(page: Path, text: str) -> list[str]:
    """The links of a page to files and headings that do not exist."""
    found = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        leads = target.exists() and target.is_relative_to(ROOT)
        if leads and anchor:
            leads = anchor in anchors(text if target == page else target.read_text())
        if not leads:
            found.append(link)
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a page, in blocks and in line: the module, and the words after it."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    found = []
    for line in [*blocks, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]:
        match = COMMAND.match(line.strip())
        # A command with dots is an excerpt.
        if match and "..." not in match[2]:
            found.append((match[1], shlex.split(match[2], comments=True)))
    return found


@functools.cache
def parser_of(name: str):
    """The parser of a script; that of a launcher has the flags of its main, too. torch is not imported."""
    if not name.startswith("submitit_"):
        return parser.parser_of(name)
    main = parser.parser_of(name.replace("submitit", "main"))
    everything = parser.Parser(parents=[main], conflict_handler="resolve")
    add_cluster_flags(everything)
    return everything


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    assert not broken(page, page.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/nothing.md)",
        "![a](docs/nothing.png)",
        "[a](docs/data.md#nothing)",
        "[a](#nothing)",
        "[a](../outside.md)",
        "```\n# A title\n```\n[a](#a-title)",
    ],
)
def test_a_broken_link_is_found(text):
    assert len(broken(ROOT / "README.md", text)) == 1


def test_anchors_are_those_of_github():
    text = "# Swin's cells, `a_b`: x + y\n## One\n## One\n### See [this](RESULTS.md)\n```\n# no title\n```\n"
    assert anchors(text) == {"swins-cells-a_b-x--y", "one", "one-1", "see-this"}
    assert not broken(ROOT / "README.md", f"{text}[a](#one-1) [b](https://x.org/y) [c](docs/data.md#formats)")


def test_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [command for page in PAGES[:-2] for command in commands(page.read_text())]
    assert len(found) > 60
    for name, words in found:
        # What follows --then belongs to another main.
        words = words[: words.index("--then")] if "--then" in words else words
        # Examples write recipes of their own.
        words = [word for word in words if not word.startswith("@runs/")]
        try:
            parser_of(name).parse_args(words)
        except SystemExit:
            pytest.fail(f"{name} {' '.join(words)}")


def test_a_command_that_does_not_parse_is_found():
    block = "```sh\npython main_pretrain.py --epochs 3 \\\n    --mask 1   # a note\n```\n"
    found = commands(f"{block}`python visualize.py`, `python main_sere.py ...`, `python main_sere.py -h`")
    assert found == [("main_pretrain", ["--epochs", "3", "--mask", "1"]), ("main_sere", ["-h"])]
    with pytest.raises(SystemExit):
        parser_of("main_pretrain").parse_args(["--no_such_flag", "1"])


def test_the_menu_of_the_site_has_every_page():
    menu = re.findall(r"^ +- .*: (docs/\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))


def test_the_readme_is_a_page_and_names_the_tests():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and "\nmake test" in text
    linked = set(LINK.findall(text))
    for page in (ROOT / "docs").glob("*.md"):
        assert any(link.startswith(f"docs/{page.name}") for link in linked), page.name
