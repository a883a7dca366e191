"""Preference datasets: sample candidates, judge them, pack pairs."""
