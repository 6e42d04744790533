"""Thin adapters between dcp and training libraries. Each file imports its library."""
