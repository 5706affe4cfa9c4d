"""The checker itself: broken backbones and wrong claims must fail it."""

from __future__ import annotations

import pytest
import torch
from broken_backbones import (
    FAULTS,
    SUBTLE,
    BreaksTheGraph,
    ComputesSomethingElseCompiled,
    SelectsNothing,
)

from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig


@pytest.mark.parametrize("backbone", FAULTS)
def test_a_broken_backbone_fails(backbone):
    with pytest.raises(AssertionError, match=rf"^{FAULTS[backbone]} "):
        check_backbone(backbone)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backbone", "memory"), [(BreaksTheGraph, True), (ComputesSomethingElseCompiled, False)])
def test_a_backbone_that_does_not_compile_fails(backbone, memory):
    with pytest.raises(AssertionError, match="^P14 "):
        check_backbone(backbone, in_dim=3, max_seq_len=3, length=6, lanes=3, memory=memory, compile=True)


@pytest.mark.parametrize("backbone", [backbone for backbone in FAULTS if backbone not in SUBTLE])
def test_a_broken_backbone_fails_in_bfloat16(backbone):
    with pytest.raises(AssertionError, match=rf"^{FAULTS[backbone]} "):
        check_backbone(backbone, dtype=torch.bfloat16)


def test_a_wrong_claim_about_memory_fails():
    with pytest.raises(AssertionError, match="^P11"):
        check_backbone(FFConfig(d_model=8).build)
    with pytest.raises(AssertionError, match="^P11"):
        check_backbone(GRUConfig(d_hidden=8, d_output=8).build, memory=False)


def test_a_state_that_cannot_select_fails():
    with pytest.raises((AssertionError, ValueError)):
        check_backbone(SelectsNothing)


@pytest.mark.parametrize(("claim", "positions"), [("sensitive", "rotary"), ("invariant", "fixed")])
def test_a_wrong_claim_about_time_fails(claim, positions):
    small = {"d_model": 16, "n_heads": 2, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}
    config = TransformerConfig(positions=positions, **small)
    with pytest.raises(AssertionError, match="^P9"):
        check_backbone(config.build, time_offset=claim)


@pytest.mark.parametrize("wrong", [{"dropout": True}, {}])
def test_a_wrong_claim_about_dropout_fails(wrong):
    config = FFConfig(d_model=8, dropout=0.0 if wrong else 0.5)
    with pytest.raises(AssertionError, match="^P8"):
        check_backbone(config.build, memory=False, **wrong)


def test_arguments_are_checked():
    build = FFConfig(d_model=8).build
    with pytest.raises(ValueError, match="lanes=2"):
        check_backbone(build, lanes=2)
    with pytest.raises(ValueError, match="time_offset='some'"):
        check_backbone(build, time_offset="some")
    with pytest.raises(ValueError, match="length=3"):
        check_backbone(build, length=3)
    with pytest.raises(ValueError, match="dtype=torch.float16"):
        check_backbone(build, dtype=torch.float16)
    with pytest.raises(ValueError, match="compile=True"):
        check_backbone(build, dropout=True, compile=True)
