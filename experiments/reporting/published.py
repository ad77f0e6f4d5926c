"""Published figures that stand beside those of the runs, each with its source."""

from __future__ import annotations

PAPER = "DoRA, arXiv 2402.09353v6"
DESIGN = "this project's design document; not in the paper"

CORRELATIONS = {"full": -0.62, "lora": 0.83, "dora": -0.31}
"""corr(dD, dM) of q and v in VL-BART, over layers and four checkpoints (PAPER, section 3.2)."""
