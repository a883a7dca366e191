"""Preference data made by the product: sample candidates, judge them, pack pairs."""
