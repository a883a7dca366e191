"""Lightning without its banners."""

import logging
import warnings
from typing import Any


class quiet:
    """Lightning's banners and its advice on loaders and loggers, which do not apply here."""

    def __enter__(self) -> None:
        self._levels = {}
        for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
            logger = logging.getLogger(name)
            self._levels[logger] = logger.level
            logger.setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", module="lightning_fabric")

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        for logger, level in self._levels.items():
            logger.setLevel(level)
