"""Models that torchtune lacks, and checkpoints in Hugging Face's format."""

from pidistill.models.hf_format import from_hf, to_hf

__all__ = ["from_hf", "to_hf"]
