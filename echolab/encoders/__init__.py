"""Frozen encoders: pictures, sound and text to what the network is given."""
