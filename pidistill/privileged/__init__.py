"""Privileged information: what the teacher sees and the student does not."""

from pidistill.privileged.hindsight import Hindsight, Transcript
from pidistill.privileged.prompt import PrivilegedPrompt

__all__ = ["Hindsight", "PrivilegedPrompt", "Transcript"]
