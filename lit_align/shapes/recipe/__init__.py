"""How the shipped Shapes weights were made: ``python -m lit_align.shapes.recipe --out DIR``.

Stages, each in its own file and resumable by its output folder: ``images``, ``tokenizer``, ``clip``,
``vae``, ``decoder``, ``unet``, ``quality``.
"""
