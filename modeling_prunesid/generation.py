"""`generate` on shortened prompts: the caller's own prompt goes in and comes back, whatever it was shortened to."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .outputs import run_shortened
from .plans import CachedPrompt, generating, is_counted
from .prompts import ShortPrompt
from .upstream import CACHE_NAME, SHOWN, cache_of, rename_cache


class _CallersPrompt:
    """Puts the caller's prompt back in front of what follows the short one."""

    def __init__(self, input_ids: torch.LongTensor, short_length: int):
        self.input_ids = input_ids
        self.short_length = short_length

    def restore(self, sequences: torch.LongTensor) -> torch.LongTensor:
        prompt = self.input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(self.input_ids), 0)
        return torch.cat([prompt, sequences[:, self.short_length :]], dim=1)

    def restore_row(self, batch_id: int, sequence: torch.LongTensor) -> torch.LongTensor:
        return torch.cat([self.input_ids[batch_id].to(sequence.device), sequence[self.short_length :]])


class _SeesCallersPrompt:
    """A caller's logits processor or stopping criterion, shown sequences that begin with the caller's prompt."""

    def __init__(self, function: Callable, prompt: _CallersPrompt):
        self.function, self.prompt = function, prompt

    def __call__(self, input_ids, scores):
        return self.function(self.prompt.restore(input_ids), scores)

    @property
    def eos_token_id(self):
        """Upstream pads what follows the end of a row if any criterion has this attribute."""
        return self.function.eos_token_id


class _StreamsCallersPrompt:
    """A caller's streamer, given the caller's prompt first."""

    def __init__(self, streamer, prompt: _CallersPrompt):
        self.streamer, self.prompt = streamer, prompt

    def put(self, value):
        if self.prompt is not None:
            value, self.prompt = self.prompt.restore(value), None
        self.streamer.put(value)

    def end(self):
        self.streamer.end()


class CompressedGenerationMixin:
    """For a model with a language-modelling head whose `self.model` is a [`CompressedModelMixin`]."""

    # Whether upstream's head reads `logits_to_keep`; others return the logits of all columns, whatever is asked for.
    # It is read of the signature of `forward`, where a family does not say so: its `forward` may hand the argument on.
    reads_logits_to_keep: bool

    def forward_compressed(self, forward: Callable, input_ids: torch.LongTensor | None = None, **inputs):
        """Upstream's `forward` on the shortened arguments; what it returns has the caller's columns."""
        inputs, prompt = self.model.compress({"input_ids": input_ids, **inputs})
        inputs["is_shortened"] = True  # upstream hands it on to the base model
        return run_shortened(self, forward, inputs, input_ids, prompt)

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        streamer=None,
        **kwargs,
    ):
        r"""
        Upstream's `generate`, on a shortened prompt. All arguments, and what is returned, are upstream's: sequences
        begin with the caller's own `input_ids`, and `max_length` and `min_length` count from them.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                The budget of this call, in place of `config.prunesid_config.budget`.
            question_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                1 for each word of each row's question, where `method_settings["question"]` chooses tokens by it.

        Raises:
            `ValueError`: if placeholders and views do not match, or the budget is invalid; where the question is read,
                without `question_mask`, or on a cache whose tokens were chosen for another one.
        """
        if inputs is not None and kwargs.get("input_ids") is None and not inputs.is_floating_point():
            kwargs["input_ids"], inputs = inputs, None
        kwargs = rename_cache(kwargs)
        callers_ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
        if callers_ids is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_padding(callers_ids, generation_config, kwargs)
        if getattr(cache, "_prunesid_interrupted", False) and cache.get_seq_length():
            raise ValueError(
                f"{CACHE_NAME} was left by a call of generate that did not finish, so that it is unknown what it "
                "holds. Start from an empty cache, or from a copy that was made before that call."
            )
        shown = {name: kwargs.pop(name) for name in SHOWN if name in kwargs}  # of the language model alone
        kwargs, prompt = self.model.compress(kwargs, is_generation=True)
        kwargs |= shown
        if self._setting("prefill_chunk_size", generation_config, kwargs) is not None:
            is_counted.set(False)
        arguments = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
        }
        if prompt is not None:
            self._count_from_callers_prompt(generation_config, kwargs, prompt)
        is_ours = prompt is not None or hasattr(cache, "_prunesid_prompt")
        if cache is not None and is_ours:
            cache._prunesid_interrupted = True
        if prompt is None or callers_ids is None:
            output = self._generate_short(super().generate, inputs, **arguments, **kwargs)
            if cache is not None and is_ours:
                cache._prunesid_interrupted = False
            return output

        callers_prompt = _CallersPrompt(callers_ids, prompt.length)
        if logits_processor is not None:
            wrapped = [_SeesCallersPrompt(processor, callers_prompt) for processor in logits_processor]
            arguments["logits_processor"] = LogitsProcessorList(wrapped)
        if stopping_criteria is not None:
            wrapped = [_SeesCallersPrompt(criterion, callers_prompt) for criterion in stopping_criteria]
            arguments["stopping_criteria"] = StoppingCriteriaList(wrapped)
        if prefix_allowed_tokens_fn is not None:
            arguments["prefix_allowed_tokens_fn"] = lambda batch_id, sequence: prefix_allowed_tokens_fn(
                batch_id, callers_prompt.restore_row(batch_id, sequence)
            )
        if streamer is not None:
            arguments["streamer"] = _StreamsCallersPrompt(streamer, callers_prompt)

        output = self._generate_short(super().generate, inputs, **arguments, **kwargs)
        if cache is not None:
            cache._prunesid_interrupted = False
        if isinstance(output, torch.Tensor):
            sequences, output = output, callers_prompt.restore(output)
        else:
            sequences = output.sequences
            output.sequences = callers_prompt.restore(sequences)
            cache = cache_of(output) if cache_of(output) is not None else cache
        CachedPrompt(callers_ids, prompt).remember(cache)
        return output

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """
        Repeats the features of each row of a batch for its beams. Upstream's own way puts those of several inputs of a
        row into the wrong order in some families (GLM-4V), and in others leaves parts out.
        """
        arguments = {"expand_size": expand_size, "inputs_embeds": inputs_embeds}
        if not any(getattr(output, "is_pruned", False) for output in mm_encoder_output.values()):
            return super()._expand_multimodal_outputs(input_ids, mm_encoder_output, **arguments)
        for modality, output in mm_encoder_output.items():
            if modality not in ("image", "video") or output is None:
                continue
            columns = (input_ids, None) if input_ids is not None and input_ids.numel() else (None, inputs_embeds)
            counts = self.model.find_placeholders(modality, *columns).sum(1).tolist()

            def repeat(entries, counts=counts):
                rows = torch.cat(list(entries)).split(counts)
                return [row for row in rows if len(row) for _ in range(expand_size)]

            self.model.put_features(output, repeat)
        return mm_encoder_output

    def _generate_short(self, generate: Callable, *args, **kwargs):
        """Upstream's `generate`; the steps of `forward` in it have nothing to shorten."""
        token = generating.set(self.model)
        try:
            return generate(*args, **kwargs)
        finally:
            generating.reset(token)
            is_counted.set(False)

    def _merge_criteria_processor_list(self, default_list, custom_list):
        """Upstream's rule, by the types of the caller's own processors and criteria."""
        wrapped = {id(item.function): item for item in custom_list if isinstance(item, _SeesCallersPrompt)}
        bare = [item.function if isinstance(item, _SeesCallersPrompt) else item for item in custom_list]
        merged = super()._merge_criteria_processor_list(default_list, type(custom_list)(bare))
        return type(merged)([wrapped.get(id(item), item) for item in merged])

    def _setting(self, name: str, generation_config, kwargs: dict[str, Any]) -> Any:
        """A generation setting, from where upstream takes it."""
        sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
        return next((value for value in sources if value is not None), None)

    def _mask_padding(self, input_ids, generation_config, kwargs: dict[str, Any]) -> torch.LongTensor | None:
        """Upstream's rule for a prompt without a mask: padding ids are padding unless they also end a sequence."""
        pad, eos = (self._setting(name, generation_config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return None
        return (input_ids != pad).long()

    def _count_from_callers_prompt(self, generation_config, kwargs: dict[str, Any], prompt: ShortPrompt) -> None:
        """Lengths that count the caller's prompt are reduced by what was dropped from it."""

        def setting(name):
            return self._setting(name, generation_config, kwargs)

        dropped = prompt.full_length - prompt.length
        max_length = setting("max_length")
        if max_length is not None and setting("max_new_tokens") is None:
            if max_length <= prompt.full_length:
                name = "inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"
                raise ValueError(
                    f"Input length of {name} is {prompt.full_length}, but `max_length` is set to {max_length}. "
                    "Increase `max_length` or, better yet, set `max_new_tokens`."
                )
            kwargs["max_length"] = max_length - dropped
        min_length = setting("min_length")
        if min_length is not None and setting("min_new_tokens") is None:
            kwargs["min_length"] = max(min_length - dropped, 0)
