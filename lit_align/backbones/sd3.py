"""Stable Diffusion 3 and 3.5, and the bundled flow model in their format."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from lit_align.backbones.transformer import TransformerBackbone
from lit_align.shapes import FLOW_PIPELINE
from lit_align.shapes.world import is_shapes_vocabulary
from lit_align.tokens import Counts, count_tokens

WORDS = 256
"""Tokens of a prompt that T5 reads: the pipeline's default. Its tokenizer would allow 512."""


class StableDiffusion3Backbone(TransformerBackbone):
    """A ``StableDiffusion3Pipeline``, with T5 (``text_encoder_3``) or without, as its folder has it."""

    pipeline_class = StableDiffusion3Pipeline
    bundled = FLOW_PIPELINE
    without: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")

    @property
    def is_shapes(self) -> bool:
        return is_shapes_vocabulary(self.pipeline.tokenizer.get_vocab())

    @cached_property
    def words(self) -> int:
        """Tokens of T5, or of zeros in its place: the bundled model has learned without either."""
        return 0 if self.is_shapes and self.pipeline.text_encoder_3 is None else WORDS

    def prompt_tokens(self, prompt: str) -> Counts:
        """Of T5, where it is there: the others read fewer."""
        t5 = self.pipeline.tokenizer_3
        return super().prompt_tokens(prompt) if t5 is None else [(count_tokens(t5, prompt), WORDS)]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.words,
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def pipeline_options(self, guidance: float) -> dict[str, Any]:
        return super().pipeline_options(guidance) | {"max_sequence_length": self.words}

    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        del guidance  # this family is guided by two predictions
        velocity: Tensor = network(x, timestep=t, return_dict=False, **cond)[0]
        return velocity

    @property
    def unread(self) -> tuple[str, ...]:
        # The last block has no output for the prompt, and so none for its queries.
        last = f"transformer_blocks.{len(self.blocks(self.network)) - 1}.attn"
        return f"{last}.add_q_proj", f"{last}.norm_added_q"

    @classmethod
    def adapted(cls, network: Any) -> list[str]:
        # Of the image's attention and the prompt's, as in diffusers' train_dreambooth_lora_sd3.py.
        of_prompt = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        return [*super().adapted(network), *of_prompt]
