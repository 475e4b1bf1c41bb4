"""A buffer of thresholds that is checked on assignment and stays float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ThresholdModule"]


class ThresholdModule(nn.Module):
    """Base class of modules whose thresholds are a buffer.

    An assignment to the attribute is checked, and kept as a float32 buffer on the module's device. The buffer stays
    float32 under `.half()` and the like: rounded thresholds would make other decisions.

    A subclass names the buffer in the class statement, registers it with the number of thresholds that it has, and
    implements `check_thresholds`.

    Example:
        class Exits(ThresholdModule, buffer="thresholds"):
            def __init__(self, exits):
                super().__init__()
                self.register_buffer("thresholds", torch.full((exits,), math.inf))

            def check_thresholds(self, value):
                return threshold_vector(value, len(self.thresholds))

        exits = Exits(2)
        exits.thresholds = [0.5, 0.9]
    """

    _threshold_buffer: ClassVar[str]

    def __init_subclass__(cls, buffer: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if buffer is not None:
            cls._threshold_buffer = buffer

    def check_thresholds(self, value: Any) -> Tensor:
        """Convert what is assigned to a float32 tensor.

        Raises:
            TypeError: `value` has another type.
            ValueError: `value` has another shape, or holds NaN.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a check_thresholds()")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self._threshold_buffer and name in self._buffers:
            value = self._to_buffer(value)
        super().__setattr__(name, value)

    @torch.inference_mode(False)  # a buffer made in inference mode could not be written to outside of it
    def _to_buffer(self, value: Any) -> Tensor:
        buffer = self._buffers[self._threshold_buffer]
        assert buffer is not None
        return self.check_thresholds(value).clone().to(buffer.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        name = self._threshold_buffer
        before = self._buffers[name]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers[name]
        assert before is not None and after is not None
        if after.dtype is not torch.float32:
            self._buffers[name] = before.to(after.device)
        return self
