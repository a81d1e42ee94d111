"""Settings for a longer run, against a table worked out by hand."""

from dataclasses import replace

import pytest

from myllm.config import OptimConfig
from myllm.planning.transfer import describe_transfer, transfer

TUNED = OptimConfig(optimizer="muon", max_lr=1e-2, muon_lr=2e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("ratio", "rate", "decay"),
    # 2^-0.32 = 0.80107 and 2^-0.68 = 0.62417; their squares for 4; 1 / 0.80107 and 1 / 0.62417 for a half.
    [(1, 1.0, 1.0), (2, 0.80107, 0.62417), (4, 0.64171, 0.38958), (0.5, 1.24833, 1.60214)],
)
def test_rates_and_decay(ratio, rate, decay):
    longer = transfer(TUNED, ratio)
    assert longer.max_lr == pytest.approx(1e-2 * rate, rel=1e-4)
    assert longer.muon_lr == pytest.approx(2e-2 * rate, rel=1e-4)
    assert longer.weight_decay == pytest.approx(0.1 * decay, rel=1e-4)
    kept = longer.max_lr * longer.weight_decay * ratio
    assert kept == pytest.approx(TUNED.max_lr * TUNED.weight_decay)


def test_transfer_composes_and_preserves_other_settings():
    longer = transfer(TUNED, 9)
    assert replace(longer, max_lr=1e-2, muon_lr=2e-2, weight_decay=0.1) == TUNED
    again = transfer(transfer(TUNED, 3), 3)
    assert (again.max_lr, again.weight_decay) == pytest.approx((longer.max_lr, longer.weight_decay))
    assert transfer(replace(TUNED, weight_decay=0.0), 9).weight_decay == 0


def test_description_lists_changes():
    assert describe_transfer(TUNED, transfer(TUNED, 2)) == (
        "muon_lr 0.02 -> 0.016, max_lr 0.01 -> 0.00801, weight_decay 0.1 -> 0.0624: the rate follows tokens^-0.32 "
        "(arXiv 2603.28743), and the weight decay keeps rate x decay x steps"
    )
    plain = replace(TUNED, optimizer="adamw")
    assert "muon" not in describe_transfer(plain, transfer(plain, 2))


@pytest.mark.parametrize("ratio", [0, -1, float("nan")])
def test_invalid_ratio_raises(ratio):
    with pytest.raises(ValueError, match="tokens_ratio"):
        transfer(TUNED, ratio)
