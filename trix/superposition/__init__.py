"""Superposition."""
