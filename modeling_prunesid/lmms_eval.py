"""
The model `prunesid` of lmms-eval, the client that the paper evaluates with (section 4).

lmms-eval finds it by the entry point of this package. It needs its own model because the stock `llava_hf` picks a
class by the name of the model type: a variant is unknown to it, and a stock checkpoint runs without compression.

Example:
    lmms-eval --model prunesid --model_args pretrained=org/llava-prunesid,num_visual_tokens=64 --tasks gqa
"""

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata, load_video

from .configuration_prunesid import check_budget


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval: the name of the model and where its class is."""
    return ModelManifest(model_id="prunesid", chat_class_path=f"{__name__}.{PruneSIDForLmmsEval.__name__}")


class PruneSIDForLmmsEval(lmms):
    r"""
    A PruneSID or ViTCoP repo that answers the `generate_until` tasks of lmms-eval, on images and on videos. Prompts
    are written by the repo's own chat template. What goes wrong in an answer is raised, never scored as an empty one.

    Args:
        pretrained (`str`): the repo or folder of a variant.
        revision (`str`, defaults to `"main"`): its revision.
        device (`str`, *optional*): where the model runs. Default: the device of this process in Accelerate.
        device_map (`str`, *optional*): Accelerate's placement, for example `"auto"`, in place of `device`.
        dtype (`str`, defaults to `"auto"`): of the weights, for example `"float16"`.
        batch_size (`int`, defaults to 1): questions answered at a time, padded on the left.
        trust_remote_code (`bool`, defaults to `True`): run code of the repo that this package does not have itself.
        num_visual_tokens (`int` or `float`, *optional*): the budget, in place of the repo's; 1.0 keeps all tokens.
        max_frames_num (`int`, defaults to 8): frames taken of a video, evenly spaced from its first to its last one.
            8 are those of Video-LLaVA (section 4.2).
        video_fps (`float`, *optional*): take this many frames a second, where that is less than `max_frames_num`.

    Raises:
        `ValueError`: for an invalid argument, or a repo that is no variant.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        revision: str = "main",
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        batch_size: int = 1,
        trust_remote_code: bool = True,
        num_visual_tokens: int | float | None = None,
        max_frames_num: int = 8,
        video_fps: int | float | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"prunesid has no argument {', '.join(unknown)}. Leave it out of --model_args.")
        if not pretrained:
            raise ValueError(
                "pretrained must name a PruneSID repo, got nothing. Add --model_args pretrained=org/name."
            )
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"dtype must be 'auto' or a dtype of PyTorch, got {dtype!r}. Write for example float16.")
        check_budget(num_visual_tokens, name="num_visual_tokens")
        self.batch_size = _positive("batch_size", batch_size, int)
        self.max_frames_num = _positive("max_frames_num", max_frames_num, int)
        self.video_fps = None if video_fps is None else _positive("video_fps", video_fps, float)

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        location = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(pretrained, **location)
        if not config.model_type.startswith(("prunesid_", "vitcop_")):
            raise ValueError(
                f"pretrained={pretrained!r} is no PruneSID or ViTCoP repo but a {config.model_type!r}, which would "
                "run without compression. Make a variant of it with `prunesid convert`."
            )
        budget_field = config.prunesid_config.base_config_key
        settings = {} if num_visual_tokens is None else {budget_field: {"budget": num_visual_tokens}}
        placement = device_map or device or str(self.accelerator.device)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, device_map=placement, **location, **settings
        ).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, **location)
        if hasattr(self.processor, "arguments_for"):  # a stock processor writes full prompts, which are as good
            arguments = self.processor.arguments_for(self.model.config.prunesid_config)
            self.processor = AutoProcessor.from_pretrained(pretrained, **location, **arguments)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.device = self.model.device
        self.visual_tokens = count_visual_tokens(self.model.model)
        budget = self.model.config.prunesid_config.budget
        logger.info(f"prunesid: {pretrained} is a {type(self.model).__name__} on {self.device}, budget {budget}")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers to `requests`, in their order."""
        results: dict[int, GenerationResult] = {}
        seconds, tokens = 0.0, 0
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for batch in batches(requests, self.batch_size):
            start = time.perf_counter()
            answers = self._answer([requests[index] for index in batch])
            seconds += time.perf_counter() - start
            tokens += sum(answer.token_counts.output_tokens for answer in answers)
            results.update(zip(batch, answers))
            bar.update(len(batch))
        bar.close()

        seen = self.visual_tokens
        kept = seen["kept"] * seen["in_layers"] / seen["entered"] if seen["entered"] else seen["kept"]
        logger.info(
            f"prunesid: {type(self.model).__name__} kept {round(kept)} of {seen['all']} visual tokens of "
            f"{seen['views']} images and clips"
        )
        views = max(seen["views"], 1)
        mean = {"kept_visual_tokens": kept / views, "all_visual_tokens": seen["all"] / views}
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, additional_metrics=mean)
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"prunesid generates answers and scores none, which task {requests[0].task_name!r} asks for. Choose its "
            "variant with output_type: generate_until, for example seedbench in place of seedbench_ppl."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            f"prunesid answers in one round, but task {requests[0].task_name!r} asks for several. Choose a task with "
            "output_type: generate_until."
        )

    @torch.inference_mode()
    def _answer(self, requests: list[Instance]) -> list[GenerationResult]:
        asked = requests[0].args[2]
        inputs = self._inputs(requests).to(self.device, self.model.dtype)
        arguments = generation_arguments(asked, self.tokenizer)
        output = self.model.generate(**inputs, **arguments)
        answers = output[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ends = torch.tensor([arguments["eos_token_id"], arguments["pad_token_id"]], device=answers.device)
        lengths = (~torch.isin(answers, ends)).sum(1).tolist()
        return [
            GenerationResult(text=cut(text, asked.get("until")), token_counts=TokenCounts(output_tokens=length))
            for text, length in zip(texts, lengths)
        ]

    def _inputs(self, requests: list[Instance]):
        texts, images, videos = [], [], []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            texts.append(self.processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True))
            of_chat = dict(zip(("images", "videos", "audios"), chat.extract_media()))
            if of_chat["audios"] or (of_chat["videos"] and not hasattr(self.processor, "video_processor")):
                kind = "audio" if of_chat["audios"] else "videos"
                raise ValueError(
                    f"Task {task!r} has {kind}, which {type(self.model).__name__} does not take. Choose another task, "
                    "or another repo in pretrained."
                )
            images.append(of_chat["images"])
            videos += [self._read(video) for video in of_chat["videos"]]
        clips: dict[str, Any] = {}
        if videos:
            frames, metadata = zip(*videos)
            clips = {"videos": list(frames), "video_metadata": list(metadata), "do_sample_frames": False}
        return self.processor(
            text=texts, images=images if any(images) else None, **clips, padding=True, return_tensors="pt"
        )

    def _read(self, video: str) -> tuple[np.ndarray, VideoMetadata]:
        sample = functools.partial(frame_indices, max_frames_num=self.max_frames_num, video_fps=self.video_fps)
        return load_video(video, backend="decord", sample_indices_fn=sample)


def batches(requests: list[Instance], size: int) -> Iterator[list[int]]:
    """Indices into `requests`, up to `size` at a time, of one task and the same generation arguments."""
    groups = defaultdict(list)
    for index, request in enumerate(requests):
        _, _, asked, _, task, split = request.args
        groups[task, split, repr(asked)].append(index)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def generation_arguments(asked: dict[str, Any], tokenizer) -> dict[str, Any]:
    """
    Arguments of `generate` for a task's `generation_kwargs`, by the rules of the stock `llava_hf`: greedy unless the
    temperature is above 0, one beam and 1,024 new tokens unless the task says otherwise.
    """
    do_sample = (asked.get("temperature") or 0) > 0
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {
        "max_new_tokens": asked.get("max_new_tokens", 1024),
        "num_beams": asked.get("num_beams", 1),
        "do_sample": do_sample,
        "temperature": asked["temperature"] if do_sample else None,
        "top_p": asked.get("top_p") if do_sample else None,
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
    }


def cut(answer: str, until: str | list[str] | None) -> str:
    """
    `answer` up to the first of the strings `until`. A blank line, which lmms-eval fills in where a task names none,
    ends no answer, as in the stock models: long ones have paragraphs.
    """
    for stop in [until] if isinstance(until, str) else until or []:
        if stop and stop != "\n\n":
            answer = answer.split(stop)[0]
    return answer


def frame_indices(metadata: VideoMetadata, max_frames_num: int, video_fps: float | None, **_: Any) -> np.ndarray:
    """Which frames of a video are taken: evenly spaced, the first and the last among them."""
    count = min(max_frames_num, metadata.total_num_frames)
    if video_fps is not None:
        count = max(1, min(count, int(metadata.duration * video_fps)))
    return np.linspace(0, metadata.total_num_frames - 1, count, dtype=int)


def count_visual_tokens(model) -> Counter:
    """
    Counts, from now on, the images and clips that the base model encodes (`views`), their tokens (`all`), and those
    that enter the language model (`kept`). Where its layers drop more of them, `in_layers` is what they saw, summed
    over the layers, and `entered` what they would have seen of all that entered.
    """
    seen: Counter = Counter()

    def count_layers(module, inputs, output):
        layers = output.get("layer_visual_tokens")
        if layers is not None:
            seen["in_layers"] += int(layers.sum())
            seen["entered"] += int(layers[:, 0].sum()) * layers.shape[1]

    model.register_forward_hook(count_layers)
    for name in ("get_image_features", "get_video_features"):
        if hasattr(model, name):
            setattr(model, name, _counted(model, getattr(model, name), seen))
    return seen


def _counted(model: Any, encode: Callable, seen: Counter) -> Callable:
    @functools.wraps(encode)
    def counted(*args, **kwargs):
        output = encode(*args, **kwargs)
        features = model.features_of(output)
        kept = sum(view.shape[:-1].numel() for view in features)
        seen["views"] += len(features)
        seen["kept"] += kept
        seen["all"] += sum(output["num_placeholders"]) if "num_placeholders" in output else kept
        return output

    return counted


def _positive(name: str, value: Any, kind: type) -> Any:
    """`value` as a positive `kind`; lmms-eval hands numbers over as numbers or as strings."""
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if number <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}. Write for example {name}=8.")
    return number
