"""What is given and what is generated, and how often each task is trained."""
