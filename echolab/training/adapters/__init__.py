"""LoRA adapters: training, saving, loading and merging them."""
