"""LoRA: adapters on a network, alone and added to it."""
