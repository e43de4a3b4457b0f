"""Shapes: a small procedural world of captioned pictures, in which a picture can be judged exactly."""

from pathlib import Path

PIPELINE = Path(__file__).parent / "weights" / "pipeline"
"""Folder of the shipped text-to-image pipeline, in the ordinary diffusers format."""

CLIP = Path(__file__).parent / "weights" / "clip"
"""Folder of the shipped CLIP model and its tokenizer, in the ordinary transformers format."""
