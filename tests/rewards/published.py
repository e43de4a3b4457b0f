"""Tiny checkpoints in the formats in which scorers are published, written with the originals' names."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WORDS = ["a", "red", "blue", "circle", "square", "and", "on", "the", "two", "squares"]


def clip_tokenizer(length: int = 8) -> CLIPTokenizer:
    """A tokenizer of single characters whose end of text is the highest token, as CLIP's is."""
    characters = sorted(set("".join(WORDS)))
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length
    )


def shaken(model: torch.nn.Module, std: float, seed: int = 0) -> torch.nn.Module:
    """Weights that differ enough for different inputs to differ; also norms, biases and class tokens."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(std * torch.randn(weight.shape, generator=draw))
    return model.eval()


def clip_of_towers(width: int = 128, text_width: int = 64) -> CLIPModel:
    """A CLIP with two layers a tower, of which head widths are 64, as of most open_clip models."""
    towers = {"num_hidden_layers": 2, "hidden_act": "gelu", "intermediate_size": 32}
    count = len(clip_tokenizer())
    text = towers | {
        "hidden_size": text_width,
        "num_attention_heads": text_width // 64,
        "vocab_size": count,
        "max_position_embeddings": 8,
        "eos_token_id": count - 1,
        "bos_token_id": count - 2,
    }
    vision = towers | {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    return shaken(model, 0.05)


def open_clip_names(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The state dict that open_clip has of the same model: written out, not by the tables under test."""
    state = model.state_dict()
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T.clone(),
        "visual.proj": state["visual_projection.weight"].T.clone(),
        "attn_mask": torch.zeros(8, 8),
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for part in ("weight", "bias"):
        found[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
        found[f"visual.ln_pre.{part}"] = state[f"vision_model.pre_layrnorm.{part}"]
        found[f"visual.ln_post.{part}"] = state[f"vision_model.post_layernorm.{part}"]
        for tower, theirs in (("text", ""), ("vision", "visual.")):
            for layer in range(2):
                ours = f"{tower}_model.encoder.layers.{layer}"
                block = f"{theirs}transformer.resblocks.{layer}"
                found[f"{block}.attn.in_proj_{part}"] = torch.cat(
                    [state[f"{ours}.self_attn.{name}_proj.{part}"] for name in "qkv"]
                )
                found[f"{block}.attn.out_proj.{part}"] = state[f"{ours}.self_attn.out_proj.{part}"]
                found[f"{block}.ln_1.{part}"] = state[f"{ours}.layer_norm1.{part}"]
                found[f"{block}.ln_2.{part}"] = state[f"{ours}.layer_norm2.{part}"]
                found[f"{block}.mlp.c_fc.{part}"] = state[f"{ours}.mlp.fc1.{part}"]
                found[f"{block}.mlp.c_proj.{part}"] = state[f"{ours}.mlp.fc2.{part}"]
    return found


def hps(folder: Path, file: str = "HPS_v2.1_compressed.pt") -> CLIPModel:
    """A folder with a checkpoint of HPS v2 and a tokenizer; returns the model that it holds."""
    folder.mkdir(exist_ok=True)
    model = clip_of_towers()
    torch.save({"epoch": 1, "state_dict": open_clip_names(model)}, folder / file)
    clip_tokenizer().save_pretrained(folder)
    return model


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """A tokenizer with whole words, as bert-base-uncased's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def image_reward(folder: Path) -> tuple[BlipVisionModel, BlipTextModel, torch.nn.Sequential]:
    """A folder with a checkpoint of ImageReward and a tokenizer; returns the models that it holds."""
    folder.mkdir(exist_ok=True)
    words = len(bert_tokenizer(folder)) + 2  # BLIP adds two that are never used
    torch.manual_seed(0)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words,
            hidden_size=64,
            encoder_hidden_size=128,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=40,
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    shaken(vision, 0.1), shaken(text, 0.1)
    sizes = (64, 24, 12, 6, 4, 1)
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise(sizes)))
    shaken(head, 0.1)
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "encoder.layers": "blocks",
    }
    state: dict[str, torch.Tensor] = {}
    for key, value in vision.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[f"blip.visual_encoder.{key}"] = value
    for key, value in text.state_dict().items():
        state[f"blip.text_encoder.{key}"] = value
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for unused, width in (("vision_proj", 128), ("text_proj", 64)):
        state[f"blip.{unused}.weight"], state[f"blip.{unused}.bias"] = torch.zeros(8, width), torch.zeros(8)
    for layer, linear in zip((0, 2, 4, 6, 7), head, strict=True):
        state[f"mlp.layers.{layer}.weight"] = linear.weight.detach()
        state[f"mlp.layers.{layer}.bias"] = linear.bias.detach()
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text("{}")
    return vision, text, head


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the words of answers, and Qwen-VL's marks."""
    words = [*SPECIAL, "Yes", "No", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    words += ["Ye"]
    model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT,
    )


def qwen_vl(folder: Path, extra: int = 0) -> Qwen2VLForConditionalGeneration:
    """A folder with a model of Qwen2-VL's form with random weights; ``extra`` tokens are added."""
    folder.mkdir(exist_ok=True)
    tokenizer = qwen_tokenizer()
    number = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}
    text = {
        "vocab_size": len(tokenizer) + extra,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "bos_token_id": number["<|endoftext|>"],
        "eos_token_id": number["<|im_end|>"],
        "pad_token_id": number["<|endoftext|>"],
    }
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    shaken(model, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28).save_pretrained(folder)
    return model


def hpsv3(folder: Path) -> tuple[Qwen2VLForConditionalGeneration, torch.nn.Sequential]:
    """A checkpoint of HPSv3 beside its base; returns the models that it holds."""
    model = qwen_vl(folder, extra=1)
    sizes = (32, 24, 16, 2)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    relu, dropout = torch.nn.ReLU(), torch.nn.Dropout(0.05)
    head = torch.nn.Sequential(layers[0], relu, dropout, layers[1], torch.nn.ReLU(), layers[2])
    shaken(head, 0.3)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        state[key] = value.clone()
    state |= {f"rm_head.{key}": value.clone() for key, value in head.state_dict().items()}
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "HPSv3.safetensors")
    return model, head
