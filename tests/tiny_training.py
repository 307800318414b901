"""What training frameworks need for every family of `oracle_prompt`: a processor of words and views, and batches."""

import itertools
import random

import torch
from oracle_prompt import BOS, EOS, PAD, Family, Row, make_rows
from PIL import Image
from tiny_words import word_tokenizer
from transformers import BatchFeature, ProcessorMixin


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'word3 ' if message.role == 'user' else 'word4 ' }}"
    "{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}word4 {% endif %}"
)


def picture(seed: int) -> Image.Image:
    """A picture that stands for the view of `seed`."""
    return Image.new("RGB", (8, 8), (seed, seed, seed))


def view_of(family: Family, seed: int):
    rng = random.Random(seed)
    return next(view for view in iter(lambda: family.view(rng), None) if view.modality == "image")


class ViewsProcessor(ProcessorMixin):
    """Writes what the family's own processor writes for a full prompt, without its image processing."""

    def __init__(self, tokenizer=None, chat_template=CHAT_TEMPLATE, family=None):
        super().__init__(tokenizer, chat_template=chat_template)
        self.family = family
        self.image_token = "<image>"

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, padding=False, padding_side="left", return_tensors=None, **kwargs):
        texts = [text] if isinstance(text, str) else text
        images = [images] if images is not None and not isinstance(images, (list, tuple)) else images
        flat = [image for part in images or [] for image in (part if isinstance(part, (list, tuple)) else [part])]
        views = [view_of(self.family, image.getpixel((0, 0))[0]) for image in flat]
        coming, rows = iter(views), []
        for words in texts:
            row: list[int] = []
            for word in words.split():
                row += next(coming).ids if word == self.image_token else [self.tokenizer.convert_tokens_to_ids(word)]
            rows.append(row)
        length = max(map(len, rows)) if padding else None
        ids, mask = [], []
        for row in rows:
            pad = [PAD] * (length - len(row) if padding else 0)
            ids.append(pad + row if padding_side == "left" else row + pad)
            ones = [1] * len(row)
            mask.append([0] * len(pad) + ones if padding_side == "left" else ones + [0] * len(pad))
        data = {"input_ids": ids, "attention_mask": mask}
        if self.family.is_qwen:
            data |= {"mm_token_type_ids": [self.family.types(torch.tensor(row))["mm_token_type_ids"] for row in ids]}
            data["mm_token_type_ids"] = [row.tolist() for row in data["mm_token_type_ids"]]
        if return_tensors == "pt":
            data = {name: torch.tensor(value) for name, value in data.items()}
        pixels = self.family.pixels(views)
        pixels = {
            name: value.to(torch.get_default_dtype()) if value.is_floating_point() else value
            for name, value in pixels.items()
        }
        return BatchFeature({**data, **pixels})


def build_processor(family: Family) -> ViewsProcessor:
    names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 5: "<unk>", family.placeholders[0]: "<image>"}
    fast = word_tokenizer(names, ["<image>"], 100 if family.is_qwen else 120)
    fast.chat_template = CHAT_TEMPLATE
    return ViewsProcessor(fast, family=family)


# Batches for `transformers.Trainer`


class Examples(torch.utils.data.Dataset):
    """Rows of different lengths and views: what is asked, then an answer of words."""

    def __init__(self, family, count=4):
        self.parts = []
        for index in range(count):
            views = [view_of(family, 10 * index + number) for number in range(index % 2 + 1)]
            words = [10 + index] * (2 * index + 1)
            self.parts.append([BOS, *itertools.chain(*([20 + index, view] for view in views)), *words, 30, 31])

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        return {"parts": self.parts[index]}


class Collator:
    """Pads on the right; labels the last `answer` words of every row, or all that is not padding."""

    def __init__(self, family, ours, answer=3, label_all=False):
        self.family, self.ours, self.answer, self.label_all = family, ours, answer, label_all

    def rows(self, parts: list[list]) -> list[Row]:
        whole = make_rows(self.family, self.ours, parts)
        length = max(len(row.ids) for row in whole)
        padded = [part + [("hidden", PAD)] * (length - len(row.ids)) for part, row in zip(parts, whole)]
        return make_rows(self.family, self.ours, padded)

    def labels(self, rows: list[Row]) -> list[list[int]]:
        labels = []
        for row in rows:
            last = sum(row.mask)
            first = 0 if self.label_all else last - self.answer
            labels.append([token if first <= at < last else -100 for at, token in enumerate(row.ids)])
        return labels

    def __call__(self, examples):
        rows = self.rows([example["parts"] for example in examples])
        input_ids = torch.tensor([row.ids for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.tensor([row.mask for row in rows]),
            "labels": torch.tensor(self.labels(rows)),
            **self.family.types(input_ids),
            **self.family.pixels([view for row in rows for view, _ in row.views]),
        }
