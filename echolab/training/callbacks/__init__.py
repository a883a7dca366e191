"""Small callbacks around the optimizer step; their order is in `training/loop.py`."""
