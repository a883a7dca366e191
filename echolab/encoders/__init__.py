"""Frozen encoders: videos to latents; images, audio and text to conditions of the network."""
