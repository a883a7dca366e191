"""The commands.  Hydra and omegaconf end here: below, there are plain values."""
