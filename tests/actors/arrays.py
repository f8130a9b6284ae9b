"""An actor class apart from the other samples: numpy takes a third of the time in which their processes start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Arrays:
    """Takes and gives arrays."""

    async def scale(self, values: np.ndarray, by: float = 2.0) -> np.ndarray:
        return values * by

    async def rows(self, values: np.ndarray) -> AsyncIterator[np.ndarray]:
        for row in values:
            yield row
