"""What the command line and the Python functions use when nothing else is said."""

from __future__ import annotations

RATIO = 0.2
"""Kept fraction of the whole KV cache."""
METRIC = "keydiff"
"""Intra-head metric."""
ALLOCATION = "lukv"
"""How the total budget is split over heads."""
OBJECTIVE = "relative"
"""Importance divided by the norm of the residual stream (relative), or as in the paper (paper)."""
FLOOR = 0.5
"""Share of the ratio that no head falls below, in budgets that were solved and not refined."""
BLEND = 0.15
"""Share of uniform budgets mixed into them."""
REFINED_FLOOR = 0.25
"""Share of the ratio that no head falls below, in refined budgets."""
REFINE_STEPS = 10
"""Steps of gradient descent on the divergence from the full cache, on a CPU."""
REFINE_STEPS_GPU = 40
"""The same on a GPU, where they take seconds."""
SINK = 4
"""Tokens at the start of a sequence that are never evicted."""
RECENT = 16
"""Tokens at the end of a sequence that are never evicted."""
POLICY = "capacity"
"""When to evict: a head that is full (capacity), or once after the prompt (prefill)."""

KV_TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Types of K and V that the runtime can hold."""
N_CONTEXT = 4000
"""Most tokens of a calibration text, as in the paper."""
K_MAX = 32
"""Most decoding steps of an answer."""
N_RATIO = 99
"""Ratios of the grid, 1 % to 99 %, as in the paper."""
