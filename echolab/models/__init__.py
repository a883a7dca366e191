"""The network, its names in released files, and networks that are used but not trained."""
