"""Datasets of clips: shards, media bytes, sample order and batches."""
