"""SimCLR, whose second rank hangs once: at its third step, where the file HANG_ONCE is still to be made."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sslscale.models.collectives import rank
from sslscale.objectives.simclr import SimCLR


class HangsOnce(SimCLR):
    steps = 0

    def forward(self, batch):
        self.steps += 1
        hung = Path(os.environ["HANG_ONCE"])
        if rank() == 1 and self.steps == 3 and not hung.exists():
            hung.touch()
            time.sleep(3600)
        return super().forward(batch)
