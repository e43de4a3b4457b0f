"""Shapes: a small procedural world of captioned images, in which an image can be judged exactly."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the shipped models, but for the flow model."""

PIPELINE = WEIGHTS / "pipeline"
"""Folder of the shipped text-to-image pipeline, in the ordinary diffusers format."""

CLIP = WEIGHTS / "clip"
"""Folder of the shipped CLIP model and its tokenizer, in the ordinary transformers format."""

DETECTOR = WEIGHTS / "detector"
"""Folder of the shipped YOLOS detector of shapes, in the ordinary transformers format."""

CLASSIFIER = WEIGHTS / "classifier"
"""Folder of the shipped classifier of the objects' colour, in the ordinary transformers format."""

WEIGHTS_HASH = "472dcac6d3ec2335"
"""First 16 digits of the SHA-256 of ``weights/`` (see ``recipe.pipeline.digest``); results name it."""

FLOW_PIPELINE = Path(__file__).parent / "flow"
"""Folder of the shipped flow model, a text-to-image pipeline in Stable Diffusion 3's format."""

FLOW_WEIGHTS_HASH = "35b231348852d0f7"
"""As :data:`WEIGHTS_HASH`, of ``flow/``: apart, so that results of the other models do not depend on it."""

PICK = Path(__file__).parent / "pick" / "pairs.parquet"
"""A sample of Shapes-Pick: 1,000 judged pairs of images in Pick-a-Pic's schema."""

PROMPTS = Path(__file__).parent / "prompts"
"""Folder of prompt sets (see ``lit_align.data.ShapesPromptSet``)."""

PREFERENCE = WEIGHTS / "preference"
"""Folder of the shipped CLIP model fine-tuned on preferences, and its tokenizer, in PickScore's format."""

AESTHETIC = WEIGHTS / "aesthetic" / "model.safetensors"
"""File of the shipped aesthetic head, in the format of LAION's improved-aesthetic-predictor."""
