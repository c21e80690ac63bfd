"""Pictures of patch tokens: their principal components as colours, and their nearest neighbours.

Legend: N images, L cells of the grid, row by row, C channels of a token, h w grid cells, q queries.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from tools.draw import USUAL, Display, Images, as_pixels, bands_of, load_images
from tools.features import ImageStream, last_tokens, load_backbone
from util.files.names import counted
from util.report import features

# Neighbours that are drawn, each from another image.
NEIGHBOURS = 5
# Colours span these percentiles of a component: single tokens far away would leave all others grey.
LOW, HIGH = 1, 99


# --- principal components


def pca(path: str, data_path: Images, n: int, foreground: bool = False, display: Display = USUAL) -> Figure:
    """A chart of the first three principal components of the last layer's tokens as red, green and blue.

    The components are those of all n images together. With `foreground`, cells whose first component is not
    above Otsu's threshold are black. The sign of the first component is then the one for which the cells at
    the border of the grid are below the others on average.
    """
    model, flags = load_backbone(path)
    batches, pixels = load_images(model, flags, data_path, n, display=display)
    images, _ = next(batches)
    device = next(model.parameters()).device
    parts = [last_tokens(model, part.to(device)) for part in images.split(16)]
    tokens = torch.cat(parts).flatten(0, 1).cpu()  # (N * L, C)
    scores, shares = principal_components(tokens)
    shown = torch.ones(len(scores), dtype=torch.bool)
    if foreground:
        scores[:, 0] *= border_sign(scores[:, 0].reshape(len(images), *model.grid))
        shown = scores[:, 0] > otsu(scores[:, 0])
    maps = colours(scores, shown).reshape(len(images), *model.grid, 3)
    bands = bands_of(model, flags, display)
    listed = ", ".join(f"{100 * share:.0f}" for share in shares)
    title = (
        f"first three principal components of the tokens ({listed} % of their variance) as red, green, blue"
    )
    if foreground:
        title += "; black: background"
    return features.components(as_pixels(images, pixels, bands), maps.numpy(), title + bands.note)


def principal_components(tokens: Tensor, count: int = 3) -> tuple[Tensor, list[float]]:
    """Scores (n, count), float64, of the largest components of tokens (n, C), and their shares of variance.

    The largest loading of each component is positive. Missing components, of C < count, are 0.
    """
    centred = tokens.double() - tokens.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.t() @ centred)
    # eigh sorts in rising order.
    vectors = vectors.flip(1)[:, :count]  # (C, count)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    scores = centred @ (vectors * largest.sign())
    total = max(float(values.clamp(min=0).sum()), 1e-300)
    shares = (values.clamp(min=0).flip(0)[:count] / total).tolist()
    return F.pad(scores, (0, count - scores.shape[1])), shares


def border_sign(values: Tensor) -> int:
    """1 or -1: the sign with which the border cells of maps (N, h, w) lie below the others on average."""
    border = torch.ones(values.shape[1:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if border.all():
        return 1
    if values[:, border].mean() > values[:, ~border].mean():
        return -1
    return 1


def otsu(values: Tensor) -> float:
    """Otsu's threshold of values (n,): the cut with the largest variance between the values on its two sides.

    It lies in the middle between two values; it is the value itself if all are equal.
    """
    ordered = values.double().sort().values
    n = len(ordered)
    below = torch.arange(1, n, dtype=torch.float64)
    sums = ordered.cumsum(0)
    difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * difference.square()
    # Equal values stay on one side.
    between[ordered[:-1] == ordered[1:]] = -1
    if n < 2 or between.max() < 0:
        return float(ordered[0])
    cut = int(between.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def colours(scores: Tensor, shown: Tensor) -> Tensor:
    """Scores (n, 3) as colours in [0, 1], each scaled to the values that are shown (n,); the others black."""
    out = torch.zeros_like(scores)
    if not shown.any():
        return out
    seen = scores[shown].numpy()
    low, high = torch.from_numpy(np.percentile(seen, (LOW, HIGH), axis=0))
    width = (high - low).clamp(min=1e-12)
    scaled = ((scores - low) / width).clamp(0, 1)
    # A component without differences is medium.
    scaled[:, high <= low] = 0.5
    out[shown] = scaled[shown]
    return out


# --- neighbours


@dataclass
class Search:
    """The most similar patch of each of the images that are most similar in this way, for q queries.

    Attributes:
        queries: (q, C), of length 1.
        own: (q,) the number of the image of each query, which is left out.
        k: number of neighbours.
        similarity: (q, <= k), falling.
        image, cell: (q, <= k) numbers.
        pixels: {number of an image: (H, W, 3)} of the images that are neighbours.
    """

    queries: Tensor
    own: Tensor
    k: int = NEIGHBOURS
    similarity: Tensor = field(init=False)
    image: Tensor = field(init=False)
    cell: Tensor = field(init=False)
    pixels: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.similarity = self.queries.new_zeros(len(self.queries), 0)
        self.image = self.own.new_zeros(len(self.queries), 0)
        self.cell = self.image

    def add(self, tokens: Tensor, numbers: list[int], shown: np.ndarray) -> None:
        """Search the tokens (B, L, C) of the images of these numbers, which look like `shown`."""
        similarity = torch.einsum("qc,blc->qbl", self.queries, F.normalize(tokens, dim=-1))
        best = similarity.max(-1)  # (q, B)
        images = torch.tensor(numbers, device=self.own.device)  # (B,)
        values = best.values.masked_fill(self.own[:, None] == images, -torch.inf)
        values = torch.cat([self.similarity, values], 1)
        images = torch.cat([self.image, images.expand(len(values), -1)], 1)
        cells = torch.cat([self.cell, best.indices], 1)
        self.similarity, order = values.topk(min(self.k, values.shape[1]), 1)
        self.image = images.gather(1, order)
        self.cell = cells.gather(1, order)
        # Only images that are still among the best stay in memory.
        self.pixels |= dict(zip(numbers, shown))
        kept = set(self.image.flatten().tolist())
        self.pixels = {number: picture for number, picture in self.pixels.items() if number in kept}

    def found(self, query: int) -> list[tuple[float, int, int]]:
        """(similarity, image, cell) of the neighbours of a query, the most similar one first."""
        columns = (self.similarity[query], self.image[query], self.cell[query])
        rows = zip(*(column.tolist() for column in columns))
        # Images that are the query's own have no similarity.
        return [row for row in rows if row[0] > -2]


def query_cells(grid: tuple[int, int]) -> list[int]:
    """The cells whose neighbours are drawn: the centre, and two between it and opposite corners."""
    h, w = grid
    places = [(h // 2, w // 2), (h // 4, w // 4), (3 * h // 4, 3 * w // 4)]
    # Small grids have fewer cells.
    return list(dict.fromkeys(row * w + column for row, column in places))


def neighbours(path: str, data_path: Images, n: int, bank: int, display: Display = USUAL) -> Figure:
    """A chart of the nearest patches, in other images, of some patches of n images.

    Patches are compared by the cosine similarity of their tokens in the last layer. `bank` is the number of
    images that are searched, the n among them. Raises ValueError if there is only one image.
    """
    model, flags = load_backbone(path)
    stream = ImageStream.open(model, flags, data_path, max(n, bank), display)
    bands = bands_of(model, flags, display)
    cells = query_cells(model.grid)
    n = min(n, stream.count)
    chosen = {i * stream.count // n for i in range(n)}
    tokens = []
    shown: dict[int, np.ndarray] = {}
    for numbers, images in stream.numbered(chosen.__contains__):
        tokens.append(last_tokens(model, images)[:, cells].flatten(0, 1))  # (B * cells, C)
        shown |= dict(zip(numbers, as_pixels(images.cpu(), stream.pixels, bands)))
    if stream.count < 2 or not shown:
        raise ValueError("neighbours are searched in other images, and there are none: give more images")
    own = torch.tensor(list(shown), device=tokens[0].device).repeat_interleave(len(cells))
    search = Search(F.normalize(torch.cat(tokens), dim=-1), own)
    for numbers, images in stream.numbered():
        looks = as_pixels(images.cpu(), stream.pixels, bands)
        search.add(last_tokens(model, images), numbers, looks)
    if note := stream.note():
        print(note)
    searched = stream.count - len(stream.bad)
    return _neighbours_chart(
        search, shown, cells, model.grid, f" in {counted(searched, 'image')}{bands.note}"
    )


def _neighbours_chart(
    search: Search, shown: dict[int, np.ndarray], cells: list[int], grid: tuple[int, int], where: str
) -> Figure:
    """The chart of a search whose queries are the same cells of each of the images `shown`."""
    rows = []
    same = []
    for query, own in enumerate(search.own.tolist()):
        cell = cells[query % len(cells)]
        row = [features.PatchView(shown[own], cell, f"cell {_place(cell, grid)}")]
        for similarity, image, there in search.found(query):
            text = f"{similarity:.2f}, cell {_place(there, grid)}"
            row.append(features.PatchView(search.pixels[image], there, text))
            same.append(there == cell)
        rows.append(row)
    title = f"nearest patches{where} by cosine similarity; cells are row and column"
    if same:
        chance = 100 / (grid[0] * grid[1])
        title += f"\n{100 * np.mean(same):.0f} % lie in the cell of the query, chance {chance:.1f} %"
    return features.neighbours(rows, grid, title)


def _place(cell: int, grid: tuple[int, int]) -> str:
    row, column = divmod(cell, grid[1])
    return f"{row} {column}"
