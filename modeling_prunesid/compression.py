"""
Turns kept tokens into shorter prompts, once, at the entrance of `forward` and `generate`, for every model family.

A stock processor writes one placeholder for every visual token of a view. PruneSID encodes fewer, so the placeholders
of the dropped tokens leave the prompt together with their columns of the mask, the positions and the labels. From then
on everything upstream (caches, positions, decoding) works on the short prompt as if it had been written that way.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch

from .arguments import ShortensArgumentsMixin
from .budgets import share_total
from .cached_chats import ContinuesCacheMixin
from .cached_rows import settle_rows
from .context import ASKED
from .outputs import run_shortened
from .parts import QUESTION
from .plans import CachedPrompt, Plan, generating, is_counted, to_host
from .prompts import IGNORED_LABEL, ShortPrompt, columns_of, is_flat
from .readings import run_lengths
from .runs import share_over_runs
from .upstream import CACHE_NAME, PIXELS, SHOWN, cache_of


# What the sizes of images and clips are passed as.
_SIZES = (
    "image_grid_thw", "image_grid_hw", "image_grids", "image_sizes", "image_merge_sizes", "spatial_shapes",
    "target_sizes", "num_tiles", "num_local_patches", "video_grid_thw", "video_grids", "video_merge_sizes",
    "video_compression_mask", "target_sizes_videos", "num_video_tiles",
)  # fmt: skip


class CompressedModelMixin(ShortensArgumentsMixin, ContinuesCacheMixin):
    """
    For a base model (vision tower, projector and language model) whose `get_image_features` or `get_video_features`
    returns, besides upstream's fields, `keep_indices` and `num_placeholders` of each view where it dropped tokens.
    """

    # Fields of upstream's output that its tuples lack.
    not_in_tuples: tuple[str, ...] = ()
    # How many dimensions upstream's mask of placeholders has, where it needs features for it.
    placeholder_mask_dims = 3

    # What a family says

    @property
    def reads_question(self) -> bool:
        """Whether the tokens that are kept depend on the question, which `question_mask` then marks."""
        return False

    def is_off(self, num_visual_tokens: Any) -> bool:
        """Whether nothing is to be dropped, whatever the input."""
        return False

    def shows_encoder(self, modality: str) -> bool:
        """Whether `forward` returns hidden states and attentions of the encoder to callers who ask for them."""
        return False

    def expected_counts(self, modality: str, inputs: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        """
        T and N of each input, from the arguments of `get_<modality>_features`, where they are known before the tower
        runs and tokens are dropped; else None.
        """
        return None

    def runs_of(self, modality: str, views: list[list[int]], inputs: dict[str, Any]) -> list[list[int]] | None:
        """
        The lengths of the runs of placeholders that the stock processor writes for each input, of so many tokens in
        each of its `views`. None where an input is one run, or a family cannot tell.
        """
        return None

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        """Whether runs of so many placeholders each stand for whole views; False where a family cannot tell."""
        return False

    def features_of(self, output: Any) -> list[torch.Tensor]:
        """The rows `(tokens, dim)` that go into the prompt, of each entry of an encoder's output."""
        return list(output.pooler_output)

    def put_features(self, output: Any, keep: Callable[[Any], list[torch.Tensor]]) -> None:
        """Replaces in an encoder's output the rows that go into the prompt; `keep` takes those kept out of a list."""
        given = output.pooler_output
        output.pooler_output = tuple(keep(given)) if isinstance(given, tuple) else keep(given)
        if output.get("deepstack_features") is not None:
            output.deepstack_features = [keep(layer) for layer in output.deepstack_features]

    def find_placeholders(
        self, modality: str, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor:
        """Mask `(batch, length)` of the placeholders of `modality`, found as upstream finds them."""
        return self._find_token(getattr(self.config, f"{modality}_token_id"), input_ids, inputs_embeds)

    def _find_token(
        self, token_id: int, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor:
        if input_ids is not None:
            return input_ids == token_id
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def place(self, inputs: dict[str, Any], is_generation: bool, plan: Plan | None = None) -> dict[str, Any]:
        """
        Gives a family the shortened arguments to add to them what upstream cannot find from them, with the `plan`
        where there was something to shorten.
        """
        return inputs

    # The entrance of `forward`

    def forward_compressed(
        self, forward: Callable, input_ids: torch.LongTensor | None = None, is_shortened: bool = False, **inputs
    ):
        """
        Upstream's `forward` on the shortened arguments; what it returns has the caller's columns. The head, which has
        shortened them already (`is_shortened`), gets the short ones.
        """
        if is_shortened:
            return forward(input_ids=input_ids, **inputs)
        inputs, prompt = self.compress({"input_ids": input_ids, **inputs})
        return run_shortened(self, forward, inputs, input_ids, prompt)

    def compress(
        self, inputs: dict[str, Any], is_generation: bool = False
    ) -> tuple[dict[str, Any], ShortPrompt | None]:
        """
        Encodes the views among the arguments of `forward` and shortens everything that runs along the prompt.

        Args:
            inputs (`dict`): arguments of `forward`, by name.
            is_generation (`bool`): the arguments come from `generate`: with a filled cache, `input_ids` may repeat the
                whole conversation, and padding is added on the left.

        Returns:
            The arguments to go on with, and how the prompt was shortened (None if nothing was dropped).

        Raises:
            `ValueError`: if placeholders and views do not match.
        """
        if not torch.compiler.is_compiling() and generating.get() is not self:
            is_counted.set(False)
            settle_rows(cache_of(inputs))
        stated = inputs.get("num_visual_tokens")
        is_stated, is_off = isinstance(stated, (list, tuple, torch.Tensor)), self.is_off(stated)
        requests, plan = self.requests(inputs), None
        if requests and not is_off and columns_of(inputs) is not None:
            plan = self.look_at(inputs, is_generation)
            self._check_before_encoding(plan, requests, is_stated)
        if plan is not None and self.reads_question:
            inputs = QUESTION.encode_views(self, inputs, plan, cache_of(inputs))
        else:
            inputs = self.encode_views({name: value for name, value in inputs.items() if name != "question_mask"})
        unchanged = self._pass_on(inputs, is_generation, is_off)
        if unchanged is not None:
            return unchanged, None

        dropped = self._dropped_tokens(inputs)
        if plan is None:  # later steps on a cache have no views to look for
            is_needed = bool(dropped) or is_generation or cache_of(inputs) is None
            plan = self.look_at(inputs, is_generation, is_needed)
        if is_generation and plan.earlier is not None and self.reads_question:
            QUESTION.check_kept(self.config.prunesid_config, CACHE_NAME)
        inputs = self._go_on_with_cache(inputs, plan)
        self._check_not_forgotten(inputs, plan, is_generation)
        keep_mask, num_dropped = self._mark_kept(inputs, plan, requests, is_stated)
        if dropped and not is_generation:
            inputs = self._ignore_placeholders(inputs, plan)
        prompt = self._plan_prompt(inputs, plan, keep_mask, num_dropped, is_generation)
        if prompt is not None:
            inputs = self._shorten(inputs, prompt)
        self._check_prompt_goes_on(plan, columns_of(inputs).shape[1], dropped or prompt)
        inputs = self.place(inputs, is_generation, plan)
        if not is_generation and plan.cached_length and (prompt is not None or plan.earlier is not None):
            inputs = self._place_behind_cache(inputs, plan, prompt)
        return self._settle(inputs, plan, sum(num_dropped or [])), prompt

    def _pass_on(self, inputs: dict[str, Any], is_generation: bool, is_off: bool) -> dict[str, Any] | None:
        """The arguments as they go on where there is nothing to shorten; None where there may be."""
        columns, cache, is_traced = columns_of(inputs), cache_of(inputs), torch.compiler.is_compiling()
        if columns is None:
            return inputs
        if self._dropped_tokens(inputs):
            return None
        if not is_generation and not is_traced and generating.get() is self:
            return self.place(inputs, is_generation)  # a step of our `generate`, on what it has shortened
        # A compiled step has its mask in the form that attention takes, which fits the cache.
        has_memory = hasattr(cache, "_prunesid_prompt") or hasattr(cache, "_prunesid_rope_deltas")
        if has_memory and (is_flat(inputs.get("attention_mask")) or not is_traced):
            return None
        if not is_generation and (is_traced or columns.shape[1] == 1):
            return inputs  # the common decoding step: nothing to look at, and no wait for the device
        return self.place(inputs, is_generation) if is_off else None

    def requests(self, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """
        The arguments of `get_<modality>_features` among those of `forward`, of each modality that is given as pixels.

        Raises:
            `ValueError`: if a modality is given both as pixels and as encoded features.
        """
        found = {}
        for modality, pixels in PIXELS.items():
            encode = getattr(self, f"get_{modality}_features", None)
            if encode is None:
                continue
            names = [name for name in inspect.signature(encode).parameters if inputs.get(name) is not None]
            if not set(pixels).intersection(names):
                continue
            if (inputs.get("mm_encoder_outputs") or {}).get(modality) is not None:
                raise ValueError(
                    f"You cannot specify both {pixels[0]} and mm_encoder_outputs[{modality!r}]; drop one of them."
                )
            names += [name for name in SHOWN if inputs.get(name) is not None and self.shows_encoder(modality)]
            found[modality] = {name: inputs[name] for name in names}
        return found

    def encode_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace the pixels among the arguments of `forward` by encoded features, as upstream's `generate` does."""
        requests = self.requests(inputs)
        consumed = {"num_visual_tokens"}.union(*requests.values()).difference(SHOWN)
        asked, encoded = None if torch.compiler.is_compiling() else ASKED.get(), {}
        for modality, arguments in requests.items():
            if asked is not None:
                asked.modality = modality
            encoded[modality] = getattr(self, f"get_{modality}_features")(**arguments, return_dict=True)
        outputs = dict(inputs.get("mm_encoder_outputs") or {})
        inputs = {name: value for name, value in inputs.items() if name not in consumed}
        if encoded:
            inputs["mm_encoder_outputs"] = {**outputs, **encoded}
        return inputs

    def look_at(self, inputs: dict[str, Any], is_generation: bool = False, is_needed: bool = True) -> Plan:
        """What the plan for a prompt reads of the arguments of `forward`, in one copy to the host if `is_needed`."""
        ids, embeds, mask = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        cache, columns = cache_of(inputs), columns_of(inputs)
        cached_length = int(cache.get_seq_length()) if cache is not None else 0
        earlier = CachedPrompt.recall(cache, len(columns))
        repeats_cached = is_generation and (not is_flat(mask) or mask.shape[1] == columns.shape[1])
        if not is_needed:
            return Plan.behind(earlier, cached_length, repeats_cached, {})
        known = dict.fromkeys([*PIXELS, *(inputs.get("mm_encoder_outputs") or {})])
        names = [name for name in known if getattr(self.config, f"{name}_token_id", None) is not None]
        tensors = {"ids": ids}
        if ids is None:
            tensors = {name: self.find_placeholders(name, None, embeds) for name in names}
        elif earlier is not None and repeats_cached:
            tensors |= earlier.compare(ids)
        if is_flat(mask):
            tensors["mask"] = mask != 0
        for name in ("labels", "shift_labels"):
            if inputs.get(name) is not None and inputs[name].shape == columns.shape[:2]:
                tensors[name] = inputs[name] != IGNORED_LABEL
        if isinstance(inputs.get("question_mask"), torch.Tensor):
            tensors["question"] = inputs["question_mask"] != 0
        tensors |= {name: inputs[name] for name in _SIZES if isinstance(inputs.get(name), torch.Tensor)}
        host = to_host(tensors)
        plan = Plan.behind(earlier, cached_length, repeats_cached, host)
        ids, plan.sizes = host.get("ids"), {name: host[name] for name in _SIZES if name in host}
        plan.placeholders = {
            name: host[name] if ids is None else self.find_placeholders(name, ids, None) for name in names
        }
        return plan

    def _check_before_encoding(self, plan: Plan, requests: dict[str, dict[str, Any]], is_stated: bool) -> None:
        """Raise a `ValueError` for placeholders that do not fit, before the tower runs, where that can be known."""
        if torch.compiler.is_compiling():
            return
        plan.check_cache()
        for modality, arguments in requests.items():
            arguments |= {name: value for name, value in plan.sizes.items() if name in arguments}
            counts = self.expected_counts(modality, arguments) if modality in plan.placeholders else None
            if counts is not None:
                plan.read(modality, *counts, is_stated)

    def _check_not_forgotten(self, inputs: dict[str, Any], plan: Plan, is_generation: bool) -> None:
        """
        Upstream embeds a placeholder without a view like a word; with compression on, that is an error. A `forward` on
        ids that are no prompt, as profilers and tests run it, is left to upstream: there only whole views count.
        """
        is_whole_prompt = cache_of(inputs) is None
        if is_generation:
            is_whole_prompt = not plan.cached_length or plan.earlier is not None
        input_ids, outputs = plan.input_ids, self._outputs(inputs)
        if input_ids is None or inputs.get("inputs_embeds") is not None or not is_whole_prompt:
            return
        if self.config.prunesid_config.budget is None or torch.compiler.is_compiling():
            return
        for modality in outputs.keys() & plan.placeholders.keys():  # a placeholder may be that of two modalities
            input_ids = input_ids.masked_fill(plan.placeholders[modality], -1)
        for modality, pixels in PIXELS.items():
            token_id = getattr(self.config, f"{modality}_token_id", None)
            if token_id is None or modality in outputs:
                continue
            placeholders = plan.without_answer(input_ids == token_id)[:, plan.start :]
            found = int(placeholders.sum())
            if found and (is_generation or self.are_whole_views(run_lengths(placeholders))):
                raise ValueError(
                    f"{modality.capitalize()} features and {modality} tokens do not match, tokens: {found}, "
                    f"features: 0. The prompt has {modality} placeholders but no {modality}; pass {pixels[0]}."
                )

    def _mark_kept(
        self, inputs: dict[str, Any], plan: Plan, requests: dict[str, dict[str, Any]], is_stated: bool
    ) -> tuple[torch.BoolTensor | None, list[int] | None]:
        """The columns `(batch, length)` that remain, None for all, and how many each row loses."""
        keep_mask, num_dropped = None, None
        for modality, output in self._dropped_tokens(inputs).items():
            num_kept = [len(kept) for kept in output.keep_indices]
            runs = functools.partial(self._short_runs, modality, output, requests.get(modality, {}))
            reading = plan.read(modality, output.num_placeholders, num_kept, is_stated, runs)
            if reading is None:
                continue
            views, of_views = output.get("view_lengths"), output.get("num_kept_of_views")
            kept = reading.mark_kept(output.keep_indices, columns_of(inputs).device, views, of_views)
            keep_mask = kept if keep_mask is None else keep_mask & kept
            lost = reading.num_dropped(num_kept, plan.start)
            num_dropped = lost if num_dropped is None else [sum(own) for own in zip(num_dropped, lost)]
        return keep_mask, num_dropped

    def _short_runs(self, modality: str, output: Any, inputs: dict[str, Any]) -> list[list[int]] | None:
        """
        The lengths of the runs of short prompts of an encoder's output, where the stock processor writes several: as
        our processor shares the N of an input over its views, and as the model does.
        """
        views = output.get("view_lengths")
        runs = None if views is None else self.runs_of(modality, views, inputs)
        if runs is None:
            return None
        equal = [share_total(len(kept), [1.0] * len(own), own) for own, kept in zip(views, output.keep_indices)]
        shared = [
            itertools.chain(*(share_over_runs(*own) for own in zip(runs, views, kept_of_views)))
            for kept_of_views in (equal, output["num_kept_of_views"])
        ]
        return [[length for length in lengths if length] for lengths in shared]

    def _plan_prompt(
        self,
        inputs: dict[str, Any],
        plan: Plan,
        keep_mask: torch.BoolTensor | None,
        num_dropped: Any,
        is_generation: bool,
    ) -> ShortPrompt | None:
        """The short prompt, behind the one that is in the cache if `input_ids` repeat that."""
        if keep_mask is None and not plan.start:
            return None
        is_traced = torch.compiler.is_compiling()  # rows lose as many columns each, and nothing is added
        padding_side = "left" if is_generation or is_traced or not plan.is_right_padded else "right"
        if plan.start:
            columns = inputs["input_ids"]
            if keep_mask is None:
                keep_mask, num_dropped = torch.ones_like(columns, dtype=torch.bool), [0] * len(columns)
            rest = ShortPrompt.from_keep_mask(keep_mask[:, plan.start :], padding_side, num_dropped=num_dropped)
            prompt = plan.earlier.prompt.then(rest)
        else:
            # Padding gives way to rows that lost less; a length that the caller pads to shrinks by what was dropped.
            padding = None if is_traced else plan.padding(self._outputs(inputs), leading_only=padding_side == "left")
            length = keep_mask.shape[1] - max(num_dropped)
            prompt = ShortPrompt.from_keep_mask(keep_mask, padding_side, length, padding, num_dropped)
        prompt.cached_before = 0 if plan.repeats_cached else plan.cached_length
        return prompt

    @staticmethod
    def _outputs(inputs: dict[str, Any]) -> dict[str, Any]:
        """The encoded modalities, by name."""
        return {name: out for name, out in (inputs.get("mm_encoder_outputs") or {}).items() if out is not None}

    def _dropped_tokens(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The encoded modalities of which tokens were dropped, by name."""
        return {
            name: output
            for name, output in self._outputs(inputs).items()
            if getattr(output, "keep_indices", None) is not None
        }

    def get_placeholder_mask(self, *args, **kwargs):
        """Upstream's, without its count of what was counted at the entrance, which would wait for the device."""
        if torch.compiler.is_compiling() or not is_counted.get():
            return super().get_placeholder_mask(*args, **kwargs)
        signature = inspect.signature(super().get_placeholder_mask)
        given = signature.bind(*args, **kwargs).arguments
        needed = [
            name
            for name, parameter in signature.parameters.items()
            if name.endswith("features") and parameter.default is parameter.empty
        ]
        if not needed:  # without features upstream only looks for placeholders
            return super().get_placeholder_mask(
                **{name: value for name, value in given.items() if name not in ("image_features", "video_features")}
            )
        token_id = given.get("token_id", self.config.image_token_id)
        mask = self._find_token(token_id, given["input_ids"], given["inputs_embeds"]).to(given["inputs_embeds"].device)
        return mask.unsqueeze(-1) if self.placeholder_mask_dims == 3 else mask
