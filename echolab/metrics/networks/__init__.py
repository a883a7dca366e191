"""Released networks that compute features and scores, in their published architectures."""
