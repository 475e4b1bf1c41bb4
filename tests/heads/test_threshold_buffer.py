"""Thresholds in a buffer: checked when they are assigned, float32 whatever becomes of the rest."""

import pytest
import torch
from support.helpers import INF, NAN
from torch import nn

from e2cm_ext.heads.threshold_buffer import ThresholdModule
from e2cm_ext.heads.thresholds import threshold_vector


class Exits(ThresholdModule, buffer="thresholds"):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("thresholds", torch.full((2,), INF))
        self.other = 3

    def check_thresholds(self, value):
        return threshold_vector(value, 2)


def test_what_is_assigned_is_checked():
    exits = Exits()
    exits.thresholds = [0.1, INF]
    with pytest.raises(ValueError, match="NaN at exit 1"):
        exits.thresholds = torch.tensor([0.5, NAN])
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        exits.thresholds = [0.5] * 3
    assert exits.thresholds.tolist() == torch.tensor([0.1, INF]).tolist()
    assert list(dict(exits.named_buffers())) == ["thresholds"]


def test_what_is_assigned_is_copied():
    exits, mine = Exits(), torch.tensor([0.25, 0.5])
    exits.thresholds = mine
    mine.fill_(0)
    assert exits.thresholds.tolist() == [0.25, 0.5]


def test_half_leaves_thresholds_as_they_are():
    exits = Exits()
    exits.thresholds = [0.1, 0.3]
    before = exits.thresholds.clone()
    for module in (exits.half(), exits.bfloat16(), exits.double(), exits.to(torch.float16)):
        assert module.linear.weight.dtype is not torch.float32
        assert torch.equal(module.thresholds, before) and module.thresholds.dtype is torch.float32
    assert exits.to("meta").thresholds.is_meta


@torch.inference_mode()
def test_thresholds_of_inference_mode_can_be_changed_outside_of_it():
    exits = Exits()
    exits.thresholds = torch.tensor([0.1, 0.3])
    assert not exits.thresholds.is_inference()


def test_a_class_that_does_not_check_says_so():
    class Unchecked(ThresholdModule, buffer="threshold"):
        def __init__(self):
            super().__init__()
            self.register_buffer("threshold", torch.tensor(INF))

    with pytest.raises(NotImplementedError, match=r"Unchecked needs a check_thresholds\(\)"):
        Unchecked().threshold = 0.5
