"""The picture of the page as SVG: kept patches outlined by group, each patch with a sentence that says its fate."""

import base64
import html
import io
from collections.abc import Callable

import torch
from PIL import Image

from modeling_prunesid.visualize import Explanation, shown_part


# Okabe and Ito's colours for the colour-blind; groups beyond seven differ by the dashes of their lines.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
DASHES = ("", "6 3", "2 2")
BOTH, ONLY_A, ONLY_B = ("#F0E442", ""), ("#E69F00", "6 3"), ("#56B4E9", "2 2")
CELL = 24  # pixels of a patch in the embedded JPEG, at most
LARGEST = 960


def draw(picture: Image.Image, seen: Explanation) -> str:
    """The picture with outlines by group and a sentence for each patch, shown when it is pointed at."""
    style = style_by_group(seen)
    sentences = describe(seen)
    kept = set(seen.kept.tolist())
    label = (
        f"The picture in {seen.grid[0]} rows and {seen.grid[1]} columns of squares. {len(kept)} of "
        f"{len(sentences)} are kept. The arrow keys go from square to square."
    )
    return _figure(
        _svg(picture, seen, kept, style, label, sentences),
        "Point at a square, tap it, or click the picture and use the arrow keys: its story appears here.",
    )


def draw_whole(picture: Image.Image, grid: tuple[int, int], is_cropped: bool = False) -> str:
    """The picture of which nothing is dropped."""
    everything = Explanation(torch.arange(grid[0] * grid[1]), None, None, None, grid, is_cropped)
    svg = _svg(picture, everything, set(everything.kept.tolist()), lambda index: ("", ""), "The whole picture", None)
    return _figure(svg, "All squares are kept.")


def draw_small(picture: Image.Image, seen: Explanation, caption: str) -> str:
    """The picture with its kept patches, without sentences."""
    kept = set(seen.kept.tolist())
    svg = _svg(picture, seen, kept, style_by_group(seen), f"{caption}: {len(kept)} squares are kept", None)
    return f'<figure class="ps-small">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def draw_pair(picture: Image.Image, first: Explanation, second: Explanation, names: tuple[str, str]) -> str:
    """The choices of two methods beside each other: patches in common, and those of one alone."""
    kept = set(first.kept.tolist()), set(second.kept.tolist())
    both = kept[0] & kept[1]
    figures = []
    for seen, own, name, alone in zip((first, second), kept, names, (ONLY_A, ONLY_B)):

        def style(index: int, alone: tuple[str, str] = alone) -> tuple[str, str]:
            return BOTH if index in both else alone

        svg = _svg(picture, seen, own, style, f"{name}: {len(own)} squares, {len(both)} of them in common", None)
        caption = f"{html.escape(name)}: {len(own)} squares"
        figures.append(f'<figure class="ps-half">{svg}<figcaption>{caption}</figcaption></figure>')
    legend = "".join(
        f'<li><svg viewBox="0 0 20 12" width="30" height="18" aria-hidden="true"><rect x="2" y="2" width="16" '
        f'height="8" fill="#222"/>{_line("M2 2H18V10H2Z", style)}</svg> {text}</li>'
        for style, text in (
            (BOTH, f"{len(both)} kept by both"),
            (ONLY_A, f"{len(kept[0] - both)} only by {html.escape(names[0])}"),
            (ONLY_B, f"{len(kept[1] - both)} only by {html.escape(names[1])}"),
        )
    )
    return f'<div class="ps-pair">{"".join(figures)}</div><ul class="ps-legend">{legend}</ul>'


def style_by_group(seen: Explanation) -> Callable[[int], tuple[str, str]]:
    """Colour and dashes of the outline of a kept patch."""
    if seen.groups is None:
        return lambda index: (COLOURS[0], "")
    ranks = {group: rank for rank, group in enumerate(sorted(set(seen.groups[seen.kept].tolist())))}

    def style(index: int) -> tuple[str, str]:
        rank = ranks[int(seen.groups[index])]
        return COLOURS[rank % len(COLOURS)], DASHES[rank // len(COLOURS) % len(DASHES)]

    return style


def describe(seen: Explanation) -> list[str]:
    """A sentence or two for each patch: where it is, whether it is kept, its group and score, and what it was like."""
    kept = set(seen.kept.tolist())
    likeness = None
    if seen.compared is not None:
        units = torch.nn.functional.normalize(seen.compared, dim=-1)
        likeness = units @ units.T
        to_kept, nearest = likeness[:, seen.kept].max(1)
        nearest = seen.kept[nearest]
    num_groups = 0 if seen.groups is None else int(seen.groups.max()) + 1
    groups = seen.groups if num_groups > 1 else None
    ranks = None if groups is None or seen.scores is None else _ranks(groups, seen.scores)
    sentences = []
    for index in range(seen.grid[0] * seen.grid[1]):
        words = [f"{_place(index, seen).capitalize()}: {'kept' if index in kept else 'dropped'}."]
        by = -1 if seen.suppressors is None else int(seen.suppressors[index])
        if likeness is None:
            pass
        elif index not in kept and by >= 0:
            fate = "kept" if by in kept else "better"
            words.append(f"Suppressed by the {fate} square in {_place(by, seen)}, {likeness[index, by]:.0%} alike.")
        elif index not in kept and groups is not None and seen.suppressors is not None:
            words.append("No near-copy, but its group's share was used up by better squares.")
        elif index not in kept:
            words.append(f"The most alike kept square is in {_place(nearest[index], seen)}: {to_kept[index]:.0%}.")
        elif by >= 0:
            words.append("A near-copy, kept to fill the budget.")
        if groups is not None:
            words.append(f"Group {int(groups[index]) + 1} of {num_groups}.")
        if seen.scores is not None:
            rank = "" if ranks is None else f", rank {ranks[index][0]} of {ranks[index][1]} in its group"
            words.append(f"Score {float(seen.scores[index]):.3g}{rank}.")
        sentences.append(" ".join(words))
    return sentences


def explain_numbers(seen: Explanation, where: str = "reach the language model") -> str:
    """What rho, phi and tau of this picture say, in sentences."""
    total, count = seen.grid[0] * seen.grid[1], len(seen.kept)
    text = f"<p><b>{count} of {total} squares are bright: only these {where}.</b> "
    if seen.groups is not None and len(set(seen.groups[seen.kept].tolist())) > 1:
        text += "Groups gather squares that look alike. A line goes around neighbours of one group, in its colour. "
    text += "</p><p>"
    if seen.rho is not None:
        text += (
            f"Redundancy <b>&rho; = {seen.rho:.2f}</b>: two squares of this picture are {seen.rho:.0%} alike on "
            f"average. Information <b>&phi; = 1 &minus; &rho; = {1 - seen.rho:.2f}</b>: the less its squares repeat "
            "each other, the more there is to see. "
        )
    if seen.tau is None:
        text += "This method has no threshold &tau;."
    elif seen.tau > 1:
        text += (
            f"Threshold <b>&tau; = {seen.tau:.2f}</b>: nothing is more than 100% alike, so no square is suppressed."
        )
    else:
        text += (
            f"Threshold <b>&tau; = {seen.tau:.2f}</b>: a square that is at least {seen.tau:.0%} like a better one of "
            "its group is suppressed as a near-copy."
        )
    return text + "</p>"


def _place(index: int | torch.Tensor, seen: Explanation) -> str:
    row, column = divmod(int(index), seen.grid[1])
    return f"row {row + 1}, column {column + 1}"


def _ranks(groups: torch.Tensor, scores: torch.Tensor) -> list[tuple[int, int]]:
    """Rank by score of each token in its group, and the size of that."""
    ranks = [(0, 0)] * len(groups)
    for group in set(groups.tolist()):
        members = (groups == group).nonzero()[:, 0]
        best_first = members[scores[members].argsort(descending=True, stable=True)].tolist()
        for rank, index in enumerate(best_first, 1):
            ranks[index] = rank, len(best_first)
    return ranks


def _figure(svg: str, hint: str) -> str:
    readout = f'<figcaption class="ps-readout" aria-live="polite">{hint}</figcaption>'
    return f'<figure class="ps-picture">{svg}{readout}</figure>'


def _svg(
    picture: Image.Image,
    seen: Explanation,
    kept: set[int],
    style: Callable[[int], tuple[str, str]],
    label: str,
    sentences: list[str] | None,
) -> str:
    rows, columns = seen.grid
    cells = []
    for index in range(rows * columns):
        y, x = divmod(index, columns)
        fate = "ps-kept" if index in kept else "ps-dropped"
        place = f'<rect class="{fate}" x="{x}" y="{y}" width="1" height="1"'
        if sentences is None:
            cells.append("" if index in kept else f"{place}/>")
            continue
        by = -1 if seen.suppressors is None else int(seen.suppressors[index])
        link = f' data-by="{by}"' if by >= 0 else ""
        cells.append(f'{place} data-i="{index}"{link}><title>{html.escape(sentences[index])}</title></rect>')
    keyboard = "" if sentences is None else f' tabindex="0" data-columns="{columns}"'
    mark = "" if sentences is None else '<g class="ps-mark"><path/><path/></g>'
    role = "img" if sentences is None else "application"
    label = html.escape(label)
    return (
        f'<svg class="ps-svg" viewBox="0 0 {columns} {rows}" role="{role}" aria-label="{label}"{keyboard}>'
        f'<image href="{_jpeg(picture, seen, sentences is None)}" width="{columns}" height="{rows}" '
        f'preserveAspectRatio="none"/>{"".join(cells)}{"".join(_outlines(seen, kept, style))}{mark}</svg>'
    )


def _outlines(seen: Explanation, kept: set[int], style: Callable[[int], tuple[str, str]]) -> list[str]:
    """A path for each style around the runs of kept neighbours that belong together."""
    rows, columns = seen.grid
    if len(kept) == rows * columns:
        return []

    def key(index: int):
        return style(index), None if seen.groups is None else int(seen.groups[index])

    by_style: dict[tuple[str, str], list[str]] = {}
    for index in sorted(kept):
        row, column = divmod(index, columns)
        left, top, right, bottom = column + 0.07, row + 0.07, column + 0.93, row + 0.93
        sides = (
            (row > 0, index - columns, f"M{left:g} {top:g}H{right:g}"),
            (row < rows - 1, index + columns, f"M{left:g} {bottom:g}H{right:g}"),
            (column > 0, index - 1, f"M{left:g} {top:g}V{bottom:g}"),
            (column < columns - 1, index + 1, f"M{right:g} {top:g}V{bottom:g}"),
        )
        for is_inside, other, line in sides:
            if not (is_inside and other in kept and key(other) == key(index)):
                by_style.setdefault(style(index), []).append(line)
    return [_line("".join(lines), own) for own, lines in by_style.items()]


def _line(path: str, style: tuple[str, str]) -> str:
    colour, dashes = style
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path class="ps-casing" d="{path}"/><path class="ps-line" d="{path}" stroke="{colour}"{dashed}/>'


def _jpeg(picture: Image.Image, seen: Explanation, is_small: bool) -> str:
    rows, columns = seen.grid
    picture = shown_part(picture, seen)
    scale = min(CELL // 2 if is_small else CELL, LARGEST / max(rows, columns))
    picture = picture.resize((max(round(columns * scale), 1), max(round(rows * scale), 1)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
