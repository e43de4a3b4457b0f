"""Image-text-to-text models of transformers, asked about images: an answer, or a word's probability."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype, load_whole, loading, resolve
from lit_align.rewards.base import to_bytes
from lit_align.shapes import CLIP as SHAPES_CLIP  # stands for "shapes", which no such model has


class VisionLanguage(nn.Module):
    """A frozen image-text-to-text model with its processor.

    Args:
        pretrained: A folder or a hub id. Safetensors only.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The model or its processor cannot be loaded.
    """

    IMAGES_AT_ONCE = 8

    def __init__(self, pretrained: str, dtype: Dtype = "bfloat16") -> None:
        super().__init__()
        load = AutoModelForImageTextToText.from_pretrained
        self.model: PreTrainedModel = load_whole(
            load, pretrained, SHAPES_CLIP, "image-text-to-text model", dtype
        )
        self.processor = load_processor(pretrained)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @torch.no_grad()
    def probabilities(self, images: Tensor, texts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Probability ``(N,)`` that the model's answer begins with a word.

        Args:
            images: ``(N, 3, H, W)`` in [0, 1].
            texts: What the model is asked, N.
            answers: The words, N; of a word of several tokens the first counts.
        """
        words = torch.tensor([self.first_token(answer) for answer in answers])
        found = []
        for rows, inputs in self.inputs(images, texts):
            told = self.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            likely = told.logits[0].float().softmax(dim=-1)
            found.append(likely.gather(1, words[rows, None].to(likely.device))[:, 0])
        return torch.cat(found).to(images.device)

    @torch.no_grad()
    def answers(self, images: Tensor, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """What the model answers, by its most likely words; arguments as of :meth:`probabilities`."""
        said: list[str] = []
        for _, inputs in self.inputs(images, texts):
            told = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = told if self.model.config.is_encoder_decoder else told[:, inputs["input_ids"].shape[1] :]
            said += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return said

    def inputs(self, images: Tensor, texts: Sequence[str]) -> Iterator[tuple[Tensor, Any]]:
        """The rows of some images, and what the model reads of them and of their texts."""
        pixels = to_bytes(images)
        for rows in torch.arange(len(images)).split(self.IMAGES_AT_ONCE):
            chosen = [Image.fromarray(pixels[row]) for row in rows]
            prepared = prepare(self.processor, chosen, [texts[row] for row in rows])
            yield rows, prepared.to(self.model.device, self.model.dtype)

    def first_token(self, word: str) -> int:
        """Number of the token that an answer with this word begins with.

        Raises:
            ConfigError: The tokenizer does not know it.
        """
        tokens = self.tokenizer.encode(word, add_special_tokens=False)
        if not tokens or tokens[0] == self.tokenizer.unk_token_id:
            raise ConfigError(f"answer: the model's tokenizer does not know {word!r}; give another word.")
        return int(tokens[0])


def prepare(processor: Any, images: Sequence[Image.Image], texts: Sequence[str], **options: Any) -> Any:
    """The tensors of a processor for images and texts: by its chat template where it has one.

    Args:
        processor: Of :func:`load_processor`.
        images: N.
        texts: What the model is asked, N.
        options: Further settings of the processor.
    """
    options["padding"] = True
    if processor.chat_template is None:
        return processor(images=list(images), text=list(texts), return_tensors="pt", **options)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for image, text in zip(images, texts, strict=True)
    ]
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def load_processor(pretrained: str) -> Any:
    """The processor of an image-text-to-text model, which pads on the left, as generation needs.

    Raises:
        ConfigError: It cannot be loaded.
    """
    with loading(pretrained):
        place = resolve(pretrained, SHAPES_CLIP)
        kind: Any = PROCESSOR_MAPPING.get(
            type(AutoConfig.from_pretrained(place, trust_remote_code=False)), AutoProcessor
        )
        if not is_torchvision_available() and "video_processor" in getattr(kind, "get_attributes", list)():
            kind = _without_videos(kind)
        processor = kind.from_pretrained(place, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        return processor


def _without_videos(kind: Any) -> Any:
    """A processor that needs no torchvision: only videos do, and images come without."""

    class Still(kind):  # type: ignore[misc]
        """The same processor, which never loads the part for videos."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

    return Still


def checked_question(question: str, name: str) -> str:
    """A question with a place for the prompt.

    Raises:
        ConfigError: It has none.
    """
    if "{}" not in question:
        raise ConfigError(f"{name}: question {question!r} has no {{}}, the place of the prompt.")
    return question
