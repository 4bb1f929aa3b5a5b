"""Tests that run examples together with other real programs."""
