"""What is known of the devices of a slice: memory and speeds, from their makers' pages."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """Published figures of one device.

    Attributes:
        hbm_gb: Memory in GiB.
        teraflops: Products of bfloat16, in 1e12 operations a second.
        hbm_gbps: Reads and writes of the memory, in 1e9 bytes a second.
        link_gbps: What a device sends to its neighbours, over all links, in 1e9 bytes a second.
            Makers give both directions together; this is one.
        source: Where the figures are from.
    """

    hbm_gb: float
    teraflops: float
    hbm_gbps: float
    link_gbps: float
    source: str


_PAGES = "https://cloud.google.com/tpu/docs/"

DEVICES: dict[str, Device] = {
    "TPU v4": Device(32, 275, 1200, 150, f"{_PAGES}v4"),
    "TPU v5 lite": Device(16, 197, 819, 200, f"{_PAGES}v5e"),
    "TPU v5": Device(95, 459, 2765, 600, f"{_PAGES}v5p"),
    "TPU v6 lite": Device(32, 918, 1638, 400, f"{_PAGES}v6e"),
}
"""The devices by JAX's name of their kind. (v5e is "TPU v5 lite", v5p is "TPU v5".)"""

USABLE = 0.95
"""The share of the memory that a program may have. The rest is the runtime's: of 16 GiB, XLA for
TPU v5e leaves 15.75 to programs."""
