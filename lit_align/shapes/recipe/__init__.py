"""How the shipped Shapes weights were made: ``python -m lit_align.shapes.recipe --out DIR``.

Each stage of :class:`~lit_align.shapes.recipe.stages.Recipe` is resumable by its output folder.
"""
