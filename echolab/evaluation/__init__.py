"""Sample held-out clips, decode and score them; shared by training, `evaluate` and the demo."""
