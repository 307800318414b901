"""LLaVA's processor of ours with tiny parts."""

import torch
from tiny import BUDGET, IMAGE
from tiny_checkpoint import build_processor, picture

from modeling_prunesid import PruneSIDLlavaProcessor


def build_ours(num_visual_tokens=BUDGET, **settings):
    stock = build_processor()
    return PruneSIDLlavaProcessor(
        stock.image_processor,
        stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        chat_template=stock.chat_template,
        num_visual_tokens=num_visual_tokens,
        **settings,
    )


def ask(processor, num_images=1, **kwargs):
    images = [picture(seed) for seed in range(num_images)]
    text = "word7 " + "<image> word9 " * num_images + "word11"
    return processor(images=images or None, text=text, return_tensors="pt", **kwargs)


def count(inputs):
    return (inputs["input_ids"] == IMAGE).sum(1).tolist()


def check_what_is_set_is_obeyed(saved, folder, ask):
    """A loaded processor whose budget is set writes what one that was made with it does, and so when saved again."""
    for number, arguments in enumerate([{}, {"num_visual_tokens": 7}]):
        saved.save_pretrained(folder / "saved")
        loaded = type(saved).from_pretrained(folder / "saved", **arguments)
        for value in (17, None, 11, 1000, 0.5):
            saved.num_visual_tokens = loaded.num_visual_tokens = value
            expected, again = ask(saved), folder / f"{number}-{value}"
            loaded.save_pretrained(again)
            for processor in (loaded, type(saved).from_pretrained(again)):
                got = ask(processor)
                assert got.keys() == expected.keys()
                assert all(torch.equal(got[name], expected[name]) for name in expected)
