"""Entry point of ``python -m lit_align``."""

import os

# Before torch is imported: threads that spin while they wait make a busy CPU several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before transformers is imported: it would tell at length that torchvision, which nothing here uses, is not
# installed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from lit_align.cli import main

if __name__ == "__main__":
    main()
