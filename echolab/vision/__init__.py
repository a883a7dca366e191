"""Video files and faces: decode, detect, track, crop."""
