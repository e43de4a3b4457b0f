"""lit_align: align text-to-image diffusion models with rewards and preferences."""
