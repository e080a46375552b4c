"""Carries a trained PEFT adapter to a live model: register it, save it, deploy it, delete it."""
