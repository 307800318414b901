"""Images of any-resolution crops that upstream's `pack_image_features` lays out, and clips of frames."""

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .frames import FramesModelMixin, FramesProcessorMixin
from .views import View


def are_cropped(inputs: dict[str, Any]) -> list[bool] | None:
    """
    Which images are cropped, None for all: LLaVA-OneVision, whose `batch_num_images` says how many images each row of
    the batch has, makes a single crop of those that share one.
    """
    counts = inputs.get("batch_num_images")
    counts = [] if counts is None else torch.as_tensor(counts).tolist()
    return [count == 1 for count in counts for _ in range(count)] or None


def crops_of_images(config: Any, image_sizes: torch.LongTensor, is_cropped: Sequence[bool] | None = None) -> list[int]:
    """How many crops each image has. Arguments are those of `packed_views`."""
    pinpoints, size = config.image_grid_pinpoints, config.vision_config.image_size
    is_cropped = [True] * len(image_sizes) if is_cropped is None else is_cropped
    return [image_size_to_num_patches(own, pinpoints, size) if cut else 1 for own, cut in zip(image_sizes, is_cropped)]


def packed_scores(
    pack: Callable,
    config: Any,
    image_sizes: torch.LongTensor,
    scores: torch.Tensor,
    is_cropped: Sequence[bool] | None = None,
    **options: Any,
) -> torch.Tensor:
    """
    Scores `(crops, tokens)` of all crops, laid out and interpolated as upstream does features, of the tokens of the
    `packed_views`, one view behind the other. Arguments are otherwise those of `packed_views`.
    """
    sizes = torch.as_tensor(image_sizes).cpu()
    counts = crops_of_images(config, sizes, is_cropped)
    side = math.isqrt(scores.shape[1])
    views = packed_views(pack, config, sizes, is_cropped, side, **options)
    of_views = []
    for own, size, crops in zip(views, sizes, scores.split(counts)):
        packed = pack([crops[..., None]], size[None], image_newline=scores.new_zeros(1), **options)[0]
        packed = (packed[0] if isinstance(packed, list) else packed)[:, 0]
        of_views += [packed[view.rows.to(packed.device)] for view in own]
    return torch.cat(of_views)


def packed_owners(
    pack: Callable,
    config: Any,
    image_sizes: torch.LongTensor,
    is_cropped: Sequence[bool] | None = None,
    side: int | None = None,
    **options: Any,
) -> list[torch.LongTensor]:
    """
    The crop `(T,)` of each token of images that upstream's `pack_image_features` lays out, found by packing one-hot
    crops in place of features. A token that was interpolated between crops is of the one of most weight; newlines have
    -1.

    Args:
        pack (`Callable`): upstream's `pack_image_features`.
        config: of the model, with `image_grid_pinpoints`, and `image_size` and `patch_size` in its `vision_config`.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): height and width, in pixels.
        is_cropped (`list[bool]`, *optional*): False for images that are a single crop, whatever their size.
        side (`int`, *optional*): of the grid of a crop, in tokens; by default in patches.
        options: further arguments of `pack`.
    """
    vision = config.vision_config
    side, found = side or vision.image_size // vision.patch_size, []
    sizes = torch.as_tensor(image_sizes).cpu()
    for size, count in zip(sizes, crops_of_images(config, sizes, is_cropped)):
        owners = torch.eye(count + 1)
        crops = owners[:count, None].expand(-1, side**2, -1)
        packed = pack([crops], size[None], image_newline=owners[count], **options)[0]
        owner = (packed[0] if isinstance(packed, list) else packed).argmax(-1)
        found.append(owner.masked_fill(owner == count, -1))
    return found


def packed_views(pack: Callable, config: Any, image_sizes: torch.LongTensor, *args, **options) -> list[list[View]]:
    """A view for each crop of images that upstream lays out. Arguments are those of `packed_owners`."""
    views = []
    for owner in packed_owners(pack, config, image_sizes, *args, **options):
        of_crops = [(owner == crop).nonzero()[:, 0] for crop in range(int(owner.max()) + 1)]
        views.append([View(rows) for rows in of_crops if len(rows)])
    return views


class PackedModelMixin(FramesModelMixin):
    """
    For images of crops, each a view, that upstream's `pack_image_features` lays out, and videos of frames. Newline
    tokens are of no view.
    """

    def layout(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Further arguments of upstream's `pack_image_features`."""
        return {"vision_feature_select_strategy": "full"}

    @property
    def crop_side(self) -> int:
        """The side of a crop, or of a frame, in patches."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def _options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"is_cropped": are_cropped(inputs), **self.layout(inputs)}

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return packed_views(self.pack_image_features, self.config, inputs["image_sizes"], **self._options(inputs))
        return super().views(modality, inputs, sizes)

    def sizes_of(self, modality, inputs):
        if modality == "video":
            return super().sizes_of(modality, inputs)
        sizes = inputs["image_sizes"]
        return list(map(len, packed_owners(self.pack_image_features, self.config, sizes, **self._options(inputs))))

    def pool_attention(self, patches, modality, inputs, num_tokens):
        if modality == "video":
            return super().pool_attention(patches, modality, inputs, num_tokens)
        crops, sizes = patches.view(-1, self.crop_side**2), inputs["image_sizes"]
        return packed_scores(self.pack_image_features, self.config, sizes, crops, **self._options(inputs))


class PackedProcessorMixin(FramesProcessorMixin):
    """For the processor of a [`PackedModelMixin`]."""

    pack_image_features = LlavaNextModel.pack_image_features

    def layout(self) -> dict[str, Any]:
        """Further arguments of upstream's `pack_image_features`."""
        return {"vision_feature_select_strategy": "full"}

    def side_of(self, crop_size: int) -> int:
        """The side of a crop of this side in pixels, in tokens."""
        tokens = getattr(self, "num_image_tokens", None)  # of a crop
        return crop_size // self.patch_size if tokens is None else math.isqrt(tokens)

    def view_lengths(self, modality, inputs, index, runs):
        if modality == "video":
            return super().view_lengths(modality, inputs, index, runs)
        crop, is_cropped = inputs["pixel_values"][0][0].shape[-1], are_cropped(inputs)
        vision = SimpleNamespace(image_size=crop, patch_size=crop // self.side_of(crop))
        config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=self.image_processor.image_grid_pinpoints)
        pack = functools.partial(type(self).pack_image_features, SimpleNamespace(config=config))
        own = torch.as_tensor(inputs["image_sizes"][index])[None], is_cropped and is_cropped[index : index + 1]
        [views] = packed_views(pack, config, *own, **self.layout())
        return [len(view.rows) for view in views]
