"""Every place that lets PIL open a file names the formats; others could start programs."""

import ast

import pytest
from test_house import FILES, ROOT

DEMO = [*(ROOT / "data").rglob("*.py")]
# Functions that open an image in any format that they know.
OPENERS = {"imread", "read_image", "decode_image", "default_loader", "pil_loader"}
# Where readers of other packages call `Image.open` themselves, and get ours instead.
REPLACED = {"util/data/timm_datasets.py"}


def name_of(node: ast.AST) -> str:
    """The name of a function as it is called: `Image.open` of `PIL.Image.open(...)`."""
    if isinstance(node, ast.Attribute):
        value = node.value
        if isinstance(value, (ast.Attribute, ast.Name)):
            return f"{getattr(value, 'attr', getattr(value, 'id', ''))}.{node.attr}"
        return node.attr
    return getattr(node, "id", "")


def faults(code: str) -> list[int]:
    """The lines that open an image without a list of formats."""
    tree = ast.parse(code)
    lines = []
    listed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name == "Image.open" and any(word.arg == "formats" for word in node.keywords):
                listed.add(node.func)
            if name.rpartition(".")[2] in OPENERS:
                lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module == "PIL.Image" and "open" in names) or names & OPENERS:
                lines.append(node.lineno)
    for node in ast.walk(tree):
        # Also where the function is only named, to be called elsewhere.
        if isinstance(node, ast.Attribute) and name_of(node) == "Image.open" and node not in listed:
            lines.append(node.lineno)
        if name_of(node) in ("ImageFile.Parser", "Image.init"):
            lines.append(node.lineno)
    return sorted(lines)


def test_images_are_opened_with_a_list_of_formats():
    found = {str(path.relative_to(ROOT)): faults(path.read_text()) for path in [*FILES, *DEMO]}
    assert {name for name, lines in found.items() if lines} == REPLACED, found


@pytest.mark.parametrize(
    "code",
    [
        "Image.open(file)",
        "with PIL.Image.open(io.BytesIO(data), 'r') as image: pass",
        "from PIL.Image import open as read",
        "sizes = map(Image.open, files)",
        "x = torchvision.io.read_image(path)",
        "from torchvision.datasets.folder import default_loader",
        "p = ImageFile.Parser()",
        "pixels = plt.imread(path)",
    ],
)
def test_a_place_without_a_list_is_found(code):
    assert faults(code)


def test_a_place_with_a_list_is_accepted():
    assert not faults("image = Image.open(file, formats=('PNG',))\nopen(path)\ndecode_jpeg(data)")
