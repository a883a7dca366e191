"""Turn raw talking videos, or synthetic talkers, into datasets, and encode them."""
