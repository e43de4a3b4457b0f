"""Export for other programs: adapters, kohya files, pipelines; each is compared with the live model."""

from lit_align.export.forms import FORMS, Exported, export
from lit_align.export.live import Live, mixture_of, read_run

__all__ = ["FORMS", "Exported", "Live", "export", "mixture_of", "read_run"]
