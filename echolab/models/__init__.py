"""The network, its parameters in files, and networks that are used but not trained."""
