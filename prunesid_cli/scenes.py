"""Synthetic scenes with exact answers: small pictures on photographs, and questions about them.

A scene is a 336 x 336 picture that `make_scene(variant, split, seed)` always draws the same way. It holds two or
three kinds of small emoji (42-52 px, up to three of a kind), perhaps one printed word and one printed digit, on a crop
of a photograph. Questions are about what is drawn, not about what the photograph happens to show. Two variants:

- `salient`: opaque emoji and white signs on a photograph. What matters stands out.
- `context`: emoji blend into the picture, text is printed without a sign in a shade of its background, bright confetti
  that no question asks about draws the eye, and bands of a coloured, repeating material (a floor, a wall) can be asked
  about themselves.

Question types follow the benchmarks of visual-token pruning: `presence` (POPE: as many yes as no, half of the
negatives from the family of something shown), `count` (1 to 3), `where` (quadrant), `colour`, `reading` (TextVQA's
role) and `region` (material and colour of a band, what lies behind an object).

The splits share no photograph: near-duplicate photographs are kept together, and the material textures are cut into
disjoint strips. Seeds of the splits are independent streams.

What it needs beside the package: its `demo` extra; `parts.py` fetches the interiors.
Licenses: photographs under the Pexels license, from scikit-image (public domain, CC0 and its listed sources) and from
scikit-learn (CC BY); `scenes_emoji.ttf` is a subset of Noto Color Emoji (SIL OFL 1.1); DejaVu comes with matplotlib.

    python -m prunesid_cli.scenes --out scenes.png --split train      # a contact sheet with one question of each type
"""

import argparse
import functools
import random
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prunesid_cli.images import open_image
from prunesid_cli.parts import INTERIOR_PHOTOS, fetch


SIZE = 336
PATCH = 14
VARIANTS = ("salient", "context")
SPLITS = ("train", "val", "test")
KINDS = ("presence", "count", "where", "colour", "reading", "region")

FAMILIES = {
    "animal": {
        "cat": "\U0001f431", "dog": "\U0001f436", "pig": "\U0001f437", "frog": "\U0001f438",
        "panda": "\U0001f43c", "penguin": "\U0001f427", "fish": "\U0001f41f", "butterfly": "\U0001f98b",
    },
    "food": {
        "banana": "\U0001f34c", "pizza": "\U0001f355", "burger": "\U0001f354", "cake": "\U0001f382",
        "mushroom": "\U0001f344",
    },
    "vehicle": {
        "bus": "\U0001f68c", "bicycle": "\U0001f6b2", "boat": "\u26f5", "rocket": "\U0001f680", "train": "\U0001f682",
    },
    "thing": {
        "clock": "\u23f0", "key": "\U0001f511", "guitar": "\U0001f3b8", "ball": "\u26bd", "tree": "\U0001f332",
        "camera": "\U0001f4f7",
    },
    "painted": {
        "car": "\U0001f697", "shirt": "\U0001f455", "balloon": "\U0001f388", "heart": "\u2764", "book": "\U0001f4d5",
        "umbrella": "\u2602",
    },
}  # fmt: skip
EMOJI = {noun: glyph for family in FAMILIES.values() for noun, glyph in family.items()}
FAMILY_OF = {noun: name for name, family in FAMILIES.items() for noun in family}
NOUNS = tuple(EMOJI)
PAINTED = tuple(FAMILIES["painted"])
COLOURS = {
    "red": (214, 40, 40), "yellow": (245, 205, 40), "green": (50, 160, 60), "blue": (45, 95, 215),
    "purple": (140, 60, 185), "black": (45, 45, 48),
}  # fmt: skip
BAND_COLOURS = ("red", "yellow", "green", "blue", "purple")
MATERIALS = ("brick", "grass", "gravel", "wood", "tiles")
WORDS = ("exit", "open", "sale", "taxi", "stop", "menu", "news", "cafe", "milk", "park", "bank", "hotel")
DIGITS = tuple("0123456789")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")

TEMPLATES = {
    "presence": ("is there any {} in the picture?", "do you see any {}?"),
    "count": ("how many times does the {} appear?", "count the {}."),
    "where": ("where is the {}?", "in which corner is the {}?"),
    "colour": ("what colour is the {}?", "which colour does the {} have?"),
    "word": ("what word is printed?", "read the word."),
    "digit": ("what number is printed?", "read the number."),
    "material": ("what is the {} made of?", "which material is the {}?"),
    "behind": ("what is behind the {}?", "what lies behind the {}?"),
}

# Near-duplicate photographs stand in one group; the groups, not the photographs, are divided among the splits.
INTERIORS = (
    "1317558", "2416933", "3062948", "36030587", "36179987", "36236147", "36358763", "36444540", "3965508", "4389955",
    "4400637", "4543103", "5386834", "5604956", "5853819", "6373478", "6615808", "6707631", "6830376",
    "6956495 cup-of-couple-6963787", "6963783 cup-of-couple-6962851", "6963788", "7193656", "7247504",
    "7303773 cup-of-couple-7303788", "7303782 7303800 7303842", "7303992 7303994 7303995", "7688357",
    "cup-of-couple-7303987", "karola-g-7602925", "maksgelatin-4352247",
)  # fmt: skip
OTHERS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg", "camera.png", "coins.png", "china.jpg", "flower.jpg",
)  # fmt: skip


@dataclass
class Item:
    """One thing drawn: `box` is (left, top, right, bottom) in pixels; `colour` is None where it is never asked."""

    name: str
    box: tuple[int, int, int, int]
    colour: str | None = None


@dataclass
class Scene:
    """A picture and what is drawn in it: `texts` are words and digits, `bands` floor and wall with their material."""

    variant: str
    split: str
    seed: int
    image: Image.Image
    objects: list[Item] = field(default_factory=list)
    texts: list[Item] = field(default_factory=list)
    bands: list[tuple[Item, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """`kind` is one of `KINDS`; `words` are the question's template and its fill-in, which training may re-phrase."""

    kind: str
    text: str
    answer: str
    words: tuple[str, str] = ("", "")


def make_scene(variant: str, split: str, seed: int, crowded: bool = False) -> Scene:
    """The scene that `variant`, `split` and `seed` name. Raises ValueError for an unknown variant or split.

    A `crowded` scene, for training only, holds about four times as much; only parts of it can be asked about.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(f"{variant}/{split}/{seed}" + "/crowded" * crowded)
    scene = Scene(variant, split, seed, _background(split, rng))
    if variant == "context":
        _draw_bands(scene, rng)
        _draw_confetti(scene, rng)
    _draw_texts(scene, rng, crowded)
    _draw_objects(scene, rng, crowded)
    return scene


def scenes(variant: str, split: str, start: int = 0) -> Iterator[Scene]:
    """The endless stream of scenes of one variant and split, from seed `start` on."""
    while True:
        yield make_scene(variant, split, start)
        start += 1


def ask(scene: Scene, rng: random.Random | None = None) -> list[Question]:
    """Every question of the scene, in a fixed order; presence has one `no` for each `yes`.

    `rng` draws the absent nouns; by default the scene's name decides, so that an evaluation always asks the same.
    """
    rng = rng or random.Random(f"ask/{scene.variant}/{scene.split}/{scene.seed}")
    counts = {}
    for item in scene.objects:
        counts[item.name] = counts.get(item.name, 0) + 1
    shown = [(item.name, item) for item in scene.objects if counts[item.name] == 1]

    questions, absent = [], []
    for noun in counts:
        absent.append(_absent(counts.keys() | set(absent), noun, rng))
        questions.append(_question("presence", "presence", noun, "yes"))
        questions.append(_question("presence", "presence", absent[-1], "no"))
    questions += [_question("count", "count", noun, str(count)) for noun, count in counts.items()]
    for noun, item in shown:
        questions.append(_question("where", "where", noun, quadrant(item.box)))
        if item.colour:
            questions.append(_question("colour", "colour", noun, item.colour))
    for text in scene.texts:
        questions.append(_question("reading", "digit" if text.name in DIGITS else "word", "", text.name))
    for band, material in scene.bands:
        questions.append(_question("region", "material", band.name, material))
        questions.append(_question("region", "colour", band.name, str(band.colour)))
    if scene.bands:
        questions += [_question("region", "behind", noun, _behind(scene, item)) for noun, item in shown]
    return questions


def rephrase(question: Question, rng: random.Random) -> str:
    """The question in one of its templates' wordings, drawn from `rng`."""
    template, word = question.words
    return rng.choice(TEMPLATES[template]).format(word)


def quadrant(box: tuple[int, int, int, int]) -> str:
    """The quadrant that holds the centre of `box`."""
    left, top, right, bottom = box
    vertical = "top" if top + bottom < SIZE else "bottom"
    return f"{vertical} {'left' if left + right < SIZE else 'right'}"


def photographs(split: str) -> list[str]:
    """File names of a split's photographs: 1 group in 5 for test, 1 in 8 for val, the rest for train."""
    groups = [tuple(f"pexels-{name}.jpg" for name in group.split()) for group in INTERIORS]
    groups += [(name,) for name in OTHERS]
    random.Random("photographs").shuffle(groups)
    test, val = len(groups) // 5, len(groups) // 8
    chosen = {"test": groups[:test], "val": groups[test : test + val], "train": groups[test + val :]}[split]
    return [name for group in chosen for name in group]


@functools.lru_cache(maxsize=64)
def photograph(name: str) -> Image.Image:
    """The photograph `name` in RGB, its shorter side at most 720 px."""
    if name.startswith("pexels"):
        with zipfile.ZipFile(fetch(INTERIOR_PHOTOS)) as archive:
            image = open_image(archive.read(f"interior_photos/images/{name}"), name)
    else:
        package = "sklearn.datasets.images" if name in ("china.jpg", "flower.jpg") else "skimage.data"
        image = open_image((files(package) / name).read_bytes(), name)
    scale = min(1.0, 720 / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _question(kind: str, template: str, word: str, answer: str) -> Question:
    return Question(kind, TEMPLATES[template][0].format(word), answer, (template, word))


def _absent(taken: set[str], noun: str, rng: random.Random) -> str:
    family = [other for other in FAMILIES[FAMILY_OF[noun]] if other not in taken]
    return rng.choice(family if family and rng.random() < 0.5 else [other for other in NOUNS if other not in taken])


def _behind(scene: Scene, item: Item) -> str:
    for band, material in scene.bands:
        if band.box[1] <= item.box[1] and item.box[3] <= band.box[3]:
            return material
    return "photograph"


def _background(split: str, rng: random.Random) -> Image.Image:
    image = photograph(rng.choice(photographs(split)))
    side = round(min(image.size) * rng.uniform(0.5, 1.0))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = rng.uniform(0.8, 1.1)
    return image.point(lambda value: value * gain)


def _draw_bands(scene: Scene, rng: random.Random) -> None:
    height = rng.randint(6, 8) * PATCH
    spans = {"floor": (SIZE - height, SIZE), "wall": (0, height)}
    for name in rng.choice((("floor",), ("wall",), ("floor", "wall"), ("floor",))):
        top, bottom = spans[name]
        material, colour = rng.choice(MATERIALS), rng.choice(BAND_COLOURS)
        grey = _texture(material, scene.split, bottom - top, rng)[..., None]
        rgb = np.asarray(COLOURS[colour], np.float32) * 0.75 + 45
        pixels = np.clip(grey * rgb, 0, 255).astype(np.uint8)
        scene.image.paste(Image.fromarray(pixels), (0, top))
        scene.bands.append((Item(name, (0, top, SIZE, bottom), colour), material))


def _texture(material: str, split: str, height: int, rng: random.Random) -> np.ndarray:
    """Grey values around 1, (height, 336). Photographed textures come from the split's own rows of the picture."""
    if material in ("wood", "tiles"):
        rows, columns = np.mgrid[0:height, 0:SIZE].astype(np.float32)
        shift = rng.uniform(0, 100)
        if material == "wood":
            grain = np.sin(rows / rng.uniform(1.2, 1.8) + 3 * np.sin((columns + shift) / rng.uniform(30, 50)))
            plank = rng.randint(20, 26)
            shade = 1 + 0.14 * grain + 0.1 * np.sin((rows + shift) // plank * 2.4)
            return np.where((rows + shift) % plank < 2, 0.5, shade)
        side = rng.randint(20, 28)
        seam = ((rows + shift) % side < 2) | ((columns + shift) % side < 2)
        odd = ((rows + shift) // side + (columns + shift) // side) % 2
        return np.where(seam, 1.3, 0.8 + 0.25 * odd)
    first, last = {"train": (0, 288), "val": (288, 400), "test": (400, 512)}[split]
    image = photograph(f"{material}.png")
    top, left = rng.randint(first, last - height), rng.randint(0, image.width - SIZE)
    grey = np.asarray(image.convert("L").crop((left, top, left + SIZE, top + height)), np.float32)
    return np.clip(grey / grey.mean(), 0.3, 1.6)


def _draw_confetti(scene: Scene, rng: random.Random) -> None:
    draw = ImageDraw.Draw(scene.image)
    for _ in range(rng.randint(5, 9)):
        x, y, r = rng.randint(8, SIZE - 8), rng.randint(8, SIZE - 8), rng.randint(4, 9)
        colour = rng.choice(((255, 0, 170), (0, 230, 230), (255, 120, 0), (120, 255, 0), (255, 255, 255)))
        shape = rng.choice(("triangle", "ring", "bar"))
        if shape == "triangle":
            draw.polygon(((x - r, y + r), (x + r, y + r), (x, y - r)), fill=colour)
        elif shape == "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=3)
        else:
            draw.line((x - r, y - r, x + r, y + r), fill=colour, width=4)


@functools.lru_cache(maxsize=8)
def _text_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size)


def _draw_texts(scene: Scene, rng: random.Random, crowded: bool) -> None:
    wanted = [(rng.choice(WORDS), 32)] if rng.random() < 0.75 else []
    wanted += [(rng.choice(DIGITS), 42)] if rng.random() < 0.65 else []
    if crowded:
        wanted = [(word, 32) for word in rng.sample(WORDS, 5)] + [(digit, 42) for digit in rng.sample(DIGITS, 5)]
    draw = ImageDraw.Draw(scene.image)
    for text, size in wanted:
        font = _text_font(size)
        left, top, right, bottom = map(round, font.getbbox(text))
        width, height = right - left + 12, bottom - top + 12
        box = _free_box(scene, width, height, rng)
        if box is None:
            continue
        if scene.variant == "salient":
            draw.rounded_rectangle(box, 5, fill=(250, 250, 245), outline=(60, 60, 60))
            ink = [20, 20, 25]
        else:
            local = np.asarray(scene.image.crop(box), np.float32).mean((0, 1))
            ink = np.clip(local + (-125 if local.mean() > 125 else 125), 0, 255).astype(int).tolist()
        draw.text((box[0] + 6 - left, box[1] + 6 - top), text, font=font, fill=tuple(ink))
        scene.texts.append(Item(text, box))


@functools.lru_cache(maxsize=512)
def _emoji(noun: str, colour: str | None, side: int) -> Image.Image:
    """RGBA picture of `noun`, its longer side `side` pixels; painted in `colour` where one is given."""
    font = ImageFont.truetype(str(Path(__file__).with_name("scenes_emoji.ttf")), 109)
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((10, 10), EMOJI[noun], font=font, embedded_color=True)
    image = image.crop(image.getbbox())
    if colour:
        rgba = np.asarray(image, np.float32)
        light = rgba[..., :3].mean(-1)
        shade = np.clip(light / np.median(light[rgba[..., 3] > 128]), 0.5, 1.5)[..., None]
        rgba = np.concatenate([np.clip(shade * np.asarray(COLOURS[colour]), 0, 255), rgba[..., 3:]], -1)
        image = Image.fromarray(rgba.astype(np.uint8), "RGBA")
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _draw_objects(scene: Scene, rng: random.Random, crowded: bool) -> None:
    nouns = rng.sample(NOUNS, 7 if crowded else rng.randint(2, 3))
    if not any(noun in PAINTED for noun in nouns):
        nouns[0] = rng.choice(PAINTED)
    for noun in nouns:
        colour = rng.choice(tuple(COLOURS)) if noun in PAINTED else None
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 3))):
            image = _emoji(noun, colour, rng.randint(42, 52))
            box = _free_box(scene, image.width, image.height, rng)
            if box is None:
                continue
            if scene.variant == "context":
                image = _blend(image)
            scene.image.paste(image, box[:2], image)
            scene.objects.append(Item(noun, box, colour))


def _blend(image: Image.Image) -> Image.Image:
    """The emoji with a quarter of its saturation and some of its opacity taken away."""
    rgba = np.asarray(image, np.float32).copy()
    rgba[..., :3] = 0.75 * rgba[..., :3] + 0.25 * rgba[..., :3].mean(-1, keepdims=True)
    rgba[..., 3] *= 0.85
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


def _free_box(scene: Scene, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int] | None:
    """A place clear of all that is drawn and of band edges, its centre 20 px off the axes; None after 200 tries."""
    taken = [item.box for item in scene.objects + scene.texts]
    edges = [edge for band, _ in scene.bands for edge in band.box[1::2]]
    for _ in range(200):
        left, top = rng.randint(3, SIZE - 3 - width), rng.randint(3, SIZE - 3 - height)
        right, bottom = left + width, top + height
        centred = abs(left + right - SIZE) < 40 or abs(top + bottom - SIZE) < 40
        meets = any(left < b[2] + 4 and b[0] < right + 4 and top < b[3] + 4 and b[1] < bottom + 4 for b in taken)
        if not centred and not meets and not any(top < edge < bottom for edge in edges):
            return left, top, right, bottom
    return None


def contact_sheet(split: str, columns: int = 4, rows: int = 4) -> Image.Image:
    """Scenes of both variants in alternate rows, each above one question of every type it can answer."""
    lines = len(KINDS)
    sheet = Image.new("RGB", (columns * (SIZE + 4), rows * (SIZE + 13 * lines + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(columns * rows):
        row, column = divmod(index, columns)
        scene = make_scene(VARIANTS[row % 2], split, index)
        x, y = column * (SIZE + 4), row * (SIZE + 13 * lines + 6)
        sheet.paste(scene.image, (x, y))
        chosen = {question.kind: question for question in ask(scene)}
        for line, question in enumerate(chosen.values()):
            caption = f"{question.text} {question.answer}"
            draw.text((x + 4, y + SIZE + 13 * line), caption, fill="black", font=_text_font(10))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scenes.png")
    parser.add_argument("--split", choices=SPLITS, default="train")
    arguments = parser.parse_args()
    contact_sheet(arguments.split).save(arguments.out)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
