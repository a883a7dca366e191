"""Frozen encoders: images, audio and text to the conditions of the network."""
