"""Networks with exits as files for other runtimes, and what runs these files."""

from .torch_runner import Answers, OnnxCascade, TorchCascade, load

__all__ = ["Answers", "OnnxCascade", "TorchCascade", "load"]
